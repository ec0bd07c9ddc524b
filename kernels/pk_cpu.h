// SPDX-License-Identifier: Apache-2.0
// pk_cpu.h - which instruction sets this CPU and this operating system can run.
//
// The answer can be narrowed for tests: the environment variable POCKETPHI_CPU_MASK, read once, holds
// the only features that may be used, as comma-separated names ("avx2,fma"), or "none" for the scalar
// code. It never adds a feature. Unset or empty means no mask.
#ifndef PK_CPU_H
#define PK_CPU_H

#include <stdbool.h>
#include <stddef.h>

#define PK_CPU_AVX2 (1u << 0)
#define PK_CPU_FMA (1u << 1)
#define PK_CPU_F16C (1u << 2)
#define PK_CPU_AVX512F (1u << 3)
#define PK_CPU_AVX512BW (1u << 4)
#define PK_CPU_AVX512VL (1u << 5)
#define PK_CPU_AVX512DQ (1u << 6)
#define PK_CPU_AVX512_VNNI (1u << 7)
#define PK_CPU_AVX512_BF16 (1u << 8)
#define PK_CPU_AVX_VNNI (1u << 9)
#define PK_CPU_NEON (1u << 10)
#define PK_CPU_DOTPROD (1u << 11)
#define PK_CPU_I8MM (1u << 12)

typedef struct {
    const char *name;  // as POCKETPHI_CPU_MASK spells it
    unsigned bit;      // one PK_CPU_* bit
} pk_cpu_feature;

const pk_cpu_feature *pk_cpu_at(size_t i);  // row i of the name table, NULL past the end
unsigned pk_cpu_features(void);             // PK_CPU_* bits that may be used here
bool pk_cpu_has(unsigned needs);            // whether all bits of `needs` may be used
bool pk_cpu_mask_is_valid(void);            // false: POCKETPHI_CPU_MASK has an unknown name, features are 0

// Reads names as in POCKETPHI_CPU_MASK. False, and *bits is 0, if one of them is unknown.
bool pk_cpu_parse(const char *names, unsigned *bits);

#endif
