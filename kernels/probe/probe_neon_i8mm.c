// SPDX-License-Identifier: Apache-2.0
// probe_neon_i8mm.c - the int8 probe with smmla, twice the work of sdot. Needs the int8 matrix extension.
#if !defined(__ARM_FEATURE_MATMUL_INT8)
#error "compile with -march=armv8.2-a+dotprod+i8mm"
#endif
#include <arm_neon.h>

#include "probe.h"

enum { SUMS = 16, MACS = 32 };  // 16 of 32 registers; one smmla: two rows of 8 times two columns of 8

#define OPAQUE(v) __asm__ volatile("" : "+w"(v))  // equal sums would become one

PK_PROBE_INT8(pk_probe_int8_neon_i8mm) {
    const int8x16_t weight = vdupq_n_s8(PK_PROBE_WEIGHT), input = vdupq_n_s8(PK_PROBE_INPUT);
    int32x4_t sums[SUMS];
    for (int k = 0; k < SUMS; k++) {
        sums[k] = vdupq_n_s32(0);
        OPAQUE(sums[k]);
    }
    for (size_t r = 0; r < rounds; r++) {
        for (int k = 0; k < SUMS; k++) sums[k] = vmmlaq_s32(sums[k], weight, input);
    }
    for (int k = 1; k < SUMS; k++) sums[0] = vaddq_s32(sums[0], sums[k]);
    *sum = vaddvq_u32(vreinterpretq_u32_s32(sums[0]));
    return (uint64_t)rounds * SUMS * MACS * 2;
}
