// SPDX-License-Identifier: Apache-2.0
// linear.c - the steps of a matrix multiplication: pack the activations, then W x with what is fused to it.
//
// A unit of the second step is some tokens times some panels of W: tokens enough to use a panel many times,
// few enough that their packed activations stay in a core's second-level cache. A LoRA, a residual and SwiGLU
// are done per unit, while its results are still there.
#include "plugin.h"

enum {
    X_BYTES = 600 << 10,      // packed activations of a unit: over half of a 1 MB L2
    CHUNK_BYTES = 1024 << 10,  // weights of a unit when there are few tokens: a long sequential read
    CHUNK_PANELS = 4,         // and when there are many
    UNITS_A_THREAD = 8,       // at least, so that a slow thread is not waited for long
    PACK_BLOCKS = 16,         // blocks of 32 columns in a unit of the first step
};

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

// ---- packing activations ----

static void pack_unit(const pk_backend *backend, const pk_step *step, size_t unit, uint8_t *scratch) {
    (void)scratch;
    const pk_packing *p = &step->packing;
    const size_t columns = (size_t)p->x->ne[0], token = unit / p->chunks * PK_TILE_TOKENS;
    const size_t first = unit % p->chunks * PACK_BLOCKS;
    const pk_weight kind = p->shared ? PK_W_Q8_0 : PK_W_F32;
    const pk_activations_args args = {
        .tile = backend->slots[p->slot] + unit / p->chunks * pk_tile_bytes(kind, columns, PK_TILE_TOKENS),
        .x = (const float *)p->x->data + token * columns,
        .x_stride = columns,
        .tokens = least(PK_TILE_TOKENS, p->tokens - token),
        .columns = columns,
        .first = first,
        .last = least(first + PACK_BLOCKS, pk_divide_up(columns, PK_X_BLOCK)),
        .shared = p->shared,
    };
    (p->shared ? pk_use.activations->quantize : pk_use.activations->arrange)(&args);
}

// The rows of a tile, which a norm has yet to compute, and their packing while they are in the cache.
static void norm_unit(const pk_backend *backend, const pk_step *step, size_t unit, uint8_t *scratch) {
    const pk_packing *p = &step->packing;
    const size_t first = unit * PK_TILE_TOKENS, left = p->tokens - first;
    for (size_t i = 0; i < least(PK_TILE_TOKENS, left); i++) pk_norm_row(step->node, step->norm, first + i);
    for (size_t i = 0; i < p->chunks; i++) pack_unit(backend, step, unit * p->chunks + i, scratch);
}

// The step that computes x, if that is the last one, a norm, and there are tiles for all threads.
static pk_step *norm_before(const pk_backend *backend, const ggml_tensor *x, size_t tiles) {
    pk_step *last = backend->n_steps ? &backend->steps[backend->n_steps - 1] : NULL;
    const bool is_it = last && last->node == x && last->norm && last->unit != norm_unit;
    return is_it && tiles >= (size_t)backend->n_threads ? last : NULL;
}

// How many blocks of x share a scale for this weight; 0: it wants x as floats.
static size_t shared_for(const ggml_tensor *w) {
    pk_weight weight = PK_W_F32;
    (void)pk_weight_of(w->type, &weight);
    return PK_IS_FLOAT(weight) ? 0 : PK_SHARED_BLOCKS(weight, (size_t)w->ne[0]);
}

// x packed in `slot`, unless it is there already.
static bool pack(pk_backend *backend, const ggml_tensor *x, size_t shared, pk_slot slot) {
    if (backend->packed[slot] == x && backend->packed_shared[slot] == shared) return true;
    backend->packed[slot] = x;
    backend->packed_shared[slot] = shared;
    const size_t tokens = pk_rows(x), columns = (size_t)x->ne[0];
    const size_t tiles = pk_divide_up(tokens, PK_TILE_TOKENS),
                 chunks = pk_divide_up(pk_divide_up(columns, PK_X_BLOCK), PACK_BLOCKS);
    pk_need(backend, slot, tiles * pk_tile_bytes(shared ? PK_W_Q8_0 : PK_W_F32, columns, PK_TILE_TOKENS));
    pk_step *step = norm_before(backend, x, tiles);
    if (step) {
        step->unit = norm_unit;
        step->units = tiles;
    } else if (!(step = pk_add_step(backend, pack_unit, tiles * chunks, x))) {
        return false;
    }
    step->packing = (pk_packing){.x = x, .slot = slot, .shared = shared, .tokens = tokens, .chunks = chunks};
    return true;
}

// ---- multiplying ----

typedef struct {
    const pk_backend *backend;
    const pk_linear *linear;
    size_t token, tokens;  // of this unit
} place;

// Rows [row, row + rows) of one weight, for the unit's tokens.
static void multiply(const place *at, const ggml_tensor *w, pk_slot x, float *out, size_t out_stride,
                     size_t row, size_t rows, bool add) {
    pk_weight weight;
    if (!pk_weight_of(w->type, &weight)) return;
    const size_t columns = (size_t)w->ne[0];
    const pk_matmul_args args = {
        .out = out,
        .out_stride = out_stride,
        .w = (const uint8_t *)w->data + row / PK_PANEL_ROWS * pk_panel_bytes(weight, columns),
        .x = at->backend->slots[x] +
             at->token / PK_TILE_TOKENS * pk_tile_bytes(weight, columns, PK_TILE_TOKENS),
        .rows = rows,
        .tokens = at->tokens,
        .columns = columns,
        .add = add,
        .scale = at->linear->scale,
    };
    pk_use.matmul[weight](&args);
}

static void with_lora(const place *at, float *out, size_t out_stride, size_t row, size_t rows) {
    const pk_linear *l = at->linear;
    multiply(at, l->w, l->x, out, out_stride, row, rows, false);
    if (l->b) multiply(at, l->b, l->mid, out, out_stride, row, rows, true);
}

static void linear_unit(const pk_backend *backend, const pk_step *step, size_t unit, uint8_t *scratch) {
    const pk_linear *l = &step->linear;
    const size_t token = unit / l->chunks * l->block_tokens,
                 row = unit % l->chunks * l->chunk_panels * PK_PANEL_ROWS;
    const size_t rows = least(l->chunk_panels * PK_PANEL_ROWS, l->rows - row);
    const place at = {
        .backend = backend, .linear = l, .token = token, .tokens = least(l->block_tokens, l->tokens - token)};
    float *out = l->out + token * l->out_stride + row;
    if (l->swiglu) {
        float *gate = (float *)(void *)scratch, *up = gate + at.tokens * rows;
        with_lora(&at, gate, rows, row, rows);
        with_lora(&at, up, rows, l->rows + row, rows);
        for (size_t t = 0; t < at.tokens; t++) {
            pk_use.vector->swiglu(out + t * l->out_stride, gate + t * rows, up + t * rows, rows);
        }
        return;
    }
    if (!l->residual) {
        with_lora(&at, out, l->out_stride, row, rows);
        return;
    }
    // The result may lie where the residual does: it is read before it is overwritten.
    float *result = (float *)(void *)scratch;
    with_lora(&at, result, rows, row, rows);
    const float *residual = (const float *)l->residual->data + token * l->out_stride + row;
    for (size_t t = 0; t < at.tokens; t++) {
        pk_use.vector->add(out + t * l->out_stride, result + t * rows, residual + t * l->out_stride, rows);
    }
}

// ---- planning ----

// Few tokens: the weights are read once, in long pieces. Many: blocks of tokens that fit the cache, short
// pieces.
static void share_out(const pk_backend *backend, pk_linear *l) {
    pk_weight weight = PK_W_F32;
    (void)pk_weight_of(l->w->type, &weight);
    const size_t columns = (size_t)l->w->ne[0], panel = pk_panel_bytes(weight, columns);
    const size_t panels = pk_divide_up(l->rows, PK_PANEL_ROWS), threads = (size_t)backend->n_threads;
    const size_t tile = pk_tile_bytes(weight, columns, PK_TILE_TOKENS);
    const size_t tiles = X_BYTES / tile ? X_BYTES / tile : 1;
    l->block_tokens = least(tiles * PK_TILE_TOKENS, pk_divide_up(l->tokens, PK_TILE_TOKENS) * PK_TILE_TOKENS);
    const size_t blocks = pk_divide_up(l->tokens, l->block_tokens);
    size_t most = l->tokens > PK_TILE_TOKENS ? CHUNK_PANELS : CHUNK_BYTES / panel;
    const size_t fair = panels * blocks / (threads * UNITS_A_THREAD);
    most = least(most, fair);
    l->chunk_panels = most ? most : 1;
    l->chunks = pk_divide_up(panels, l->chunk_panels);
}

static bool add_linear(pk_backend *backend, const pk_linear *linear, const ggml_tensor *node) {
    pk_linear l = *linear;
    share_out(backend, &l);
    pk_step *step = pk_add_step(backend, linear_unit, pk_divide_up(l.tokens, l.block_tokens) * l.chunks, node);
    if (!step) return false;
    step->linear = l;
    const size_t unit_floats = least(l.block_tokens, l.tokens) * l.chunk_panels * PK_PANEL_ROWS;
    if (l.swiglu || l.residual) pk_need_scratch(backend, unit_floats * sizeof(float) * (l.swiglu ? 2 : 1));
    atomic_fetch_add(&pk_count.matmuls, 1);
    atomic_fetch_add(&pk_count.matmul_tokens, l.tokens);
    return true;
}

bool pk_plan_linear(pk_backend *backend, const pk_linear_pattern *p) {
    const ggml_tensor *w = p->mm->src[0], *x = p->mm->src[1];
    const size_t shared = shared_for(w);
    if (!pack(backend, x, shared, PK_SLOT_X)) return false;
    pk_linear l = {.w = w, .x = PK_SLOT_X, .tokens = pk_rows(x), .scale = p->scale};
    if (p->a) {
        const ggml_tensor *a = p->a->src[0], *b = p->b->src[0];
        size_t a_shared = shared_for(a);
        if (a_shared == 1 && shared)
            a_shared = shared;  // Q8_0 reads a scale for each block: the base's x will do
        const pk_slot slot = a_shared == shared ? PK_SLOT_X : PK_SLOT_X2;
        if (!pack(backend, x, a_shared, slot)) return false;
        const size_t rank = (size_t)a->ne[1];
        const pk_linear half = {
            .w = a, .x = slot, .out = p->a->data, .out_stride = rank, .rows = rank, .tokens = l.tokens};
        if (!add_linear(backend, &half, p->a) || !pack(backend, p->a, shared_for(b), PK_SLOT_MID))
            return false;
        l.b = b;
        l.mid = PK_SLOT_MID;
    }
    l.residual = p->residual;
    l.swiglu = p->swiglu;
    l.out = p->out->data;
    l.out_stride = l.rows = (size_t)p->out->ne[0];
    return add_linear(backend, &l, p->out);
}
