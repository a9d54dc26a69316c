// What threads do for a call: which rows of a weight with which rows of x. The includer defines
// before what by_rows.h asks for.
#pragma once
#include "by_rows.h"
#include "cached_rows.h"
#include "convert.h"
#include "numbers.h"
#include "packing.h"
#include "threads.h"

namespace {

inline int64_t chunk_rows(int64_t row_bytes) {
    const int64_t rows = CHUNK_BYTES / (row_bytes + 1) / 16 * 16;
    return rows < 16 ? 16 : lesser(rows, CHUNK);
}

inline void write(void *out, int kind, int64_t at, const float *values, int64_t count) {
    if (kind == 0)
        std::memcpy(static_cast<float *>(out) + at, values, count * 4);
    else
        for (int64_t i = 0; i < count; i++) static_cast<bf16 *>(out)[at + i] = rounded(values[i]);
}

template <int BITS>
void linear_of(const Linear &call) {
    const int64_t M = call.M, H = call.H, O = call.O, I = call.I, size = packed_bytes(BITS, I);
    uint8_t *const packed = kept_room(M * H * size);
    auto pack_row = [&](int64_t row) {
        pack<BITS, PAIRED>(call.x, call.kind, row * I, I, packed + row * size);
    };
    const int64_t chunk = chunk_rows(code_bytes(BITS, I)), chunks = divided_up(O, chunk);
    auto multiply = [&](int64_t task) {
        const int64_t h = task / chunks, first = task % chunks * chunk;
        const int64_t last = lesser(first + chunk, O);
        const Matrix weight = matrix_of<BITS>(call.codes, call.scales, I, h * O);
        float made[SLICE][CHUNK];
        const uint8_t *rows[SLICE];
        for (int64_t begin = 0; begin < M; begin += SLICE) {
            const int64_t count = lesser(M - begin, SLICE);
            for (int64_t m = 0; m < count; m++) rows[m] = packed + ((begin + m) * H + h) * size;
            by_rows<BITS>(weight, first, last, rows, count, made);
            for (int64_t m = 0; m < count; m++) {
                if (call.bias)
                    for (int64_t o = first; o < last; o++)
                        made[m][o - first] += call.bias[h * O + o];
                write(call.out, call.kind, ((begin + m) * H + h) * O + first, made[m], last - first);
            }
        }
    };
    const Stage stages[] = {stage_of(M * H, pack_row), stage_of(H * chunks, multiply)};
    run_stages(stages, 2, H * O * code_bytes(BITS, I));
}

void linear(int bits, const Linear &call) {
    bits == 8 ? linear_of<8>(call) : bits == 4 ? linear_of<4>(call) : linear_of<16>(call);
}

// The pairs (token, choice) of one expert: begin .. end in the sorted order.
struct Segment {
    int64_t expert, begin, end;
};

// Sorts pairs by expert: pair[place] is where a pair was, m * K + k. A choice outside of 0 .. E - 1
// belongs to nobody. Returns the number of experts that have any; `counts` is room for E + 1.
inline int64_t sort_pairs(const Experts &call, int64_t *counts, Segment *segments, int64_t *pair) {
    const int64_t pairs = call.M * call.K;
    auto expert = [&](int64_t p) { return call.indices ? call.indices[p] : 0; };
    auto known = [&](int64_t p) { return expert(p) >= 0 && expert(p) < call.E; };
    std::memset(counts, 0, (call.E + 1) * 8);
    for (int64_t p = 0; p < pairs; p++)
        if (known(p)) counts[expert(p) + 1]++;
    int64_t found = 0;
    for (int64_t e = 0; e < call.E; e++) {
        if (counts[e + 1]) segments[found++] = {e, counts[e], counts[e] + counts[e + 1]};
        counts[e + 1] += counts[e];
    }
    for (int64_t p = 0; p < pairs; p++)
        if (known(p)) pair[counts[expert(p)]++] = p;
    return found;
}

template <int BITS>
void experts_of(const Experts &call) {
    const int64_t M = call.M, K = call.K, E = call.E, D = call.D, F = call.F, P = M * K;
    const int64_t x_size = packed_bytes(BITS, D), hidden_size = packed_bytes(BITS, F);
    const int64_t most = lesser(P, E);
    const int64_t integers = divided_up((E + 1) * 8 + most * 24 + P * 8, 64) * 64;
    const int64_t F_room = divided_up(F, 16) * 16, D_room = divided_up(D, 16) * 16;
    uint8_t *room = kept_room(integers + M * x_size + P * hidden_size + P * (F_room + D_room) * 4);
    int64_t *const counts = reinterpret_cast<int64_t *>(room);
    Segment *const segments = reinterpret_cast<Segment *>(counts + E + 1);
    int64_t *const pair = reinterpret_cast<int64_t *>(segments + most);
    uint8_t *const x = room + integers, *const packed_hidden = x + M * x_size;
    float *const hidden = reinterpret_cast<float *>(packed_hidden + P * hidden_size);  // [P, F]
    float *const made = hidden + P * F_room;  // [M, K, D]: as the choices came, not as sorted
    const int64_t used = sort_pairs(call, counts, segments, pair);
    const int64_t placed = used ? segments[used - 1].end : 0;

    auto pack_x = [&](int64_t m) { pack<BITS, PAIRED>(call.x, call.kind, m * D, D, x + m * x_size); };
    const int64_t F_chunk = chunk_rows(2 * code_bytes(BITS, D)), F_tasks = divided_up(F, F_chunk);
    auto gate_up = [&](int64_t task) {
        const Segment own = segments[task / F_tasks];
        const Matrix w = matrix_of<BITS>(call.gate_up_codes, call.gate_up_scales, D,
                                         own.expert * 2 * F);
        const int64_t first = task % F_tasks * F_chunk, last = lesser(first + F_chunk, F);
        float gates[SLICE][CHUNK], ups[SLICE][CHUNK];
        const uint8_t *rows[SLICE];
        for (int64_t begin = own.begin; begin < own.end; begin += SLICE) {
            const int64_t count = lesser(own.end - begin, SLICE);
            for (int64_t p = 0; p < count; p++) rows[p] = x + pair[begin + p] / K * x_size;
            by_rows<BITS>(w, first, last, rows, count, gates);
            by_rows<BITS>(w, F + first, F + last, rows, count, ups);
            for (int64_t p = 0; p < count; p++)
                for (int64_t f = 0; f < last - first; f++) {
                    const float gate = gates[p][f];
                    hidden[(begin + p) * F_room + first + f] =
                        gate / (1.0f + std::exp(-gate)) * ups[p][f];
                }
        }
    };
    auto pack_hidden = [&](int64_t p) {
        pack<BITS, PAIRED>(hidden, 0, p * F_room, F, packed_hidden + p * hidden_size);
    };
    const int64_t D_chunk = chunk_rows(code_bytes(BITS, F)), D_tasks = divided_up(D, D_chunk);
    auto down = [&](int64_t task) {
        const Segment own = segments[task / D_tasks];
        const Matrix w = matrix_of<BITS>(call.down_codes, call.down_scales, F, own.expert * D);
        const int64_t first = task % D_tasks * D_chunk, last = lesser(first + D_chunk, D);
        float part[SLICE][CHUNK];
        const uint8_t *rows[SLICE];
        for (int64_t begin = own.begin; begin < own.end; begin += SLICE) {
            const int64_t count = lesser(own.end - begin, SLICE);
            for (int64_t p = 0; p < count; p++) rows[p] = packed_hidden + (begin + p) * hidden_size;
            by_rows<BITS>(w, first, last, rows, count, part);
            for (int64_t p = 0; p < count; p++)
                std::memcpy(made + pair[begin + p] * D_room + first, part[p], (last - first) * 4);
        }
    };
    auto add_choices = [&](int64_t m) {  // always in the order of k
        float sums[CHUNK];
        for (int64_t first = 0; first < D; first += CHUNK) {
            const int64_t count = lesser(D - first, CHUNK);
            for (int64_t d = 0; d < count; d++) sums[d] = 0;
            for (int64_t k = 0; k < K; k++) {
                const int64_t p = m * K + k;
                if (call.indices && (call.indices[p] < 0 || call.indices[p] >= E)) continue;
                const float weight = call.weights ? call.weights[p] : 1.0f;
                const float *y = made + p * D_room + first;
                for (int64_t d = 0; d < count; d++) sums[d] = std::fma(weight, y[d], sums[d]);
            }
            write(call.out, call.kind, m * D + first, sums, count);
        }
    };
    const Stage stages[] = {stage_of(M, pack_x), stage_of(used * F_tasks, gate_up),
                            stage_of(placed, pack_hidden), stage_of(used * D_tasks, down),
                            stage_of(M, add_choices)};
    run_stages(stages, 5, used * (2 * F * code_bytes(BITS, D) + D * code_bytes(BITS, F)));
}

void experts(int bits, const Experts &call) {
    bits == 8 ? experts_of<8>(call) : bits == 4 ? experts_of<4>(call) : experts_of<16>(call);
}

}  // namespace
