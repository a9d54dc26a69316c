// AVX-512 with VNNI and BF16.
//
// vpdpbusd multiplies unsigned by signed bytes and adds four products to each lane. Weights are its
// unsigned side, as level + 128; what that adds, 128 times the sum of x's codes, is taken off again
// (packing.h). The partial sums of 16 blocks, in 8 or 4 registers, are added up crosswise until one
// register holds the 16 blocks' dot products; with them 16 scales lie side by side.
#include "kernels.h"
#if defined(__x86_64__)
#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")
#include <immintrin.h>

#include "avx512_dots.h"
#include "between_loops.h"
#include "loops.h"
TARGET_END

const Kernels *avx512_kernels() {
    static const Kernels kernels = {"avx512_vnni", linear, experts, dequantize, quantize, keep_rows,
                                    unpack_rows, &BETWEEN};
    const bool usable =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    return usable ? &kernels : nullptr;
}
#else
const Kernels *avx512_kernels() { return nullptr; }
#endif
