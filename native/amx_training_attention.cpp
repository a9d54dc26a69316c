// Softmax attention of many queries on AMX, forward (FlashAttention, arXiv:2205.14135, on a CPU).
//
// One task is a span of queries of one head, or short heads side by side that share their keys. Keys
// and values go by in blocks, each laid out once as left factors; then 32 queries at a time make
// their scores with the block, soften them against the largest so far and add the weighted values.
// Scores, weights and results are transposed, [keys][queries] and [width][queries]: what every query
// has one of, its largest score and its sum, lies side by side for 16 queries, and weights are right
// factors as they come out. Nothing is kept but the result and one number for each query, the
// logarithm of its softmax's sum, from which the backward pass finds the weights again. A query's
// result depends on what it sees alone: not on its neighbours, nor on the threads.
#if defined(__x86_64__)
#include "amx_training_attention.h"

#include <limits>

#include "amx_transposed.h"
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
        Room counted;
        lay(counted, rows);
        Room room{reinterpret_cast<uintptr_t>(scratch.room<uint8_t>(counted.used))};
        lay(room, rows);
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
        return full || _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0xffff << 16 * half));
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

// Before the first key, of `count` <= 16 rows: what other keys gave, as if one key had given it.
void begin_carried(const Work &work, int64_t row, int64_t count, int64_t V, const float *carried,
                   int64_t stride, const float *sums) {
    for (int64_t i = 0; i < count; i++) {
        work.largest[row + i] = sums[i];
        work.totals[row + i] = sums[i] > NOTHING;
    }
    for (int64_t at = 0; at < V; at += TILE) {
        __m512i rows[16];
        for (int64_t i = 0; i < 16; i++)
            rows[i] = (__m512i)_mm512_maskz_loadu_ps(i < count ? amx::within(V, at) : 0,
                                                     carried + i * stride + at);
        amx::transpose(rows);
        float *const to = work.results_of(row, at / TILE);
        for (int64_t i = 0; i < 16; i++) _mm512_store_si512(to + i * TILE, rows[i]);
    }
}

// 16 queries' results in float32; zeros for those not in `some`.
void end_carried(const Work &work, int64_t row, int64_t count, int64_t V, __mmask16 some, __m512 by,
                 float *out, int64_t stride) {
    for (int64_t at = 0; at < V; at += TILE) {
        __m512i rows[16];
        for (int64_t i = 0; i < 16; i++)
            rows[i] = (__m512i)_mm512_maskz_mul_ps(
                some, by, _mm512_load_ps(work.results_of(row, at / TILE) + i * TILE));
        amx::transpose(rows);
        for (int64_t i = 0; i < count; i++)
            _mm512_mask_storeu_ps(out + i * stride + at, amx::within(V, at), (__m512)rows[i]);
    }
}

// The logarithm to base 2 of numbers that are not negative, to 1e-7: the series of (m − 1)/(m + 1).
__m512 log2(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const __m512 power = _mm512_getexp_ps(x);  // one less where m < 1
    const __m512 whole =
        _mm512_mask_add_ps(power, _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ), power, one);
    const __m512 z = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
    const __m512 square = _mm512_mul_ps(z, z);
    __m512 sum = _mm512_set1_ps(0.41219858f);  // 2 / (7 ln 2)
    sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(0.57707801f));
    sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(0.96179669f));
    sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(2.88539008f));
    return _mm512_fmadd_ps(z, sum, whole);
}

// After the last key, of `count` <= 16 rows.
void end_rows(const Work &work, int64_t row, int64_t count, int64_t V, void *out, int64_t stride,
              float *sums, bool carried) {
    const __m512 total = _mm512_load_ps(work.totals + row);
    _mm512_mask_storeu_ps(sums, amx::within(count, 0),
                          _mm512_add_ps(_mm512_load_ps(work.largest + row), log2(total)));
    const __mmask16 some = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 by = _mm512_maskz_div_ps(some, _mm512_set1_ps(1), total);
    if (carried) end_carried(work, row, count, V, some, by, static_cast<float *>(out), stride);
    else amx::write_transposed(work.results_of(row, 0), 2, V, some, by, count,
                               static_cast<bf16 *>(out), stride);
}

// What one task does: queries [begin, end) of `heads` heads from `head` on, which share their keys.
struct Span {
    int64_t batch, head, heads, begin, end;

    int64_t padded() const { return up(end - begin, GROUP) * GROUP; }  // rows of a head

    template <class Number>
    Number *at(const View &view, int64_t of_head, int64_t row) const {
        return static_cast<Number *>(view.at) + batch * view.batch + of_head * view.head +
               row * view.row;
    }
};

// Tasks of a call, and which is which.
struct Spans {
    int64_t length, heads, in_head, in_group;

    explicit Spans(const Attention &call) : length(SPAN), heads(1), in_head(up(call.T, SPAN)) {
        const int64_t padded = up(call.T, GROUP) * GROUP, group = call.H / call.K;
        if (call.B * call.K >= MANY) heads = std::clamp<int64_t>(SPAN / padded, 1, group);
        in_group = up(group, heads) * in_head;
    }
    int64_t count(const Attention &call) const { return call.B * call.K * in_group; }

    // The last of a head first: in the causal case it has most to do.
    Span of(const Attention &call, int64_t task) const {
        const int64_t group = call.H / call.K, shared = task / in_group % call.K;
        const int64_t first = task % in_group / in_head * heads;
        const int64_t begin = (in_head - 1 - task % in_head) * length;
        return {task / in_group / call.K, shared * group + first, std::min(heads, group - first),
                begin, std::min(begin + length, call.T)};
    }
};

// Tiles of a block's keys and values.
void lay_block(const Work &work, const Attention &call, const Span &span, int64_t key) {
    const int64_t keys = std::min(KEYS, call.S - key), tiles = up(keys, GROUP) * 2;
    const int64_t shared = span.head / (call.H / call.K);
    amx::pack_left(span.at<bf16>(call.k, shared, key), call.k.row, keys, call.E, tiles, work.keys);
    amx::pack_left(span.at<bf16>(call.v, shared, key), call.v.row, keys, call.V, tiles, work.laying);
    amx::transpose_tiles(work.laying, tiles, work.value_steps, {work.values, 1, KEYS / GROUP});
}

}  // namespace

void amx_attend(const Attention &call, const View &out, float *sums, bool carried) {
    const Spans spans(call);
    const __m512 scale = _mm512_set1_ps(call.scale * 1.44269504f);  // to base 2
    parallel(spans.count(call), call.tasks_bytes(), [&](int64_t task) {
        const Span span = spans.of(call, task);
        const int64_t padded = span.padded(), count = span.end - span.begin;
        const Sight sight(call, span.batch);
        const Work work(call, span.heads * padded);
        const auto each_16 = [&](int64_t head, int64_t first, int64_t many, auto use) {
            for (int64_t row = first; row < std::min(first + many, count); row += TILE) {
                const int64_t query = span.begin + row;
                float *const own = sums + (span.batch * call.H + span.head + head) * call.T + query;
                void *const to = carried ? (void *)span.at<float>(out, span.head + head, query)
                                         : span.at<bf16>(out, span.head + head, query);
                use(head * padded + row, std::min<int64_t>(TILE, count - row), to, own);
            }
        };
        for (int64_t head = 0; head < span.heads; head++) {
            amx::pack_turned(span.at<bf16>(call.q, span.head + head, span.begin), call.q.row, count,
                             call.E, padded / TILE,
                             work.queries + head * padded * work.key_steps * amx::STEP);
            if (carried)
                each_16(head, 0, count, [&](int64_t row, int64_t rows, void *from, float *own) {
                    begin_carried(work, row, rows, call.V, static_cast<float *>(from), out.row, own);
                });
        }
        const amx::Tiles tiles;
        int64_t key = 0;
        const int64_t last = sight.end(span.end - 1);
        do {
            lay_block(work, call, span, key);
            for (int64_t row = 0; row < padded; row += GROUP) {
                Look seen;
                seen.look(sight, span.begin + row, key);
                for (int64_t head = 0; head < span.heads; head++) {
                    if (!carried && key == 0)  // their results', to come while they are made
                        amx::call_for(span.at<bf16>(out, span.head + head, span.begin + row),
                                      out.row, std::min(GROUP, count - row), call.V);
                    if (seen.any()) attend_block(work, seen, head * padded + row, scale);
                }
            }
            key += KEYS;
        } while (key < last);
        for (int64_t head = 0; head < span.heads; head++)
            each_16(head, 0, count, [&](int64_t row, int64_t rows, void *to, float *own) {
                end_rows(work, row, rows, call.V, to, out.row, own, carried);
            });
    });
}
TARGET_END
#else
#include "amx_training_attention.h"
void amx_attend(const Attention &, const View &, float *, bool) {}
#endif
