// Types of numbers in plain loops, and matrices of random ones beside what they mean in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "buffers.h"

constexpr int BLOCK = 32;
constexpr int LEVELS[16] = {-127, -101, -80, -62, -47, -34, -21, -9, 2, 13, 25, 37, 50, 65, 83, 108};

inline int64_t blocks(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t to_bf16(float value) {  // to the nearest, halves to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline double from_half(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

// Rows of x, float32 and bfloat16 alike. Every block is a power of two times whole numbers up to
// 127 of which the first is 127: its activations become int8 without any rounding, so that a
// product can be held to float32's rounding alone. Some blocks are zero.
struct Rows {
    int64_t count, columns;
    Buffer<float> f32;
    Buffer<uint16_t> bf16;
    Rows(Draws &draw, int64_t count, int64_t columns)
        : count(count), columns(columns), f32(count * columns), bf16(count * columns) {
        for (int64_t i = 0; i < count * columns; ++i) {
            if (i % columns % BLOCK == 0) unit = draw.below(9) ? std::ldexp(1.0f, draw.between(-9, 1)) : 0;
            const int level = i % columns % BLOCK ? draw.between(-127, 127) : draw.below(2) ? 127 : -127;
            f32[i] = unit * level;
            bf16[i] = to_bf16(f32[i]);
        }
    }
    const void *at(int kind) const { return kind ? static_cast<const void *>(bf16.get()) : f32.get(); }

   private:
    float unit = 0;
};

// A stack of matrices, as stored and as meant.
struct Weight {
    int bits;
    int64_t rows, columns;
    Buffer<uint8_t> codes;
    Buffer<uint16_t> scales;
    std::vector<double> meant;
    Weight(Draws &draw, int bits, int64_t rows, int64_t columns)
        : bits(bits), rows(rows), columns(columns),
          codes(rows * (bits == 16 ? columns * 2 : blocks(columns) * BLOCK * bits / 8)),
          scales(bits == 16 ? 0 : rows * blocks(columns)), meant(rows * columns) {
        if (bits == 16) {
            fill_bf16(draw);
            return;
        }
        for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(draw.below(256));
        if (bits == 8)  // no level is -128
            for (size_t i = 0; i < codes.size(); ++i) codes[i] = codes[i] == 128 ? 129 : codes[i];
        for (size_t i = 0; i < scales.size(); ++i) scales[i] = scale(draw);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) {
                const int64_t block = r * blocks(columns) + c / BLOCK;
                meant[r * columns + c] = level(block, c % BLOCK) * from_half(scales[block]);
            }
    }
    int level(int64_t block, int64_t i) const {
        if (bits == 8) return static_cast<int8_t>(codes[block * BLOCK + i]);
        const uint8_t pair = codes[block * 16 + i % 16];
        return LEVELS[i < 16 ? pair & 15 : pair >> 4];
    }
    const void *scales_at() const { return bits == 16 ? nullptr : scales.get(); }

   private:
    static uint16_t scale(Draws &draw) {
        const int sign = draw.below(2) << 15, which = draw.below(12);
        if (which == 0) return static_cast<uint16_t>(sign);                     // zero
        if (which == 1) return static_cast<uint16_t>(sign | draw.below(1024));  // subnormal
        return static_cast<uint16_t>(sign | draw.between(4, 9) << 10 | draw.below(1024));
    }
    void fill_bf16(Draws &draw) {
        for (size_t i = 0; i < meant.size(); ++i) {
            const uint16_t bits = to_bf16(static_cast<float>(draw.between(-1000, 1000)) / 4096);
            std::memcpy(codes.get() + 2 * i, &bits, 2);
            meant[i] = from_bf16(bits);
        }
    }
};

// Numbers of an answer, whichever type it has.
struct Answer {
    int kind;
    Buffer<float> f32;
    Buffer<uint16_t> bf16;
    Answer(int kind, int64_t count) : kind(kind), f32(kind ? 0 : count), bf16(kind ? count : 0) {}
    void *at() const { return kind ? static_cast<void *>(bf16.get()) : f32.get(); }
    double operator[](size_t i) const { return kind ? from_bf16(bf16[i]) : f32[i]; }
};
