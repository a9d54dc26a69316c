// AVX2 with FMA and F16C.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds two products in 16 bits: of |level| ≤ 127
// and x's code with the level's sign that is at most 2 · 127 · 127, which fits.
#include "kernels.h"
#if defined(__x86_64__)
#include "target.h"
TARGET_BEGIN("avx2,fma,f16c")
#include <immintrin.h>

#include "numbers.h"
#include "packing.h"

namespace {

constexpr int TILE = 4;
constexpr bool PAIRED = false;
constexpr int EIGHT = 8;         // blocks whose sums are the lanes of one register
constexpr int64_t AHEAD = 4096;  // bytes: the processor looks ahead by itself, but not beyond a page

inline __m256i load(const void *from) {
    return _mm256_loadu_si256(static_cast<const __m256i *>(from));
}

template <int BITS>
inline __m256i levels_of(const uint8_t *codes) {  // of one block
    if constexpr (BITS == 8) return load(codes);
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(LEVELS)));
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes));
    const __m256i both = _mm256_set_m128i(_mm_srli_epi16(raw, 4), raw);
    return _mm256_shuffle_epi8(table, _mm256_and_si256(both, _mm256_set1_epi8(15)));
}

// The dot products of 8 blocks, in order.
inline __m256i block_dots(const __m256i *levels, const uint8_t *x) {
    __m256i sums[EIGHT];
    for (int b = 0; b < EIGHT; b++) {
        const __m256i signed_x = _mm256_sign_epi8(load(x + BLOCK * b), levels[b]);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(levels[b]), signed_x);
        sums[b] = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    for (int b = 0; b < EIGHT; b += 2) sums[b] = _mm256_hadd_epi32(sums[b], sums[b + 1]);
    const __m256i low = _mm256_hadd_epi32(sums[0], sums[2]);
    const __m256i high = _mm256_hadd_epi32(sums[4], sums[6]);
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                            _mm256_permute2x128_si256(low, high, 0x31));
}

inline float total(__m256 eight) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Adds what the 8 blocks from `at` on give to the first or the second eight of the 16 lanes.
template <int BITS, int R>
inline void add_eight(const uint8_t *codes, const half *scales, const uint8_t *const *x, int64_t at,
                      int64_t padded, __m256 (*sums)[2], int second) {
    __m256i levels[EIGHT];
    for (int b = 0; b < EIGHT; b++) levels[b] = levels_of<BITS>(codes + b * BLOCK * BITS / 8);
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(scales)));
    for (int r = 0; r < R; r++) {
        const __m256 dot = _mm256_cvtepi32_ps(block_dots(levels, x[r] + at * BLOCK));
        const __m256 factor = _mm256_mul_ps(scale, _mm256_loadu_ps(scales_of(x[r], padded) + at));
        sums[r][second] = _mm256_fmadd_ps(dot, factor, sums[r][second]);
    }
}

template <int BITS, int R>
inline void dots_low(const uint8_t *codes, const half *scales, const uint8_t *const *x,
                     int64_t columns, float *out) {
    constexpr int64_t BYTES = EIGHT * BLOCK * BITS / 8;
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, padded = padded_blocks(columns);
    __m256 sums[R][2];
    for (auto &row : sums) row[0] = row[1] = _mm256_setzero_ps();
    int64_t at = 0;
    for (; at + EIGHT <= blocks; at += EIGHT, codes += BYTES) {
        for (int64_t line = 0; line < BYTES; line += 64)
            _mm_prefetch(reinterpret_cast<const char *>(codes + AHEAD + line), _MM_HINT_T0);
        add_eight<BITS, R>(codes, scales + at, x, at, padded, sums, at / EIGHT % 2);
    }
    if (at < blocks) {
        uint8_t rest_codes[BYTES] = {};
        half rest_scales[EIGHT] = {};
        std::memcpy(rest_codes, codes, (blocks - at) * BYTES / EIGHT);
        std::memcpy(rest_scales, scales + at, (blocks - at) * 2);
        add_eight<BITS, R>(rest_codes, rest_scales, x, at, padded, sums, at / EIGHT % 2);
    }
    for (int r = 0; r < R; r++) out[r] = total(_mm256_add_ps(sums[r][0], sums[r][1]));
}

inline __m256 eight_of(const bf16 *from) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

template <int R>
inline void dots_bf16(const bf16 *w, const uint8_t *const *packed, int64_t columns, float *out) {
    __m256 sums[R][2];
    for (auto &row : sums) row[0] = row[1] = _mm256_setzero_ps();
    const bf16 *x[R];
    for (int r = 0; r < R; r++) x[r] = reinterpret_cast<const bf16 *>(packed[r]);
    auto add_sixteen = [&](const bf16 *from, int64_t at) {
        for (int i = 0; i < 2; i++) {
            const __m256 weight = eight_of(from + 8 * i);
            for (int r = 0; r < R; r++)
                sums[r][i] = _mm256_fmadd_ps(weight, eight_of(x[r] + at + 8 * i), sums[r][i]);
        }
    };
    int64_t at = 0;
    for (; at + 16 <= columns; at += 16) {
        _mm_prefetch(reinterpret_cast<const char *>(w + at) + AHEAD, _MM_HINT_T0);
        add_sixteen(w + at, at);
    }
    if (at < columns) {
        bf16 rest[16] = {};
        std::memcpy(rest, w + at, (columns - at) * 2);
        add_sixteen(rest, at);
    }
    for (int r = 0; r < R; r++) out[r] = total(_mm256_add_ps(sums[r][0], sums[r][1]));
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
#include "between_loops.h"
#include "loops.h"
TARGET_END

const Kernels *avx2_kernels() {
    static const Kernels kernels = {"avx2", linear, experts, dequantize, quantize, keep_rows,
                                    unpack_rows, &BETWEEN};
    const bool usable = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
    return usable ? &kernels : nullptr;
}
#else
const Kernels *avx2_kernels() { return nullptr; }
#endif
