// Softmax attention of many queries, and its gradients, in bfloat16 on AMX; see the .cpp files. Only
// where amx::usable() has been asked and said yes.
#pragma once
#include <cstdint>

// A tensor [batch, heads, rows, width] in memory: distances in elements, 1 between those of a row.
struct View {
    void *at;
    int64_t batch, head, row;
};

// H query heads look at K key heads, H/K in a row at the same one. `mask` (bytes [batch, T, S], not 0
// where a query may look) may be null: causal, with the last query on the last key. `scale` > 0.
struct Attention {
    View q, k, v;
    const View *mask;
    int64_t B, H, K, T, S, E, V;
    float scale;

    int64_t tasks_bytes() const { return 2 * B * H * (T + S) * (E + V); }
};

// out [B, H, T, V] and the base-2 logarithms of the softmaxes' sums [B, H, T]; zeros and −∞ for a
// query that sees nothing. out: bfloat16. Or, if `carried`, float32: then out and sums are what
// other keys gave, and these are joined to it.
void amx_attend(const Attention &call, const View &out, float *sums, bool carried);

// Gradients of q, k and v in bfloat16, of shapes as these, from that of out. `out` and `sums`: what
// amx_attend gave. The same for any number of threads.
void amx_attend_backward(const Attention &call, const View &out, const float *sums,
                         const View &grad_out, const View &grad_q, const View &grad_k,
                         const View &grad_v);
