// SPDX-License-Identifier: Apache-2.0
// attention_c.c - scalar reference: keys and values of a block to float32, then one query after the other.
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "attention.h"
#include "pk_fp16.h"

enum { KEYS = PK_ATTENTION_KEYS, HEAD = PK_ATTENTION_MAX_HEAD, ROWS = PK_ATTENTION_QUERIES, LANES = 8 };

typedef struct {
    float k[KEYS][HEAD], v[KEYS][HEAD], sum[ROWS][HEAD], largest[ROWS], total[ROWS];
} workspace;
_Static_assert(sizeof(workspace) <= PK_ATTENTION_SCRATCH, "the scratch is too small");

static float half_at(const uint8_t *p) { return pk_from_fp16((uint16_t)(p[0] | p[1] << 8)); }

static void load_row(float *restrict to, const uint8_t *row, pk_kv type, size_t head) {
    if (type == PK_KV_F16) {
        for (size_t d = 0; d < head; d++) to[d] = half_at(row + 2 * d);
        return;
    }
    for (size_t d = 0; d < head; d += 32, row += 34) {
        const float scale = half_at(row);
        for (size_t i = 0; i < 32; i++) to[d + i] = scale * (float)(int8_t)row[2 + i];
    }
}

static float mask_at(const pk_attention_args *a, size_t token, size_t key) {
    return a->mask ? half_at(a->mask + token * a->mask_token + 2 * key) : 0.0f;
}

static bool seen(const pk_attention_args *a, size_t key) {
    for (size_t t = 0; t < a->tokens; t++) {
        if (mask_at(a, t, key) != -INFINITY) return true;
    }
    return false;
}

// Partial sums in a few columns, which compilers turn into SIMD: one sum would fix the order of additions.
static float dot(const float *a, const float *b, size_t n) {
    float sum[LANES] = {0.0f};
    for (size_t d = 0; d < n; d += LANES) {
        for (size_t l = 0; l < LANES; l++) sum[l] += a[d + l] * b[d + l];
    }
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// Keys from..from + n of query i, whose token may see none of them.
static void attend(workspace *w, const pk_attention_args *a, size_t i, size_t from, size_t n) {
    const uint8_t *row = (const uint8_t *)a->q + i / a->group * a->q_token + i % a->group * a->q_head;
    const float *q = (const float *)(const void *)row;
    float s[KEYS], sum[HEAD] = {0.0f}, largest = w->largest[i], total = 0.0f;
    for (size_t j = 0; j < n; j++) {
        s[j] = a->scale * dot(q, w->k[j], a->head) + mask_at(a, i / a->group, from + j);
        if (s[j] > largest) largest = s[j];
    }
    const float base = largest == -INFINITY ? 0.0f : largest;  // -infinity less itself would be NaN
    for (size_t j = 0; j < n; j++) {
        const float p = expf(s[j] - base);
        total += p;
        for (size_t d = 0; d < a->head; d++) sum[d] += p * w->v[j][d];
    }
    const float factor = expf(w->largest[i] - base);
    w->largest[i] = largest;
    w->total[i] = w->total[i] * factor + total;
    for (size_t d = 0; d < a->head; d++) w->sum[i][d] = w->sum[i][d] * factor + sum[d];
}

static void finish(const workspace *w, const pk_attention_args *a, size_t i) {
    uint8_t *to = (uint8_t *)a->out + i / a->group * a->out_token + i % a->group * a->out_head;
    float *out = (float *)(void *)to;
    float divisor = w->total[i] == 0.0f ? 1.0f : w->total[i];  // no key: the sums are zeros
    if (a->state) {
        a->state[2 * i] = w->largest[i];
        a->state[2 * i + 1] = w->total[i];
        divisor = 1.0f;
    }
    for (size_t d = 0; d < a->head; d++) out[d] = w->sum[i][d] / divisor;
}

void pk_attention_many_c(const pk_attention_args *a) {
    workspace *w = (workspace *)(void *)a->scratch;
    const size_t rows = a->tokens * a->group;
    memset(w->sum, 0, rows * sizeof w->sum[0]);
    for (size_t i = 0; i < rows; i++) {
        w->largest[i] = -INFINITY;
        w->total[i] = 0.0f;
    }
    for (size_t from = 0; from < a->keys; from += KEYS) {
        size_t n = a->keys - from < KEYS ? a->keys - from : KEYS;
        while (n && a->mask && !seen(a, from + n - 1)) n--;
        for (size_t j = 0; j < n; j++) {
            load_row(w->k[j], a->k + (from + j) * a->k_row, a->k_type, a->head);
            load_row(w->v[j], a->v + (from + j) * a->v_row, a->v_type, a->head);
        }
        for (size_t i = 0; n && i < rows; i++) attend(w, a, i, from, n);
    }
    for (size_t i = 0; i < rows; i++) finish(w, a, i);
}

void pk_attention_one_c(const pk_attention_args *a) { pk_attention_many_c(a); }
