// Rows in memory as tiles that are transposed, and transposed sums as rows in memory.
#pragma once
#if defined(__x86_64__)
#include "amx_products.h"

AMX_BEGIN
namespace amx {

// 32 numbers, from `at` on, of 16 rows, from `first` on; zeros beyond `count` and `width`.
inline void load_square(const bf16 *rows, int64_t stride, int64_t first, int64_t count, int64_t at,
                        int64_t width, __m512i square[16]) {
    for (int64_t row = first; row < first + 16; row++) {
        const bf16 *const from = rows + row * stride + at;
        _mm_prefetch(from + AHEAD * stride, _MM_HINT_T0);
        square[row - first] = _mm512_maskz_loadu_epi16(row < count ? within(width, at) : 0, from);
    }
}

// Rows in memory as turned tiles [tiles][width/32].
inline void pack_turned(const bf16 *rows, int64_t stride, int64_t count, int64_t width,
                        int64_t tiles, bf16 *to) {
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t at = 0; at < width; at += STEP, to += ELEMENTS) {
            __m512i square[16];
            load_square(rows, stride, tile * TILE, count, at, width, square);
            transpose(square);
            for (int64_t i = 0; i < 16; i++) _mm512_store_si512(to + i * STEP, square[i]);
        }
}

// Transposed sums, tiles of [16 numbers of a row][16 rows] that are `apart` tiles from each other,
// times `by` as `count` <= 16 rows. Rows not in `some` are zeros, whatever their sums.
inline void write_transposed(const float *sums, int64_t apart, int64_t width, __mmask16 some,
                             __m512 by, int64_t count, bf16 *to, int64_t stride) {
    for (int64_t at = 0; at < width; at += STEP) {
        __m512i rows[16];
        for (int64_t i = 0; i < 16; i++) {  // two numbers of each of 16 rows
            const int64_t tile = std::min(at / TILE + i / 8, (width - 1) / TILE);
            const float *const from = sums + tile * apart * SUMS + i % 8 * 2 * TILE;
            rows[i] = woven(_mm512_maskz_mul_ps(some, by, _mm512_load_ps(from)),
                            _mm512_maskz_mul_ps(some, by, _mm512_load_ps(from + TILE)));
        }
        transpose(rows);
        for (int64_t i = 0; i < count; i++)
            _mm512_mask_storeu_epi16(to + i * stride + at, within(width, at), rows[i]);
    }
}

}  // namespace amx
TARGET_END
#endif
