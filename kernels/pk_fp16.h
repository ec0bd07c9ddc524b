// SPDX-License-Identifier: Apache-2.0
// pk_fp16.h - float16 bits to and from float32, nothing else. The same bits with every compiler and CPU.
#ifndef PK_FP16_H
#define PK_FP16_H

#include <stdint.h>
#include <string.h>

// The nearest float16, ties to even; from 65520 on infinity. x is not NaN.
static inline uint16_t pk_to_fp16(float x) {
    uint32_t bits, sum_bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);  // 65536
    if (size < 0x38800000u) {                                    // 2^-14: below it float16 is in steps of 2^-24,
        const float sum = (x < 0.0f ? -x : x) + 0.5f;            // which are float32's above 1/2
        memcpy(&sum_bits, &sum, sizeof sum_bits);
        return (uint16_t)(sign | (sum_bits - 0x3f000000u));
    }
    const uint32_t rounded = size + 0xfffu + (size >> 13 & 1u);
    return (uint16_t)(sign | (rounded - (112u << 23)) >> 13);    // the exponents' biases are 127 and 15
}

// Exact. A NaN stays one, quiet, with its sign and payload, as F16C has it. Without branches compilers make SIMD of
// loops of it.
static inline float pk_from_fp16(uint16_t half) {
    const uint32_t sign = half & 0x8000u, size = half & 0x7fffu, is_subnormal = 0u - (size < 0x400u);
    const float subnormal = (float)(int32_t)size * 0x1p-24f;
    uint32_t bits, normal = (size << 13) + (112u << 23);
    normal += (0u - (size >= 0x7c00u)) & 112u << 23;  // infinity and NaN: the largest exponent in both
    normal |= (uint32_t)(size > 0x7c00u) << 22;
    memcpy(&bits, &subnormal, sizeof bits);
    bits = (bits & is_subnormal) | (normal & ~is_subnormal) | sign << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

#endif
