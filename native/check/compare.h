// Counts what is compared, and says what is wrong.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>

extern "C" const char *qiusuo_instructions(int isa);

inline int failures = 0, compared = 0;

inline void compare(const char *what, int isa, int bits, int kind, int64_t m, int64_t o, int64_t i,
             double got, double expected, double allowed) {
    ++compared;
    if (std::fabs(got - expected) <= allowed) return;  // false for NaN too
    if (++failures <= 20)
        std::printf("%s with %s, %d bits, %s, (%ld, %ld, %ld): %.9g, expected %.9g within %.2g\n",
                    what, qiusuo_instructions(isa), bits, kind ? "bfloat16" : "float32",
                    static_cast<long>(m), static_cast<long>(o), static_cast<long>(i), got, expected,
                    allowed);
}
