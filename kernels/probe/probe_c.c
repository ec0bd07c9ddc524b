// SPDX-License-Identifier: Apache-2.0
// probe_c.c - the probes in plain C. Volatile keeps the compiler from working out the result beforehand.
#include <string.h>

#include "probe.h"

enum { SUMS = 16 };

PK_PROBE_INT8(pk_probe_int8_c) {
    const volatile int8_t weight = PK_PROBE_WEIGHT, input = PK_PROBE_INPUT;
    int32_t inputs[SUMS];
    uint32_t sums[SUMS] = {0};
    for (int k = 0; k < SUMS; k++) inputs[k] = input;  // read again each time: for all it knows, they differ
    for (size_t r = 0; r < rounds; r++) {
        const int32_t w = weight;
        for (int k = 0; k < SUMS; k++) sums[k] += (uint32_t)(w * inputs[k]);
    }
    *sum = 0;
    for (int k = 0; k < SUMS; k++) *sum += sums[k];
    return (uint64_t)rounds * SUMS * 2;
}

PK_PROBE_FP32(pk_probe_fp32_c) {
    const volatile float a = PK_PROBE_A, b = PK_PROBE_B;
    float inputs[SUMS], v[SUMS] = {0};
    for (int k = 0; k < SUMS; k++) inputs[k] = b;
    for (size_t r = 0; r < rounds; r++) {
        const float weight = a;
        for (int k = 0; k < SUMS; k++) v[k] += weight * inputs[k];
    }
    *value = 0.0f;
    for (int k = 0; k < SUMS; k++) *value += v[k];
    return (uint64_t)rounds * SUMS * 2;
}

PK_PROBE_READ(pk_probe_read_c) {
    const unsigned char *p = bytes;
    uint64_t sums[4] = {0};
    for (size_t at = 0; at < n_bytes; at += sizeof sums) {
        uint64_t words[4];
        memcpy(words, p + at, sizeof words);
        for (int k = 0; k < 4; k++) sums[k] += words[k];
    }
    return sums[0] + sums[1] + sums[2] + sums[3];
}
