// NEON, which every 64-bit ARM has.
#include "kernels.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#define NEON_DOT 0
#include "neon_dots.h"
#include "between_loops.h"
#include "loops.h"

const Kernels *neon_dot_kernels();

const Kernels *neon_kernels() {
    static const Kernels kernels = {"neon", linear, experts, dequantize, quantize, keep_rows,
                                    unpack_rows, &BETWEEN};
#if defined(__linux__)
    const bool dot = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    const bool dot = true;  // Apple's, all of them
#endif
    return dot ? neon_dot_kernels() : &kernels;
}
#else
const Kernels *neon_kernels() { return nullptr; }
#endif
