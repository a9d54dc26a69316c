// SwiGLU networks on AMX: one, or the experts of a mixture over rows sorted by expert.
//
// First the weights are packed. Then a task is a block of an expert's rows: gate and up are multiplied
// 32 columns at a time and softened while their sums are in the nearest cache, the result is the left
// factor of down.
#if defined(__x86_64__)
#include "amx_training_mlp.h"

#include <vector>

#include "amx_swiglu.h"
#include "scratch.h"
#include "threads.h"

AMX_BEGIN
namespace {

using namespace amx;

struct Block {
    int64_t expert, first, count;
};

struct Forward {
    const TrainingMlp &call;
    bf16 *y;
    int64_t d_steps, f_steps;
    std::vector<int64_t> busy;  // experts that have rows
    std::vector<Block> blocks;  // whose `expert` is a number of `busy`
    bf16 *weights;  // of each: gate turned [f_steps][2][d_steps], up as well, down [d_steps][2][f_steps]

    Forward(const TrainingMlp &call, bf16 *y)
        : call(call), y(y), d_steps(up(call.D, STEP)), f_steps(up(call.F, STEP)) {
        for (int64_t e = 0; e < call.E; e++) {
            const int64_t begin = call.starts[e], end = call.starts[e + 1];
            for (int64_t at = begin; at < end; at += BLOCK_ROWS)
                blocks.push_back({static_cast<int64_t>(busy.size()), at, std::min(BLOCK_ROWS, end - at)});
            if (end > begin) busy.push_back(e);
        }
        thread_local Scratch scratch;
        weights = scratch.room<bf16>(busy.size() * 3 * matrix());
    }

    int64_t matrix() const { return 2 * f_steps * d_steps * ELEMENTS; }
    int64_t pack_tasks() const { return static_cast<int64_t>(busy.size()) * (2 * f_steps + d_steps); }

    // 32 rows of a weight.
    void pack(int64_t task) const {
        const int64_t each = 2 * f_steps + d_steps, item = task / each, e = busy[item];
        bf16 *const to = weights + item * 3 * matrix();
        task %= each;
        if (task < f_steps) return turned(call.gate, e * call.gate_stride, call.F, call.D, task, to);
        task -= f_steps;
        if (task < f_steps)
            return turned(call.up, e * call.gate_stride, call.F, call.D, task, to + matrix());
        turned(call.down, e * call.down_stride, call.D, call.F, task - f_steps, to + 2 * matrix());
    }

    void turned(const void *weight, int64_t begin, int64_t O, int64_t I, int64_t task, bf16 *to) const {
        const int64_t steps = up(I, STEP);
        bf16 *const own = to + task * 2 * steps * ELEMENTS;
        pack_rows({number_at(weight, call.weight_kind, begin), call.weight_kind, I}, task * PAIR,
                  std::min(PAIR, O - task * PAIR), I, 2, own);
        turn(own, 2 * steps, own);
    }

    void run(const Block &block) const {
        const bf16 *const gate = weights + block.expert * 3 * matrix();
        const int64_t first = block.first, count = block.count, tiles = up(count, PAIR) * 2;
        thread_local Scratch own;
        bf16 *const x = own.room<bf16>(BLOCK_TILES * (d_steps + f_steps) * ELEMENTS);
        bf16 *const act = x + BLOCK_TILES * d_steps * ELEMENTS;
        pack_rows({call.x, call.x_kind, call.D, call.pair, call.K}, first, count, call.D, tiles, x);
        float weight[BLOCK_ROWS];
        for (int64_t r = 0; r < tiles * TILE; r++) weight[r] = r < count ? weight_of(call, first + r) : 0;
        const Tiles configured;
        for (int64_t tile = 0; tile < tiles; tile += 2)
            for (int64_t step = 0; step < f_steps; step++) {
                const bf16 *const rows = x + tile * d_steps * ELEMENTS;
                const bf16 *const columns = gate + step * 2 * d_steps * ELEMENTS;
                const Square g(rows, columns, d_steps), u(rows, columns + matrix(), d_steps);
                for (int64_t r = 0; r < PAIR; r++)
                    swiglu_row(g.row(r), u.row(r), weight[tile * TILE + r],
                               act + ((tile + r / TILE) * f_steps + step) * ELEMENTS + r % TILE * STEP);
            }
        product(act, gate + 2 * matrix(), count, f_steps, y + first * call.D, 1, call.D);
    }
};

}  // namespace

void amx_training_mlp(const TrainingMlp &call, uint16_t *y) {
    const Forward work(call, y);
    auto pack = [&](int64_t task) { work.pack(task); };
    auto block = [&](int64_t task) { work.run(work.blocks[task]); };
    const Stage stages[] = {stage_of(work.pack_tasks(), pack),
                            stage_of(static_cast<int64_t>(work.blocks.size()), block)};
    run_stages(stages, 2, 2 * call.starts[call.E] * (call.D + call.F));
}
TARGET_END
#else
#include "amx_training_mlp.h"
void amx_training_mlp(const TrainingMlp &, uint16_t *) {}
#endif
