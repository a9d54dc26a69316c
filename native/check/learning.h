// SwiGLU networks that learn, and their gradients, against plain loops in double.
#pragma once
#include "compare.h"
#include "numbers.h"

struct TrainingMlp {
    const void *x;
    int x_kind;
    const void *gate, *up, *down;
    int weight_kind;
    int64_t gate_stride, down_stride;
    const int64_t *starts;
    const int64_t *pair;
    const float *weights;
    int64_t K, E, D, F;
};
extern "C" {
void qiusuo_training_mlp(const TrainingMlp *call, void *y);
void qiusuo_training_mlp_backward(const TrainingMlp *call, const void *grad_y, void *grad_rows,
                                  float *grad_weights, void *grad_gate, void *grad_up,
                                  void *grad_down);
}

// Numbers with the sum of the sizes of what was added up: roundings are of that.
struct Total {
    std::vector<double> sum, size;
    explicit Total(int64_t count) : sum(count), size(count) {}
    void add(int64_t at, double term) { sum[at] += term, size[at] += std::fabs(term); }
    void check(const char *what, int kind, const Answer &answer, int64_t columns) const {
        for (size_t i = 0; i < sum.size(); ++i)
            compare(what, 5, 16, kind, i / columns, i % columns, columns, answer[i], sum[i],
                    size[i] / 50 + 1e-9);
    }
};

// Expert e has 13 e rows, each another of the M tokens' 2 choices, or padding.
inline void check_mlp(Draws &draw, int kind, int64_t M, int64_t E, int64_t D, int64_t F) {
    const Rows x(draw, M, D), toward(draw, M, D);
    const Weight gate_up(draw, 16, E * 2 * F, D), down(draw, 16, E * D, F);
    Buffer<float> wide(E * 2 * F * D), back(E * D * F);
    for (size_t i = 0; i < wide.size(); ++i) wide[i] = static_cast<float>(gate_up.meant[i]);
    for (size_t i = 0; i < back.size(); ++i) back[i] = static_cast<float>(down.meant[i]);
    Buffer<int64_t> starts(E + 1);
    for (int64_t e = 0; e < E; ++e) starts[e + 1] = starts[e] + 13 * e;
    const int64_t R = starts[E];
    Buffer<int64_t> pair(R);
    Buffer<float> weights(2 * M), grad_weights(2 * M);
    for (int64_t r = 0; r < R; ++r) pair[r] = r % 11 == 7 ? -1 : R - 1 - r;
    for (int64_t p = 0; p < 2 * M; ++p) weights[p] = draw.between(-9, 9) / 8.0f;
    const auto at = [&](const Weight &codes, const Buffer<float> &numbers, int64_t first) {
        return kind ? static_cast<const void *>(codes.codes.get() + 2 * first)
                    : static_cast<const void *>(numbers.get() + first);
    };
    const TrainingMlp call = {x.at(kind), kind, at(gate_up, wide, 0), at(gate_up, wide, F * D),
                              at(down, back, 0), kind, 2 * F * D, D * F, starts.get(), pair.get(),
                              weights.get(), 2, E, D, F};
    const Answer y(1, R * D), grad_rows(1, R * D), grad_wide(kind, E * 2 * F * D),
        grad_down(kind, E * D * F);
    qiusuo_training_mlp(&call, y.at());
    uint8_t *const grad_up = static_cast<uint8_t *>(grad_wide.at()) + F * D * (kind ? 2 : 4);
    qiusuo_training_mlp_backward(&call, toward.at(1), grad_rows.at(), grad_weights.get(),
                                 grad_wide.at(), grad_up, grad_down.at());
    Total out(R * D), to_rows(R * D), to_wide(E * 2 * F * D), to_down(E * D * F), to_weights(2 * M);
    for (int64_t e = 0; e < E; ++e)
        for (int64_t r = starts[e]; r < starts[e + 1]; ++r) {
            if (pair[r] < 0) continue;
            const float *const own = &x.f32[pair[r] / 2 * D], *const pull = &toward.f32[pair[r] / 2 * D];
            const double weight = weights[pair[r]];
            for (int64_t f = 0; f < F; ++f) {
                const int64_t g_at = (e * 2 * F + f) * D, u_at = g_at + F * D;
                double g = 0, u = 0, d = 0;
                for (int64_t c = 0; c < D; ++c) {
                    g += own[c] * gate_up.meant[g_at + c], u += own[c] * gate_up.meant[u_at + c];
                    d += pull[c] * down.meant[(e * D + c) * F + f];
                }
                const double s = 1 / (1 + std::exp(-g)), silu = g * s, act = silu * u;
                const double slope = s + silu * (1 - s);
                for (int64_t c = 0; c < D; ++c) {
                    out.add(r * D + c, act * weight * down.meant[(e * D + c) * F + f]);
                    // The slope of down's input is itself a sum, whose own rounding counts.
                    to_rows.add(r * D + c, d * weight * u * slope * gate_up.meant[g_at + c]);
                    to_rows.add(r * D + c, d * weight * silu * gate_up.meant[u_at + c]);
                    to_wide.add(g_at + c, d * weight * u * slope * own[c]);
                    to_wide.add(u_at + c, d * weight * silu * own[c]);
                    to_down.add((e * D + c) * F + f, act * weight * pull[c]);
                }
                to_weights.add(pair[r], d * act);
            }
        }
    out.check("mlp", kind, y, D);
    to_rows.check("mlp's gradient of x", kind, grad_rows, D);
    for (int64_t i = 0; i < 2 * F * D; ++i) to_wide.sum[i] = grad_wide[i];  // nobody writes those of
    for (int64_t i = 0; i < D * F; ++i) to_down.sum[i] = grad_down[i];      // expert 0, which has no rows
    to_wide.check("mlp's gradient of gate and up", kind, grad_wide, D);
    to_down.check("mlp's gradient of down", kind, grad_down, F);
    for (int64_t r = 0; r < R; ++r)
        if (pair[r] >= 0)
            compare("mlp's gradient of a weight", 5, 16, kind, r, 0, F, grad_weights[pair[r]],
                    to_weights.sum[pair[r]], to_weights.size[pair[r]] / 50 + 1e-9);
}

inline void check_mlps(int isa) {
    if (isa != 5) return;
    Draws draw;
    for (const int kind : {0, 1}) {
        check_mlp(draw, kind, 20, 3, 5, 7);
        check_mlp(draw, kind, 100, 4, 40, 33);
        check_mlp(draw, kind, 130, 5, 64, 300);
        check_mlp(draw, kind, 400, 2, 300, 100);
    }
}
