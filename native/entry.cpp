// The C interface, and which instruction set answers it.
#include "amx_attention.h"
#include "amx_training_attention.h"
#include "amx_training_head.h"
#include "amx_training_linear.h"
#include "amx_training_mlp.h"
#include "kernels.h"
#include "small.h"
#include "threads.h"

namespace {

// As the callers number them; null where this processor cannot.
const Kernels *of_number(int isa) {
    switch (isa) {
        case 1: return portable_kernels();
        case 2: return avx2_kernels();
        case 3: return avx512_kernels();
        case 4: return neon_kernels();
        case 5: return amx_kernels();
    }
    for (const int better : {5, 3, 2, 4})
        if (const Kernels *kernels = of_number(better)) return kernels;
    return portable_kernels();
}

const Kernels *kernels_of(int isa) {
    static const Kernels *const known[6] = {of_number(0), of_number(1), of_number(2),
                                            of_number(3), of_number(4), of_number(5)};
    return isa >= 0 && isa < 6 ? known[isa] : nullptr;
}

const Between *between_of(int isa) { return kernels_of(isa)->between; }

}  // namespace

extern "C" {

// isa: 0 the best of this processor, 1 portable, 2 AVX2, 3 AVX-512, 4 NEON, 5 AVX-512 and AMX.
// "" where this processor has it not: nothing else may then be called with it.
const char *qiusuo_instructions(int isa) {
    const Kernels *kernels = kernels_of(isa);
    return kernels ? kernels->name : "";
}

// GOMP_parallel of the OpenMP whose threads are to do the work; null for threads of our own.
void qiusuo_use_threads(void *gomp_parallel) { use_threads_of(gomp_parallel); }

// out [M, H, O] = x [M, H, I] · weightᵀ + bias [H, O], each of H heads with its own weight [O, I].
void qiusuo_linear(int isa, int bits, const void *x, int x_kind, const void *codes,
                   const void *scales, const float *bias, void *out, int64_t M, int64_t H,
                   int64_t O, int64_t I) {
    kernels_of(isa)->linear(bits, {x, x_kind, static_cast<const uint8_t *>(codes),
                                   static_cast<const uint16_t *>(scales), bias, out, M, H, O, I});
}

// out [M, D] = the sum over a token's K experts of weight · down(silu(gate x) · up x).
void qiusuo_experts(int isa, int bits, const void *x, int x_kind, const int64_t *indices,
                    const float *weights, const void *gate_up_codes, const void *gate_up_scales,
                    const void *down_codes, const void *down_scales, void *out, int64_t M,
                    int64_t K, int64_t E, int64_t D, int64_t F) {
    kernels_of(isa)->experts(
        bits, {x, x_kind, indices, weights, static_cast<const uint8_t *>(gate_up_codes),
               static_cast<const uint16_t *>(gate_up_scales),
               static_cast<const uint8_t *>(down_codes),
               static_cast<const uint16_t *>(down_scales), out, M, K, E, D, F});
}

// out [rows, I] in bfloat16: the numbers that codes and scales mean.
void qiusuo_dequantize(int isa, int bits, const void *codes, const void *scales, void *out,
                       int64_t rows, int64_t I) {
    kernels_of(isa)->dequantize(
        bits, {nullptr, 1, static_cast<uint8_t *>(const_cast<void *>(codes)),
               static_cast<uint16_t *>(const_cast<void *>(scales)), static_cast<uint16_t *>(out),
               rows, I, nullptr});
}

// Codes and scales of rows [rows, I], which must be finite. importance [I], or null: how much each
// column's squared error counts, in 4 bits.
void qiusuo_quantize(int isa, int bits, const void *from, int kind, const float *importance,
                     void *codes, void *scales, int64_t rows, int64_t I) {
    kernels_of(isa)->quantize(bits, {from, kind, static_cast<uint8_t *>(codes),
                                     static_cast<uint16_t *>(scales), nullptr, rows, I, importance});
}

// Rows of numbers [N, rounded + exact] into rows slots[n] of the cache, `width` bytes each.
void qiusuo_keep_rows(int isa, const void *numbers, int kind, void *entries, const int64_t *slots,
                      int64_t N, int64_t rounded, int64_t exact, int64_t width) {
    kernels_of(isa)->keep_rows({const_cast<void *>(numbers), kind, static_cast<uint8_t *>(entries),
                                slots, N, rounded, exact, width});
}

// The numbers that N rows of the cache mean.
void qiusuo_unpack_rows(int isa, const void *entries, void *numbers, int kind, int64_t N,
                        int64_t rounded, int64_t exact, int64_t width) {
    kernels_of(isa)->unpack_rows(
        {numbers, kind, static_cast<uint8_t *>(const_cast<void *>(entries)), nullptr, N, rounded,
         exact, width});
}

// Whether there is a kernel for latent attention on pages of such rows, for this instruction set.
int qiusuo_walks_pages(int isa, int64_t width, int64_t latent, int64_t page_tokens) {
    return kernels_of(isa) == amx_kernels() && amx_attention_takes(width, latent, page_tokens);
}

// Absorbed MLA in bfloat16: out [N, H, C] of queries [N, H, E]; query n sees the first lengths[n]
// rows of the pages tables[n][...], each [page_tokens, E] of `entries`: bfloat16 (bits 16) or int8
// as kept by qiusuo_keep_rows with C numbers rounded (bits 8).
void qiusuo_latent_attention(const void *queries, const void *entries, int bits,
                             const int64_t *tables, int64_t table_width, const int64_t *lengths,
                             void *out, int64_t N, int64_t H, int64_t E, int64_t C,
                             int64_t page_tokens, float scale) {
    amx_attention(static_cast<const uint16_t *>(queries), entries, bits, tables, table_width,
                  lengths, static_cast<uint16_t *>(out), N, H, E, C, page_tokens, scale);
}

// Softmax attention of many queries in bfloat16, and its gradients; amx_training_attention.h. Only
// where the instruction set is 5.
void qiusuo_attend(const View *q, const View *k, const View *v, const View *mask, const View *out,
                   float *sums, int carried, int64_t B, int64_t H, int64_t K, int64_t T, int64_t S,
                   int64_t E, int64_t V, float scale) {
    amx_attend({*q, *k, *v, mask, B, H, K, T, S, E, V, scale}, *out, sums, carried != 0);
}

void qiusuo_attend_backward(const View *q, const View *k, const View *v, const View *mask,
                            const View *out, const float *sums, const View *grad_out,
                            const View *grad_q, const View *grad_k, const View *grad_v, int64_t B,
                            int64_t H, int64_t K, int64_t T, int64_t S, int64_t E, int64_t V,
                            float scale) {
    amx_attend_backward({*q, *k, *v, mask, B, H, K, T, S, E, V, scale}, *out, sums, *grad_out,
                        *grad_q, *grad_k, *grad_v);
}

// The head's cross-entropy; amx_training_head.h. Only where the instruction set is 5.
void qiusuo_training_head(const TrainingHead *call, float *nats, float *sums, void *grad_x) {
    amx_training_head(*call, nats, sums, static_cast<uint16_t *>(grad_x));
}

void qiusuo_training_head_backward(const TrainingHead *call, const float *sums, const float *scale,
                                   void *grad_head) {
    amx_training_head_backward(*call, sums, scale, grad_head);
}

// SwiGLU networks that learn; amx_training_mlp.h. Only where the instruction set is 5.
void qiusuo_training_mlp(const TrainingMlp *call, void *y) {
    amx_training_mlp(*call, static_cast<uint16_t *>(y));
}

void qiusuo_training_mlp_backward(const TrainingMlp *call, const void *grad_y, void *grad_rows,
                                  float *grad_weights, void *grad_gate, void *grad_up,
                                  void *grad_down) {
    amx_training_mlp_backward(*call, static_cast<const uint16_t *>(grad_y),
                              static_cast<uint16_t *>(grad_rows), grad_weights, grad_gate, grad_up,
                              grad_down);
}

// Projections that learn; amx_training_linear.h. Likewise.
void qiusuo_training_linear(const TrainingLinear *call) { amx_training_linear(*call); }

void qiusuo_training_linear_backward(const TrainingLinear *call, void *grad_x) {
    amx_training_linear_backward(*call, grad_x);
}

// What stands between the products; between.h.
void qiusuo_swiglu(int isa, int kind, const void *gate, const void *up, int64_t stride,
                   const float *weight, const int64_t *pair, int64_t rows, int64_t F, void *out) {
    between_of(isa)->swiglu({kind, gate, up, stride, weight, pair, rows, F}, out);
}

void qiusuo_swiglu_backward(int isa, int kind, const void *gate, const void *up, int64_t stride,
                            const float *weight, const int64_t *pair, int64_t rows, int64_t F,
                            const void *grad, void *grad_gate, void *grad_up, float *grad_weight,
                            void *out) {
    between_of(isa)->swiglu_backward({kind, gate, up, stride, weight, pair, rows, F}, grad,
                                     grad_gate, grad_up, grad_weight, out);
}

void qiusuo_gather(int isa, const void *x, int x_kind, const int64_t *pair, int64_t K, void *out,
                   int out_kind, int64_t rows, int64_t D) {
    between_of(isa)->gather(x, x_kind, pair, K, out, out_kind, rows, D);
}

void qiusuo_sum_choices(int isa, const void *y, int kind, const int64_t *place, int64_t K,
                        void *out, int64_t M, int64_t D) {
    between_of(isa)->sum_choices(y, kind, place, K, out, M, D);
}

void qiusuo_rms_norm(int isa, const void *x, int x_kind, int64_t stride, const void *weight,
                     int weight_kind, void *out, int out_kind, float *scale, int64_t rows,
                     int64_t D, float eps) {
    between_of(isa)->rms_norm(x, x_kind, stride, weight, weight_kind, out, out_kind, scale, rows, D,
                              eps);
}

void qiusuo_add_rms_norm(int isa, const void *x, int x_kind, int64_t stride, const void *added,
                         int added_kind, int64_t added_stride, const void *weight, int weight_kind,
                         void *sum, void *out, int out_kind, float *scale, int64_t rows, int64_t D,
                         float eps) {
    between_of(isa)->add_rms_norm(x, x_kind, stride, added, added_kind, added_stride, weight,
                                  weight_kind, sum, out, out_kind, scale, rows, D, eps);
}

void qiusuo_rms_norm_backward(int isa, const void *grad, int grad_kind, const void *x, int x_kind,
                              int64_t stride, const void *weight, int weight_kind,
                              const float *scale, const void *past, void *grad_x,
                              void *grad_rounded, float *grad_weight, int64_t rows, int64_t D) {
    between_of(isa)->rms_norm_backward(grad, grad_kind, x, x_kind, stride, weight, weight_kind,
                                       scale, past, grad_x, grad_rounded, grad_weight, rows, D);
}

void qiusuo_rotate(int isa, const void *x, int kind, const void *turns, int64_t turned, int halves,
                   int back, void *out, int64_t rows, int64_t heads, int64_t R, int64_t row_stride,
                   int64_t stride) {
    between_of(isa)->rotate(x, kind, static_cast<const float *>(turns), turned, halves != 0,
                            back != 0, out, rows, heads, R, row_stride, stride);
}

void qiusuo_cross_entropy(int isa, void *logits, int kind, const int64_t *labels, float *nats,
                          int64_t rows, int64_t W) {
    between_of(isa)->cross_entropy(logits, kind, labels, nats, rows, W);
}

void qiusuo_choose_experts(const float *logits, const float *bias, const int64_t *replayed,
                           int64_t experts, int64_t groups, int64_t kept_groups, int64_t per_token,
                           int sigmoid, int normalized, float scaling, float *scores,
                           int64_t *indices, float *weights, int64_t M) {
    choose_experts(logits, bias, replayed,
                   {experts, groups, kept_groups, per_token, sigmoid != 0, normalized != 0, scaling},
                   scores, indices, weights, M);
}

void qiusuo_choose_experts_backward(const float *scores, const int64_t *indices, int64_t experts,
                                    int64_t per_token, int sigmoid, int normalized, float scaling,
                                    const float *grad_scores, const float *grad_weights,
                                    float *grad_logits, int64_t M) {
    choose_experts_backward(scores, indices,
                            {experts, 1, 1, per_token, sigmoid != 0, normalized != 0, scaling},
                            grad_scores, grad_weights, grad_logits, M);
}

void qiusuo_balance(const float *scores, int64_t B, int64_t T, int64_t E, int64_t K, float *losses,
                    float *grad) {
    balance(scores, B, T, E, K, losses, grad);
}

int qiusuo_sort_pairs(const int64_t *experts, int64_t P, int64_t E, int filled, int64_t *place,
                      int64_t *pair, int64_t *starts) {
    return sort_pairs(experts, P, E, filled != 0, place, pair, starts);
}
}
