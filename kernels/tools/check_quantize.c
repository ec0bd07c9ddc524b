// SPDX-License-Identifier: Apache-2.0
// check_quantize.c - every weight quantizer against the scalar one, byte for byte, and what a weight costs.
#include <float.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pk_check.h"
#include "pk_cpu.h"
#include "quantize/quantize.h"

static const struct {
    const char *name;
    pk_quantize_type type;
} quantize_types[] = {{"Q4_K", PK_Q4_K}, {"Q5_K", PK_Q5_K}, {"Q6_K", PK_Q6_K}};
enum { N_QUANTIZE_TYPES = sizeof quantize_types / sizeof quantize_types[0] };

typedef enum {
    W_UNIFORM,
    W_BELL,
    W_ZERO,
    W_CONSTANT,
    W_OUTLIER,
    W_NEGATIVE,
    W_SUBNORMAL,
    W_MIXED,
    W_ZERO_LIMIT,
    W_FAR,
    W_TIES,
    N_WEIGHTS
} weights;
static const char *const weights_names[] = {"uniform",  "bell",      "zero",  "constant",   "outlier",
                                            "negative", "subnormal", "mixed", "zero limit", "far from zero",
                                            "ties"};

static void fill_weights(float *x, size_t n, weights how) {
    static const float limits[] = {PK_QUANTIZE_ZERO, 0.9999999f * PK_QUANTIZE_ZERO};
    uint64_t state = 88172645463325252u;
    float factor = 1.0f;
    for (size_t i = 0; i < n; i++) {
        const float u = random_sample(&state);
        if (i % 16 == 0) {  // for W_MIXED and W_FAR: 2^-140 to 2^14, another for each sub-block
            factor = 0x1p-140f;
            for (int twos = (int)((random_sample(&state) + 1.0f) * 77.0f); twos > 0; twos--) factor *= 2.0f;
        }
        switch (how) {
            case W_UNIFORM: x[i] = u; break;
            case W_BELL: x[i] = 0.02f * (u + random_sample(&state) + random_sample(&state)); break;
            case W_CONSTANT: x[i] = i / 32 % 3 ? 0.7f : -0.7f; break;
            case W_OUTLIER: x[i] = i % 256 == 77 ? PK_QUANTIZE_MAX : 0.02f * u; break;
            case W_NEGATIVE: x[i] = -1.0f + 0.5f * u; break;
            case W_SUBNORMAL: x[i] = u * FLT_MIN / 64; break;
            case W_MIXED: x[i] = u * factor; break;
            case W_ZERO_LIMIT: x[i] = u < 0.0f ? -limits[i / 16 % 2] : limits[i / 16 % 2]; break;
            case W_FAR: x[i] = -PK_QUANTIZE_MAX + (u + 1.0f) * (factor < 1.0f ? factor : 1.0f); break;
            case W_TIES: x[i] = (float)(int)(4.0f * u); break;
            case W_ZERO:
            case N_WEIGHTS: x[i] = 0.0f; break;
        }
    }
}

// Input and output have exactly the contract's size, so that a sanitizer sees any access beyond them; without
// one, the bytes around the output tell.
static bool check_quantize_case(const pk_quantize_variant *v, pk_quantize_type type, size_t n_blocks, weights how) {
    enum { GUARD = 64 };
    const size_t n_out = n_blocks * pk_quantize_bytes(type), n = n_blocks * PK_QUANTIZE_BLOCK;
    float *x = must_alloc(n * sizeof *x);
    uint8_t *want = must_alloc(n_out), *got = must_alloc(n_out), *guarded = must_alloc(n_out + 2 * GUARD);
    fill_weights(x, n, how);
    memset(guarded, 0xa5, n_out + 2 * GUARD);
    pk_quantize_c(want, x, n_blocks, type);
    v->fn(got, x, n_blocks, type);
    v->fn(guarded + GUARD, x, n_blocks, type);
    bool ok = !memcmp(want, got, n_out) && !memcmp(want, guarded + GUARD, n_out);  // the contract: the same bytes
    for (size_t i = 0; i < GUARD; i++) ok = ok && guarded[i] == 0xa5 && guarded[GUARD + n_out + i] == 0xa5;
    free(x);
    free(want);
    free(got);
    free(guarded);
    return ok;
}

bool check_quantize(void) {
    bool all = true;
    const pk_quantize_variant *v;
    for (size_t row = 0; (v = pk_quantize_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) {
            printf("quantize %-8s not on this CPU\n", v->name);
            continue;
        }
        size_t n_cases = 0, n_bad = 0;
        for (size_t t = 0; t < N_QUANTIZE_TYPES; t++) {
            for (size_t n_blocks = 1; n_blocks <= 9; n_blocks++) {
                for (weights how = W_UNIFORM; how < N_WEIGHTS; how++, n_cases++) {
                    if (check_quantize_case(v, quantize_types[t].type, n_blocks, how)) continue;
                    printf("quantize %s differs from c: %s, %zu blocks, %s\n", v->name, quantize_types[t].name,
                           n_blocks, weights_names[how]);
                    n_bad++;
                }
            }
        }
        printf("quantize %-8s %zu of %zu cases equal c byte for byte\n", v->name, n_cases - n_bad, n_cases);
        all = all && n_bad == 0;
    }
    return all;
}

void bench_quantize(void) {
    enum { BLOCKS = 1024, N = BLOCKS * PK_QUANTIZE_BLOCK, ROUNDS = 9 };  // the best of so many runs
    float *x = must_alloc(N * sizeof *x);
    uint8_t *out = must_alloc(BLOCKS * (size_t)PK_Q6_K_BYTES);
    fill_weights(x, N, W_BELL);
    for (size_t t = 0; t < N_QUANTIZE_TYPES; t++) {
        double reference = 0.0;
        const pk_quantize_variant *v;
        for (size_t row = 0; (v = pk_quantize_at(row)) != NULL; row++) {
            if (!pk_cpu_has(v->needs)) continue;
            double best = 0.0;
            for (int round = 0; round < ROUNDS; round++) {
                const double start = now_ns();
                v->fn(out, x, BLOCKS, quantize_types[t].type);
                const double took = (now_ns() - start) / N;
                if (round == 0 || took < best) best = took;
            }
            if (row == 0) reference = best;
            printf("quantize %s %-8s %6.2f ns/weight  %5.2f x c\n", quantize_types[t].name, v->name, best,
                   reference / best);
        }
    }
    free(x);
    free(out);
}
