// SPDX-License-Identifier: Apache-2.0
// activations_c.c - scalar reference. Clear first; it is also the fallback.
#include <float.h>
#include <math.h>
#include <string.h>

#include "activations.h"

#define ROUND 12582912.0f  // 1.5 * 2^23: adding it leaves a small float rounded to an integer, ties to even

static void put(uint8_t *restrict to, size_t i, const void *four_bytes) { memcpy(to + 4 * i, four_bytes, 4); }

static float largest(const float *x, size_t n) {
    float m = 0.0f;
    for (size_t i = 0; i < n; i++) {
        const float size = fabsf(x[i]);
        if (!(size <= m)) m = size;  // a NaN is taken
        if (!(m <= FLT_MAX)) break;  // and stays
    }
    return m;
}

// Writes the q of one token, gives their sums over each half in `sums`, and returns d. m: the largest |x| of the scale.
static float quantize_block(uint8_t *restrict q, int32_t sums[2], const float *x, float m) {
    sums[0] = sums[1] = 0;
    const float inverse = 127.0f / m;  // infinite for an m below 2^-121 or so: taken for 0
    const int usable = inverse > 0.0f && inverse <= FLT_MAX;
    for (size_t i = 0; i < PK_X_BLOCK; i++) {
        const int32_t level = usable ? (int32_t)(x[i] * inverse + ROUND - ROUND) : 0;
        q[i] = (uint8_t)level;
        sums[i / 16] += level;
    }
    if (usable) return m / 127.0f;
    return m <= FLT_MAX ? 0.0f : NAN;
}

void pk_activations_quantize_c(const pk_activations_args *args) {
    const size_t tokens = args->tokens, scale_columns = args->shared * PK_X_BLOCK;
    for (size_t b = args->first; b < args->last; b++) {
        uint8_t *q = args->tile + b * tokens * PK_X_BLOCK_BYTES, *d = q + tokens * PK_X_BLOCK;
        uint8_t *s8 = d + 4 * tokens, *s32 = s8 + 4 * tokens;
        for (size_t t = 0; t < tokens; t++) {
            int32_t sums[2];
            const float *row = args->x + t * args->x_stride;
            const float m = largest(row + b / args->shared * scale_columns, scale_columns);
            const float scale = quantize_block(q + t * PK_X_BLOCK, sums, row + b * PK_X_BLOCK, m);
            const int32_t all = -8 * (sums[0] + sums[1]), half0 = -32 * sums[0], half1 = -32 * sums[1];
            put(d, t, &scale);
            put(s8, t, &all);
            put(s32, t, &half0);
            put(s32, tokens + t, &half1);
        }
    }
}

void pk_activations_arrange_c(const pk_activations_args *args) {
    const size_t end = args->last * PK_X_BLOCK, stop = end < args->columns ? end : args->columns;
    for (size_t k = args->first * PK_X_BLOCK; k < stop; k++) {
        for (size_t t = 0; t < args->tokens; t++) {
            put(args->tile, k * args->tokens + t, args->x + t * args->x_stride + k);
        }
    }
}
