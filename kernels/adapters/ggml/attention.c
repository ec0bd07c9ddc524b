// SPDX-License-Identifier: Apache-2.0
// attention.c - the steps of attention: one unit is a key-value head and some tokens, or, for one token over
// a long context, a part of the keys with all heads, put together in a step of its own.
#include "plugin.h"

enum {
    PART_KEYS =
        256,  // of a unit: long enough to read, short enough that threads share a context of 1,000 fairly
    WORTH_PARTS =
        1024,  // keys from which on the memory's order counts: one head alone reads 256 bytes of every row
};

typedef struct {
    size_t tokens, heads, kv_heads, group, keys, head;
} shape;

static shape shape_of(const ggml_tensor *node) {
    const ggml_tensor *q = node->src[0], *k = node->src[1];
    return (shape){.tokens = (size_t)q->ne[1],
                   .heads = (size_t)q->ne[2],
                   .kv_heads = (size_t)k->ne[2],
                   .group = (size_t)(q->ne[2] / k->ne[2]),
                   .keys = (size_t)k->ne[1],
                   .head = (size_t)q->ne[0]};
}

static pk_kv kv_type(const ggml_tensor *t) { return t->type == GGML_TYPE_Q8_0 ? PK_KV_Q8_0 : PK_KV_F16; }

// The arguments of one call: `tokens` tokens from `token` on, of key-value head kv, over all keys.
static pk_attention_args args_of(const ggml_tensor *node, size_t kv, size_t token, size_t tokens,
                                 uint8_t *scratch) {
    const ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3];
    const shape s = shape_of(node);
    const pk_attention_args args = {
        .q = (const float *)(const void *)((const uint8_t *)q->data + token * q->nb[1] +
                                           kv * s.group * q->nb[2]),
        .q_token = q->nb[1],
        .q_head = q->nb[2],
        .k = (const uint8_t *)k->data + kv * k->nb[2],
        .v = (const uint8_t *)v->data + kv * v->nb[2],
        .k_row = k->nb[1],
        .v_row = v->nb[1],
        .k_type = kv_type(k),
        .v_type = kv_type(v),
        .mask = mask ? (const uint8_t *)mask->data + token * mask->nb[1] : NULL,
        .mask_token = mask ? mask->nb[1] : 0,
        .out = (float *)(void *)((uint8_t *)node->data + kv * s.group * node->nb[1] + token * node->nb[2]),
        .out_token = node->nb[2],
        .out_head = node->nb[1],
        .tokens = tokens,
        .group = s.group,
        .keys = s.keys,
        .head = s.head,
        .scale = pk_param(node, 0),
        .scratch = scratch,
    };
    return args;
}

// The last tokens see the most keys: they go first, so that no thread is left with them at the end.
static void many_unit(const pk_backend *backend, const pk_step *step, size_t unit, uint8_t *scratch) {
    (void)backend;
    const shape s = shape_of(step->node);
    const size_t blocks = pk_divide_up(s.tokens, step->attention.tokens), block = blocks - 1 - unit / s.kv_heads;
    const size_t token = block * step->attention.tokens, left = s.tokens - token;
    const size_t tokens = left < step->attention.tokens ? left : step->attention.tokens;
    const pk_attention_args args = args_of(step->node, unit % s.kv_heads, token, tokens, scratch);
    (tokens == 1 ? pk_use.attention->one : pk_use.attention->many)(&args);
}

// Results [parts][group][head] of each key-value head, then all states [parts][group][2].
static float *part_out(const pk_backend *backend, const pk_step *step, const shape *s, size_t kv,
                       size_t part) {
    return (float *)(void *)backend->slots[PK_SLOT_PARTS] +
           (kv * step->attention.parts + part) * s->group * s->head;
}

static float *part_state(const pk_backend *backend, const pk_step *step, const shape *s, size_t kv,
                         size_t part) {
    float *states =
        (float *)(void *)backend->slots[PK_SLOT_PARTS] + s->heads * step->attention.parts * s->head;
    return states + (kv * step->attention.parts + part) * s->group * 2;
}

static void part_unit(const pk_backend *backend, const pk_step *step, size_t part, uint8_t *scratch) {
    const shape s = shape_of(step->node);
    const size_t first = part * PART_KEYS, left = s.keys - first;
    for (size_t kv = 0; kv < s.kv_heads; kv++) {
        pk_attention_args args = args_of(step->node, kv, 0, 1, scratch);
        args.k += first * args.k_row;
        args.v += first * args.v_row;
        if (args.mask) args.mask += first * 2;
        args.keys = left < PART_KEYS ? left : PART_KEYS;
        args.out = part_out(backend, step, &s, kv, part);
        args.out_head = s.head * sizeof(float);
        args.state = part_state(backend, step, &s, kv, part);
        pk_use.attention->one(&args);
    }
}

static void merge_unit(const pk_backend *backend, const pk_step *step, size_t kv, uint8_t *scratch) {
    (void)scratch;
    const shape s = shape_of(step->node);
    float *out = (float *)(void *)((uint8_t *)step->node->data + kv * s.group * step->node->nb[1]);
    pk_attention_merge(out, step->node->nb[1], part_out(backend, step, &s, kv, 0),
                       part_state(backend, step, &s, kv, 0), step->attention.parts, s.group, s.head);
}

static bool plan_parts(pk_backend *backend, const ggml_tensor *node, const shape *s) {
    const size_t parts = pk_divide_up(s->keys, PART_KEYS);
    pk_need(backend, PK_SLOT_PARTS, s->heads * parts * (s->head + 2) * sizeof(float));
    pk_step *step = pk_add_step(backend, part_unit, parts, node);
    if (!step) return false;
    step->attention.parts = parts;
    step = pk_add_step(backend, merge_unit, s->kv_heads, node);
    if (!step) return false;
    step->attention.parts = parts;
    return true;
}

bool pk_plan_attention(pk_backend *backend, const ggml_tensor *node) {
    const shape s = shape_of(node);
    atomic_fetch_add(&pk_count.attentions, 1);
    pk_need_scratch(backend, pk_attention_scratch_bytes());
    if (s.tokens == 1 && s.keys >= WORTH_PARTS) return plan_parts(backend, node, &s);
    const size_t tokens = PK_ATTENTION_QUERIES / s.group;
    pk_step *step = pk_add_step(backend, many_unit, pk_divide_up(s.tokens, tokens) * s.kv_heads, node);
    if (step) step->attention.tokens = tokens;
    return step != NULL;
}
