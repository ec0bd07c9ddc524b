// SPDX-License-Identifier: Apache-2.0
// quantize.c - the table of variants, slow to fast. The last row this CPU can run wins.
#include "quantize.h"

#include "pk_cpu.h"

static const pk_quantize_variant variants[] = {
    {"c", 0, pk_quantize_c},
#if defined(__x86_64__)
    {"avx2", PK_CPU_AVX2, pk_quantize_avx2},
    {"avx512f", PK_CPU_AVX512F, pk_quantize_avx512f},
#endif
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

const pk_quantize_variant *pk_quantize_at(size_t i) { return i < N_VARIANTS ? &variants[i] : NULL; }

pk_quantize_fn pk_quantize_best(void) {
    size_t i = N_VARIANTS - 1;
    while (!pk_cpu_has(variants[i].needs)) i--;  // row 0 needs nothing, so this ends
    return variants[i].fn;
}
