// Gradients of softmax attention on AMX (FlashAttention-2, arXiv:2307.08691, algorithm 2).
//
// With P the weights, found again from the saved sums, and δ = Σ out · grad_out for each query:
//   grad_v = Pᵀ grad_out,  dS = P ∘ (grad_out vᵀ − δ),  grad_q = scale · dS k,  grad_k = scale · dSᵀ q.
// One task is a key head with all the query heads that look at it, so no sum is shared by tasks and
// the order of adding does not depend on the threads. The gradients of keys and values are summed
// transposed, [width][keys]: so P and dS, as they come out, are right factors for them.
#if defined(__x86_64__)
#include <limits>

#include "amx_blocks.h"
#include "amx_training_attention.h"
#include "scratch.h"
#include "sight.h"
#include "threads.h"

AMX_BEGIN
namespace {

using amx::bf16;
using amx::ELEMENTS;
using amx::SUMS;
using amx::TILE;
using amx::up;
constexpr int64_t QUERIES = 128;  // of a block
constexpr int64_t KEYS = 64;     // of a block
constexpr int64_t SPAN = 512;    // queries whose factors are laid out at a time
constexpr int64_t COLUMNS = KEYS / TILE;
using Look = Seen<KEYS / GROUP>;

struct Work {
    int64_t key_steps, value_steps, key_tiles, value_tiles, rows;
    bf16 *queries, *toward;                 // left [rows/16][steps]: q and grad_out
    bf16 *queries_turned, *toward_turned;   // left, of the transposed: [rows/32][2 · steps]
    float *sums, *deltas;                   // [rows]
    float *grad_queries;                    // sums [rows/16][key_tiles]
    bf16 *keys, *values;                    // turned [KEYS/16][steps]
    bf16 *keys_woven;                       // [KEYS/32][2 · key_steps]
    bf16 *weights, *grad_scores;            // P and dS woven [QUERIES/32][KEYS/16]
    bf16 *grad_scores_left;                 // [QUERIES/16][KEYS/32]
    float *scores, *grad_weights;           // sums [2][2]
    float *grad_keys, *grad_values;         // sums [S/KEYS][tiles of the width][KEYS/16]

    explicit Work(const Attention &call)
        : key_steps(up(call.E, amx::STEP)), value_steps(up(call.V, amx::STEP)),
          key_tiles(up(call.E, TILE)), value_tiles(up(call.V, TILE)),
          rows(up(std::min(call.T, SPAN), GROUP) * GROUP) {
        thread_local Scratch scratch;
        const int64_t blocks = up(call.S, KEYS);
        Room counted;
        lay(counted, blocks);
        Room room{reinterpret_cast<uintptr_t>(scratch.room<uint8_t>(counted.used))};
        lay(room, blocks);
        std::memset(grad_keys, 0, blocks * key_tiles * COLUMNS * SUMS * sizeof(float));
        std::memset(grad_values, 0, blocks * value_tiles * COLUMNS * SUMS * sizeof(float));
    }

  private:
    void lay(Room &room, int64_t blocks) {
        queries = room.take<bf16>(rows / TILE * key_steps * ELEMENTS);
        toward = room.take<bf16>(rows / TILE * value_steps * ELEMENTS);
        queries_turned = room.take<bf16>(rows / TILE * key_steps * ELEMENTS);
        toward_turned = room.take<bf16>(rows / TILE * value_steps * ELEMENTS);
        sums = room.take<float>(rows);
        deltas = room.take<float>(rows);
        grad_queries = room.take<float>(rows / TILE * key_tiles * SUMS);
        keys = room.take<bf16>(COLUMNS * key_steps * ELEMENTS);
        values = room.take<bf16>(COLUMNS * value_steps * ELEMENTS);
        keys_woven = room.take<bf16>(COLUMNS * key_steps * ELEMENTS);
        weights = room.take<bf16>(QUERIES / GROUP * COLUMNS * ELEMENTS);
        grad_scores = room.take<bf16>(QUERIES / GROUP * COLUMNS * ELEMENTS);
        grad_scores_left = room.take<bf16>(QUERIES / GROUP * COLUMNS * ELEMENTS);
        scores = room.take<float>(4 * SUMS);
        grad_weights = room.take<float>(4 * SUMS);
        grad_keys = room.take<float>(blocks * key_tiles * COLUMNS * SUMS);
        grad_values = room.take<float>(blocks * value_tiles * COLUMNS * SUMS);
    }
};

// Rows of P and of dS, 32 keys wide, of one query.
struct Row {
    __m512i weights, grad_scores;
};

template <bool Masked>
inline Row row_of(const Work &work, const Look &seen, int64_t query, int64_t row, int64_t group,
                  __m512 scale) {
    const int64_t at = query / TILE * 2 * SUMS + query % TILE * TILE;
    const __m512 sum = _mm512_set1_ps(work.sums[row]), delta = _mm512_set1_ps(work.deltas[row]);
    __m512 weights[2], grads[2];
    for (int half = 0; half < 2; half++) {
        weights[half] = amx::exp2(
            _mm512_fmsub_ps(_mm512_load_ps(work.scores + at + half * SUMS), scale, sum));
        if (Masked)
            weights[half] = _mm512_maskz_mov_ps(
                static_cast<__mmask16>(seen.bits[group][query] >> half * TILE), weights[half]);
        grads[half] = _mm512_mul_ps(
            weights[half],
            _mm512_sub_ps(_mm512_load_ps(work.grad_weights + at + half * SUMS), delta));
    }
    return {(__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0]),
            (__m512i)_mm512_cvtne2ps_pbh(grads[1], grads[0])};
}

// P and dS of 32 queries, the block's `part`, and 32 keys, from their scores and grad_out · vᵀ.
template <bool Masked>
void soften(const Work &work, const Look &seen, int64_t part, int64_t first_row, int64_t group,
            __m512 scale) {
    for (int64_t query = 0; query < GROUP; query += 2) {
        const Row even = row_of<Masked>(work, seen, query, first_row + query, group, scale);
        const Row odd = row_of<Masked>(work, seen, query + 1, first_row + query + 1, group, scale);
        const int64_t woven = (part * COLUMNS + 2 * group) * ELEMENTS + query / 2 * amx::STEP;
        amx::weave(even.weights, odd.weights, work.weights + woven, work.weights + woven + ELEMENTS);
        amx::weave(even.grad_scores, odd.grad_scores, work.grad_scores + woven,
                   work.grad_scores + woven + ELEMENTS);
        bf16 *left = work.grad_scores_left +
                     ((2 * part + query / TILE) * (COLUMNS / 2) + group) * ELEMENTS +
                     query % TILE * amx::STEP;
        _mm512_store_si512(left, even.grad_scores);
        _mm512_store_si512(left + amx::STEP, odd.grad_scores);
    }
}

// Where one part of a block sees nothing of keys that another part sees.
void blacken(const Work &work, int64_t part, int64_t group) {
    const int64_t woven = (part * COLUMNS + 2 * group) * ELEMENTS;
    std::memset(work.weights + woven, 0, 2 * ELEMENTS * sizeof(bf16));
    std::memset(work.grad_scores + woven, 0, 2 * ELEMENTS * sizeof(bf16));
    for (int64_t half = 0; half < 2; half++)
        std::memset(work.grad_scores_left + ((2 * part + half) * (COLUMNS / 2) + group) * ELEMENTS,
                    0, ELEMENTS * sizeof(bf16));
}

// Rows of the span from `row` on, query `query` first, with the block of keys from `key` on.
void block(const Work &work, const Sight &sight, int64_t row, int64_t query, int64_t parts,
           int64_t key, __m512 scale) {
    Look seen[QUERIES / GROUP];
    int64_t first = COLUMNS / 2, last = 0;
    for (int64_t part = 0; part < parts; part++) {
        seen[part].look(sight, query + part * GROUP, key);
        if (!seen[part].any()) continue;
        first = std::min(first, seen[part].first), last = std::max(last, seen[part].last);
    }
    if (first >= last) return;
    const int64_t ks = work.key_steps, vs = work.value_steps, tile = row / TILE;
    for (int64_t part = 0; part < parts; part++)
        for (int64_t group = first; group < last; group++) {
            if (group < seen[part].first || group >= seen[part].last) {
                blacken(work, part, group);
                continue;
            }
            amx::multiply_few<2, 2>({work.queries + (tile + 2 * part) * ks * ELEMENTS, ks, 1},
                                    {work.keys + 2 * group * ks * ELEMENTS, ks, 1},
                                    {work.scores, 2, 1}, ks, true);
            amx::multiply_few<2, 2>({work.toward + (tile + 2 * part) * vs * ELEMENTS, vs, 1},
                                    {work.values + 2 * group * vs * ELEMENTS, vs, 1},
                                    {work.grad_weights, 2, 1}, vs, true);
            const int64_t at = row + part * GROUP;
            if (seen[part].full[group]) soften<false>(work, seen[part], part, at, group, scale);
            else soften<true>(work, seen[part], part, at, group, scale);
        }
    const int64_t columns = 2 * (last - first), turned = row / GROUP * 2 * ELEMENTS;
    const int64_t keys_at = key / KEYS * COLUMNS, from = 2 * first;
    amx::multiply({work.toward_turned + turned * vs, 1, 2 * vs},
                  {work.weights + from * ELEMENTS, 1, COLUMNS},
                  {work.grad_values + (keys_at * work.value_tiles + from) * SUMS, COLUMNS, 1},
                  work.value_tiles, columns, parts, false);
    amx::multiply({work.queries_turned + turned * ks, 1, 2 * ks},
                  {work.grad_scores + from * ELEMENTS, 1, COLUMNS},
                  {work.grad_keys + (keys_at * work.key_tiles + from) * SUMS, COLUMNS, 1},
                  work.key_tiles, columns, parts, false);
    amx::multiply({work.grad_scores_left + first * ELEMENTS, COLUMNS / 2, 1},
                  {work.keys_woven + first * 2 * ks * ELEMENTS, 1, 2 * ks},
                  {work.grad_queries + tile * work.key_tiles * SUMS, work.key_tiles, 1}, 2 * parts,
                  work.key_tiles, last - first, false);
}

// Rows' left tiles, and those of the transposed.
void lay_both(const bf16 *rows, int64_t stride, int64_t count, int64_t width, bf16 *left,
              bf16 *turned) {
    const int64_t tiles = up(count, GROUP) * 2, steps = up(width, amx::STEP);
    amx::pack_left(rows, stride, count, width, tiles, left);
    amx::weave_tiles(left, tiles, steps, {turned, 2 * steps, 1});
    amx::turn(turned, tiles * steps, turned);
}

// Every query's sum and δ; of those that see nothing, or do not exist, such that their weights are 0.
void recall(const Work &work, int64_t count, int64_t V, const float *sums, const bf16 *out,
            int64_t stride) {
    for (int64_t row = 0; row < up(count, GROUP) * GROUP; row++) {
        __m512 delta = _mm512_setzero_ps();
        const bf16 *toward = work.toward + row / TILE * work.value_steps * ELEMENTS +
                             row % TILE * amx::STEP;
        if (row < count)
            for (int64_t at = 0; at < V; at += amx::STEP)
                delta = _mm512_dpbf16_ps(
                    delta, (__m512bh)_mm512_load_si512(toward + at / amx::STEP * ELEMENTS),
                    (__m512bh)_mm512_maskz_loadu_epi16(amx::within(V, at), out + row * stride + at));
        const float none = std::numeric_limits<float>::infinity();
        work.sums[row] = row < count && sums[row] != -none ? sums[row] : none;
        work.deltas[row] = _mm512_reduce_add_ps(delta);
    }
}

void write_rows(const float *sums, int64_t tiles, int64_t count, int64_t width, float scale, bf16 *to,
                int64_t stride) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t tile = 0; tile < tiles; tile++)
            amx::store_rounded(
                to + row * stride + tile * TILE, amx::within(width, tile * TILE),
                _mm512_mul_ps(_mm512_set1_ps(scale),
                              _mm512_load_ps(sums + (row / TILE * tiles + tile) * SUMS +
                                             row % TILE * TILE)));
}

// The same of sums that are transposed: [keys/KEYS][tiles][KEYS/16].
void write_columns(const float *sums, int64_t tiles, int64_t count, int64_t width, float scale,
                   bf16 *to, int64_t stride) {
    for (int64_t key = 0; key < count; key += TILE)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const float *from =
                sums + ((key / KEYS * tiles + tile) * COLUMNS + key % KEYS / TILE) * SUMS;
            __m512i rows[16];
            for (int i = 0; i < 16; i++) rows[i] = _mm512_load_si512(from + i * TILE);
            amx::transpose(rows);
            for (int64_t i = 0; i < std::min(TILE + int64_t(0), count - key); i++)
                amx::store_rounded(to + (key + i) * stride + tile * TILE,
                                   amx::within(width, tile * TILE),
                                   _mm512_mul_ps(_mm512_set1_ps(scale), (__m512)rows[i]));
        }
}

}  // namespace

void amx_attend_backward(const Attention &call, const View &out, const float *sums,
                         const View &grad_out, const View &grad_q, const View &grad_k,
                         const View &grad_v) {
    const int64_t group = call.H / call.K;
    const __m512 scale = _mm512_set1_ps(call.scale * 1.44269504f);  // to base 2
    parallel(call.B * call.K, 3 * call.tasks_bytes(), [&](int64_t task) {
        const int64_t batch = task / call.K, shared = task % call.K;
        const auto rows_of = [&](const View &view, int64_t head, int64_t row) {
            return static_cast<bf16 *>(view.at) + batch * view.batch + head * view.head +
                   row * view.row;
        };
        const Sight sight(call, batch);
        const Work work(call);
        const amx::Tiles tiles;
        const int64_t spans = group * up(call.T, SPAN);
        for (int64_t span = 0; span < spans; span++) {
            const int64_t head = shared * group + span % group, begin = span / group * SPAN;
            const int64_t end = std::min(begin + SPAN, call.T), count = end - begin;
            const int64_t padded = up(count, GROUP) * GROUP;
            lay_both(rows_of(call.q, head, begin), call.q.row, count, call.E, work.queries,
                     work.queries_turned);
            lay_both(rows_of(grad_out, head, begin), grad_out.row, count, call.V, work.toward,
                     work.toward_turned);
            recall(work, count, call.V, sums + (batch * call.H + head) * call.T + begin,
                   rows_of(out, head, begin), out.row);
            std::memset(work.grad_queries, 0, padded * work.key_tiles * TILE * sizeof(float));
            for (int64_t key = 0; key < sight.end(end - 1); key += KEYS) {
                const int64_t keys = std::min(KEYS, call.S - key), key_tiles = up(keys, GROUP) * 2;
                amx::pack_left(rows_of(call.k, shared, key), call.k.row, keys, call.E, key_tiles,
                               work.keys);
                amx::weave_tiles(work.keys, key_tiles, work.key_steps,
                                 {work.keys_woven, 2 * work.key_steps, 1});
                amx::turn(work.keys, key_tiles * work.key_steps, work.keys);
                amx::pack_left(rows_of(call.v, shared, key), call.v.row, keys, call.V, key_tiles,
                               work.values);
                amx::turn(work.values, key_tiles * work.value_steps, work.values);
                for (int64_t row = 0; row < padded; row += QUERIES)
                    block(work, sight, row, begin + row, std::min(QUERIES, padded - row) / GROUP, key,
                          scale);
            }
            write_rows(work.grad_queries, work.key_tiles, count, call.E, call.scale,
                       rows_of(grad_q, head, begin), grad_q.row);
        }
        write_columns(work.grad_keys, work.key_tiles, call.S, call.E, call.scale,
                      rows_of(grad_k, shared, 0), grad_k.row);
        write_columns(work.grad_values, work.value_tiles, call.S, call.V, 1,
                      rows_of(grad_v, shared, 0), grad_v.row);
    });
}
TARGET_END
#else
#include "amx_training_attention.h"
void amx_attend_backward(const Attention &, const View &, const float *, const View &, const View &,
                         const View &, const View &) {}
#endif
