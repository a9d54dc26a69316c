// What a step does between its products, in one call each. Their arithmetic is nothing; as a dozen of
// PyTorch's operations each they would take longer than the products of a small model. A row's result
// does not depend on the others.
#include "small.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.h"
#include "threads.h"

namespace {

struct Float {
    using stored = float;
    static float wide(float value) { return value; }
    static float narrow(float value) { return value; }
};

struct Bfloat {
    using stored = uint16_t;
    static float wide(uint16_t value) { return widened(value); }
    static uint16_t narrow(float value) { return rounded(value); }
};

constexpr int64_t LANES = 16;
constexpr int64_t SHARE = 1 << 14;  // numbers that a thread takes at a time

// task(row) for all rows, several at a time; many of them by several threads.
template <class Task>
void for_rows(int64_t rows, int64_t numbers, Task task) {
    const int64_t together = std::max<int64_t>(1, SHARE / std::max<int64_t>(1, numbers));
    auto some = [&](int64_t share) {
        const int64_t last = std::min(rows, (share + 1) * together);
        for (int64_t row = share * together; row < last; row++) task(row);
    };
    parallel((rows + together - 1) / together, rows * numbers * 2, some);
}

template <class Kind>
void norm(const void *x, const void *weight, void *out, int64_t rows, int64_t D, float eps) {
    using stored = typename Kind::stored;
    const auto *weights = static_cast<const stored *>(weight);
    for_rows(rows, D, [&](int64_t row) {
        const auto *from = static_cast<const stored *>(x) + row * D;
        auto *to = static_cast<stored *>(out) + row * D;
        float lanes[LANES] = {};  // as many sums side by side as let the compiler use wide registers
        int64_t at = 0;
        for (; at + LANES <= D; at += LANES)
            for (int64_t lane = 0; lane < LANES; lane++) {
                const float value = Kind::wide(from[at + lane]);
                lanes[lane] += value * value;
            }
        float sum = 0;
        for (; at < D; at++) sum += Kind::wide(from[at]) * Kind::wide(from[at]);
        for (const float lane : lanes) sum += lane;
        const float scale = 1.0f / std::sqrt(sum / static_cast<float>(D) + eps);
        for (int64_t d = 0; d < D; d++)  // rounded before the weight, as the reference does
            to[d] = Kind::narrow(Kind::wide(Kind::narrow(Kind::wide(from[d]) * scale)) *
                                 Kind::wide(weights[d]));
    });
}

template <class Kind>
void rotate(const void *x, const float *turns, void *out, int64_t rows, int64_t heads, int64_t R,
            int64_t row_stride, int64_t stride) {
    using stored = typename Kind::stored;
    for_rows(rows, heads * R, [&](int64_t row) {
        for (int64_t head = 0; head < heads; head++) {
            const auto *from = static_cast<const stored *>(x) + row * row_stride + head * stride;
            auto *to = static_cast<stored *>(out) + (row * heads + head) * R;
            const float *turn = turns + row * R;
            for (int64_t at = 0; at < R; at += 2) {
                const float a = Kind::wide(from[at]), b = Kind::wide(from[at + 1]);
                to[at] = Kind::narrow(a * turn[at] - b * turn[at + 1]);
                to[at + 1] = Kind::narrow(a * turn[at + 1] + b * turn[at]);
            }
        }
    });
}

// The `count` largest of `values`, the largest first; of equals the first.
void largest(const float *values, int64_t size, int64_t count, int64_t *places) {
    for (int64_t k = 0; k < count; k++) {
        int64_t best = -1;
        for (int64_t i = 0; i < size; i++)
            if ((best < 0 || values[i] > values[best]) &&
                std::find(places, places + k, i) == places + k)
                best = i;
        places[k] = best;
    }
}

// A group counts as its two best (with sigmoid, V3) or its best (with softmax, V2).
float strength(const float *values, int64_t size, bool two) {
    int64_t best[2];
    largest(values, size, std::min<int64_t>(two ? 2 : 1, size), best);
    return two && size > 1 ? values[best[0]] + values[best[1]] : values[best[0]];
}

}  // namespace

void rms_norm(const void *x, int kind, const void *weight, void *out, int64_t rows, int64_t D,
              float eps) {
    (kind ? norm<Bfloat> : norm<Float>)(x, weight, out, rows, D, eps);
}

void rotate_pairs(const void *x, int kind, const float *turns, void *out, int64_t rows,
                  int64_t heads, int64_t R, int64_t row_stride, int64_t stride) {
    (kind ? rotate<Bfloat> : rotate<Float>)(x, turns, out, rows, heads, R, row_stride, stride);
}

void choose_experts(const float *logits, const float *bias, const Choice &choice, float *scores,
                    int64_t *indices, float *weights, int64_t M) {
    const int64_t E = choice.experts, K = choice.per_token, size = E / choice.groups;
    std::vector<float> biased(E), strengths(choice.groups);
    std::vector<int64_t> kept(choice.kept_groups);
    for (int64_t m = 0; m < M; m++) {
        const float *logit = logits + m * E;
        float *score = scores + m * E;
        const float most = *std::max_element(logit, logit + E);
        float total = 0;
        for (int64_t e = 0; e < E; e++) {
            score[e] = choice.sigmoid ? 1.0f / (1.0f + std::exp(-logit[e])) : std::exp(logit[e] - most);
            total += score[e];
        }
        for (int64_t e = 0; e < E; e++) {
            if (!choice.sigmoid) score[e] /= total;
            biased[e] = score[e] + (bias ? bias[e] : 0.0f);
        }
        if (choice.kept_groups < choice.groups) {
            for (int64_t g = 0; g < choice.groups; g++)
                strengths[g] = strength(&biased[g * size], size, choice.sigmoid);
            largest(strengths.data(), choice.groups, choice.kept_groups, kept.data());
            for (int64_t g = 0; g < choice.groups; g++)
                if (std::find(kept.begin(), kept.end(), g) == kept.end())
                    std::fill_n(&biased[g * size], size, -INFINITY);
        }
        int64_t *index = indices + m * K;
        largest(biased.data(), E, K, index);
        float sum = 0;
        for (int64_t k = 0; k < K; k++) sum += score[index[k]];
        for (int64_t k = 0; k < K; k++)
            weights[m * K + k] = score[index[k]] * choice.scaling /
                                 (choice.normalized ? sum + 1e-20f : 1.0f);
    }
}
