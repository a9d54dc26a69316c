// A weight times many rows on AMX, and the experts of many tokens; see amx_matmul.cpp.
#pragma once
#include <cstdint>

bool amx_matmul_takes();

// bits: 8, 4 (scales beside codes, ../src/qiusuo/kernels/low_bit.py) or 16 (bfloat16, no scales).
// x [M, I] and out [M, O] in bfloat16, their rows at a distance; bias [O] may be null.
void amx_linear(int bits, const uint16_t *x, int64_t x_stride, const void *codes,
                const uint16_t *scales, const float *bias, uint16_t *out, int64_t out_stride,
                int64_t M, int64_t O, int64_t I);

// x and out [M, D] in bfloat16, indices and weights [M, K], gate_up [E, 2F, D], down [E, D, F].
void amx_experts(int bits, const uint16_t *x, const int64_t *indices, const float *weights,
                 const void *gate_up, const uint16_t *gate_up_scales, const void *down,
                 const uint16_t *down_scales, uint16_t *out, int64_t M, int64_t K, int64_t E,
                 int64_t D, int64_t F);
