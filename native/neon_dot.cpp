// NEON with the dot products of bytes that ARMv8.2 may have.
#include "kernels.h"
#if defined(__aarch64__)
#include "target.h"
#if defined(__clang__)
TARGET_BEGIN("dotprod")
#else
TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>

#define NEON_DOT 1
#include "neon_dots.h"
#include "between_loops.h"
#include "loops.h"
TARGET_END

const Kernels *neon_dot_kernels() {
    static const Kernels kernels = {"neon_dotprod", linear, experts, dequantize, quantize, keep_rows,
                                    unpack_rows, &BETWEEN};
    return &kernels;
}
#endif
