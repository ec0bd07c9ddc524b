// SPDX-License-Identifier: Apache-2.0
// rows.c - the steps that work on one row at a time: norms, sums, products, SwiGLU, copies, and rows by
// index.
#include "plugin.h"

// Row i of a tensor, counted over all dimensions but the first.
static uint8_t *row_of(const ggml_tensor *t, size_t i) {
    const size_t n1 = (size_t)t->ne[1], n2 = (size_t)t->ne[2];
    return (uint8_t *)t->data + i % n1 * t->nb[1] + i / n1 % n2 * t->nb[2] + i / n1 / n2 * t->nb[3];
}

static const float *floats(const ggml_tensor *t, size_t i) {
    return (const float *)(const void *)row_of(t, i);
}

static size_t index_at(const ggml_tensor *rows, size_t i) {
    if (rows->type == GGML_TYPE_I64) return (size_t)((const int64_t *)rows->data)[i];
    return (size_t)((const int32_t *)rows->data)[i];
}

static void mul(float *out, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = a[i] * b[i];
}

void pk_norm_row(const ggml_tensor *node, const ggml_tensor *norm, size_t i) {
    const float *weight = norm == node ? NULL : (const float *)node->src[1]->data;
    float *out = (float *)(void *)row_of(node, i);
    pk_use.vector->rms_norm(out, floats(norm->src[0], i), weight, (size_t)node->ne[0], pk_param(norm, 0));
}

static void glu_row(const ggml_tensor *node, size_t i, float *out) {
    const size_t n = (size_t)node->ne[0];
    const bool swapped = node->op_params[1] != 0;
    const float *a = floats(node->src[0], i);
    if (node->src[1]) pk_use.vector->swiglu(out, a, floats(node->src[1], i), n);
    else pk_use.vector->swiglu(out, swapped ? a + n : a, swapped ? a : a + n, n);
}

// A row of x goes to the row of the cache that the index names; an index outside it is the host's mistake and
// not followed.
static void set_row(const ggml_tensor *node, size_t i) {
    const size_t n = (size_t)node->ne[0], to = index_at(node->src[1], i);
    if (to >= (size_t)node->ne[1]) return;
    uint8_t *out = (uint8_t *)node->data + to * node->nb[1];
    const float *x = floats(node->src[0], i);
    if (node->type == GGML_TYPE_F16) pk_use.vector->to_f16((uint16_t *)(void *)out, x, n);
    else if (node->type == GGML_TYPE_Q8_0) pk_use.vector->to_q8_0(out, x, n);
    else memcpy(out, x, n * sizeof *x);
}

static void get_row(const ggml_tensor *node, size_t i, float *out) {
    const ggml_tensor *table = node->src[0];
    const size_t from = index_at(node->src[1], i);
    const size_t bytes = (size_t)node->ne[0] * sizeof *out;
    if (from < (size_t)table->ne[1]) memcpy(out, (const uint8_t *)table->data + from * table->nb[1], bytes);
    else memset(out, 0, bytes);
}

// The result has the source's elements in order, perhaps in another shape.
static void cont_row(const ggml_tensor *node, size_t i) {
    const size_t n = (size_t)node->src[0]->ne[0];
    memcpy((float *)node->data + i * n, floats(node->src[0], i), n * sizeof(float));
}

// Which operand says how many rows there are.
static size_t rows_of(const ggml_tensor *node) {
    return pk_rows(node->op == GGML_OP_SET_ROWS || node->op == GGML_OP_CONT ? node->src[0] : node);
}

static void row_unit(const pk_backend *backend, const pk_step *step, size_t unit, uint8_t *scratch) {
    (void)backend;
    (void)scratch;
    const ggml_tensor *node = step->node, *a = node->src[0], *b = node->src[1];
    const size_t n = (size_t)node->ne[0];
    for (size_t i = unit * step->rows.per_unit; i < pk_last_row(step, unit); i++) {
        if (node->op == GGML_OP_SET_ROWS) {
            set_row(node, i);
            continue;
        }
        if (node->op == GGML_OP_CONT) {
            cont_row(node, i);
            continue;
        }
        float *out = (float *)(void *)row_of(node, i);
        switch (node->op) {
            case GGML_OP_ADD: pk_use.vector->add(out, floats(a, i), floats(b, pk_rows(b) == 1 ? 0 : i), n); break;
            case GGML_OP_MUL:
                if (step->norm) pk_norm_row(node, step->norm, i);
                else mul(out, floats(a, i), floats(b, pk_rows(b) == 1 ? 0 : i), n);
                break;
            case GGML_OP_RMS_NORM: pk_norm_row(node, node, i); break;
            case GGML_OP_SCALE:
                pk_use.vector->scale(out, floats(a, i), n, pk_param(node, 0), pk_param(node, 1));
                break;
            case GGML_OP_GET_ROWS: get_row(node, i, out); break;
            case GGML_OP_GLU: glu_row(node, i, out); break;
            default: break;  // pk_supports takes no other
        }
    }
}

bool pk_plan_rows(pk_backend *backend, const ggml_tensor *node, const ggml_tensor *norm) {
    pk_step *step = pk_add_rows_step(backend, row_unit, rows_of(node), node);
    if (step) step->norm = norm;
    return step != NULL;
}
