// Dot products of AVX-512 (see avx512.cpp), and numbers out of codes.
#pragma once
#include "numbers.h"
#include "packing.h"

namespace {

constexpr int TILE = 4;
constexpr bool PAIRED = true;
constexpr int64_t AHEAD = 8192;  // bytes: the processor looks ahead by itself, but not beyond a page

inline __mmask64 first_bytes(int64_t count) {
    return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

// Levels + 128 of 16 blocks. 8 bits: in order. 4 bits: of 4 blocks the first halves, then the second.
template <int BITS>
inline void load_levels(const uint8_t *codes, int64_t bytes, __m512i *levels) {
    constexpr int LOADS = BITS == 8 ? 8 : 4;
    const bool whole = bytes >= 64 * LOADS;
    for (int i = 0; i < LOADS; i++) {
        _mm_prefetch(reinterpret_cast<const char *>(codes + AHEAD + 64 * i), _MM_HINT_T1);
        const __m512i raw =
            whole ? _mm512_loadu_si512(codes + 64 * i)
                  : _mm512_maskz_loadu_epi8(first_bytes(bytes - 64 * i), codes + 64 * i);
        if constexpr (BITS == 8) {
            levels[i] = _mm512_xor_si512(raw, _mm512_set1_epi8(-128));
        } else {
            const __m512i table = _mm512_xor_si512(
                _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(LEVELS))),
                _mm512_set1_epi8(-128));
            const __m512i low = _mm512_set1_epi8(15);
            levels[2 * i] = _mm512_shuffle_epi8(table, _mm512_and_si512(raw, low));
            levels[2 * i + 1] = _mm512_shuffle_epi8(
                table, _mm512_and_si512(_mm512_srli_epi16(raw, 4), low));
        }
    }
}

// Each 128-bit lane of the result holds the four sums of that lane of a, b, c, d.
inline __m512i added_across(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// The dot products of 16 blocks with the codes of x, in order.
template <int BITS>
inline __m512i block_dots(const __m512i *levels, const uint8_t *x) {
    __m512i sums[8];
    if constexpr (BITS == 8) {
        for (int i = 0; i < 8; i++)
            sums[i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), levels[i],
                                          _mm512_loadu_si512(x + 64 * i));
        const __m512i first = added_across(sums[0], sums[1], sums[2], sums[3]);
        const __m512i second = added_across(sums[4], sums[5], sums[6], sums[7]);
        const __m512i mixed = _mm512_add_epi32(_mm512_shuffle_i32x4(first, second, 0x88),
                                               _mm512_shuffle_i32x4(first, second, 0xdd));
        const __m512i order =
            _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        return _mm512_permutexvar_epi32(order, mixed);
    } else {
        for (int i = 0; i < 4; i++) {
            const __m512i half = _mm512_dpbusd_epi32(_mm512_setzero_si512(), levels[2 * i],
                                                     _mm512_loadu_si512(x + 128 * i));
            sums[i] = _mm512_dpbusd_epi32(half, levels[2 * i + 1],
                                          _mm512_loadu_si512(x + 128 * i + 64));
        }
        const __m512i mixed = added_across(sums[0], sums[1], sums[2], sums[3]);
        const __m512i order =
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return _mm512_permutexvar_epi32(order, mixed);
    }
}

inline float total(__m512 lanes) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <int BITS, int R>
inline void dots_low(const uint8_t *codes, const half *scales, const uint8_t *const *x,
                     int64_t columns, float *out) {
    constexpr int64_t BLOCK_BYTES = BLOCK * BITS / 8;
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, padded = padded_blocks(columns);
    __m512 sums[R];
    for (__m512 &sum : sums) sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < blocks; at += GROUP) {
        const int64_t left = blocks - at;
        __m512i levels[8];
        load_levels<BITS>(codes + at * BLOCK_BYTES, left * BLOCK_BYTES, levels);
        _mm_prefetch(reinterpret_cast<const char *>(scales + at + AHEAD / BLOCK_BYTES), _MM_HINT_T1);
        const __mmask16 mask = left >= GROUP ? 0xffff : (1u << left) - 1;
        const __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scales + at));
        for (int r = 0; r < R; r++) {
            const __m512i dot = _mm512_add_epi32(block_dots<BITS>(levels, x[r] + at * BLOCK),
                                                 _mm512_loadu_si512(offsets_of(x[r], padded) + at));
            const __m512 factor = _mm512_mul_ps(scale, _mm512_loadu_ps(scales_of(x[r], padded) + at));
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sums[r]);
        }
    }
    for (int r = 0; r < R; r++) out[r] = total(sums[r]);
}

inline __m512bh loaded(const bf16 *from, __mmask32 mask) {
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
}

inline __m512bh loaded(const bf16 *from) { return (__m512bh)_mm512_loadu_si512(from); }

template <int R>
inline void dots_bf16(const bf16 *w, const uint8_t *const *packed, int64_t columns, float *out) {
    __m512 sums[R][4];
    for (auto &row : sums)
        for (__m512 &sum : row) sum = _mm512_setzero_ps();
    const bf16 *x[R];
    for (int r = 0; r < R; r++) x[r] = reinterpret_cast<const bf16 *>(packed[r]);
    int64_t at = 0;
    for (; at + 128 <= columns; at += 128)
        for (int i = 0; i < 4; i++) {
            _mm_prefetch(reinterpret_cast<const char *>(w + at + 32 * i) + AHEAD, _MM_HINT_T1);
            const __m512bh weight = loaded(w + at + 32 * i);
            for (int r = 0; r < R; r++)
                sums[r][i] = _mm512_dpbf16_ps(sums[r][i], weight, loaded(x[r] + at + 32 * i));
        }
    for (; at < columns; at += 32) {
        const int64_t left = columns - at;
        const __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        const __m512bh weight = loaded(w + at, mask);
        for (int r = 0; r < R; r++)
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], weight, loaded(x[r] + at));
    }
    for (int r = 0; r < R; r++)
        out[r] = total(_mm512_add_ps(_mm512_add_ps(sums[r][0], sums[r][1]),
                                     _mm512_add_ps(sums[r][2], sums[r][3])));
}

template <int BITS, int R>
inline void dots(const uint8_t *codes, const half *scales, const uint8_t *const *x, int64_t columns,
                 float *out) {
    if constexpr (BITS == 16)
        dots_bf16<R>(reinterpret_cast<const bf16 *>(codes), x, columns, out);
    else
        dots_low<BITS, R>(codes, scales, x, columns, out);
}

// A block's numbers in bfloat16, for convert.h.
#define OWN_NUMBERS_OF_BLOCK
template <int BITS>
inline void numbers_of_block(const uint8_t *codes, half scale, bf16 *numbers) {
    const __m128i *const from = reinterpret_cast<const __m128i *>(codes);
    const __m128i raw = _mm_loadu_si128(from);
    __m128i first = raw, second;
    if constexpr (BITS == 8) {
        second = _mm_loadu_si128(from + 1);
    } else {
        const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i *>(LEVELS));
        const __m128i low = _mm_set1_epi8(15);
        first = _mm_shuffle_epi8(table, _mm_and_si128(raw, low));
        second = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(raw, 4), low));
    }
    const __m512 factor = _mm512_set1_ps(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(scale))));
    auto scaled = [&](__m128i levels) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(levels)), factor);
    };
    _mm512_storeu_si512(numbers, (__m512i)_mm512_cvtne2ps_pbh(scaled(second), scaled(first)));
}

}  // namespace
