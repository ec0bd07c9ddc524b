// SPDX-License-Identifier: Apache-2.0
// vector_avx2.c - eight numbers at once; the last ones under a mask.
// Needs AVX2, FMA and F16C; CMake compiles this one file with -mavx2 -mfma -mf16c.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif
#include <immintrin.h>
#include <string.h>

#include "vector.h"

enum { LANES = 8, BLOCK = 32, BLOCK_BYTES = 34 };  // q8_0: f16 d, 32 s8
enum { INFINITE = 0x7f800000, NAN_F16 = 0x7e00 };

static inline __m256 set(float x) { return _mm256_set1_ps(x); }

// What is left of n elements from i on: whole registers without a mask, which AVX2 is slow at, then one with.
static inline __m256 load(const float *x, size_t left) {
    if (left >= LANES) return _mm256_loadu_ps(x);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(x, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)left), lanes));
}

static inline void store(float *to, __m256 y, size_t left) {
    if (left >= LANES) {
        _mm256_storeu_ps(to, y);
    } else {
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_maskstore_ps(to, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)left), lanes), y);
    }
}

static inline __m256d add_squares(__m256d sum, __m128 x) {
    const __m256d wide = _mm256_cvtps_pd(x);
    return _mm256_fmadd_pd(wide, wide, sum);
}

static inline float rms_scale(const float *x, size_t n, float eps) {
    __m256d sum[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    for (size_t i = 0; i < n; i += LANES) {
        const __m256 v = load(x + i, n - i);
        sum[0] = add_squares(sum[0], _mm256_castps256_ps128(v));
        sum[1] = add_squares(sum[1], _mm256_extractf128_ps(v, 1));
    }
    const __m256d four = _mm256_add_pd(sum[0], sum[1]);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    const double mean = (_mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two))) / (double)n;
    const __m128d root = _mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(mean + (double)eps));
    return (float)(1.0 / _mm_cvtsd_f64(root));
}

static void rms_norm(float *out, const float *x, const float *weight, size_t n, float eps) {
    const __m256 by = set(rms_scale(x, n, eps));
    for (size_t i = 0; i < n; i += LANES) {
        __m256 y = _mm256_mul_ps(load(x + i, n - i), by);
        if (weight) y = _mm256_mul_ps(y, load(weight + i, n - i));
        store(out + i, y, n - i);
    }
}

static inline __m256 two_to(__m256i k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
}

// x is the second operand of the clamps, so that NaN stays.
static inline __m256 exp_of(__m256 x) {
    const __m256 clamped = _mm256_min_ps(set(PK_EXP_MAX), _mm256_max_ps(set(PK_EXP_MIN), x));
    const __m256 k = _mm256_round_ps(_mm256_mul_ps(clamped, set(PK_EXP_PER_LN2)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(k, set(PK_EXP_LN2_HI), clamped);
    r = _mm256_fnmadd_ps(k, set(PK_EXP_LN2_LO), r);
    __m256 p = _mm256_fmadd_ps(set(PK_EXP_C4), r, set(PK_EXP_C3));
    p = _mm256_fmadd_ps(p, r, set(PK_EXP_C2));
    p = _mm256_fmadd_ps(p, r, set(PK_EXP_C1));
    p = _mm256_fmadd_ps(p, r, set(PK_EXP_C0));
    const __m256 y = _mm256_add_ps(set(1.0f), _mm256_fmadd_ps(_mm256_mul_ps(r, r), p, r));
    const __m256i twos = _mm256_cvtps_epi32(k), half = _mm256_srai_epi32(twos, 1);
    return _mm256_mul_ps(_mm256_mul_ps(y, two_to(half)), two_to(_mm256_sub_epi32(twos, half)));
}

static void swiglu(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        const __m256 g = load(gate + i, n - i), e = exp_of(_mm256_sub_ps(_mm256_setzero_ps(), g));
        const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(set(1.0f), e));
        store(out + i, _mm256_mul_ps(silu, load(up + i, n - i)), n - i);
    }
}

static void add(float *out, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        store(out + i, _mm256_add_ps(load(a + i, n - i), load(b + i, n - i)), n - i);
    }
}

static void scale(float *out, const float *x, size_t n, float s, float bias) {
    for (size_t i = 0; i < n; i += LANES) {
        const __m256 product = _mm256_mul_ps(load(x + i, n - i), set(s));
        store(out + i, _mm256_add_ps(product, set(bias)), n - i);
    }
}

static void to_f16(uint16_t *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        const __m128i half = _mm256_cvtps_ph(load(x + i, n - i), _MM_FROUND_TO_NEAREST_INT);
        if (n - i >= LANES) {
            _mm_storeu_si128((__m128i *)(out + i), half);
        } else {
            uint16_t last[LANES];
            _mm_storeu_si128((__m128i *)last, half);
            memcpy(out + i, last, (n - i) * sizeof *out);
        }
    }
}

static inline __m256i size_of(const float *x) {
    return _mm256_and_si256(_mm256_loadu_si256((const __m256i *)x), _mm256_set1_epi32(INT32_MAX));
}

// The bits of the largest |x| of a block. Without signs, floats order as their bits do, NaN last.
static inline int32_t largest(const float *x) {
    const __m256i low = _mm256_max_epi32(size_of(x), size_of(x + 8));
    const __m256i eight = _mm256_max_epi32(low, _mm256_max_epi32(size_of(x + 16), size_of(x + 24)));
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1))));
}

// Eight levels: the sum with the float below 1/2 is, cut, what lies nearest, ties away from zero.
static inline __m256i rounded(const float *x, __m256 by) {
    const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x), by), sign = _mm256_and_ps(v, set(-0.0f));
    return _mm256_cvttps_epi32(_mm256_add_ps(v, _mm256_or_ps(sign, set(0x1.fffffep-2f))));
}

// 32 levels as bytes, in order. The packing instructions work on halves, so the quarters come out mixed.
static inline __m256i levels(const float *x, __m256 by) {
    const __m256i low = _mm256_packs_epi32(rounded(x, by), rounded(x + 8, by));
    const __m256i high = _mm256_packs_epi32(rounded(x + 16, by), rounded(x + 24, by));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
}

static void to_q8_0(uint8_t *out, const float *x, size_t n) {
    for (size_t b = 0; b < n / BLOCK; b++, x += BLOCK, out += BLOCK_BYTES) {
        const int32_t m_bits = largest(x);
        const float m = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(m_bits)));
        const float d = m / 127.0f, inverse = 1.0f / d;
        const int finite = m_bits < INFINITE;
        const int usable = finite && _mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(inverse))) < INFINITE;
        const __m128i halves = _mm_cvtps_ph(_mm_set_ss(d), _MM_FROUND_TO_NEAREST_INT);
        const uint16_t half = finite ? (uint16_t)_mm_cvtsi128_si32(halves) : NAN_F16;
        const __m256i q = _mm256_and_si256(levels(x, set(inverse)), _mm256_set1_epi32(-usable));
        memcpy(out, &half, sizeof half);
        _mm256_storeu_si256((__m256i *)(out + 2), q);
    }
}

static void rope(float *out, const float *x, const float *cos, const float *sin, size_t n_rot, size_t n) {
    const size_t half = n_rot / 2;
    for (size_t i = 0; i < half; i += LANES) {
        const size_t left = half - i;
        const __m256 a = load(x + i, left), b = load(x + half + i, left);
        const __m256 c = load(cos + i, left), s = load(sin + i, left);
        store(out + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)), left);
        store(out + half + i, _mm256_fmadd_ps(a, s, _mm256_mul_ps(b, c)), left);
    }
    if (out != x && n > n_rot) memcpy(out + n_rot, x + n_rot, (n - n_rot) * sizeof *x);
}

const pk_vector_variant pk_vector_avx2 = {
    "avx2", PK_CPU_AVX2 | PK_CPU_FMA | PK_CPU_F16C, rms_norm, swiglu, add, scale, to_f16, to_q8_0, rope,
};
