// SPDX-License-Identifier: Apache-2.0
// logmel_c.c - scalar reference. Clear first; it is also the fallback. Needs -ffp-contract=off.
#include <string.h>

#include "logmel.h"

// Pre-emphasised, windowed samples 2n and 2n + 1 become the complex point n, in the FFT's order.
static void load(double *restrict re, double *restrict im, const float *x, const pk_logmel_tables *t) {
    float before = x[0];
    for (size_t n = 0; n < t->n_points; n++) {
        const size_t to = t->place[n], at = 2 * n;
        if (at >= t->window_samples) {
            re[to] = im[to] = 0.0;
            continue;
        }
        const float even = x[at] - PK_LOGMEL_PREEMPHASIS * before;
        const float odd = x[at + 1] - PK_LOGMEL_PREEMPHASIS * x[at];
        before = x[at + 1];
        re[to] = t->window[at] * (double)even;
        im[to] = t->window[at + 1] * (double)odd;
    }
}

// Complex FFT in place: radix 2, decimation in time, points already in bit-reversed order.
static void fft(double *restrict re, double *restrict im, const pk_logmel_tables *t) {
    const size_t n = t->n_points;
    for (size_t half = 1; half < n; half *= 2) {
        for (size_t j = 0; j < half; j++) {
            const double c = t->cosine[j * (n / half)], s = t->sine[j * (n / half)];
            for (size_t a = j; a < n; a += 2 * half) {
                const size_t b = a + half;
                const double r = re[b] * c + im[b] * s, i = im[b] * c - re[b] * s;
                re[b] = re[a] - r;
                im[b] = im[a] - i;
                re[a] = re[a] + r;
                im[a] = im[a] + i;
            }
        }
    }
}

// |S[k]|^2 of the real FFT from the complex one Z of its even and odd samples:
// 2 S[k] = (Z[k] + Z*[n - k]) - i e^(-i pi k / n) (Z[k] - Z*[n - k]).
static double power_at(const double *re, const double *im, size_t k, const pk_logmel_tables *t) {
    const size_t mirror = t->n_points - k;
    const double even_re = re[k] + re[mirror], even_im = im[k] - im[mirror];
    const double odd_re = re[k] - re[mirror], odd_im = im[k] + im[mirror];
    const double c = t->cosine[k], s = t->sine[k];
    const double r = even_re + (odd_im * c - odd_re * s);
    const double i = even_im - (odd_re * c + odd_im * s);
    return 0.25 * (r * r + i * i);
}

// ln x of x >= 1, as logmel.h states it.
static double ln(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint64_t over = bits - PK_LOGMEL_SQRT_HALF;
    const double e = (double)(over >> 52);
    bits -= over & PK_LOGMEL_EXPONENT;
    double m;
    memcpy(&m, &bits, sizeof m);
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double p = 1.0 / 13;
    p = p * z + 1.0 / 11;
    p = p * z + 1.0 / 9;
    p = p * z + 1.0 / 7;
    p = p * z + 1.0 / 5;
    p = p * z + 1.0 / 3;
    p = p * z + 1.0;
    return e * PK_LOGMEL_LN2 + (s + s) * p;
}

void pk_logmel_c(float *restrict out, const float *wave, size_t n_frames, const pk_logmel_tables *t) {
    double re[PK_LOGMEL_MAX_POINTS], im[PK_LOGMEL_MAX_POINTS], power[PK_LOGMEL_MAX_POINTS];
    for (size_t f = 0; f < n_frames; f++) {
        load(re, im, wave + f * t->hop_samples, t);
        fft(re, im, t);
        for (size_t k = 1; k < t->n_bins; k++) power[k] = power_at(re, im, k, t);
        const double *tap = t->taps;
        for (size_t m = 0; m < PK_LOGMEL_BANDS; m++) {
            double sum = 0.0;
            for (size_t i = 0; i < t->n_taps[m]; i++) sum = sum + *tap++ * power[t->first_bin[m] + i];
            out[f * PK_LOGMEL_BANDS + m] = (float)ln(sum > 1.0 ? sum : 1.0);
        }
    }
}
