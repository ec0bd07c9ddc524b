// SPDX-License-Identifier: Apache-2.0
// probe.c - the table of variants, slow to fast. The last row this CPU can run wins.
#include "probe.h"

#include "pk_cpu.h"

static const pk_probe_variant variants[] = {
    {"c", 0, pk_probe_int8_c, pk_probe_fp32_c, pk_probe_read_c},
#if defined(__x86_64__)
    {"avx2", PK_CPU_AVX2 | PK_CPU_FMA, pk_probe_int8_avx2, pk_probe_fp32_avx2, pk_probe_read_avx2},
#if !defined(PK_WITHOUT_probe_avxvnni)
    {"avxvnni", PK_CPU_AVX2 | PK_CPU_FMA | PK_CPU_AVX_VNNI, pk_probe_int8_avxvnni, pk_probe_fp32_avx2,
     pk_probe_read_avx2},
#endif
    {"avx512vnni", PK_CPU_AVX512F | PK_CPU_AVX512_VNNI, pk_probe_int8_avx512vnni, pk_probe_fp32_avx512vnni,
     pk_probe_read_avx512vnni},
#elif defined(__aarch64__)
    {"neon_dotprod", PK_CPU_NEON | PK_CPU_DOTPROD, pk_probe_int8_neon_dotprod, pk_probe_fp32_neon_dotprod,
     pk_probe_read_neon_dotprod},
#if !defined(PK_WITHOUT_probe_neon_i8mm)
    {"neon_i8mm", PK_CPU_NEON | PK_CPU_DOTPROD | PK_CPU_I8MM, pk_probe_int8_neon_i8mm,
     pk_probe_fp32_neon_dotprod, pk_probe_read_neon_dotprod},
#endif
#endif
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

const pk_probe_variant *pk_probe_at(size_t i) { return i < N_VARIANTS ? &variants[i] : NULL; }

const pk_probe_variant *pk_probe_best(void) {
    size_t i = N_VARIANTS - 1;
    while (!pk_cpu_has(variants[i].needs)) i--;  // row 0 needs nothing, so this ends
    return &variants[i];
}
