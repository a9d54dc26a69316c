// Dot products of NEON; the includer says by NEON_DOT whether the processor has `sdot`.
#pragma once
#include "numbers.h"
#include "packing.h"

namespace {

constexpr int TILE = 4;
constexpr bool PAIRED = false;
constexpr int FOUR = 4;           // blocks whose sums are the lanes of one register
constexpr int64_t AHEAD = 4096;  // bytes

struct Levels {  // of one block
    int8x16_t first, second;
};

template <int BITS>
inline Levels levels_of(const uint8_t *codes) {
    if constexpr (BITS == 8) {
        const int8_t *levels = reinterpret_cast<const int8_t *>(codes);
        return {vld1q_s8(levels), vld1q_s8(levels + 16)};
    } else {
        const int8x16_t table = vld1q_s8(LEVELS);
        const uint8x16_t raw = vld1q_u8(codes);
        return {vqtbl1q_s8(table, vandq_u8(raw, vdupq_n_u8(15))),
                vqtbl1q_s8(table, vshrq_n_u8(raw, 4))};
    }
}

// Four partial sums of a block's products.
inline int32x4_t partial(const Levels &levels, const int8_t *x) {
    const int8x16_t first = vld1q_s8(x), second = vld1q_s8(x + 16);
#if NEON_DOT
    return vdotq_s32(vdotq_s32(vdupq_n_s32(0), levels.first, first), levels.second, second);
#else
    // Two products of at most 127 · 127 fit into 16 bits.
    int16x8_t pairs = vmull_s8(vget_low_s8(levels.first), vget_low_s8(first));
    pairs = vmlal_s8(pairs, vget_high_s8(levels.first), vget_high_s8(first));
    int16x8_t more = vmull_s8(vget_low_s8(levels.second), vget_low_s8(second));
    more = vmlal_s8(more, vget_high_s8(levels.second), vget_high_s8(second));
    return vpadalq_s16(vpaddlq_s16(pairs), more);
#endif
}

// As everywhere: block b goes to lane b % 16, and lanes are added 8, 4, 2, 1 apart.
inline float total(const float32x4_t *lanes) {
    const float32x4_t four = vaddq_f32(vaddq_f32(lanes[0], lanes[2]), vaddq_f32(lanes[1], lanes[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

template <int BITS, int R>
inline void add_four(const uint8_t *codes, const half *scales, const uint8_t *const *x, int64_t at,
                     int64_t padded, float32x4_t (*sums)[4]) {
    const float32x4_t scale = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(scales)));
    Levels levels[FOUR];
    for (int b = 0; b < FOUR; b++) levels[b] = levels_of<BITS>(codes + b * BLOCK * BITS / 8);
    for (int r = 0; r < R; r++) {
        const int8_t *from = reinterpret_cast<const int8_t *>(x[r]) + at * BLOCK;
        int32x4_t parts[FOUR];
        for (int b = 0; b < FOUR; b++) parts[b] = partial(levels[b], from + b * BLOCK);
        const int32x4_t dot =
            vpaddq_s32(vpaddq_s32(parts[0], parts[1]), vpaddq_s32(parts[2], parts[3]));
        const float32x4_t factor = vmulq_f32(scale, vld1q_f32(scales_of(x[r], padded) + at));
        float32x4_t &sum = sums[r][at / FOUR % 4];
        sum = vfmaq_f32(sum, vcvtq_f32_s32(dot), factor);
    }
}

template <int BITS, int R>
inline void dots_low(const uint8_t *codes, const half *scales, const uint8_t *const *x,
                     int64_t columns, float *out) {
    constexpr int64_t BYTES = FOUR * BLOCK * BITS / 8;
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, padded = padded_blocks(columns);
    float32x4_t sums[R][4];
    for (auto &row : sums)
        for (float32x4_t &sum : row) sum = vdupq_n_f32(0);
    int64_t at = 0;
    for (; at + FOUR <= blocks; at += FOUR, codes += BYTES) {
        for (int64_t line = 0; line < BYTES; line += 64) __builtin_prefetch(codes + AHEAD + line);
        add_four<BITS, R>(codes, scales + at, x, at, padded, sums);
    }
    if (at < blocks) {
        uint8_t rest_codes[BYTES] = {};
        half rest_scales[FOUR] = {};
        std::memcpy(rest_codes, codes, (blocks - at) * BYTES / FOUR);
        std::memcpy(rest_scales, scales + at, (blocks - at) * 2);
        add_four<BITS, R>(rest_codes, rest_scales, x, at, padded, sums);
    }
    for (int r = 0; r < R; r++) out[r] = total(sums[r]);
}

inline float32x4_t four_of(const bf16 *from) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16));
}

template <int R>
inline void dots_bf16(const bf16 *w, const uint8_t *const *packed, int64_t columns, float *out) {
    float32x4_t sums[R][4];
    for (auto &row : sums)
        for (float32x4_t &sum : row) sum = vdupq_n_f32(0);
    const bf16 *x[R];
    for (int r = 0; r < R; r++) x[r] = reinterpret_cast<const bf16 *>(packed[r]);
    auto add_sixteen = [&](const bf16 *from, int64_t at) {
        for (int i = 0; i < 4; i++) {
            const float32x4_t weight = four_of(from + 4 * i);
            for (int r = 0; r < R; r++)
                sums[r][i] = vfmaq_f32(sums[r][i], weight, four_of(x[r] + at + 4 * i));
        }
    };
    int64_t at = 0;
    for (; at + 16 <= columns; at += 16) {
        __builtin_prefetch(reinterpret_cast<const char *>(w + at) + AHEAD);
        add_sixteen(w + at, at);
    }
    if (at < columns) {
        bf16 rest[16] = {};
        std::memcpy(rest, w + at, (columns - at) * 2);
        add_sixteen(rest, at);
    }
    for (int r = 0; r < R; r++) out[r] = total(sums[r]);
}

template <int BITS, int R>
inline void dots(const uint8_t *codes, const half *scales, const uint8_t *const *x, int64_t columns,
                 float *out) {
    if constexpr (BITS == 16)
        dots_bf16<R>(reinterpret_cast<const bf16 *>(codes), x, columns, out);
    else
        dots_low<BITS, R>(codes, scales, x, columns, out);
}

}  // namespace
