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

constexpr int64_t BLOCK_ROWS = 256;                // rows of x worked on at a time
constexpr int64_t BLOCK_TILES = BLOCK_ROWS / TILE;
constexpr int64_t PAIR = 2 * TILE;                 // columns worked on at a time
constexpr int64_t DEEP = 16;                       // steps whose factors stay in the nearest cache

// 32 numbers of a row from `at` on, within its width; zeros where there is no row.
inline __m512i numbers_of(const uint8_t *row, int kind, int64_t at, int64_t width) {
    const __mmask32 mask = row ? within(width, at) : 0;
    if (kind) return _mm512_maskz_loadu_epi16(mask, row + at * 2);
    const __m512 low = _mm512_maskz_loadu_ps(mask & 0xffff, row + at * 4);
    const __m512 high = _mm512_maskz_loadu_ps(mask >> 16, row + at * 4 + 64);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Rows first ... first + count - 1 as left tiles [tiles][width/32]; zeros beyond.
inline void pack_rows(const Rows &rows, int64_t first, int64_t count, int64_t width, int64_t tiles,
                      bf16 *to) {
    const int64_t steps = up(width, STEP);
    for (int64_t r = 0; r < tiles * TILE; r++) {
        const uint8_t *const row = r < count ? rows.row(first + r) : nullptr;
        bf16 *const own = to + r / TILE * steps * ELEMENTS + r % TILE * STEP;
        for (int64_t step = 0; step < steps; step++)
            _mm512_store_si512(own + step * ELEMENTS,
                               numbers_of(row, rows.kind, step * STEP, width));
    }
}

// One step of left tiles [tiles][steps] as left factors of rowsᵀ · x: of [tiles/2][2 · steps].
inline void transpose_step(const bf16 *left, int64_t tiles, int64_t steps, bf16 *to) {
    weave_step(left, steps, tiles, steps, to);
    for (int64_t tile = 0; tile < tiles / 2; tile++) {
        bf16 *const own = to + tile * 2 * steps * ELEMENTS;
        turn(own, 2, own);
    }
}

// All of them.
inline void transpose_tiles(const bf16 *left, int64_t tiles, int64_t steps, bf16 *to) {
    for (int64_t step = 0; step < steps; step++)
        transpose_step(left + step * ELEMENTS, tiles, steps, to + step * 2 * ELEMENTS);
}

// sums [rows][2]: two columns of tiles of a product, over all steps; `both`: there is a second one.
inline void column_pair(const Left &left, const Right &right, int64_t rows, bool both, int64_t steps,
                        float *sums) {
    for (int64_t step = 0; step < steps; step += DEEP)
        multiply({left.tiles + step * left.step * ELEMENTS, left.row, left.step},
                 {right.tiles + step * right.step * ELEMENTS, right.column, right.step},
                 {sums, 2, 1}, rows, both ? 2 : 1, std::min(DEEP, steps - step), step == 0);
}

// Where row r of such sums begins; its second 16 numbers are SUMS floats further.
inline const float *row_of(const float *sums, int64_t r) {
    return sums + r / TILE * 2 * SUMS + r % TILE * TILE;
}

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

inline const void *number_at(const void *rows, int kind, int64_t at) {
    return static_cast<const uint8_t *>(rows) + at * (kind ? 2 : 4);
}
inline void *number_at(void *rows, int kind, int64_t at) {
    return static_cast<uint8_t *>(rows) + at * (kind ? 2 : 4);
}

// All columns of left · right for a block of rows, written to rows of `width` numbers.
inline void product(const Left &left, const Right &right, int64_t count, int64_t steps, void *out,
                    int kind, int64_t width) {
    alignas(64) float sums[BLOCK_TILES * 2 * SUMS];
    for (int64_t at = 0; at < width; at += PAIR) {
        const bool both = width - at > TILE;
        const __mmask32 mask = within(width, at);
        for (int64_t r = 0; r < count; r++)  // where the row's numbers go: far apart, so called for
            _mm_prefetch(static_cast<char *>(number_at(out, kind, r * width + at)), _MM_HINT_ET0);
        const Right pair = {right.tiles + at / TILE * right.column * ELEMENTS, right.column,
                            right.step};
        column_pair(left, pair, up(count, TILE), both, steps, sums);
        for (int64_t r = 0; r < count; r++) {
            const float *const row = row_of(sums, r);
            store_numbers(number_at(out, kind, r * width), kind, at, mask, _mm512_load_ps(row),
                          _mm512_load_ps(row + SUMS));
        }
    }
}

}  // namespace amx
TARGET_END
#endif
