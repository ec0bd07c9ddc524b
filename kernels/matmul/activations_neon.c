// SPDX-License-Identifier: Apache-2.0
// activations_neon.c - four columns of a token at once; arrange turns blocks of 4 tokens by 4 columns.
#if !defined(__aarch64__)
#error "AArch64 only: 32-bit NEON has no rounding to even"
#endif
#include <arm_neon.h>
#include <float.h>
#include <math.h>
#include <string.h>

#include "activations.h"

enum { LANES = 4 };

static void put(uint8_t *restrict to, size_t i, const void *four_bytes) { memcpy(to + 4 * i, four_bytes, 4); }

// inverse: what x is multiplied by for q. It is 0 where q is: with all zeros, numbers too small for float32,
// or one that is not finite.
typedef struct {
    float d, inverse;
} scale;

static inline scale scale_of(const float *x, size_t n) {
    float32x4_t m[4] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
    for (size_t i = 0; i < n; i += 4 * LANES) {
        for (size_t j = 0; j < 4; j++) m[j] = vmaxq_f32(m[j], vabsq_f32(vld1q_f32(x + i + LANES * j)));
    }
    const float32x4_t most = vmaxq_f32(vmaxq_f32(m[0], m[1]), vmaxq_f32(m[2], m[3]));
    const float largest = vmaxvq_f32(most);  // or NaN: it stays
    const float inverse = 127.0f / largest;
    if (inverse > 0.0f && inverse <= FLT_MAX) return (scale){largest / 127.0f, inverse};
    return (scale){largest <= FLT_MAX ? 0.0f : NAN, 0.0f};
}

// Writes the q of one token and gives their sums over each half in `sums`.
static inline void quantize_block(uint8_t *restrict q, int32_t sums[2], const float *x, float inverse) {
    for (size_t half = 0; half < 2; half++, q += 16, x += 16) {
        int16x8_t level[2];
        for (size_t i = 0; i < 2; i++) {  // 0 times infinity is NaN, which is converted to 0
            const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 8 * i), inverse));
            const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 8 * i + LANES), inverse));
            level[i] = vmovn_high_s32(vmovn_s32(low), high);
        }
        sums[half] = vaddvq_s16(vaddq_s16(level[0], level[1]));  // at most 16 * 127
        vst1q_u8(q, vreinterpretq_u8_s8(vmovn_high_s16(vmovn_s16(level[0]), level[1])));
    }
}

void pk_activations_quantize_neon(const pk_activations_args *args) {
    const size_t tokens = args->tokens, shared = args->shared;
    for (size_t first = args->first; first < args->last; first += shared) {
        for (size_t t = 0; t < tokens; t++) {
            const float *x = args->x + t * args->x_stride + first * PK_X_BLOCK;
            const scale found = scale_of(x, shared * PK_X_BLOCK);
            for (size_t b = first; b < first + shared; b++, x += PK_X_BLOCK) {
                uint8_t *q = args->tile + b * tokens * PK_X_BLOCK_BYTES, *d = q + tokens * PK_X_BLOCK;
                uint8_t *s8 = d + 4 * tokens, *s32 = s8 + 4 * tokens;
                int32_t sums[2];
                quantize_block(q + t * PK_X_BLOCK, sums, x, found.inverse);
                const int32_t all = -8 * (sums[0] + sums[1]), half0 = -32 * sums[0], half1 = -32 * sums[1];
                put(d, t, &found.d);
                put(s8, t, &all);
                put(s32, t, &half0);
                put(s32, tokens + t, &half1);
            }
        }
    }
}

// Four columns of four tokens. A tile's float32 may lie anywhere, so stores are of bytes.
static inline void turn(uint8_t *restrict to, const float *x, size_t x_stride, size_t tokens) {
    const float32x4_t a = vld1q_f32(x), b = vld1q_f32(x + x_stride);
    const float32x4_t c = vld1q_f32(x + 2 * x_stride), d = vld1q_f32(x + 3 * x_stride);
    const float64x2_t ab = vreinterpretq_f64_f32(vtrn1q_f32(a, b));
    const float64x2_t cd = vreinterpretq_f64_f32(vtrn1q_f32(c, d));
    const float64x2_t ab2 = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t cd2 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    vst1q_u8(to, vreinterpretq_u8_f64(vtrn1q_f64(ab, cd)));
    vst1q_u8(to + 4 * tokens, vreinterpretq_u8_f64(vtrn1q_f64(ab2, cd2)));
    vst1q_u8(to + 8 * tokens, vreinterpretq_u8_f64(vtrn2q_f64(ab, cd)));
    vst1q_u8(to + 12 * tokens, vreinterpretq_u8_f64(vtrn2q_f64(ab2, cd2)));
}

void pk_activations_arrange_neon(const pk_activations_args *args) {
    const size_t tokens = args->tokens, from = args->first * PK_X_BLOCK, end = args->last * PK_X_BLOCK;
    const size_t stop = end < args->columns ? end : args->columns;
    for (size_t t = 0; t < tokens; t += LANES) {
        const float *x = args->x + t * args->x_stride;
        size_t k = from;
        for (; t + LANES <= tokens && k + LANES <= stop; k += LANES) {
            turn(args->tile + 4 * (k * tokens + t), x + k, args->x_stride, tokens);
        }
        for (; k < stop; k++) {
            for (size_t i = 0; i < LANES && t + i < tokens; i++) {
                put(args->tile, k * tokens + t + i, x + i * args->x_stride + k);
            }
        }
    }
}
