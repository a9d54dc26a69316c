// silu(gate) · up · weight of sums in tiles, and its slopes, in float32.
#pragma once
#if defined(__x86_64__)
#include "amx_products.h"
#include "amx_training_mlp.h"

AMX_BEGIN
namespace amx {

inline float weight_of(const TrainingMlp &call, int64_t row) {
    if (!call.pair) return 1.0f;
    return call.pair[row] < 0 ? 0.0f : call.weights[call.pair[row]];
}

// 1 / (1 + e^-x) to 2^-13, which is finer than what it is rounded to.
inline __m512 sigmoid(__m512 x) {
    const __m512 power = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    return _mm512_rcp14_ps(_mm512_add_ps(power, _mm512_set1_ps(1.0f)));
}

inline __m512 swiglu(__m512 gate, __m512 up, __m512 weight) {
    return _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), _mm512_mul_ps(up, weight));
}

// 32 numbers of a row; gate and up as `row_of` finds them.
inline void swiglu_row(const float *gate, const float *up, float weight, bf16 *to) {
    const __m512 by = _mm512_set1_ps(weight);
    const __m512 low = swiglu(_mm512_load_ps(gate), _mm512_load_ps(up), by);
    const __m512 high = swiglu(_mm512_load_ps(gate + SUMS), _mm512_load_ps(up + SUMS), by);
    _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// What 16 numbers of a row give backward.
struct Slopes {
    __m512 gate, up, act, pull;

    Slopes(__m512 g, __m512 u, __m512 grad, __m512 weight) {
        const __m512 s = sigmoid(g), silu = _mm512_mul_ps(g, s), out = _mm512_mul_ps(silu, u);
        const __m512 pulled = _mm512_mul_ps(grad, weight);
        // silu' = s + silu · (1 − s)
        const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
        up = _mm512_mul_ps(pulled, silu);
        gate = _mm512_mul_ps(_mm512_mul_ps(pulled, u), slope);
        act = _mm512_mul_ps(out, weight);
        pull = _mm512_mul_ps(grad, out);
    }
};

// And 32 of them, rounded: the slopes of gate and up, silu(gate) · up · weight, and their shares of the
// slope of the weight. Sums as `row_of` finds them.
struct Slopes32 {
    __m512i gate, up, act;
    __m512 pull;

    Slopes32(const float *g, const float *u, const float *grad, float weight) {
        const __m512 by = _mm512_set1_ps(weight);
        const Slopes low(_mm512_load_ps(g), _mm512_load_ps(u), _mm512_load_ps(grad), by);
        const Slopes high(_mm512_load_ps(g + SUMS), _mm512_load_ps(u + SUMS),
                          _mm512_load_ps(grad + SUMS), by);
        gate = (__m512i)_mm512_cvtne2ps_pbh(high.gate, low.gate);
        up = (__m512i)_mm512_cvtne2ps_pbh(high.up, low.up);
        act = (__m512i)_mm512_cvtne2ps_pbh(high.act, low.act);
        pull = _mm512_add_ps(low.pull, high.pull);
    }
};

}  // namespace amx
TARGET_END
#endif
