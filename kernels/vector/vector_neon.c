// SPDX-License-Identifier: Apache-2.0
// vector_neon.c - four numbers at once; the last ones through a register's worth of memory. Each operation on
// what is left of n numbers is a function, called with the constant LANES but for the end of a row.
#if !defined(__aarch64__)
#error "AArch64 only: 32-bit NEON has no float64"
#endif
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "vector.h"

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 4, BLOCK = 32, BLOCK_BYTES = 34 };  // q8_0: f16 d, 32 s8
enum { INFINITE = 0x7f800000, NAN_F16 = 0x7e00 };

// What is left of n elements: a register, or its first few with zeros behind them.
INLINE float32x4_t load(const float *x, size_t left) {
    if (left >= LANES) return vld1q_f32(x);
    float last[LANES] = {0.0f};
    memcpy(last, x, left * sizeof *x);
    return vld1q_f32(last);
}

INLINE void store(float *to, float32x4_t y, size_t left) {
    if (left >= LANES) {
        vst1q_f32(to, y);
    } else {
        float last[LANES];
        vst1q_f32(last, y);
        memcpy(to, last, left * sizeof *to);
    }
}

INLINE void add_squares(float64x2_t *sum, const float *x, size_t left) {
    const float32x4_t v = load(x, left);
    const float64x2_t low = vcvt_f64_f32(vget_low_f32(v)), high = vcvt_high_f64_f32(v);
    sum[0] = vfmaq_f64(sum[0], low, low);
    sum[1] = vfmaq_f64(sum[1], high, high);
}

static inline float rms_scale(const float *x, size_t n, float eps) {
    float64x2_t sum[4] = {vdupq_n_f64(0.0), vdupq_n_f64(0.0), vdupq_n_f64(0.0), vdupq_n_f64(0.0)};
    size_t i = 0;
    for (; n - i >= 2 * LANES; i += 2 * LANES) {
        add_squares(sum, x + i, LANES);
        add_squares(sum + 2, x + i + LANES, LANES);
    }
    for (; i < n; i += LANES) add_squares(sum, x + i, n - i);
    const float64x2_t all = vaddq_f64(vaddq_f64(sum[0], sum[1]), vaddq_f64(sum[2], sum[3]));
    return (float)(1.0 / sqrt(vaddvq_f64(all) / (double)n + (double)eps));
}

INLINE void norm(float *out, const float *x, const float *weight, float by, size_t left) {
    const float32x4_t y = vmulq_n_f32(load(x, left), by);
    store(out, weight ? vmulq_f32(y, load(weight, left)) : y, left);
}

static void rms_norm(float *out, const float *x, const float *weight, size_t n, float eps) {
    const float by = rms_scale(x, n, eps);
    size_t i = 0;
    for (; n - i >= LANES; i += LANES) norm(out + i, x + i, weight ? weight + i : NULL, by, LANES);
    if (i < n) norm(out + i, x + i, weight ? weight + i : NULL, by, n - i);
}

static inline float32x4_t two_to(int32x4_t k) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k, vdupq_n_s32(127)), 23));
}

// The clamps keep NaN.
static inline float32x4_t exp_of(float32x4_t x) {
    const float32x4_t clamped = vminq_f32(vmaxq_f32(x, vdupq_n_f32(PK_EXP_MIN)), vdupq_n_f32(PK_EXP_MAX));
    const float32x4_t k = vrndnq_f32(vmulq_n_f32(clamped, PK_EXP_PER_LN2));
    float32x4_t r = vfmsq_f32(clamped, k, vdupq_n_f32(PK_EXP_LN2_HI));
    r = vfmsq_f32(r, k, vdupq_n_f32(PK_EXP_LN2_LO));
    float32x4_t p = vfmaq_f32(vdupq_n_f32(PK_EXP_C3), vdupq_n_f32(PK_EXP_C4), r);
    p = vfmaq_f32(vdupq_n_f32(PK_EXP_C2), p, r);
    p = vfmaq_f32(vdupq_n_f32(PK_EXP_C1), p, r);
    p = vfmaq_f32(vdupq_n_f32(PK_EXP_C0), p, r);
    const float32x4_t y = vaddq_f32(vdupq_n_f32(1.0f), vfmaq_f32(r, vmulq_f32(r, r), p));
    const int32x4_t twos = vcvtq_s32_f32(k), half = vshrq_n_s32(twos, 1);
    return vmulq_f32(vmulq_f32(y, two_to(half)), two_to(vsubq_s32(twos, half)));
}

INLINE void gated(float *out, const float *gate, const float *up, size_t left) {
    const float32x4_t g = load(gate, left), e = exp_of(vnegq_f32(g));
    const float32x4_t silu = vdivq_f32(g, vaddq_f32(vdupq_n_f32(1.0f), e));
    store(out, vmulq_f32(silu, load(up, left)), left);
}

static void swiglu(float *out, const float *gate, const float *up, size_t n) {
    size_t i = 0;
    for (; n - i >= LANES; i += LANES) gated(out + i, gate + i, up + i, LANES);
    if (i < n) gated(out + i, gate + i, up + i, n - i);
}

INLINE void sum_of(float *out, const float *a, const float *b, size_t left) {
    store(out, vaddq_f32(load(a, left), load(b, left)), left);
}

static void add(float *out, const float *a, const float *b, size_t n) {
    size_t i = 0;
#pragma GCC unroll 4
    for (; n - i >= LANES; i += LANES) sum_of(out + i, a + i, b + i, LANES);
    if (i < n) sum_of(out + i, a + i, b + i, n - i);
}

// The contract rounds twice, and GCC may fuse even an intrinsic's product with a sum: the barrier forbids it.
INLINE void scaled(float *out, const float *x, float s, float bias, size_t left) {
    float32x4_t product = vmulq_n_f32(load(x, left), s);
    __asm__("" : "+w"(product));
    store(out, vaddq_f32(product, vdupq_n_f32(bias)), left);
}

static void scale(float *out, const float *x, size_t n, float s, float bias) {
    size_t i = 0;
#pragma GCC unroll 4
    for (; n - i >= LANES; i += LANES) scaled(out + i, x + i, s, bias, LANES);
    if (i < n) scaled(out + i, x + i, s, bias, n - i);
}

INLINE uint16x4_t as_f16(const float *x, size_t left) {
    return vreinterpret_u16_f16(vcvt_f16_f32(load(x, left)));
}

static void to_f16(uint16_t *out, const float *x, size_t n) {
    size_t i = 0;
#pragma GCC unroll 4
    for (; n - i >= LANES; i += LANES) vst1_u16(out + i, as_f16(x + i, LANES));
    if (i == n) return;
    uint16_t last[LANES];
    vst1_u16(last, as_f16(x + i, n - i));
    memcpy(out + i, last, (n - i) * sizeof *out);
}

// The bits of the largest |x| of a block. Without signs, floats order as their bits do, NaN last.
static inline uint32_t largest(const float *x) {
    uint32x4_t m = vdupq_n_u32(0);
    for (size_t i = 0; i < BLOCK; i += LANES) {
        m = vmaxq_u32(m, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + i))));
    }
    return vmaxvq_u32(m);
}

static inline int16x8_t levels(const float *x, float by) {
    const int32x4_t low = vcvtaq_s32_f32(vmulq_n_f32(vld1q_f32(x), by));
    return vqmovn_high_s32(vqmovn_s32(low), vcvtaq_s32_f32(vmulq_n_f32(vld1q_f32(x + LANES), by)));
}

static void to_q8_0(uint8_t *out, const float *x, size_t n) {
    for (size_t b = 0; b < n / BLOCK; b++, x += BLOCK, out += BLOCK_BYTES) {
        const uint32_t m_bits = largest(x);
        float m;
        memcpy(&m, &m_bits, sizeof m);
        const float d = m / 127.0f, inverse = 1.0f / d;
        const int finite = m_bits < INFINITE, usable = finite && !isinf(inverse);
        const uint16_t d_bits = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(d))), 0);
        const uint16_t half = finite ? d_bits : NAN_F16;
        memcpy(out, &half, sizeof half);
        for (size_t i = 0; i < BLOCK; i += 16) {
            const int8x8_t low = vqmovn_s16(levels(x + i, inverse));
            const int8x16_t q = vqmovn_high_s16(low, levels(x + i + 8, inverse));
            vst1q_u8(out + 2 + i, vandq_u8(vreinterpretq_u8_s8(q), vdupq_n_u8(usable ? 255 : 0)));
        }
    }
}

INLINE void turned(float *first, float *second, float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t s,
                   size_t left) {
    store(first, vfmsq_f32(vmulq_f32(a, c), b, s), left);
    store(second, vfmaq_f32(vmulq_f32(b, c), a, s), left);
}

static void rope(float *out, const float *x, const float *cos, const float *sin, size_t n_rot, size_t n) {
    const size_t half = n_rot / 2;
    size_t i = 0;
    for (; half - i >= LANES; i += LANES) {
        turned(out + i, out + half + i, vld1q_f32(x + i), vld1q_f32(x + half + i), vld1q_f32(cos + i),
               vld1q_f32(sin + i), LANES);
    }
    if (i < half) {
        const size_t left = half - i;
        turned(out + i, out + half + i, load(x + i, left), load(x + half + i, left), load(cos + i, left),
               load(sin + i, left), left);
    }
    if (out != x && n > n_rot) memcpy(out + n_rot, x + n_rot, (n - n_rot) * sizeof *x);
}

const pk_vector_variant pk_vector_neon = {
    "neon", PK_CPU_NEON, rms_norm, swiglu, add, scale, to_f16, to_q8_0, rope,
};
