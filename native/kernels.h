// What a call asks for, and what one instruction set offers.
//
// This header is included before a file chooses its instruction set, so that what comes from the
// standard library stays code that runs on every processor.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "between.h"
#include "levels.h"

// Weights: rows of codes in blocks of 32 columns, a float16 scale for each block (levels.h);
// with 16 bits, bfloat16 without scales. Activations: float32 (kind 0) or bfloat16 (kind 1).

// Rows of H heads (mostly one), each head with a weight of its own: x [M, H, I], codes of [H, O, I],
// out [M, H, O].
struct Linear {
    const void *x;
    int kind;
    const uint8_t *codes;
    const uint16_t *scales;
    const float *bias;  // [H, O], or null
    void *out;          // of x's kind
    int64_t M, H, O, I;
};

struct Experts {
    const void *x;
    int kind;
    const int64_t *indices;  // [M, K]; null where there is one expert, for all
    const float *weights;    // [M, K]; null: 1
    const uint8_t *gate_up_codes;
    const uint16_t *gate_up_scales;
    const uint8_t *down_codes;
    const uint16_t *down_scales;
    void *out;  // of x's kind
    int64_t M, K, E, D, F;
};

struct Conversion {  // between numbers and codes
    const void *from;
    int kind;  // of the numbers; bfloat16 when they are made
    uint8_t *codes;
    uint16_t *scales;
    uint16_t *numbers;
    int64_t rows, I;
    const float *importance;  // [I] of the columns, or null: all alike
};

struct CachedRows {  // of the cache in int8: cached_rows.h
    void *numbers;         // [N, rounded + exact]
    int kind;              // of the numbers
    uint8_t *entries;      // rows of `width` bytes
    const int64_t *slots;  // [N], which rows are written; all in order when they are read
    int64_t N, rounded, exact, width;
};

struct Kernels {
    const char *name;
    void (*linear)(int bits, const Linear &);
    void (*experts)(int bits, const Experts &);
    void (*dequantize)(int bits, const Conversion &);
    void (*quantize)(int bits, const Conversion &);
    void (*keep_rows)(const CachedRows &);
    void (*unpack_rows)(const CachedRows &);
    const Between *between;
};

// Null where this processor cannot run them.
const Kernels *portable_kernels();
const Kernels *avx2_kernels();
const Kernels *avx512_kernels();
const Kernels *amx_kernels();
const Kernels *neon_kernels();

constexpr int BLOCK = 32;

// Bytes of one row of codes.
constexpr int64_t code_bytes(int bits, int64_t columns) {
    return bits == 16 ? columns * 2 : (columns + BLOCK - 1) / BLOCK * (BLOCK * bits / 8);
}
