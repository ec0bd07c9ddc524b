// SPDX-License-Identifier: Apache-2.0
// check_attention.c - every attention variant against float64 within a derived bound, and its speed.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/attention.h"
#include "pk_check.h"
#include "pk_cpu.h"
#include "pk_fp16.h"

enum { GUARD = 64, GAP = 4, PARTS = 3 };  // bytes around, and floats between, what a call may write

typedef enum { X_RANDOM, X_STEEP, X_ZERO, N_FILLS } fill;
typedef enum { M_NONE, M_ZERO, M_CAUSAL, M_FINITE, M_HOLES, M_HIDDEN, N_MASKS } mask;
static const char *const fill_names[] = {"random", "scores to 1e4", "zero"};
static const char *const mask_names[] = {"none", "zero", "causal", "finite", "holes", "hidden"};

typedef struct {
    size_t tokens, group, keys, head;
} shape;
static const shape shapes[] = {
    {1, 1, 1, 32},   {1, 3, 1, 128},  {1, 3, 64, 128},   {1, 4, 65, 128},   {1, 8, 200, 64}, {1, 5, 131, 96},
    {1, 96, 67, 32}, {32, 3, 1, 128}, {32, 3, 300, 128}, {24, 4, 129, 128}, {7, 3, 190, 32}, {5, 1, 64, 96},
    {12, 8, 77, 64}, {96, 1, 70, 32}, {3, 7, 515, 128},  {13, 7, 62, 96},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

// One problem; every array is as long as the contract says, so that a sanitizer sees any access beyond it.
typedef struct {
    pk_attention_args args;
    float *q;
    uint8_t *k, *v, *mask, *out, *state, *scratch_memory, *scratch;
    size_t out_bytes, state_bytes;
    double *want, *bound;  // [queries][head]
} problem;

static void put_half(uint8_t *to, float x) {
    const uint16_t half = pk_to_fp16(x);
    to[0] = (uint8_t)(half & 0xffu);
    to[1] = (uint8_t)(half >> 8);
}

static float half_at(const uint8_t *p) { return pk_from_fp16((uint16_t)(p[0] | p[1] << 8)); }

static size_t row_bytes(pk_kv type, size_t head) { return type == PK_KV_F16 ? 2 * head : head / 32 * 34; }

static void fill_rows(uint8_t *rows, size_t row, pk_kv type, const shape *s, float size, uint64_t *seed) {
    for (size_t j = 0; j < s->keys; j++) {
        uint8_t *to = rows + j * row;
        for (size_t d = 0; d < s->head; d++) {
            if (type == PK_KV_F16) {
                put_half(to + 2 * d, size * random_sample(seed));
                continue;
            }
            uint8_t *block = to + d / 32 * 34;
            if (d % 32 == 0) put_half(block, size / 127.0f * random_sample(seed));
            block[2 + d % 32] = (uint8_t)(int8_t)(127.0f * random_sample(seed));
        }
    }
}

static double value_at(const uint8_t *row, pk_kv type, size_t d) {
    if (type == PK_KV_F16) return (double)half_at(row + 2 * d);
    const uint8_t *block = row + d / 32 * 34;
    return (double)half_at(block) * (int8_t)block[2 + d % 32];
}

static float mask_value(mask how, const shape *s, size_t t, size_t j, uint64_t *seed) {
    const float u = random_sample(seed);
    switch (how) {
        case M_CAUSAL: return j + s->tokens > s->keys + t ? -INFINITY : 0.0f;  // some may see none
        case M_FINITE: return u < 0.5f ? 8.0f * u : -60000.0f * u;
        case M_HOLES: return u < -0.2f || (j / 64 == 1 && t % 2) || t % 5 == 4 ? -INFINITY : 0.0f;
        case M_HIDDEN: return -INFINITY;
        case M_NONE:
        case M_ZERO:
        case N_MASKS: break;
    }
    return 0.0f;
}

static const float *query_at(const pk_attention_args *a, size_t i) {
    const uint8_t *q = (const uint8_t *)a->q + i / a->group * a->q_token + i % a->group * a->q_head;
    return (const float *)(const void *)q;
}

// Query i in float64, and how far float32 may be from it. With u = 2^-24, and any order of additions:
//
//   s     a dot of `head` products, each of a k with one rounding (q8_0), the scale and the mask:
//         (head + 3) u of the sum of sizes.
//   p     e^(s - m): u |s - m| of the subtraction, 2 u of exp (1 ulp) and of a product, and the same again
//         each time m grows: its steps add up to less than the range of s. 0 for what is below e^-87.
//   sums  of at most 64 in a block, then of `blocks`, each with a factor: (64 + 2 blocks + 8) u, with v's
//         rounding, the division, and those of a merge. In both the numerator and the divisor.
//
// A relative change e of p moves the average by w e (v - out), with w = p / sum, over 1 - (sum of w e).
static void solve(problem *p, size_t i) {
    const pk_attention_args *a = &p->args;
    const double u = 0x1p-24, blocks = (double)(a->keys / PK_ATTENTION_KEYS + 1 + PARTS);
    double *s = must_alloc(a->keys * sizeof *s), *e = must_alloc(a->keys * sizeof *e);
    double most = -INFINITY, least = INFINITY, sum = 0.0, moved = 0.0;
    for (size_t j = 0; j < a->keys; j++) {
        double dot = 0.0, sizes = 0.0;
        for (size_t d = 0; d < a->head; d++) {
            const double x = (double)query_at(a, i)[d] * value_at(a->k + j * a->k_row, a->k_type, d);
            dot += x;
            sizes += fabs(x);
        }
        const uint8_t *mask_row = a->mask ? a->mask + i / a->group * a->mask_token : NULL;
        const double bias = mask_row ? (double)half_at(mask_row + 2 * j) : 0.0;
        s[j] = (double)a->scale * dot + bias;
        e[j] = (double)(a->head + 3) * u * ((double)a->scale * sizes + (isinf(bias) ? 0.0 : fabs(bias)));
        if (s[j] > most) most = s[j];
        if (s[j] < least && s[j] > -INFINITY) least = s[j];
    }
    for (size_t j = 0; j < a->keys; j++) {
        s[j] = s[j] == -INFINITY ? 0.0 : exp(s[j] - most);
        e[j] = expm1(e[j] + u * 2.0 * (most - least) + 4.0 * u * (blocks + 1.0));
        sum += s[j];
    }
    for (size_t j = 0; j < a->keys && sum > 0.0; j++) moved += s[j] / sum * e[j];
    for (size_t d = 0; d < a->head; d++) {
        double out = 0.0, change = 0.0, sizes = 0.0;
        for (size_t j = 0; j < a->keys && sum > 0.0; j++) {
            out += s[j] / sum * value_at(a->v + j * a->v_row, a->v_type, d);
        }
        for (size_t j = 0; j < a->keys && sum > 0.0; j++) {
            const double v = value_at(a->v + j * a->v_row, a->v_type, d);
            change += s[j] / sum * e[j] * fabs(v - out) / (1.0 - moved) + exp(-87.0) * fabs(v);
            sizes += s[j] / sum * fabs(v);
        }
        p->want[i * a->head + d] = out;
        p->bound[i * a->head + d] = moved < 1.0 ? change + 2.0 * (72.0 + 2.0 * blocks) * u * sizes : -1.0;
    }
    free(s);
    free(e);
}

static problem open_problem(const shape *s, pk_kv k_type, pk_kv v_type, fill how, mask hidden) {
    const size_t queries = s->tokens * s->group, n_q = queries * s->head + (s->tokens - 1) * GAP;
    const size_t k_row = row_bytes(k_type, s->head) + 14, v_row = row_bytes(v_type, s->head) + 2;
    const size_t n_k = (s->keys - 1) * k_row + row_bytes(k_type, s->head);
    const size_t n_v = (s->keys - 1) * v_row + row_bytes(v_type, s->head);
    const size_t mask_row = 2 * s->keys + 6, n_mask = (s->tokens - 1) * mask_row + 2 * s->keys;
    problem p = {.q = must_alloc(n_q * sizeof *p.q), .k = must_alloc(n_k), .v = must_alloc(n_v),
                 .mask = must_alloc(n_mask), .out_bytes = queries * (s->head + GAP) * sizeof(float),
                 .state_bytes = 2 * queries * sizeof(float)};
    p.out = must_alloc(PARTS * p.out_bytes + 2 * GUARD);
    p.state = must_alloc(PARTS * p.state_bytes + 2 * GUARD);
    p.scratch_memory = must_alloc(pk_attention_scratch_bytes() + 2 * GUARD + 64);
    p.scratch = p.scratch_memory + GUARD;
    p.scratch += (64 - (uintptr_t)p.scratch % 64) % 64;
    p.want = must_alloc(queries * s->head * sizeof *p.want);
    p.bound = must_alloc(queries * s->head * sizeof *p.bound);
    uint64_t seed = 88172645463325252u;
    for (size_t i = 0; i < n_q; i++) {  // steep: few products, or the bound of their sum is too wide
        p.q[i] = random_sample(&seed);
        if (how == X_ZERO || (how == X_STEEP && i % 8)) p.q[i] = 0.0f;
    }
    fill_rows(p.k, k_row, k_type, s, how == X_STEEP ? 1000.0f : 2.0f, &seed);
    fill_rows(p.v, v_row, v_type, s, 3.0f, &seed);
    for (size_t t = 0; t < s->tokens; t++) {
        for (size_t j = 0; j < s->keys; j++) {
            put_half(p.mask + t * mask_row + 2 * j, mask_value(hidden, s, t, j, &seed));
        }
    }
    p.args = (pk_attention_args){
        .q = p.q, .q_token = (s->group * s->head + GAP) * sizeof(float), .q_head = s->head * sizeof(float),
        .k = p.k, .v = p.v, .k_row = k_row, .v_row = v_row, .k_type = k_type, .v_type = v_type,
        .mask = hidden == M_NONE ? NULL : p.mask, .mask_token = mask_row,
        .out_token = s->group * (s->head + GAP) * sizeof(float), .out_head = (s->head + GAP) * sizeof(float),
        .tokens = s->tokens, .group = s->group, .keys = s->keys, .head = s->head,
        .scale = how == X_STEEP ? 2.5f : 0.17f, .scratch = p.scratch};
    for (size_t i = 0; i < queries; i++) solve(&p, i);
    return p;
}

static void close_problem(problem *p) {
    free(p->q);
    free(p->k);
    free(p->v);
    free(p->mask);
    free(p->out);
    free(p->state);
    free(p->scratch_memory);
    free(p->want);
    free(p->bound);
}

static void paint(problem *p) {
    memset(p->out, 0xa5, PARTS * p->out_bytes + 2 * GUARD);
    memset(p->state, 0xa5, PARTS * p->state_bytes + 2 * GUARD);
    memset(p->scratch_memory, 0xa5, pk_attention_scratch_bytes() + 2 * GUARD + 64);
}

static bool untouched(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (p[i] != 0xa5) return false;
    }
    return true;
}

// Rows, each with GAP floats behind it, from GUARD on; nothing else may be written.
static bool is_right(const problem *p) {
    const pk_attention_args *a = &p->args;
    const size_t queries = a->tokens * a->group;
    bool ok = true;
    for (size_t i = 0; i < queries; i++) {
        const uint8_t *row = p->out + GUARD + i * a->out_head;
        for (size_t d = 0; d < a->head; d++) {
            float got;
            memcpy(&got, row + d * sizeof got, sizeof got);
            ok = ok && fabs((double)got - p->want[i * a->head + d]) <= p->bound[i * a->head + d];  // not NaN
        }
        ok = ok && untouched(row + a->head * sizeof(float), GAP * sizeof(float));
    }
    return ok && untouched(p->out, GUARD) && untouched(p->out + GUARD + p->out_bytes, GUARD);
}

static bool scratch_is_right(const problem *p) {
    const size_t n = pk_attention_scratch_bytes(), before = (size_t)(p->scratch - p->scratch_memory);
    return untouched(p->scratch_memory, before) && untouched(p->scratch + n, 2 * GUARD + 64 - before);
}

static float *floats(uint8_t *p) { return (float *)(void *)p; }

static bool whole_is_right(problem *p, pk_attention_fn fn) {
    paint(p);
    pk_attention_args a = p->args;
    a.out = floats(p->out + GUARD);
    fn(&a);
    return is_right(p) && scratch_is_right(p) && untouched(p->state, PARTS * p->state_bytes + 2 * GUARD);
}

// The keys in `parts` parts, the parts' dense results, and what becomes of them.
static bool parts_are_right(problem *p, pk_attention_fn fn, size_t parts) {
    const size_t queries = p->args.tokens * p->args.group, head = p->args.head, n = queries * head;
    float *partial = must_alloc(parts * n * sizeof *partial);
    paint(p);
    for (size_t part = 0; part < parts; part++) {
        const size_t from = p->args.keys * part / parts, to = p->args.keys * (part + 1) / parts;
        pk_attention_args a = p->args;
        a.k += from * a.k_row;
        a.v += from * a.v_row;
        if (a.mask) a.mask += 2 * from;
        a.keys = to - from;
        a.out = partial + part * n;
        a.out_head = head * sizeof(float);
        a.out_token = a.group * a.out_head;
        a.state = floats(p->state + GUARD) + part * 2 * queries;
        fn(&a);
    }
    const float *state = floats(p->state + GUARD);
    pk_attention_merge(floats(p->out + GUARD), p->args.out_head, partial, state, parts, queries, head);
    free(partial);
    const uint8_t *behind = p->state + GUARD + parts * p->state_bytes;
    return is_right(p) && scratch_is_right(p) && untouched(p->state, GUARD) && untouched(behind, GUARD);
}

// A NaN in a query spoils that query's result alone; one in a key, all; one in a column of v, that column.
static bool nan_is_right(pk_attention_fn fn, size_t tokens) {
    const shape s = {tokens, 3, 130, 64};
    bool ok = true;
    for (int where = 0; where < 3; where++) {
        problem p = open_problem(&s, PK_KV_F16, PK_KV_F16, X_RANDOM, M_NONE);
        if (where == 0) p.q[s.head + 5] = NAN;  // of query 1
        uint8_t *half = where == 1 ? p.k + 70 * p.args.k_row : p.v + 70 * p.args.v_row;  // column 0 of key 70
        if (where > 0) memcpy(half, "\x00\x7e", 2);
        paint(&p);
        p.args.out = floats(p.out + GUARD);
        fn(&p.args);
        for (size_t i = 0; i < tokens * s.group; i++) {
            for (size_t d = 0; d < s.head; d++) {
                const bool spoilt = where == 0 ? i == 1 : where == 1 || d == 0;
                ok = ok && spoilt == !!isnan(floats(p.out + GUARD)[i * (s.head + GAP) + d]);
            }
        }
        close_problem(&p);
    }
    return ok;
}

typedef struct {
    size_t n, bad;
} tally;

static void count(tally *t, bool ok, const char *what, const char *name, const shape *s, fill how,
                  mask hidden) {
    t->n++;
    if (ok) return;
    t->bad++;
    printf("attention %s %s is wrong: %zu tokens, group %zu, %zu keys, head %zu, %s, mask %s\n", name, what,
           s->tokens, s->group, s->keys, s->head, fill_names[how], mask_names[hidden]);
}

// Problems are solved once, for all variants.
static void check_problem(tally *tallies, const shape *s, pk_kv k_type, pk_kv v_type, fill how, mask hidden) {
    problem p = open_problem(s, k_type, v_type, how, hidden);
    const pk_attention_variant *v;
    for (size_t row = 0; (v = pk_attention_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) continue;
        tally *t = &tallies[row];
        const size_t parts = s->keys < PARTS ? 1 : PARTS;
        count(t, whole_is_right(&p, v->many), "many", v->name, s, how, hidden);
        count(t, parts_are_right(&p, v->many, parts), "many in parts", v->name, s, how, hidden);
        if (s->tokens > 1) continue;
        count(t, whole_is_right(&p, v->one), "one", v->name, s, how, hidden);
        count(t, parts_are_right(&p, v->one, parts), "one in parts", v->name, s, how, hidden);
    }
    close_problem(&p);
}

bool check_attention(void) {
    enum { ROWS = 8 };
    static const pk_kv k_types[] = {PK_KV_F16, PK_KV_Q8_0, PK_KV_F16};
    static const pk_kv v_types[] = {PK_KV_F16, PK_KV_Q8_0, PK_KV_Q8_0};
    tally tallies[ROWS] = {{0, 0}};
    for (size_t i = 0; i < N_SHAPES; i++) {
        for (fill how = X_RANDOM; how < N_FILLS; how++) {
            for (mask hidden = M_NONE; hidden < N_MASKS; hidden++) {
                const size_t type = (i + how + hidden) % 3;
                check_problem(tallies, &shapes[i], k_types[type], v_types[type], how, hidden);
            }
        }
    }
    bool all = true;
    const pk_attention_variant *v;
    for (size_t row = 0; (v = pk_attention_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) {
            printf("attention %-8s not on this CPU\n", v->name);
            continue;
        }
        const bool nan_ok = nan_is_right(v->many, 5) && nan_is_right(v->many, 1) && nan_is_right(v->one, 1);
        if (!nan_ok) printf("attention %s loses or spreads a NaN\n", v->name);
        const tally *t = &tallies[row];
        printf("attention %-8s %zu of %zu cases within the bound\n", v->name, t->n - t->bad, t->n);
        all = all && t->bad == 0 && nan_ok;
    }
    return all;
}

// ---- speed ----

static double best_time(pk_attention_fn fn, const pk_attention_args *args, size_t calls) {
    double best = 0.0;
    for (int round = 0; round < 9; round++) {
        const double start = now_ns();
        for (size_t i = 0; i < calls; i++) fn(args);
        const double took = (now_ns() - start) / (double)calls;
        if (round == 0 || took < best) best = took;
    }
    return best;
}

// One of Phi-4's 8 key-value heads: rows are 8 heads apart.
void bench_attention(void) {
    enum { TOKENS = 32, GROUP = 3, KEYS = 4096, HEAD = 128, KV_HEADS = 8 };
    static const char *const type_names[] = {"f16", "q8_0"};
    const size_t n = TOKENS * GROUP * HEAD, token = GROUP * HEAD * sizeof(float);
    float *q = must_alloc(n * sizeof *q), *out = must_alloc(n * sizeof *out);
    uint64_t seed = 88172645463325252u;
    for (size_t i = 0; i < n; i++) q[i] = random_sample(&seed);
    uint8_t *memory = must_alloc(pk_attention_scratch_bytes() + 63);
    for (pk_kv type = PK_KV_F16; type < PK_KV_TYPES; type++) {
        const shape all = {1, 1, KEYS, HEAD * KV_HEADS};
        const size_t row = row_bytes(type, all.head);
        uint8_t *k = must_alloc(KEYS * row), *value = must_alloc(KEYS * row);
        fill_rows(k, row, type, &all, 1.0f, &seed);
        fill_rows(value, row, type, &all, 1.0f, &seed);
        pk_attention_args args = {
            .q = q, .q_token = token, .q_head = HEAD * sizeof *q,
            .k = k, .v = value, .k_row = row, .v_row = row,
            .k_type = type, .v_type = type, .out = out, .out_token = token, .out_head = HEAD * sizeof *q,
            .group = GROUP, .keys = KEYS, .head = HEAD, .scale = 0.088f,
            .scratch = memory + (64 - (uintptr_t)memory % 64) % 64};
        const pk_attention_variant *v;
        for (size_t at = 0; (v = pk_attention_at(at)) != NULL; at++) {
            if (!pk_cpu_has(v->needs)) continue;
            args.tokens = TOKENS;
            const double many = best_time(v->many, &args, at ? 8 : 1);
            args.tokens = 1;
            const double one = best_time(v->one, &args, at ? 64 : 4);
            const double gflops = 4.0 * (double)n * KEYS / many;
            const double bytes = 2.0 * KEYS * (double)row_bytes(type, HEAD);
            printf("attention %-4s %-8s %6.1f GFLOPS many  %6.2f GB/s one\n", type_names[type], v->name,
                   gflops, bytes / one);
        }
        free(k);
        free(value);
    }
    free(q);
    free(out);
    free(memory);
}
