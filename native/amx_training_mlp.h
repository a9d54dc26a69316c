// SwiGLU networks as training needs them, and their gradients, on AMX; see the .cpp files. Only where amx::usable() has been asked and said yes. Sums are float32; results do not depend
// on the number of threads.
#pragma once
#include <cstdint>

// Rows of E MLPs: down(silu(gate x) · up x · weight). The rows starts[e] ... starts[e + 1] - 1 are
// expert e's; row r is row pair[r] / K of x and weighs weights[pair[r]], a pair of -1 is a row of
// zeros. With pair null, row r is row r and weighs 1.
struct TrainingMlp {
    const void *x;  // rows of D
    int x_kind;
    const void *gate, *up, *down;  // [F, D], [F, D], [D, F] of expert 0
    int weight_kind;
    int64_t gate_stride, down_stride;  // from an expert's to the next's, in numbers
    const int64_t *starts;             // [E + 1]
    const int64_t *pair;
    const float *weights;
    int64_t K, E, D, F;
};

// y [R, D] in bfloat16.
void amx_training_mlp(const TrainingMlp &call, uint16_t *y);

// From the gradient of y, in bfloat16, whose rows are found as those of x are: of the rows [R, D] of
// x, in bfloat16; of `weights` where that is not null (entries of pairs that are rows); and of gate,
// up and down, laid out as they are and of their kind. An expert without rows gets none.
void amx_training_mlp_backward(const TrainingMlp &call, const uint16_t *grad_y, uint16_t *grad_rows,
                               float *grad_weights, void *grad_gate, void *grad_up, void *grad_down);
