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

#include "amx_attend_block.h"
#include "threads.h"

AMX_BEGIN
namespace {

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
