// A weight times many rows, and the experts of many tokens, on AMX.
//
// A few rows of the weight (a slab) are made bfloat16 in the second-level cache, once, and multiplied
// with all rows of x: nothing is unpacked to memory, and each weight is read from there once. x is
// woven once, 16 rows (a group) at a time, into the right factors that the tiles want. A result is
// summed in one order whatever the number of rows and threads.
#if defined(__x86_64__)
#include "amx_matmul.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "amx.h"
#include "kernels.h"
#include "scratch.h"
#include "threads.h"

AMX_BEGIN
namespace {

using bf16 = uint16_t;
constexpr int64_t GROUP = amx::TILE;   // rows of x that share a tile
static_assert(BLOCK == amx::STEP);
constexpr int64_t TILE_DWORDS = 256;

inline int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of; }

struct Matrix {
    int bits;
    const uint8_t *codes;
    const uint16_t *scales;
    int64_t columns;

    int64_t steps() const { return whole(columns, BLOCK); }
    int64_t row_bytes() const { return code_bytes(bits, columns); }
    Matrix from(int64_t row) const {
        return {bits, codes + row * row_bytes(), scales ? scales + row * steps() : nullptr, columns};
    }
};

// Scales of a row as floats, from where one instruction spreads each over a register.
const float *scales_of(const Matrix &matrix) {
    thread_local Scratch scratch;
    const int64_t steps = matrix.steps();
    float *const scales = scratch.room<float>(whole(steps, 16) * 16);
    for (int64_t step = 0; step < steps; step += 16) {
        const __mmask16 mask = steps - step >= 16 ? 0xffff : (1u << (steps - step)) - 1;
        _mm512_store_ps(scales + step, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(
                                           mask, matrix.scales + step)));
    }
    return scales;
}

inline __m512 eight_levels(const uint8_t *codes) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes))));
}

// Row 0 of the matrix as bfloat16, filled up with zeros to whole steps.
void unpack_row(const Matrix &matrix, bf16 *to) {
    const int64_t steps = matrix.steps();
    if (matrix.bits == 16) {
        std::memcpy(to, matrix.codes, matrix.columns * 2);
        std::memset(to + matrix.columns, 0, (steps * BLOCK - matrix.columns) * 2);
        return;
    }
    const float *const scales = scales_of(matrix);
    if (matrix.bits == 8) {
        for (int64_t step = 0; step < steps; step++) {
            const __m512 scale = _mm512_set1_ps(scales[step]);
            const uint8_t *codes = matrix.codes + step * BLOCK;
            const __m512 low = _mm512_mul_ps(eight_levels(codes), scale);
            const __m512 high = _mm512_mul_ps(eight_levels(codes + 16), scale);
            _mm512_storeu_si512(to + step * BLOCK, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    } else {
        const __m512 levels = _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(LEVELS))));
        for (int64_t step = 0; step < steps; step++) {
            const __m512 numbers = _mm512_mul_ps(levels, _mm512_set1_ps(scales[step]));
            const __m512i table =
                _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(numbers));
            const __m256i pair = _mm256_cvtepu8_epi16(_mm_loadu_si128(
                reinterpret_cast<const __m128i *>(matrix.codes + step * (BLOCK / 2))));
            const __m256i low = _mm256_and_si256(pair, _mm256_set1_epi16(15));
            const __m256i high = _mm256_srli_epi16(pair, 4);
            const __m512i index = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            _mm512_storeu_si512(to + step * BLOCK, _mm512_permutexvar_epi16(index, table));
        }
    }
}

// Rows of a matrix as left factors.
struct Slab {
    const bf16 *rows;
    int64_t stride;  // in bfloat16
};

// A cache line more than a row: rows whose distance is a power of two would share one set of the cache.
int64_t slab_stride(const Matrix &matrix) { return (matrix.steps() + 1) * BLOCK; }

// `count` rows from `row` on, in `room` unless they can be taken where they are. Rows up to
// `padded` are zero.
Slab slab_of(const Matrix &matrix, int64_t row, int64_t count, int64_t padded, bf16 *room) {
    const int64_t width = matrix.steps() * BLOCK, stride = slab_stride(matrix);
    if (matrix.bits == 16 && width == matrix.columns && count == padded)
        return {reinterpret_cast<const bf16 *>(matrix.codes) + row * width, width};
    for (int64_t i = 0; i < count; i++) unpack_row(matrix.from(row + i), room + i * stride);
    for (int64_t i = count; i < padded; i++) std::memset(room + i * stride, 0, width * 2);
    return {room, stride};
}

// Up to 16 rows of x as right factors: [step][16 pairs][16 rows] dwords. rows[i] null: zeros.
void weave(const bf16 *const *rows, int64_t columns, uint32_t *woven) {
    for (int64_t step = 0; step < whole(columns, BLOCK); step++) {
        const int64_t left = columns - step * BLOCK;
        const __mmask32 mask = left >= BLOCK ? 0xffffffffu : (1u << left) - 1;
        __m512i dwords[16];
        for (int64_t i = 0; i < GROUP; i++)
            dwords[i] = rows[i] ? _mm512_maskz_loadu_epi16(mask, rows[i] + step * BLOCK)
                                : _mm512_setzero_si512();
        amx::transpose(dwords);
        for (int64_t i = 0; i < GROUP; i++)
            _mm512_storeu_si512(woven + step * TILE_DWORDS + 16 * i, dwords[i]);
    }
}

// 16 rows at a and 16 at b times one or two groups: a·x0, a·x1, b·x0, b·x1, each [16 rows][16].
inline void multiply(const bf16 *a, const bf16 *b, int64_t stride, const uint32_t *x0,
                     const uint32_t *x1, int64_t steps, float *out) {
    amx::written();
    _tile_zero(0);
    _tile_zero(2);
    if (x1) {
        _tile_zero(1);
        _tile_zero(3);
        for (int64_t step = 0; step < steps; step++) {
            _tile_loadd(4, a + step * BLOCK, stride * 2);
            _tile_loadd(5, b + step * BLOCK, stride * 2);
            _tile_loadd(6, x0 + step * TILE_DWORDS, 64);
            _tile_loadd(7, x1 + step * TILE_DWORDS, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(1, out + TILE_DWORDS, 64);
        _tile_stored(3, out + 3 * TILE_DWORDS, 64);
    } else {
        for (int64_t step = 0; step < steps; step++) {
            _tile_loadd(4, a + step * BLOCK, stride * 2);
            _tile_loadd(5, b + step * BLOCK, stride * 2);
            _tile_loadd(6, x0 + step * TILE_DWORDS, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
        }
    }
    _tile_stored(0, out, 64);
    _tile_stored(2, out + 2 * TILE_DWORDS, 64);
}

// [16 outputs][16 rows] to 16 rows of outputs.
inline void turned(const float *tile, __m512 rows[16]) {
    __m512i dwords[16];
    for (int i = 0; i < 16; i++) dwords[i] = _mm512_load_si512(tile + 16 * i);
    amx::transpose(dwords);
    for (int i = 0; i < 16; i++) rows[i] = (__m512)dwords[i];
}

// Pairs (token, expert) sorted by expert, each expert's in groups of up to 16.
struct Sorted {
    struct Group {
        int64_t expert, count;
        int64_t pairs[GROUP];
    };
    std::vector<Group> groups;
    std::vector<int64_t> experts;  // that have any
    std::vector<int64_t> first;    // group of experts[i]; one more at the end
};

// A choice outside of 0 .. E - 1 belongs to nobody.
Sorted sort_pairs(const int64_t *indices, int64_t pairs, int64_t E) {
    std::vector<std::vector<int64_t>> of(E);
    for (int64_t pair = 0; pair < pairs; pair++) if (indices[pair] >= 0 && indices[pair] < E) of[indices[pair]].push_back(pair);
    Sorted sorted;
    for (int64_t expert = 0; expert < E; expert++) {
        if (of[expert].empty()) continue;
        sorted.experts.push_back(expert);
        sorted.first.push_back(sorted.groups.size());
        const auto &own = of[expert];
        for (size_t at = 0; at < own.size(); at += GROUP) {
            Sorted::Group group = {expert, std::min<int64_t>(GROUP, own.size() - at), {}};
            std::copy_n(own.begin() + at, group.count, group.pairs);
            sorted.groups.push_back(group);
        }
    }
    sorted.first.push_back(sorted.groups.size());
    return sorted;
}

// silu(gate)·up·weight of [16 f][16 rows] tiles, as half a step of the next right factor.
void activate(const float *gate, const float *up, __m512 weight, uint32_t *woven) {
    __m512 hidden[16];
    for (int f = 0; f < 16; f++) {
        const __m512 g = _mm512_load_ps(gate + 16 * f);
        const __m512 one = _mm512_set1_ps(1.0f);
        const __m512 sigmoid = _mm512_div_ps(
            one, _mm512_add_ps(one, amx::exp(_mm512_sub_ps(_mm512_setzero_ps(), g))));
        hidden[f] = _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(g, sigmoid),
                                                _mm512_load_ps(up + 16 * f)), weight);
    }
    for (int j = 0; j < 8; j++)
        _mm512_storeu_si512(woven + 16 * j, amx::woven(hidden[2 * j], hidden[2 * j + 1]));
}

bf16 *slab_room(size_t count) {
    thread_local Scratch scratch;
    return scratch.room<bf16>(count);
}

constexpr int64_t SLAB_F = 32, SLAB_D = 64;

}  // namespace

bool amx_matmul_takes() {
    return amx::usable();
}

void amx_linear(int bits, const bf16 *x, int64_t x_stride, const void *codes,
                const uint16_t *scales, const float *bias, bf16 *out, int64_t out_stride, int64_t M,
                int64_t O, int64_t I) {
    const Matrix matrix = {bits, static_cast<const uint8_t *>(codes), scales, I};
    const int64_t steps = matrix.steps(), groups = whole(M, GROUP);
    thread_local Scratch scratch;
    uint32_t *const woven = scratch.room<uint32_t>(groups * steps * TILE_DWORDS);
    parallel(groups, M * I * 2, [&](int64_t group) {
        const bf16 *rows[GROUP] = {};
        for (int64_t i = 0; i < std::min(GROUP, M - group * GROUP); i++)
            rows[i] = x + (group * GROUP + i) * x_stride;
        weave(rows, I, woven + group * steps * TILE_DWORDS);
    });
    // Wide slabs read x less often, narrow ones keep all threads busy.
    const int64_t slab_rows = M <= 64 ? 32 : O >= 2048 ? 128 : 64;
    parallel(whole(O, slab_rows), O * matrix.row_bytes(), [&](int64_t task) {
        const int64_t first = task * slab_rows, count = std::min(slab_rows, O - first);
        const int64_t padded = whole(count, 32) * 32;
        const Slab slab = slab_of(matrix, first, count, padded,
                                  slab_room(slab_rows * slab_stride(matrix)));
        const amx::Tiles tiles;
        alignas(64) float made[4 * TILE_DWORDS];
        for (int64_t group = 0; group < groups; group += 2)
            for (int64_t row = 0; row < padded; row += 32) {
                const uint32_t *x0 = woven + group * steps * TILE_DWORDS;
                const bool both = group + 1 < groups;
                multiply(slab.rows + row * slab.stride, slab.rows + (row + 16) * slab.stride,
                         slab.stride, x0, both ? x0 + steps * TILE_DWORDS : nullptr, steps, made);
                for (int64_t half = 0; half < 2; half++) {
                    const int64_t at = first + row + 16 * half, left = O - at;
                    if (left <= 0) break;
                    const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
                    const __m512 added =
                        bias ? _mm512_maskz_loadu_ps(mask, bias + at) : _mm512_setzero_ps();
                    for (int64_t g = 0; g < 1 + both; g++) {
                        __m512 rows[16];
                        turned(made + (2 * half + g) * TILE_DWORDS, rows);
                        const int64_t m = (group + g) * GROUP;
                        for (int64_t i = 0; i < std::min(GROUP, M - m); i++)
                            _mm256_mask_storeu_epi16(
                                out + (m + i) * out_stride + at, mask,
                                (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(rows[i], added)));
                    }
                }
            }
    });
}

void amx_experts(int bits, const bf16 *x, const int64_t *indices, const float *weights,
                 const void *gate_up, const uint16_t *gate_up_scales, const void *down,
                 const uint16_t *down_scales, bf16 *out, int64_t M, int64_t K, int64_t E, int64_t D,
                 int64_t F) {
    const Sorted sorted = sort_pairs(indices, M * K, E);
    const Matrix wide = {bits, static_cast<const uint8_t *>(gate_up), gate_up_scales, D};
    const Matrix back = {bits, static_cast<const uint8_t *>(down), down_scales, F};
    const int64_t groups = sorted.groups.size(), experts = sorted.experts.size();
    const int64_t x_size = wide.steps() * TILE_DWORDS, h_size = back.steps() * TILE_DWORDS;
    thread_local Scratch x_scratch, h_scratch, y_scratch;
    uint32_t *const woven = x_scratch.room<uint32_t>(groups * x_size);
    uint32_t *const hidden = h_scratch.room<uint32_t>(groups * h_size);
    float *const y = y_scratch.room<float>(M * K * D);
    parallel(groups, M * K * D * 2, [&](int64_t g) {
        const Sorted::Group &group = sorted.groups[g];
        const bf16 *rows[GROUP] = {};
        for (int64_t i = 0; i < group.count; i++) rows[i] = x + group.pairs[i] / K * D;
        weave(rows, D, woven + g * x_size);
    });
    const int64_t f_slabs = whole(F, SLAB_F);
    parallel(experts * f_slabs, experts * 2 * F * wide.row_bytes(), [&](int64_t task) {
        const int64_t e = task / f_slabs, first = task % f_slabs * SLAB_F;
        const int64_t count = std::min(SLAB_F, F - first), stride = slab_stride(wide);
        const Matrix own = wide.from(sorted.experts[e] * 2 * F);
        bf16 *const room = slab_room(2 * SLAB_F * stride);
        const Slab gate = slab_of(own, first, count, SLAB_F, room);
        const Slab up = slab_of(own, F + first, count, SLAB_F, room + SLAB_F * stride);
        const amx::Tiles tiles;
        alignas(64) float made[4 * TILE_DWORDS];
        for (int64_t g = sorted.first[e]; g < sorted.first[e + 1]; g += 2)
            for (int64_t f = 0; f < SLAB_F; f += 16) {
                const bool both = g + 1 < sorted.first[e + 1];
                const uint32_t *x0 = woven + g * x_size;
                multiply(gate.rows + f * gate.stride, up.rows + f * up.stride, gate.stride, x0,
                         both ? x0 + x_size : nullptr, wide.steps(), made);
                for (int64_t i = 0; i < 1 + both; i++) {
                    alignas(64) float factor[GROUP] = {};
                    const Sorted::Group &group = sorted.groups[g + i];
                    for (int64_t p = 0; p < group.count; p++) factor[p] = weights[group.pairs[p]];
                    activate(made + i * TILE_DWORDS, made + (2 + i) * TILE_DWORDS,
                             _mm512_load_ps(factor),
                             hidden + (g + i) * h_size + first / BLOCK * TILE_DWORDS + f * 8);
                }
            }
    });
    const int64_t d_slabs = whole(D, SLAB_D);
    parallel(experts * d_slabs, experts * D * back.row_bytes(), [&](int64_t task) {
        const int64_t e = task / d_slabs, first = task % d_slabs * SLAB_D;
        const int64_t count = std::min(SLAB_D, D - first), padded = whole(count, 32) * 32;
        const Slab slab = slab_of(back.from(sorted.experts[e] * D), first, count, padded,
                                  slab_room(SLAB_D * slab_stride(back)));
        const amx::Tiles tiles;
        alignas(64) float made[4 * TILE_DWORDS];
        for (int64_t g = sorted.first[e]; g < sorted.first[e + 1]; g += 2)
            for (int64_t row = 0; row < padded; row += 32) {
                const bool both = g + 1 < sorted.first[e + 1];
                const uint32_t *h0 = hidden + g * h_size;
                multiply(slab.rows + row * slab.stride, slab.rows + (row + 16) * slab.stride,
                         slab.stride, h0, both ? h0 + h_size : nullptr, back.steps(), made);
                for (int64_t half = 0; half < 2; half++) {
                    const int64_t at = first + row + 16 * half, left = D - at;
                    if (left <= 0) break;
                    const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
                    for (int64_t i = 0; i < 1 + both; i++) {
                        __m512 rows[16];
                        turned(made + (2 * half + i) * TILE_DWORDS, rows);
                        const Sorted::Group &group = sorted.groups[g + i];
                        for (int64_t p = 0; p < group.count; p++)
                            _mm512_mask_storeu_ps(y + group.pairs[p] * D + at, mask, rows[p]);
                    }
                }
            }
    });
    parallel(M, M * K * D * 4, [&](int64_t m) {
        for (int64_t at = 0; at < D; at += 16) {
            const __mmask16 mask = D - at >= 16 ? 0xffff : (1u << (D - at)) - 1;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t k = m * K; k < (m + 1) * K; k++)
                if (indices[k] >= 0 && indices[k] < E)
                    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, y + k * D + at));
            _mm256_mask_storeu_epi16(out + m * D + at, mask, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    });
}
TARGET_END
#endif
