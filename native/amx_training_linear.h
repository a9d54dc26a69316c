// Projections as training needs them, and their gradients, on AMX: several layers y = x · Wᵀ of the
// same rows, whose numbers are read and laid out once for all. Only where amx::usable() has been asked
// and said yes. Sums are float32; results do not depend on the number of threads.
#pragma once
#include <cstdint>

struct Projection {
    const void *weight;  // [O, D]
    int64_t O;
    uint16_t *y;         // [M, O] in bfloat16: made going forward, its gradient going back
    void *grad_weight;   // [O, D] of the weight's kind, going back
};

struct TrainingLinear {
    const void *x;  // [M, D]
    int x_kind, weight_kind;
    int64_t M, D, count;
    const Projection *layers;
};

void amx_training_linear(const TrainingLinear &call);

// grad_x [M, D] of x's kind is the sum over all layers; null where nobody wants it.
void amx_training_linear_backward(const TrainingLinear &call, void *grad_x);
