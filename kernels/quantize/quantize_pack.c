// SPDX-License-Identifier: Apache-2.0
// quantize_pack.c - from the fits of a block's sub-blocks to its bytes, and the constants of the fits.
#include <stdbool.h>
#include <string.h>

#include "pk_fp16.h"
#include "quantize.h"

size_t pk_quantize_bytes(pk_quantize_type type) {
    switch (type) {
        case PK_Q4_K: return PK_Q4_K_BYTES;
        case PK_Q5_K: return PK_Q5_K_BYTES;
        case PK_Q6_K: return PK_Q6_K_BYTES;
    }
    return 0;
}

void pk_quantize_set_ranges(pk_quantize_ranges *r, pk_quantize_type type) {
    const bool four = type == PK_Q4_K;
    const float first = four ? -1.0f : -0.5f;
    r->top = four ? 15.0f : 31.0f;
    r->n_ranges = four ? 21 : 16;
    for (size_t i = 0; i < r->n_ranges; i++) r->range[i] = first + 0.1f * (float)i + r->top;
}

void pk_quantize_set_inverses(float inverses[19]) {
    inverses[0] = -32.0f;
    for (int i = -9, at = 1; i <= 9; i++) {
        if (i) inverses[at++] = -(32.0f + 0.1f * (float)i);
    }
}

// Any float: numbers beyond 2^22, infinities and NaN lose their high bits.
static inline int32_t round_to_int(float x) {
    const float sum = x + PK_QUANTIZE_ROUND;
    uint32_t bits;
    memcpy(&bits, &sum, sizeof bits);
    return (int32_t)(bits & PK_QUANTIZE_LOW) - 0x400000;
}

// round_to_int, clamped to low..high, less low. On floats, as SSE2 has no minimum of 32-bit integers: the low
// byte of 2^23 and more is the integer's own.
static inline uint8_t level_of(float x, float low, float high) {
    const float sum = x + PK_QUANTIZE_ROUND, least = low + PK_QUANTIZE_ROUND, most = high + PK_QUANTIZE_ROUND;
    uint32_t bits;
    float r;
    memcpy(&bits, &sum, sizeof bits);
    bits = (bits & PK_QUANTIZE_LOW) | PK_QUANTIZE_EXPONENT;
    memcpy(&r, &bits, sizeof r);
    r = r > least ? r : least;
    r = r < most ? r : most;
    memcpy(&bits, &r, sizeof bits);
    return (uint8_t)(bits - (uint32_t)(int32_t)low);
}

static void put_half(uint8_t *out, uint16_t half) {
    out[0] = (uint8_t)(half & 0xff);
    out[1] = (uint8_t)(half >> 8);
}

// A scale or min in 6 bits. The cast to a byte before the comparison is ggml's: a negative number becomes 63.
static uint8_t six_bits(float x) {
    const uint8_t byte = (uint8_t)round_to_int(x);
    return byte < 63 ? byte : 63;
}

// s and m of sub-blocks 0..3 fill six bits of bytes 0..3 and 4..7; those of 4..7 have their low four bits in
// bytes 8..11 and their high two above the others.
static void put_six_bits(uint8_t out[12], const uint8_t s[8], const uint8_t m[8]) {
    for (size_t j = 0; j < 4; j++) {
        out[j] = (uint8_t)(s[j] | s[j + 4] >> 4 << 6);
        out[j + 4] = (uint8_t)(m[j] | m[j + 4] >> 4 << 6);
        out[j + 8] = (uint8_t)((s[j + 4] & 15) | (m[j + 4] & 15) << 4);
    }
}

// One sub-block of 32.
static void choose_levels(uint8_t *restrict q, const float *x, const pk_quantize_fit *fit, float d, float dm,
                          float top) {
    if (d != 0.0f) {
        for (size_t i = 0; i < 32; i++) q[i] = level_of((x[i] + dm) / d, 0.0f, top);
    } else {  // no scale to divide by: the levels of the fit stay
        for (size_t i = 0; i < 32; i++) q[i] = level_of(fit->inverse * (x[i] - fit->base), 0.0f, top);
    }
}

static void pack_with_min(uint8_t *restrict out, const float *x, const pk_quantize_fit fit[8],
                          pk_quantize_type type) {
    float max_scale = 0.0f, max_min = 0.0f;
    for (size_t j = 0; j < 8; j++) {
        if (fit[j].scale > max_scale) max_scale = fit[j].scale;
        if (fit[j].min > max_min) max_min = fit[j].min;
    }
    const float inverse_scale = max_scale > 0.0f ? 63.0f / max_scale : 0.0f;
    const float inverse_min = max_min > 0.0f ? 63.0f / max_min : 0.0f;
    uint8_t s[8], m[8], q[PK_QUANTIZE_BLOCK];
    for (size_t j = 0; j < 8; j++) {
        s[j] = six_bits(inverse_scale * fit[j].scale);
        m[j] = six_bits(inverse_min * fit[j].min);
    }
    const uint16_t half = pk_to_fp16(max_scale / 63.0f), half_min = pk_to_fp16(max_min / 63.0f);
    const float d = pk_from_fp16(half), dmin = pk_from_fp16(half_min);
    const float top = type == PK_Q4_K ? 15.0f : 31.0f;
    for (size_t j = 0; j < 8; j++) choose_levels(q + 32 * j, x + 32 * j, &fit[j], d * s[j], dmin * m[j], top);
    put_half(out, half);
    put_half(out + 2, half_min);
    put_six_bits(out + 4, s, m);
    uint8_t *low = out + 16;
    if (type == PK_Q5_K) {  // bit j of byte i is bit 4 of sub-block j's level i
        uint8_t high[32] = {0};
        for (size_t j = 0; j < 8; j++) {
            const uint8_t bit = (uint8_t)(1u << j), *level = q + 32 * j;
            for (size_t i = 0; i < 32; i++) high[i] = (uint8_t)(high[i] | (-(level[i] >> 4) & bit));
        }
        memcpy(low, high, sizeof high);
        low += 32;
    }
    for (size_t pair = 0; pair < 4; pair++) {  // two sub-blocks share 32 bytes
        const uint8_t *a = q + 64 * pair, *b = a + 32;
        for (size_t i = 0; i < 32; i++) low[32 * pair + i] = (uint8_t)((a[i] & 15) | (b[i] & 15) << 4);
    }
}

// No scale to divide by: the levels of the fit stay. Those of a zero sub-block are the lowest.
static void keep_levels(uint8_t q[16], const float x[16], float inverse) {
    for (size_t i = 0; i < 16; i++) q[i] = inverse != 0.0f ? level_of(inverse * x[i], -32.0f, 31.0f) : 0;
}

static void pack_q6_k(uint8_t *restrict out, const float *x, const pk_quantize_fit fit[16]) {
    float max_scale = 0.0f, max_size = 0.0f;
    for (size_t j = 0; j < 16; j++) {
        const float size = fit[j].scale < 0.0f ? -fit[j].scale : fit[j].scale;
        if (size > max_size) {
            max_size = size;
            max_scale = fit[j].scale;
        }
    }
    if (max_size < PK_QUANTIZE_ZERO) {
        memset(out, 0, PK_Q6_K_BYTES);
        return;
    }
    const float inverse = -128.0f / max_scale;
    const uint16_t half = pk_to_fp16(1.0f / inverse);
    float d[16], divisor[PK_QUANTIZE_BLOCK];
    for (size_t j = 0; j < 16; j++) {
        const int32_t rounded = round_to_int(inverse * fit[j].scale), s = rounded < 127 ? rounded : 127;
        out[192 + j] = (uint8_t)s;
        d[j] = pk_from_fp16(half) * (float)s;
        for (size_t i = 0; i < 16; i++) divisor[16 * j + i] = d[j] != 0.0f ? d[j] : 1.0f;
    }
    uint8_t q[PK_QUANTIZE_BLOCK];
    for (size_t i = 0; i < PK_QUANTIZE_BLOCK; i++) q[i] = level_of(x[i] / divisor[i], -32.0f, 31.0f);
    for (size_t j = 0; j < 16; j++) {
        if (d[j] == 0.0f) keep_levels(q + 16 * j, x + 16 * j, fit[j].inverse);
    }
    put_half(out + 208, half);
    for (size_t part = 0; part < 2; part++) {  // 128 weights: four runs a, b, c, e of 32
        const uint8_t *a = q + 128 * part, *b = a + 32, *c = a + 64, *e = a + 96;
        uint8_t *low = out + 64 * part, *high = out + 128 + 32 * part;
        for (size_t i = 0; i < 32; i++) {
            low[i] = (uint8_t)((a[i] & 15) | (c[i] & 15) << 4);
            low[32 + i] = (uint8_t)((b[i] & 15) | (e[i] & 15) << 4);
            high[i] = (uint8_t)(a[i] >> 4 | b[i] >> 4 << 2 | c[i] >> 4 << 4 | e[i] >> 4 << 6);
        }
    }
}

void pk_quantize_pack(uint8_t *restrict out, const float *x, const pk_quantize_fit *fit, pk_quantize_type type) {
    if (type == PK_Q6_K) {
        pack_q6_k(out, x, fit);
    } else {
        pack_with_min(out, x, fit, type);
    }
}
