// The head's cross-entropy on AMX: logits are made in squares of 32 × 32, used and forgotten.
//
// Forward, a task is a block of rows. The head goes by in groups of columns; as in FlashAttention
// (arXiv:2205.14135) a row's weights e^(logit − largest so far) are multiplied with the group at once,
// and what was summed is made smaller when a larger logit comes. At the end a row's
//   grad_x = Σ e · head / Σ e − head[label].
// Backward, a task is a slice of the head's rows. All of x goes by, the logits are found again, and
//   grad_head = Σ scale · (softmax − [label]) · x
// is summed in the second-level cache. Neither keeps logits: memory is that of x and the head.
#if defined(__x86_64__)
#include "amx_training_head.h"

#include <cmath>
#include <limits>

#include "amx_weight_gradients.h"
#include "scratch.h"
#include "threads.h"

AMX_BEGIN
namespace {

using namespace amx;

constexpr int64_t GROUP = 256;  // columns of the head multiplied before their softmax, forward
constexpr int64_t SQUARES = GROUP / PAIR;
constexpr int64_t SLICE = 1 << 17;  // numbers of the head in a slice, backward, about
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Forward {
    const TrainingHead &call;
    float *nats, *sums;
    bf16 *grad_x;
    int64_t d_steps, groups;
    bf16 *turned, *woven;  // of each group: turned [GROUP/16][d_steps], woven [2 · d_steps][GROUP/32]

    Forward(const TrainingHead &call, float *nats, float *sums, bf16 *grad_x)
        : call(call), nats(nats), sums(sums), grad_x(grad_x), d_steps(amx::up(call.D, STEP)),
          groups(amx::up(call.W, GROUP)) {
        thread_local Scratch scratch;
        turned = scratch.room<bf16>((grad_x ? 2 : 1) * groups * group_size());
        woven = turned + groups * group_size();
    }

    int64_t group_size() const { return GROUP / TILE * d_steps * ELEMENTS; }
    int64_t columns(int64_t group) const { return std::min(GROUP, call.W - group * GROUP); }

    void pack(int64_t group) const {
        bf16 *const own = turned + group * group_size();
        pack_rows({call.head, call.head_kind, call.D}, group * GROUP, columns(group), call.D,
                  GROUP / TILE, own);
        if (grad_x)
            weave_tiles(own, GROUP / TILE, d_steps, {woven + group * group_size(), 1, SQUARES});
        turn(own, GROUP / TILE * d_steps, own);
    }

    void run(int64_t block) const;
};

// What a block of rows works with.
struct Block {
    const Forward &work;
    int64_t first, count, d_steps, d_tiles;
    bf16 *x;          // left [tiles][d_steps]
    bf16 *weights;    // e^..., left [2][SQUARES], of 32 rows
    Square *logits;   // [SQUARES], of 32 rows
    float *products;  // Σ e · head: sums [tiles][d_tiles]
    float *largest, *totals, *picked;  // [rows]: to base 2, Σ e in 16 parts, the label's to base 2

    Block(const Forward &work, int64_t block)
        : work(work), first(block * BLOCK_ROWS), count(std::min(BLOCK_ROWS, work.call.M - first)),
          d_steps(work.d_steps), d_tiles(2 * d_steps) {
        thread_local Scratch scratch;
        lay_out(scratch, [&](Room &room) { lay(room); });
        pack_rows({work.call.x, work.call.x_kind, work.call.D}, first, count, work.call.D, tiles(), x);
        std::memset(products, 0, tiles() * d_tiles * SUMS * sizeof(float));
        std::memset(totals, 0, BLOCK_ROWS * TILE * sizeof(float));
        std::fill_n(largest, BLOCK_ROWS, NOTHING);
    }

    int64_t tiles() const { return amx::up(count, PAIR) * 2; }

    void lay(Room &room) {
        x = room.take<bf16>(BLOCK_TILES * d_steps * ELEMENTS);
        weights = room.take<bf16>(2 * SQUARES * ELEMENTS);
        logits = room.take<Square>(SQUARES);
        products = room.take<float>(BLOCK_TILES * d_tiles * SUMS);
        largest = room.take<float>(BLOCK_ROWS);
        totals = room.take<float>(BLOCK_ROWS * TILE);
        picked = room.take<float>(BLOCK_ROWS);
    }

    // 32 rows from tile `tile` on, with a group of the head.
    void look(int64_t tile, int64_t group) const {
        const int64_t columns = work.columns(group);
        const bf16 *const turned = work.turned + group * work.group_size();
        for (int64_t square = 0; square < amx::up(columns, PAIR); square++)
            new (logits + square) Square(x + tile * d_steps * ELEMENTS,
                                         turned + square * 2 * d_steps * ELEMENTS, d_steps);
        for (int64_t r = 0; r < PAIR; r++)
            columns == GROUP ? soften<false>(tile * TILE + r, group) : soften<true>(tile * TILE + r, group);
        if (work.grad_x)
            multiply({weights, SQUARES, 1}, {work.woven + group * work.group_size(), SQUARES, 1},
                     {products + tile * d_tiles * SUMS, d_tiles, 1}, 2, d_tiles, SQUARES, false);
    }

    // A row's logits with a group to weights, against the largest so far.
    template <bool Masked> void soften(int64_t row, int64_t group) const {
        const int64_t columns = work.columns(group), squares = Masked ? amx::up(columns, PAIR) : SQUARES;
        const int64_t label = row < count ? work.call.labels[first + row] - group * GROUP : -1;
        if (label >= 0 && label < columns)
            picked[row] = LOG2E * logits[label / PAIR].row(row % PAIR)[label % PAIR / TILE * SUMS +
                                                                       label % TILE];
        const auto logit = [&](int64_t square, int half) {
            const __m512 found = _mm512_load_ps(logits[square].row(row % PAIR) + half * SUMS);
            if (!Masked) return found;
            const __mmask16 mask = within(columns, square * PAIR + half * TILE);
            return _mm512_mask_mov_ps(_mm512_set1_ps(NOTHING), mask, found);
        };
        __m512 low = _mm512_set1_ps(NOTHING), high = low;
        for (int64_t square = 0; square < squares; square++) {
            low = _mm512_max_ps(low, logit(square, 0));
            high = _mm512_max_ps(high, logit(square, 1));
        }
        const float now = LOG2E * _mm512_reduce_max_ps(_mm512_max_ps(low, high));
        __m512 total = _mm512_load_ps(totals + row * TILE);
        if (now > largest[row]) {
            const __m512 shrunk = amx::exp2(_mm512_set1_ps(largest[row] - now));
            largest[row] = now;
            total = _mm512_mul_ps(total, shrunk);
            for (float *at = products_of(row); work.grad_x && at < products_of(row) + d_tiles * SUMS;
                 at += SUMS)
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrunk));
        }
        const __m512 by = _mm512_set1_ps(LOG2E), against = _mm512_set1_ps(largest[row]);
        bf16 *const to = weights + row % PAIR / TILE * SQUARES * ELEMENTS + row % TILE * STEP;
        for (int64_t square = 0; square < SQUARES; square++) {
            if (Masked && square >= squares) {
                _mm512_store_si512(to + square * ELEMENTS, _mm512_setzero_si512());
                continue;
            }
            low = amx::exp2(_mm512_fmsub_ps(logit(square, 0), by, against));
            high = amx::exp2(_mm512_fmsub_ps(logit(square, 1), by, against));
            total = _mm512_add_ps(total, _mm512_add_ps(low, high));
            _mm512_store_si512(to + square * ELEMENTS, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        _mm512_store_ps(totals + row * TILE, total);
    }

    float *products_of(int64_t row) const {
        return products + row / TILE * d_tiles * SUMS + row % TILE * TILE;
    }

    void write(int64_t row) const {
        const TrainingHead &call = work.call;
        const float total = _mm512_reduce_add_ps(_mm512_load_ps(totals + row * TILE));
        const int64_t at = first + row, label = call.labels[at];
        work.sums[at] = largest[row] + std::log2(total);
        work.nats[at] = label < 0 ? 0 : LN2 * (work.sums[at] - picked[row]);
        if (!work.grad_x) return;
        const __m512 by = _mm512_set1_ps(1 / total);
        const auto *const own =
            label < 0 ? nullptr : static_cast<const uint8_t *>(number_at(call.head, call.head_kind,
                                                                         label * call.D));
        for (int64_t d = 0; d < call.D; d += PAIR) {
            const float *const sum = products_of(row) + d / TILE * SUMS;
            const __m512i of_label = numbers_of(own, call.head_kind, d, call.D);  // as it multiplied
            const __m512 low = _mm512_fmsub_ps(_mm512_load_ps(sum), by,
                                               widened(_mm512_castsi512_si256(of_label)));
            const __m512 high = _mm512_fmsub_ps(_mm512_load_ps(sum + SUMS), by,
                                                widened(_mm512_extracti64x4_epi64(of_label, 1)));
            const __mmask32 mask = within(call.D, d);
            const __m512i found = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            _mm512_mask_storeu_epi16(work.grad_x + at * call.D + d, mask,
                                     label < 0 ? _mm512_setzero_si512() : found);
        }
    }
};

void Forward::run(int64_t number) const {
    const Tiles configured;
    const Block block(*this, number);
    for (int64_t group = 0; group < groups; group++)
        for (int64_t tile = 0; tile < block.tiles(); tile += 2) block.look(tile, group);
    for (int64_t row = 0; row < block.count; row++) block.write(row);
}

struct Backward {
    const TrainingHead &call;
    const float *sums, *scale;
    void *grad_head;
    int64_t slice;  // rows of the head in one

    Backward(const TrainingHead &call, const float *sums, const float *scale, void *grad_head)
        : call(call), sums(sums), scale(scale), grad_head(grad_head),
          slice(std::clamp<int64_t>(SLICE / call.D / PAIR, 1, 512 / PAIR) * PAIR) {}

    int64_t slices() const { return amx::up(call.W, slice); }
    void run(int64_t task) const;
};

// What a slice of the head works with.
struct Slice {
    const Backward &work;
    const TrainingHead &call;
    int64_t column, columns, d_steps, squares;
    bf16 *turned, *x, *x_woven;  // the slice's rows [2 · squares][d_steps]; a block's rows
    bf16 *across;                // slopes of the logits, transposed [2 · squares][of 32 rows]
    WeightGradient sum;

    Slice(const Backward &work, int64_t task)
        : work(work), call(work.call), column(task * work.slice),
          columns(std::min(work.slice, call.W - column)), d_steps(amx::up(call.D, STEP)),
          squares(amx::up(columns, PAIR)) {
        thread_local Scratch scratch;
        lay_out(scratch, [&](Room &room) { lay(room); });
        pack_rows({call.head, call.head_kind, call.D}, column, columns, call.D, 2 * squares, turned);
        turn(turned, 2 * squares * d_steps, turned);
    }

    void lay(Room &room) {
        turned = room.take<bf16>(2 * squares * d_steps * ELEMENTS);
        x = room.take<bf16>(BLOCK_TILES * d_steps * ELEMENTS);
        x_woven = room.take<bf16>(BLOCK_TILES * d_steps * ELEMENTS);
        across = room.take<bf16>(squares * BLOCK_TILES * ELEMENTS);
        sum = {columns, call.D, room.take<float>(WeightGradient::room(columns, call.D))};
    }

    void add(int64_t first) const {
        const int64_t count = std::min(BLOCK_ROWS, call.M - first), tiles = amx::up(count, PAIR) * 2;
        pack_rows({call.x, call.x_kind, call.D}, first, count, call.D, tiles, x);
        weave_tiles(x, tiles, d_steps, {x_woven, 1, tiles / 2});
        for (int64_t tile = 0; tile < tiles; tile += 2)
            for (int64_t square = 0; square < squares; square++)
                look(first + tile * TILE, count - tile * TILE, square, x + tile * d_steps * ELEMENTS,
                     {across + (square * tiles + tile / 2) * ELEMENTS, 1, tiles / 2});
        sum.add(across, x_woven, tiles / 2, first == 0);
    }

    // The slopes of 32 rows' logits with 32 columns.
    void look(int64_t first, int64_t count, int64_t square, const bf16 *rows, const Woven &to) const {
        const Square logits(rows, turned + square * 2 * d_steps * ELEMENTS, d_steps);
        alignas(64) bf16 slopes[2 * ELEMENTS];
        const __m512 by = _mm512_set1_ps(LOG2E), one = _mm512_set1_ps(1);
        for (int64_t r = 0; r < PAIR; r++) {
            const bool there = r < count;
            const __m512 scale = _mm512_set1_ps(there ? work.scale[first + r] : 0);
            const __m512 against = _mm512_set1_ps(there ? work.sums[first + r] : 0);
            const int64_t label = (there ? call.labels[first + r] : -1) - column - square * PAIR;
            const __mmask32 is_label = label >= 0 && label < PAIR ? __mmask32(1) << label : 0;
            __m512 low = amx::exp2(_mm512_fmsub_ps(_mm512_load_ps(logits.row(r)), by, against));
            __m512 high = amx::exp2(_mm512_fmsub_ps(_mm512_load_ps(logits.row(r) + SUMS), by, against));
            low = _mm512_mul_ps(scale, _mm512_mask_sub_ps(low, is_label & 0xffff, low, one));
            high = _mm512_mul_ps(scale, _mm512_mask_sub_ps(high, is_label >> 16, high, one));
            _mm512_store_si512(slopes + r * STEP, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        transpose_step(slopes, 1, 2, to);
    }
};

void Backward::run(int64_t task) const {
    const Tiles configured;
    const Slice own(*this, task);
    for (int64_t first = 0; first < call.M; first += BLOCK_ROWS) own.add(first);
    own.sum.write(number_at(grad_head, call.head_kind, own.column * call.D), call.head_kind, call.D);
}

}  // namespace

void amx_training_head(const TrainingHead &call, float *nats, float *sums, uint16_t *grad_x) {
    const Forward work(call, nats, sums, grad_x);
    auto pack = [&](int64_t group) { work.pack(group); };
    auto block = [&](int64_t number) { work.run(number); };
    const Stage stages[] = {stage_of(work.groups, pack), stage_of(amx::up(call.M, BLOCK_ROWS), block)};
    run_stages(stages, 2, 2 * (call.M + call.W) * call.D);
}

void amx_training_head_backward(const TrainingHead &call, const float *sums, const float *scale,
                                void *grad_head) {
    const Backward work(call, sums, scale, grad_head);
    parallel(work.slices(), 2 * (call.M + call.W) * call.D, [&](int64_t task) { work.run(task); });
}
TARGET_END
#else
#include "amx_training_head.h"
void amx_training_head(const TrainingHead &, float *, float *, uint16_t *) {}
void amx_training_head_backward(const TrainingHead &, const float *, const float *, void *) {}
#endif
