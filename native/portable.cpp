// Plain C++, for every processor: what the others are written after.
#include "kernels.h"

#include "convert.h"
#include "packing.h"

namespace {

constexpr int TILE = 4;
constexpr bool PAIRED = false;

template <int R>
void dots_bf16(const bf16 *w, const uint8_t *const *x, int64_t columns, float *out) {
    for (int r = 0; r < R; r++) {
        const bf16 *row = reinterpret_cast<const bf16 *>(x[r]);
        float lanes[16] = {};
        for (int64_t i = 0; i < columns; i++) lanes[i % 16] += widened(w[i]) * widened(row[i]);
        for (int width = 8; width; width /= 2)
            for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
        out[r] = lanes[0];
    }
}

template <int BITS, int R>
void dots(const uint8_t *codes, const half *scales, const uint8_t *const *x, int64_t columns,
          float *out) {
    if constexpr (BITS == 16) {
        dots_bf16<R>(reinterpret_cast<const bf16 *>(codes), x, columns, out);
    } else {
        const int64_t blocks = (columns + BLOCK - 1) / BLOCK, padded = padded_blocks(columns);
        float lanes[R][GROUP] = {};
        for (int64_t b = 0; b < blocks; b++) {
            int8_t levels[BLOCK];
            levels_of_block<BITS>(codes + b * BLOCK * BITS / 8, levels);
            const float scale = from_half(scales[b]);
            for (int r = 0; r < R; r++) {
                const int8_t *x_codes = reinterpret_cast<const int8_t *>(x[r]) + b * BLOCK;
                int32_t dot = 0;
                for (int i = 0; i < BLOCK; i++) dot += levels[i] * x_codes[i];
                float &lane = lanes[r][b % GROUP];
                lane = std::fma(static_cast<float>(dot), scale * scales_of(x[r], padded)[b], lane);
            }
        }
        for (int r = 0; r < R; r++) {
            for (int width = GROUP / 2; width; width /= 2)
                for (int i = 0; i < width; i++) lanes[r][i] += lanes[r][i + width];
            out[r] = lanes[r][0];
        }
    }
}

}  // namespace
#include "between_loops.h"
#include "loops.h"

const Kernels *portable_kernels() {
    static const Kernels kernels = {"portable", linear, experts, dequantize, quantize, keep_rows,
                                    unpack_rows, &BETWEEN};
    return &kernels;
}
