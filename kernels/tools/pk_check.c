// SPDX-License-Identifier: Apache-2.0
// pk_check.c - walks every kernel table: each variant this CPU can run, against the scalar reference,
// on random and on extreme input, with sentinels around the output.
//
//   pk_check           check; exit 0 when all agree, 1 otherwise
//   pk_check --bench   then time the same calls
//
// To add a family: write check_<family>.c, declare its two functions in pk_check.h, add one row to `families`.
#include "pk_check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pk_cpu.h"

void *must_alloc(size_t size) {
    void *p = malloc(size);
    if (!p) {
        fprintf(stderr, "pk_check: no memory for %zu bytes\n", size);
        exit(1);
    }
    return p;
}

// xorshift64*
float random_sample(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)(int32_t)((*state * UINT64_C(0x2545f4914f6cdd1d)) >> 32) * 0x1p-31f;
}

// Not wall time: what else the machine does would count.
double now_ns(void) { return 1e9 / CLOCKS_PER_SEC * (double)clock(); }

static bool check_features(void) {
    const pk_cpu_feature *feature;
    unsigned bits = 0, all = 0;
    bool ok = pk_cpu_has(0);
    for (size_t i = 0; (feature = pk_cpu_at(i)) != NULL; i++) {
        ok = ok && pk_cpu_parse(feature->name, &bits) && bits == feature->bit && !(all & feature->bit);
        all |= feature->bit;
    }
    return ok && !(pk_cpu_features() & ~all);
}

static bool check_parse(void) {
    static const char *const wrong[] = {"avx3", "avx2,", ",avx2", "avx2 fma", "avx", "avx22", "none,avx2", ","};
    unsigned bits = 0;
    bool ok = pk_cpu_parse("avx2,fma", &bits) && bits == (PK_CPU_AVX2 | PK_CPU_FMA);
    ok = ok && pk_cpu_parse("none", &bits) && bits == 0;
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        bits = 1;
        ok = ok && !pk_cpu_parse(wrong[i], &bits) && bits == 0;
    }
    return ok;
}

static bool check_cpu(void) {
    const pk_cpu_feature *feature;
    printf("cpu   ");
    for (size_t i = 0; (feature = pk_cpu_at(i)) != NULL; i++) {
        if (pk_cpu_has(feature->bit)) printf(" %s", feature->name);
    }
    printf(pk_cpu_features() ? "\n" : " none\n");
    const bool features = check_features(), parse = check_parse(), mask = pk_cpu_mask_is_valid();
    if (!features) printf("cpu    the feature table is wrong\n");
    if (!parse) printf("cpu    the mask is parsed wrongly\n");
    if (!mask) printf("cpu    POCKETPHI_CPU_MASK names an unknown feature\n");
    return features && parse && mask;
}

static const struct {
    bool (*check)(void);
    void (*bench)(void);
} families[] = {
    {check_cpu, NULL},
    {check_fp16, NULL},
    {check_logmel, bench_logmel},
    {check_quantize, bench_quantize},
    {check_matmul, bench_matmul},
    {check_activations, bench_activations},
    {check_attention, bench_attention},
    {check_vector, bench_vector},
    {check_probe, bench_probe},
};
enum { N_FAMILIES = sizeof families / sizeof families[0] };

int main(int argc, char **argv) {
    const bool bench = argc == 2 && !strcmp(argv[1], "--bench");
    if (argc > 1 && !bench) {
        fprintf(stderr, "usage: pk_check [--bench]\n");
        return 2;
    }
    bool ok = true;
    for (size_t i = 0; i < N_FAMILIES; i++) ok = families[i].check() && ok;
    for (size_t i = 0; bench && ok && i < N_FAMILIES; i++) {
        if (families[i].bench) families[i].bench();
    }
    return ok ? 0 : 1;
}
