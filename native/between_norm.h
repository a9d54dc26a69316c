// RMSNorm, also of a sum, and the turning of pairs, forward and backward; a part of between_loops.h.
#pragma once

namespace {

template <class T> inline float squares(const T *x, int64_t D) {
    float lanes[LANES] = {};
    int64_t at = 0;
    for (; at + LANES <= D; at += LANES)
        for (int64_t lane = 0; lane < LANES; lane++)
            lanes[lane] += widened(x[at + lane]) * widened(x[at + lane]);
    for (; at < D; at++) lanes[at % LANES] += widened(x[at]) * widened(x[at]);
    return total(lanes);
}

// Rows of sums, in float32 where one of the two is.
struct Sum {
    void (*row_of)(const Sum &, int64_t row, int64_t D);
    const void *x, *added;
    int64_t x_stride, added_stride;
    void *sum;
};

template <class X, class A, class S> void add_row(const Sum &call, int64_t row, int64_t D) {
    const X *__restrict x = row_of<X>(call.x, row * call.x_stride);
    const A *__restrict added = row_of<A>(call.added, row * call.added_stride);
    S *__restrict to = row_of<S>(call.sum, row * D);
    for (int64_t d = 0; d < D; d++) to[d] = narrow<S>(widened(x[d]) + widened(added[d]));
}

template <class X, class W, class Y> struct Norm {
    // Where x is a sum, each row is added up just before.
    static void forward(const Sum *sum, const void *x, int64_t stride, const void *weight, void *out,
                        float *scale, int64_t rows, int64_t D, float eps) {
        const W *__restrict weights = row_of<W>(weight, 0);
        for_rows(rows, D, [&](int64_t row) {
            if (sum) sum->row_of(*sum, row, D);
            const X *__restrict from = row_of<X>(x, row * stride);
            Y *__restrict to = row_of<Y>(out, row * D);
            const float mean = squares(from, D) / static_cast<float>(D);
            const float own = 1.0f / std::sqrt(mean + eps);
            if (scale) scale[row] = own;
            for (int64_t d = 0; d < D; d++)  // rounded before the weight, as the reference does
                to[d] = narrow<Y>(widened(narrow<X>(widened(from[d]) * own)) * widened(weights[d]));
        });
    }

    // Y is the kind of the gradient that comes in. Every BLOCK rows add up their part of the
    // weight's gradient; then these are added in order.
    static void backward(const void *grad, const void *x, int64_t stride, const void *weight,
                         const float *scale, const void *past, void *grad_x, void *grad_rounded,
                         float *grad_weight, int64_t rows, int64_t D) {
        constexpr int64_t BLOCK_ROWS = 64;
        const W *__restrict weights = row_of<W>(weight, 0);
        const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        float *const parts = reinterpret_cast<float *>(kept_room(blocks * D * sizeof(float)));
        auto add_block = [&](int64_t block) {
            float *__restrict part = parts + block * D;
            for (int64_t d = 0; d < D; d++) part[d] = 0;
            const int64_t end = (block + 1) * BLOCK_ROWS < rows ? (block + 1) * BLOCK_ROWS : rows;
            for (int64_t row = block * BLOCK_ROWS; row < end; row++) {
                const X *__restrict from = row_of<X>(x, row * stride);
                const Y *__restrict toward = row_of<Y>(grad, row * D);
                const X *__restrict around = past ? row_of<X>(past, row * D) : nullptr;
                X *__restrict to = row_of<X>(grad_x, row * D);
                bf16 *__restrict rounded =
                    grad_rounded ? row_of<bf16>(grad_rounded, row * D) : nullptr;
                const float own = scale[row];
                float lanes[LANES] = {};
                int64_t at = 0;
                for (; at + LANES <= D; at += LANES)
                    for (int64_t lane = 0; lane < LANES; lane++) {
                        const float normed = widened(from[at + lane]) * own;
                        const float pull = widened(toward[at + lane]) * normed;
                        part[at + lane] += pull;
                        lanes[lane] += pull * widened(weights[at + lane]);
                    }
                for (; at < D; at++) {
                    const float pull = widened(toward[at]) * widened(from[at]) * own;
                    part[at] += pull;
                    lanes[at % LANES] += pull * widened(weights[at]);
                }
                const float mean = total(lanes) / static_cast<float>(D) * own;
                for (int64_t d = 0; d < D; d++) {
                    const float slope = own * (widened(toward[d]) * widened(weights[d]) -
                                               widened(from[d]) * mean);
                    to[d] = narrow<X>(around ? slope + widened(around[d]) : slope);
                }
                for (int64_t d = 0; rounded && d < D; d++)
                    rounded[d] = narrow<bf16>(widened(to[d]));
            }
        };
        auto add_up = [&](int64_t) {
            for (int64_t d = 0; d < D; d++) grad_weight[d] = 0;
            for (int64_t block = 0; block < blocks; block++)
                for (int64_t d = 0; d < D; d++) grad_weight[d] += parts[block * D + d];
        };
        const Stage stages[] = {stage_of(blocks, add_block), stage_of(1, add_up)};
        run_stages(stages, 2, rows * D * 4);
    }
};

// task(Norm<...>()) of these kinds.
template <class Task> void with_kinds(int x_kind, int weight_kind, int other_kind, Task task) {
    if (x_kind)
        weight_kind ? other_kind ? task(Norm<bf16, bf16, bf16>()) : task(Norm<bf16, bf16, float>())
                    : other_kind ? task(Norm<bf16, float, bf16>()) : task(Norm<bf16, float, float>());
    else
        weight_kind
            ? other_kind ? task(Norm<float, bf16, bf16>()) : task(Norm<float, bf16, float>())
            : other_kind ? task(Norm<float, float, bf16>()) : task(Norm<float, float, float>());
}

void rms_norm(const void *x, int x_kind, int64_t stride, const void *weight, int weight_kind,
              void *out, int out_kind, float *scale, int64_t rows, int64_t D, float eps) {
    with_kinds(x_kind, weight_kind, out_kind, [&](auto norm) {
        norm.forward(nullptr, x, stride, weight, out, scale, rows, D, eps);
    });
}

void add_rms_norm(const void *x, int x_kind, int64_t stride, const void *added, int added_kind,
                  int64_t added_stride, const void *weight, int weight_kind, void *sum, void *out,
                  int out_kind, float *scale, int64_t rows, int64_t D, float eps) {
    const auto add = x_kind ? added_kind ? add_row<bf16, bf16, bf16> : add_row<bf16, float, float>
                            : added_kind ? add_row<float, bf16, float> : add_row<float, float, float>;
    const Sum call = {add, x, added, stride, added_stride, sum};
    with_kinds(x_kind && added_kind, weight_kind, out_kind, [&](auto norm) {
        norm.forward(&call, sum, D, weight, out, scale, rows, D, eps);
    });
}

void rms_norm_backward(const void *grad, int grad_kind, const void *x, int x_kind, int64_t stride,
                       const void *weight, int weight_kind, const float *scale, const void *past,
                       void *grad_x, void *grad_rounded, float *grad_weight, int64_t rows,
                       int64_t D) {
    with_kinds(x_kind, weight_kind, grad_kind, [&](auto norm) {
        norm.backward(grad, x, stride, weight, scale, past, grad_x, grad_rounded, grad_weight, rows,
                      D);
    });
}

template <class T> struct Turn {
    static void pairs(const T *__restrict from, const float *__restrict turn, float sign, int64_t R,
                      T *__restrict to) {
        for (int64_t pair = 0; pair < R / 2; pair++) {
            const float a = widened(from[2 * pair]), b = widened(from[2 * pair + 1]);
            const float real = turn[2 * pair], imaginary = sign * turn[2 * pair + 1];
            to[2 * pair] = narrow<T>(a * real - b * imaginary);
            to[2 * pair + 1] = narrow<T>(a * imaginary + b * real);
        }
    }

    // The halves apart, each with a name of its own: only so the compiler makes the loop wide.
    static void halves(const T *__restrict first, const T *__restrict second,
                       const float *__restrict real, const float *__restrict imaginary, int64_t half,
                       T *__restrict to_first, T *__restrict to_second) {
        for (int64_t i = 0; i < half; i++) {
            const float a = widened(first[i]), b = widened(second[i]);
            to_first[i] = narrow<T>(a * real[i] - b * imaginary[i]);
            to_second[i] = narrow<T>(a * imaginary[i] + b * real[i]);
        }
    }
};

template <class T, bool HALVES>
void rotate_of(const void *x, const float *turns, int64_t turned, float sign, void *out,
               int64_t rows, int64_t heads, int64_t R, int64_t row_stride, int64_t stride) {
    for_rows(rows, heads * R, [&](int64_t row) {
        const float *const turn = turns + row % turned * R;
        const int64_t half = R / 2;
        float *const real = reinterpret_cast<float *>(kept_room(R * sizeof(float)));
        for (int64_t i = 0; HALVES && i < half; i++) {
            real[i] = turn[2 * i];
            real[half + i] = sign * turn[2 * i + 1];
        }
        for (int64_t head = 0; head < heads; head++) {
            const T *const from = row_of<T>(x, row * row_stride + head * stride);
            T *const to = row_of<T>(out, (row * heads + head) * R);
            if (HALVES) Turn<T>::halves(from, from + half, real, real + half, half, to, to + half);
            else Turn<T>::pairs(from, turn, sign, R, to);
        }
    });
}

void rotate(const void *x, int kind, const float *turns, int64_t turned, bool halves, bool back,
            void *out, int64_t rows, int64_t heads, int64_t R, int64_t row_stride, int64_t stride) {
    const auto by_kind = halves ? (kind ? rotate_of<bf16, true> : rotate_of<float, true>)
                                : (kind ? rotate_of<bf16, false> : rotate_of<float, false>);
    by_kind(x, turns, turned, back ? -1.0f : 1.0f, out, rows, heads, R, row_stride, stride);
}

}  // namespace
