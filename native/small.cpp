// What routing does with a few numbers of each token, in one call each: as a dozen of PyTorch's
// operations they would take longer than the products of a small model. A token's result does not
// depend on the others.
#include "small.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "threads.h"

namespace {

constexpr int64_t TOGETHER = 64;  // tokens that a thread takes at a time

// task(begin, end) for M tokens of E numbers; many of them by several threads.
template <class Task> void for_tokens(int64_t M, int64_t E, Task task) {
    parallel((M + TOGETHER - 1) / TOGETHER, M * E * 16, [&](int64_t share) {
        task(share * TOGETHER, std::min(M, (share + 1) * TOGETHER));
    });
}

// A segment's rows (src/qiusuo/kernels/expert_rows.py says why).
int64_t rounded_up(int64_t count) {
    if (count <= 16) return count;
    int bits = 0;
    for (int64_t rest = count; rest; rest >>= 1) bits++;
    const int64_t grain = int64_t{1} << (bits - 4);
    return (count + grain - 1) / grain * grain;
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

// Room that a token's choice takes.
struct Room {
    explicit Room(const Choice &choice)
        : biased(choice.experts), strengths(choice.groups), kept(choice.kept_groups) {}
    std::vector<float> biased, strengths;
    std::vector<int64_t> kept;
};

void choose(const float *logits, const float *bias, const int64_t *replayed, const Choice &choice,
            Room &room, float *scores, int64_t *indices, float *weights) {
    const int64_t E = choice.experts, K = choice.per_token, size = E / choice.groups;
    const float most = *std::max_element(logits, logits + E);
    float total = 0;
    for (int64_t e = 0; e < E; e++) {
        scores[e] = choice.sigmoid ? 1.0f / (1.0f + std::exp(-logits[e])) : std::exp(logits[e] - most);
        total += scores[e];
    }
    for (int64_t e = 0; e < E; e++) {
        if (!choice.sigmoid) scores[e] /= total;
        room.biased[e] = scores[e] + (bias ? bias[e] : 0.0f);
    }
    if (choice.kept_groups < choice.groups) {
        for (int64_t g = 0; g < choice.groups; g++)
            room.strengths[g] = strength(&room.biased[g * size], size, choice.sigmoid);
        largest(room.strengths.data(), choice.groups, choice.kept_groups, room.kept.data());
        for (int64_t g = 0; g < choice.groups; g++)
            if (std::find(room.kept.begin(), room.kept.end(), g) == room.kept.end())
                std::fill_n(&room.biased[g * size], size, -INFINITY);
    }
    largest(room.biased.data(), E, K, indices);
    if (replayed && replayed[0] >= 0) std::copy_n(replayed, K, indices);
    float sum = 0;
    for (int64_t k = 0; k < K; k++) sum += scores[indices[k]];
    for (int64_t k = 0; k < K; k++)
        weights[k] = scores[indices[k]] * choice.scaling / (choice.normalized ? sum + 1e-20f : 1.0f);
}

}  // namespace

void choose_experts(const float *logits, const float *bias, const int64_t *replayed,
                    const Choice &choice, float *scores, int64_t *indices, float *weights,
                    int64_t M) {
    const int64_t E = choice.experts, K = choice.per_token;
    for_tokens(M, E, [&](int64_t begin, int64_t end) {
        Room room(choice);
        for (int64_t m = begin; m < end; m++)
            choose(logits + m * E, bias, replayed ? replayed + m * K : nullptr, choice, room,
                   scores + m * E, indices + m * K, weights + m * K);
    });
}

void choose_experts_backward(const float *scores, const int64_t *indices, const Choice &choice,
                             const float *grad_scores, const float *grad_weights,
                             float *grad_logits, int64_t M) {
    const int64_t E = choice.experts, K = choice.per_token;
    for_tokens(M, E, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++) {
            const float *score = scores + m * E;
            const int64_t *index = indices + m * K;
            float *grad = grad_logits + m * E;
            for (int64_t e = 0; e < E; e++) grad[e] = grad_scores ? grad_scores[m * E + e] : 0.0f;
            if (grad_weights) {
                const float *pull = grad_weights + m * K;
                float sum = 1e-20f, along = 0;
                for (int64_t k = 0; k < K; k++) {
                    sum += score[index[k]];
                    along += pull[k] * score[index[k]];
                }
                for (int64_t k = 0; k < K; k++)
                    grad[index[k]] += choice.scaling * (choice.normalized
                                                            ? (pull[k] - along / sum) / sum
                                                            : pull[k]);
            }
            float along = 0;  // how far the sum of softmax's scores would move
            if (!choice.sigmoid)
                for (int64_t e = 0; e < E; e++) along += grad[e] * score[e];
            for (int64_t e = 0; e < E; e++)
                grad[e] = choice.sigmoid ? grad[e] * score[e] * (1.0f - score[e])
                                         : (grad[e] - along) * score[e];
        }
    });
}

void balance(const float *scores, int64_t B, int64_t T, int64_t E, int64_t K, float *losses,
             float *grad) {
    parallel(B, B * T * E * 8, [&](int64_t b) {
        std::vector<float> counts(E), shares(E);
        std::vector<int64_t> best(K);
        std::vector<float> sums(T);
        for (int64_t t = 0; t < T; t++) {
            const float *score = scores + (b * T + t) * E;
            largest(score, E, K, best.data());
            for (const int64_t e : best) counts[e] += 1;
            for (int64_t e = 0; e < E; e++) sums[t] += score[e];
            for (int64_t e = 0; e < E; e++) shares[e] += score[e] / sums[t];
        }
        float loss = 0;
        for (int64_t e = 0; e < E; e++) {
            counts[e] *= static_cast<float>(E) / static_cast<float>(K * T);
            loss += counts[e] * shares[e] / static_cast<float>(T);
        }
        losses[b] = loss;
        if (!grad) return;
        const float part = 1.0f / static_cast<float>(B * T);
        for (int64_t t = 0; t < T; t++) {
            const float *score = scores + (b * T + t) * E;
            float along = 0;
            for (int64_t e = 0; e < E; e++) along += counts[e] * score[e];
            along /= sums[t];
            for (int64_t e = 0; e < E; e++)
                grad[(b * T + t) * E + e] = (counts[e] - along) * part / sums[t];
        }
    });
}

bool sort_pairs(const int64_t *experts, int64_t P, int64_t E, bool filled, int64_t *place,
                int64_t *pair, int64_t *starts) {
    std::fill_n(starts, E + 1, 0);
    for (int64_t p = 0; p < P; p++) {
        if (experts[p] < 0 || experts[p] >= E) return false;
        starts[experts[p] + 1]++;
    }
    std::vector<int64_t> next(E);
    for (int64_t e = 0; e < E; e++) {
        const int64_t begin = next[e] = starts[e], count = starts[e + 1];
        starts[e + 1] = begin + (filled ? rounded_up(count) : count);
        std::fill(pair + begin + count, pair + starts[e + 1], -1);
    }
    for (int64_t p = 0; p < P; p++) {
        const int64_t row = next[experts[p]]++;
        place[p] = row;
        pair[row] = p;
    }
    return true;
}
