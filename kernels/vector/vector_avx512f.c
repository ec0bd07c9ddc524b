// SPDX-License-Identifier: Apache-2.0
// vector_avx512f.c - sixteen numbers at once; the last ones under a mask.
// Needs AVX-512F (which brings AVX2, FMA and F16C); CMake compiles this one file with -mavx512f.
#if !defined(__AVX512F__)
#error "compile with -mavx512f"
#endif
#include <immintrin.h>
#include <string.h>

#include "vector.h"

enum { LANES = 16, BLOCK = 32, BLOCK_BYTES = 34 };  // q8_0: f16 d, 32 s8
enum { INFINITE = 0x7f800000, NAN_F16 = 0x7e00 };

static inline __m512 set(float x) { return _mm512_set1_ps(x); }

// All lanes, or those of the elements from i on that there are. i < n.
static inline __mmask16 live(size_t i, size_t n) {
    return (__mmask16)(n - i < LANES ? (1u << (n - i)) - 1 : 0xffffu);
}

static inline __m512d add_squares(__m512d sum, __m256 x) {
    const __m512d wide = _mm512_cvtps_pd(x);
    return _mm512_fmadd_pd(wide, wide, sum);
}

static inline float rms_scale(const float *x, size_t n, float eps) {
    __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (size_t i = 0; i < n; i += LANES) {
        const __m512 v = _mm512_maskz_loadu_ps(live(i, n), x + i);
        sum[0] = add_squares(sum[0], _mm512_castps512_ps256(v));
        sum[1] = add_squares(sum[1], _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    }
    const double mean = _mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1])) / (double)n;
    const __m128d root = _mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(mean + (double)eps));
    return (float)(1.0 / _mm_cvtsd_f64(root));
}

static void rms_norm(float *out, const float *x, const float *weight, size_t n, float eps) {
    const __m512 by = set(rms_scale(x, n, eps));
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 k = live(i, n);
        __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(k, x + i), by);
        if (weight) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(k, weight + i));
        _mm512_mask_storeu_ps(out + i, k, y);
    }
}

// x is the second operand of the clamps, so that NaN stays; scalef rounds a subnormal result once.
static inline __m512 exp_of(__m512 x) {
    const __m512 clamped = _mm512_min_ps(set(PK_EXP_MAX), _mm512_max_ps(set(PK_EXP_MIN), x));
    const __m512 per_ln2 = _mm512_mul_ps(clamped, set(PK_EXP_PER_LN2));
    const __m512 k = _mm512_roundscale_ps(per_ln2, _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(k, set(PK_EXP_LN2_HI), clamped);
    r = _mm512_fnmadd_ps(k, set(PK_EXP_LN2_LO), r);
    __m512 p = _mm512_fmadd_ps(set(PK_EXP_C4), r, set(PK_EXP_C3));
    p = _mm512_fmadd_ps(p, r, set(PK_EXP_C2));
    p = _mm512_fmadd_ps(p, r, set(PK_EXP_C1));
    p = _mm512_fmadd_ps(p, r, set(PK_EXP_C0));
    const __m512 tail = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r);
    return _mm512_scalef_ps(_mm512_add_ps(set(1.0f), tail), k);
}

static void swiglu(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 k = live(i, n);
        const __m512 g = _mm512_maskz_loadu_ps(k, gate + i), u = _mm512_maskz_loadu_ps(k, up + i);
        const __m512 e = exp_of(_mm512_sub_ps(_mm512_setzero_ps(), g));
        _mm512_mask_storeu_ps(out + i, k, _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(set(1.0f), e)), u));
    }
}

static void add(float *out, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 k = live(i, n);
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(k, a + i), _mm512_maskz_loadu_ps(k, b + i));
        _mm512_mask_storeu_ps(out + i, k, sum);
    }
}

static void scale(float *out, const float *x, size_t n, float s, float bias) {
    for (size_t i = 0; i < n; i += LANES) {
        const __mmask16 k = live(i, n);
        const __m512 product = _mm512_mul_ps(_mm512_maskz_loadu_ps(k, x + i), set(s));
        _mm512_mask_storeu_ps(out + i, k, _mm512_add_ps(product, set(bias)));
    }
}

static void to_f16(uint16_t *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += LANES) {
        const __m512 v = _mm512_maskz_loadu_ps(live(i, n), x + i);
        const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
        if (n - i >= LANES) {
            _mm256_storeu_si256((__m256i *)(out + i), half);
        } else {
            uint16_t last[LANES];
            _mm256_storeu_si256((__m256i *)last, half);
            memcpy(out + i, last, (n - i) * sizeof *out);
        }
    }
}

// Sixteen levels: the sum with the float below 1/2 is, cut, what lies nearest, ties away from zero.
static inline __m128i levels(const float *x, __m512 by) {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x), by);
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(INT32_MIN));
    const __m512i half = _mm512_or_si512(sign, _mm512_castps_si512(set(0x1.fffffep-2f)));
    return _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(_mm512_add_ps(v, _mm512_castsi512_ps(half))));
}

static void to_q8_0(uint8_t *out, const float *x, size_t n) {
    const __m512i signless = _mm512_set1_epi32(INT32_MAX);
    for (size_t b = 0; b < n / BLOCK; b++, x += BLOCK, out += BLOCK_BYTES) {
        const __m512i low = _mm512_and_si512(_mm512_loadu_si512(x), signless);
        const __m512i high = _mm512_and_si512(_mm512_loadu_si512(x + LANES), signless);
        const int32_t m_bits = _mm512_reduce_max_epi32(_mm512_max_epi32(low, high));  // NaN's are above all
        const float m = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(m_bits)));
        const float d = m / 127.0f, inverse = 1.0f / d;
        const int finite = m_bits < INFINITE;
        const int usable = finite && _mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(inverse))) < INFINITE;
        const __m256i halves = _mm512_cvtps_ph(set(d), _MM_FROUND_TO_NEAREST_INT);
        const uint16_t half = finite ? (uint16_t)_mm_cvtsi128_si32(_mm256_castsi256_si128(halves)) : NAN_F16;
        const __m256i q = _mm256_set_m128i(levels(x + LANES, set(inverse)), levels(x, set(inverse)));
        memcpy(out, &half, sizeof half);
        _mm256_storeu_si256((__m256i *)(out + 2), _mm256_and_si256(q, _mm256_set1_epi32(-usable)));
    }
}

static void rope(float *out, const float *x, const float *cos, const float *sin, size_t n_rot, size_t n) {
    const size_t half = n_rot / 2;
    for (size_t i = 0; i < half; i += LANES) {
        const __mmask16 k = live(i, half);
        const __m512 a = _mm512_maskz_loadu_ps(k, x + i), b = _mm512_maskz_loadu_ps(k, x + half + i);
        const __m512 c = _mm512_maskz_loadu_ps(k, cos + i), s = _mm512_maskz_loadu_ps(k, sin + i);
        _mm512_mask_storeu_ps(out + i, k, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        _mm512_mask_storeu_ps(out + half + i, k, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
    }
    if (out != x && n > n_rot) memcpy(out + n_rot, x + n_rot, (n - n_rot) * sizeof *x);
}

const pk_vector_variant pk_vector_avx512f = {
    "avx512f", PK_CPU_AVX512F, rms_norm, swiglu, add, scale, to_f16, to_q8_0, rope,
};
