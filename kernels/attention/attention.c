// SPDX-License-Identifier: Apache-2.0
// attention.c - the table of variants, slow to fast; the size of their scratch; and what puts parts together.
#include "attention.h"

#include <math.h>
#include <string.h>

#include "pk_cpu.h"

static const pk_attention_variant variants[] = {
    {"c", 0, pk_attention_many_c, pk_attention_one_c},
#if defined(__x86_64__)
    {"avx2", PK_CPU_AVX2 | PK_CPU_FMA | PK_CPU_F16C, pk_attention_many_avx2, pk_attention_one_avx2},
    {"avx512f", PK_CPU_AVX512F, pk_attention_many_avx512f, pk_attention_one_avx512f},
#elif defined(__aarch64__)
    {"neon", PK_CPU_NEON, pk_attention_many_neon, pk_attention_one_neon},
#endif
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

const pk_attention_variant *pk_attention_at(size_t i) { return i < N_VARIANTS ? &variants[i] : NULL; }

const pk_attention_variant *pk_attention_best(void) {
    size_t i = N_VARIANTS - 1;
    while (!pk_cpu_has(variants[i].needs)) i--;  // row 0 needs nothing, so this ends
    return &variants[i];
}

size_t pk_attention_scratch_bytes(void) { return PK_ATTENTION_SCRATCH; }

// The sum of a part that saw no key is exactly 0. One that saw only NaN has -infinity as its largest, and a
// sum of NaN, which has to come through.
void pk_attention_merge(float *restrict out, size_t out_row, const float *out_parts, const float *state_parts,
                        size_t parts, size_t queries, size_t head) {
    for (size_t i = 0; i < queries; i++) {
        float *to = (float *)(void *)((uint8_t *)out + i * out_row);
        float largest = -INFINITY, sum = 0.0f;
        for (size_t p = 0; p < parts; p++) {
            const float *state = state_parts + 2 * (p * queries + i);
            if (state[0] > largest) largest = state[0];
        }
        if (largest == -INFINITY) largest = 0.0f;
        memset(to, 0, head * sizeof *to);
        for (size_t p = 0; p < parts; p++) {
            const float *state = state_parts + 2 * (p * queries + i);
            const float *part = out_parts + (p * queries + i) * head;
            if (state[1] == 0.0f) continue;
            const float factor = expf(state[0] - largest);
            sum += factor * state[1];
            for (size_t d = 0; d < head; d++) to[d] += factor * part[d];
        }
        if (sum == 0.0f) continue;
        for (size_t d = 0; d < head; d++) to[d] /= sum;
    }
}
