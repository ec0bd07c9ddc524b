// SPDX-License-Identifier: Apache-2.0
// probe_neon_dotprod.c - the probes on 16 bytes. Needs the dot product extension.
#if !defined(__ARM_FEATURE_DOTPROD)
#error "compile with -march=armv8.2-a+dotprod"
#endif
#include <arm_neon.h>

#include "probe.h"

enum { BYTES = 16, FLOATS = 4, LOADS = 8 };
enum { SUMS = 16 };  // of 32 registers: four a cycle, up to four cycles each

#define OPAQUE(v) __asm__ volatile("" : "+w"(v))  // equal sums would become one

PK_PROBE_INT8(pk_probe_int8_neon_dotprod) {
    const int8x16_t weight = vdupq_n_s8(PK_PROBE_WEIGHT), input = vdupq_n_s8(PK_PROBE_INPUT);
    int32x4_t sums[SUMS];
    for (int k = 0; k < SUMS; k++) {
        sums[k] = vdupq_n_s32(0);
        OPAQUE(sums[k]);
    }
    for (size_t r = 0; r < rounds; r++) {
        for (int k = 0; k < SUMS; k++) sums[k] = vdotq_s32(sums[k], weight, input);
    }
    for (int k = 1; k < SUMS; k++) sums[0] = vaddq_s32(sums[0], sums[k]);
    *sum = vaddvq_u32(vreinterpretq_u32_s32(sums[0]));
    return (uint64_t)rounds * SUMS * BYTES * 2;
}

PK_PROBE_FP32(pk_probe_fp32_neon_dotprod) {
    const float32x4_t a = vdupq_n_f32(PK_PROBE_A), b = vdupq_n_f32(PK_PROBE_B);
    float32x4_t v[SUMS];
    for (int k = 0; k < SUMS; k++) {
        v[k] = vdupq_n_f32(0.0f);
        OPAQUE(v[k]);
    }
    for (size_t r = 0; r < rounds; r++) {
        for (int k = 0; k < SUMS; k++) v[k] = vfmaq_f32(v[k], a, b);
    }
    for (int k = 1; k < SUMS; k++) v[0] = vaddq_f32(v[0], v[k]);
    *value = vaddvq_f32(v[0]);
    return (uint64_t)rounds * SUMS * FLOATS * 2;
}

PK_PROBE_READ(pk_probe_read_neon_dotprod) {
    const unsigned char *p = bytes;
    uint64x2_t sums[LOADS];
    for (int k = 0; k < LOADS; k++) sums[k] = vdupq_n_u64(0);
    for (size_t at = 0; at < n_bytes; at += LOADS * BYTES) {
        for (int k = 0; k < LOADS; k++) {
            const uint8x16_t words = vld1q_u8(p + at + (size_t)k * BYTES);
            sums[k] = vaddq_u64(sums[k], vreinterpretq_u64_u8(words));
        }
    }
    for (int k = 1; k < LOADS; k++) sums[0] = vaddq_u64(sums[0], sums[k]);
    return vaddvq_u64(sums[0]);
}
