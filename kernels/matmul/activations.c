// SPDX-License-Identifier: Apache-2.0
// activations.c - the size of a tile, and the table of variants, slow to fast: the last that runs wins.
#include "activations.h"

#include "pk_cpu.h"

static const pk_activations_variant variants[] = {
    {"c", 0, pk_activations_quantize_c, pk_activations_arrange_c},
#if defined(__x86_64__)
    {"avx2", PK_CPU_AVX2, pk_activations_quantize_avx2, pk_activations_arrange_avx2},
    {"avx512f", PK_CPU_AVX512F, pk_activations_quantize_avx512f, pk_activations_arrange_avx512f},
#elif defined(__aarch64__)
    {"neon", PK_CPU_NEON, pk_activations_quantize_neon, pk_activations_arrange_neon},
#endif
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

size_t pk_tile_bytes(pk_weight weight, size_t columns, size_t tokens) {
    if (PK_IS_FLOAT(weight)) return columns * tokens * sizeof(float);
    return (columns + PK_X_BLOCK - 1) / PK_X_BLOCK * tokens * PK_X_BLOCK_BYTES;
}

const pk_activations_variant *pk_activations_at(size_t i) { return i < N_VARIANTS ? &variants[i] : NULL; }

const pk_activations_variant *pk_activations_best(void) {
    size_t i = N_VARIANTS - 1;
    while (!pk_cpu_has(variants[i].needs)) i--;  // row 0 needs nothing, so this ends
    return &variants[i];
}
