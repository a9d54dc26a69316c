// Gradients of softmax attention: a block of queries with a block of keys (amx_training_gradients.cpp
// has the idea). Included by that file alone.
#pragma once
#if defined(__x86_64__)
#include "amx_transposed.h"
#include "scratch.h"
#include "sight.h"

AMX_BEGIN
namespace {

using amx::bf16;
using amx::ELEMENTS;
using amx::SUMS;
using amx::TILE;
using amx::up;
constexpr int64_t QUERIES = 256;  // of a block
constexpr int64_t KEYS = 256;     // of a block
constexpr int64_t SPAN = 512;     // queries whose factors are laid out at a time
constexpr int64_t PARTS = QUERIES / GROUP, GROUPS = KEYS / GROUP;
using Look = Seen<GROUPS>;

struct Work {
    int64_t key_steps, value_steps, key_tiles, value_tiles, rows;
    bf16 *queries, *toward;              // turned [rows/16][steps]: q and grad_out
    bf16 *queries_woven, *toward_woven;  // [rows/32][2 · steps]
    float *sums, *deltas;                // [rows]
    float *grad_queries;                 // sums [rows/32][key_tiles][2], transposed
    bf16 *keys, *values;                 // left [KEYS/16][steps]
    bf16 *keys_transposed;               // left [2 · key_steps][GROUPS]
    bf16 *weights, *grad_scores;         // Pᵀ and dSᵀ of 32 keys, left [2][PARTS]
    bf16 *grad_scores_woven;             // [PARTS][GROUPS][2]
    float *scores, *grad_weights;        // sums [2 keys][2 queries]
    float *grad_keys, *grad_values;      // sums [S/16][tiles of the width]

    explicit Work(const Attention &call)
        : key_steps(up(call.E, amx::STEP)), value_steps(up(call.V, amx::STEP)),
          key_tiles(up(call.E, TILE)), value_tiles(up(call.V, TILE)),
          rows(up(std::min(call.T, SPAN), GROUP) * GROUP) {
        thread_local Scratch scratch;
        const int64_t tiles = up(call.S, GROUP) * 2;
        lay_out(scratch, [&](Room &room) { lay(room, tiles); });
        std::memset(grad_keys, 0, tiles * key_tiles * SUMS * sizeof(float));
        std::memset(grad_values, 0, tiles * value_tiles * SUMS * sizeof(float));
    }

  private:
    void lay(Room &room, int64_t tiles) {
        queries = room.take<bf16>(rows / TILE * key_steps * ELEMENTS);
        toward = room.take<bf16>(rows / TILE * value_steps * ELEMENTS);
        queries_woven = room.take<bf16>(rows / TILE * key_steps * ELEMENTS);
        toward_woven = room.take<bf16>(rows / TILE * value_steps * ELEMENTS);
        sums = room.take<float>(rows);
        deltas = room.take<float>(rows);
        grad_queries = room.take<float>(rows / TILE * key_tiles * SUMS);
        keys = room.take<bf16>(2 * GROUPS * key_steps * ELEMENTS);
        values = room.take<bf16>(2 * GROUPS * value_steps * ELEMENTS);
        keys_transposed = room.take<bf16>(2 * GROUPS * key_steps * ELEMENTS);
        weights = room.take<bf16>(2 * PARTS * ELEMENTS);
        grad_scores = room.take<bf16>(2 * PARTS * ELEMENTS);
        grad_scores_woven = room.take<bf16>(GROUPS * 2 * PARTS * ELEMENTS);
        scores = room.take<float>(4 * SUMS);
        grad_weights = room.take<float>(4 * SUMS);
        grad_keys = room.take<float>(tiles * key_tiles * SUMS);
        grad_values = room.take<float>(tiles * value_tiles * SUMS);
    }
};

// 32 queries with 32 keys: where their scores become weights and their gradients.
struct Square {
    const Work &work;
    const Look &seen;
    int64_t part, group;
    __m512 scale, sums[2], deltas[2];

    Square(const Work &work, const Look &seen, int64_t row, int64_t part, int64_t group,
           __m512 scale)
        : work(work), seen(seen), part(part), group(group), scale(scale) {
        for (int64_t tile = 0; tile < 2; tile++) {
            sums[tile] = _mm512_load_ps(work.sums + row + tile * TILE);
            deltas[tile] = _mm512_load_ps(work.deltas + row + tile * TILE);
        }
    }

    // Rows of Pᵀ and dSᵀ.
    struct Row {
        __m512i weights, grads;
    };

    template <bool Masked>
    Row row_of(int64_t key) const {
        const int64_t at = key / TILE * 2 * SUMS + key % TILE * TILE;
        __m512 weights[2], grads[2];
        for (int64_t tile = 0; tile < 2; tile++) {
            weights[tile] = amx::exp2(_mm512_fmsub_ps(
                _mm512_load_ps(work.scores + at + tile * SUMS), scale, sums[tile]));
            if (Masked)
                weights[tile] = _mm512_maskz_mov_ps(
                    _mm512_test_epi32_mask(_mm512_load_si512(seen.bits[group] + tile * TILE),
                                           _mm512_set1_epi32(1u << key)),
                    weights[tile]);
            grads[tile] = _mm512_mul_ps(
                weights[tile],
                _mm512_sub_ps(_mm512_load_ps(work.grad_weights + at + tile * SUMS), deltas[tile]));
        }
        return {(__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0]),
                (__m512i)_mm512_cvtne2ps_pbh(grads[1], grads[0])};
    }

    template <bool Masked>
    void soften() const {
        for (int64_t key = 0; key < GROUP; key += 2) {
            const Row even = row_of<Masked>(key), odd = row_of<Masked>(key + 1);
            const int64_t left =
                (key / TILE * PARTS + part) * ELEMENTS + key % TILE * amx::STEP;
            _mm512_store_si512(work.weights + left, even.weights);
            _mm512_store_si512(work.weights + left + amx::STEP, odd.weights);
            _mm512_store_si512(work.grad_scores + left, even.grads);
            _mm512_store_si512(work.grad_scores + left + amx::STEP, odd.grads);
            bf16 *const woven = work.grad_scores_woven +
                                (part * GROUPS + group) * 2 * ELEMENTS + key / 2 * amx::STEP;
            amx::weave(even.grads, odd.grads, woven, woven + ELEMENTS);
        }
    }

    // Where nothing is seen, but others see these keys.
    void blacken() const {
        for (int64_t half = 0; half < 2; half++) {
            const int64_t left = (half * PARTS + part) * ELEMENTS;
            std::memset(work.weights + left, 0, ELEMENTS * sizeof(bf16));
            std::memset(work.grad_scores + left, 0, ELEMENTS * sizeof(bf16));
        }
        std::memset(work.grad_scores_woven + (part * GROUPS + group) * 2 * ELEMENTS, 0,
                    2 * ELEMENTS * sizeof(bf16));
    }
};

// Rows of the span from `row` on, query `query` first, with the block of keys from `key` on.
struct Block {
    const Work &work;
    int64_t row, key, parts;
    Look seen[PARTS];

    Block(const Work &work, const Sight &sight, int64_t row, int64_t query, int64_t parts,
          int64_t key)
        : work(work), row(row), key(key), parts(parts) {
        for (int64_t part = 0; part < parts; part++)
            seen[part].look(sight, query + part * GROUP, key);
    }

    bool sees(int64_t part, int64_t group) const {
        return group >= seen[part].first && group < seen[part].last;
    }

    // Scores of 32 queries with 32 keys, and grad_out · vᵀ.
    void multiply(int64_t part, int64_t group) const {
        const int64_t ks = work.key_steps, vs = work.value_steps, tile = row / TILE + 2 * part;
        amx::multiply_few<2, 2>({work.keys + 2 * group * ks * ELEMENTS, ks, 1},
                                {work.queries + tile * ks * ELEMENTS, ks, 1},
                                {work.scores, 2, 1}, ks, true);
        amx::multiply_few<2, 2>({work.values + 2 * group * vs * ELEMENTS, vs, 1},
                                {work.toward + tile * vs * ELEMENTS, vs, 1},
                                {work.grad_weights, 2, 1}, vs, true);
    }

    // Pᵀ and dSᵀ of 32 keys and all the queries; the gradients of keys and values.
    void over_queries(int64_t group, __m512 scale) const {
        int64_t first = 0, last = parts;
        while (last > 0 && !sees(last - 1, group)) last--;
        while (first < last && !sees(first, group)) first++;
        if (first >= last) return;
        const int64_t ks = work.key_steps, vs = work.value_steps;
        for (int64_t part = first; part < last; part++) {
            const Square square(work, seen[part], row + part * GROUP, part, group, scale);
            if (!sees(part, group)) {
                square.blacken();
                continue;
            }
            multiply(part, group);
            if (seen[part].full[group]) square.soften<false>();
            else square.soften<true>();
        }
        const int64_t tile = key / TILE + 2 * group, step = row / GROUP + first;
        amx::multiply({work.weights + first * ELEMENTS, PARTS, 1},
                      {work.toward_woven + step * 2 * vs * ELEMENTS, 1, 2 * vs},
                      {work.grad_values + tile * work.value_tiles * SUMS, work.value_tiles, 1}, 2,
                      work.value_tiles, last - first, false);
        amx::multiply({work.grad_scores + first * ELEMENTS, PARTS, 1},
                      {work.queries_woven + step * 2 * ks * ELEMENTS, 1, 2 * ks},
                      {work.grad_keys + tile * work.key_tiles * SUMS, work.key_tiles, 1}, 2,
                      work.key_tiles, last - first, false);
    }

    // The gradients of 32 queries, when all the keys' dSᵀ are made. The first block begins them.
    void over_keys(int64_t part) const {
        const Look &look = seen[part];
        float *const sums = work.grad_queries + (row / TILE + 2 * part) * work.key_tiles * SUMS;
        if (look.any())
            amx::multiply({work.keys_transposed + look.first * ELEMENTS, GROUPS, 1},
                          {work.grad_scores_woven + (part * GROUPS + look.first) * 2 * ELEMENTS, 1, 2},
                          {sums, 2, 1}, work.key_tiles, 2, look.last - look.first, key == 0);
        else if (key == 0)
            std::memset(sums, 0, 2 * work.key_tiles * SUMS * sizeof(float));
    }

    void run(__m512 scale) const {
        // Between the first and the last group that 32 queries see may be one that they do not.
        for (int64_t group = 0; group < GROUPS; group++) over_queries(group, scale);
        for (int64_t part = 0; part < parts; part++) over_keys(part);
    }
};

}  // namespace
TARGET_END
#endif
