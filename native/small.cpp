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

}  // namespace

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

bool sort_pairs(const int64_t *experts, int64_t P, int64_t E, int64_t *place, int64_t *pair,
                int64_t *starts) {
    std::fill_n(starts, E + 1, 0);
    for (int64_t p = 0; p < P; p++) {
        if (experts[p] < 0 || experts[p] >= E) return false;
        starts[experts[p] + 1]++;
    }
    std::vector<int64_t> next(E);
    for (int64_t e = 0; e < E; e++) {
        const int64_t begin = next[e] = starts[e], count = starts[e + 1];
        starts[e + 1] = begin + rounded_up(count);
        std::fill(pair + begin + count, pair + starts[e + 1], -1);
    }
    for (int64_t p = 0; p < P; p++) {
        const int64_t row = next[experts[p]]++;
        place[p] = row;
        pair[row] = p;
    }
    return true;
}
