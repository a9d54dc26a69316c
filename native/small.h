// What a decoding step does between its products; see small.cpp.
#pragma once
#include <cstdint>

// kind: 0 float32, 1 bfloat16, of x and out.

// out [rows, D] = x / rms(x) · weight; weight of x's kind.
void rms_norm(const void *x, int kind, const void *weight, void *out, int64_t rows, int64_t D,
              float eps);

// Adjacent pairs of x [rows, heads, R] turned by complex numbers turns [rows, R/2]. `stride` is the
// distance of two heads in x, `row_stride` of two rows; out [rows, heads, R] has no gaps.
void rotate_pairs(const void *x, int kind, const float *turns, void *out, int64_t rows,
                  int64_t heads, int64_t R, int64_t row_stride, int64_t stride);

struct Choice {
    int64_t experts, groups, kept_groups, per_token;
    bool sigmoid, normalized;
    float scaling;
};

// DeepSeek's router after its product: scores [M, E] of logits [M, E] (sigmoid or softmax), the
// per_token experts with the largest scores + bias among the best groups, and their weights.
void choose_experts(const float *logits, const float *bias, const Choice &choice, float *scores,
                    int64_t *indices, float *weights, int64_t M);
