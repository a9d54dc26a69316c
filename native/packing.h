// Rows of x as the dot products read them.
//
// Low bits: 8-bit codes with a float scale for each block of 32, filled up with zeros to GROUP
// blocks; after the codes the scales, then -128 times the sum of each block's codes (what must be
// added where an instruction wants unsigned weights, level + 128). 16 bits: bfloat16, filled up
// with zeros to 64 bytes.
#pragma once
#include "numbers.h"

namespace {

constexpr int64_t GROUP = 16;  // blocks whose dot products become the 16 lanes of a sum

constexpr int64_t padded_blocks(int64_t columns) {
    return (columns + BLOCK * GROUP - 1) / (BLOCK * GROUP) * GROUP;
}

constexpr int64_t packed_bytes(int bits, int64_t columns) {
    return bits == 16 ? (columns * 2 + 63) / 64 * 64 : padded_blocks(columns) * (BLOCK + 8);
}

inline const float *scales_of(const uint8_t *packed, int64_t blocks_padded) {
    return reinterpret_cast<const float *>(packed + blocks_padded * BLOCK);
}

inline const int32_t *offsets_of(const uint8_t *packed, int64_t blocks_padded) {
    return reinterpret_cast<const int32_t *>(packed + blocks_padded * (BLOCK + 4));
}

// Codes of 32 numbers; returns the scale. Numbers that are not finite give a scale that is not.
inline float code_block(const float *numbers, int8_t *codes) {
    uint32_t most = 0;  // the bits of positive floats are ordered as the floats are
    for (int i = 0; i < BLOCK; i++) {
        const uint32_t size = bits_of(numbers[i]) & 0x7fffffff;
        most = size > most ? size : most;
    }
    const bool nothing = most < bits_of(1e-30f);
    const float inverse = nothing ? 0.0f : 127.0f / number_of(most);
    for (int i = 0; i < BLOCK; i++) {
        float level = std::rint(numbers[i] * inverse);
        level = level < 127.0f ? level : 127.0f;
        level = level > -127.0f ? level : -127.0f;
        codes[i] = static_cast<int8_t>(static_cast<int32_t>(level));
    }
    return nothing ? 0.0f : number_of(most) / 127.0f;
}

// PAIRED: for 4 bits, of four blocks first the four first halves, then the four second halves, as
// the low and high nibbles of 64 bytes of weights are.
inline void pair_halves(int8_t *codes, int64_t blocks_padded) {
    int8_t old[4 * BLOCK];
    for (int8_t *four = codes; four < codes + blocks_padded * BLOCK; four += 4 * BLOCK) {
        std::memcpy(old, four, sizeof old);
        for (int i = 0; i < 4; i++) {
            std::memcpy(four + 16 * i, old + BLOCK * i, 16);
            std::memcpy(four + 64 + 16 * i, old + BLOCK * i + 16, 16);
        }
    }
}

template <class T>
void pack_low(const T *x, int64_t columns, uint8_t *packed) {
    const int64_t padded = padded_blocks(columns);
    int8_t *codes = reinterpret_cast<int8_t *>(packed);
    float *scales = reinterpret_cast<float *>(packed + padded * BLOCK);
    int32_t *offsets = reinterpret_cast<int32_t *>(packed + padded * (BLOCK + 4));
    for (int64_t b = 0; b < padded; b++) {
        float numbers[BLOCK] = {};
        const int64_t left = columns - b * BLOCK;
        if (left >= BLOCK)
            for (int i = 0; i < BLOCK; i++) numbers[i] = widened(x[b * BLOCK + i]);
        else
            for (int64_t i = 0; i < left; i++) numbers[i] = widened(x[b * BLOCK + i]);
        scales[b] = code_block(numbers, codes + b * BLOCK);
        int32_t sum = 0;
        for (int i = 0; i < BLOCK; i++) sum += codes[b * BLOCK + i];
        offsets[b] = -128 * sum;
    }
}

template <int BITS, bool PAIRED>
void pack(const void *x, int kind, int64_t at, int64_t columns, uint8_t *packed) {
    const float *floats = static_cast<const float *>(x) + at;
    const bf16 *shorts = static_cast<const bf16 *>(x) + at;
    if constexpr (BITS == 16) {
        bf16 *to = reinterpret_cast<bf16 *>(packed);
        for (int64_t i = 0; i < columns; i++) to[i] = kind == 0 ? rounded(floats[i]) : shorts[i];
        std::memset(to + columns, 0, packed_bytes(16, columns) - columns * 2);
    } else {
        kind == 0 ? pack_low(floats, columns, packed) : pack_low(shorts, columns, packed);
        if (BITS == 4 && PAIRED)
            pair_halves(reinterpret_cast<int8_t *>(packed), padded_blocks(columns));
    }
}

}  // namespace
