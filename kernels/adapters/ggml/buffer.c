// SPDX-License-Identifier: Apache-2.0
// buffer.c - the buffer type: plain memory in which a weight matrix lies packed from the moment it is set.
//
// A tensor is packed when it is a matrix of a type we multiply and lies in a buffer that is not for
// intermediate results; its `extra` says so. Reading it back gives ggml's bytes again, also in parts and
// through views.
#include <stdlib.h>
#include <string.h>

#include "plugin.h"

enum {
    ALIGNMENT = 64,
    TASK_BYTES = 4 << 20,  // packed by one thread at a time
};

static char packed_mark;  // its address is the mark

bool pk_weight_of(int ggml_type, pk_weight *weight) {
    switch (ggml_type) {
        case GGML_TYPE_Q4_0: *weight = PK_W_Q4_0; return true;
        case GGML_TYPE_Q8_0: *weight = PK_W_Q8_0; return true;
        case GGML_TYPE_Q4_K: *weight = PK_W_Q4_K; return true;
        case GGML_TYPE_Q5_K: *weight = PK_W_Q5_K; return true;
        case GGML_TYPE_Q6_K: *weight = PK_W_Q6_K; return true;
        case GGML_TYPE_F16: *weight = PK_W_F16; return true;
        case GGML_TYPE_BF16: *weight = PK_W_BF16; return true;
        case GGML_TYPE_F32: *weight = PK_W_F32; return true;
        default: return false;
    }
}

bool pk_is_packed(const ggml_tensor *tensor) { return tensor->extra == &packed_mark; }

// A row of floats is a norm's or a bias, never a matrix; quantized ones are only ever multiplied.
static bool is_matrix(const ggml_tensor *t) {
    pk_weight weight;
    if (!pk_weight_of(t->type, &weight) || t->op != GGML_OP_NONE || t->view_src) return false;
    if (t->ne[2] != 1 || t->ne[3] != 1 || t->ne[0] < 1 || t->ne[1] < 1) return false;
    return t->ne[1] > 1 || !PK_IS_FLOAT(weight);
}

// ---- packing, by all threads ----

typedef struct {
    ggml_tensor *tensor;
    const uint8_t *source;
    pk_weight weight;
    size_t panels, task;  // task: panels taken at a time
    atomic_size_t next;
} packing_job;

static void pack_panels(void *context, int thread, int n_threads) {
    (void)thread;
    (void)n_threads;
    packing_job *job = context;
    for (;;) {
        const size_t first = atomic_fetch_add(&job->next, job->task);
        if (first >= job->panels) return;
        const size_t last = first + job->task < job->panels ? first + job->task : job->panels;
        pk_pack(job->tensor->data, job->source, job->weight, (size_t)job->tensor->ne[1],
                (size_t)job->tensor->ne[0], first, last);
    }
}

static void pack(pk_threads *threads, ggml_tensor *tensor, const uint8_t *source, pk_weight weight) {
    packing_job job = {.tensor = tensor, .source = source, .weight = weight};
    job.panels = pk_divide_up((size_t)tensor->ne[1], PK_PANEL_ROWS);
    job.task = TASK_BYTES / pk_panel_bytes(weight, (size_t)tensor->ne[0]) + 1;
    atomic_init(&job.next, 0);
    pk_threads_run(threads, job.panels > job.task ? pk_threads_default() : 1, pack_panels, &job);
    atomic_fetch_add(&pk_count.packed_bytes, job.panels * pk_panel_bytes(weight, (size_t)tensor->ne[0]));
}

// Part of a packed tensor, ggml's bytes [offset, offset + size): its panels are unpacked, read or changed,
// packed again.
static void patch(const ggml_tensor *root, const uint8_t *in, uint8_t *out, size_t offset, size_t size) {
    pk_weight weight;
    if (!pk_weight_of(root->type, &weight)) return;
    const size_t columns = (size_t)root->ne[0], rows = (size_t)root->ne[1],
                 row = pk_row_bytes(weight, columns);
    const size_t panel_rows = row * PK_PANEL_ROWS;
    uint8_t *plain = malloc(panel_rows);
    if (!plain) abort();  // the host's interface has no way to say it, and wrong weights must not be used
    while (size > 0) {
        const size_t p = offset / panel_rows, from = offset % panel_rows;
        const size_t left = row * (rows - p * PK_PANEL_ROWS), whole = left < panel_rows ? left : panel_rows;
        const size_t n = size < whole - from ? size : whole - from;
        uint8_t *first = plain - p * panel_rows;  // where row 0 would lie
        pk_unpack(first, root->data, weight, rows, columns, p, p + 1);
        if (out) {
            memcpy(out, plain + from, n);
            out += n;
        } else {
            memcpy(plain + from, in, n);
            in += n;
            pk_pack(root->data, first, weight, rows, columns, p, p + 1);
        }
        offset += n;
        size -= n;
    }
    free(plain);
}

// The packed tensor that `t` is or shows a part of, and where it begins in it.
static const ggml_tensor *packed_root(const ggml_tensor *t, size_t *offset) {
    const ggml_tensor *root = t->view_src ? t->view_src : t;
    *offset += t->view_src ? t->view_offs : 0;
    return pk_is_packed(root) ? root : NULL;
}

// ---- one buffer ----

typedef struct {
    void *base;
    pk_threads *threads;
} memory;

static void buffer_free(ggml_buffer *buffer) {
    memory *m = buffer->context;
    free(m->base);
    pk_threads_close(m->threads);
    free(m);
}

static void *buffer_base(ggml_buffer *buffer) { return ((memory *)buffer->context)->base; }

static int buffer_init_tensor(ggml_buffer *buffer, ggml_tensor *tensor) {
    tensor->extra = buffer->usage != GGML_USAGE_COMPUTE && is_matrix(tensor) ? &packed_mark : NULL;
    return GGML_STATUS_SUCCESS;
}

static void buffer_memset_tensor(ggml_buffer *buffer, ggml_tensor *tensor, uint8_t value, size_t offset,
                                 size_t size) {
    (void)buffer;
    size_t from = offset;
    const ggml_tensor *root = packed_root(tensor, &from);
    if (!root) {
        memset((uint8_t *)tensor->data + offset, value, size);
        return;
    }
    uint8_t *bytes = malloc(size);
    if (!bytes) abort();
    memset(bytes, value, size);
    patch(root, bytes, NULL, from, size);
    free(bytes);
}

static void buffer_set_tensor(ggml_buffer *buffer, ggml_tensor *tensor, const void *data, size_t offset,
                              size_t size) {
    size_t from = offset;
    const ggml_tensor *root = packed_root(tensor, &from);
    pk_weight weight;
    if (!root || !pk_weight_of(tensor->type, &weight)) {
        memcpy((uint8_t *)tensor->data + offset, data, size);
    } else if (root == tensor && offset == 0 && size == pk_host.nbytes(tensor)) {
        pack(((memory *)buffer->context)->threads, tensor, data, weight);
    } else {
        patch(root, data, NULL, from, size);
    }
}

static void buffer_get_tensor(ggml_buffer *buffer, const ggml_tensor *tensor, void *data, size_t offset,
                              size_t size) {
    (void)buffer;
    size_t from = offset;
    const ggml_tensor *root = packed_root(tensor, &from);
    if (root) patch(root, NULL, data, from, size);
    else memcpy(data, (const uint8_t *)tensor->data + offset, size);
}

static void buffer_clear(ggml_buffer *buffer, uint8_t value) {
    memset(buffer_base(buffer), value, buffer->size);
}

// ---- the buffer type ----

static const char *type_name(ggml_buffer_type *type) {
    (void)type;
    return "PK";
}

static size_t type_alignment(ggml_buffer_type *type) {
    (void)type;
    return ALIGNMENT;
}

static ggml_buffer *type_alloc(ggml_buffer_type *type, size_t size) {
    static const ggml_buffer_iface iface = {
        .free_buffer = buffer_free,
        .get_base = buffer_base,
        .init_tensor = buffer_init_tensor,
        .memset_tensor = buffer_memset_tensor,
        .set_tensor = buffer_set_tensor,
        .get_tensor = buffer_get_tensor,
        .clear = buffer_clear,
    };
    memory *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    m->threads = pk_threads_open();
    m->base = aligned_alloc(ALIGNMENT, (size / ALIGNMENT + 1) * ALIGNMENT);
    if (!m->threads || !m->base) {
        pk_threads_close(m->threads);
        free(m->base);
        free(m);
        return NULL;
    }
    return pk_host.buffer_init(type, iface, m, size);
}

static size_t type_alloc_size(ggml_buffer_type *type, const ggml_tensor *tensor) {
    (void)type;
    pk_weight weight;
    const size_t plain = pk_host.nbytes(tensor);
    if (!is_matrix(tensor) || !pk_weight_of(tensor->type, &weight)) return plain;
    const size_t panels = pk_divide_up((size_t)tensor->ne[1], PK_PANEL_ROWS);
    const size_t packed = panels * pk_panel_bytes(weight, (size_t)tensor->ne[0]);
    return packed > plain ? packed : plain;
}

static bool type_is_host(ggml_buffer_type *type) {
    (void)type;
    return false;  // packed weights are not what the CPU backend thinks they are
}

ggml_buffer_type *pk_buffer_type(void) {
    static ggml_buffer_type type = {
        .iface =
            {
                .get_name = type_name,
                .alloc_buffer = type_alloc,
                .get_alignment = type_alignment,
                .get_alloc_size = type_alloc_size,
                .is_host = type_is_host,
            },
    };
    return &type;
}
