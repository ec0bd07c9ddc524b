// SPDX-License-Identifier: Apache-2.0
// probe.h - the contract of the probes: how fast one core can multiply and read at all.
//
//   int8   the plain stream of the instruction that int8 kernels are made of, on registers: adds
//          PK_PROBE_WEIGHT * PK_PROBE_INPUT to int32 sums, `rounds` times over all of a variant's sums
//   fp32   v += PK_PROBE_A * PK_PROBE_B, which is 1, `rounds` times in all of a variant's float32 lanes
//   read   the sum of n_bytes / 8 little-endian 64-bit words, modulo 2^64, read once from first to last
//
// int8 and fp32 return the operations they did, a multiplication and an addition being two, and
//   *sum   = operations / 2 * PK_PROBE_WEIGHT * PK_PROBE_INPUT modulo 2^32: all sums together
//   *value = operations / (2 * rounds) * min(rounds, 2^24): all lanes, each exact until it stays at 2^24
// so that nothing can be left out, by a compiler or by a mistake. As many sums and lanes are in flight as it
// takes to hide the latency of the instruction. The caller times it, and runs one probe on each thread.
//
// The caller guarantees: 0 < rounds <= PK_PROBE_MAX_ROUNDS, n_bytes > 0 and a multiple of PK_PROBE_CHUNK; any
// alignment will do.
// A variant allocates nothing, starts no thread and keeps no state.
#ifndef PK_PROBE_H
#define PK_PROBE_H

#include <stddef.h>
#include <stdint.h>

#define PK_PROBE_WEIGHT 3
#define PK_PROBE_INPUT 5
#define PK_PROBE_A 0.5f
#define PK_PROBE_B 2.0f
#define PK_PROBE_CHUNK 512                     // bytes
#define PK_PROBE_MAX_ROUNDS ((size_t)1 << 30)  // seconds

#define PK_PROBE_INT8(name) uint64_t name(size_t rounds, uint32_t *sum)
#define PK_PROBE_FP32(name) uint64_t name(size_t rounds, float *value)
#define PK_PROBE_READ(name) uint64_t name(const void *bytes, size_t n_bytes)

PK_PROBE_INT8(pk_probe_int8_c);  // plain C: what is left where there is no other
PK_PROBE_FP32(pk_probe_fp32_c);
PK_PROBE_READ(pk_probe_read_c);
PK_PROBE_INT8(pk_probe_int8_avx2);  // maddubs, madd, add
PK_PROBE_FP32(pk_probe_fp32_avx2);
PK_PROBE_READ(pk_probe_read_avx2);
PK_PROBE_INT8(pk_probe_int8_avxvnni);     // vpdpbusd on 32 bytes
PK_PROBE_INT8(pk_probe_int8_avx512vnni);  // vpdpbusd on 64 bytes
PK_PROBE_FP32(pk_probe_fp32_avx512vnni);
PK_PROBE_READ(pk_probe_read_avx512vnni);
PK_PROBE_INT8(pk_probe_int8_neon_dotprod);  // sdot
PK_PROBE_FP32(pk_probe_fp32_neon_dotprod);
PK_PROBE_READ(pk_probe_read_neon_dotprod);
PK_PROBE_INT8(pk_probe_int8_neon_i8mm);  // smmla

typedef struct {
    const char *name;
    unsigned needs;  // PK_CPU_* bits
    PK_PROBE_INT8((*int8));
    PK_PROBE_FP32((*fp32));
    PK_PROBE_READ((*read));
} pk_probe_variant;

const pk_probe_variant *pk_probe_at(size_t i);  // slow to fast, NULL past the end: tests walk the table
const pk_probe_variant *pk_probe_best(void);

#endif
