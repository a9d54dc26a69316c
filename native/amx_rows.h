// Rows of the latent cache as latent attention reads them: bfloat16 where they stand, or int8 made
// bfloat16 while their block is in the second-level cache. Two rows at a time, because their latents
// are woven together as right factors, and an int8 row is unpacked for both factors at once.
#pragma once
#if defined(__x86_64__)
#include <cstring>

#include "amx.h"

AMX_BEGIN
namespace {

constexpr int64_t ROWS = 128;  // of the cache that are worked on at a time

// What a block becomes.
struct Unpacked {
    uint16_t *values;  // its latents, rows woven in pairs: [latent/16][ROWS/2][16][2]
    uint16_t *rows;    // [ROWS][width] where they do not stand in the cache
};

// 32 numbers of rows 2·pair and 2·pair + 1 as right factors.
inline void weave(__m512i a, __m512i b, int64_t at, int64_t pair, uint16_t *values) {
    const __m512i low_half = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                              8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high_half = _mm512_add_epi16(low_half, _mm512_set1_epi16(16));
    uint16_t *to = values + at / 16 * (ROWS * 16) + pair * 32;
    _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low_half, b));
    _mm512_store_si512(to + ROWS * 16, _mm512_permutex2var_epi16(a, high_half, b));
}

struct PlainRows {
    const uint16_t *entries;
    int64_t width, latent;

    // Rows slot and slot + 1 of the cache are those of a pair; what is not seen counts as zeros.
    void unpack(int64_t slot, bool first, bool second, int64_t pair, const Unpacked &to) const {
        const uint16_t *row = entries + slot * width;
        for (int64_t at = 0; at < latent; at += 32)
            weave(first ? _mm512_loadu_si512(row + at) : _mm512_setzero_si512(),
                  second ? _mm512_loadu_si512(row + width + at) : _mm512_setzero_si512(), at, pair,
                  to.values);
    }

    // Left factors: 32 rows that lie one after the other, from `slot` on.
    const uint16_t *left(int64_t slot, int64_t, const Unpacked &) const {
        return entries + slot * width;
    }
};

// codes [latent], rope key [width − latent], bfloat16 scales of 32 codes each, to whole 32 bytes.
struct Int8Rows {
    const uint8_t *entries;
    int64_t width, latent;

    int64_t scales() const { return latent + (width - latent) * 2; }
    int64_t bytes() const { return (scales() + latent / 16 + 31) / 32 * 32; }

    static __m512i numbers(const uint8_t *codes, const uint8_t *scale) {
        int32_t word;  // the scale is its upper half, as it is of a float
        std::memcpy(&word, scale - 2, 4);
        const __m512 by = _mm512_castsi512_ps(
            _mm512_and_si512(_mm512_set1_epi32(word), _mm512_set1_epi32(-65536)));
        const auto sixteen = [&](int64_t at) {
            const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + at));
            return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)), by);
        };
        return (__m512i)_mm512_cvtne2ps_pbh(sixteen(16), sixteen(0));
    }

    void unpack(int64_t slot, bool first, bool second, int64_t pair, const Unpacked &to) const {
        const int64_t stride = bytes();
        const uint8_t *row = entries + slot * stride;
        uint16_t *const left = to.rows + 2 * pair * width;
        for (int64_t at = 0; at < latent; at += 32) {
            const uint8_t *scale = row + scales() + at / 16;
            const __m512i a = first ? numbers(row + at, scale) : _mm512_setzero_si512();
            const __m512i b =
                second ? numbers(row + stride + at, scale + stride) : _mm512_setzero_si512();
            _mm512_storeu_si512(left + at, a);
            _mm512_storeu_si512(left + width + at, b);
            weave(a, b, at, pair, to.values);
        }
        const uint8_t *key = row + latent;
        for (int64_t at = latent; at < width; at += 32, key += 64) {
            _mm512_storeu_si512(left + at, _mm512_loadu_si512(key));
            _mm512_storeu_si512(left + width + at, _mm512_loadu_si512(key + stride));
        }
    }

    const uint16_t *left(int64_t, int64_t row, const Unpacked &from) const {
        return from.rows + row * width;
    }
};

}  // namespace
TARGET_END
#endif
