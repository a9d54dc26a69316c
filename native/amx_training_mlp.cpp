// SwiGLU networks on AMX: one, or the experts of a mixture over rows sorted by expert.
//
// A task is a block of an expert's rows: gate and up are multiplied 32 columns at a time and softened
// while their sums are in the nearest cache, the result is the left factor of down. While one expert's
// blocks are worked on, the next one's weights are packed.
#if defined(__x86_64__)
#include "amx_training_mlp.h"

#include "amx_swiglu.h"
#include "amx_weight_gradients.h"
#include "pipeline.h"
#include "scratch.h"

AMX_BEGIN
namespace {

using namespace amx;

struct Forward final : Pipeline {
    const TrainingMlp &call;
    bf16 *y;
    int64_t d_steps, f_steps;
    std::vector<int64_t> busy;  // experts that have rows
    Scratch scratch;
    bf16 *weights;  // two: gate turned [f_steps][2][d_steps], up as well, down turned [D/32][2][f_steps]

    Forward(const TrainingMlp &call, bf16 *y)
        : call(call), y(y), d_steps(amx::up(call.D, STEP)), f_steps(amx::up(call.F, STEP)) {
        for (int64_t e = 0; e < call.E; e++)
            if (call.starts[e + 1] > call.starts[e]) busy.push_back(e);
        weights = scratch.room<bf16>(2 * weights_size());
    }

    int64_t weights_size() const { return 6 * f_steps * d_steps * ELEMENTS; }
    bf16 *gate_of(int64_t item) const { return weights + item % 2 * weights_size(); }
    bf16 *up_of(int64_t item) const { return gate_of(item) + 2 * f_steps * d_steps * ELEMENTS; }
    bf16 *down_of(int64_t item) const { return gate_of(item) + 4 * f_steps * d_steps * ELEMENTS; }

    int64_t tasks(int part, int64_t item) const override {
        const int64_t e = busy[item];
        return part ? amx::up(call.starts[e + 1] - call.starts[e], BLOCK_ROWS) : 2 * f_steps + d_steps;
    }
    void run(int part, int64_t item, int64_t task) const override {
        if (part == 0) pack(item, task);
        else block(item, call.starts[busy[item]] + task * BLOCK_ROWS);
    }

    void pack(int64_t item, int64_t task) const {
        const int64_t e = busy[item], kind = call.weight_kind;
        const int64_t gate = e * call.gate_stride, down = e * call.down_stride;
        if (task < f_steps)
            turned(number_in(call.gate, kind, gate), call.F, call.D, task, gate_of(item));
        else if (task < 2 * f_steps)
            turned(number_in(call.up, kind, gate), call.F, call.D, task - f_steps, up_of(item));
        else
            turned(number_in(call.down, kind, down), call.D, call.F, task - 2 * f_steps, down_of(item));
    }

    // 32 rows of a weight [O, I].
    void turned(const void *weight, int64_t O, int64_t I, int64_t task, bf16 *to) const {
        const int64_t steps = amx::up(I, STEP);
        bf16 *const own = to + task * 2 * steps * ELEMENTS;
        pack_rows({weight, call.weight_kind, I}, task * PAIR, std::min(PAIR, O - task * PAIR), I, 2, own);
        turn(own, 2 * steps, own);
    }

    void block(int64_t item, int64_t first) const {
        const int64_t count = std::min(BLOCK_ROWS, call.starts[busy[item] + 1] - first);
        const int64_t tiles = amx::up(count, TILE);
        thread_local Scratch own;
        bf16 *const x = own.room<bf16>(BLOCK_TILES * (d_steps + f_steps) * ELEMENTS);
        bf16 *const act = x + BLOCK_TILES * d_steps * ELEMENTS;
        pack_rows({call.x, call.x_kind, call.D, call.pair, call.K}, first, count, call.D, tiles, x);
        float weight[BLOCK_ROWS];
        for (int64_t r = 0; r < tiles * TILE; r++) weight[r] = r < count ? weight_of(call, first + r) : 0;
        alignas(64) float gate[BLOCK_TILES * 2 * SUMS], up[BLOCK_TILES * 2 * SUMS];
        const Tiles configured;
        for (int64_t step = 0; step < f_steps; step++) {
            const int64_t at = step * 2 * d_steps * ELEMENTS;
            column_pair({x, d_steps, 1}, {gate_of(item) + at, d_steps, 1}, tiles, true, d_steps, gate);
            column_pair({x, d_steps, 1}, {up_of(item) + at, d_steps, 1}, tiles, true, d_steps, up);
            for (int64_t r = 0; r < tiles * TILE; r++)
                swiglu_row(row_of(gate, r), row_of(up, r), weight[r],
                           act + (r / TILE * f_steps + step) * ELEMENTS + r % TILE * STEP);
        }
        product({act, f_steps, 1}, {down_of(item), f_steps, 1}, count, f_steps, y + first * call.D, 1,
                call.D);
    }
};

}  // namespace

void amx_training_mlp(const TrainingMlp &call, uint16_t *y) {
    const Forward work(call, y);
    run_pipeline(work, 2, work.busy.size(), 2 * call.starts[call.E] * (call.D + call.F));
}
TARGET_END
#else
#include "amx_training_mlp.h"
void amx_training_mlp(const TrainingMlp &, uint16_t *) {}
#endif
