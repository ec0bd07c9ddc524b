// SPDX-License-Identifier: Apache-2.0
// plan.c - turns a graph's nodes into steps, several nodes into one where a pattern is known.
//
// The patterns, each only when nothing else in the graph reads what it leaves out:
//   W x;  A x;  B (A x);  * s;  +   a linear layer with its LoRA, added onto W x while that is in the cache
//   linear;  + residual             likewise
//   linear;  SwiGLU                 gate and up of the same rows side by side, their halves never written
//   RMS norm;  * weight             and, with many tokens, the packing for the linear layer that follows
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "plugin.h"

enum { ROW_UNITS_A_THREAD = 4 };

// How many nodes read `t`, as ggml counted when it built the graph. The graph here may be one backend's part
// of it, and the count is of the whole: what another backend reads has to be written.
static int32_t times_read(const ggml_graph *graph, const ggml_tensor *t) {
    const ggml_graph_nodes *all = &graph->visited;
    for (size_t tried = 0, i = (uintptr_t)t >> 4; tried < all->size; tried++, i++) {
        const size_t at = i % all->size;
        if (!(all->used[at / 32] >> at % 32 & 1)) break;
        if (all->keys[at] == t) return graph->use_counts[at];
    }
    return INT32_MAX;  // not known
}

// Whether `t` is read by the node after it in a pattern and by nobody else.
static bool only_link(const ggml_graph *graph, const ggml_tensor *t) {
    return times_read(graph, t) == 1 && !(t->flags & GGML_TENSOR_FLAG_OUTPUT);
}

// ---- walking the nodes that compute ----

typedef struct {
    ggml_graph *graph;
    int next, n;
} cursor;

// A batch whose logits nobody asked for ends in nodes without rows.
static bool is_work(const ggml_tensor *node) {
    return !pk_is_view(node->op) && (node->flags & GGML_TENSOR_FLAG_COMPUTE) && node->ne[0] && pk_rows(node);
}

static const ggml_tensor *peek(cursor *c) {
    for (; c->next < c->n; c->next++) {
        const ggml_tensor *node = pk_host.graph_node(c->graph, c->next);
        if (is_work(node)) return node;
    }
    return NULL;
}

static const ggml_tensor *take(cursor *c) {
    const ggml_tensor *node = peek(c);
    if (node) c->next++;
    return node;
}

static bool is(const ggml_tensor *node, int op) { return node && node->op == op; }

// After W x: A x, B (A x), their scale and the sum. Leaves the cursor behind them, or where it was.
static void with_lora(cursor *c, pk_linear_pattern *p) {
    enum { SCALE = 0, BIAS = 1 };
    cursor ahead = *c;
    const ggml_tensor *a = take(&ahead), *b = take(&ahead), *scaled = take(&ahead), *sum = take(&ahead);
    if (!is(a, GGML_OP_MUL_MAT) || !is(b, GGML_OP_MUL_MAT) || !is(scaled, GGML_OP_SCALE) ||
        !is(sum, GGML_OP_ADD))
        return;
    if (a->src[1] != p->mm->src[1] || b->src[1] != a || scaled->src[0] != b || scaled->op_params[BIAS] != 0)
        return;
    if (sum->src[0] != p->mm || sum->src[1] != scaled || !pk_same_shape(sum, p->mm)) return;
    if (!only_link(c->graph, p->mm) || !only_link(c->graph, a) || !only_link(c->graph, b) ||
        !only_link(c->graph, scaled))
        return;
    p->a = a;
    p->b = b;
    p->out = sum;
    p->scale = pk_param(scaled, SCALE);
    *c = ahead;
}

static void with_next(cursor *c, pk_linear_pattern *p) {
    const ggml_tensor *next = peek(c);
    if (!next || !only_link(c->graph, p->out)) return;
    if (next->op == GGML_OP_GLU && next->src[0] == p->out && !next->src[1] && next->op_params[1] == 0 &&
        next->ne[0] % PK_PANEL_ROWS == 0) {
        p->swiglu = true;
    } else if (next->op == GGML_OP_ADD && pk_same_shape(next->src[0], next->src[1]) &&
               (next->src[0] == p->out || next->src[1] == p->out)) {
        const ggml_tensor *other = next->src[0] == p->out ? next->src[1] : next->src[0];
        const size_t *dense = p->out->nb;
        if (other == p->out || memcmp(other->nb, dense, sizeof other->nb) ||
            memcmp(next->nb, dense, sizeof next->nb))
            return;
        p->residual = other;
    } else {
        return;
    }
    p->out = next;
    (void)take(c);
}

static bool plan_node(pk_backend *backend, cursor *c) {
    const ggml_tensor *node = take(c);
    switch (node->op) {
        case GGML_OP_MUL_MAT: {
            pk_linear_pattern pattern = {.mm = node, .out = node};
            with_lora(c, &pattern);
            with_next(c, &pattern);
            return pk_plan_linear(backend, &pattern);
        }
        case GGML_OP_RMS_NORM: {
            const ggml_tensor *next = peek(c);
            if (!is(next, GGML_OP_MUL) || next->src[0] != node || !only_link(c->graph, node) ||
                pk_rows(next->src[1]) != 1) {
                return pk_plan_rows(backend, node, NULL);
            }
            return pk_plan_rows(backend, take(c), node);
        }
        case GGML_OP_ROPE: return pk_plan_rope(backend, node);
        case GGML_OP_FLASH_ATTN_EXT: return pk_plan_attention(backend, node);
        default: return pk_plan_rows(backend, node, NULL);
    }
}

bool pk_plan(pk_backend *backend, ggml_graph *graph) {
    cursor c = {.graph = graph, .n = pk_host.graph_n_nodes(graph)};
    backend->n_steps = 0;
    backend->rope_node = NULL;
    backend->scratch_bytes = 0;
    memset(backend->packed, 0, sizeof backend->packed);
    memset(backend->slot_needs, 0, sizeof backend->slot_needs);
    while (peek(&c)) {
        if (!plan_node(backend, &c)) return false;
    }
    atomic_fetch_add(&pk_count.nodes, (uint_fast64_t)c.n);
    return true;
}

pk_step *pk_add_step(pk_backend *backend, pk_unit_fn unit, size_t units, const ggml_tensor *node) {
    if (backend->n_steps == backend->room) {
        const size_t room = backend->room ? 2 * backend->room : 256;
        pk_step *steps = realloc(backend->steps, room * sizeof *steps);
        if (!steps) return NULL;
        backend->steps = steps;
        backend->room = room;
    }
    pk_step *step = &backend->steps[backend->n_steps++];
    memset(step, 0, sizeof *step);
    step->unit = unit;
    step->units = units;
    step->node = node;
    atomic_init(&step->next, 0);
    atomic_init(&step->done, 0);
    return step;
}

pk_step *pk_add_rows_step(pk_backend *backend, pk_unit_fn unit, size_t rows, const ggml_tensor *node) {
    const size_t per_unit = pk_divide_up(rows, (size_t)backend->n_threads * ROW_UNITS_A_THREAD);
    pk_step *step = pk_add_step(backend, unit, rows ? pk_divide_up(rows, per_unit) : 0, node);
    if (!step) return NULL;
    step->rows.all = rows;
    step->rows.per_unit = per_unit;
    return step;
}

void pk_need(pk_backend *backend, pk_slot slot, size_t bytes) {
    if (backend->slot_needs[slot] < bytes) backend->slot_needs[slot] = bytes;
}

void pk_need_scratch(pk_backend *backend, size_t bytes) {
    if (backend->scratch_bytes < bytes) backend->scratch_bytes = bytes;
}
