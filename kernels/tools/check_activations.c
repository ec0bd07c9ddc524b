// SPDX-License-Identifier: Apache-2.0
// check_activations.c - every activation packer against the scalar one, byte for byte; and what a number costs.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "matmul/activations.h"
#include "pk_check.h"
#include "pk_cpu.h"

typedef enum {
    X_UNIFORM,
    X_OUTLIER,
    X_TIES,
    X_ZERO,
    X_SUBNORMAL,
    X_LIMIT,
    X_HUGE,
    X_MIXED,
    X_BROKEN,
    N_FILLS
} fill;
static const char *const fill_names[] = {"uniform",    "outlier", "ties",  "zero",            "subnormal",
                                         "smallest m", "huge",    "mixed", "infinite and NaN"};

// `shared`: blocks of a scale, so that some scales of X_LIMIT and X_BROKEN differ from their neighbours'.
static void fill_rows(float *x, size_t n, fill how, size_t shared) {
    static const float broken[] = {INFINITY, -INFINITY, NAN};
    uint64_t state = 88172645463325252u;
    float factor = 1.0f;
    for (size_t i = 0; i < n; i++) {
        const float u = random_sample(&state);
        if (i % 32 == 0) {  // for X_MIXED: 2^-149 to 2^127, another for each block
            factor = ldexpf(1.0f, -149 + (int)((random_sample(&state) + 1.0f) * 138.0f));
        }
        switch (how) {
            case X_UNIFORM: x[i] = u; break;
            case X_OUTLIER: x[i] = i % 128 == 77 ? -1000.0f : u; break;
            case X_TIES: x[i] = i % 32 == 5 ? 127.0f : 0.5f * (float)(int)(254.0f * u); break;
            case X_SUBNORMAL: x[i] = u * FLT_MIN; break;
            case X_LIMIT:  // 127 / m: infinite, or not
                x[i] = i % (64 * shared) < 32 * shared ? -0x1.fcp-122f : 0x1.fc0002p-122f;
                break;
            case X_HUGE: x[i] = u < 0.0f ? -FLT_MAX : FLT_MAX * u; break;
            case X_MIXED: x[i] = u * factor; break;
            case X_BROKEN: x[i] = i % (53 * shared) == 0 ? broken[i / (53 * shared) % 3] : u; break;
            case X_ZERO:
            case N_FILLS: x[i] = u < 0.0f ? -0.0f : 0.0f; break;
        }
    }
}

// Rows end where the contract's last column does, so that a sanitizer sees any read beyond them. The range is
// [shared, blocks) when there are more blocks than that: the first ones' bytes are sentinels then, too.
static bool check_case(const pk_activations_variant *v, pk_weight weight, size_t tokens, size_t columns,
                       fill how) {
    enum { GUARD = 64 };
    const size_t stride = columns + 3, n_x = (tokens - 1) * stride + columns;
    const size_t n_tile = pk_tile_bytes(weight, columns, tokens);
    const size_t blocks = (columns + PK_X_BLOCK - 1) / PK_X_BLOCK;
    const size_t shared = PK_IS_FLOAT(weight) ? 1 : PK_SHARED_BLOCKS(weight, columns);
    float *x = must_alloc(n_x * sizeof *x);
    uint8_t *want = must_alloc(n_tile + 2 * GUARD), *got = must_alloc(n_tile + 2 * GUARD);
    fill_rows(x, n_x, how, shared);
    memset(want, 0xa5, n_tile + 2 * GUARD);
    memset(got, 0xa5, n_tile + 2 * GUARD);
    const size_t first = blocks > shared ? shared : 0;
    pk_activations_args args = {want + GUARD, x, stride, tokens, columns, first, blocks, shared};
    const bool is_float = PK_IS_FLOAT(weight);
    (is_float ? pk_activations_arrange_c : pk_activations_quantize_c)(&args);
    args.tile = got + GUARD;
    (is_float ? v->arrange : v->quantize)(&args);
    bool ok = !memcmp(want, got, n_tile + 2 * GUARD);  // the contract: the same bytes
    for (size_t i = 0; i < GUARD; i++) ok = ok && got[i] == 0xa5 && got[GUARD + n_tile + i] == 0xa5;
    free(x);
    free(want);
    free(got);
    return ok;
}

static bool check_variant(const pk_activations_variant *v) {
    static const struct {
        pk_weight weight;  // which says how many blocks share a scale
        size_t columns;
    } shapes[] = {{PK_W_Q8_0, 32},  {PK_W_Q8_0, 64},  {PK_W_Q8_0, 256}, {PK_W_Q4_0, 96},
                  {PK_W_Q4_0, 160}, {PK_W_Q4_0, 256}, {PK_W_Q4_K, 512}, {PK_W_Q6_K, 768}};
    static const size_t odd_columns[] = {1, 7, 31, 33, 47, 80, 129};
    size_t n_cases = 0, n_bad = 0;
    for (size_t tokens = 1; tokens <= PK_TILE_TOKENS; tokens++) {
        for (size_t c = 0; c < sizeof shapes / sizeof shapes[0]; c++) {
            for (fill how = X_UNIFORM; how < N_FILLS; how++, n_cases++) {
                if (check_case(v, shapes[c].weight, tokens, shapes[c].columns, how)) continue;
                printf("quantize %s differs from c: %zu tokens, %zu columns, scales of %zu blocks, %s\n", v->name,
                       tokens, shapes[c].columns, PK_SHARED_BLOCKS(shapes[c].weight, shapes[c].columns),
                       fill_names[how]);
                n_bad++;
            }
        }
        for (size_t c = 0; c < sizeof odd_columns / sizeof odd_columns[0]; c++, n_cases++) {
            if (check_case(v, PK_W_F16, tokens, odd_columns[c], X_BROKEN)) continue;
            printf("arrange %s differs from c: %zu tokens, %zu columns\n", v->name, tokens, odd_columns[c]);
            n_bad++;
        }
    }
    printf("activations %-8s %zu of %zu cases equal c byte for byte\n", v->name, n_cases - n_bad, n_cases);
    return n_bad == 0;
}

bool check_activations(void) {
    bool all = true;
    const pk_activations_variant *v;
    for (size_t row = 0; (v = pk_activations_at(row)) != NULL; row++) {
        if (pk_cpu_has(v->needs)) {
            all = check_variant(v) && all;
        } else {
            printf("activations %-8s not on this CPU\n", v->name);
        }
    }
    return all;
}

static double best_time(pk_activations_fn fn, const pk_activations_args *args, size_t calls, size_t numbers) {
    double best = 0.0;
    for (int round = 0; round < 9; round++) {
        const double start = now_ns();
        for (size_t i = 0; i < calls; i++) fn(args);
        const double took = (now_ns() - start) / (double)(calls * numbers);
        if (round == 0 || took < best) best = took;
    }
    return best;
}

void bench_activations(void) {
    enum { COLUMNS = 3072, CALLS = 64 };
    static const size_t tokens[] = {1, 16};
    static const char *const ways[] = {"quantize 32", "quantize 256", "arrange"};  // columns of a scale
    float *x = must_alloc(COLUMNS * PK_TILE_TOKENS * sizeof *x);
    uint8_t *tile = must_alloc(pk_tile_bytes(PK_W_F32, COLUMNS, PK_TILE_TOKENS));
    fill_rows(x, COLUMNS * PK_TILE_TOKENS, X_UNIFORM, 1);
    for (size_t t = 0; t < 2; t++) {
        pk_activations_args args = {tile, x, COLUMNS, tokens[t], COLUMNS, 0, COLUMNS / PK_X_BLOCK, 1};
        const size_t numbers = COLUMNS * tokens[t];
        double c[3] = {0.0, 0.0, 0.0};
        const pk_activations_variant *v;
        for (size_t row = 0; (v = pk_activations_at(row)) != NULL; row++) {
            if (!pk_cpu_has(v->needs)) continue;
            for (size_t way = 0; way < 3; way++) {
                args.shared = way == 0 ? 1 : 8;
                const double took = best_time(way == 2 ? v->arrange : v->quantize, &args, CALLS, numbers);
                if (row == 0) c[way] = took;
                printf("%-12s %-8s %2zu tokens %6.3f ns/number %5.2f x c\n", ways[way], v->name, tokens[t], took,
                       c[way] / took);
            }
        }
    }
    free(x);
    free(tile);
}
