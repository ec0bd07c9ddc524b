// SPDX-License-Identifier: Apache-2.0
// check_fp16.c - all 65536 float16 to float32 and back, and the float32 between two of them.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "pk_check.h"
#include "pk_fp16.h"

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// IEEE 754's definition: sign, 5 bits of exponent, 10 of fraction. A NaN by the bits that F16C gives.
static uint32_t defined(uint16_t half) {
    const uint32_t sign = (uint32_t)(half >> 15) << 31, exponent = half >> 10 & 31u, fraction = half & 1023u;
    if (exponent == 31) return sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0u);
    const float size = exponent == 0 ? ldexpf((float)fraction, -24)
                                     : ldexpf((float)(1024 + fraction), (int)exponent - 25);
    return sign | bits_of(size);
}

// What lies half-way to the next float16 goes to the even one, what lies beside that to the nearer one. After the
// largest, 65504, infinity stands for 65536.
static bool rounds(uint16_t half) {
    const float here = pk_from_fp16(half), next = half == 0x7bff ? 65536.0f : pk_from_fp16((uint16_t)(half + 1));
    const float middle = 0.5f * (here + next);  // exact: one bit more than a float16 has
    const uint16_t up = (uint16_t)(half + 1), even = half & 1 ? up : half;
    return pk_to_fp16(middle) == even && pk_to_fp16(nextafterf(middle, 0.0f)) == half &&
           pk_to_fp16(nextafterf(middle, INFINITY)) == up && pk_to_fp16(-middle) == (even | 0x8000);
}

bool check_fp16(void) {
    unsigned bad = 0;
    for (uint32_t i = 0; i <= 0xffffu; i++) {
        const uint16_t half = (uint16_t)i;
        bool ok = bits_of(pk_from_fp16(half)) == defined(half);
        if ((half & 0x7fffu) <= 0x7c00u) ok = ok && pk_to_fp16(pk_from_fp16(half)) == half;
        if (half < 0x7c00u) ok = ok && rounds(half);
        bad += !ok;
    }
    printf("fp16   %u of 65536 numbers as defined\n", 65536u - bad);
    return bad == 0;
}
