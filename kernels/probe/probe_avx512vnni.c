// SPDX-License-Identifier: Apache-2.0
// probe_avx512vnni.c - the probes on 64 bytes. Needs AVX-512F and AVX-512 VNNI.
#if !defined(__AVX512F__) || !defined(__AVX512VNNI__)
#error "compile with -mavx512f -mavx512vnni"
#endif
#include <immintrin.h>

#include "probe.h"

enum { BYTES = 64, FLOATS = 16, LOADS = 8 };
enum { SUMS = 16 };  // of 32 registers: two a cycle, up to eight cycles each

#define OPAQUE(v) __asm__ volatile("" : "+v"(v))  // equal sums would become one

// One variable for each sum: of an array, gcc 12 copies or stores every element each round.
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

PK_PROBE_INT8(pk_probe_int8_avx512vnni) {
    const __m512i weight = _mm512_set1_epi32(PK_PROBE_WEIGHT * 0x01010101);
    const __m512i input = _mm512_set1_epi32(PK_PROBE_INPUT * 0x01010101);
#define START(k) __m512i s##k = _mm512_setzero_si512(); OPAQUE(s##k);
    EACH(START)
#define STEP(k) s##k = _mm512_dpbusd_epi32(s##k, weight, input);
    for (size_t r = 0; r < rounds; r++) {
        EACH(STEP)
    }
    __m512i sums = _mm512_setzero_si512();
#define ADD(k) sums = _mm512_add_epi32(sums, s##k);
    EACH(ADD)
    uint32_t lanes[BYTES / 4];
    _mm512_storeu_si512(lanes, sums);
    *sum = 0;
    for (int k = 0; k < BYTES / 4; k++) *sum += lanes[k];
    return (uint64_t)rounds * SUMS * BYTES * 2;
}

PK_PROBE_FP32(pk_probe_fp32_avx512vnni) {
    const __m512 a = _mm512_set1_ps(PK_PROBE_A), b = _mm512_set1_ps(PK_PROBE_B);
    __m512 v[SUMS];
    for (int k = 0; k < SUMS; k++) {
        v[k] = _mm512_setzero_ps();
        OPAQUE(v[k]);
    }
    for (size_t r = 0; r < rounds; r++) {
        for (int k = 0; k < SUMS; k++) v[k] = _mm512_fmadd_ps(a, b, v[k]);
    }
    for (int k = 1; k < SUMS; k++) v[0] = _mm512_add_ps(v[0], v[k]);
    *value = _mm512_reduce_add_ps(v[0]);
    return (uint64_t)rounds * SUMS * FLOATS * 2;
}

PK_PROBE_READ(pk_probe_read_avx512vnni) {
    const unsigned char *p = bytes;
    __m512i sums[LOADS];
    for (int k = 0; k < LOADS; k++) sums[k] = _mm512_setzero_si512();
    for (size_t at = 0; at < n_bytes; at += LOADS * BYTES) {
        for (int k = 0; k < LOADS; k++) {
            sums[k] = _mm512_add_epi64(sums[k], _mm512_loadu_si512(p + at + (size_t)k * BYTES));
        }
    }
    for (int k = 1; k < LOADS; k++) sums[0] = _mm512_add_epi64(sums[0], sums[k]);
    uint64_t lanes[BYTES / 8], total = 0;  // _mm512_reduce_add_epi64 adds as signed, which may not overflow
    _mm512_storeu_si512(lanes, sums[0]);
    for (int k = 0; k < BYTES / 8; k++) total += lanes[k];
    return total;
}
