// SPDX-License-Identifier: Apache-2.0
// logmel_neon.c - two frames at once, one in each lane, so that no step shuffles. AArch64 only.
// Needs -ffp-contract=off: compilers fuse even the intrinsics' multiply and add, which would change the bits.
#if !defined(__aarch64__)
#error "AArch64 only: 32-bit NEON has no float64"
#endif
#include <arm_neon.h>

#include "logmel.h"

enum { LANES = 2 };

static inline float64x2_t add(float64x2_t a, float64x2_t b) { return vaddq_f64(a, b); }
static inline float64x2_t sub(float64x2_t a, float64x2_t b) { return vsubq_f64(a, b); }
static inline float64x2_t mul(float64x2_t a, float64x2_t b) { return vmulq_f64(a, b); }
static inline float64x2_t set(double x) { return vdupq_n_f64(x); }

static inline float32x2_t pair(float lane0, float lane1) {
    return vset_lane_f32(lane1, vdup_n_f32(lane0), 1);
}

// x[l] is the frame of lane l. Each sample is fetched once and serves as its successor's predecessor.
static inline void load(float64x2_t *restrict re, float64x2_t *restrict im, const float *const x[LANES],
                        const pk_logmel_tables *t) {
    const float32x2_t factor = vdup_n_f32(PK_LOGMEL_PREEMPHASIS);
    float32x2_t before = pair(x[0][0], x[1][0]);
    for (size_t n = 0; n < t->n_points; n++) {
        const size_t to = t->place[n], at = 2 * n;
        if (at >= t->window_samples) {
            re[to] = im[to] = set(0.0);
            continue;
        }
        const float32x2_t even = pair(x[0][at], x[1][at]), odd = pair(x[0][at + 1], x[1][at + 1]);
        const float32x2_t even_y = vsub_f32(even, vmul_f32(factor, before));
        const float32x2_t odd_y = vsub_f32(odd, vmul_f32(factor, even));
        before = odd;
        re[to] = mul(set(t->window[at]), vcvt_f64_f32(even_y));
        im[to] = mul(set(t->window[at + 1]), vcvt_f64_f32(odd_y));
    }
}

static inline void fft(float64x2_t *restrict re, float64x2_t *restrict im, const pk_logmel_tables *t) {
    const size_t n = t->n_points;
    for (size_t half = 1; half < n; half *= 2) {
        for (size_t j = 0; j < half; j++) {
            const float64x2_t c = set(t->cosine[j * (n / half)]), s = set(t->sine[j * (n / half)]);
            for (size_t a = j; a < n; a += 2 * half) {
                const size_t b = a + half;
                const float64x2_t r = add(mul(re[b], c), mul(im[b], s));
                const float64x2_t i = sub(mul(im[b], c), mul(re[b], s));
                re[b] = sub(re[a], r);
                im[b] = sub(im[a], i);
                re[a] = add(re[a], r);
                im[a] = add(im[a], i);
            }
        }
    }
}

static inline float64x2_t power_at(const float64x2_t *re, const float64x2_t *im, size_t k,
                                   const pk_logmel_tables *t) {
    const size_t mirror = t->n_points - k;
    const float64x2_t even_re = add(re[k], re[mirror]), even_im = sub(im[k], im[mirror]);
    const float64x2_t odd_re = sub(re[k], re[mirror]), odd_im = add(im[k], im[mirror]);
    const float64x2_t c = set(t->cosine[k]), s = set(t->sine[k]);
    const float64x2_t r = add(even_re, sub(mul(odd_im, c), mul(odd_re, s)));
    const float64x2_t i = sub(even_im, add(mul(odd_re, c), mul(odd_im, s)));
    return mul(set(0.25), add(mul(r, r), mul(i, i)));
}

static inline float64x2_t ln(float64x2_t x) {
    const uint64x2_t bits = vreinterpretq_u64_f64(x);
    const uint64x2_t over = vsubq_u64(bits, vdupq_n_u64(PK_LOGMEL_SQRT_HALF));
    const float64x2_t e = vcvtq_f64_u64(vshrq_n_u64(over, 52));
    const uint64x2_t exponent = vandq_u64(over, vdupq_n_u64(PK_LOGMEL_EXPONENT));
    const float64x2_t m = vreinterpretq_f64_u64(vsubq_u64(bits, exponent));
    const float64x2_t s = vdivq_f64(sub(m, set(1.0)), add(m, set(1.0))), z = mul(s, s);
    float64x2_t p = set(1.0 / 13);
    p = add(mul(p, z), set(1.0 / 11));
    p = add(mul(p, z), set(1.0 / 9));
    p = add(mul(p, z), set(1.0 / 7));
    p = add(mul(p, z), set(1.0 / 5));
    p = add(mul(p, z), set(1.0 / 3));
    p = add(mul(p, z), set(1.0));
    return add(mul(e, set(PK_LOGMEL_LN2)), mul(add(s, s), p));
}

void pk_logmel_neon(float *restrict out, const float *wave, size_t n_frames, const pk_logmel_tables *t) {
    float64x2_t re[PK_LOGMEL_MAX_POINTS], im[PK_LOGMEL_MAX_POINTS], power[PK_LOGMEL_MAX_POINTS];
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
            float64x2_t sum = set(0.0);
            for (size_t i = 0; i < t->n_taps[m]; i++) sum = add(sum, mul(set(*tap++), power[t->first_bin[m] + i]));
            float row[LANES];
            vst1_f32(row, vcvt_f32_f64(ln(vmaxq_f64(sum, set(1.0)))));
            for (size_t l = 0; l < live; l++) rows[l * PK_LOGMEL_BANDS + m] = row[l];
        }
    }
}
