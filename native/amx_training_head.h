// The head's cross-entropy and its gradients on AMX; see the .cpp file. Only where amx::usable() has
// been asked and said yes. Sums are float32; results do not depend on the number of threads.
#pragma once
#include <cstdint>

// Logits x · headᵀ of M rows, and which of the W columns is each row's label; less than 0 for none.
struct TrainingHead {
    const void *x;  // rows of D
    int x_kind;
    const void *head;  // [W, D]
    int head_kind;
    const int64_t *labels;
    int64_t M, D, W;
};

// −log of each label's probability [M], in nats; 0 without a label. `sums` [M]: the base-2 logarithm of
// each softmax's sum. grad_x [M, D] in bfloat16, if not null: the gradient of each row's own nats;
// zeros without a label.
void amx_training_head(const TrainingHead &call, float *nats, float *sums, uint16_t *grad_x);

// The gradient of Σ scale · nats for the head [W, D], of its kind; `sums` as found above.
void amx_training_head_backward(const TrainingHead &call, const float *sums, const float *scale,
                                void *grad_head);
