// SPDX-License-Identifier: Apache-2.0
// capi_attention.c - checked entry point of attention: dense arrays, all heads, many tokens and keys.
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "attention/attention.h"
#include "pk.h"
#include "pk_cpu.h"

typedef struct {
    size_t tokens, heads, kv_heads, keys, head;
    pk_kv k_type, v_type;
    size_t k_head, v_head;  // bytes of one key, one value, of one head
} dense;

static const pk_attention_variant *named(const char *name) {
    if (!name) return pk_attention_best();
    const pk_attention_variant *row;
    for (size_t at = 0; (row = pk_attention_at(at)) != NULL; at++) {
        if (!strcmp(row->name, name)) return pk_cpu_has(row->needs) ? row : NULL;
    }
    return NULL;
}

// ggml's number; the bytes of `head` numbers.
static bool find_type(int type, pk_kv *kv, size_t head, size_t *bytes) {
    *kv = type == 8 ? PK_KV_Q8_0 : PK_KV_F16;
    *bytes = type == 8 ? head / 32 * 34 : 2 * head;
    return type == 1 || type == 8;
}

static bool shape_is_usable(const dense *s) {
    const size_t most = (size_t)1 << 20;  // the products below fit 64 bits
    if (!s->tokens || !s->heads || !s->kv_heads || !s->keys || !s->head) return false;
    if (s->tokens > most || s->heads > 1024 || s->keys > most) return false;
    if (s->head > PK_ATTENTION_MAX_HEAD || s->head % 32) return false;
    return s->heads % s->kv_heads == 0 && s->heads / s->kv_heads <= PK_ATTENTION_QUERIES;
}

static bool overlap(const void *a, size_t bytes_a, const void *b, size_t bytes_b) {
    const uintptr_t from_a = (uintptr_t)a, from_b = (uintptr_t)b;
    return b && from_a < from_b + bytes_b && from_b < from_a + bytes_a;
}

// What a call needs beside its arguments, in one allocation.
typedef struct {
    uint8_t *memory, *scratch;  // scratch on 64 bytes
    float *merged, *results, *states;  // [queries][head], and of each part [queries][head] and [queries][2]
} work;

static bool get_work(work *w, size_t parts) {
    const size_t n = PK_ATTENTION_QUERIES * PK_ATTENTION_MAX_HEAD, scratch = pk_attention_scratch_bytes();
    w->memory = malloc(63 + scratch + ((parts + 1) * n + parts * 2 * PK_ATTENTION_QUERIES) * sizeof(float));
    if (!w->memory) return false;
    w->scratch = w->memory + (64 - (uintptr_t)w->memory % 64) % 64;
    w->merged = (float *)(void *)(w->scratch + scratch);  // the scratch is a multiple of 64 bytes
    w->results = w->merged + n;
    w->states = w->results + parts * n;
    return true;
}

// One call of the kernel, or one for each of the parts and a merge.
static void attend(const pk_attention_variant *variant, const pk_attention_args *whole, size_t parts,
                   const work *w) {
    const pk_attention_fn fn = whole->tokens == 1 ? variant->one : variant->many;
    if (parts == 1) {
        fn(whole);
        return;
    }
    const size_t queries = whole->tokens * whole->group, row = whole->head * sizeof(float);
    for (size_t p = 0; p < parts; p++) {
        const size_t from = whole->keys * p / parts, to = whole->keys * (p + 1) / parts;
        pk_attention_args part = *whole;
        part.k += from * part.k_row;
        part.v += from * part.v_row;
        if (part.mask) part.mask += 2 * from;
        part.keys = to - from;
        part.out = w->results + p * queries * part.head;
        part.out_head = row;
        part.out_token = part.group * row;
        part.state = w->states + p * queries * 2;
        fn(&part);
    }
    pk_attention_merge(w->merged, row, w->results, w->states, parts, queries, whole->head);
    for (size_t t = 0; t < whole->tokens; t++) {
        uint8_t *to = (uint8_t *)whole->out + t * whole->out_token;
        memcpy(to, w->merged + t * whole->group * whole->head, whole->group * row);
    }
}

static void attend_all(const pk_attention_variant *variant, const dense *s, const pk_attention_args *first,
                       size_t parts, const work *w) {
    const size_t group = s->heads / s->kv_heads, most = PK_ATTENTION_QUERIES / group;
    for (size_t kv_head = 0; kv_head < s->kv_heads; kv_head++) {
        for (size_t token = 0; token < s->tokens; token += most) {
            const size_t at = (token * s->heads + kv_head * group) * s->head;
            pk_attention_args args = *first;
            args.q += at;
            args.out += at;
            args.k += kv_head * s->k_head;
            args.v += kv_head * s->v_head;
            if (args.mask) args.mask += token * args.mask_token;
            args.tokens = s->tokens - token < most ? s->tokens - token : most;
            attend(variant, &args, parts, w);
        }
    }
}

int pk_attention(float *out, size_t n_out, const float *q, const void *k, size_t n_k, const void *v,
                 size_t n_v, const uint16_t *mask, const size_t shape[5], int k_type, int v_type, float scale,
                 size_t parts, const char *variant) {
    if (!out || !q || !k || !v || !shape) return PK_ERR_NULL;
    if (!pk_cpu_mask_is_valid()) return PK_ERR_MASK;
    const pk_attention_variant *row = named(variant);
    if (!row) return PK_ERR_VARIANT;
    dense s = {.tokens = shape[0], .heads = shape[1], .kv_heads = shape[2]};
    s.keys = shape[3];
    s.head = shape[4];
    if (!shape_is_usable(&s) || parts == 0 || parts > s.keys || parts > 64) return PK_ERR_SIZE;
    if (!find_type(k_type, &s.k_type, s.head, &s.k_head)) return PK_ERR_TYPE;
    if (!find_type(v_type, &s.v_type, s.head, &s.v_head)) return PK_ERR_TYPE;
    const size_t k_row = s.kv_heads * s.k_head, v_row = s.kv_heads * s.v_head;
    const size_t head_bytes = s.head * sizeof(float), bytes = s.tokens * s.heads * head_bytes;
    if (n_out != bytes / sizeof(float) || n_k != s.keys * k_row || n_v != s.keys * v_row) return PK_ERR_SIZE;
    if (overlap(out, bytes, q, bytes) || overlap(out, bytes, k, n_k) || overlap(out, bytes, v, n_v)) {
        return PK_ERR_OVERLAP;
    }
    if (overlap(out, bytes, mask, s.tokens * s.keys * sizeof *mask)) return PK_ERR_OVERLAP;
    work w;
    if (!get_work(&w, parts)) return PK_ERR_MEMORY;
    const pk_attention_args first = {
        .q = q, .q_token = s.heads * head_bytes, .q_head = head_bytes,
        .k = k, .v = v, .k_row = k_row, .v_row = v_row, .k_type = s.k_type, .v_type = s.v_type,
        .mask = (const uint8_t *)mask, .mask_token = s.keys * sizeof *mask,
        .out = out, .out_token = s.heads * head_bytes, .out_head = head_bytes,
        .group = s.heads / s.kv_heads, .keys = s.keys, .head = s.head, .scale = scale, .scratch = w.scratch};
    attend_all(row, &s, &first, parts, &w);
    free(w.memory);
    return PK_OK;
}
