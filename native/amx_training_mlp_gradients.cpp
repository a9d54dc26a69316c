// The gradients of SwiGLU networks on AMX.
//
// Rows go by in chunks of one expert each. Blocks of a chunk find the slopes of gate and up 32
// columns at a time, while the product they come from is in the nearest cache, and with them the
// gradient of x; they leave x, dy, the slopes and silu(gate) · up laid out for the weights'
// gradients, which the chunk's last part adds up. Meanwhile the next chunk is in its blocks.
#if defined(__x86_64__)
#include "amx_training_mlp.h"

#include "amx_swiglu.h"
#include "amx_weight_gradients.h"
#include "pipeline.h"
#include "scratch.h"

AMX_BEGIN
namespace {

using namespace amx;

struct Chunk {
    int64_t expert, first, count;
    int64_t turn;  // which of the two rooms for packed weights
    bool fresh, last;
};

std::vector<Chunk> chunks_of(const TrainingMlp &call) {
    std::vector<Chunk> chunks;
    int64_t turn = 0;
    for (int64_t e = 0; e < call.E; e++) {
        const int64_t begin = call.starts[e], end = call.starts[e + 1];
        for (int64_t at = begin; at < end; at += CHUNK_ROWS)
            chunks.push_back({e, at, std::min(CHUNK_ROWS, end - at), turn % 2, at == begin,
                              at + CHUNK_ROWS >= end});
        turn += end > begin;
    }
    return chunks;
}

// An expert's weights as right factors. Turned, gate and up [f_steps][2][d_steps] each; woven, down
// [d_steps][2 · f_steps], gate and then up [2 · f_steps][2 · d_steps].
struct Packed {
    bf16 *gate, *up, *down, *back;
};

// Where a chunk's rows lie, laid out for the weights' gradients: [rows/32] times so many tiles.
struct Laid {
    bf16 *x, *dy, *act, *slopes;
};

struct Backward final : Pipeline {
    const TrainingMlp &call;
    const bf16 *grad_y;
    bf16 *grad_rows;
    float *grad_weights;
    void *grad_gate, *grad_up, *grad_down;
    int64_t d_steps, f_steps;
    std::vector<Chunk> chunks;
    Scratch weights_room, chunks_room, sums_room;
    bf16 *weights;
    bf16 *laid;
    WeightGradient gate, up, down;

    Backward(const TrainingMlp &call, const bf16 *grad_y, bf16 *grad_rows, float *grad_weights,
             void *grad_gate, void *grad_up, void *grad_down)
        : call(call), grad_y(grad_y), grad_rows(grad_rows), grad_weights(grad_weights),
          grad_gate(grad_gate), grad_up(grad_up), grad_down(grad_down),
          d_steps(amx::up(call.D, STEP)), f_steps(amx::up(call.F, STEP)), chunks(chunks_of(call)),
          gate{call.F, call.D, nullptr, 4 * f_steps, 0},
          up{call.F, call.D, nullptr, 4 * f_steps, 2 * f_steps},
          down{call.D, call.F, nullptr, 2 * d_steps, 0} {
        weights = weights_room.room<bf16>(2 * weights_size());
        laid = chunks_room.room<bf16>(2 * laid_size());
        gate.sums = sums_room.room<float>(gate.room() + up.room() + down.room());
        up.sums = gate.sums + gate.room();
        down.sums = up.sums + up.room();
    }

    int64_t weights_size() const { return 10 * d_steps * f_steps * ELEMENTS; }
    Packed packed(const Chunk &chunk) const {
        const int64_t size = 2 * d_steps * f_steps * ELEMENTS;
        bf16 *const base = weights + chunk.turn * weights_size();
        return {base, base + size, base + 2 * size, base + 3 * size};
    }

    static constexpr int64_t CHUNK_STEPS = CHUNK_ROWS / STEP;
    int64_t laid_size() const { return CHUNK_STEPS * (4 * d_steps + 6 * f_steps) * ELEMENTS; }
    // From this step of the chunk on.
    Laid laid_of(int64_t item, int64_t step) const {
        bf16 *const base = laid + item % 2 * laid_size();
        const int64_t d = 2 * d_steps * ELEMENTS, f = 2 * f_steps * ELEMENTS;
        return {base + step * d, base + CHUNK_STEPS * d + step * d,
                base + CHUNK_STEPS * 2 * d + step * f,
                base + CHUNK_STEPS * (2 * d + f) + step * 2 * f};
    }

    int64_t tasks(int part, int64_t item) const override {
        const Chunk &chunk = chunks[item];
        if (part == 0) return chunk.fresh ? d_steps + 2 * f_steps : 0;
        if (part == 1) return amx::up(chunk.count, BLOCK_ROWS);
        return gate.tasks() + up.tasks() + down.tasks();
    }
    void run(int part, int64_t item, int64_t task) const override {
        if (part == 0) pack(chunks[item], task);
        else if (part == 1) block(item, task * BLOCK_ROWS);
        else add(item, task);
    }

    // 32 rows of a weight.
    void pack(const Chunk &chunk, int64_t task) const {
        const int64_t kind = call.weight_kind, wide = chunk.expert * call.gate_stride;
        const Packed to = packed(chunk);
        if (task < d_steps)
            return pack_rows_of(number_in(call.down, kind, chunk.expert * call.down_stride), call.D,
                                call.F, task, nullptr, to.down);
        task -= d_steps;
        const int64_t half = f_steps * 2 * d_steps * ELEMENTS;
        if (task < f_steps)
            return pack_rows_of(number_in(call.gate, kind, wide), call.F, call.D, task, to.gate, to.back);
        pack_rows_of(number_in(call.up, kind, wide), call.F, call.D, task - f_steps, to.up,
                     to.back + half);
    }

    void pack_rows_of(const void *weight, int64_t O, int64_t I, int64_t task, bf16 *turned,
                      bf16 *woven) const {
        const int64_t steps = amx::up(I, STEP), at = task * 2 * steps * ELEMENTS;
        thread_local Scratch own;
        bf16 *const left = own.room<bf16>(2 * steps * ELEMENTS);
        pack_rows({weight, call.weight_kind, I}, task * PAIR, std::min(PAIR, O - task * PAIR), I, 2,
                  left);
        weave_tiles(left, 2, steps, woven + at);
        if (turned) turn(left, 2 * steps, turned + at);
    }

    void block(int64_t item, int64_t before) const {
        const Chunk &chunk = chunks[item];
        const int64_t first = chunk.first + before, count = std::min(BLOCK_ROWS, chunk.count - before);
        const int64_t tiles = amx::up(count, PAIR) * 2;
        const Laid to = laid_of(item, before / STEP);
        thread_local Scratch own;
        bf16 *const x = own.room<bf16>(BLOCK_TILES * (2 * d_steps + 3 * f_steps) * ELEMENTS);
        bf16 *const dy = x + BLOCK_TILES * d_steps * ELEMENTS;
        bf16 *const act = dy + BLOCK_TILES * d_steps * ELEMENTS;
        bf16 *const slopes = act + BLOCK_TILES * f_steps * ELEMENTS;
        pack_rows({call.x, call.x_kind, call.D, call.pair, call.K}, first, count, call.D, tiles, x);
        weave_tiles(x, tiles, d_steps, to.x);
        pack_rows({grad_y, 1, call.D, call.pair, call.K}, first, count, call.D, tiles, dy);
        transpose_tiles(dy, tiles, d_steps, to.dy);
        const Tiles configured;
        find_slopes(chunk, first, count, tiles, x, dy, act, slopes);
        product({slopes, 2 * f_steps, 1}, {packed(chunk).back, 1, 2 * d_steps}, count, 2 * f_steps,
                grad_rows + first * call.D, 1, call.D);
        weave_tiles(act, tiles, f_steps, to.act);
        transpose_tiles(slopes, tiles, 2 * f_steps, to.slopes);
    }

    // From x and dy, in left tiles: silu(gate) · up · weight and the slopes [gate, up], as well.
    void find_slopes(const Chunk &chunk, int64_t first, int64_t count, int64_t tiles, const bf16 *x,
                     const bf16 *dy, bf16 *act, bf16 *slopes) const {
        alignas(64) float gate[BLOCK_TILES * 2 * SUMS], up[BLOCK_TILES * 2 * SUMS],
            grad[BLOCK_TILES * 2 * SUMS], pulls[BLOCK_ROWS][TILE] = {}, weights[BLOCK_ROWS];
        const Packed packed = this->packed(chunk);
        for (int64_t r = 0; r < tiles * TILE; r++) weights[r] = r < count ? weight_of(call, first + r) : 0;
        for (int64_t step = 0; step < f_steps; step++) {
            const int64_t at = step * 2 * d_steps * ELEMENTS;
            column_pair({x, d_steps, 1}, {packed.gate + at, d_steps, 1}, tiles, true, d_steps, gate);
            column_pair({x, d_steps, 1}, {packed.up + at, d_steps, 1}, tiles, true, d_steps, up);
            column_pair({dy, d_steps, 1}, {packed.down + step * 2 * ELEMENTS, 1, 2 * f_steps}, tiles,
                        true, d_steps, grad);
            for (int64_t r = 0; r < tiles * TILE; r++) {
                const float *const g = row_of(gate, r), *const u = row_of(up, r),
                            *const d = row_of(grad, r);
                const __m512 weight = _mm512_set1_ps(weights[r]);
                const Slopes low(_mm512_load_ps(g), _mm512_load_ps(u), _mm512_load_ps(d), weight);
                const Slopes high(_mm512_load_ps(g + SUMS), _mm512_load_ps(u + SUMS),
                                  _mm512_load_ps(d + SUMS), weight);
                const int64_t row = r / TILE, at = r % TILE * STEP;
                const auto store = [&](bf16 *left, int64_t steps, int64_t place, __m512 a, __m512 b) {
                    _mm512_store_si512(left + (row * steps + place) * ELEMENTS + at,
                                       (__m512i)_mm512_cvtne2ps_pbh(b, a));
                };
                store(act, f_steps, step, low.out, high.out);
                store(slopes, 2 * f_steps, step, low.gate, high.gate);
                store(slopes, 2 * f_steps, f_steps + step, low.up, high.up);
                _mm512_store_ps(pulls[r], _mm512_add_ps(_mm512_load_ps(pulls[r]),
                                                        _mm512_add_ps(low.pull, high.pull)));
            }
        }
        if (!grad_weights) return;
        for (int64_t r = 0; r < count; r++)
            if (call.pair[first + r] >= 0)
                grad_weights[call.pair[first + r]] =
                    _mm512_reduce_add_ps(_mm512_load_ps(pulls[r]));
    }

    void add(int64_t item, int64_t task) const {
        const Chunk &chunk = chunks[item];
        const Laid from = laid_of(item, 0);
        const int64_t steps = amx::up(chunk.count, STEP), kind = call.weight_kind;
        const int64_t wide = chunk.expert * call.gate_stride;
        const Tiles configured;
        if (task < gate.tasks())
            return gate.add(task, from.slopes, from.x, steps, chunk.fresh, chunk.last,
                            number_at(grad_gate, kind, wide), kind);
        task -= gate.tasks();
        if (task < up.tasks())
            return up.add(task, from.slopes, from.x, steps, chunk.fresh, chunk.last,
                          number_at(grad_up, kind, wide), kind);
        down.add(task - up.tasks(), from.dy, from.act, steps, chunk.fresh, chunk.last,
                 number_at(grad_down, kind, chunk.expert * call.down_stride), kind);
    }
};

}  // namespace

void amx_training_mlp_backward(const TrainingMlp &call, const uint16_t *grad_y, uint16_t *grad_rows,
                               float *grad_weights, void *grad_gate, void *grad_up,
                               void *grad_down) {
    const Backward work(call, grad_y, grad_rows, grad_weights, grad_gate, grad_up, grad_down);
    run_pipeline(work, 3, work.chunks.size(), 4 * call.starts[call.E] * (call.D + call.F));
}
TARGET_END
#else
#include "amx_training_mlp.h"
void amx_training_mlp_backward(const TrainingMlp &, const uint16_t *, uint16_t *,
                               float *, void *, void *, void *) {}
#endif
