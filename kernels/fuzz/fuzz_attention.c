// SPDX-License-Identifier: Apache-2.0
// fuzz_attention.c - attention of every variant near its definition in float64; a NaN query hurts no other.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/attention.h"
#include "fuzz.h"
#include "pk.h"

enum { TOKENS, HEADS, KV_HEADS, KEYS, HEAD, N_SIZES, MOST_PRODUCTS = 1 << 17 };

typedef struct {
    size_t shape[N_SIZES], parts;
    int k_type, v_type;
    float *q;
    uint8_t *k, *v;
    uint16_t *mask;  // [tokens][keys] or NULL
    size_t n_k, n_v;
    float scale;
} problem;

static size_t head_bytes(int type, size_t head) { return type == 8 ? head / 32 * 34 : 2 * head; }

// Number d of the key or value j of a head.
static double value_at(const problem *p, const uint8_t *rows, int type, size_t kv_head, size_t j, size_t d) {
    const size_t n = head_bytes(type, p->shape[HEAD]);
    const uint8_t *row = rows + (j * p->shape[KV_HEADS] + kv_head) * n;
    if (type == 1) return half_value(row + 2 * d);
    const uint8_t *block = row + d / 32 * 34;
    return half_value(block) * (int8_t)block[2 + d % 32];
}

// The scores of one query, and their errors e; false where float32 may overflow or a number is none. For the
// bound see tools/check_attention.c.
static bool find_scores(const problem *p, size_t t, size_t h, double *s, double *e) {
    const size_t keys = p->shape[KEYS], head = p->shape[HEAD],
                 kv_head = h / (p->shape[HEADS] / p->shape[KV_HEADS]);
    const float *q = p->q + (t * p->shape[HEADS] + h) * head;
    const double u = 0x1p-24, scale = fabs((double)p->scale);
    for (size_t j = 0; j < keys; j++) {
        double dot = 0.0, sizes = 0.0;
        for (size_t d = 0; d < head; d++) {
            const double x = (double)q[d] * value_at(p, p->k, p->k_type, kv_head, j, d);
            dot += x;
            sizes += fabs(x);
        }
        const double bias = p->mask ? half_value((const uint8_t *)(p->mask + t * keys + j)) : 0.0;
        const double plain = isinf(bias) ? 0.0 : fabs(bias);
        // Also scale * q alone must not overflow, nor vanish, in whatever order a variant multiplies.
        if (!(sizes < 1e30 && sizes * scale + plain < 1e30) || isnan(bias) || bias == (double)INFINITY)
            return false;
        s[j] = (double)p->scale * dot + bias;
        e[j] = (double)(head + 3) * u * (scale * sizes + plain) + (double)head * 0x1p-148 * (1.0 + scale);
    }
    return true;
}

typedef struct {
    double most, sum, moved;
} softmax;

// Scores to weights in s, errors to relative ones in e.
static softmax find_weights(const problem *p, double *s, double *e) {
    const size_t keys = p->shape[KEYS];
    const double u = 0x1p-24, blocks = (double)(keys / PK_ATTENTION_KEYS + 1 + p->parts);
    softmax all = {-(double)INFINITY, 0.0, 0.0};
    double least = (double)INFINITY;
    for (size_t j = 0; j < keys; j++) {
        if (s[j] > all.most) all.most = s[j];
        if (s[j] < least && s[j] > -(double)INFINITY) least = s[j];
    }
    for (size_t j = 0; j < keys; j++) {
        s[j] = s[j] == -(double)INFINITY ? 0.0 : exp(s[j] - all.most);
        e[j] = expm1(2.0 * e[j] + u * 2.0 * (all.most - least) + 4.0 * u * (blocks + 1.0));
        all.sum += s[j];
    }
    for (size_t j = 0; j < keys && all.sum > 0.0; j++) all.moved += s[j] / all.sum * e[j];
    return all;
}

static void check_query(const problem *p, size_t t, size_t h, const float *out, const char *variant) {
    const size_t keys = p->shape[KEYS], head = p->shape[HEAD],
                 kv_head = h / (p->shape[HEADS] / p->shape[KV_HEADS]);
    const double blocks = (double)(keys / PK_ATTENTION_KEYS + 1 + p->parts);
    double *s = exact(keys * sizeof *s), *e = exact(keys * sizeof *e);
    if (find_scores(p, t, h, s, e)) {
        const softmax all = find_weights(p, s, e);
        for (size_t d = 0; d < head && all.moved < 0.5; d++) {
            double want = 0.0, change = 0.0, sizes = 0.0, plain = 0.0;
            for (size_t j = 0; j < keys; j++) plain += fabs(value_at(p, p->v, p->v_type, kv_head, j, d));
            if (!isfinite(plain)) continue;  // also one that nothing but its weight of 0 hides
            for (size_t j = 0; j < keys && all.sum > 0.0; j++) {
                want += s[j] / all.sum * value_at(p, p->v, p->v_type, kv_head, j, d);
            }
            for (size_t j = 0; j < keys && all.sum > 0.0; j++) {
                const double v = value_at(p, p->v, p->v_type, kv_head, j, d), share = s[j] / all.sum;
                change += share * e[j] * fabs(v - want) / (1.0 - all.moved) + exp(-87.0) * fabs(v) + 0x1p-148;
                sizes += share * fabs(v);
            }
            const double bound = change + 2.0 * (72.0 + 2.0 * blocks) * 0x1p-24 * sizes;
            must(is_near((double)out[d], want, bound), "pk_attention", variant, "is not near its definition");
        }
    }
    free(s);
    free(e);
}

static problem open_problem(bytes *in) {
    static const size_t groups[] = {1, 2, 3, 4, 5, 8, 24, 96};
    problem p = {.k_type = take(in, 1) % 2 ? 1 : 8, .v_type = take(in, 1) % 2 ? 1 : 8};
    p.shape[KV_HEADS] = 1 + take_below(in, 3);
    p.shape[HEADS] = p.shape[KV_HEADS] * groups[take(in, 1) % 8];
    p.shape[TOKENS] = take(in, 1) % 3 ? 1 + take_below(in, 40) : 1;
    p.shape[KEYS] = 1 + take_below(in, 300);
    p.shape[HEAD] = 32 * (1 + take_below(in, 4));
    size_t work;
    while ((work = p.shape[TOKENS] * p.shape[HEADS] * p.shape[KEYS] * p.shape[HEAD]) > MOST_PRODUCTS) {
        size_t *longest = p.shape[TOKENS] > 2 ? &p.shape[TOKENS] : p.shape[KEYS] > 2 ? &p.shape[KEYS] : NULL;
        if (!longest) break;
        *longest = *longest / 2 + 1;
    }
    p.parts = take(in, 1) % 4 ? 1 : 1 + take_below(in, p.shape[KEYS] < 64 ? p.shape[KEYS] : 64);
    p.scale = take(in, 1) % 8 ? 0.0883883f : take_float(in);
    p.n_k = p.shape[KEYS] * p.shape[KV_HEADS] * head_bytes(p.k_type, p.shape[HEAD]);
    p.n_v = p.shape[KEYS] * p.shape[KV_HEADS] * head_bytes(p.v_type, p.shape[HEAD]);
    p.k = exact(p.n_k);
    p.v = exact(p.n_v);
    fill_bytes(in, p.k, p.n_k);
    fill_bytes(in, p.v, p.n_v);
    const size_t n_q = p.shape[TOKENS] * p.shape[HEADS] * p.shape[HEAD],
                 n_mask = p.shape[TOKENS] * p.shape[KEYS];
    p.q = new_floats(in, n_q);
    const uint64_t masked = take(in, 1) % 4;  // none; hidden or not; causal; anything
    if (masked) p.mask = exact(n_mask * sizeof *p.mask);
    if (masked) fill_bytes(in, (uint8_t *)p.mask, n_mask * sizeof *p.mask);
    for (size_t i = 0; masked && i < n_mask; i++) {
        const bool hidden = masked == 1 ? p.mask[i] & 1 : i % p.shape[KEYS] > i / p.shape[KEYS];
        if (masked < 3) p.mask[i] = hidden ? 0xfc00 : 0;
    }
    return p;
}

// Which argument lies: a size of the shape, an array's, the parts, a type, a pointer.
static int call(bytes *in, const problem *p, float *out, const char *variant, bool *lie) {
    const size_t n_out = p->shape[TOKENS] * p->shape[HEADS] * p->shape[HEAD],
                 which = (size_t)take(in, 1) % 24;
    size_t shape[N_SIZES], sizes[4] = {n_out, p->n_k, p->n_v, p->parts};
    memcpy(shape, p->shape, sizeof shape);
    if (which < N_SIZES) shape[which] = take_hostile(in);
    else if (which < 8) sizes[which - N_SIZES] = take_hostile(in);
    else if (which == 8) sizes[3] = (size_t)64 + take_hostile(in) % 1000 + (p->shape[KEYS] > 64);
    const int type = which == 9 ? (int)(uint32_t)take(in, 4) : p->k_type;
    *lie = memcmp(shape, p->shape, sizeof shape) != 0 || sizes[0] != n_out || sizes[1] != p->n_k ||
           sizes[2] != p->n_v || (which == 9 && type != p->k_type) || which == 10 || which == 11;
    if (which == 8) *lie = sizes[3] > 64 || sizes[3] > p->shape[KEYS];
    return pk_attention(which == 11 ? p->q : out, sizes[0], p->q, which == 10 ? NULL : p->k, sizes[1], p->v,
                        sizes[2], p->mask, shape, type, p->v_type, p->scale, sizes[3], variant);
}

void fuzz_attention(bytes *in) {
    problem p = open_problem(in);
    const size_t n_out = p.shape[TOKENS] * p.shape[HEADS] * p.shape[HEAD];
    const char *variant = take_variant(in, "attention");
    float *out = exact(n_out * sizeof *out);
    bool lie = false;
    const int status = call(in, &p, out, variant, &lie);
    must((status == PK_OK) == (!lie && is_variant("attention", variant)), "pk_attention", variant,
         status ? "refuses right arguments" : "takes wrong arguments");
    for (size_t i = 0; status == PK_OK && i < p.shape[TOKENS] * p.shape[HEADS]; i++) {
        check_query(&p, i / p.shape[HEADS], i % p.shape[HEADS], out + i * p.shape[HEAD], variant);
    }
    free(p.k);
    free(p.v);
    free_floats(p.q);
    free(p.mask);
    free(out);
}
