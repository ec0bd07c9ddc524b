// SPDX-License-Identifier: Apache-2.0
// logmel_avx2.c - four frames at once, one in each lane, so that no step shuffles.
// Needs AVX2; CMake compiles this one file with -mavx2, and with -ffp-contract=off: compilers fuse even
// the intrinsics' multiply and add where they may, which would change the bits.
#if !defined(__AVX2__)
#error "compile with -mavx2"
#endif
#include <immintrin.h>

#include "logmel.h"

enum { LANES = 4 };

static inline __m256d add(__m256d a, __m256d b) { return _mm256_add_pd(a, b); }
static inline __m256d sub(__m256d a, __m256d b) { return _mm256_sub_pd(a, b); }
static inline __m256d mul(__m256d a, __m256d b) { return _mm256_mul_pd(a, b); }
static inline __m256d set(double x) { return _mm256_set1_pd(x); }

// x[l] is the frame of lane l. Each sample is fetched once and serves as its successor's predecessor.
static inline void load(__m256d *restrict re, __m256d *restrict im, const float *const x[LANES],
                        const pk_logmel_tables *t) {
    const __m128 factor = _mm_set1_ps(PK_LOGMEL_PREEMPHASIS);
    __m128 before = _mm_set_ps(x[3][0], x[2][0], x[1][0], x[0][0]);
    for (size_t n = 0; n < t->n_points; n++) {
        const size_t to = t->place[n], at = 2 * n;
        if (at >= t->window_samples) {
            re[to] = im[to] = _mm256_setzero_pd();
            continue;
        }
        const __m128 even = _mm_set_ps(x[3][at], x[2][at], x[1][at], x[0][at]);
        const __m128 odd = _mm_set_ps(x[3][at + 1], x[2][at + 1], x[1][at + 1], x[0][at + 1]);
        const __m128 even_y = _mm_sub_ps(even, _mm_mul_ps(factor, before));
        const __m128 odd_y = _mm_sub_ps(odd, _mm_mul_ps(factor, even));
        before = odd;
        re[to] = mul(set(t->window[at]), _mm256_cvtps_pd(even_y));
        im[to] = mul(set(t->window[at + 1]), _mm256_cvtps_pd(odd_y));
    }
}

static inline void fft(__m256d *restrict re, __m256d *restrict im, const pk_logmel_tables *t) {
    const size_t n = t->n_points;
    for (size_t half = 1; half < n; half *= 2) {
        for (size_t j = 0; j < half; j++) {
            const __m256d c = set(t->cosine[j * (n / half)]), s = set(t->sine[j * (n / half)]);
            for (size_t a = j; a < n; a += 2 * half) {
                const size_t b = a + half;
                const __m256d r = add(mul(re[b], c), mul(im[b], s));
                const __m256d i = sub(mul(im[b], c), mul(re[b], s));
                re[b] = sub(re[a], r);
                im[b] = sub(im[a], i);
                re[a] = add(re[a], r);
                im[a] = add(im[a], i);
            }
        }
    }
}

static inline __m256d power_at(const __m256d *re, const __m256d *im, size_t k, const pk_logmel_tables *t) {
    const size_t mirror = t->n_points - k;
    const __m256d even_re = add(re[k], re[mirror]), even_im = sub(im[k], im[mirror]);
    const __m256d odd_re = sub(re[k], re[mirror]), odd_im = add(im[k], im[mirror]);
    const __m256d c = set(t->cosine[k]), s = set(t->sine[k]);
    const __m256d r = add(even_re, sub(mul(odd_im, c), mul(odd_re, s)));
    const __m256d i = sub(even_im, add(mul(odd_re, c), mul(odd_im, s)));
    return mul(set(0.25), add(mul(r, r), mul(i, i)));
}

static inline __m256d ln(__m256d x) {
    const __m256i bits = _mm256_castpd_si256(x);
    const __m256i over = _mm256_sub_epi64(bits, _mm256_set1_epi64x((long long)PK_LOGMEL_SQRT_HALF));
    // AVX2 has no int64 -> double: under the exponent of 2^52 a small integer is its own fraction.
    const __m256d two52 = set(0x1p52);
    const __m256d biased = _mm256_or_pd(_mm256_castsi256_pd(_mm256_srli_epi64(over, 52)), two52);
    const __m256d e = sub(biased, two52);
    const __m256i exponent = _mm256_and_si256(over, _mm256_set1_epi64x((long long)PK_LOGMEL_EXPONENT));
    const __m256d m = _mm256_castsi256_pd(_mm256_sub_epi64(bits, exponent));
    const __m256d s = _mm256_div_pd(sub(m, set(1.0)), add(m, set(1.0))), z = mul(s, s);
    __m256d p = set(1.0 / 13);
    p = add(mul(p, z), set(1.0 / 11));
    p = add(mul(p, z), set(1.0 / 9));
    p = add(mul(p, z), set(1.0 / 7));
    p = add(mul(p, z), set(1.0 / 5));
    p = add(mul(p, z), set(1.0 / 3));
    p = add(mul(p, z), set(1.0));
    return add(mul(e, set(PK_LOGMEL_LN2)), mul(add(s, s), p));
}

void pk_logmel_avx2(float *restrict out, const float *wave, size_t n_frames, const pk_logmel_tables *t) {
    __m256d re[PK_LOGMEL_MAX_POINTS], im[PK_LOGMEL_MAX_POINTS], power[PK_LOGMEL_MAX_POINTS];
    for (size_t f = 0; f < n_frames; f += LANES) {
        float *rows = out + f * PK_LOGMEL_BANDS;
        const size_t live = n_frames - f < LANES ? n_frames - f : LANES;
        const float *x[LANES];  // a lane without a frame repeats the last one and is not stored
        for (size_t l = 0; l < LANES; l++) x[l] = wave + (f + (l < live ? l : live - 1)) * t->hop_samples;
        load(re, im, x, t);
        fft(re, im, t);
        for (size_t k = 1; k < t->n_bins; k++) power[k] = power_at(re, im, k, t);
        const double *tap = t->taps;
        for (size_t m = 0; m < PK_LOGMEL_BANDS; m++) {
            __m256d sum = _mm256_setzero_pd();
            for (size_t i = 0; i < t->n_taps[m]; i++) sum = add(sum, mul(set(*tap++), power[t->first_bin[m] + i]));
            float row[LANES];
            _mm_storeu_ps(row, _mm256_cvtpd_ps(ln(_mm256_max_pd(sum, set(1.0)))));
            for (size_t l = 0; l < live; l++) rows[l * PK_LOGMEL_BANDS + m] = row[l];
        }
    }
}
