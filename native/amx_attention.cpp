// Absorbed MLA over the paged latent cache, on AMX.
//
// All heads look at the same rows [latent; rope key], and the values are those rows' latents. So for
// a block of rows that has come into the second-level cache, the scores of 16 heads are one product
// (rows × queriesᵀ), the results another (weightsᵀ × latents), and no row is read from memory twice.
// A long context is cut into pieces, which all threads work on side by side; each keeps its softmax's
// maximum and sum, by which the pieces are joined (Flash-Decoding). The cut depends on the length
// alone, so a result does not depend on the number of threads.
#if defined(__x86_64__)
#include "amx_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "amx.h"
#include "amx_rows.h"
#include "scratch.h"
#include "threads.h"

AMX_BEGIN
namespace {

using bf16 = uint16_t;
constexpr int64_t PIECE = 512;  // rows of a long context that are one piece of work
constexpr int64_t HEADS = amx::TILE;

struct Shape {
    int64_t heads, groups, width, latent, page_tokens;
    float scale;
};

// A piece's softmax-weighted sum so far, for 16 heads.
struct Partial {
    float *sums;             // [16, latent]
    float *largest, *total;  // [16]
};

// What a thread needs beside the tiles.
struct Workspace {
    Unpacked block;
    float *scores;  // [ROWS][16]
    bf16 *weights;  // [ROWS/32][16 heads][32]

    Workspace(const Shape &shape, bool unpacks) {
        thread_local Scratch scratch;
        const int64_t values = shape.latent / 16 * COLUMN * 2, scored = ROWS * HEADS * 4;
        const int64_t weighed = ROWS * HEADS * 2, rows = unpacks ? ROWS * shape.width * 2 : 0;
        auto *room = scratch.room<uint8_t>(values + scored + weighed + rows);
        block.values = reinterpret_cast<bf16 *>(room);
        scores = reinterpret_cast<float *>(room + values);
        weights = reinterpret_cast<bf16 *>(room + values + scored);
        block.rows = reinterpret_cast<bf16 *>(room + values + scored + weighed);
    }
};

// Queries [heads, width] as right factors: [group][width/32][16 pairs][16 heads] dwords.
void weave_queries(const bf16 *query, const Shape &shape, uint32_t *woven) {
    for (int64_t group = 0; group < shape.groups; group++)
        for (int64_t step = 0; step < shape.width / amx::STEP; step++) {
            __m512i rows[16];
            for (int64_t h = 0; h < HEADS; h++) {
                const int64_t head = group * HEADS + h;
                rows[h] = head < shape.heads
                              ? _mm512_loadu_si512(query + head * shape.width + step * amx::STEP)
                              : _mm512_setzero_si512();
            }
            amx::transpose(rows);
            uint32_t *tile = woven + (group * (shape.width / amx::STEP) + step) * 256;
            for (int j = 0; j < 16; j++) _mm512_storeu_si512(tile + 16 * j, rows[j]);
        }
}

// scores[row][head] of 32 rows that lie one after the other.
void score(const bf16 *rows, const uint32_t *queries, const Shape &shape, const Ahead &ahead,
           float *scores) {
    const int64_t stride = shape.width * 2, tile = amx::TILE * shape.width;
    amx::written();
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < shape.width / amx::STEP; step++) {
        ahead.step(step);
        _tile_loadd(4, queries + step * 256, 64);
        _tile_loadd(5, rows + step * amx::STEP, stride);
        _tile_loadd(6, rows + tile + step * amx::STEP, stride);
        _tile_dpbf16ps(0, 5, 4);
        _tile_dpbf16ps(1, 6, 4);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + 16 * HEADS, 64);
}

// Scores to weights, against the largest score so far; what was summed before is made to fit it.
void soften(float *scores, int64_t valid, int64_t rows, const Shape &shape, const Partial &partial,
            bf16 *weights) {
    const __m512 scale = _mm512_set1_ps(shape.scale);
    const __m512 before = _mm512_loadu_ps(partial.largest);
    __m512 largest = before;
    for (int64_t row = 0; row < valid; row++) {
        const __m512 score = _mm512_mul_ps(_mm512_load_ps(scores + row * HEADS), scale);
        _mm512_store_ps(scores + row * HEADS, score);
        largest = _mm512_max_ps(largest, score);  // NaN is lost here and comes back below
    }
    const __m512 shrunk = amx::exp(_mm512_sub_ps(before, largest));
    __m512 total = _mm512_mul_ps(_mm512_loadu_ps(partial.total), shrunk);
    if (_mm512_cmp_ps_mask(before, largest, _CMP_LT_OQ)) {
        alignas(64) float factor[HEADS];
        _mm512_store_ps(factor, shrunk);
        for (int64_t h = 0; h < HEADS; h++) {
            const __m512 by = _mm512_set1_ps(factor[h]);
            float *sums = partial.sums + h * shape.latent;
            for (int64_t at = 0; at < shape.latent; at += 16)
                _mm512_storeu_ps(sums + at, _mm512_mul_ps(_mm512_loadu_ps(sums + at), by));
        }
    }
    for (int64_t first = 0; first < rows; first += 32) {
        __m512i pairs[16];
        for (int64_t j = 0; j < 16; j++) {
            __m512 both[2];
            for (int64_t i = 0; i < 2; i++) {
                const int64_t row = first + 2 * j + i;
                both[i] = row < valid ? amx::exp(_mm512_sub_ps(
                                            _mm512_load_ps(scores + row * HEADS), largest))
                                      : _mm512_setzero_ps();
                total = _mm512_add_ps(total, both[i]);
            }
            pairs[j] = amx::woven(both[0], both[1]);
        }
        amx::transpose(pairs);
        for (int64_t h = 0; h < HEADS; h++)
            _mm512_store_si512(weights + (first / 32 * HEADS + h) * 32, pairs[h]);
    }
    _mm512_storeu_ps(partial.largest, largest);
    _mm512_storeu_ps(partial.total, total);
}

// sums[head][latent] += weights × values.
void add_values(const bf16 *weights, const bf16 *values, int64_t rows, const Shape &shape,
                float *sums) {
    const int64_t stride = shape.latent * 4;
    amx::written();
    for (int64_t at = 0; at < shape.latent; at += 32) {
        _tile_loadd(0, sums + at, stride);
        _tile_loadd(1, sums + at + 16, stride);
        const bf16 *column = values + at / 16 * COLUMN;
        for (int64_t first = 0; first < rows; first += 32) {
            _tile_loadd(4, weights + first * HEADS, 64);
            _tile_loadd(5, column + first * 16, 64);
            _tile_loadd(6, column + COLUMN + first * 16, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, sums + at, stride);
        _tile_stored(1, sums + at + 16, stride);
    }
}

// One piece of one query's context: rows begin .. end of its pages.
template <class Rows>
void attend_piece(const Rows &cache, const int64_t *table, int64_t begin, int64_t end,
                  const uint32_t *queries, const Shape &shape, const Workspace &work,
                  const Partial &all) {
    const int64_t tokens = shape.page_tokens, steps = shape.width / amx::STEP;
    for (int64_t block = begin; block < end; block += ROWS) {
        const int64_t stop = std::min(block + ROWS, end);
        const int64_t rows = (stop - block + 31) / 32 * 32;  // pages are whole
        const auto slot = [&](int64_t row) {
            return table[row / tokens] * tokens + row % tokens;
        };
        for (int64_t row = block; row < block + rows; row += 2)
            cache.unpack(slot(row), row < stop, row + 1 < stop, (row - block) / 2, work.block);
        const auto ahead = [&](int64_t row, int64_t group) {
            const int64_t next = block + ROWS + row;
            const bool any = Rows::AHEAD && group == 0 && next < end;
            return Ahead{any ? cache.at(slot(next)) : nullptr, cache.bytes() / 2 / steps + 1};
        };
        for (int64_t group = 0; group < shape.groups; group++) {
            const Partial partial = {all.sums + group * HEADS * shape.latent,
                                     all.largest + group * HEADS, all.total + group * HEADS};
            for (int64_t row = 0; row < rows; row += 32)
                score(cache.left(slot(block + row), row, work.block), queries + group * steps * 256,
                      shape, ahead(row, group), work.scores + row * HEADS);
            soften(work.scores, stop - block, rows, shape, partial, work.weights);
            add_values(work.weights, work.block.values, rows, shape, partial.sums);
        }
    }
}

void write_head(const float *sums, float total, const Shape &shape, bf16 *out) {
    const __m512 by = _mm512_set1_ps(1.0f / total);
    for (int64_t at = 0; at < shape.latent; at += 32) {
        __m512 both[2];
        ordered(_mm512_loadu_ps(sums + at), _mm512_loadu_ps(sums + at + 16), both);
        _mm512_storeu_si512(out + at, (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(both[1], by),
                                                                   _mm512_mul_ps(both[0], by)));
    }
}

}  // namespace

bool amx_attention_takes(int64_t width, int64_t latent, int64_t page_tokens) {
    return amx::usable() && width % 32 == 0 && latent % 32 == 0 && page_tokens % 32 == 0;
}

void amx_attention(const bf16 *queries, const void *entries, int bits, const int64_t *tables,
                   int64_t table_width, const int64_t *lengths, bf16 *out, int64_t N, int64_t H,
                   int64_t E, int64_t C, int64_t page_tokens, float scale) {
    const PlainRows plain = {static_cast<const bf16 *>(entries), E, C};
    const Int8Rows coded = {static_cast<const uint8_t *>(entries), E, C};
    const Shape shape = {H, (H + HEADS - 1) / HEADS, E, C, page_tokens, scale};
    const int64_t padded = shape.groups * HEADS;
    std::vector<int64_t> first_piece(N + 1, 0);
    for (int64_t n = 0; n < N; n++)
        first_piece[n + 1] = first_piece[n] + std::max<int64_t>(1, (lengths[n] + PIECE - 1) / PIECE);
    const int64_t pieces = first_piece[N];
    const int64_t rows = std::accumulate(lengths, lengths + N, int64_t(0));
    const int64_t woven_size = shape.groups * (E / amx::STEP) * 256;
    thread_local Scratch woven_scratch, sums_scratch;
    uint32_t *const woven = woven_scratch.room<uint32_t>(N * woven_size);
    float *const sums = sums_scratch.room<float>(pieces * padded * C);
    std::vector<float> largest(pieces * padded), total(pieces * padded);
    parallel(N, N * H * E * 2, [&](int64_t n) {
        weave_queries(queries + n * H * E, shape, woven + n * woven_size);
    });
    parallel(pieces, rows * (bits == 8 ? coded.bytes() : E * 2), [&](int64_t piece) {
        const int64_t n =
            std::upper_bound(first_piece.begin(), first_piece.end(), piece) - first_piece.begin() - 1;
        const int64_t begin = (piece - first_piece[n]) * PIECE;
        const int64_t end = std::min(begin + PIECE, lengths[n]);
        const Partial own = {sums + piece * padded * C, &largest[piece * padded],
                             &total[piece * padded]};
        std::memset(own.sums, 0, padded * C * sizeof(float));
        std::fill_n(own.largest, padded, -std::numeric_limits<float>::infinity());
        std::fill_n(own.total, padded, 0.0f);
        const amx::Tiles tiles;
        const Workspace work(shape, bits == 8);
        const auto attend = [&](const auto &cache) {
            attend_piece(cache, tables + n * table_width, begin, end, woven + n * woven_size, shape,
                         work, own);
        };
        bits == 8 ? attend(coded) : attend(plain);
    });
    parallel(N * H, pieces * H * C * 4, [&](int64_t task) {
        const int64_t n = task / H, h = task % H;
        const int64_t first = first_piece[n], last = first_piece[n + 1];
        float *joined = sums + (first * padded + h) * C;
        float most = largest[first * padded + h];
        for (int64_t piece = first + 1; piece < last; piece++)
            most = std::max(most, largest[piece * padded + h]);
        float all = 0;
        for (int64_t piece = first; piece < last; piece++) {
            const float factor = std::exp(largest[piece * padded + h] - most);
            all += factor * total[piece * padded + h];
            const float *part = sums + (piece * padded + h) * C;
            const __m512 by = _mm512_set1_ps(factor);
            for (int64_t at = 0; at < C; at += 16) {
                const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(part + at), by);
                _mm512_storeu_ps(joined + at, piece == first ? scaled
                                                             : _mm512_add_ps(
                                                                   _mm512_loadu_ps(joined + at), scaled));
            }
        }
        write_head(joined, all, shape, out + task * C);
    });
}
TARGET_END
#else
#include "amx_attention.h"
bool amx_attention_takes(int64_t, int64_t, int64_t) { return false; }
void amx_attention(const uint16_t *, const void *, int, const int64_t *, int64_t, const int64_t *,
                   uint16_t *, int64_t, int64_t, int64_t, int64_t, int64_t, float) {}
#endif
