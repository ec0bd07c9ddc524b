// SPDX-License-Identifier: Apache-2.0
// fuzz_matmul.c - packing there and back, tiles of activations, and the matrix multiplication near c.
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "matmul/activations.h"
#include "matmul/pack.h"
#include "pk.h"

static const struct {
    int type;  // ggml's number
    pk_weight weight;
    size_t columns, bytes;  // of a block
} types[] = {
    {0, PK_W_F32, 1, 4},       {1, PK_W_F16, 1, 2},       {2, PK_W_Q4_0, 32, 18},    {8, PK_W_Q8_0, 32, 34},
    {12, PK_W_Q4_K, 256, 144}, {13, PK_W_Q5_K, 256, 176}, {14, PK_W_Q6_K, 256, 210}, {30, PK_W_BF16, 1, 2},
};
enum { N_TYPES = sizeof types / sizeof types[0], MOST_COLUMNS = 768, MOST_PRODUCTS = 1 << 18 };

void fuzz_activations(bytes *in) {
    const size_t tokens = take_below(in, PK_TILE_TOKENS + 2), n = take_below(in, MOST_COLUMNS);
    const int arrange = (int)(take(in, 1) % 2);
    const size_t round = take(in, 1) % 4 == 0 ? 1 : 32, columns = (n + round - 1) / round * round;
    const size_t blocks = (columns + PK_X_BLOCK - 1) / PK_X_BLOCK;
    const size_t shared = take(in, 1) % 3 ? 1 : 8, first = take_below(in, blocks + 1);
    const size_t last = take(in, 1) % 4 ? blocks : first + take_below(in, blocks + 2);
    const char *variant = take_variant(in, "activations");
    const size_t n_tile = pk_tile_bytes(arrange ? PK_W_F32 : PK_W_Q8_0, columns, tokens);
    const uint64_t lie = take(in, 1) % 8;  // 1: about the tile's size, 2: about the columns
    const size_t said = lie == 1 ? take_hostile(in) : n_tile,
                 columns_said = lie == 2 ? take_hostile(in) : columns;
    float *x = new_floats(in, tokens * columns + (tokens * columns == 0));
    uint8_t *tile = exact(n_tile), *want = exact(n_tile);
    memset(tile, 0xa5, n_tile);
    memset(want, 0xa5, n_tile);
    const bool fits = shared == 1 || (!arrange && blocks % 8 == 0 && first % 8 == 0 && last % 8 == 0);
    const bool good = tokens >= 1 && tokens <= PK_TILE_TOKENS && columns > 0 &&
                      (arrange || columns % 32 == 0) && first < last && last <= blocks && fits &&
                      said == n_tile && columns_said == columns && is_variant("activations", variant);
    const int got =
        pk_activations(tile, said, x, tokens, columns_said, first, last, shared, arrange, variant);
    must((got == PK_OK) == good, "pk_activations", variant, "has the wrong status");
    if (good) {
        must(pk_activations(want, n_tile, x, tokens, columns, first, last, shared, arrange, "c") == PK_OK,
             "pk_activations", "c", "refuses");
    }
    must(!memcmp(tile, want, n_tile), "pk_activations", variant,
         good ? "differs from c" : "writes and refuses");
    free_floats(x);
    free(tile);
    free(want);
}

void fuzz_pack(bytes *in) {
    const size_t t = take(in, 1) % N_TYPES, rows = 1 + take_below(in, 50);
    const size_t columns = (1 + take_below(in, MOST_COLUMNS / types[t].columns)) * types[t].columns;
    const size_t n = rows * pk_row_bytes(types[t].weight, columns);
    const size_t panels = (rows + PK_PANEL_ROWS - 1) / PK_PANEL_ROWS, cut = take_below(in, panels + 1);
    const size_t n_packed = panels * pk_panel_bytes(types[t].weight, columns);
    uint8_t *source = exact(n), *packed = exact(n_packed), *back = exact(n);
    fill_bytes(in, source, n);
    pk_pack(packed, source, types[t].weight, rows, columns, cut, panels);
    pk_pack(packed, source, types[t].weight, rows, columns, 0, cut);
    pk_unpack(back, packed, types[t].weight, rows, columns, 0, panels);
    must(!memcmp(source, back, n), "pk_unpack", "c", "does not give back what was packed");
    memset(back, 0, n);
    pk_unpack(back, packed, types[t].weight, rows, columns, cut, panels);
    const size_t before = cut * PK_PANEL_ROWS * pk_row_bytes(types[t].weight, columns),
                 from = before < n ? before : n;
    must(!memcmp(source + from, back + from, n - from), "pk_unpack", "c", "depends on the range");
    for (size_t i = 0; i < from; i++) must(back[i] == 0, "pk_unpack", "c", "writes outside its range");
    free(source);
    free(packed);
    free(back);
}

// ---- multiplication ----

typedef struct {
    size_t t, rows, columns, tokens;  // t: row of `types`
    uint8_t *w;
    float *x;
    size_t n_w;
    double *row_sizes,
        *token_sizes;  // [rows][columns], [tokens][columns]: NaN marks one with a number that is none
} problem;

static void scale_and_min(const uint8_t *packed, size_t i, double *s, double *m) {
    const unsigned high_s = packed[i % 4] >> 6, high_m = packed[4 + i % 4] >> 6, both = packed[8 + i % 4];
    *s = i < 4 ? packed[i] & 63u : (both & 15u) | high_s << 4;
    *m = i < 4 ? packed[4 + i] & 63u : both >> 4 | high_m << 4;
}

// An infinite scale of a level 0 gives NaN or not, as a variant multiplies; a scale that is NaN always gives
// NaN.
static double times(const uint8_t *scale, double n) {
    const double d = fabs(half_value(scale));
    return isinf(d) ? d : d * n;
}

// The size of the terms that weight k of a block brings, offsets added: what rounding errors are relative to.
static double size_in_block(const uint8_t *block, pk_weight weight, size_t k) {
    double s = 0.0, m = 0.0;
    switch (weight) {
        case PK_W_Q4_0: return times(block, 15 + 8);
        case PK_W_Q8_0: return times(block, abs((int8_t)block[2 + k]));
        case PK_W_Q6_K: return times(block + 208, abs((int8_t)block[192 + k / 16]) * (63 + 32));
        case PK_W_Q4_K:
        case PK_W_Q5_K:
            scale_and_min(block + 4, k / 32, &s, &m);
            return times(block, s * (weight == PK_W_Q4_K ? 15 : 31)) + times(block + 2, m);
        case PK_W_F16: return fabs(half_value(block));
        case PK_W_BF16:
        case PK_W_F32:
        case PK_W_TYPES: break;
    }
    float x;
    const uint8_t wide[4] = {0, 0, block[0], block[1]};
    memcpy(&x, weight == PK_W_BF16 ? wide : block, sizeof x);
    return fabs((double)x);
}

static bool has_nan(const double *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (isnan(x[i])) return true;
    }
    return false;
}

static void find_sizes(problem *p) {
    const size_t block = types[p->t].columns, row = p->n_w / p->rows;
    const pk_weight weight = types[p->t].weight;
    for (size_t i = 0; i < p->rows * p->columns; i++) {
        const size_t r = i / p->columns, k = i % p->columns;
        p->row_sizes[i] = size_in_block(p->w + r * row + k / block * types[p->t].bytes, weight, k % block);
    }
    const size_t group = PK_IS_FLOAT(weight) ? 1 : 32 * PK_SHARED_BLOCKS(weight, p->columns);
    for (size_t i = 0; i < p->tokens * p->columns; i += group) {  // columns are whole groups
        double most = 0.0;
        for (size_t k = i; k < i + group; k++) {
            const double size = fabs((double)p->x[k]);
            // An infinity poisons its scale, as NaN does; between floats it is one number among others.
            most = isnan(most) || isnan(size) || (group > 1 && isinf(size)) ? (double)NAN : fmax(most, size);
        }
        for (size_t k = i; k < i + group; k++) {  // rounded to 8 bits, half a step more
            p->token_sizes[k] = group == 1 ? most : isnan(most) ? most : fabs((double)p->x[k]) + most / 254.0;
        }
    }
}

// How far two variants may be apart: tools/check_matmul.c derives it; `size` is the sum of the terms' sizes.
// The last part is for scales whose product is subnormal, off by half of 2^-149, and then multiplied by up to
// 2^28: integer sums of 256 columns, with scales of 6 or 8 bits.
static double bound(const problem *p, double size) {
    const bool is_float = PK_IS_FLOAT(types[p->t].weight);
    const double terms = (double)(is_float ? p->columns : p->columns / PK_X_BLOCK * 2);
    return 1.01 * 2.0 * (terms + 4.0) * 0x1p-24 * size + terms * (is_float ? 0x1p-148 : 0x1p-121);
}

typedef struct {
    int add;
    float scale;
    const char *variant;
} way;

static void check_element(const problem *p, size_t t, size_t r, const float *all[3], way how) {
    const size_t i = t * p->rows + r;
    const double *w = p->row_sizes + r * p->columns, *x = p->token_sizes + t * p->columns;
    const double got = (double)all[0][i], want = (double)all[1][i], before = (double)all[2][i];
    const double scale = how.add ? (double)how.scale : 1.0;
    if (has_nan(w, p->columns) || has_nan(x, p->columns)) {
        must(isnan(got) && isnan(want), "pk_matmul", how.variant, "lost a NaN");
        return;
    }
    double size = 0.0;
    for (size_t k = 0; k < p->columns; k++) size += w[k] * x[k];
    const double total = fabs(before) * how.add + fabs(scale) * size;
    if (!(size < 1e36 && total < 1e36)) return;  // a sum may overflow, or holds an infinity
    const double sum = how.add ? before + scale * want : want;
    const double room = fabs(scale) * bound(p, size) + how.add * (2.0 * 0x1p-24 * 1.01 * total + 0x1p-148);
    must(is_near(got, sum, room), "pk_matmul", how.variant, "is not near c");
}

static void check_product(bytes *in, const problem *p) {
    way how = {.add = (int)(take(in, 1) % 2), .scale = take_float(in), .variant = take_variant(in, "matmul")};
    const size_t n_out = p->tokens * p->rows, n_x = p->tokens * p->columns;
    float *before = new_floats(in, n_out), *got = exact(n_out * sizeof *got),
          *want = exact(n_out * sizeof *want);
    memcpy(got, before, n_out * sizeof *got);
    // The size that is wrong, if one is: a lie about one alone must be found.
    size_t said[6] = {n_out, p->n_w, n_x, p->rows, p->columns, p->tokens};
    const size_t which = (size_t)take(in, 1) % 16, honest = which < 6 ? said[which] : 0;
    if (which < 6) said[which] = take_hostile(in);
    const int type = which == 6 ? (int)(uint32_t)take(in, 4) : types[p->t].type;
    const bool lie = (which < 6 && said[which] != honest) || (which == 6 && type != types[p->t].type);
    const int status = pk_matmul(which == 7 ? p->x : got, said[0], which == 8 ? NULL : p->w, said[1], p->x,
                                 said[2], said[3], said[4], said[5], type, how.scale, how.add, how.variant);
    if (status == PK_OK) {
        must(!lie && which != 7 && which != 8 && is_variant("matmul", how.variant), "pk_matmul", how.variant,
             "takes wrong arguments");
        must(pk_matmul(want, n_out, p->w, p->n_w, p->x, n_x, p->rows, p->columns, p->tokens, types[p->t].type,
                       0.0f, 0, "c") == PK_OK,
             "pk_matmul", "c", "refuses");
        for (size_t i = 0; i < n_out; i++) {
            if (how.add && !isfinite(before[i])) continue;
            check_element(p, i / p->rows, i % p->rows, (const float *[3]){got, want, before}, how);
        }
    } else {
        const bool right = !lie && which != 7 && which != 8 && is_variant("matmul", how.variant);
        must(!right || status == PK_ERR_VARIANT, "pk_matmul", how.variant, "refuses right arguments");
        must(!memcmp(got, before, n_out * sizeof *got), "pk_matmul", how.variant, "writes and refuses");
    }
    free_floats(before);
    free(got);
    free(want);
}

void fuzz_matmul(bytes *in) {
    problem p = {.t = take(in, 1) % N_TYPES, .rows = 1 + take_below(in, 40)};
    p.columns = (1 + take_below(in, MOST_COLUMNS / types[p.t].columns)) * types[p.t].columns;
    p.tokens = 1 + take_below(in, 140);
    while (p.rows * p.columns * p.tokens > MOST_PRODUCTS)
        p.tokens = p.tokens / 2 + 1, p.rows = p.rows / 2 + 1;
    p.n_w = p.rows * (p.columns / types[p.t].columns) * types[p.t].bytes;
    uint8_t *memory = exact(p.n_w + 1);
    p.w = memory + 1;  // rows of bytes may lie anywhere
    fill_bytes(in, p.w, p.n_w);
    p.x = new_floats(in, p.tokens * p.columns);
    p.row_sizes = exact(p.rows * p.columns * sizeof *p.row_sizes);
    p.token_sizes = exact(p.tokens * p.columns * sizeof *p.token_sizes);
    find_sizes(&p);
    check_product(in, &p);
    free(memory);
    free_floats(p.x);
    free(p.row_sizes);
    free(p.token_sizes);
}
