// Softmax attention, forward: 32 queries with a block of keys (amx_training_attention.cpp has the
// idea). Included by that file alone.
#pragma once
#if defined(__x86_64__)
#include <limits>

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
constexpr int64_t KEYS = 256;  // of a block
constexpr int64_t SPAN = 512;  // queries of a task
constexpr int64_t COLUMNS = KEYS / TILE;
constexpr int64_t MANY = 16;   // tasks, so that no thread is without one for long
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
using Look = Seen<KEYS / GROUP>;

struct Work {
    int64_t key_steps, value_steps, value_tiles;
    bf16 *queries;   // turned [SPAN/32][2][key_steps]
    bf16 *keys;      // left [KEYS/16][key_steps]
    bf16 *values;    // left, of the transposed: [2 · value_steps][KEYS/32]
    bf16 *laying;    // values as left tiles
    bf16 *weights;   // woven [KEYS/32][2], of 32 queries
    float *scores;   // sums [KEYS/16][2]
    float *results;  // sums [SPAN/32][value_tiles][2]
    float *totals;   // [SPAN], of the softmaxes' sums
    float *largest;  // [SPAN], scaled, to base 2

    Work(const Attention &call, int64_t rows)
        : key_steps(up(call.E, amx::STEP)), value_steps(up(call.V, amx::STEP)),
          value_tiles(up(call.V, TILE)) {
        thread_local Scratch scratch;
        lay_out(scratch, [&](Room &room) { lay(room, rows); });
        std::memset(totals, 0, rows * sizeof(float));
        std::fill_n(largest, rows, NOTHING);
    }

    // Of 16 rows from `row` on: 16 numbers of their results are one of 16 such rows.
    float *results_of(int64_t row, int64_t tile) const {
        return results + ((row / GROUP * value_tiles + tile) * 2 + row % GROUP / TILE) * SUMS;
    }

  private:
    void lay(Room &room, int64_t rows) {
        queries = room.take<bf16>(rows / TILE * key_steps * ELEMENTS);
        keys = room.take<bf16>(COLUMNS * key_steps * ELEMENTS);
        values = room.take<bf16>(COLUMNS * value_steps * ELEMENTS);
        laying = room.take<bf16>(COLUMNS * value_steps * ELEMENTS);
        weights = room.take<bf16>(COLUMNS * ELEMENTS);
        scores = room.take<float>(2 * COLUMNS * SUMS);
        results = room.take<float>(rows / TILE * value_tiles * SUMS);
        totals = room.take<float>(rows);
        largest = room.take<float>(rows);
    }
};

// What 16 queries have with 32 keys: half of a group of keys after the other.
struct Square {
    const float *scores;  // of the first 16 keys; of the others they are 2 tiles further
    bool full;
    __m512i bits;         // what each query sees, unless all

    Square(const Work &work, const Look &seen, int64_t tile, int64_t group)
        : scores(work.scores + (4 * group + tile) * SUMS), full(seen.full[group]),
          bits(_mm512_load_si512(seen.bits[group] + tile * TILE)) {}

    bool any(int64_t half) const {
        const int keys = static_cast<int>(0xffffu << 16 * half);
        return full || _mm512_test_epi32_mask(bits, _mm512_set1_epi32(keys));
    }
    __m512 score(int64_t half, int64_t key) const {
        return _mm512_load_ps(scores + half * 2 * SUMS + key * TILE);
    }
    __mmask16 sees(int64_t half, int64_t key) const {
        return _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1u << (16 * half + key)));
    }
};

template <bool Masked>
inline void find_most(const Square &square, int64_t half, __m512 most[4]) {
    for (int64_t key = 0; key < TILE; key++) {
        const __m512 score = square.score(half, key);
        most[key % 4] = Masked ? _mm512_mask_max_ps(most[key % 4], square.sees(half, key),
                                                    most[key % 4], score)
                               : _mm512_max_ps(most[key % 4], score);
    }
}

// Weights of 16 keys, as half of a woven tile. What they sum to is added to two sums.
template <bool Masked>
inline void weigh(const Square &square, int64_t half, __m512 scale, __m512 against, __m512 sums[2],
                  bf16 *to) {
    for (int64_t key = 0; key < TILE; key += 2) {
        __m512 weights[2];
        for (int64_t odd = 0; odd < 2; odd++) {
            weights[odd] =
                amx::exp2(_mm512_fmsub_ps(square.score(half, key + odd), scale, against));
            if (Masked)
                weights[odd] = _mm512_maskz_mov_ps(square.sees(half, key + odd), weights[odd]);
            sums[odd] = _mm512_add_ps(sums[odd], weights[odd]);
        }
        _mm512_store_si512(to + key / 2 * amx::STEP, amx::woven(weights[0], weights[1]));
    }
}

// Makes what 16 queries have summed so far fit a larger score: 1 where a score is still the largest.
void shrink(const Work &work, int64_t row, __m512 by) {
    for (int64_t tile = 0; tile < work.value_tiles; tile++) {
        float *const results = work.results_of(row, tile);
        for (int64_t at = 0; at < SUMS; at += TILE)
            _mm512_store_ps(results + at, _mm512_mul_ps(by, _mm512_load_ps(results + at)));
    }
}

// Scores of 32 queries, rows from `row` on; the largest of each.
void score(const Work &work, const Look &seen, int64_t row, __m512 largest[2]) {
    const int64_t steps = work.key_steps;
    __m512 most[2][4];
    for (int64_t i = 0; i < 8; i++) most[i / 4][i % 4] = _mm512_set1_ps(NOTHING);
    for (int64_t group = seen.first; group < seen.last; group++) {
        amx::multiply_few<2, 2>({work.keys + 2 * group * steps * ELEMENTS, steps, 1},
                                {work.queries + row / TILE * steps * ELEMENTS, steps, 1},
                                {work.scores + 4 * group * SUMS, 2, 1}, steps, true);
        for (int64_t tile = 0; tile < 2; tile++) {
            const Square square(work, seen, tile, group);
            for (int64_t half = 0; half < 2; half++) {
                if (square.full) find_most<false>(square, half, most[tile]);
                else if (square.any(half)) find_most<true>(square, half, most[tile]);
            }
        }
    }
    for (int64_t tile = 0; tile < 2; tile++)
        largest[tile] = _mm512_max_ps(_mm512_max_ps(most[tile][0], most[tile][1]),
                                      _mm512_max_ps(most[tile][2], most[tile][3]));
}

// Scores of 16 queries, rows from `row` on, to weights, against the largest so far. `fresh`: nothing
// was summed before.
void soften(const Work &work, const Look &seen, int64_t row, __m512 most, __m512 scale, bool fresh) {
    const int64_t tile = row % GROUP / TILE;
    const __m512 nothing = _mm512_set1_ps(NOTHING), now = _mm512_mul_ps(scale, most);
    const __m512 before = _mm512_load_ps(work.largest + row);
    const __m512 largest = _mm512_max_ps(now, before);  // in this order not NaN
    __m512 total = _mm512_load_ps(work.totals + row);
    const __mmask16 grown = _mm512_cmp_ps_mask(largest, before, _CMP_GT_OQ) &
                            _mm512_cmp_ps_mask(before, nothing, _CMP_GT_OQ);
    if (!fresh && grown) {
        const __m512 by = _mm512_mask_mov_ps(_mm512_set1_ps(1), grown,
                                             amx::exp2(_mm512_sub_ps(before, largest)));
        total = _mm512_mul_ps(total, by);
        shrink(work, row, by);
    }
    _mm512_store_ps(work.largest + row, largest);
    const __m512 against =
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(largest, nothing, _CMP_GT_OQ), largest);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t group = seen.first; group < seen.last; group++) {
        const Square square(work, seen, tile, group);
        for (int64_t half = 0; half < 2; half++) {
            bf16 *const to = work.weights + (2 * group + tile) * ELEMENTS + half * ELEMENTS / 2;
            if (square.full) weigh<false>(square, half, scale, against, sums, to);
            else if (square.any(half)) weigh<true>(square, half, scale, against, sums, to);
            else std::memset(to, 0, ELEMENTS / 2 * sizeof(bf16));
        }
    }
    _mm512_store_ps(work.totals + row, _mm512_add_ps(total, _mm512_add_ps(sums[0], sums[1])));
}

// 32 queries, rows from `row` on, with a block of keys of which they see something.
void attend_block(const Work &work, const Look &seen, int64_t row, __m512 scale) {
    const __m512 before =
        _mm512_or_ps(_mm512_load_ps(work.totals + row), _mm512_load_ps(work.totals + row + TILE));
    const bool fresh = !_mm512_cmp_ps_mask(before, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    __m512 most[2];
    score(work, seen, row, most);
    for (int64_t tile = 0; tile < 2; tile++)
        soften(work, seen, row + tile * TILE, most[tile], scale, fresh);
    amx::multiply({work.values + seen.first * ELEMENTS, KEYS / GROUP, 1},
                  {work.weights + 2 * seen.first * ELEMENTS, 1, 2},
                  {work.results_of(row, 0), 2, 1}, work.value_tiles, 2, seen.last - seen.first, fresh);
}

}  // namespace
TARGET_END
#endif
