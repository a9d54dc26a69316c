// A few rows of a weight times a slice of x, weight row by weight row. The includer defines before:
//
//   constexpr int TILE;         rows of x that share a weight while it is in registers, up to 8
//   constexpr bool PAIRED;      see `pack`
//   template <int BITS, int R> void dots(const uint8_t *codes, const half *scales,
//                                        const uint8_t *const *x, int64_t columns, float *out);
//
// which is out[r] = weight row · x[r] for R packed rows. Every dot product is summed by one thread
// in an order that depends on the number of columns alone.
#pragma once
#include "numbers.h"
#include "packing.h"

namespace {

constexpr int64_t SLICE = 32;               // rows of x multiplied at a time
constexpr int64_t CHUNK = 128;              // most weight rows of a task, and
constexpr int64_t CHUNK_BYTES = 256 << 10;  // about so many bytes of them

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Matrix {
    const uint8_t *codes;
    const half *scales;
    int64_t columns;
};

template <int BITS>
Matrix matrix_of(const uint8_t *codes, const half *scales, int64_t columns, int64_t rows_before) {
    return {codes + rows_before * code_bytes(BITS, columns),
            BITS == 16 ? nullptr : scales + rows_before * divided_up(columns, BLOCK), columns};
}

template <int BITS, int R>
void tile(int64_t rows, const uint8_t *codes, const half *scales, const uint8_t *const *x,
          int64_t columns, float *out) {
    if constexpr (R > 1)
        if (rows < R) return tile<BITS, R - 1>(rows, codes, scales, x, columns, out);
    dots<BITS, R>(codes, scales, x, columns, out);
}

// made[m][o - first] = weight row o · x[m], for up to SLICE rows of x and CHUNK of the weight.
template <int BITS>
void by_rows(const Matrix &w, int64_t first, int64_t last, const uint8_t *const *x, int64_t count,
             float (*made)[CHUNK]) {
    float sums[SLICE];
    for (int64_t o = first; o < last; o++) {
        const uint8_t *codes = w.codes + o * code_bytes(BITS, w.columns);
        const half *scales = BITS == 16 ? nullptr : w.scales + o * divided_up(w.columns, BLOCK);
        for (int64_t m = 0; m < count; m += TILE)
            tile<BITS, TILE>(lesser(count - m, TILE), codes, scales, x + m, w.columns, sums + m);
        for (int64_t m = 0; m < count; m++) made[m][o - first] = sums[m];
    }
}

}  // namespace
