// dW = dyᵀ · x over rows that come chunk by chunk. Sums stay in tiles until the last chunk.
#pragma once
#if defined(__x86_64__)
#include "amx_products.h"

AMX_BEGIN
namespace amx {

constexpr int64_t CHUNK_ROWS = 512;   // so many steps of 32 rows keep a panel in the nearest cache
constexpr int64_t SPAN_TILES = 16;    // columns of dW of a task

struct WeightGradient {
    int64_t O, I;
    float *sums;                        // [tiles of O][tiles of I], each in pairs
    int64_t left_tiles, left_first;     // dyᵀ: tiles in a step, and the first that is ours

    int64_t o_tiles() const { return up(O, PAIR) * 2; }
    int64_t i_tiles() const { return up(I, PAIR) * 2; }
    int64_t spans() const { return up(i_tiles(), SPAN_TILES); }
    int64_t tasks() const { return o_tiles() / 2 * spans(); }
    int64_t room() const { return o_tiles() * i_tiles() * SUMS; }

    // dy transposed [steps][left_tiles] times x woven [steps][tiles of I]; the tasks share out what
    // is summed, those next to each other the same columns of x. After the last chunk rows of the
    // gradient, of this kind, are written.
    void add(int64_t task, const bf16 *dy, const bf16 *x, int64_t steps, bool fresh, bool last,
             void *grad, int kind) const {
        const int64_t row = task % (o_tiles() / 2) * 2, first = task / (o_tiles() / 2) * SPAN_TILES;
        const int64_t columns = std::min(SPAN_TILES, i_tiles() - first);
        float *const own = sums + (row * i_tiles() + first) * SUMS;
        multiply({dy + (left_first + row) * ELEMENTS, 1, left_tiles}, {x + first * ELEMENTS, 1, i_tiles()},
                 {own, i_tiles(), 1}, 2, columns, steps, fresh);
        if (!last) return;
        for (int64_t r = 0; r < std::min(PAIR, O - row * TILE); r++)
            for (int64_t column = 0; column < columns; column += 2) {
                const float *const from =
                    own + (r / TILE * i_tiles() + column) * SUMS + r % TILE * TILE;
                const int64_t at = (first + column) * TILE;
                store_numbers(number_at(grad, kind, (row * TILE + r) * I), kind, at, within(I, at),
                              _mm512_load_ps(from), _mm512_load_ps(from + SUMS));
            }
    }
};

}  // namespace amx
TARGET_END
#endif
