// SPDX-License-Identifier: Apache-2.0
// matmul.c - the table of variants, slow to fast. The last row that has the type and runs on this CPU wins.
#include "matmul.h"

#include "pk_cpu.h"

#define QUANTIZED(isa)                                                                                   \
    [PK_W_Q4_0] = pk_matmul_q4_0_##isa, [PK_W_Q8_0] = pk_matmul_q8_0_##isa,                              \
    [PK_W_Q4_K] = pk_matmul_q4_k_##isa, [PK_W_Q5_K] = pk_matmul_q5_k_##isa, [PK_W_Q6_K] = pk_matmul_q6_k_##isa
#define FLOAT(isa) \
    [PK_W_F16] = pk_matmul_f16_##isa, [PK_W_BF16] = pk_matmul_bf16_##isa, [PK_W_F32] = pk_matmul_f32_##isa

#define AVX2 (PK_CPU_AVX2 | PK_CPU_FMA | PK_CPU_F16C)
#define AVX512 (PK_CPU_AVX512F | PK_CPU_AVX512BW | PK_CPU_AVX512VL | PK_CPU_AVX512DQ)

static const pk_matmul_variant variants[] = {
    {"c", 0, {QUANTIZED(c), FLOAT(c)}},
#if defined(__x86_64__)
    {"avx2", AVX2, {QUANTIZED(avx2), FLOAT(avx2)}},
#if !defined(PK_WITHOUT_matmul_avxvnni)
    {"avxvnni", AVX2 | PK_CPU_AVX_VNNI, {QUANTIZED(avxvnni)}},
#endif
    {"avx512f", PK_CPU_AVX512F, {FLOAT(avx512f)}},
    {"avx512vnni", AVX512 | PK_CPU_AVX512_VNNI, {QUANTIZED(avx512vnni)}},
    // Here a row for AMX would go: no AMX machine to test on, so none claimed.
#elif defined(__aarch64__)
    {"neon", PK_CPU_NEON, {FLOAT(neon)}},
    {"neon_dotprod", PK_CPU_DOTPROD, {QUANTIZED(neon_dotprod)}},
#if !defined(PK_WITHOUT_matmul_neon_i8mm)
    {"neon_i8mm", PK_CPU_DOTPROD | PK_CPU_I8MM, {QUANTIZED(neon_i8mm)}},
#endif
#endif
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

const pk_matmul_variant *pk_matmul_at(size_t i) { return i < N_VARIANTS ? &variants[i] : NULL; }

pk_matmul_fn pk_matmul_best(pk_weight weight) {
    size_t i = N_VARIANTS - 1;
    while (!pk_cpu_has(variants[i].needs) || !variants[i].fn[weight]) i--;  // row 0 has all and needs nothing
    return variants[i].fn[weight];
}
