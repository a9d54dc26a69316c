// Matrices as blocks of AMX tiles, each tile 1 KiB of its own, and products of them.
//
// Three forms of a tile of bfloat16, which are made of each other:
//   left:   16 rows × 32 elements, as a matrix lies in memory: a left factor.
//   turned: the left tile's dwords transposed: [16 pairs of elements][16 rows]. As a right factor it
//           means x · rowsᵀ, summed over the elements.
//   woven:  [16 pairs of rows][16 elements], of 32 rows. As a right factor it means x · rows, summed
//           over the rows.
// A woven tile turned is 16 elements × 32 rows: the left factor of rowsᵀ · x.
// Sums are tiles of 16 × 16 floats.
#pragma once
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>

#include "amx.h"

AMX_BEGIN
namespace amx {

using bf16 = uint16_t;
constexpr int64_t ELEMENTS = 512;  // bfloat16 of a tile
constexpr int64_t SUMS = 256;      // floats of a tile

inline int64_t up(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Which of 32 elements (16 floats) from `at` on are within `width`.
inline __mmask32 within(int64_t width, int64_t at) {
    return width - at >= 32 ? ~__mmask32(0) : (__mmask32(1) << std::max<int64_t>(0, width - at)) - 1;
}

// Rows of a head lie far apart, where the processor does not expect them: they are called for early.
constexpr int64_t AHEAD = 16;

// Rows that will be read or written later are called for into the second-level cache.
inline void call_for(const bf16 *rows, int64_t stride, int64_t count, int64_t width) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t at = 0; at < width; at += STEP)
            _mm_prefetch(rows + row * stride + at, _MM_HINT_T1);
}

// Rows in memory as left tiles [tiles][width/32]; zeros beyond `count` and `width`.
inline void pack_left(const bf16 *rows, int64_t stride, int64_t count, int64_t width, int64_t tiles,
                      bf16 *to) {
    const int64_t steps = up(width, STEP);
    for (int64_t row = 0; row < tiles * TILE; row++)
        for (int64_t step = 0; step < steps; step++) {
            const __mmask32 mask = row < count ? within(width, step * STEP) : 0;
            _mm_prefetch(rows + (row + AHEAD) * stride + step * STEP, _MM_HINT_T0);
            _mm512_store_si512(to + (row / TILE * steps + step) * ELEMENTS + row % TILE * STEP,
                               _mm512_maskz_loadu_epi16(mask, rows + row * stride + step * STEP));
        }
}

// So many tiles, each with its dwords transposed. `to` may be `from`.
inline void turn(const bf16 *from, int64_t tiles, bf16 *to) {
    for (int64_t at = 0; at < tiles * ELEMENTS; at += ELEMENTS) {
        __m512i rows[16];
        for (int i = 0; i < 16; i++) rows[i] = _mm512_load_si512(from + at + i * STEP);
        transpose(rows);
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + at + i * STEP, rows[i]);
    }
}

// Rows 2j and 2j + 1 of 32 numbers as woven row j: of their first 16 numbers, or of the others.
inline __m512i woven_half(__m512i even, __m512i odd, int64_t half) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                         39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(
        even, half ? _mm512_add_epi16(low, _mm512_set1_epi16(16)) : low, odd);
}
inline void weave(__m512i even, __m512i odd, bf16 *first, bf16 *second) {
    _mm512_store_si512(first, woven_half(even, odd, 0));
    _mm512_store_si512(second, woven_half(even, odd, 1));
}

// Where woven tiles go: of two tiles of rows one, for every 16 elements. Distances in tiles.
struct Woven {
    bf16 *tiles;
    int64_t pair, column;
};

// One step of left tiles, `apart` tiles from each other, as two columns of woven ones; `tiles` of 16
// rows, even.
inline void weave_step(const bf16 *left, int64_t apart, int64_t tiles, const Woven &to) {
    for (int64_t tile = 0; tile < tiles; tile++) {
        const bf16 *from = left + tile * apart * ELEMENTS;
        bf16 *const first = to.tiles + tile / 2 * to.pair * ELEMENTS + tile % 2 * (ELEMENTS / 2);
        bf16 *const second = first + to.column * ELEMENTS;
        for (int64_t j = 0; j < 8; j++)
            weave(_mm512_load_si512(from + 2 * j * STEP), _mm512_load_si512(from + (2 * j + 1) * STEP),
                  first + j * STEP, second + j * STEP);
    }
}

// All steps of left tiles [tiles][steps].
inline void weave_tiles(const bf16 *left, int64_t tiles, int64_t steps, const Woven &to) {
    for (int64_t step = 0; step < steps; step++)
        weave_step(left + step * ELEMENTS, steps, tiles,
                   {to.tiles + step * 2 * to.column * ELEMENTS, to.pair, to.column});
}

// Where the tiles of a factor or of sums are: distances in tiles.
struct Left {
    const bf16 *tiles;
    int64_t row, step;
};
struct Right {
    const bf16 *tiles;
    int64_t column, step;
};
struct Sums {
    float *tiles;
    int64_t row, column;
};

// M × N tiles of sums: made (`fresh`) or added to.
template <int M, int N>
inline void multiply_few(const Left &left, const Right &right, const Sums &sums, int64_t steps,
                         bool fresh) {
    float *const low = sums.tiles, *const high = sums.tiles + sums.row * SUMS;
    const int64_t beside = sums.column * SUMS;
    written();
    if (fresh) {
        _tile_zero(0);
        if (N > 1) _tile_zero(1);
        if (M > 1) _tile_zero(2);
        if (M > 1 && N > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, low, 64);
        if (N > 1) _tile_loadd(1, low + beside, 64);
        if (M > 1) _tile_loadd(2, high, 64);
        if (M > 1 && N > 1) _tile_loadd(3, high + beside, 64);
    }
    for (int64_t step = 0; step < steps; step++) {
        const bf16 *const a = left.tiles + step * left.step * ELEMENTS;
        const bf16 *const b = right.tiles + step * right.step * ELEMENTS;
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) {
            _tile_loadd(7, b + right.column * ELEMENTS, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (M > 1) {
            _tile_loadd(5, a + left.row * ELEMENTS, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, low, 64);
    if (N > 1) _tile_stored(1, low + beside, 64);
    if (M > 1) _tile_stored(2, high, 64);
    if (M > 1 && N > 1) _tile_stored(3, high + beside, 64);
}

// rows × columns tiles of sums, over so many steps of 32.
inline void multiply(const Left &left, const Right &right, const Sums &sums, int64_t rows,
                     int64_t columns, int64_t steps, bool fresh) {
    for (int64_t row = 0; row < rows; row += 2)
        for (int64_t column = 0; column < columns; column += 2) {
            const Left a = {left.tiles + row * left.row * ELEMENTS, left.row, left.step};
            const Right b = {right.tiles + column * right.column * ELEMENTS, right.column, right.step};
            const Sums c = {sums.tiles + (row * sums.row + column * sums.column) * SUMS, sums.row,
                            sums.column};
            const bool low = row + 1 < rows, beside = column + 1 < columns;
            if (low && beside) multiply_few<2, 2>(a, b, c, steps, fresh);
            else if (low) multiply_few<2, 1>(a, b, c, steps, fresh);
            else if (beside) multiply_few<1, 2>(a, b, c, steps, fresh);
            else multiply_few<1, 1>(a, b, c, steps, fresh);
        }
}

// 2^x to 3e-6, which is far finer than bfloat16; 0 for −∞, NaN stays NaN.
inline __m512 exp2(__m512 x) {
    const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 ... 1
    __m512 power = _mm512_set1_ps(1.353416787e-2f);
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(5.201146278e-2f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(2.414427539e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(6.930038356e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.000002593f));
    return _mm512_scalef_ps(power, x);  // by 2 to the whole part of x
}

// 16 floats as bfloat16, as many of them as the mask says.
inline void store_rounded(bf16 *to, __mmask16 mask, __m512 numbers) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(numbers));
}

}  // namespace amx
TARGET_END
#endif
