// What a step does between its matrix products, one pass over the rows each; the same loops for every
// instruction set (between_loops.h). A result depends neither on other rows nor on the threads.
//
// Rows are float32 (kind 0) or bfloat16 (kind 1); what is between them is float32.
#pragma once
#include <cstdint>

// A row of gate and a row of up lie `stride` apart from the next; weight [rows] or null (1) is found
// at `pair` [rows] where that is not null; a pair of -1 has the weight 0.
struct Swiglu {
    int kind;
    const void *gate, *up;
    int64_t stride;
    const float *weight;
    const int64_t *pair;
    int64_t rows, F;
};

struct Between {
    // out [rows, F] = silu(gate) · up · weight.
    void (*swiglu)(const Swiglu &, void *out);

    // From the gradient of that: of gate and up (rows `stride` apart), of weight, and once more what
    // was out. The last two may be null.
    void (*swiglu_backward)(const Swiglu &, const void *grad, void *grad_gate, void *grad_up,
                            float *grad_weight, void *out);

    // out [rows, D]: row pair / K of x, zeros for a pair of -1.
    void (*gather)(const void *x, int x_kind, const int64_t *pair, int64_t K, void *out,
                   int out_kind, int64_t rows, int64_t D);

    // out [M, D]: the sum of y's rows place[m, 0 .. K - 1], in this order.
    void (*sum_choices)(const void *y, int kind, const int64_t *place, int64_t K, void *out,
                        int64_t M, int64_t D);

    // out = x / rms(x) · weight; x's rows are `stride` apart; scale [rows] = 1 / rms, or null.
    void (*rms_norm)(const void *x, int x_kind, int64_t stride, const void *weight, int weight_kind,
                     void *out, int out_kind, float *scale, int64_t rows, int64_t D, float eps);

    // The same of sum [rows, D] = x + added, which is written too: float32 where one of them is.
    void (*add_rms_norm)(const void *x, int x_kind, int64_t stride, const void *added,
                         int added_kind, int64_t added_stride, const void *weight, int weight_kind,
                         void *sum, void *out, int out_kind, float *scale, int64_t rows, int64_t D,
                         float eps);

    // grad_x [rows, D] of x's kind and grad_weight [D]. `past` [rows, D] of x's kind, or null: the
    // gradient that reaches x past the norm, added to grad_x; grad_rounded: that in bfloat16, or null.
    void (*rms_norm_backward)(const void *grad, int grad_kind, const void *x, int x_kind,
                              int64_t stride, const void *weight, int weight_kind,
                              const float *scale, const void *past, void *grad_x,
                              void *grad_rounded, float *grad_weight, int64_t rows, int64_t D);

    // Pairs of x [rows, heads, R] turned by complex numbers turns [turned, R/2], row r by r % turned,
    // or back again: adjacent numbers, or with `halves` those R/2 apart. `row_stride` is the distance
    // of two rows of x, `stride` of two heads; out [rows, heads, R] has no gaps.
    void (*rotate)(const void *x, int kind, const float *turns, int64_t turned, bool halves,
                   bool back, void *out, int64_t rows, int64_t heads, int64_t R, int64_t row_stride,
                   int64_t stride);

    // Logits [rows, W] become the gradient of the sum of losses, which are nats [rows]; zeros for
    // rows whose label is below 0.
    void (*cross_entropy)(void *logits, int kind, const int64_t *labels, float *nats, int64_t rows,
                          int64_t W);
};
