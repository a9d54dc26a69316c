// The gradients of SwiGLU networks on AMX.
//
// A task is a slice of one expert's width: a few rows of gate and up and columns of down, so few that
// they, their gradients and a block of rows of x and dy lie in the second-level cache together. All of
// the expert's rows go by, block by block: the slice of the hidden rows is found again, then its slopes
// 32 columns at a time, then what they add to the gradients of the weights and of x. Where there are
// several slices, their shares of x's gradient, rounded as it is, are added up at the end, in their order.
#if defined(__x86_64__)
#include "amx_training_mlp.h"

#include <vector>

#include "amx_swiglu.h"
#include "amx_weight_gradients.h"
#include "scratch.h"
#include "threads.h"

AMX_BEGIN
namespace {

using namespace amx;

constexpr int64_t SLICE = 1 << 16;  // numbers of each weight in a slice, about
constexpr int64_t WIDEST = 256;     // columns of a slice

struct Backward {
    const TrainingMlp &call;
    const bf16 *grad_y;
    bf16 *grad_rows;
    float *grad_weights;
    void *grad_gate, *grad_up, *grad_down;
    int64_t slices, slice;           // how many, and how wide
    std::vector<int64_t> busy;       // experts that have rows
    bf16 *shares;                    // of the gradient of x [slices][rows][D]; where it goes, for one
    float *pulls;                    // of the gradient of the rows' weights [slices][rows]

    Backward(const TrainingMlp &call, const bf16 *grad_y, bf16 *grad_rows, float *grad_weights,
             void *grad_gate, void *grad_up, void *grad_down)
        : call(call), grad_y(grad_y), grad_rows(grad_rows), grad_weights(grad_weights),
          grad_gate(grad_gate), grad_up(grad_up), grad_down(grad_down) {
        const int64_t wide = std::min(WIDEST, up(SLICE / call.D, STEP) * STEP);
        slices = up(call.F, wide);
        if (call.E == 1) slices = up(slices, 2) * 2;  // no thread shall be idle
        slice = up(up(call.F, slices), STEP) * STEP;
        slices = up(call.F, slice);
        for (int64_t e = 0; e < call.E; e++)
            if (call.starts[e + 1] > call.starts[e]) busy.push_back(e);
        thread_local Scratch shares_room, pulls_room;
        shares = slices > 1 ? shares_room.room<bf16>(slices * rows() * call.D) : grad_rows;
        pulls = grad_weights ? pulls_room.room<float>(slices * rows()) : nullptr;
    }

    int64_t rows() const { return call.starts[call.E]; }
    void run_slice(int64_t task) const;
    void add_shares(int64_t block) const;
};

// What a task works with: its slice's weights as right factors, rows in the forms that its products
// want, and sums.
struct Slice {
    const Backward &work;
    const TrainingMlp &call;
    int64_t expert, number, first_column, F;  // F: its columns
    int64_t d_steps, f_steps;
    bf16 *gate, *up_, *down, *back;            // gate and up turned, down woven, gate and up woven
    bf16 *x, *dy, *slopes;                     // left tiles of 32 rows
    bf16 *x_woven, *dy_across, *act_woven, *slopes_across;  // of a block
    WeightGradient d_gate, d_up, d_down;

    Slice(const Backward &work, int64_t task)
        : work(work), call(work.call), expert(work.busy[task / work.slices]),
          number(task % work.slices), first_column(number * work.slice),
          F(std::min(work.slice, call.F - first_column)), d_steps(amx::up(call.D, STEP)),
          f_steps(amx::up(F, STEP)) {
        thread_local Scratch scratch;
        lay_out(scratch, [&](Room &room) { lay(room); });
    }

    void lay(Room &room) {
        const int64_t weight = 2 * f_steps * d_steps * ELEMENTS;
        const int64_t wide = BLOCK_TILES * d_steps * ELEMENTS, narrow = BLOCK_TILES * f_steps * ELEMENTS;
        gate = room.take<bf16>(weight);
        up_ = room.take<bf16>(weight);
        down = room.take<bf16>(weight);
        back = room.take<bf16>(2 * weight);
        for (bf16 **rows : {&x, &dy}) *rows = room.take<bf16>(2 * d_steps * ELEMENTS);
        slopes = room.take<bf16>(4 * f_steps * ELEMENTS);
        for (bf16 **rows : {&x_woven, &dy_across}) *rows = room.take<bf16>(wide);
        act_woven = room.take<bf16>(narrow);
        slopes_across = room.take<bf16>(2 * narrow);
        d_gate = {F, call.D, room.take<float>(WeightGradient::room(F, call.D))};
        d_up = {F, call.D, room.take<float>(WeightGradient::room(F, call.D))};
        d_down = {call.D, F, room.take<float>(WeightGradient::room(call.D, F))};
    }

    // Where the slice begins in gate and up, and in down.
    int64_t wide_at() const { return expert * call.gate_stride + first_column * call.D; }
    int64_t down_at() const { return expert * call.down_stride + first_column; }

    void pack_weights() const {
        const int64_t D = call.D;
        const int kind = call.weight_kind;
        for (int64_t step = 0; step < f_steps; step++) {
            const int64_t at = step * 2 * d_steps * ELEMENTS, rows = std::min(PAIR, F - step * PAIR);
            bf16 *const own = back + step * ELEMENTS;
            pack_rows({number_at(call.gate, kind, wide_at()), call.weight_kind, D}, step * PAIR, rows, D,
                      2, gate + at);
            weave_tiles(gate + at, 2, d_steps, {own, 1, 2 * f_steps});
            turn(gate + at, 2 * d_steps, gate + at);
            pack_rows({number_at(call.up, kind, wide_at()), call.weight_kind, D}, step * PAIR, rows, D, 2,
                      up_ + at);
            weave_tiles(up_ + at, 2, d_steps, {own + f_steps * ELEMENTS, 1, 2 * f_steps});
            turn(up_ + at, 2 * d_steps, up_ + at);
        }
        for (int64_t step = 0; step < d_steps; step++) {
            bf16 *const left = slopes;  // nobody needs them yet
            pack_rows({number_at(call.down, kind, down_at()), call.weight_kind, call.F}, step * PAIR,
                      std::min(PAIR, D - step * PAIR), F, 2, left);
            weave_tiles(left, 2, f_steps, {down + step * ELEMENTS, 1, d_steps});
        }
    }

    void block(int64_t first, int64_t count, bool fresh) const {
        const int64_t pairs = amx::up(count, PAIR);
        for (int64_t pair = 0; pair < pairs; pair++)
            rows(first + pair * PAIR, std::min(PAIR, count - pair * PAIR), pair, pairs);
        d_gate.add(slopes_across, x_woven, pairs, fresh);
        d_up.add(slopes_across + 2 * f_steps * pairs * ELEMENTS, x_woven, pairs, fresh);
        d_down.add(dy_across, act_woven, pairs, fresh);
    }

    // 32 rows, the block's `pair` of so many: what they give to x, and their forms for the weights.
    void rows(int64_t first, int64_t count, int64_t pair, int64_t pairs) const {
        const int64_t D = call.D;
        pack_rows({call.x, call.x_kind, D, call.pair, call.K}, first, count, D, 2, x);
        weave_tiles(x, 2, d_steps, {x_woven + pair * ELEMENTS, 1, pairs});
        pack_rows({work.grad_y, 1, D, call.pair, call.K}, first, count, D, 2, dy);
        transpose_tiles(dy, 2, d_steps, {dy_across + pair * ELEMENTS, 1, pairs});
        float weights[PAIR];
        for (int64_t r = 0; r < PAIR; r++) weights[r] = r < count ? weight_of(call, first + r) : 0;
        alignas(64) float pulls[PAIR][TILE] = {};
        for (int64_t step = 0; step < f_steps; step++) square(step, weights, pair, pairs, pulls);
        product(slopes, back, count, 2 * f_steps, work.shares + (number * work.rows() + first) * D, 1, D);
        if (!work.pulls) return;
        float *const sums = work.pulls + number * work.rows() + first;
        for (int64_t r = 0; r < count; r++) sums[r] = _mm512_reduce_add_ps(_mm512_load_ps(pulls[r]));
    }

    // 32 columns of them: the slopes [gate, up] and silu(gate) · up · weight, as their products want
    // them.
    void square(int64_t step, const float *weights, int64_t pair, int64_t pairs,
                float (*pulls)[TILE]) const {
        const int64_t at = step * 2 * d_steps * ELEMENTS;
        const Square g(x, gate + at, d_steps), u(x, up_ + at, d_steps), d(dy, down + at, d_steps);
        alignas(64) bf16 act[2 * ELEMENTS];
        for (int64_t r = 0; r < PAIR; r++) {
            const Slopes32 found(g.row(r), u.row(r), d.row(r), weights[r]);
            bf16 *const left = slopes + (r / TILE * 2 * f_steps + step) * ELEMENTS + r % TILE * STEP;
            _mm512_store_si512(act + r * STEP, found.act);
            _mm512_store_si512(left, found.gate);
            _mm512_store_si512(left + f_steps * ELEMENTS, found.up);
            _mm512_store_ps(pulls[r], _mm512_add_ps(_mm512_load_ps(pulls[r]), found.pull));
        }
        weave_step(act, 1, 2, {act_woven + (2 * step * pairs + pair) * ELEMENTS, 1, pairs});
        for (const int64_t column : {step, f_steps + step})
            transpose_step(slopes + column * ELEMENTS, 2 * f_steps, 2,
                           {slopes_across + (2 * column * pairs + pair) * ELEMENTS, 1, pairs});
    }

    void write() const {
        const int kind = call.weight_kind;
        d_gate.write(number_at(work.grad_gate, kind, wide_at()), kind, call.D);
        d_up.write(number_at(work.grad_up, kind, wide_at()), kind, call.D);
        d_down.write(number_at(work.grad_down, kind, down_at()), kind, call.F);
    }
};

void Backward::run_slice(int64_t task) const {
    const Slice own(*this, task);
    const int64_t begin = call.starts[own.expert], end = call.starts[own.expert + 1];
    const Tiles configured;
    own.pack_weights();
    for (int64_t first = begin; first < end; first += BLOCK_ROWS)
        own.block(first, std::min(BLOCK_ROWS, end - first), first == begin);
    own.write();
}

void Backward::add_shares(int64_t block) const {
    const int64_t first = block * BLOCK_ROWS, end = std::min(first + BLOCK_ROWS, rows());
    for (int64_t row = first; row < end; row++) {
        for (int64_t at = 0; slices > 1 && at < call.D; at += 16) {
            const __mmask16 mask = within(call.D, at);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t number = 0; number < slices; number++)
                sum = _mm512_add_ps(sum, widened(_mm256_maskz_loadu_epi16(
                                             mask, shares + (number * rows() + row) * call.D + at)));
            store_rounded(grad_rows + row * call.D + at, mask, sum);
        }
        if (!pulls || call.pair[row] < 0) continue;
        float sum = 0;
        for (int64_t number = 0; number < slices; number++) sum += pulls[number * rows() + row];
        grad_weights[call.pair[row]] = sum;
    }
}

}  // namespace

void amx_training_mlp_backward(const TrainingMlp &call, const uint16_t *grad_y, uint16_t *grad_rows,
                               float *grad_weights, void *grad_gate, void *grad_up,
                               void *grad_down) {
    const Backward work(call, grad_y, grad_rows, grad_weights, grad_gate, grad_up, grad_down);
    auto slice = [&](int64_t task) { work.run_slice(task); };
    auto shares = [&](int64_t block) { work.add_shares(block); };
    const int64_t blocks = work.slices > 1 || work.pulls ? up(work.rows(), BLOCK_ROWS) : 0;
    const Stage stages[] = {stage_of(static_cast<int64_t>(work.busy.size()) * work.slices, slice),
                            stage_of(blocks, shares)};
    run_stages(stages, 2, 4 * work.rows() * (call.D + call.F));
}
TARGET_END
#else
#include "amx_training_mlp.h"
void amx_training_mlp_backward(const TrainingMlp &, const uint16_t *, uint16_t *, float *, void *,
                               void *, void *) {}
#endif
