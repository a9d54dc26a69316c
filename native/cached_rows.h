// Rows of the cache as int8 and back (src/qiusuo/kernels/cached_rows.py has the format and why).
// Included by each instruction set's file, for itself.
#pragma once
#include "numbers.h"
#include "threads.h"

namespace {

// A block's scale; NaN where a number is not finite, and its codes are then 0.
inline bf16 rounded_block(const float *numbers, int8_t *codes) {
    int32_t most = 0;  // as bits, which lie in the order of sizes: infinity and NaN above all
    for (int i = 0; i < BLOCK; i++) {
        const auto size = static_cast<int32_t>(bits_of(numbers[i]) & 0x7fffffff);
        most = size > most ? size : most;
    }
    if (most >= 0x7f800000) {
        std::memset(codes, 0, BLOCK);
        return 0x7fc0;
    }
    const bf16 scale = rounded(number_of(static_cast<uint32_t>(most)) / 127.0f);
    const float divisor = scale ? widened(scale) : 1.0f;
    for (int i = 0; i < BLOCK; i++) {
        float level = std::rint(numbers[i] / divisor);
        level = level < 127.0f ? level : 127.0f;  // of scales that are subnormal
        level = level > -127.0f ? level : -127.0f;
        codes[i] = static_cast<int8_t>(static_cast<int32_t>(level));
    }
    return scale;
}

// Where the parts of a row begin.
inline int64_t exact_begins(const CachedRows &call) {
    return (call.rounded + BLOCK - 1) / BLOCK * BLOCK;
}

template <class T>
int64_t scales_begin(const CachedRows &call) {
    return exact_begins(call) + call.exact * static_cast<int64_t>(sizeof(T));
}

template <class T>
void keep_row(const CachedRows &call, const T *from, uint8_t *to) {
    uint8_t *scales = to + scales_begin<T>(call);
    for (int64_t at = 0; at < call.rounded; at += BLOCK, scales += 2) {
        float numbers[BLOCK] = {};
        if (at + BLOCK <= call.rounded)
            for (int i = 0; i < BLOCK; i++) numbers[i] = widened(from[at + i]);
        else
            for (int i = 0; i < call.rounded - at; i++) numbers[i] = widened(from[at + i]);
        const bf16 scale = rounded_block(numbers, reinterpret_cast<int8_t *>(to + at));
        std::memcpy(scales, &scale, 2);
    }
    std::memcpy(to + exact_begins(call), from + call.rounded, call.exact * sizeof(T));
}

template <class T>
void unpack_row(const CachedRows &call, const uint8_t *from, T *to) {
    const auto *codes = reinterpret_cast<const int8_t *>(from);
    const uint8_t *scales = from + scales_begin<T>(call);
    for (int64_t at = 0; at < call.rounded; at += BLOCK, scales += 2) {
        bf16 stored;
        std::memcpy(&stored, scales, 2);
        const float scale = widened(stored);
        if (at + BLOCK <= call.rounded)
            for (int i = 0; i < BLOCK; i++)
                to[at + i] = narrowed(static_cast<float>(codes[at + i]) * scale, T());
        else
            for (int64_t i = at; i < call.rounded; i++)
                to[i] = narrowed(static_cast<float>(codes[i]) * scale, T());
    }
    std::memcpy(to + call.rounded, from + exact_begins(call), call.exact * sizeof(T));
}

constexpr int64_t CACHED_ROWS_AT_A_TIME = 32;

template <class Row>
void for_cached_rows(const CachedRows &call, Row row) {
    parallel((call.N + CACHED_ROWS_AT_A_TIME - 1) / CACHED_ROWS_AT_A_TIME, call.N * call.width,
             [&](int64_t task) {
                 const int64_t first = task * CACHED_ROWS_AT_A_TIME;
                 const int64_t end = first + CACHED_ROWS_AT_A_TIME;
                 for (int64_t n = first; n < (end < call.N ? end : call.N); n++) row(n);
             });
}

template <class T>
void keep_rows_of(const CachedRows &call) {
    const T *rows = static_cast<const T *>(call.numbers);
    for_cached_rows(call, [&](int64_t n) {
        keep_row(call, rows + n * (call.rounded + call.exact), call.entries + call.slots[n] * call.width);
    });
}

template <class T>
void unpack_rows_of(const CachedRows &call) {
    T *rows = static_cast<T *>(call.numbers);
    for_cached_rows(call, [&](int64_t n) {
        unpack_row(call, call.entries + n * call.width, rows + n * (call.rounded + call.exact));
    });
}

void keep_rows(const CachedRows &call) {
    call.kind ? keep_rows_of<bf16>(call) : keep_rows_of<float>(call);
}

void unpack_rows(const CachedRows &call) {
    call.kind ? unpack_rows_of<bf16>(call) : unpack_rows_of<float>(call);
}

}  // namespace
