// SPDX-License-Identifier: Apache-2.0
// plugin.h - what the files of the plug-in share: the kernels chosen, the backend, a step of a graph.
//
//   plugin.c    registry, device, backend: what the host calls
//   buffer.c    memory: weights are packed as they are set
//   supports.c  which operations we take
//   plan.c      a graph's nodes -> steps, fused where the pattern is known
//   run.c       steps -> threads
//   linear.c, attention.c, rows.c, rope.c   one step of each kind
#ifndef PK_GGML_PLUGIN_H
#define PK_GGML_PLUGIN_H

#include <stdatomic.h>
#include <string.h>

#include "abi.h"
#include "attention/attention.h"
#include "matmul/activations.h"
#include "matmul/matmul.h"
#include "matmul/pack.h"
#include "threads.h"
#include "vector/vector.h"

// The fastest variants this CPU can run, chosen when the plug-in is loaded.
typedef struct {
    pk_matmul_fn matmul[PK_W_TYPES];
    const pk_activations_variant *activations;
    const pk_attention_variant *attention;
    const pk_vector_variant *vector;
} pk_kernels;

extern pk_kernels pk_use;  // set once, before any call of the host's
extern ggml_host pk_host;

// Totals since the plug-in was loaded: so that a test, or a user, sees that work came here.
typedef struct {
    atomic_uint_fast64_t graphs, nodes, matmuls, matmul_tokens, attentions, packed_bytes, threads;
} pk_counts;
extern pk_counts pk_count;

static inline size_t pk_divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

// The i-th of an operation's parameters, where it is a number.
static inline float pk_param(const ggml_tensor *op, size_t i) {
    float value;
    memcpy(&value, &op->op_params[i], sizeof value);
    return value;
}

// ---- buffer.c ----
ggml_buffer_type *pk_buffer_type(void);
bool pk_weight_of(int ggml_type, pk_weight *weight);  // false: a type we do not multiply
bool pk_is_packed(const ggml_tensor *tensor);

// ---- supports.c ----
bool pk_supports(const ggml_tensor *op);
bool pk_is_view(int op);                        // operations that compute nothing
size_t pk_rows(const ggml_tensor *tensor);      // of ne[0] elements
bool pk_same_shape(const ggml_tensor *a, const ggml_tensor *b);

// ---- steps ----

// Memory that a graph's steps share, grown to the largest need before they run.
typedef enum {
    PK_SLOT_X,      // the last packed activations
    PK_SLOT_X2,     // the same in the other packing, when a LoRA's type asks for it
    PK_SLOT_MID,    // a LoRA's A x, packed
    PK_SLOT_ROPE,   // cosines and sines
    PK_SLOT_PARTS,  // attention's partial results
    PK_SLOTS
} pk_slot;

typedef struct pk_backend pk_backend;
typedef struct pk_step pk_step;

// Does one unit of a step. Units are independent: threads take the next one left. scratch: this thread's own.
typedef void (*pk_unit_fn)(const pk_backend *backend, const pk_step *step, size_t unit, uint8_t *scratch);

// W x [+ scale * B m] [+ residual], or the SwiGLU of its two halves.
typedef struct {
    const ggml_tensor *w, *b, *residual;  // b, residual: NULL when there is none
    pk_slot x, mid;
    float scale;
    float *out;
    size_t out_stride, rows, tokens;      // rows of the result: half of W's for SwiGLU
    size_t block_tokens, chunk_panels, chunks;
    bool swiglu;
} pk_linear;

typedef struct {
    const ggml_tensor *x;
    pk_slot slot;
    size_t shared;                        // blocks that share a scale; 0: floats, arranged
    size_t tokens, chunks;
} pk_packing;

struct pk_step {
    pk_unit_fn unit;
    size_t units;
    const ggml_tensor *node;              // whose result is written
    const ggml_tensor *norm;              // a norm fused with the product that is `node`: pk_norm_row
    union {
        pk_linear linear;
        pk_packing packing;
        struct {
            size_t all, per_unit;         // rows of the step, of a unit
        } rows;
        struct {
            size_t parts, tokens;         // of one token; of a unit
        } attention;
    };
    atomic_size_t next, done;             // units taken, units finished
};

struct pk_backend {
    pk_threads *threads;
    int n_threads;
    bool (*abort)(void *);
    void *abort_context;

    pk_step *steps;
    size_t n_steps, room;
    uint8_t *slots[PK_SLOTS];
    size_t slot_bytes[PK_SLOTS], slot_needs[PK_SLOTS];
    uint8_t *scratch;
    size_t scratch_bytes, scratch_room;   // of one thread; of all

    // what the slots hold while a graph is planned
    const ggml_tensor *packed[PK_SLOTS], *rope_node;
    size_t packed_shared[PK_SLOTS];
};

// NULL: no memory. A step of rows is shared out into units here.
pk_step *pk_add_step(pk_backend *backend, pk_unit_fn unit, size_t units, const ggml_tensor *node);
pk_step *pk_add_rows_step(pk_backend *backend, pk_unit_fn unit, size_t rows, const ggml_tensor *node);
// Where a unit's rows end; they start at unit * per_unit.
static inline size_t pk_last_row(const pk_step *step, size_t unit) {
    const size_t last = (unit + 1) * step->rows.per_unit;
    return last < step->rows.all ? last : step->rows.all;
}

// Computes row i of `node`: the norm of another node, times its weight, or (both the same) a norm alone.
void pk_norm_row(const ggml_tensor *node, const ggml_tensor *norm, size_t i);

void pk_need(pk_backend *backend, pk_slot slot, size_t bytes);
void pk_need_scratch(pk_backend *backend, size_t bytes);

// Each adds the steps of one pattern that starts at a node; false: no memory.
typedef struct {
    const ggml_tensor *mm, *a, *b, *residual, *out;  // out: the last node of the pattern
    float scale;
    bool swiglu;
} pk_linear_pattern;
bool pk_plan_linear(pk_backend *backend, const pk_linear_pattern *pattern);
bool pk_plan_attention(pk_backend *backend, const ggml_tensor *node);
bool pk_plan_rope(pk_backend *backend, const ggml_tensor *node);
bool pk_plan_rows(pk_backend *backend, const ggml_tensor *node, const ggml_tensor *norm);  // norm: fused, or NULL

// ---- plan.c, run.c ----
bool pk_plan(pk_backend *backend, ggml_graph *graph);
int pk_run(pk_backend *backend);  // GGML_STATUS_*
void pk_forget_plan(pk_backend *backend);  // frees the memory of steps and slots

#endif
