// Projections that learn, and their gradients, against plain loops in double.
#pragma once
#include "learning.h"

struct Projection {
    const void *weight;
    int64_t O;
    void *y, *grad_weight;
};
struct TrainingLinear {
    const void *x;
    int x_kind, weight_kind;
    int64_t M, D, count;
    const Projection *layers;
};
extern "C" {
void qiusuo_training_linear(const TrainingLinear *call);
void qiusuo_training_linear_backward(const TrainingLinear *call, void *grad_x);
}

// Two layers of M rows, x of `kind` and weights of the other or the same.
inline void check_linears(Draws &draw, int kind, int weight_kind, int64_t M, int64_t D,
                          const int64_t (&O)[2]) {
    const Rows x(draw, M, D);
    const Weight weights[] = {{draw, 16, O[0], D}, {draw, 16, O[1], D}};
    const Buffer<float> wide[] = {Buffer<float>(O[0] * D), Buffer<float>(O[1] * D)};
    const Rows toward[] = {{draw, M, O[0]}, {draw, M, O[1]}};
    const Answer ys[] = {{1, M * O[0]}, {1, M * O[1]}};
    const Answer grads[] = {{weight_kind, O[0] * D}, {weight_kind, O[1] * D}};
    const Answer grad_x(kind, M * D);
    Projection ahead[2], back[2];
    for (int i = 0; i < 2; ++i) {
        for (int64_t n = 0; n < O[i] * D; ++n) wide[i][n] = static_cast<float>(weights[i].meant[n]);
        const void *const at =
            weight_kind ? static_cast<const void *>(weights[i].codes.get()) : wide[i].get();
        ahead[i] = {at, O[i], ys[i].at(), nullptr};
        back[i] = {at, O[i], const_cast<void *>(toward[i].at(1)), grads[i].at()};
    }
    TrainingLinear call = {x.at(kind), kind, weight_kind, M, D, 2, ahead};
    qiusuo_training_linear(&call);
    call.layers = back;
    qiusuo_training_linear_backward(&call, grad_x.at());
    Total to_x(M * D);
    for (int i = 0; i < 2; ++i) {
        Total y(M * O[i]), to_weight(O[i] * D);
        for (int64_t m = 0; m < M; ++m)
            for (int64_t o = 0; o < O[i]; ++o)
                for (int64_t d = 0; d < D; ++d) {
                    const double own = x.f32[m * D + d], by = weights[i].meant[o * D + d];
                    const double pull = toward[i].f32[m * O[i] + o];
                    y.add(m * O[i] + o, own * by);
                    to_x.add(m * D + d, pull * by);
                    to_weight.add(o * D + d, pull * own);
                }
        y.check("projection", kind, ys[i], O[i]);
        to_weight.check("projection's gradient of its weight", kind, grads[i], D);
    }
    to_x.check("projections' gradient of x", kind, grad_x, D);
    const Answer again[] = {{weight_kind, O[0] * D}, {weight_kind, O[1] * D}};
    for (int i = 0; i < 2; ++i) back[i].grad_weight = again[i].at();
    qiusuo_training_linear_backward(&call, nullptr);  // nobody wants that of x
    for (int i = 0; i < 2; ++i)
        for (int64_t n = 0; n < O[i] * D; ++n)
            compare("projection's gradient alone", 5, 16, kind, n / D, n % D, D, again[i][n],
                    grads[i][n], 0);
}

inline void check_projections(int isa) {
    if (isa != 5) return;
    Draws draw;
    for (const int kind : {0, 1})
        for (const int weight_kind : {0, 1}) {
            check_linears(draw, kind, weight_kind, 1, 7, {5, 1});
            check_linears(draw, kind, weight_kind, 50, 40, {33, 64});
            check_linears(draw, kind, weight_kind, 270, 64, {8, 100});
            check_linears(draw, kind, weight_kind, 1100, 33, {40, 20});
        }
}
