// SPDX-License-Identifier: Apache-2.0
// logmel.c - the table of variants, slow to fast. The last row this CPU can run wins.
#include "logmel.h"

#include "pk_cpu.h"

static const pk_logmel_variant variants[] = {
    {"c", 0, pk_logmel_c},
#if defined(__x86_64__)
    {"avx2", PK_CPU_AVX2, pk_logmel_avx2},
#elif defined(__aarch64__)
    {"neon", PK_CPU_NEON, pk_logmel_neon},
#endif
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

const pk_logmel_variant *pk_logmel_at(size_t i) { return i < N_VARIANTS ? &variants[i] : NULL; }

pk_logmel_fn pk_logmel_best(void) {
    size_t i = N_VARIANTS - 1;
    while (!pk_cpu_has(variants[i].needs)) i--;  // row 0 needs nothing, so this ends
    return variants[i].fn;
}
