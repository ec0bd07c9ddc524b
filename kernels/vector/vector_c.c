// SPDX-License-Identifier: Apache-2.0
// vector_c.c - scalar reference. Clear first; it is also the fallback.
#include <float.h>
#include <math.h>
#include <string.h>

#include "pk_fp16.h"
#include "vector.h"

enum { BLOCK = 32, BLOCK_BYTES = 34, NAN_F16 = 0x7e00 };  // q8_0: f16 d, 32 s8

#define ROUND 12582912.0f  // 1.5 * 2^23: adding it leaves a small float rounded to an integer

static void rms_norm(float *out, const float *x, const float *weight, size_t n, float eps) {
    double squares = 0.0;
    for (size_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
    const float by = (float)(1.0 / sqrt(squares / (double)n + (double)eps));
    for (size_t i = 0; i < n; i++) out[i] = x[i] * by * (weight ? weight[i] : 1.0f);
}

static float two_to(int k) {  // -126 <= k <= 127
    const uint32_t bits = (uint32_t)(k + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

static float exp_of(float x) {
    if (isnan(x)) return x;
    x = x > PK_EXP_MIN ? x : PK_EXP_MIN;
    x = x < PK_EXP_MAX ? x : PK_EXP_MAX;
    const float k = x * PK_EXP_PER_LN2 + ROUND - ROUND;
    const float r = x - k * PK_EXP_LN2_HI - k * PK_EXP_LN2_LO;
    const float p = PK_EXP_C0 + r * (PK_EXP_C1 + r * (PK_EXP_C2 + r * (PK_EXP_C3 + r * PK_EXP_C4)));
    const int twos = (int)k, half = twos / 2;
    return (1.0f + (r + r * r * p)) * two_to(half) * two_to(twos - half);
}

static void swiglu(float *out, const float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
}

static void add(float *out, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

static void scale(float *out, const float *x, size_t n, float s, float bias) {
    for (size_t i = 0; i < n; i++) out[i] = x[i] * s + bias;
}

static void to_f16(uint16_t *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        const uint32_t a_nan = (bits >> 16 & 0x8000u) | NAN_F16 | (bits >> 13 & 0x3ffu);
        out[i] = isnan(x[i]) ? (uint16_t)a_nan : pk_to_fp16(x[i]);
    }
}

static void to_q8_0(uint8_t *out, const float *x, size_t n) {
    for (size_t b = 0; b < n / BLOCK; b++, x += BLOCK, out += BLOCK_BYTES) {
        float m = 0.0f;
        for (size_t i = 0; i < BLOCK; i++) {
            const float size = fabsf(x[i]);
            if (!(size <= m) && m <= FLT_MAX) m = size;  // what is not finite stays, NaN or infinity
        }
        const float d = m / 127.0f, inverse = 1.0f / d;
        const int usable = inverse > 0.0f && inverse <= FLT_MAX;
        const uint16_t half = m <= FLT_MAX ? pk_to_fp16(d) : NAN_F16;
        memcpy(out, &half, sizeof half);
        for (size_t i = 0; i < BLOCK; i++) out[2 + i] = usable ? (uint8_t)(int8_t)roundf(x[i] * inverse) : 0;
    }
}

static void rope(float *out, const float *x, const float *cos, const float *sin, size_t n_rot, size_t n) {
    const size_t half = n_rot / 2;
    for (size_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = a * sin[i] + b * cos[i];
    }
    if (out != x && n > n_rot) memcpy(out + n_rot, x + n_rot, (n - n_rot) * sizeof *x);
}

const pk_vector_variant pk_vector_c = {"c", 0, rms_norm, swiglu, add, scale, to_f16, to_q8_0, rope};
