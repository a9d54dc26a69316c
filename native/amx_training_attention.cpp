// Softmax attention of many queries on AMX, forward (FlashAttention, arXiv:2205.14135, on a CPU).
//
// One task is a span of one head's queries. Its keys and values go by in blocks, each laid out once
// as right factors; then 32 queries at a time make their scores with the block, soften them against
// the largest so far and add the weighted values. Nothing is kept but the result and one number for
// each query, the logarithm of its softmax's sum, from which the backward pass finds the weights
// again. A query's result depends on what it sees alone: not on its neighbours, nor on the threads.
#if defined(__x86_64__)
#include "amx_training_attention.h"

#include <cmath>
#include <limits>

#include "amx_blocks.h"
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
constexpr int64_t KEYS = 256;  // of a block
constexpr int64_t SPAN = 512;  // queries of a task
constexpr int64_t COLUMNS = KEYS / TILE;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
using Look = Seen<KEYS / 64>;

struct Work {
    int64_t key_steps, value_steps, value_tiles;
    bf16 *queries;    // left [SPAN/16][key_steps]
    bf16 *keys;       // turned [KEYS/16][key_steps]
    bf16 *values;     // woven [KEYS/32][2 · value_steps]
    bf16 *laying;     // values as left tiles
    bf16 *weights;    // left [2][KEYS/32], of 32 queries
    float *scores;    // sums [2][KEYS/16]
    float *results;   // sums [SPAN/16][value_tiles]
    float *totals;    // [SPAN][16 parts], of the softmaxes' sums
    float *largest;   // [SPAN], scaled, to base 2

    Work(const Attention &call, int64_t queries_count)
        : key_steps(up(call.E, amx::STEP)), value_steps(up(call.V, amx::STEP)),
          value_tiles(up(call.V, TILE)) {
        thread_local Scratch scratch;
        const int64_t rows = up(queries_count, GROUP) * GROUP;
        Room counted;
        lay(counted, rows);
        Room room{reinterpret_cast<uintptr_t>(scratch.room<uint8_t>(counted.used))};
        lay(room, rows);
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
        totals = room.take<float>(rows * TILE);
        largest = room.take<float>(rows);
    }
};

template <bool Masked>
inline __m512 score_of(const float *scores, const Look &seen, int64_t query, int64_t tile) {
    const __m512 score = _mm512_load_ps(scores + tile * SUMS);
    if (!Masked) return score;
    return _mm512_mask_mov_ps(_mm512_set1_ps(NOTHING), seen.of(query, tile), score);
}

// Scores of 32 queries to weights, against the largest so far; what was summed before is made to fit.
template <bool Masked>
void soften(const Work &work, const Look &seen, int64_t first_query, float scale) {
    const __m512 by = _mm512_set1_ps(scale);
    for (int64_t query = 0; query < GROUP; query++) {
        const float *scores = work.scores + query / TILE * COLUMNS * SUMS + query % TILE * TILE;
        float *total = work.totals + (first_query + query) * TILE;
        float &largest = work.largest[first_query + query];
        __m512 most = _mm512_set1_ps(NOTHING), second = most;
        for (int64_t tile = 2 * seen.first; tile < 2 * seen.last; tile += 2) {
            most = _mm512_max_ps(most, score_of<Masked>(scores, seen, query, tile));
            second = _mm512_max_ps(second, score_of<Masked>(scores, seen, query, tile + 1));
        }
        const float before = largest, now = _mm512_reduce_max_ps(_mm512_max_ps(most, second)) * scale;
        __m512 sum = _mm512_load_ps(total);
        if (now > before) {
            largest = now;
            if (before > NOTHING) {
                const __m512 shrunk = amx::exp2(_mm512_set1_ps(before - now));
                sum = _mm512_mul_ps(sum, shrunk);
                float *row = work.results + (first_query + query) / TILE * work.value_tiles * SUMS +
                             query % TILE * TILE;
                for (int64_t tile = 0; tile < work.value_tiles; tile++, row += SUMS)
                    _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), shrunk));
            }
        }
        const __m512 against = _mm512_set1_ps(largest > NOTHING ? largest : 0);
        bf16 *weights = work.weights + query / TILE * (COLUMNS / 2) * ELEMENTS +
                        query % TILE * amx::STEP;
        for (int64_t group = seen.first; group < seen.last; group++) {
            const __m512 low = amx::exp2(
                _mm512_fmsub_ps(score_of<Masked>(scores, seen, query, 2 * group), by, against));
            const __m512 high = amx::exp2(
                _mm512_fmsub_ps(score_of<Masked>(scores, seen, query, 2 * group + 1), by, against));
            sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
            _mm512_store_si512(weights + group * ELEMENTS, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        _mm512_store_ps(total, sum);
    }
}

// All queries of the span with the block of keys from `key` on.
void attend_block(const Work &work, const Sight &sight, int64_t begin, int64_t end, int64_t key,
                  float scale) {
    const int64_t steps = work.key_steps;
    for (int64_t query = begin; query < end; query += GROUP) {
        Look seen;
        seen.look(sight, query, key);
        if (!seen.any()) continue;
        const int64_t row = (query - begin) / TILE, columns = 2 * (seen.last - seen.first);
        amx::multiply({work.queries + row * steps * ELEMENTS, steps, 1},
                      {work.keys + 2 * seen.first * steps * ELEMENTS, steps, 1},
                      {work.scores + 2 * seen.first * SUMS, COLUMNS, 1}, 2, columns, steps, true);
        if (seen.all) soften<false>(work, seen, query - begin, scale);
        else soften<true>(work, seen, query - begin, scale);
        amx::multiply({work.weights + seen.first * ELEMENTS, COLUMNS / 2, 1},
                      {work.values + seen.first * 2 * work.value_steps * ELEMENTS, 1,
                       2 * work.value_steps},
                      {work.results + row * work.value_tiles * SUMS, work.value_tiles, 1}, 2,
                      work.value_tiles, seen.last - seen.first, false);
    }
}

// Before the first key: nothing, or what other keys gave, as if one key had given it.
void begin_span(const Work &work, int64_t count, int64_t V, const float *carried, int64_t stride,
                const float *sums) {
    const int64_t rows = up(count, GROUP) * GROUP;
    std::memset(work.results, 0, rows * work.value_tiles * TILE * sizeof(float));
    std::memset(work.totals, 0, rows * TILE * sizeof(float));
    std::fill_n(work.largest, rows, NOTHING);
    if (!carried) return;
    for (int64_t row = 0; row < count; row++) {
        work.largest[row] = sums[row];
        work.totals[row * TILE] = sums[row] > NOTHING;
        for (int64_t tile = 0; tile < work.value_tiles; tile++)
            _mm512_store_ps(work.results + (row / TILE * work.value_tiles + tile) * SUMS +
                                row % TILE * TILE,
                            _mm512_maskz_loadu_ps(amx::within(V, tile * TILE),
                                                  carried + row * stride + tile * TILE));
    }
}

void end_span(const Work &work, int64_t count, int64_t V, void *out, int64_t stride, float *sums,
              bool carried) {
    for (int64_t row = 0; row < count; row++) {
        const float total = _mm512_reduce_add_ps(_mm512_load_ps(work.totals + row * TILE));
        sums[row] = work.largest[row] + std::log2(total);
        const __m512 by = _mm512_set1_ps(total == 0 ? 0 : 1 / total);
        for (int64_t tile = 0; tile < work.value_tiles; tile++) {
            const __m512 result = _mm512_mul_ps(
                by, _mm512_load_ps(work.results + (row / TILE * work.value_tiles + tile) * SUMS +
                                   row % TILE * TILE));
            const __mmask16 mask = amx::within(V, tile * TILE);
            const int64_t at = row * stride + tile * TILE;
            if (carried) _mm512_mask_storeu_ps(static_cast<float *>(out) + at, mask, result);
            else amx::store_rounded(static_cast<bf16 *>(out) + at, mask, result);
        }
    }
}

}  // namespace

void amx_attend(const Attention &call, const View &out, float *sums, bool carried) {
    const int64_t spans = up(call.T, SPAN);
    const float scale = call.scale * 1.44269504f;  // to base 2
    parallel(call.B * call.H * spans, call.tasks_bytes(), [&](int64_t task) {
        // The last span first: in the causal case it has most to do.
        const int64_t batch = task / spans / call.H, head = task / spans % call.H;
        const int64_t begin = (spans - 1 - task % spans) * SPAN;
        const int64_t end = std::min(begin + SPAN, call.T), count = end - begin;
        const auto rows_of = [&](const View &view, int64_t of_head, int64_t row) {
            return static_cast<bf16 *>(view.at) + batch * view.batch + of_head * view.head +
                   row * view.row;
        };
        const int64_t shared = head / (call.H / call.K);
        const Sight sight(call, batch);
        const Work work(call, count);
        float *const own_sums = sums + (batch * call.H + head) * call.T + begin;
        const int64_t at = batch * out.batch + head * out.head + begin * out.row;
        void *const own_out = static_cast<uint8_t *>(out.at) + at * (carried ? 4 : 2);
        begin_span(work, count, call.V, carried ? static_cast<float *>(own_out) : nullptr, out.row,
                   own_sums);
        amx::pack_left(rows_of(call.q, head, begin), call.q.row, count, call.E,
                       up(count, GROUP) * 2, work.queries);
        const amx::Tiles tiles;
        for (int64_t key = 0; key < sight.end(end - 1); key += KEYS) {
            const int64_t keys = std::min(KEYS, call.S - key), key_tiles = up(keys, GROUP) * 2;
            amx::pack_left(rows_of(call.k, shared, key), call.k.row, keys, call.E, key_tiles,
                           work.keys);
            amx::turn(work.keys, key_tiles * work.key_steps, work.keys);
            amx::pack_left(rows_of(call.v, shared, key), call.v.row, keys, call.V, key_tiles,
                           work.laying);
            amx::weave_tiles(work.laying, key_tiles, work.value_steps,
                             {work.values, 2 * work.value_steps, 1});
            attend_block(work, sight, begin, end, key, scale);
        }
        end_span(work, count, call.V, own_out, out.row, own_sums, carried);
    });
}
TARGET_END
#else
#include "amx_training_attention.h"
void amx_attend(const Attention &, const View &, float *, bool) {}
#endif
