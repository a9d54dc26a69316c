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
// Numbers from one tile's column of woven values to the next: a line more than the rows take, or all
// of a row's would want the same place in the first-level cache.
constexpr int64_t COLUMN = ROWS * 16 + 32;

// What a block becomes.
struct Unpacked {
    uint16_t *values;  // its latents, rows woven in pairs: [latent/16][ROWS/2 + 1][16][2]
    uint16_t *rows;    // [ROWS][width] where they do not stand in the cache
};

// 32 numbers of rows 2·pair and 2·pair + 1 as right factors: two tiles' columns, which the fastest
// instructions deal out by fours. The first tile gets 0–3, 8–11, 16–19 and 24–27; `ordered` undoes it.
inline void weave(__m512i a, __m512i b, int64_t at, int64_t pair, uint16_t *values) {
    uint16_t *to = values + at / 16 * COLUMN + pair * 32;
    _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(to + COLUMN, _mm512_unpackhi_epi16(a, b));
}

// Sums of the 32 columns that `weave` dealt out to two tiles, in their order.
inline void ordered(__m512 first, __m512 second, __m512 out[2]) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    out[0] = _mm512_permutex2var_ps(first, low, second);
    out[1] = _mm512_permutex2var_ps(first, high, second);
}

// Lines of the next block that are asked for while this one is multiplied, a part of them with each
// step of the first products. It helps int8 rows; bfloat16 ones the processor fetches well by itself.
struct Ahead {
    const uint8_t *from;  // 32 rows; null: nothing
    int64_t lines;        // for each step

    void step(int64_t number) const {
        if (!from) return;
        const char *line = reinterpret_cast<const char *>(from) + number * lines * 64;
        for (int64_t i = 0; i < lines; i++) _mm_prefetch(line + i * 64, _MM_HINT_T1);
    }
};

struct PlainRows {
    static constexpr bool AHEAD = false;
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

    const uint8_t *at(int64_t slot) const {
        return reinterpret_cast<const uint8_t *>(entries + slot * width);
    }
    int64_t bytes() const { return width * 2; }

    // Left factors: 32 rows that lie one after the other, from `slot` on.
    const uint16_t *left(int64_t slot, int64_t, const Unpacked &) const {
        return entries + slot * width;
    }
};

// codes [latent], rope key [width − latent], bfloat16 scales of 32 codes each, to whole 32 bytes.
struct Int8Rows {
    static constexpr bool AHEAD = true;
    const uint8_t *entries;
    int64_t width, latent;

    int64_t scales() const { return latent + (width - latent) * 2; }
    int64_t bytes() const { return (scales() + latent / 16 + 31) / 32 * 32; }

    const uint8_t *at(int64_t slot) const { return entries + slot * bytes(); }

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
