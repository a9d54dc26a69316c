// dW = dyᵀ · x over rows that come block by block: sums stay in tiles, in the second-level cache,
// until the last block.
#pragma once
#if defined(__x86_64__)
#include "amx_products.h"

AMX_BEGIN
namespace amx {

struct WeightGradient {
    int64_t O, I;
    float *sums;  // [tiles of O][tiles of I], each in pairs

    static int64_t tiles(int64_t width) { return up(width, PAIR) * 2; }
    static int64_t room(int64_t O, int64_t I) { return tiles(O) * tiles(I) * SUMS; }

    // `dy` [tiles of O][steps], transposed, times x woven [tiles of I][steps].
    void add(const bf16 *dy, const bf16 *x, int64_t steps, bool fresh) const {
        multiply({dy, steps, 1}, {x, steps, 1}, {sums, tiles(I), 1}, tiles(O), tiles(I), steps, fresh);
    }

    // To rows of `stride` numbers of float32 (kind 0) or bfloat16.
    void write(void *grad, int kind, int64_t stride) const {
        for (int64_t row = 0; row < O; row++)
            for (int64_t at = 0; at < I; at += PAIR) {
                const float *const from =
                    sums + (row / TILE * tiles(I) + at / TILE) * SUMS + row % TILE * TILE;
                store_numbers(number_at(grad, kind, row * stride), kind, at, within(I, at),
                              _mm512_load_ps(from), _mm512_load_ps(from + SUMS));
            }
    }
};

}  // namespace amx
TARGET_END
#endif
