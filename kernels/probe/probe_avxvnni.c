// SPDX-License-Identifier: Apache-2.0
// probe_avxvnni.c - the int8 probe with vpdpbusd on 32 bytes. Needs AVX2 and AVX-VNNI.
#if !defined(__AVX2__) || !defined(__AVXVNNI__)
#error "compile with -mavx2 -mavxvnni"
#endif
#include <immintrin.h>

#include "probe.h"

enum { SUMS = 12, BYTES = 32 };  // 12 of 16 registers: two a cycle, up to six cycles each

#define OPAQUE(v) __asm__ volatile("" : "+x"(v))  // equal sums would become one

// One variable for each sum: of an array, gcc 12 copies or stores every element each round.
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

PK_PROBE_INT8(pk_probe_int8_avxvnni) {
    const __m256i weight = _mm256_set1_epi8(PK_PROBE_WEIGHT), input = _mm256_set1_epi8(PK_PROBE_INPUT);
#define START(k) __m256i s##k = _mm256_setzero_si256(); OPAQUE(s##k);
    EACH(START)
#define STEP(k) s##k = _mm256_dpbusd_avx_epi32(s##k, weight, input);
    for (size_t r = 0; r < rounds; r++) {
        EACH(STEP)
    }
    __m256i sums = _mm256_setzero_si256();
#define ADD(k) sums = _mm256_add_epi32(sums, s##k);
    EACH(ADD)
    uint32_t lanes[BYTES / 4];
    _mm256_storeu_si256((__m256i *)(void *)lanes, sums);
    *sum = 0;
    for (int k = 0; k < BYTES / 4; k++) *sum += lanes[k];
    return (uint64_t)rounds * SUMS * BYTES * 2;
}
