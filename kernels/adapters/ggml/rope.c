// SPDX-License-Identifier: Apache-2.0
// rope.c - rotary positions: a table of cosines and sines, made once for a graph, and the turning of each
// head by it.
//
// The angles are ggml's: position times a power of the base that is built up by multiplication in float32,
// divided by the model's factor, so that both decoders see the same numbers. All layers of a graph share
// positions and factors.
#include <math.h>

#include "plugin.h"

enum { DIMS = 1, BASE = 5, FREQ_SCALE = 6, ATTENTION_FACTOR = 8 };

// Row of one token: cosines [dims / 2], then sines.
static void table_unit(const pk_backend *backend, const pk_step *step, size_t unit, uint8_t *scratch) {
    (void)scratch;
    const ggml_tensor *node = step->node, *factors = node->src[2];
    const size_t half = (size_t)node->op_params[DIMS] / 2;
    const float step_down = powf(pk_param(node, BASE), -2.0f / (float)node->op_params[DIMS]);
    const float scale = pk_param(node, FREQ_SCALE), magnitude = pk_param(node, ATTENTION_FACTOR);
    for (size_t t = unit * step->rows.per_unit; t < pk_last_row(step, unit); t++) {
        float *cosines = (float *)(void *)backend->slots[PK_SLOT_ROPE] + 2 * half * t,
              *sines = cosines + half;
        float angle = (float)((const int32_t *)node->src[1]->data)[t];
        for (size_t i = 0; i < half; i++, angle *= step_down) {
            const float turned = scale * (factors ? angle / ((const float *)factors->data)[i] : angle);
            cosines[i] = cosf(turned) * magnitude;
            sines[i] = sinf(turned) * magnitude;
        }
    }
}

static void rope_unit(const pk_backend *backend, const pk_step *step, size_t unit, uint8_t *scratch) {
    (void)scratch;
    const ggml_tensor *node = step->node, *x = node->src[0];
    const size_t dims = (size_t)node->op_params[DIMS];
    for (size_t t = unit * step->rows.per_unit; t < pk_last_row(step, unit); t++) {
        const float *cosines = (const float *)(const void *)backend->slots[PK_SLOT_ROPE] + dims * t;
        for (size_t h = 0; h < (size_t)node->ne[1]; h++) {
            float *out = (float *)(void *)((uint8_t *)node->data + h * node->nb[1] + t * node->nb[2]);
            const float *in =
                (const float *)(const void *)((const uint8_t *)x->data + h * x->nb[1] + t * x->nb[2]);
            pk_use.vector->rope(out, in, cosines, cosines + dims / 2, dims, (size_t)node->ne[0]);
        }
    }
}

static bool same_table(const ggml_tensor *a, const ggml_tensor *b) {
    return a && a->src[1] == b->src[1] && a->src[2] == b->src[2] && a->ne[2] == b->ne[2] &&
           !memcmp(a->op_params, b->op_params, sizeof a->op_params);
}

bool pk_plan_rope(pk_backend *backend, const ggml_tensor *node) {
    const size_t tokens = (size_t)node->ne[2];
    if (!same_table(backend->rope_node, node)) {
        pk_need(backend, PK_SLOT_ROPE, tokens * (size_t)node->op_params[DIMS] * sizeof(float));
        if (!pk_add_rows_step(backend, table_unit, tokens, node)) return false;
        backend->rope_node = node;
    }
    return pk_add_rows_step(backend, rope_unit, tokens, node) != NULL;
}
