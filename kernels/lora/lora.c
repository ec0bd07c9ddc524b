// SPDX-License-Identifier: Apache-2.0
// lora.c - the table of variants, slow to fast. The last row this CPU can run wins.
#include "lora.h"

static const pk_lora_variant *const variants[] = {
    &pk_lora_c,
#if defined(__x86_64__)
    &pk_lora_avx2,
    &pk_lora_avx512f,
#endif
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

const pk_lora_variant *pk_lora_at(size_t i) { return i < N_VARIANTS ? variants[i] : NULL; }

const pk_lora_variant *pk_lora_best(void) {
    size_t i = N_VARIANTS - 1;
    while (!pk_cpu_has(variants[i]->needs)) i--;  // row 0 needs nothing, so this ends
    return variants[i];
}
