// AVX-512 for a few rows, AMX from so many on that unpacking a weight pays.
#include "amx_matmul.h"
#include "kernels.h"

#if defined(__x86_64__)
namespace {

constexpr int64_t MANY = 12;        // rows of x
constexpr int64_t MANY_PAIRS = 12;  // (token, expert) pairs for each expert, on average

void linear(int bits, const Linear &call) {
    if (call.kind != 1 || call.M < MANY) return avx512_kernels()->linear(bits, call);
    const int64_t H = call.H, O = call.O, I = call.I;
    for (int64_t h = 0; h < H; h++)
        amx_linear(bits, static_cast<const uint16_t *>(call.x) + h * I, H * I,
                   call.codes + h * O * code_bytes(bits, I),
                   bits == 16 ? nullptr : call.scales + h * O * ((I + BLOCK - 1) / BLOCK),
                   call.bias ? call.bias + h * O : nullptr,
                   static_cast<uint16_t *>(call.out) + h * O, H * O, call.M, O, I);
}

void experts(int bits, const Experts &call) {
    if (call.kind != 1 || !call.indices || !call.weights || call.M * call.K < MANY_PAIRS * call.E)
        return avx512_kernels()->experts(bits, call);
    amx_experts(bits, static_cast<const uint16_t *>(call.x), call.indices, call.weights,
                call.gate_up_codes, call.gate_up_scales, call.down_codes, call.down_scales,
                static_cast<uint16_t *>(call.out), call.M, call.K, call.E, call.D, call.F);
}

}  // namespace

const Kernels *amx_kernels() {
    if (!avx512_kernels() || !amx_matmul_takes()) return nullptr;
    const Kernels &few = *avx512_kernels();
    static const Kernels kernels = {"amx_bf16", linear, experts, few.dequantize, few.quantize,
                                    few.keep_rows, few.unpack_rows, few.between};
    return &kernels;
}
#else
const Kernels *amx_kernels() { return nullptr; }
#endif
