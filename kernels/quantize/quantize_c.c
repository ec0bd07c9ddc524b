// SPDX-License-Identifier: Apache-2.0
// quantize_c.c - scalar reference. Clear first; it is also the fallback.
#include <math.h>
#include <string.h>

#include "quantize.h"

enum { LONG = 32, SHORT = 16 };     // sub-blocks with a min, and those of Q6_K
enum { TRIED = 19, COLUMNS = 20 };  // inverse scales of Q6_K; one more makes whole vectors of four

// A level as a float: x rounded, with the same high bits lost as in pk_quantize_pack, then clamped to 0..top.
static inline float level_of(float x, float top) {
    const float sum = x + PK_QUANTIZE_ROUND, most = top + PK_QUANTIZE_ROUND;
    uint32_t bits;
    float r;
    memcpy(&bits, &sum, sizeof bits);
    bits = (bits & PK_QUANTIZE_LOW) | PK_QUANTIZE_EXPONENT;
    memcpy(&r, &bits, sizeof r);
    r = r > PK_QUANTIZE_ROUND ? r : PK_QUANTIZE_ROUND;
    r = r < most ? r : most;
    return r - PK_QUANTIZE_ROUND;
}

static float error_of(const float x[LONG], const float w[LONG], const float level[LONG], float scale, float min) {
    float term[LONG], sum = 0.0f;
    for (size_t i = 0; i < LONG; i++) {
        const float diff = scale * level[i] + min - x[i];
        term[i] = w[i] * (diff * diff);
    }
    for (size_t i = 0; i < LONG; i++) sum += term[i];
    return sum;
}

static pk_quantize_fit fit_with_min(const float x[LONG], const pk_quantize_ranges *ranges) {
    float w[LONG], level[LONG], wl[LONG], wll[LONG], wlx[LONG];
    float squares = 0.0f;
    for (size_t i = 0; i < LONG; i++) squares += x[i] * x[i];
    const float rms = sqrtf(squares / LONG);
    for (size_t i = 0; i < LONG; i++) w[i] = rms + fabsf(x[i]);
    float min = x[0], max = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (size_t i = 1; i < LONG; i++) {
        min = x[i] < min ? x[i] : min;
        max = x[i] > max ? x[i] : max;
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    if (min > 0.0f) min = 0.0f;
    // All equal: the division gives infinity, every level is 0, the scale is 0 and no range below is better.
    const float inverse = ranges->top / (max - min);
    pk_quantize_fit best = {1.0f / inverse, min, inverse, min};
    for (size_t i = 0; i < LONG; i++) level[i] = level_of(inverse * (x[i] - min), ranges->top);
    float best_error = error_of(x, w, level, best.scale, min);
    for (size_t r = 0; r < ranges->n_ranges; r++) {
        const float inverse_r = ranges->range[r] / (max - min);
        for (size_t i = 0; i < LONG; i++) {
            level[i] = level_of(inverse_r * (x[i] - min), ranges->top);
            wl[i] = w[i] * level[i];
            wll[i] = wl[i] * level[i];
            wlx[i] = wl[i] * x[i];
        }
        float l = 0.0f, ll = 0.0f, lx = 0.0f;
        for (size_t i = 0; i < LONG; i++) {
            l += wl[i];
            ll += wll[i];
            lx += wlx[i];
        }
        const float det = sum_w * ll - l * l;
        if (!(det > 0.0f)) continue;
        float scale_r = (sum_w * lx - sum_x * l) / det, min_r = (ll * sum_x - l * lx) / det;
        if (min_r > 0.0f) {
            min_r = 0.0f;
            scale_r = lx / ll;
        }
        const float error = error_of(x, w, level, scale_r, min_r);
        if (error < best_error) {
            best_error = error;
            best = (pk_quantize_fit){scale_r, min_r, inverse_r, min};
            min = min_r;
        }
    }
    best.min = -best.min;
    return best;
}

static pk_quantize_fit fit_q6_k(const float x[SHORT], const float inverses[TRIED]) {
    float size = 0.0f, largest = 0.0f;
    for (size_t i = 0; i < SHORT; i++) {
        if (fabsf(x[i]) > size) {
            size = fabsf(x[i]);
            largest = x[i];
        }
    }
    pk_quantize_fit best = {0.0f, 0.0f, 0.0f, 0.0f};
    if (size < PK_QUANTIZE_ZERO) return best;
    float inverse[COLUMNS], lx[COLUMNS] = {0.0f}, ll[COLUMNS] = {0.0f};
    for (size_t k = 0; k < COLUMNS; k++) inverse[k] = inverses[k < TRIED ? k : 0] / largest;
    for (size_t i = 0; i < SHORT; i++) {
        const float w = x[i] * x[i], wx = w * x[i];
        for (size_t k = 0; k < COLUMNS; k++) {  // the inner loop, as no scale waits for another's result
            float l = inverse[k] * x[i] + PK_QUANTIZE_ROUND - PK_QUANTIZE_ROUND;  // within +-33: no bits to lose
            l = l < 31.0f ? l : 31.0f;
            l = l > -32.0f ? l : -32.0f;
            lx[k] += wx * l;
            ll[k] += w * l * l;
        }
    }
    float best_gain = 0.0f;
    for (size_t k = 0; k < TRIED; k++) {
        if (k == 0 || (ll[k] > 0.0f && lx[k] * lx[k] > best_gain * ll[k])) {
            best.scale = ll[k] != 0.0f ? lx[k] / ll[k] : 0.0f;
            best.inverse = inverse[k];
            best_gain = best.scale * lx[k];
        }
    }
    return best;
}

void pk_quantize_c(uint8_t *restrict out, const float *x, size_t n_blocks, pk_quantize_type type) {
    const size_t bytes = pk_quantize_bytes(type);
    pk_quantize_ranges ranges;
    float inverses[TRIED];
    pk_quantize_set_ranges(&ranges, type);
    pk_quantize_set_inverses(inverses);
    for (size_t b = 0; b < n_blocks; b++, x += PK_QUANTIZE_BLOCK, out += bytes) {
        pk_quantize_fit fit[16];
        if (type == PK_Q6_K) {
            for (size_t j = 0; j < 16; j++) fit[j] = fit_q6_k(x + SHORT * j, inverses);
        } else {
            for (size_t j = 0; j < 8; j++) fit[j] = fit_with_min(x + LONG * j, &ranges);
        }
        pk_quantize_pack(out, x, fit, type);
    }
}
