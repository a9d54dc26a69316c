// What a decoding step does between its products; see small.cpp.
#pragma once
#include <cstdint>

struct Choice {
    int64_t experts, groups, kept_groups, per_token;
    bool sigmoid, normalized;
    float scaling;
};

// DeepSeek's router after its product: scores [M, E] of logits [M, E] (sigmoid or softmax), the
// per_token experts with the largest scores + bias among the best groups, and their weights.
void choose_experts(const float *logits, const float *bias, const Choice &choice, float *scores,
                    int64_t *indices, float *weights, int64_t M);

// Pairs (token, choice) sorted by expert, equal ones as they came: row place[p] is pair p, pair[row]
// the other way round, -1 in the rows that a segment is rounded up by. Expert e has the rows
// starts[e] .. starts[e + 1] - 1; `pair` has room for P + P / 8 + E. False where a number is none of
// the E experts'.
bool sort_pairs(const int64_t *experts, int64_t P, int64_t E, int64_t *place, int64_t *pair,
                int64_t *starts);
