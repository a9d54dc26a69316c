// What a training step multiplies, as blocks of AMX tiles (amx_blocks.h): rows of float32 or bfloat16
// to factors, and sums back to rows.
//
// For a layer y = x · Wᵀ there are three products:
//   y  = x · Wᵀ      x as left tiles,             W turned
//   dx = dy · W      dy as left tiles,            W woven
//   dW = dyᵀ · x     dy woven and turned (left),  x woven
// x and dy are packed a block of rows at a time, in the second-level cache.
#pragma once
#if defined(__x86_64__)
#include "amx_blocks.h"
#include "threads.h"

// Rows in memory, `stride` numbers apart, of float32 (kind 0) or bfloat16 (kind 1). With `pair`, row r
// is row pair[r] / K of them, and zeros where that is -1.
struct Rows {
    const void *at;
    int kind;
    int64_t stride;
    const int64_t *pair = nullptr;
    int64_t K = 1;

    const uint8_t *row(int64_t r) const {
        const int64_t from = pair ? (pair[r] < 0 ? -1 : pair[r] / K) : r;
        if (from < 0) return nullptr;
        return static_cast<const uint8_t *>(at) + from * stride * (kind ? 2 : 4);
    }
};

AMX_BEGIN
namespace amx {

constexpr int64_t BLOCK_ROWS = 128;                // rows of x worked on at a time
constexpr int64_t BLOCK_TILES = BLOCK_ROWS / TILE;
constexpr int64_t PAIR = 2 * TILE;                 // rows and columns worked on at a time

inline const void *number_at(const void *rows, int kind, int64_t at) {
    return static_cast<const uint8_t *>(rows) + at * (kind ? 2 : 4);
}
inline void *number_at(void *rows, int kind, int64_t at) {
    return static_cast<uint8_t *>(rows) + at * (kind ? 2 : 4);
}

// 16 bfloat16 as floats.
inline __m512 widened(__m256i numbers) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
}

// 32 numbers of a row from `at` on, within its width; zeros where there is no row.
inline __m512i numbers_of(const uint8_t *row, int kind, int64_t at, int64_t width) {
    const __mmask32 mask = row ? within(width, at) : 0;
    if (kind) return _mm512_maskz_loadu_epi16(mask, row + at * 2);
    const __m512 low = _mm512_maskz_loadu_ps(mask & 0xffff, row + at * 4);
    const __m512 high = _mm512_maskz_loadu_ps(mask >> 16, row + at * 4 + 64);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Rows first ... first + count - 1 as left tiles [tiles][width/32], one tile row `apart` tiles from the
// next; zeros beyond. The 32 rows that follow are called for, to come while these are multiplied.
inline void pack_rows(const Rows &rows, int64_t first, int64_t count, int64_t width, int64_t tiles,
                      bf16 *to, int64_t apart) {
    for (int64_t r = 0; r < tiles * TILE; r++) {
        const uint8_t *const row = r < count ? rows.row(first + r) : nullptr;
        bf16 *const own = to + r / TILE * apart * ELEMENTS + r % TILE * STEP;
        for (int64_t at = 0; row && !rows.pair && at < width; at += rows.kind ? 32 : 16)
            _mm_prefetch(number_at(row, rows.kind, PAIR * rows.stride + at), _MM_HINT_T1);
        for (int64_t step = 0; step < up(width, STEP); step++)
            _mm512_store_si512(own + step * ELEMENTS,
                               numbers_of(row, rows.kind, step * STEP, width));
    }
}
inline void pack_rows(const Rows &rows, int64_t first, int64_t count, int64_t width, int64_t tiles,
                      bf16 *to) {
    pack_rows(rows, first, count, width, tiles, to, up(width, STEP));
}

// One step of left tiles, `apart` tiles from each other, of 32 rows each two, as left factors of
// rowsᵀ · x: woven and turned.
inline void transpose_step(const bf16 *left, int64_t apart, int64_t tiles, const Woven &to) {
    for (int64_t tile = 0; tile < tiles; tile += 2)
        for (int64_t half = 0; half < 2; half++) {
            __m512i rows[16];
            for (int64_t j = 0; j < 16; j++) {
                const bf16 *const from = left + (tile + j / 8) * apart * ELEMENTS + j % 8 * 2 * STEP;
                rows[j] = woven_half(_mm512_load_si512(from), _mm512_load_si512(from + STEP), half);
            }
            transpose(rows);
            bf16 *const own = to.tiles + (tile / 2 * to.pair + half * to.column) * ELEMENTS;
            for (int64_t j = 0; j < 16; j++) _mm512_store_si512(own + j * STEP, rows[j]);
        }
}

// All steps of left tiles [tiles][steps].
inline void transpose_tiles(const bf16 *left, int64_t tiles, int64_t steps, const Woven &to) {
    for (int64_t step = 0; step < steps; step++)
        transpose_step(left + step * ELEMENTS, steps, tiles,
                       {to.tiles + step * 2 * to.column * ELEMENTS, to.pair, to.column});
}

// Of a product: 32 rows, two tiles [2][steps] of the left factor, times 32 columns, two tiles
// [2][steps] of the right one. The rows stay in the nearest cache while the columns go by.
struct Square {
    alignas(64) float sums[4 * SUMS];

    Square(const bf16 *rows, const bf16 *columns, int64_t steps) {
        multiply_few<2, 2>({rows, steps, 1}, {columns, steps, 1}, {sums, 2, 1}, steps, true);
    }
    // Where row r begins; its second 16 numbers are SUMS floats further.
    const float *row(int64_t r) const { return row(sums, r); }
    static const float *row(const float *sums, int64_t r) {
        return sums + r / TILE * 2 * SUMS + r % TILE * TILE;
    }
};

// 32 numbers of a row of the result, as float32 (kind 0) or bfloat16, as many as the mask says.
inline void store_numbers(void *row, int kind, int64_t at, __mmask32 mask, __m512 low, __m512 high) {
    if (kind) {
        _mm512_mask_storeu_epi16(static_cast<bf16 *>(row) + at, mask,
                                 (__m512i)_mm512_cvtne2ps_pbh(high, low));
    } else {
        _mm512_mask_storeu_ps(static_cast<float *>(row) + at, mask & 0xffff, low);
        _mm512_mask_storeu_ps(static_cast<float *>(row) + at + 16, mask >> 16, high);
    }
}

constexpr int64_t DEEP = 8;  // steps of 32 rows and 32 columns that the nearest cache holds together

// left [tiles][steps] · right [tiles of the width][steps], as rows of `width` numbers. Where there are
// more steps than DEEP, so many at a time: sums of 32 rows wait in the second-level cache.
inline void product(const bf16 *left, const bf16 *right, int64_t count, int64_t steps, void *out,
                    int kind, int64_t width) {
    alignas(64) float one[4 * SUMS];
    const int64_t apart = steps > DEEP ? 4 * SUMS : 0;  // from a square of sums to the next
    float *const squares =
        apart ? reinterpret_cast<float *>(kept_room(up(width, PAIR) * apart * sizeof(float))) : one;
    for (int64_t first = 0; first < count; first += PAIR) {
        const int64_t rows = std::min(PAIR, count - first);
        void *const to = number_at(out, kind, first * width);
        const auto call_for = [&](int64_t at) {  // its rows are far apart
            for (int64_t r = 0; r < rows && at < width; r++)
                _mm_prefetch(number_at(to, kind, r * width + at), _MM_HINT_T1);
        };
        for (int64_t step = 0; step < steps; step += DEEP) {
            const bool last = step + DEEP >= steps;
            if (last) call_for(0);
            for (int64_t at = 0; at < width; at += PAIR) {
                if (last) call_for(at + PAIR);
                float *const sums = squares + at / PAIR * apart;
                multiply_few<2, 2>({left + (first / TILE * steps + step) * ELEMENTS, steps, 1},
                                   {right + (at / TILE * steps + step) * ELEMENTS, steps, 1},
                                   {sums, 2, 1}, std::min(DEEP, steps - step), step == 0);
                for (int64_t r = 0; last && r < rows; r++) {
                    const float *const row = Square::row(sums, r);
                    store_numbers(number_at(to, kind, r * width), kind, at, within(width, at),
                                  _mm512_load_ps(row), _mm512_load_ps(row + SUMS));
                }
            }
        }
    }
}

}  // namespace amx
TARGET_END
#endif
