// SPDX-License-Identifier: Apache-2.0
// check_matmul.c - every matrix multiplication against the scalar one within a derived bound, and its speed.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "matmul/matmul.h"
#include "matmul/pack.h"
#include "pk_check.h"
#include "pk_cpu.h"
#include "pk_fp16.h"

// A panel's layout as matmul.h has it: the fields of a block, and those that follow so many blocks together.
typedef enum { LEVELS, SIGNED, SIX_BITS, HALF, BRAIN, SINGLE } kind;
typedef struct {
    size_t bytes;
    kind kind;
} field;
static const struct {
    const char *name;
    size_t columns;  // of a block
    field fields[3], after;
    size_t together;
} layouts[PK_W_TYPES] = {
    [PK_W_Q4_0] = {"Q4_0", 32, {{256, LEVELS}}, {32, HALF}, 8},
    [PK_W_Q8_0] = {"Q8_0", 32, {{512, SIGNED}}, {32, HALF}, 8},
    [PK_W_Q4_K] = {"Q4_K", 256, {{64, HALF}, {256, SIX_BITS}, {2048, LEVELS}}, {0, HALF}, 1},
    [PK_W_Q5_K] = {"Q5_K", 256, {{64, HALF}, {256, SIX_BITS}, {2560, LEVELS}}, {0, HALF}, 1},
    [PK_W_Q6_K] = {"Q6_K", 256, {{256, SIGNED}, {3072, LEVELS}}, {32, HALF}, 2},
    [PK_W_F16] = {"F16", 1, {{32, HALF}}, {0, HALF}, 1},
    [PK_W_BF16] = {"BF16", 1, {{32, BRAIN}}, {0, HALF}, 1},
    [PK_W_F32] = {"F32", 1, {{64, SINGLE}}, {0, HALF}, 1},
};

// ABSOLUTE takes every sign away from what is there: the c kernel then gives the sum of its terms' sizes.
typedef enum { RANDOM, TOP, BOTTOM, LARGE, TINY, ZERO, POISON, N_FILLS, ABSOLUTE } fill;
static const char *const fill_names[N_FILLS] = {"random", "top", "bottom", "large", "tiny", "zero", "poison"};

static void fill_16(uint8_t *p, kind what, fill how, float u) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    if (how == ABSOLUTE) {
        bits &= 0x7fff;
    } else if (what == HALF) {  // the largest float16, or a subnormal one
        bits = pk_to_fp16(how == LARGE ? copysignf(65504.0f, u) : how == TINY ? 0x1p-14f * u : 0.1f * u);
        if (how == TOP || how == BOTTOM) bits = pk_to_fp16(1.0f);
    } else {
        const float x = u * (how == LARGE ? 0x1p50f : how == TINY ? 0x1p-130f : 1.0f);
        uint32_t whole;
        memcpy(&whole, &x, sizeof whole);
        bits = (uint16_t)(whole >> 16);
    }
    memcpy(p, &bits, sizeof bits);
}

static void fill_byte(uint8_t *p, kind what, fill how, float u) {
    const uint8_t random = (uint8_t)(int)(128.0f + 128.0f * u);
    if (how == ABSOLUTE) {
        if (what == SIGNED && *p > 127) *p = *p == 128 ? 127 : (uint8_t)(256 - *p);
    } else if (what == SIGNED) {
        *p = how == TOP ? 127 : how == BOTTOM ? 128 : random;
    } else {
        *p = (how == TOP || how == BOTTOM ? 255 : random) & (what == SIX_BITS ? 63 : 255);
    }
}

static void fill_field(uint8_t *p, field f, fill how, uint64_t *state) {
    const size_t step = f.kind == SINGLE ? 4 : f.kind == HALF || f.kind == BRAIN ? 2 : 1;
    for (size_t i = 0; i < f.bytes; i += step) {
        const float u = random_sample(state);
        if (step == 4) {
            float x;
            memcpy(&x, p + i, sizeof x);
            x = how == ABSOLUTE ? fabsf(x) : u * (how == LARGE ? 0x1p50f : how == TINY ? 0x1p-130f : 1.0f);
            memcpy(p + i, &x, sizeof x);
        } else if (step == 2) {
            fill_16(p + i, f.kind, how, u);
        } else {
            fill_byte(p + i, f.kind, how, u);
        }
    }
}

// What the contract calls zero, the missing rows, is filled too: no result may depend on it.
static void fill_panels(uint8_t *w, pk_weight weight, size_t n_panels, size_t columns, fill how) {
    uint64_t state = 88172645463325252u;
    const size_t blocks = columns / layouts[weight].columns, bytes = pk_panel_bytes(weight, columns);
    for (size_t panel = 0; panel < n_panels; panel++) {
        uint8_t *p = w + panel * bytes;
        for (size_t b = 0, after = 0; b < blocks; b++) {
            for (size_t i = 0; i < 3; p += layouts[weight].fields[i++].bytes) {
                fill_field(p, layouts[weight].fields[i], how, &state);
            }
            if ((b + 1) % layouts[weight].together && b + 1 < blocks) continue;
            for (; after <= b; after++, p += layouts[weight].after.bytes) {
                fill_field(p, layouts[weight].after, how, &state);
            }
        }
    }
}

// Activations before they become tiles.
typedef struct {
    int8_t *q;  // [tokens][columns], and their scales [tokens][columns / 32], the same for each `shared` of these
    float *d;
    float *x;   // [tokens][columns], for the float types
} tokens;

static void fill_tokens(tokens *to, size_t n_tokens, size_t columns, size_t shared, fill how) {
    uint64_t state = 362436069u;
    const size_t blocks = columns / PK_X_BLOCK;
    const size_t poisoned = (n_tokens - 1) * blocks + blocks / 2 / shared * shared;  // the first of a scale's
    const float size = how == LARGE ? 0x1p50f : how == TINY ? 0x1p-110f : 1.0f;
    for (size_t i = 0; i < n_tokens * columns; i++) {
        const float u = random_sample(&state);
        to->q[i] = (int8_t)(how == TOP ? 127 : how == BOTTOM ? -127 : how == ZERO ? 0 : (int)(127.99f * u));
        to->x[i] = how == ZERO ? 0.0f : size * u;
    }
    for (size_t i = 0; i < n_tokens * blocks; i++) {
        const float d = size * 0.1f * fabsf(random_sample(&state));
        to->d[i] = how == ZERO ? 0.0f : i % blocks % shared ? to->d[i - 1] : d;
    }
    if (how != POISON) return;
    to->x[n_tokens * columns - 1] = NAN;
    if (blocks == 0) return;
    memset(to->q + poisoned * PK_X_BLOCK, 0, shared * PK_X_BLOCK);
    for (size_t i = 0; i < shared; i++) to->d[poisoned + i] = NAN;
}

static uint8_t *put(uint8_t *to, const void *number) {
    memcpy(to, number, 4);
    return to + 4;
}

// Tokens [first, first + n), n <= 16, as one tile. With `absolute` levels lose their signs and offsets add.
static void build_tile(uint8_t *to, const tokens *from, pk_weight weight, size_t first, size_t n,
                       size_t columns, bool absolute) {
    const size_t blocks = columns / PK_X_BLOCK;
    for (size_t k = 0; PK_IS_FLOAT(weight) && k < columns; k++) {
        for (size_t t = first; t < first + n; t++) {
            const float x = from->x[t * columns + k];
            to = put(to, &(float){absolute ? fabsf(x) : x});
        }
    }
    for (size_t b = 0; !PK_IS_FLOAT(weight) && b < blocks; b++) {
        int32_t sums[2][PK_TILE_TOKENS] = {{0}};
        for (size_t t = 0; t < n; t++) {
            const int8_t *q = from->q + (first + t) * columns + b * PK_X_BLOCK;
            for (size_t i = 0; i < PK_X_BLOCK; i++) {
                const int level = absolute ? abs(q[i]) : q[i];
                *to++ = (uint8_t)level;
                sums[i / 16][t] += absolute ? -level : level;
            }
        }
        for (size_t t = 0; t < n; t++) to = put(to, &from->d[(first + t) * blocks + b]);
        for (size_t t = 0; t < n; t++) to = put(to, &(int32_t){-8 * (sums[0][t] + sums[1][t])});
        for (size_t i = 0; i < 2 * n; i++) to = put(to, &(int32_t){-32 * sums[i / n][i % n]});
    }
}

static size_t shared_of(pk_weight weight, size_t columns) {
    return PK_IS_FLOAT(weight) ? 1 : PK_SHARED_BLOCKS(weight, columns);
}

static size_t tile_bytes(pk_weight weight, size_t columns) {  // of one token
    return PK_IS_FLOAT(weight) ? 4 * columns : columns / PK_X_BLOCK * PK_X_BLOCK_BYTES;
}

static uint8_t *new_tiles(const tokens *from, pk_weight weight, size_t n_tokens, size_t columns,
                          bool absolute) {
    const size_t bytes = tile_bytes(weight, columns);
    uint8_t *tiles = must_alloc(n_tokens * bytes);
    for (size_t first = 0; first < n_tokens; first += PK_TILE_TOKENS) {
        const size_t left = n_tokens - first, n = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS;
        build_tile(tiles + first * bytes, from, weight, first, n, columns, absolute);
    }
    return tiles;
}

// One multiplication: weights and tiles of exactly the contract's size, so that a sanitizer sees any read
// beyond them. `sizes` holds what the c kernel makes of the absolute values.
typedef struct {
    pk_weight weight;
    size_t rows, n_tokens, columns;
    fill how;
    uint8_t *w, *tiles;
    tokens x;
    float *want, *sizes;  // [n_tokens][rows]
} problem;

static uint8_t *new_panels(const problem *p, size_t *n) {
    *n = (p->rows + PK_PANEL_ROWS - 1) / PK_PANEL_ROWS;
    uint8_t *w = aligned_alloc(64, *n * pk_panel_bytes(p->weight, p->columns));
    if (!w) exit(1);
    memset(w, 0, *n * pk_panel_bytes(p->weight, p->columns));
    fill_panels(w, p->weight, *n, p->columns, p->how);
    return w;
}

static void open_problem(problem *p, pk_matmul_fn reference) {
    size_t n_panels;
    const size_t n_x = p->n_tokens * p->columns, n_out = p->n_tokens * p->rows * sizeof(float);
    p->w = new_panels(p, &n_panels);
    p->x = (tokens){must_alloc(n_x), must_alloc(n_x * sizeof(float)), must_alloc(n_x * sizeof(float))};
    fill_tokens(&p->x, p->n_tokens, p->columns, shared_of(p->weight, p->columns), p->how);
    p->tiles = new_tiles(&p->x, p->weight, p->n_tokens, p->columns, false);
    p->want = must_alloc(n_out);
    p->sizes = must_alloc(n_out);
    pk_matmul_args a = {p->want, p->rows, p->w, p->tiles, p->rows, p->n_tokens, p->columns, 0, 0.0f};
    reference(&a);
    uint8_t *w = new_panels(p, &n_panels);
    uint8_t *tiles = new_tiles(&p->x, p->weight, p->n_tokens, p->columns, true);
    fill_panels(w, p->weight, n_panels, p->columns, ABSOLUTE);
    a = (pk_matmul_args){p->sizes, p->rows, w, tiles, p->rows, p->n_tokens, p->columns, 0, 0.0f};
    reference(&a);
    free(w);
    free(tiles);
}

static void close_problem(problem *p) {
    free(p->w);
    free(p->tiles);
    free(p->x.q);
    free(p->x.d);
    free(p->x.x);
    free(p->want);
    free(p->sizes);
}

// How far two kernels may be apart. Weights' scales are exact products (11 + 8 bits), dot products are exact
// integers. A term is rounded at most four times, a sum once for each of up to two terms in 32 columns (of
// floats: for each column), by at most 2^-24, on both sides; where the 16 terms of a shared scale are summed first,
// such a sum counts as one term. `size` is rounded too, and has 127 for 128: 1 %.
// Below 2^-126 a rounding is absolute, half of 2^-149, and a dot product of less than 2^19 may follow it.
static double bound(const problem *p, double size) {
    const bool is_float = PK_IS_FLOAT(p->weight);
    const double terms = (double)(is_float ? p->columns : p->columns / PK_X_BLOCK * 2);
    return 1.01 * 2.0 * (terms + 4.0) * 0x1p-24 * size + terms * (is_float ? 0x1p-148 : 0x1p-129);
}

static bool near(const problem *p, size_t i, float got, float before, const pk_matmul_args *a) {
    const double want = (double)p->want[i], size = (double)p->sizes[i];
    if (isnan(want)) return isnan(got);
    if (!a->add) return fabs((double)got - want) <= bound(p, size);
    const double scale = (double)a->scale, sum = (double)before + scale * want;  // then two more roundings
    return fabs((double)got - sum) <= fabs(scale) * bound(p, size) +
                                      2.0 * 0x1p-24 * (fabs((double)before) + 1.01 * fabs(scale) * size);
}

// Rows of `out` are 3 floats longer than the contract's; those floats and some around all stay as they were.
static bool check_values(const problem *p, pk_matmul_fn fn, int add) {
    enum { GUARD = 16, GAP = 3 };
    const size_t stride = p->rows + GAP, n_all = p->n_tokens * stride + 2 * GUARD;
    float *all = must_alloc(n_all * sizeof *all), *before = must_alloc(n_all * sizeof *all);
    uint64_t state = 521288629u;
    for (size_t i = 0; i < n_all; i++) all[i] = before[i] = random_sample(&state);
    const pk_matmul_args a = {all + GUARD, stride,      p->w, p->tiles, p->rows, p->n_tokens,
                              p->columns,  add,         -0.75f};
    fn(&a);
    bool ok = true, poisoned = true;
    for (size_t i = 0; i < n_all; i++) {
        const size_t at = i - GUARD, t = at / stride, r = at % stride;
        if (i < GUARD || t >= p->n_tokens || r >= p->rows) {
            ok = ok && all[i] == before[i];
            continue;
        }
        ok = ok && near(p, t * p->rows + r, all[i], before[i], &a);
        poisoned = poisoned && isnan(all[i]) == (t == p->n_tokens - 1);
    }
    free(all);
    free(before);
    return ok && (p->how == POISON) == poisoned;
}

// The same bits for a token alone, and for the rows from the second panel on alone.
static bool check_independence(const problem *p, pk_matmul_fn fn) {
    const size_t rows = p->rows;
    float *all = must_alloc(p->n_tokens * rows * sizeof *all), *part = must_alloc(rows * sizeof *part);
    uint8_t *tile = must_alloc(tile_bytes(p->weight, p->columns));
    pk_matmul_args a = {all, rows, p->w, p->tiles, rows, p->n_tokens, p->columns, 0, 0.0f};
    fn(&a);
    bool ok = true;
    for (size_t t = 0; t < p->n_tokens; t++) {
        build_tile(tile, &p->x, p->weight, t, 1, p->columns, false);
        a = (pk_matmul_args){part, rows, p->w, tile, rows, 1, p->columns, 0, 0.0f};
        fn(&a);
        ok = ok && !memcmp(part, all + t * rows, rows * sizeof *part);
        if (rows <= PK_PANEL_ROWS) continue;
        a.w += pk_panel_bytes(p->weight, p->columns);
        a.rows -= PK_PANEL_ROWS;
        fn(&a);
        ok = ok && !memcmp(part, all + t * rows + PK_PANEL_ROWS, a.rows * sizeof *part);
    }
    free(all);
    free(part);
    free(tile);
    return ok;
}

static bool check_case(const pk_matmul_variant *v, problem p) {
    open_problem(&p, pk_matmul_at(0)->fn[p.weight]);
    const bool values = check_values(&p, v->fn[p.weight], 0) && check_values(&p, v->fn[p.weight], 1);
    const bool ok = values && (p.how == POISON || check_independence(&p, v->fn[p.weight]));
    if (!ok) {
        printf("matmul %s %s %s: %zu rows, %zu tokens, %zu columns, %s\n", layouts[p.weight].name, v->name,
               values ? "depends on tile or range" : "is not near c", p.rows, p.n_tokens, p.columns,
               fill_names[p.how]);
    }
    close_problem(&p);
    return ok;
}

enum { N_ROWS = 5, N_TOKENS = 9, N_COLUMNS = 5, N_MANY = 3 };
static const size_t some_rows[N_ROWS] = {1, 15, 16, 17, 40};
static const size_t some_tokens[N_TOKENS] = {1, 2, 3, 7, 8, 15, 16, 17, 33};
static const size_t some_columns[3][N_COLUMNS] = {{32, 96, 256, 320, 512}, {256, 512}, {1, 5, 63, 320}};
static const size_t many_tokens[N_MANY] = {48, 128, 130};

// Every shape with random numbers; the other fills with rows and tokens that leave tails, in one shape each; then
// tokens for which a variant may go another way.
static bool check_type(const pk_matmul_variant *v, pk_weight weight) {
    const size_t *columns = some_columns[PK_IS_FLOAT(weight) ? 2 : layouts[weight].columns == 256];
    size_t n_cases = 0, n_bad = 0;
    for (size_t i = 0; i < (size_t)N_ROWS * N_TOKENS * N_COLUMNS * N_FILLS; i++) {
        const size_t r = i % N_ROWS, t = i / N_ROWS % N_TOKENS, k = i / N_ROWS / N_TOKENS % N_COLUMNS;
        const fill how = (fill)(i / N_ROWS / N_TOKENS / N_COLUMNS);
        if (columns[k] == 0 || (how != RANDOM && (r != 3 || t != 7))) continue;
        n_bad += !check_case(v, (problem){.weight = weight, .rows = some_rows[r], .n_tokens = some_tokens[t],
                                          .columns = columns[k], .how = how});
        n_cases++;
    }
    for (size_t i = 0; i < (size_t)2 * 2 * N_MANY; i++) {
        const size_t k = i / 2 % 2 ? 1 : columns[4] ? 4 : columns[3] ? 3 : 0;  // Q4_0: 512, whose scales are shared; 96
        n_bad += !check_case(v, (problem){.weight = weight, .rows = i % 2 ? 33 : 17, .n_tokens = many_tokens[i / 4],
                                          .columns = columns[k], .how = RANDOM});
        n_cases++;
    }
    printf("matmul %-4s %-12s %zu of %zu cases near c\n", layouts[weight].name, v->name, n_cases - n_bad,
           n_cases);
    return n_bad == 0;
}

bool check_matmul(void) {
    bool all = true;
    const pk_matmul_variant *v;
    for (size_t row = 0; (v = pk_matmul_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) {
            printf("matmul %-12s not on this CPU\n", v->name);
            continue;
        }
        for (pk_weight weight = 0; weight < PK_W_TYPES; weight++) {
            if (v->fn[weight]) all = check_type(v, weight) && all;
        }
    }
    return all;
}

void bench_matmul(void) {
    enum { N = 3072, MOST = 128 };
    static const size_t counts[] = {1, 16, MOST};
    const size_t n_x = (size_t)MOST * N;
    tokens x = {must_alloc(n_x), must_alloc(n_x * sizeof(float)), must_alloc(n_x * sizeof(float))};
    float *out = must_alloc(n_x * sizeof *out);
    for (pk_weight weight = 0; weight < PK_W_TYPES; weight++) {
        const problem p = {.weight = weight, .rows = N, .columns = N, .how = RANDOM};
        size_t n_panels;
        fill_tokens(&x, MOST, N, shared_of(weight, N), RANDOM);
        uint8_t *w = new_panels(&p, &n_panels), *tiles = new_tiles(&x, weight, MOST, N, false);
        const pk_matmul_variant *v;
        for (size_t row = 0; (v = pk_matmul_at(row)) != NULL; row++) {
            if (!pk_cpu_has(v->needs) || !v->fn[weight]) continue;
            printf("matmul %-4s %-12s", layouts[weight].name, v->name);
            for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
                const size_t rounds = 3 + MOST / 8 / counts[c];  // the best of so many
                double best = DBL_MAX;
                for (size_t round = 0; round < rounds; round++) {
                    const double start = now_ns();
                    v->fn[weight](&(pk_matmul_args){out, N, w, tiles, N, counts[c], N, 0, 0.0f});
                    best = fmin(best, now_ns() - start);
                }
                printf("  %3zu tokens %7.1f GOPS", counts[c], 2.0 * N * N * (double)counts[c] / best);
            }
            printf("\n");
        }
        free(w);
        free(tiles);
    }
    free(x.q);
    free(x.d);
    free(x.x);
    free(out);
}
