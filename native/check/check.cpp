// Every kernel of the C interface against plain loops in double, with nothing of Python or PyTorch:
// what is built with sanitizers, and what runs under qemu for another processor.
//
// A weight's numbers are known exactly, and activations are such that int8 holds them exactly, so
// the allowance is float32's rounding. Only the hidden activations of an expert are rounded: there
// the allowance is six standard deviations of that rounding.
#include <thread>

#include "compare.h"
#include "learning.h"
#include "learning_head.h"
#include "learning_linear.h"
#include "numbers.h"

extern "C" {
void qiusuo_linear(int isa, int bits, const void *x, int kind, const void *codes, const void *scales,
                   const float *bias, void *out, int64_t M, int64_t H, int64_t O, int64_t I);
void qiusuo_experts(int isa, int bits, const void *x, int kind, const int64_t *indices,
                    const float *weights, const void *gate_up, const void *gate_up_scales,
                    const void *down, const void *down_scales, void *out, int64_t M, int64_t K,
                    int64_t E, int64_t D, int64_t F);
void qiusuo_dequantize(int isa, int bits, const void *codes, const void *scales, void *out,
                       int64_t rows, int64_t I);
void qiusuo_quantize(int isa, int bits, const void *rows, int kind, const float *importance,
                     void *codes, void *scales, int64_t count, int64_t I);
int qiusuo_walks_pages(int isa, int64_t width, int64_t latent, int64_t page_tokens);
void qiusuo_keep_rows(int isa, const void *numbers, int kind, void *entries, const int64_t *slots,
                      int64_t N, int64_t rounded, int64_t exact, int64_t width);
void qiusuo_unpack_rows(int isa, const void *entries, void *numbers, int kind, int64_t N,
                        int64_t rounded, int64_t exact, int64_t width);
void qiusuo_latent_attention(const void *queries, const void *entries, int bits,
                             const int64_t *tables, int64_t table_width, const int64_t *lengths,
                             void *out, int64_t N, int64_t H, int64_t E, int64_t C,
                             int64_t page_tokens, float scale);
struct View {
    void *at;
    int64_t batch, head, row;
};
void qiusuo_attend(const View *q, const View *k, const View *v, const View *mask, const View *out,
                   float *sums, int carried, int64_t B, int64_t H, int64_t K, int64_t T, int64_t S,
                   int64_t E, int64_t V, float scale);
void qiusuo_attend_backward(const View *q, const View *k, const View *v, const View *mask,
                            const View *out, const float *sums, const View *grad_out,
                            const View *grad_q, const View *grad_k, const View *grad_v, int64_t B,
                            int64_t H, int64_t K, int64_t T, int64_t S, int64_t E, int64_t V,
                            float scale);
}

namespace {

double rounding_of(int kind, double value) { return kind ? std::fabs(value) / 256 : 0; }

// AMX makes the weights bfloat16 when there are many rows of bfloat16.
bool may_use_tiles(int isa, int kind) { return isa == 5 && kind == 1; }
constexpr double ROUNDED_WEIGHT = 1.0 / 256;  // the step of a bfloat16, at most

void check_linear(Draws &draw, int isa, int bits, int kind, int64_t M, int64_t O, int64_t I) {
    const Rows x(draw, M, I);
    const Weight weight(draw, bits, O, I);
    Buffer<float> bias(O);
    for (int64_t o = 0; o < O; ++o) bias[o] = draw.between(-99, 99) / 64.0f;
    const bool biased = draw.below(2);
    const auto run = [&](const void *rows, void *out, int64_t count) {
        qiusuo_linear(isa, bits, rows, kind, weight.codes.get(), weight.scales_at(),
                      biased ? bias.get() : nullptr, out, count, 1, O, I);
    };
    const Answer out(kind, M * O), alone(kind, O);
    run(x.at(kind), out.at(), M);
    for (int64_t m = 0; m < M; ++m) {
        const size_t size = kind ? 2 : 4;
        run(static_cast<const char *>(x.at(kind)) + m * I * size, alone.at(), 1);
        if (!may_use_tiles(isa, kind) &&
            std::memcmp(alone.at(), static_cast<char *>(out.at()) + m * O * size, O * size) != 0)
            compare("a row alone", isa, bits, kind, M, O, I, 1, 0, 0);
        for (int64_t o = 0; o < O; ++o) {
            double sum = biased ? bias[o] : 0, size_of_terms = std::fabs(sum);
            for (int64_t i = 0; i < I; ++i) {
                const double term = weight.meant[o * I + i] * x.f32[m * I + i];
                sum += term, size_of_terms += std::fabs(term);
            }
            compare("linear", isa, bits, kind, M, O, I, out[m * O + o], sum,
                    1e-5 * size_of_terms + rounding_of(kind, sum) +
                        (may_use_tiles(isa, kind) ? ROUNDED_WEIGHT * size_of_terms : 0));
        }
    }
}

// Heads side by side, against each of them alone.
void check_heads(Draws &draw, int isa, int bits, int kind, int64_t M, int64_t H, int64_t O, int64_t I) {
    const Rows x(draw, M * H, I);
    const Weight weight(draw, bits, H * O, I);
    const Answer out(kind, M * H * O), alone(kind, O);
    qiusuo_linear(isa, bits, x.at(kind), kind, weight.codes.get(), weight.scales_at(), nullptr,
                  out.at(), M, H, O, I);
    const size_t size = kind ? 2 : 4;
    const int64_t row_bytes = bits == 16 ? I * 2 : blocks(I) * BLOCK * bits / 8;
    for (int64_t row = 0; row < M * H; ++row) {
        const int64_t h = row % H;
        const uint16_t *scales = static_cast<const uint16_t *>(weight.scales_at());
        qiusuo_linear(isa, bits, static_cast<const char *>(x.at(kind)) + row * I * size, kind,
                      reinterpret_cast<const uint8_t *>(weight.codes.get()) + h * O * row_bytes,
                      scales ? scales + h * O * blocks(I) : nullptr, nullptr, alone.at(), 1, 1, O, I);
        for (int64_t o = 0; o < O; ++o) {
            double size = 0;
            for (int64_t i = 0; i < I; ++i)
                size += std::fabs(weight.meant[(h * O + o) * I + i] * x.f32[row * I + i]);
            compare("heads", isa, bits, kind, row, o, I, out[row * O + o], alone[o],
                    may_use_tiles(isa, kind) ? ROUNDED_WEIGHT * size + 2 * rounding_of(1, alone[o]) : 0);
        }
    }
}

// One expert's answer to one row, and the variance of what rounding its hidden activations does.
void expert_of(const Rows &x, int64_t m, const Weight &gate_up, const Weight &down, int64_t expert,
               int64_t D, int64_t F, double weight, bool tiles, double *sum, double *variance) {
    const double weight_variance = tiles ? ROUNDED_WEIGHT * ROUNDED_WEIGHT / 12 : 0;
    std::vector<double> hidden(F), hidden_variance(F), largest(blocks(F));
    for (int64_t f = 0; f < F; ++f) {
        double gate = 0, up = 0, gate_squares = 0, up_squares = 0;
        for (int64_t d = 0; d < D; ++d) {
            const double g = gate_up.meant[(expert * 2 * F + f) * D + d] * x.f32[m * D + d];
            const double u = gate_up.meant[(expert * 2 * F + F + f) * D + d] * x.f32[m * D + d];
            gate += g, up += u, gate_squares += g * g, up_squares += u * u;
        }
        const double silu = gate / (1 + std::exp(-gate));
        hidden[f] = silu * up;
        hidden_variance[f] = weight_variance * (up * up * 1.21 * gate_squares + silu * silu * up_squares);
        largest[f / BLOCK] = std::max(largest[f / BLOCK], std::fabs(hidden[f]));
    }
    for (int64_t d = 0; d < D; ++d)
        for (int64_t f = 0; f < F; ++f) {
            const double factor = weight * down.meant[(expert * D + d) * F + f];
            sum[d] += factor * hidden[f];
            // Steps of largest/127, and of a bfloat16: a rounding's variance is step²/12.
            const double step = down.bits == 16 ? 0 : largest[f / BLOCK] / 127;
            const double bf16_step = std::fabs(hidden[f]) / 128;
            variance[d] += factor * factor * ((step * step + bf16_step * bf16_step) / 12 +
                                              hidden_variance[f] + weight_variance * hidden[f] * hidden[f]);
        }
}

void check_experts(Draws &draw, int isa, int bits, int kind, int64_t M, int64_t K, int64_t E,
                   int64_t D, int64_t F) {
    const Rows x(draw, M, D);
    const Weight gate_up(draw, bits, E * 2 * F, D), down(draw, bits, E * D, F);
    const bool dense = E == 1 && K == 1;
    Buffer<int64_t> indices(dense ? 0 : M * K);
    Buffer<float> weights(dense ? 0 : M * K);
    for (size_t p = 0; p < indices.size(); ++p) {
        // Each of a token's K experts once; the last expert often, so that loads are unequal.
        const int64_t first = draw.below(2) ? E - 1 : draw.below(static_cast<int>(E));
        indices[p] = p % K ? (indices[p - 1] + 1) % E : first;
        weights[p] = draw.between(1, 99) / 100.0f;
    }
    const Answer out(kind, M * D);
    qiusuo_experts(isa, bits, x.at(kind), kind, dense ? nullptr : indices.get(),
                   dense ? nullptr : weights.get(), gate_up.codes.get(), gate_up.scales_at(),
                   down.codes.get(), down.scales_at(), out.at(), M, K, E, D, F);
    for (int64_t m = 0; m < M; ++m) {
        std::vector<double> sum(D), variance(D);
        for (int64_t k = 0; k < K; ++k)
            expert_of(x, m, gate_up, down, dense ? 0 : indices[m * K + k], D, F,
                      dense ? 1 : weights[m * K + k], may_use_tiles(isa, kind), sum.data(),
                      variance.data());
        for (int64_t d = 0; d < D; ++d)
            compare("experts", isa, bits, kind, M, F, D, out[m * D + d], sum[d],
                    6 * std::sqrt(variance[d]) + 1e-4 * std::fabs(sum[d]) + 1e-6 +
                        rounding_of(kind, sum[d]));
    }
}

void check_dequantize(Draws &draw, int isa, int bits, int64_t rows, int64_t columns) {
    const Weight weight(draw, bits, rows, columns);
    const Answer out(1, rows * columns);
    qiusuo_dequantize(isa, bits, weight.codes.get(), weight.scales.get(), out.at(), rows, columns);
    for (int64_t i = 0; i < rows * columns; ++i) {
        const double expected = from_bf16(to_bf16(static_cast<float>(weight.meant[i])));
        compare("dequantize", isa, bits, 1, rows, 0, columns, out[i], expected, 0);
    }
}

void check_quantize(Draws &draw, int isa, int bits, int kind, int64_t rows, int64_t columns) {
    const Rows x(draw, rows, columns);
    Weight made(draw, bits, rows, columns);
    qiusuo_quantize(isa, bits, x.at(kind), kind, nullptr, made.codes.get(), made.scales.get(), rows,
                    columns);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t b = 0; b < blocks(columns); ++b) {
            const int64_t block = r * blocks(columns) + b;
            const double scale = from_half(made.scales[block]);
            double left = 0, size = 0;
            for (int64_t c = b * BLOCK; c < std::min(columns, (b + 1) * BLOCK); ++c) {
                const double value = x.f32[r * columns + c];
                const double error = made.level(block, c % BLOCK) * scale - value;
                left += error * error, size += value * value;
                if (bits == 8)  // half a step, and what float16 took off the scale
                    compare("quantize", isa, bits, kind, rows, r, columns, error, 0,
                            std::fabs(scale) * 0.51 + std::fabs(value) / 2000);
            }
            // Evenly spread numbers, whose worst block of 32 leaves less than this.
            compare("quantize's error", isa, bits, kind, rows, r, columns, left, 0, 0.03 * size);
        }
}

void check_all(int isa) {
    Draws draw;
    const int64_t counts[] = {1, 2, 3, 4, 5, 7, 8, 9, 17}, outs[] = {1, 2, 7, 16, 33};
    const int64_t columns[] = {1, 31, 32, 33, 64, 100, 128, 160, 224, 256, 321, 1000};
    for (const int bits : {8, 4, 16})
        for (const int kind : {0, 1}) {
            for (const int64_t I : columns)
                for (const int64_t O : outs) check_linear(draw, isa, bits, kind, counts[draw.below(9)], O, I);
            for (const int64_t M : counts) check_linear(draw, isa, bits, kind, M, 70, 192);
            for (const int64_t M : {1, 2, 5, 16, 40})
                for (const int64_t D : {5, 32, 72, 160})
                    check_experts(draw, isa, bits, kind, M, M % 3 + 1, 7, D, D == 72 ? 64 : D - 3);
            check_experts(draw, isa, bits, kind, 3, 1, 1, 96, 40);
            check_experts(draw, isa, bits, kind, 61, 3, 7, 70, 45);  // many for each expert
            for (const int64_t M : {1, 3, 20}) check_heads(draw, isa, bits, kind, M, 5, 37, 100);
            check_linear(draw, isa, bits, kind, 2, 1200, 321);  // enough for several threads
            if (bits == 16) continue;
            check_dequantize(draw, isa, bits, 300, 500);
            check_quantize(draw, isa, bits, kind, 300, 500);
            for (const int64_t I : columns) {
                check_dequantize(draw, isa, bits, draw.between(1, 9), I);
                check_quantize(draw, isa, bits, kind, draw.between(1, 9), I);
            }
        }
}

// Latent attention against its equation: queries of several lengths on pages in any order.
void check_attention(int isa) {
    const int64_t H = 5, C = 64, E = 96, PAGE = 32, PAGES = 40, WIDTH = 20;
    if (!qiusuo_walks_pages(isa, E, C, PAGE)) return;
    Draws draw;
    const int64_t seen[] = {1, 32, 75, 128, 513, 640};
    const int64_t N = 6;
    const Rows queries(draw, N * H, E), entries(draw, PAGES * PAGE, E);
    Buffer<int64_t> tables(N * WIDTH), lengths(N);
    for (size_t i = 0; i < tables.size(); ++i) tables[i] = draw.below(PAGES);
    for (int64_t n = 0; n < N; ++n) lengths[n] = seen[n];
    const Answer out(1, N * H * C);
    const double scale = 1e-3;
    qiusuo_latent_attention(queries.at(1), entries.at(1), 16, tables.get(), WIDTH, lengths.get(),
                            out.at(), N, H, E, C, PAGE, scale);
    const int64_t count = PAGES * PAGE, bytes = (C + (E - C) * 2 + C / 16 + 31) / 32 * 32;
    Buffer<int64_t> slots(count);
    for (int64_t i = 0; i < count; ++i) slots[i] = i;
    Buffer<uint8_t> kept(count * bytes);
    const Answer meant(1, count * E), of_meant(1, N * H * C), of_kept(1, N * H * C);
    qiusuo_keep_rows(isa, entries.at(1), 1, kept.get(), slots.get(), count, C, E - C, bytes);
    qiusuo_unpack_rows(isa, kept.get(), meant.at(), 1, count, C, E - C, bytes);
    const auto attend = [&](const void *rows, int bits, void *to) {
        qiusuo_latent_attention(queries.at(1), rows, bits, tables.get(), WIDTH, lengths.get(), to, N,
                                H, E, C, PAGE, scale);
    };
    attend(meant.at(), 16, of_meant.at());
    attend(kept.get(), 8, of_kept.at());
    if (std::memcmp(of_meant.at(), of_kept.at(), N * H * C * 2) != 0)
        compare("attention to int8 rows", isa, 8, 1, N, H, C, 1, 0, 0);
    for (int64_t row = 0; row < N * H; ++row) {
        const int64_t n = row / H;
        double total = 0;
        std::vector<double> sum(C), size(C);
        for (int64_t s = 0; s < seen[n]; ++s) {
            const float *key = &entries.f32[(tables[n * WIDTH + s / PAGE] * PAGE + s % PAGE) * E];
            double score = 0;
            for (int64_t e = 0; e < E; ++e) score += queries.f32[row * E + e] * key[e];
            const double weight = std::exp(score * scale);
            total += weight;
            for (int64_t c = 0; c < C; ++c)
                sum[c] += weight * key[c], size[c] += weight * std::fabs(key[c]);
        }
        for (int64_t c = 0; c < C; ++c)
            compare("attention", isa, 16, 1, n, row, c, out[row * C + c], sum[c] / total,
                    size[c] / total / 100);
    }
}

// Attention of many queries and its gradients: one sequence, H query heads on one key head, causal or
// with a mask, of which query 0 sees nothing.
void check_attend(Draws &draw, int isa, int64_t H, int64_t T, int64_t S, int64_t E, int64_t V,
                  bool masked) {
    const Rows q(draw, T * H, E), k(draw, S, E), v(draw, S, V), toward(draw, T * H, V);
    Buffer<uint8_t> mask(T * S);
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = i >= size_t(S) && draw.below(3) == 0;
    const Answer out(1, T * H * V), grad_q(1, T * H * E), grad_k(1, S * E), grad_v(1, S * V);
    Buffer<float> sums(H * T);
    const auto view = [&](const void *at, int64_t heads, int64_t width) {
        return View{const_cast<void *>(at), 0, width, heads * width};  // [rows, heads, width]
    };
    const View at_q = view(q.at(1), H, E), at_k = view(k.at(1), 1, E), at_v = view(v.at(1), 1, V),
               at_mask = view(mask.get(), 1, S), at_out = view(out.at(), H, V),
               at_toward = view(toward.at(1), H, V), to_q = view(grad_q.at(), H, E),
               to_k = view(grad_k.at(), 1, E), to_v = view(grad_v.at(), 1, V);
    const float scale = 1e-3f;
    const View *seen = masked ? &at_mask : nullptr;
    qiusuo_attend(&at_q, &at_k, &at_v, seen, &at_out, sums.get(), 0, 1, H, 1, T, S, E, V, scale);
    qiusuo_attend_backward(&at_q, &at_k, &at_v, seen, &at_out, sums.get(), &at_toward, &to_q, &to_k,
                           &to_v, 1, H, 1, T, S, E, V, scale);
    // Sums, and the sums of their terms' sizes: roundings are of these.
    std::vector<double> dk(S * E), dv(S * V), dk_size(S * E), dv_size(S * V);
    for (int64_t row = 0; row < T * H; ++row) {
        const int64_t t = row / H;
        std::vector<double> weight(S), toward_v(S), sum(V), size(V), dq(E), dq_size(E);
        double total = 0, delta = 0, delta_size = 0;
        for (int64_t s = 0; s < S; ++s) {
            if (masked ? !mask[t * S + s] : s > S - T + t) continue;
            double score = 0;
            for (int64_t e = 0; e < E; ++e) score += q.f32[row * E + e] * k.f32[s * E + e];
            total += weight[s] = std::exp(score * scale);
        }
        for (int64_t s = 0; s < S; ++s) {
            if (total > 0) weight[s] /= total;
            double magnitude = 0;
            for (int64_t c = 0; c < V; ++c) {
                const double value = v.f32[s * V + c], g = toward.f32[row * V + c];
                toward_v[s] += g * value, magnitude += std::fabs(g * value);
                sum[c] += weight[s] * value, size[c] += weight[s] * std::fabs(value);
                dv[s * V + c] += weight[s] * g, dv_size[s * V + c] += weight[s] * std::fabs(g);
            }
            delta += weight[s] * toward_v[s], delta_size += weight[s] * magnitude;
        }
        for (int64_t s = 0; s < S; ++s)
            for (int64_t e = 0; e < E; ++e) {
                const double grad = weight[s] * (toward_v[s] - delta) * scale;
                const double most = weight[s] * (std::fabs(toward_v[s]) + delta_size) * scale;
                dq[e] += grad * k.f32[s * E + e], dq_size[e] += most * std::fabs(k.f32[s * E + e]);
                dk[s * E + e] += grad * q.f32[row * E + e];
                dk_size[s * E + e] += most * std::fabs(q.f32[row * E + e]);
            }
        for (int64_t c = 0; c < V; ++c)
            compare("attend", isa, 16, 1, row, c, S, out[row * V + c], sum[c], size[c] / 100 + 1e-9);
        for (int64_t e = 0; e < E; ++e)
            compare("grad_q", isa, 16, 1, row, e, S, grad_q[row * E + e], dq[e], dq_size[e] / 100 + 1e-9);
    }
    for (int64_t i = 0; i < S * E; ++i)
        compare("grad_k", isa, 16, 1, i / E, i % E, T, grad_k[i], dk[i], dk_size[i] / 100 + 1e-9);
    for (int64_t i = 0; i < S * V; ++i)
        compare("grad_v", isa, 16, 1, i / V, i % V, T, grad_v[i], dv[i], dv_size[i] / 100 + 1e-9);
}

void check_attends(int isa) {
    if (isa != 5) return;
    Draws draw;
    for (const bool masked : {false, true}) {
        check_attend(draw, isa, 1, 1, 1, 8, 8, masked);
        check_attend(draw, isa, 2, 17, 33, 48, 32, masked);
        check_attend(draw, isa, 1, 33, 17, 40, 24, masked);
        check_attend(draw, isa, 3, 130, 130, 48, 32, masked);
        check_attend(draw, isa, 1, 530, 700, 30, 20, masked);
    }
}

// Several callers at once, as server threads are, each with work for many threads.
void check_callers(int isa) {
    const int64_t M = 4, O = 700, I = 512;
    Draws draw;
    const Rows x(draw, M, I);
    const Weight weight(draw, 4, O, I);
    const auto run = [&](const Answer &out) {
        qiusuo_linear(isa, 4, x.bf16.get(), 1, weight.codes.get(), weight.scales.get(), nullptr,
                      out.at(), M, 1, O, I);
    };
    const Answer alone(1, M * O), first(1, M * O), second(1, M * O), third(1, M * O);
    run(alone);
    std::vector<std::thread> callers;
    for (const Answer *out : {&first, &second, &third})
        callers.emplace_back([&run, out] {
            for (int again = 0; again < 20; ++again) run(*out);
        });
    for (std::thread &caller : callers) caller.join();
    for (const Answer *out : {&first, &second, &third})
        if (std::memcmp(out->at(), alone.at(), M * O * 2) != 0)
            compare("among several callers", isa, 4, 1, M, O, I, 1, 0, 0);
}

}  // namespace

int main() {
    for (int isa = 1; isa <= 5; ++isa) {
        const char *name = qiusuo_instructions(isa);
        if (*name == '\0') continue;
        check_all(isa);
        check_callers(isa);
        check_attention(isa);
        check_attends(isa);
        check_mlps(isa);
        check_projections(isa);
        check_heads(isa);
        std::printf("%d: %s\n", isa, name);
    }
    std::printf("%d numbers compared, %d wrong\n", compared, failures);
    return failures != 0;
}
