// Codes to numbers and back, whole matrices at a time.
#pragma once
#include "numbers.h"
#include "threads.h"

namespace {

template <int BITS>
void levels_of_block(const uint8_t *codes, int8_t *levels) {
    if constexpr (BITS == 8) {
        std::memcpy(levels, codes, BLOCK);
    } else {
        for (int i = 0; i < 16; i++) levels[i] = LEVELS[codes[i] & 15];
        for (int i = 0; i < 16; i++) levels[16 + i] = LEVELS[codes[i] >> 4];
    }
}

#ifndef OWN_NUMBERS_OF_BLOCK
template <int BITS>
void numbers_of_block(const uint8_t *codes, half scale, bf16 *numbers) {
    int8_t levels[BLOCK];
    levels_of_block<BITS>(codes, levels);
    const float factor = from_half(scale);
    for (int i = 0; i < BLOCK; i++) numbers[i] = rounded(static_cast<float>(levels[i]) * factor);
}
#endif

template <int BITS>
void dequantize_row(const uint8_t *codes, const half *scales, int64_t columns, bf16 *out) {
    int64_t at = 0;
    for (; at + BLOCK <= columns; at += BLOCK)
        numbers_of_block<BITS>(codes + at * BITS / 8, scales[at / BLOCK], out + at);
    if (at == columns) return;
    bf16 rest[BLOCK];
    numbers_of_block<BITS>(codes + at * BITS / 8, scales[at / BLOCK], rest);
    std::memcpy(out + at, rest, (columns - at) * 2);
}

// The choices below are those of low_bit.py, which explains them.

inline half quantize_eight(const float *numbers, uint8_t *codes) {
    float most = 0;
    for (int i = 0; i < BLOCK; i++) most = std::fabs(numbers[i]) > most ? std::fabs(numbers[i]) : most;
    const half scale = to_half(most / 127.0f);
    const float divisor = scale ? from_half(scale) : 1.0f;
    for (int i = 0; i < BLOCK; i++) {
        float level = std::rint(numbers[i] / divisor);
        level = level < 127.0f ? level : 127.0f;
        level = level > -127.0f ? level : -127.0f;
        codes[i] = static_cast<uint8_t>(static_cast<int32_t>(level));
    }
    return scale;
}

// Indices of the levels nearest to numbers / scale.
inline void nearest(const float *numbers, float scale, int32_t *index) {
    const float divisor = scale == 0.0f ? 1.0f : scale;
    float levels[BLOCK];
    for (int i = 0; i < BLOCK; i++) levels[i] = numbers[i] / divisor, index[i] = 0;
    for (int k = 0; k < 15; k++) {
        const float between = (LEVELS[k] + LEVELS[k + 1]) / 2.0f;
        for (int i = 0; i < BLOCK; i++) index[i] += levels[i] > between;
    }
}

inline float sum_of(float *terms) {  // as a tree: fast, and the same on every processor
    for (int width = BLOCK / 2; width; width /= 2)
        for (int i = 0; i < width; i++) terms[i] += terms[i + width];
    return terms[0];
}

inline half quantize_four(const float *numbers, const float *counts, uint8_t *codes) {
    float farthest = 0;
    for (int i = 0; i < BLOCK; i++)
        farthest = std::fabs(numbers[i]) > std::fabs(farthest) ? numbers[i] : farthest;
    float best = INFINITY;
    half best_scale = 0;
    int32_t index[BLOCK], best_index[BLOCK];
    nearest(numbers, 0.0f, best_index);
    float products[BLOCK], squares[BLOCK];
    for (const float end : {-127.0f, 108.0f})
        for (const float stretch : {0.88f, 0.94f, 1.0f, 1.07f}) {
            nearest(numbers, farthest / end * stretch, index);
            for (int i = 0; i < BLOCK; i++) {
                const float level = LEVELS[index[i]];
                products[i] = counts[i] * numbers[i] * level;
                squares[i] = counts[i] * (level * level);
            }
            const half scale = to_half(sum_of(products) / sum_of(squares));
            const float factor = from_half(scale);
            nearest(numbers, factor, index);
            for (int i = 0; i < BLOCK; i++) {
                const float off = numbers[i] - LEVELS[index[i]] * factor;
                squares[i] = counts[i] * (off * off);
            }
            const float error = sum_of(squares);
            if (error < best) {
                best = error;
                best_scale = scale;
                std::memcpy(best_index, index, sizeof index);
            }
        }
    for (int i = 0; i < 16; i++)
        codes[i] = static_cast<uint8_t>(best_index[i] | best_index[16 + i] << 4);
    return best_scale;
}

template <int BITS, class T>
void quantize_row(const T *from, const float *importance, int64_t columns, uint8_t *codes,
                  half *scales) {
    for (int64_t at = 0; at < columns; at += BLOCK) {
        float numbers[BLOCK] = {}, counts[BLOCK];
        const int64_t left = columns - at < BLOCK ? columns - at : BLOCK;
        for (int64_t i = 0; i < left; i++) numbers[i] = widened(from[at + i]);
        for (float &count : counts) count = 1.0f;
        if (importance) std::memcpy(counts, importance + at, left * sizeof(float));
        uint8_t *const to = codes + at * BITS / 8;
        scales[at / BLOCK] =
            BITS == 8 ? quantize_eight(numbers, to) : quantize_four(numbers, counts, to);
    }
}

constexpr int64_t ROWS_AT_A_TIME = 8;

template <int BITS, class Row>
void for_rows(const Conversion &call, Row row) {
    const int64_t blocks = (call.I + BLOCK - 1) / BLOCK;
    auto some = [&](int64_t task) {
        const int64_t first = task * ROWS_AT_A_TIME, end = first + ROWS_AT_A_TIME;
        for (int64_t r = first; r < (end < call.rows ? end : call.rows); r++)
            row(r, call.codes + r * code_bytes(BITS, call.I), call.scales + r * blocks);
    };
    parallel((call.rows + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME,
             call.rows * code_bytes(BITS, call.I), some);
}

template <int BITS>
void dequantize_of(const Conversion &call) {
    for_rows<BITS>(call, [&](int64_t r, const uint8_t *codes, const half *scales) {
        dequantize_row<BITS>(codes, scales, call.I, call.numbers + r * call.I);
    });
}

template <int BITS>
void quantize_of(const Conversion &call) {
    for_rows<BITS>(call, [&](int64_t r, uint8_t *codes, half *scales) {
        if (call.kind == 0)
            quantize_row<BITS>(static_cast<const float *>(call.from) + r * call.I, call.importance,
                               call.I, codes, scales);
        else
            quantize_row<BITS>(static_cast<const bf16 *>(call.from) + r * call.I, call.importance,
                               call.I, codes, scales);
    });
}

void dequantize(int bits, const Conversion &call) {
    bits == 8 ? dequantize_of<8>(call) : dequantize_of<4>(call);
}

void quantize(int bits, const Conversion &call) {
    bits == 8 ? quantize_of<8>(call) : quantize_of<4>(call);
}

}  // namespace
