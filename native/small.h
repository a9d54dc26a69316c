// Which experts a token goes to, and how evenly; see small.cpp.
#pragma once
#include <cstdint>

struct Choice {
    int64_t experts, groups, kept_groups, per_token;
    bool sigmoid, normalized;
    float scaling;
};

// DeepSeek's router after its product: scores [M, E] of logits [M, E] (sigmoid or softmax), the
// per_token experts with the largest scores + bias among the best groups, and their weights.
// Where a row of `replayed` [M, K] (or null) does not begin with -1, its experts instead.
void choose_experts(const float *logits, const float *bias, const int64_t *replayed,
                    const Choice &choice, float *scores, int64_t *indices, float *weights,
                    int64_t M);

// The logits' gradient [M, E] from that of scores and of weights; either may be null.
void choose_experts_backward(const float *scores, const int64_t *indices, const Choice &choice,
                             const float *grad_scores, const float *grad_weights,
                             float *grad_logits, int64_t M);

// How evenly scores [B, T, E] use the experts, K of them a token: a loss for each sequence, and the
// gradient of their mean, or null.
void balance(const float *scores, int64_t B, int64_t T, int64_t E, int64_t K, float *losses,
             float *grad);

// Pairs (token, choice) sorted by expert, equal ones as they came: row place[p] is pair p, pair[row]
// the other way round. Expert e has the rows starts[e] .. starts[e + 1] - 1. `filled`: segments are
// rounded up by rows of -1, and `pair` has room for P + P / 8 + E. False where a number is none of the
// E experts'.
bool sort_pairs(const int64_t *experts, int64_t P, int64_t E, bool filled, int64_t *place,
                int64_t *pair, int64_t *starts);
