// Projections of the same rows on AMX, and their gradients.
//
// The layers are worked on as one whose outputs lie beside each other, each filled up to 32. Forward,
// a task is a block of rows: packed once, multiplied with every weight. Backward, a task is a part of
// the rows, block by block: dy and x are packed once for dx and for the part's share of dW, whose
// sums stay in the second-level cache. The shares are added up at the end, in their order.
#if defined(__x86_64__)
#include "amx_training_linear.h"

#include "amx_weight_gradients.h"
#include "scratch.h"
#include "threads.h"

AMX_BEGIN
namespace {

using namespace amx;

constexpr int64_t PART = 1024;  // rows whose share of dW is one task, about
constexpr int64_t PARTS = 16;   // at most: each share is as large as dW

struct Linear {
    const TrainingLinear &call;
    int64_t d_steps, o_steps;  // of all layers together

    explicit Linear(const TrainingLinear &call) : call(call), d_steps(up(call.D, STEP)), o_steps(0) {
        for (int64_t i = 0; i < call.count; i++) o_steps += up(call.layers[i].O, STEP);
    }

    int64_t matrix() const { return 2 * o_steps * d_steps * ELEMENTS; }
    Rows x() const { return {call.x, call.x_kind, call.D}; }

    // A layer's 32 outputs from `row` on, which are one step of the whole.
    struct Outputs {
        const Projection &layer;
        int64_t row, count;
    };
    Outputs outputs(int64_t step) const {
        const Projection *layer = call.layers;
        for (; step >= up(layer->O, STEP); layer++) step -= up(layer->O, STEP);
        return {*layer, step * STEP, std::min<int64_t>(STEP, layer->O - step * STEP)};
    }

    // 32 rows of the weights as left tiles [2][d_steps].
    void pack_weight(int64_t step, bf16 *to) const {
        const Outputs own = outputs(step);
        pack_rows({own.layer.weight, call.weight_kind, call.D}, own.row, own.count, call.D, 2, to);
    }
};

struct Forward : Linear {
    bf16 *weights;  // turned [2 · o_steps][d_steps]

    explicit Forward(const TrainingLinear &call) : Linear(call) {
        thread_local Scratch scratch;
        weights = scratch.room<bf16>(matrix());
    }

    void pack(int64_t step) const {
        bf16 *const own = weights + step * 2 * d_steps * ELEMENTS;
        pack_weight(step, own);
        turn(own, 2 * d_steps, own);
    }

    void block(int64_t number) const {
        const int64_t first = number * BLOCK_ROWS, count = std::min(BLOCK_ROWS, call.M - first);
        thread_local Scratch scratch;
        bf16 *const left = scratch.room<bf16>(2 * d_steps * ELEMENTS);
        const Tiles configured;
        for (int64_t at = first; at < first + count; at += PAIR) {
            const int64_t rows = std::min(PAIR, first + count - at);
            pack_rows(x(), at, rows, call.D, 2, left);
            const bf16 *weight = weights;
            for (int64_t i = 0; i < call.count; i++) {
                const int64_t O = call.layers[i].O;
                product(left, weight, rows, d_steps, call.layers[i].y + at * O, 1, O);
                weight += up(O, STEP) * 2 * d_steps * ELEMENTS;
            }
        }
    }
};

struct Backward : Linear {
    void *grad_x;
    int64_t parts, part;  // how many, and of how many rows
    bf16 *weights;        // woven [2 · d_steps][o_steps]
    float *shares;        // of dW [parts][2 · o_steps][2 · d_steps] tiles

    Backward(const TrainingLinear &call, void *grad_x) : Linear(call), grad_x(grad_x) {
        parts = std::min(up(call.M, PART), PARTS);
        if (parts > 1) parts = up(parts, 2) * 2;  // no thread shall be idle
        part = up(up(call.M, parts), PAIR) * PAIR;
        parts = up(call.M, part);
        thread_local Scratch weights_room, shares_room;
        weights = weights_room.room<bf16>(matrix());
        shares = shares_room.room<float>(parts * share());
    }

    int64_t share() const { return 4 * o_steps * d_steps * SUMS; }

    void pack(int64_t step) const {
        bf16 *const left = reinterpret_cast<bf16 *>(kept_room(2 * d_steps * ELEMENTS * sizeof(bf16)));
        pack_weight(step, left);
        weave_tiles(left, 2, d_steps, {weights + step * ELEMENTS, 1, o_steps});
    }

    void run(int64_t number) const {
        const int64_t begin = number * part, end = std::min(begin + part, call.M);
        const Tiles configured;
        for (int64_t first = begin; first < end; first += BLOCK_ROWS)
            block(first, std::min(BLOCK_ROWS, end - first), shares + number * share(), first == begin);
    }

    void block(int64_t first, int64_t count, float *sums, bool fresh) const {
        const int64_t steps = up(count, PAIR);
        thread_local Scratch scratch;
        bf16 *const left = scratch.room<bf16>((BLOCK_TILES + 2) * (d_steps + o_steps) * ELEMENTS);
        bf16 *const woven = left + 2 * (d_steps + o_steps) * ELEMENTS;
        bf16 *const across = woven + BLOCK_TILES * d_steps * ELEMENTS;
        for (int64_t step = 0; step < steps; step++) {
            const int64_t at = first + step * PAIR, rows = std::min(PAIR, count - step * PAIR);
            pack_rows(x(), at, rows, call.D, 2, left);
            weave_tiles(left, 2, d_steps, {woven + step * ELEMENTS, 1, steps});
            bf16 *own = left;
            for (int64_t i = 0; i < call.count; i++) {
                const int64_t O = call.layers[i].O;
                pack_rows({call.layers[i].y, 1, O}, at, rows, O, 2, own, o_steps);
                own += up(O, STEP) * ELEMENTS;
            }
            transpose_tiles(left, 2, o_steps, {across + step * ELEMENTS, 1, steps});
            if (grad_x)
                product(left, weights, rows, o_steps, number_at(grad_x, call.x_kind, at * call.D),
                        call.x_kind, call.D);
        }
        multiply({across, steps, 1}, {woven, steps, 1}, {sums, 2 * d_steps, 1}, 2 * o_steps,
                 2 * d_steps, steps, fresh);
    }

    // 32 rows of dW.
    void add(int64_t step) const {
        const Outputs own = outputs(step);
        for (int64_t r = 0; r < own.count; r++) {
            const int64_t tile = (step * 2 + r / TILE) * 2 * d_steps;
            void *const to = number_at(own.layer.grad_weight, call.weight_kind, (own.row + r) * call.D);
            for (int64_t at = 0; at < call.D; at += PAIR) {
                const float *from = shares + (tile + at / TILE) * SUMS + r % TILE * TILE;
                __m512 low = _mm512_load_ps(from), high = _mm512_load_ps(from + SUMS);
                for (int64_t i = 1; i < parts; i++) {
                    from += share();
                    low = _mm512_add_ps(low, _mm512_load_ps(from));
                    high = _mm512_add_ps(high, _mm512_load_ps(from + SUMS));
                }
                store_numbers(to, call.weight_kind, at, within(call.D, at), low, high);
            }
        }
    }
};

}  // namespace

void amx_training_linear(const TrainingLinear &call) {
    const Forward work(call);
    auto pack = [&](int64_t step) { work.pack(step); };
    auto block = [&](int64_t number) { work.block(number); };
    const Stage stages[] = {stage_of(work.o_steps, pack), stage_of(up(call.M, BLOCK_ROWS), block)};
    run_stages(stages, 2, 2 * call.M * (call.D + work.o_steps * STEP));
}

void amx_training_linear_backward(const TrainingLinear &call, void *grad_x) {
    const Backward work(call, grad_x);
    auto pack = [&](int64_t step) { work.pack(step); };
    auto part = [&](int64_t number) { work.run(number); };
    auto add = [&](int64_t step) { work.add(step); };
    const Stage stages[] = {stage_of(grad_x ? work.o_steps : 0, pack), stage_of(work.parts, part),
                            stage_of(work.o_steps, add)};
    run_stages(stages, 3, 4 * call.M * (call.D + work.o_steps * STEP));
}
TARGET_END
#else
#include "amx_training_linear.h"
void amx_training_linear(const TrainingLinear &) {}
void amx_training_linear_backward(const TrainingLinear &, void *) {}
#endif
