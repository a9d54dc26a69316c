// AMX: a processor's 8 tile registers of 16 rows × 64 bytes, and one instruction that multiplies two
// of them: 16×16 results, each a sum over 32 pairs of bfloat16, in 16 cycles.
//
// The left factor lies in memory as a matrix does, row by row. The right one has pairs of its rows
// woven together: row j of the tile holds elements 2j and 2j+1 of each of 16 columns, so a column is
// 16 dwords below each other. Weights and cached latents are far larger than what they are multiplied
// with, so here they are always the left factor, taken as they stand, and results come out
// transposed: [rows of the weight][tokens].
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "target.h"

#define AMX_BEGIN \
    TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")

AMX_BEGIN
namespace amx {

constexpr int TILE = 16;       // rows of a tile
constexpr int STEP = 32;       // bfloat16 of a row

// Whether there are tiles, and this process may use them: the system makes room only when asked.
inline bool usable() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool known =
        __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") &&
        syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return known;
}

// GCC's intrinsics do not tell the compiler what they read: stores to what a tile is loaded from must
// come before this, which must come before the load.
inline void written() { asm volatile("" ::: "memory"); }

// While one lives, all eight tiles of this thread are 16 × 64 bytes.
struct Tiles {
    Tiles() {
        alignas(64) uint8_t config[64] = {};
        config[0] = 1;
        for (int tile = 0; tile < 8; tile++) {
            config[16 + 2 * tile] = 64;    // bytes of a row
            config[48 + tile] = TILE;      // rows
        }
        written();
        _tile_loadconfig(config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;
};

// 16 × 16 dwords, rows to columns.
inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}

// Two rows of 16 floats as one of 16 dwords [bf16(low), bf16(high)].
inline __m512i woven(__m512 low, __m512 high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                           8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

inline __m512 exp(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // in this order NaN stays NaN
    const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(y, whole);  // 2^part by its series, |part| <= 1/2
    __m512 power = _mm512_set1_ps(1.5403530e-4f);
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.3333558e-3f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(9.6181291e-3f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(5.5504109e-2f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(2.4022651e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(6.9314718e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, whole);
}

}  // namespace amx
TARGET_END
#endif
