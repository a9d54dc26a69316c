// The head's cross-entropy and its gradients against plain loops in double.
#pragma once
#include "learning.h"

struct TrainingHead {
    const void *x;
    int x_kind;
    const void *head;
    int head_kind;
    const int64_t *labels;
    int64_t M, D, W;
};
extern "C" {
void qiusuo_training_head(const TrainingHead *call, float *nats, float *sums, void *grad_x);
void qiusuo_training_head_backward(const TrainingHead *call, const float *sums, const float *scale,
                                   void *grad_head);
}

inline void check_head(Draws &draw, int kind, int64_t M, int64_t D, int64_t W) {
    const Rows x(draw, M, D);
    const Weight head(draw, 16, W, D);
    Buffer<float> numbers(W * D), nats(M), sums(M), scale(M);
    for (int64_t i = 0; i < W * D; ++i) numbers[i] = static_cast<float>(head.meant[i]);
    Buffer<int64_t> labels(M);
    for (int64_t m = 0; m < M; ++m) {
        labels[m] = m % 5 == 3 ? -100 : draw.between(0, W - 1);
        scale[m] = labels[m] < 0 ? 0 : draw.between(1, 9) / 8.0f;
    }
    const void *const weights = kind ? static_cast<const void *>(head.codes.get()) : numbers.get();
    const TrainingHead call = {x.at(kind), kind, weights, kind, labels.get(), M, D, W};
    const Answer grad_x(1, M * D), grad_head(kind, W * D);
    qiusuo_training_head(&call, nats.get(), sums.get(), grad_x.at());
    qiusuo_training_head_backward(&call, sums.get(), scale.get(), grad_head.at());
    Total to_x(M * D), to_head(W * D);
    std::vector<double> logits(W);
    for (int64_t m = 0; m < M; ++m) {
        double most = -1e300, total = 0;
        for (int64_t w = 0; w < W; ++w) {
            logits[w] = 0;
            for (int64_t d = 0; d < D; ++d) logits[w] += double(x.f32[m * D + d]) * head.meant[w * D + d];
            most = std::max(most, logits[w]);
        }
        for (int64_t w = 0; w < W; ++w) total += std::exp(logits[w] - most);
        const double own = labels[m] < 0 ? 0 : most + std::log(total) - logits[labels[m]];
        compare("head's nats", 5, 16, kind, m, 0, W, nats[m], own, 1e-4 + 1e-5 * own);
        if (labels[m] < 0) continue;
        for (int64_t w = 0; w < W; ++w) {
            const double slope = std::exp(logits[w] - most) / total - (w == labels[m]);
            for (int64_t d = 0; d < D; ++d) {
                to_x.add(m * D + d, slope * head.meant[w * D + d]);
                to_head.add(w * D + d, slope * scale[m] * x.f32[m * D + d]);
            }
        }
    }
    to_x.check("head's gradient of x", kind, grad_x, D);
    to_head.check("head's gradient", kind, grad_head, D);
}

inline void check_heads(int isa) {
    if (isa != 5) return;
    Draws draw;
    for (const int kind : {0, 1}) {
        check_head(draw, kind, 20, 5, 7);
        check_head(draw, kind, 100, 40, 300);
        check_head(draw, kind, 270, 33, 513);
    }
}
