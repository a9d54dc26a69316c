// The loops of between.h, included by each instruction set's file and made wide by the compiler:
// sums run in lanes of a fixed number, so that their order is the same everywhere.
#pragma once
#include "between.h"
#include "numbers.h"
#include "threads.h"

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t CHUNK_OF_ROW = 256;  // numbers worked on at a time, in the nearest cache
constexpr int64_t SHARE = 1 << 14;  // numbers that a thread takes at a time

template <class T> inline T narrow(float value) { return narrowed(value, T()); }

template <class T> const T *row_of(const void *rows, int64_t at) {
    return static_cast<const T *>(rows) + at;
}
template <class T> T *row_of(void *rows, int64_t at) { return static_cast<T *>(rows) + at; }

// task(row) for all rows, several at a time; many of them by several threads.
template <class Task> void for_rows(int64_t rows, int64_t numbers, Task task) {
    const int64_t together = numbers < SHARE ? SHARE / (numbers ? numbers : 1) : 1;
    auto some = [&](int64_t share) {
        const int64_t last = (share + 1) * together < rows ? (share + 1) * together : rows;
        for (int64_t row = share * together; row < last; row++) task(row);
    };
    parallel((rows + together - 1) / together, rows * numbers * 2, some);
}

inline float total(const float *lanes) {
    float sums[LANES];
    for (int64_t lane = 0; lane < LANES; lane++) sums[lane] = lanes[lane];
    for (int64_t width = LANES / 2; width; width /= 2)
        for (int64_t lane = 0; lane < width; lane++) sums[lane] += sums[lane + width];
    return sums[0];
}

inline void add_to_lanes(const float *numbers, int64_t count, float *lanes) {
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES)
        for (int64_t lane = 0; lane < LANES; lane++) lanes[lane] += numbers[at + lane];
    for (int64_t lane = 0; at + lane < count; lane++) lanes[lane] += numbers[at + lane];
}

// e^x within 2 units of the last place, 0 below -87 (Cephes' polynomial); no call, so that a loop
// of them becomes wide.
inline float exponential(float x) {
    const float kept = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float moved = kept * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to an integer
    const float whole = moved - 12582912.0f;
    const float rest = kept - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const float power = number_of((bits_of(moved) + 127u - 0x4b400000u) << 23);
    return x < -87.0f ? 0.0f : sum * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline float weight_of(const Swiglu &call, int64_t row) {
    if (!call.weight) return 1.0f;
    if (!call.pair) return call.weight[row];
    return call.pair[row] < 0 ? 0.0f : call.weight[call.pair[row]];
}

template <class T> void swiglu_of(const Swiglu &call, void *out) {
    const int64_t F = call.F;
    for_rows(call.rows, 2 * F, [&](int64_t row) {
        const T *__restrict gate = row_of<T>(call.gate, row * call.stride);
        const T *__restrict up = row_of<T>(call.up, row * call.stride);
        T *__restrict to = row_of<T>(out, row * F);
        const float weight = weight_of(call, row);
        for (int64_t f = 0; f < F; f++) {
            const float g = widened(gate[f]);
            to[f] = narrow<T>(g * sigmoid(g) * widened(up[f]) * weight);
        }
    });
}

// `count` numbers of a row, of which `pulls` are their shares of the weight's gradient.
template <class T>
inline void swiglu_slopes(float weight, const T *__restrict gate, const T *__restrict up,
                          const T *__restrict toward, T *__restrict grad_gate,
                          T *__restrict grad_up, T *__restrict out, float *__restrict pulls,
                          int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const float g = widened(gate[i]), u = widened(up[i]), s = sigmoid(g), silu = g * s;
        const float grad = widened(toward[i]), pulled = grad * weight, act = silu * u;
        grad_up[i] = narrow<T>(pulled * silu);
        grad_gate[i] = narrow<T>(pulled * u * (s + silu * (1.0f - s)));
        out[i] = narrow<T>(act * weight);
        pulls[i] = grad * act;
    }
}

template <class T>
void swiglu_backward_of(const Swiglu &call, const void *grad, void *grad_gate, void *grad_up,
                        float *grad_weight, void *out) {
    const int64_t F = call.F;
    for_rows(call.rows, 4 * F, [&](int64_t row) {
        const int64_t begin = row * call.stride;
        const float weight = weight_of(call, row);
        float lanes[LANES] = {}, pulls[CHUNK_OF_ROW];
        T unused[CHUNK_OF_ROW];
        for (int64_t f = 0; f < F; f += CHUNK_OF_ROW) {
            const int64_t count = F - f < CHUNK_OF_ROW ? F - f : CHUNK_OF_ROW;
            swiglu_slopes(weight, row_of<T>(call.gate, begin + f), row_of<T>(call.up, begin + f),
                          row_of<T>(grad, row * F + f), row_of<T>(grad_gate, begin + f),
                          row_of<T>(grad_up, begin + f), out ? row_of<T>(out, row * F + f) : unused,
                          pulls, count);
            if (grad_weight) add_to_lanes(pulls, count, lanes);
        }
        if (!grad_weight) return;
        if (!call.pair)
            grad_weight[row] = total(lanes);
        else if (call.pair[row] >= 0)
            grad_weight[call.pair[row]] = total(lanes);
    });
}

void swiglu(const Swiglu &call, void *out) {
    (call.kind ? swiglu_of<bf16> : swiglu_of<float>)(call, out);
}

void swiglu_backward(const Swiglu &call, const void *grad, void *grad_gate, void *grad_up,
                     float *grad_weight, void *out) {
    (call.kind ? swiglu_backward_of<bf16> : swiglu_backward_of<float>)(call, grad, grad_gate,
                                                                       grad_up, grad_weight, out);
}

template <class X, class Y>
void gather_of(const void *x, const int64_t *pair, int64_t K, void *out, int64_t rows, int64_t D) {
    for_rows(rows, D, [&](int64_t row) {
        Y *__restrict to = row_of<Y>(out, row * D);
        if (pair[row] < 0) {
            std::memset(static_cast<void *>(to), 0, D * sizeof(Y));
            return;
        }
        const X *__restrict from = row_of<X>(x, pair[row] / K * D);
        if (sizeof(X) == sizeof(Y))
            std::memcpy(static_cast<void *>(to), from, D * sizeof(Y));
        else
            for (int64_t d = 0; d < D; d++) to[d] = narrow<Y>(widened(from[d]));
    });
}

void gather(const void *x, int x_kind, const int64_t *pair, int64_t K, void *out, int out_kind,
            int64_t rows, int64_t D) {
    (x_kind ? out_kind ? gather_of<bf16, bf16> : gather_of<bf16, float>
            : out_kind ? gather_of<float, bf16> : gather_of<float, float>)(x, pair, K, out, rows, D);
}

template <class T>
void sum_choices_of(const void *y, const int64_t *place, int64_t K, void *out, int64_t M,
                    int64_t D) {
    for_rows(M, K * D, [&](int64_t m) {
        T *__restrict to = row_of<T>(out, m * D);
        const int64_t *own = place + m * K;
        constexpr int64_t WIDE = 4 * LANES;
        float sums[WIDE];
        for (int64_t d = 0; d < D; d += WIDE) {
            const int64_t count = D - d < WIDE ? D - d : WIDE;
            for (int64_t i = 0; i < WIDE; i++) sums[i] = 0;
            for (int64_t k = 0; k < K; k++) {
                const T *__restrict from = row_of<T>(y, own[k] * D + d);
                if (count == WIDE)
                    for (int64_t i = 0; i < WIDE; i++) sums[i] += widened(from[i]);
                else
                    for (int64_t i = 0; i < count; i++) sums[i] += widened(from[i]);
            }
            for (int64_t i = 0; i < count; i++) to[d + i] = narrow<T>(sums[i]);
        }
    });
}

void sum_choices(const void *y, int kind, const int64_t *place, int64_t K, void *out, int64_t M,
                 int64_t D) {
    (kind ? sum_choices_of<bf16> : sum_choices_of<float>)(y, place, K, out, M, D);
}

template <class T>
void cross_entropy_of(void *logits, const int64_t *labels, float *nats, int64_t rows, int64_t W) {
    for_rows(rows, W, [&](int64_t row) {
        T *__restrict own = row_of<T>(logits, row * W);
        const int64_t label = labels[row];
        nats[row] = 0;
        if (label < 0) {
            std::memset(static_cast<void *>(own), 0, W * sizeof(T));
            return;
        }
        float most[LANES], lanes[LANES] = {};
        for (int64_t lane = 0; lane < LANES; lane++) most[lane] = widened(own[0]);
        const int64_t whole = W / LANES * LANES;
        for (int64_t at = 0; at < whole; at += LANES)
            for (int64_t lane = 0; lane < LANES; lane++) {
                const float value = widened(own[at + lane]);
                most[lane] = most[lane] < value ? value : most[lane];
            }
        for (int64_t at = whole; at < W; at++)
            most[0] = most[0] < widened(own[at]) ? widened(own[at]) : most[0];
        for (int64_t lane = 1; lane < LANES; lane++)
            most[0] = most[0] < most[lane] ? most[lane] : most[0];
        const float top = most[0], picked = widened(own[label]);
        float *__restrict powers = reinterpret_cast<float *>(kept_room(W * sizeof(float)));
        for (int64_t at = 0; at < W; at++) powers[at] = exponential(widened(own[at]) - top);
        add_to_lanes(powers, W, lanes);
        const float sum = total(lanes), share = 1.0f / sum;
        for (int64_t at = 0; at < W; at++) own[at] = narrow<T>(powers[at] * share);
        own[label] = narrow<T>(powers[label] * share - 1.0f);
        nats[row] = std::log(sum) + top - picked;
    });
}

void cross_entropy(void *logits, int kind, const int64_t *labels, float *nats, int64_t rows,
                   int64_t W) {
    (kind ? cross_entropy_of<bf16> : cross_entropy_of<float>)(logits, labels, nats, rows, W);
}

}  // namespace
#include "between_norm.h"

namespace {

constexpr Between BETWEEN = {swiglu,       swiglu_backward,   gather, sum_choices,  rms_norm,
                             add_rms_norm, rms_norm_backward, rotate, cross_entropy};

}  // namespace
