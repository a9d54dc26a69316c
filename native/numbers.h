// float16 and bfloat16 in plain C++. Included by each instruction set's file, for itself.
#pragma once
#include "kernels.h"

using bf16 = uint16_t;
using half = uint16_t;

namespace {

inline uint32_t bits_of(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    return bits;
}

inline float number_of(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

inline float widened(bf16 value) { return number_of(static_cast<uint32_t>(value) << 16); }
inline float widened(float value) { return value; }

// To nearest, ties to even; NaN stays NaN.
inline bf16 rounded(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : up);
}

inline bf16 narrowed(float value, bf16) { return rounded(value); }
inline float narrowed(float value, float) { return value; }

inline float from_half(half value) {
    const uint32_t magnitude = static_cast<uint32_t>(value & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
    const uint32_t moved = bits_of(number_of(magnitude) * 0x1p112f);  // exponents 15 and 127
    return number_of(sign | moved | (magnitude >= 0x0f800000 ? 0x7f800000 : 0));
}

// To nearest, ties to even, for finite numbers.
inline half to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    const uint32_t small = bits_of(number_of(size) + 0.5f) - 0x3f000000;  // float16 subnormal
    const uint32_t usual = (size + 0xc8000fff + (size >> 13 & 1)) >> 13;
    return static_cast<half>(sign | (size < 0x38800000 ? small : size < 0x47800000 ? usual : 0x7c00));
}

}  // namespace
