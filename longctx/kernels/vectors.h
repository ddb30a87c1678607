/* Vectors of float32 that fill a register, and bfloat16 in and out of them: GCC's and Clang's vector extensions, so that
 * AVX-512, AVX2 and others come from one source. */
#pragma once
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#else /* a vector type wider than the machine's registers would go through memory at every step */
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
/* The same in memory, unaligned. memcpy would be split into halves where a vector is half of the widest one. */
typedef float vf_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh_at __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf load_f32(const float *p) { return (vf)*(const vf_at *)p; }
INLINE void store_f32(float *p, vf v) { *(vf_at *)p = v; }

INLINE vf load_bf16(const uint16_t *p) {
#if LANES == 8 && defined(__AVX2__) /* which GCC 12 makes of the other form in halves */
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    return (vf)(__builtin_convertvector((vh)*(const vh_at *)p, vu) << 16);
#endif
}

INLINE vh to_bf16(vf x) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu bits = (vu)x;
    bits += 0x7fff + ((bits >> 16) & 1); /* round to nearest even; a NaN stays one: its payload's top bit is set */
    return __builtin_convertvector(bits >> 16, vh);
#endif
}

INLINE vf load(int is_bf16, const void *p, int64_t i) {
    return is_bf16 ? load_bf16((const uint16_t *)p + i) : load_f32((const float *)p + i);
}

INLINE void store(int is_bf16, void *p, int64_t i, vf x) {
    if (is_bf16) *(vh_at *)((uint16_t *)p + i) = to_bf16(x);
    else store_f32((float *)p + i, x);
}

INLINE vf vmax(vf a, vf b) {
    vi greater = a > b;
    return (vf)(((vi)a & greater) | ((vi)b & ~greater));
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (vi){__VA_ARGS__})
#endif
#if LANES == 16
#define SWAP_HALVES(x) SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define SWAP_FOURS(x) SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define SWAP_PAIRS(x) SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP_NEIGHBOURS(x) SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#else
#define SWAP_FOURS(x) SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3)
#define SWAP_PAIRS(x) SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5)
#define SWAP_NEIGHBOURS(x) SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6)
#endif

INLINE float sum_lanes(vf x) {
#if LANES == 16
    x += SWAP_HALVES(x);
#endif
    x += SWAP_FOURS(x);
    x += SWAP_PAIRS(x);
    return x[0] + x[1];
}

INLINE float max_lanes(vf x) {
#if LANES == 16
    x = vmax(x, SWAP_HALVES(x));
#endif
    x = vmax(x, SWAP_FOURS(x));
    x = vmax(x, SWAP_PAIRS(x));
    x = vmax(x, SWAP_NEIGHBOURS(x));
    return x[0];
}

/* 2^x for x <= 0. Minimax polynomials on [-1/2, 1/2]: relative error 2e-7 (float32), 4e-6 (bfloat16, four terms). */
INLINE vf exp2_nonpositive(int is_bf16, vf x) {
    x = vmax(x, splat(-126.0f));
    vf shifted = x + 12582912.0f; /* 1.5 * 2^23: the nearest integer is in the low bits */
    vf f = x - (shifted - 12582912.0f);
    vf p;
    if (is_bf16) {
        p = splat(9.6770270e-3f);
        p = p * f + 5.5503324e-2f;
    } else {
        p = splat(1.5403530e-4f);
        p = p * f + 1.3333558e-3f;
        p = p * f + 9.6181291e-3f;
        p = p * f + 5.5504109e-2f;
    }
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return (vf)((vi)p + ((vi)shifted << 23));
}
