// SPDX-License-Identifier: Apache-2.0
// vector.c - the table of variants, slow to fast. The last row this CPU can run wins.
#include "vector.h"

static const pk_vector_variant *const variants[] = {
    &pk_vector_c,
#if defined(__x86_64__)
    &pk_vector_avx2,
    &pk_vector_avx512f,
#elif defined(__aarch64__)
    &pk_vector_neon,
#endif
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

const pk_vector_variant *pk_vector_at(size_t i) { return i < N_VARIANTS ? variants[i] : NULL; }

const pk_vector_variant *pk_vector_best(void) {
    size_t i = N_VARIANTS - 1;
    while (!pk_cpu_has(variants[i]->needs)) i--;  // row 0 needs nothing, so this ends
    return variants[i];
}
