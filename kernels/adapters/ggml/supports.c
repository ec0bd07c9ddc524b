// SPDX-License-Identifier: Apache-2.0
// supports.c - which operations we take: asked once, when the host shares out a graph; what is refused here
// runs in ggml.
#include "plugin.h"

bool pk_is_view(int op) {
    return op == GGML_OP_NONE || op == GGML_OP_RESHAPE || op == GGML_OP_VIEW || op == GGML_OP_PERMUTE ||
           op == GGML_OP_TRANSPOSE;
}

size_t pk_rows(const ggml_tensor *t) { return (size_t)(t->ne[1] * t->ne[2] * t->ne[3]); }

bool pk_same_shape(const ggml_tensor *a, const ggml_tensor *b) { return !memcmp(a->ne, b->ne, sizeof a->ne); }

static const ggml_tensor *owner(const ggml_tensor *t) { return t->view_src ? t->view_src : t; }

static size_t element(int type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_I32 ? 4
           : type == GGML_TYPE_I64                        ? 8
           : type == GGML_TYPE_F16                        ? 2
                                                          : 0;
}

// A weight of which the host asks, before it has memory, whether it may lie in our buffer type: a matrix
// would be packed.
static bool will_be_packed(const ggml_tensor *t) {
    return t->buffer && t->buffer->buft == pk_buffer_type() && !t->data && t->ne[1] > 1;
}

// Numbers of a row next to each other, and not a matrix that lies packed.
static bool has_rows(const ggml_tensor *t, int type) {
    return t && t->type == type && t->nb[0] == element(type) && !pk_is_packed(owner(t)) && !will_be_packed(t);
}

// Rows next to each other as well: [rows, ne[0]] with one distance.
static bool is_dense(const ggml_tensor *t, int type) {
    return has_rows(t, type) && t->nb[1] == (size_t)t->ne[0] * t->nb[0] &&
           t->nb[2] == (size_t)t->ne[1] * t->nb[1] && t->nb[3] == (size_t)t->ne[2] * t->nb[2];
}

// When a model is loaded the host asks with a weight that has our buffer type and no memory yet.
static bool mul_mat(const ggml_tensor *op) {
    const ggml_tensor *w = op->src[0], *x = op->src[1];
    pk_weight weight;
    if (!w->buffer || w->buffer->buft != pk_buffer_type() || w->view_src || !pk_weight_of(w->type, &weight))
        return false;
    if (w->ne[2] != 1 || w->ne[3] != 1 || (w->data && !pk_is_packed(w))) return false;
    if (!w->data && w->ne[1] == 1 && PK_IS_FLOAT(weight)) return false;  // would not be packed
    return is_dense(x, GGML_TYPE_F32) && is_dense(op, GGML_TYPE_F32);
}

static bool rope(const ggml_tensor *op) {
    enum { DIMS = 1, MODE = 2, EXT_FACTOR = 7, OFFSET = 15 };
    const ggml_tensor *x = op->src[0], *positions = op->src[1], *factors = op->src[2];
    if (op->op_params[MODE] != GGML_ROPE_TYPE_NEOX || pk_param(op, EXT_FACTOR) != 0.0f ||
        op->op_params[OFFSET] != 0)
        return false;
    if (op->op_params[DIMS] < 2 || op->op_params[DIMS] % 2 || op->op_params[DIMS] > x->ne[0]) return false;
    if (factors && (!is_dense(factors, GGML_TYPE_F32) || factors->ne[0] * 2 < op->op_params[DIMS]))
        return false;
    return has_rows(x, GGML_TYPE_F32) && has_rows(op, GGML_TYPE_F32) && is_dense(positions, GGML_TYPE_I32) &&
           x->ne[3] == 1;
}

static bool cache(const ggml_tensor *t, int64_t head) {
    if (!t || t->ne[0] != head || t->ne[3] != 1 || pk_is_packed(owner(t))) return false;
    return (t->type == GGML_TYPE_F16 && t->nb[0] == 2) || (t->type == GGML_TYPE_Q8_0 && t->nb[0] == 34);
}

static bool attention(const ggml_tensor *op) {
    enum { MAX_BIAS = 1, SOFTCAP = 2 };
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3],
                      *sinks = op->src[4];
    if (sinks || pk_param(op, MAX_BIAS) != 0.0f || pk_param(op, SOFTCAP) != 0.0f) return false;
    if (!has_rows(q, GGML_TYPE_F32) || !is_dense(op, GGML_TYPE_F32) || q->ne[3] != 1) return false;
    const int64_t head = q->ne[0];
    if (head % 32 || head > PK_ATTENTION_MAX_HEAD || !cache(k, head) || !cache(v, head)) return false;
    if (k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2] || k->ne[1] < 1) return false;
    if (q->ne[2] % k->ne[2] || q->ne[2] / k->ne[2] > PK_ATTENTION_QUERIES) return false;
    if (!mask) return true;
    return has_rows(mask, GGML_TYPE_F16) && mask->ne[0] >= k->ne[1] && mask->ne[1] >= q->ne[1] &&
           mask->ne[2] == 1 && mask->ne[3] == 1;
}

static bool set_rows(const ggml_tensor *op) {
    const ggml_tensor *x = op->src[0], *rows = op->src[1];
    if (!has_rows(x, GGML_TYPE_F32) || x->ne[2] != 1 || x->ne[3] != 1 || rows->ne[1] != 1 || rows->ne[2] != 1)
        return false;
    if (!is_dense(rows, GGML_TYPE_I64) && !is_dense(rows, GGML_TYPE_I32)) return false;
    if (pk_is_packed(owner(op))) return false;
    if (op->type == GGML_TYPE_Q8_0) return x->ne[0] % 32 == 0;
    return has_rows(op, GGML_TYPE_F16) || has_rows(op, GGML_TYPE_F32);
}

static bool elementwise(const ggml_tensor *op) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    if (!has_rows(a, GGML_TYPE_F32) || !has_rows(b, GGML_TYPE_F32) || !has_rows(op, GGML_TYPE_F32))
        return false;
    if (pk_same_shape(a, b)) return true;
    return b->ne[0] == a->ne[0] && pk_rows(b) == 1;  // a norm's weight, a bias
}

bool pk_supports(const ggml_tensor *op) {
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE: return true;
        case GGML_OP_MUL_MAT: return mul_mat(op);
        case GGML_OP_ROPE: return rope(op);
        case GGML_OP_FLASH_ATTN_EXT: return attention(op);
        case GGML_OP_SET_ROWS: return set_rows(op);
        case GGML_OP_ADD:
        case GGML_OP_MUL: return elementwise(op);
        case GGML_OP_RMS_NORM:
        case GGML_OP_SCALE:
        case GGML_OP_CONT: return has_rows(a, GGML_TYPE_F32) && is_dense(op, GGML_TYPE_F32);
        case GGML_OP_GET_ROWS:
            return has_rows(a, GGML_TYPE_F32) && is_dense(op, GGML_TYPE_F32) && is_dense(b, GGML_TYPE_I32) &&
                   pk_rows(b) == 1 && a->ne[2] == 1 && a->ne[3] == 1;
        case GGML_OP_GLU:
            return op->op_params[0] == GGML_GLU_OP_SWIGLU && has_rows(a, GGML_TYPE_F32) &&
                   is_dense(op, GGML_TYPE_F32) && (!b || has_rows(b, GGML_TYPE_F32));
        default: return false;
    }
}
