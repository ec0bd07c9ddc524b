// SPDX-License-Identifier: Apache-2.0
// logmel_tables.c - window, twiddle factors and mel weights, worked out once into the caller's memory.
#include <math.h>

#include "logmel.h"

static const double PI = 3.14159265358979323846;

// Mel as SpeechLib and Kaldi define it. f in Hz.
static double mel(double f) { return 1127.0 * log(1.0 + f / 700.0); }

static uint16_t reversed(size_t n, size_t n_points) {
    size_t r = 0;
    for (size_t bit = 1; bit < n_points; bit *= 2) r = r * 2 + (n & bit ? 1 : 0);
    return (uint16_t)r;
}

static void set_window(pk_logmel_tables *t) {
    const double last = (double)(t->window_samples - 1);  // symmetric: both ends are 0.08
    for (size_t n = 0; n < t->window_samples; n++) {
        t->window[n] = 32768.0 * (0.54 - 0.46 * cos(2.0 * PI * (double)n / last));
    }
}

static void set_fft(pk_logmel_tables *t) {
    for (size_t k = 0; k < t->n_points; k++) {
        const double angle = PI * (double)k / (double)t->n_points;
        t->cosine[k] = cos(angle);
        t->sine[k] = sin(angle);
        t->place[k] = reversed(k, t->n_points);
    }
}

// 80 triangles, linear in mel, peak 1, no area normalisation, from 0 to 7690 Hz. Bins are 31.25 Hz
// apart at either rate. The original gives bins 0 and 246 no weight; transformers' port gives bin 246
// a little in band 79.
static void set_mel(pk_logmel_tables *t) {
    const double bin_hz = 31.25, spacing = mel(7690.0) / (PK_LOGMEL_BANDS + 1);
    double mel_of[PK_LOGMEL_MAX_POINTS];
    for (size_t k = 1; k < t->n_bins; k++) mel_of[k] = mel(bin_hz * (double)k);
    size_t used = 0;
    for (size_t m = 0; m < PK_LOGMEL_BANDS; m++) {
        const double centre = spacing * (double)(m + 1);
        size_t first = 0, n = 0;
        for (size_t k = 1; k < t->n_bins; k++) {
            const double weight = 1.0 - fabs(mel_of[k] - centre) / spacing;
            if (weight <= 0.0) continue;
            if (n == 0) first = k;
            t->taps[used + n++] = weight;
        }
        t->first_bin[m] = (uint16_t)first;
        t->n_taps[m] = (uint16_t)n;
        used += n;
    }
}

bool pk_logmel_setup(pk_logmel_tables *t, unsigned sample_rate) {
    if (sample_rate != 16000 && sample_rate != 8000) return false;
    const bool wide = sample_rate == 16000;
    t->window_samples = wide ? 400 : 200;
    t->hop_samples = wide ? 160 : 80;
    t->n_points = wide ? 256 : 128;
    t->n_bins = wide ? 246 : 128;
    set_window(t);
    set_fft(t);
    set_mel(t);
    return true;
}
