// SPDX-License-Identifier: Apache-2.0
// probe_avx2.c - the probes on 32 bytes. Needs AVX2 and FMA.
#if !defined(__AVX2__) || !defined(__FMA__)
#error "compile with -mavx2 -mfma"
#endif
#include <immintrin.h>

#include "probe.h"

enum { BYTES = 32, FLOATS = 8, LOADS = 4 };
enum { SUMS = 4 };     // the products do not wait for one another, and an addition takes one cycle
enum { CHAINS = 12 };  // of 16 registers: two a cycle, up to six cycles each

// Equal sums would become one, and an unchanging product would leave the loop. It makes no instruction.
#define OPAQUE(v) __asm__ volatile("" : "+x"(v))

static inline uint32_t total(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(s);
}

PK_PROBE_INT8(pk_probe_int8_avx2) {
    const __m256i input = _mm256_set1_epi8(PK_PROBE_INPUT), ones = _mm256_set1_epi16(1);
    __m256i weight = _mm256_set1_epi8(PK_PROBE_WEIGHT);
    __m256i sums[SUMS];
    for (int k = 0; k < SUMS; k++) sums[k] = _mm256_setzero_si256();
    for (size_t r = 0; r < rounds; r++) {
        for (int k = 0; k < SUMS; k++) {
            OPAQUE(weight);
            const __m256i pairs = _mm256_maddubs_epi16(weight, input);
            sums[k] = _mm256_add_epi32(sums[k], _mm256_madd_epi16(pairs, ones));
        }
    }
    for (int k = 1; k < SUMS; k++) sums[0] = _mm256_add_epi32(sums[0], sums[k]);
    *sum = total(sums[0]);
    return (uint64_t)rounds * SUMS * BYTES * 2;
}

PK_PROBE_FP32(pk_probe_fp32_avx2) {
    const __m256 a = _mm256_set1_ps(PK_PROBE_A), b = _mm256_set1_ps(PK_PROBE_B);
    __m256 v[CHAINS];
    for (int k = 0; k < CHAINS; k++) {
        v[k] = _mm256_setzero_ps();
        OPAQUE(v[k]);
    }
    for (size_t r = 0; r < rounds; r++) {
        for (int k = 0; k < CHAINS; k++) v[k] = _mm256_fmadd_ps(a, b, v[k]);
    }
    for (int k = 1; k < CHAINS; k++) v[0] = _mm256_add_ps(v[0], v[k]);
    float lanes[FLOATS];
    _mm256_storeu_ps(lanes, v[0]);
    *value = 0.0f;
    for (int k = 0; k < FLOATS; k++) *value += lanes[k];
    return (uint64_t)rounds * CHAINS * FLOATS * 2;
}

PK_PROBE_READ(pk_probe_read_avx2) {
    const unsigned char *p = bytes;
    __m256i sums[LOADS];
    for (int k = 0; k < LOADS; k++) sums[k] = _mm256_setzero_si256();
    for (size_t at = 0; at < n_bytes; at += LOADS * BYTES) {
        for (int k = 0; k < LOADS; k++) {
            const __m256i *words = (const __m256i *)(const void *)(p + at + (size_t)k * BYTES);
            sums[k] = _mm256_add_epi64(sums[k], _mm256_loadu_si256(words));
        }
    }
    for (int k = 1; k < LOADS; k++) sums[0] = _mm256_add_epi64(sums[0], sums[k]);
    uint64_t lanes[4];
    _mm256_storeu_si256((__m256i *)(void *)lanes, sums[0]);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}
