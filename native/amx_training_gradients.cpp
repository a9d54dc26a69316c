// Gradients of softmax attention on AMX (FlashAttention-2, arXiv:2307.08691, algorithm 2).
//
// With P the weights, found again from the saved sums, and δ = Σ out · grad_out for each query:
//   grad_v = Pᵀ grad_out,  dS = P ∘ (grad_out vᵀ − δ),  grad_q = scale · dS k,  grad_k = scale · dSᵀ q.
// One task is a key head with all the query heads that look at it, so no sum is shared by tasks and
// the order of adding does not depend on the threads. Pᵀ and dSᵀ are made, [keys][queries]: their rows
// are left factors for the gradients of values and keys, over all the queries of a block at once, and
// woven they are right factors for the gradients of queries, which are summed transposed,
// [width][queries].
#if defined(__x86_64__)
#include <limits>

#include "amx_gradients_block.h"
#include "threads.h"

AMX_BEGIN
namespace {

// Rows in memory as turned and as woven tiles; zeros beyond `count` and `width`.
void lay_both(const bf16 *rows, int64_t stride, int64_t count, int64_t width, bf16 *turned,
              bf16 *woven) {
    const int64_t tiles = up(count, GROUP) * 2, steps = up(width, amx::STEP);
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t step = 0; step < steps; step++, turned += ELEMENTS) {
            __m512i square[16];
            amx::load_square(rows, stride, tile * TILE, count, step * amx::STEP, width, square);
            bf16 *const to = woven + (tile / 2 * steps + step) * 2 * ELEMENTS +
                             tile % 2 * (ELEMENTS / 2);
            for (int64_t j = 0; j < 8; j++)
                amx::weave(square[2 * j], square[2 * j + 1], to + j * amx::STEP,
                           to + j * amx::STEP + ELEMENTS);
            amx::transpose(square);
            for (int64_t i = 0; i < 16; i++)
                _mm512_store_si512(turned + i * amx::STEP, square[i]);
        }
}

// Every query's sum and δ; of those that see nothing, or do not exist, such that their weights are 0.
void recall(const Work &work, int64_t count, int64_t V, const float *sums, const bf16 *out,
            int64_t out_stride, const bf16 *toward, int64_t stride) {
    const __m512 none = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    for (int64_t row = 0; row < up(count, GROUP) * GROUP; row += TILE) {
        __m512i deltas[16];
        for (int64_t i = 0; i < 16; i++) {
            __m512 delta = _mm512_setzero_ps();
            for (int64_t at = 0; row + i < count && at < V; at += amx::STEP) {
                const __mmask32 mask = amx::within(V, at);
                delta = _mm512_dpbf16_ps(
                    delta,
                    (__m512bh)_mm512_maskz_loadu_epi16(mask, toward + (row + i) * stride + at),
                    (__m512bh)_mm512_maskz_loadu_epi16(mask, out + (row + i) * out_stride + at));
            }
            deltas[i] = (__m512i)delta;
        }
        amx::transpose(deltas);
        __m512 sum = (__m512)deltas[0];
        for (int64_t i = 1; i < 16; i++) sum = _mm512_add_ps(sum, (__m512)deltas[i]);
        _mm512_store_ps(work.deltas + row, sum);
        const __mmask16 exist = amx::within(std::max<int64_t>(0, count - row), 0);
        const __m512 own = _mm512_mask_loadu_ps(none, exist, sums + row);
        const __m512 nothing = _mm512_sub_ps(_mm512_setzero_ps(), none);
        _mm512_store_ps(work.sums + row, _mm512_mask_mov_ps(
            own, _mm512_cmp_ps_mask(own, nothing, _CMP_EQ_OQ), none));
    }
}

// Sums [count/16][tiles], times a scale, as rows.
void write_rows(const float *sums, int64_t tiles, int64_t count, int64_t width, float scale, bf16 *to,
                int64_t stride) {
    const __m512 by = _mm512_set1_ps(scale);
    for (int64_t row = 0; row < count; row++)
        for (int64_t tile = 0; tile < tiles; tile += 2) {
            const float *const low =
                sums + (row / TILE * tiles + tile) * SUMS + row % TILE * TILE;
            const float *const high = tile + 1 < tiles ? low + SUMS : low;
            _mm512_mask_storeu_epi16(
                to + row * stride + tile * TILE, amx::within(width, tile * TILE),
                (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(by, _mm512_load_ps(high)),
                                             _mm512_mul_ps(by, _mm512_load_ps(low))));
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
        bool laid = false;  // all keys, where one block holds them
        for (int64_t span = 0; span < spans; span++) {
            const int64_t head = shared * group + span % group, begin = span / group * SPAN;
            const int64_t end = std::min(begin + SPAN, call.T), count = end - begin;
            const int64_t padded = up(count, GROUP) * GROUP;
            const bf16 *const toward = rows_of(grad_out, head, begin);
            lay_both(rows_of(call.q, head, begin), call.q.row, count, call.E, work.queries,
                     work.queries_woven);
            lay_both(toward, grad_out.row, count, call.V, work.toward, work.toward_woven);
            recall(work, count, call.V, sums + (batch * call.H + head) * call.T + begin,
                   rows_of(out, head, begin), out.row, toward, grad_out.row);
            const int64_t seen = sight.end(end - 1);
            if (!seen)
                std::memset(work.grad_queries, 0, padded * work.key_tiles * TILE * sizeof(float));
            for (int64_t key = 0; key < seen; key += KEYS) {
                const int64_t keys = std::min(KEYS, call.S - key), key_tiles = up(keys, GROUP) * 2;
                if (!laid) {
                    amx::pack_left(rows_of(call.k, shared, key), call.k.row, keys, call.E,
                                   key_tiles, work.keys);
                    amx::transpose_tiles(work.keys, key_tiles, work.key_steps,
                                         {work.keys_transposed, 1, GROUPS});
                    amx::pack_left(rows_of(call.v, shared, key), call.v.row, keys, call.V,
                                   key_tiles, work.values);
                    laid = call.S <= KEYS;
                }
                for (int64_t row = 0; row < padded; row += QUERIES)
                    Block(work, sight, row, begin + row, std::min(QUERIES, padded - row) / GROUP,
                          key)
                        .run(scale);
            }
            for (int64_t row = 0; row < count; row += TILE)
                amx::write_transposed(
                    work.grad_queries + row / GROUP * 2 * work.key_tiles * SUMS +
                        row % GROUP / TILE * SUMS,
                    2, call.E, ~__mmask16(0), _mm512_set1_ps(call.scale),
                    std::min<int64_t>(TILE, count - row), rows_of(grad_q, head, begin + row),
                    grad_q.row);
        }
        write_rows(work.grad_keys, work.key_tiles, call.S, call.E, call.scale,
                   rows_of(grad_k, shared, 0), grad_k.row);
        write_rows(work.grad_values, work.value_tiles, call.S, call.V, 1,
                   rows_of(grad_v, shared, 0), grad_v.row);
    });
}
TARGET_END
#else
#include "amx_training_attention.h"
void amx_attend_backward(const Attention &, const View &, const float *, const View &, const View &,
                         const View &, const View &) {}
#endif
