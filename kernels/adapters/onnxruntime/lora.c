// SPDX-License-Identifier: Apache-2.0
// lora.c - Lora: out = y + ((x A) * scale) B, what an adapter adds to a linear layer.
//
//   inputs   x float32 [.., in]; y float32 [.., out]; A [in, rank] and B [rank, out], of one type: float32, float16 or
//            int8; scale float32 [rank], with int8 and only then
//   output   float32 [.., out]; rank 0: y
//
// A and B may differ from call to call, so nothing is packed. Few rows: both are read once, from end to end; each part
// of A, some of its rows, has a sum of its own, and these are added up in order. Many rows: a unit is some columns
// times some rows. What a unit is depends on the shapes and never on how many threads there are.
#include <stdlib.h>
#include <string.h>

#include "library.h"

enum {
    FEW_ROWS = 8,
    PARTS = 8,           // of A's rows and of B's columns, with few rows
    PART_ROWS = 64,      // at least; of A
    PART_COLUMNS = 256,  // at least; of B
    PANEL = 32,          // columns of a unit with many rows
    BLOCK_ROWS = 240,    // and its rows: a panel is converted for each such block. Whole tiles of every variant
    MAX_RANK = 1 << 16,
};

typedef struct {
    const float *x, *y, *scale;  // scale NULL: ones
    const void *a, *b;
    pk_lora_type type;
    float *out, *inner;    // inner: [rows, rank], x A; with few rows first one of each part
    size_t rows, in, rank, columns;
    size_t part, blocks;   // rows of A or columns of B in a unit of few rows; blocks of rows
} lora_job;

// ---- few rows ----

static void few_first(void *data, size_t unit) {
    const lora_job *j = data;
    const size_t first = unit * j->part;
    pk_use.lora->few(&(pk_lora_args){
        .out = j->inner + unit * j->rows * j->rank,
        .out_stride = j->rank,
        .x = j->x + first,
        .x_stride = j->in,
        .w = (const uint8_t *)j->a + first * j->rank * pk_lora_bytes(j->type),
        .w_stride = j->rank,
        .rows = j->rows,
        .depth = pk_least(j->part, j->in - first),
        .columns = j->rank,
        .type = j->type,
    });
}

static void add_parts(const lora_job *j, size_t parts) {
    const size_t n = j->rows * j->rank;
    for (size_t p = 1; p < parts; p++) pk_use.vector->add(j->inner, j->inner, j->inner + p * n, n);
    for (size_t i = 0; j->scale && i < n; i++) j->inner[i] *= j->scale[i % j->rank];
}

static void few_second(void *data, size_t unit) {
    const lora_job *j = data;
    const size_t first = unit * j->part;
    pk_use.lora->few(&(pk_lora_args){
        .out = j->out + first,
        .out_stride = j->columns,
        .base = j->y + first,
        .base_stride = j->columns,
        .x = j->inner,
        .x_stride = j->rank,
        .w = (const uint8_t *)j->b + first * pk_lora_bytes(j->type),
        .w_stride = j->columns,
        .rows = j->rows,
        .depth = j->rank,
        .columns = pk_least(j->part, j->columns - first),
        .type = j->type,
    });
}

// Whole groups of 32, so that no unit but the last has an odd end.
static size_t part_of(size_t n, size_t least) {
    const size_t part = pk_divide_up(pk_divide_up(n, PARTS), 32) * 32;
    return part < least ? least : part;
}

static OrtStatus *run_few(const OrtApi *api, const OrtKernelContext *context, lora_job *j) {
    j->part = part_of(j->in, PART_ROWS);
    const size_t parts = pk_divide_up(j->in, j->part);
    OrtStatus *status = api->KernelContext_ParallelFor(context, few_first, parts, 0, j);
    if (status) return status;
    add_parts(j, parts);
    j->part = part_of(j->columns, PART_COLUMNS);
    return api->KernelContext_ParallelFor(context, few_second, pk_divide_up(j->columns, j->part), 0, j);
}

// ---- many rows ----

static void many_first(void *data, size_t unit) {
    const lora_job *j = data;
    const size_t row = unit % j->blocks * BLOCK_ROWS, rows = pk_least(BLOCK_ROWS, j->rows - row);
    const size_t first = unit / j->blocks * PANEL, columns = pk_least(PANEL, j->rank - first);
    float *out = j->inner + row * j->rank + first;
    pk_use.lora->many(&(pk_lora_args){
        .out = out,
        .out_stride = j->rank,
        .x = j->x + row * j->in,
        .x_stride = j->in,
        .w = (const uint8_t *)j->a + first * pk_lora_bytes(j->type),
        .w_stride = j->rank,
        .rows = rows,
        .depth = j->in,
        .columns = columns,
        .type = j->type,
    });
    for (size_t r = 0; j->scale && r < rows; r++) {
        for (size_t c = 0; c < columns; c++) out[r * j->rank + c] *= j->scale[first + c];
    }
}

static void many_second(void *data, size_t unit) {
    const lora_job *j = data;
    const size_t row = unit % j->blocks * BLOCK_ROWS, first = unit / j->blocks * PANEL;
    pk_use.lora->many(&(pk_lora_args){
        .out = j->out + row * j->columns + first,
        .out_stride = j->columns,
        .base = j->y + row * j->columns + first,
        .base_stride = j->columns,
        .x = j->inner + row * j->rank,
        .x_stride = j->rank,
        .w = (const uint8_t *)j->b + first * pk_lora_bytes(j->type),
        .w_stride = j->columns,
        .rows = pk_least(BLOCK_ROWS, j->rows - row),
        .depth = j->rank,
        .columns = pk_least(PANEL, j->columns - first),
        .type = j->type,
    });
}

static OrtStatus *run_many(const OrtApi *api, const OrtKernelContext *context, lora_job *j) {
    j->blocks = pk_divide_up(j->rows, BLOCK_ROWS);
    const size_t first = pk_divide_up(j->rank, PANEL) * j->blocks, second = pk_divide_up(j->columns, PANEL) * j->blocks;
    OrtStatus *status = api->KernelContext_ParallelFor(context, many_first, first, 0, j);
    return status ? status : api->KernelContext_ParallelFor(context, many_second, second, 0, j);
}

// ---- a call ----

static OrtStatus *run(const OrtApi *api, const OrtKernelContext *context, lora_job *j) {
    const size_t copies = j->rows <= FEW_ROWS ? PARTS : 1;
    pk_scratch *scratch = pk_scratch_take(copies * j->rows * j->rank * sizeof(float));
    if (!scratch) return pk_fail(api, "Lora: Failed to allocate for %zu rows", j->rows);
    j->inner = (float *)(void *)pk_scratch_bytes(scratch);
    OrtStatus *status = (j->rows <= FEW_ROWS ? run_few : run_many)(api, context, j);
    pk_scratch_give(scratch);
    atomic_fetch_add(&pk_count.loras, 1);
    return status;
}

static bool type_of(int type, pk_lora_type *out) {
    if (type == ORT_FLOAT) *out = PK_LORA_F32;
    else if (type == ORT_FLOAT16) *out = PK_LORA_F16;
    else *out = PK_LORA_S8;
    return type == ORT_FLOAT || type == ORT_FLOAT16 || type == ORT_INT8;
}

static OrtStatus *check_matrices(const OrtApi *api, const pk_tensor *a, const pk_tensor *b, lora_job *j) {
    if (!type_of(a->type, &j->type) || b->type != a->type) {
        return pk_fail(api, "Lora: A has type %d, B type %d, expected both float32, float16 or int8", a->type, b->type);
    }
    if (a->n_dims != 2 || b->n_dims != 2 || a->dims[1] != b->dims[0] || a->dims[1] > MAX_RANK) {
        return pk_fail(api, "Lora: A and B are not [in, rank] and [rank, out] with a rank up to %d", MAX_RANK);
    }
    j->a = a->data;
    j->b = b->data;
    j->in = (size_t)a->dims[0];
    j->rank = (size_t)a->dims[1];
    j->columns = (size_t)b->dims[1];
    return NULL;
}

static OrtStatus *check_rows(const OrtApi *api, const pk_tensor *x, const pk_tensor *y, lora_job *j) {
    const bool floats = x->type == ORT_FLOAT && y->type == ORT_FLOAT;
    const size_t n = x->n_dims;
    if (!floats || n < 1 || y->n_dims != n || memcmp(x->dims, y->dims, (n - 1) * sizeof *x->dims) != 0 ||
        x->dims[n - 1] != (int64_t)j->in || y->dims[n - 1] != (int64_t)j->columns || !j->in || !j->columns) {
        return pk_fail(api, "Lora: x and y are not float32 [.., %zu] and [.., %zu]", j->in, j->columns);
    }
    j->x = x->data;
    j->y = y->data;
    j->rows = x->count / j->in;
    return NULL;
}

static OrtStatus *read_scale(const OrtApi *api, const OrtKernelContext *context, lora_job *j) {
    size_t n_inputs = 0;
    const OrtValue *value = NULL;
    OrtStatus *status = api->KernelContext_GetInputCount(context, &n_inputs);
    if (!status && n_inputs > 4) status = api->KernelContext_GetInput(context, 4, &value);
    if (status) return status;
    if ((value != NULL) != (j->type == PK_LORA_S8)) return pk_fail(api, "Lora: int8 has a scale, and int8 alone");
    if (!value) return NULL;
    pk_tensor scale;
    status = pk_tensor_of(api, value, "scale", &scale);
    if (status) return status;
    if (scale.type != ORT_FLOAT || scale.count != j->rank) {
        return pk_fail(api, "Lora: scale has %zu elements of type %d, expected %zu of float32", scale.count, scale.type,
                       j->rank);
    }
    j->scale = scale.data;
    return NULL;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    const OrtApi *api = *(const OrtApi **)kernel;
    static const char *const names[] = {"x", "y", "A", "B"};
    pk_tensor inputs[4];
    OrtStatus *status = NULL;
    for (size_t i = 0; i < 4 && !status; i++) status = pk_input(api, context, i, names[i], &inputs[i]);
    lora_job job = {0};
    if (!status) status = check_matrices(api, &inputs[2], &inputs[3], &job);
    if (!status) status = check_rows(api, &inputs[0], &inputs[1], &job);
    if (!status) status = read_scale(api, context, &job);
    OrtValue *out = NULL;
    void *data = NULL;
    if (!status) status = api->KernelContext_GetOutput(context, 0, inputs[1].dims, inputs[1].n_dims, &out);
    if (!status) status = api->GetTensorMutableData(out, &data);
    if (status || job.rows == 0) return status;
    job.out = data;
    if (job.rank > 0) return run(api, context, &job);
    if (job.out != job.y) memcpy(job.out, job.y, inputs[1].count * sizeof *job.out);
    return NULL;
}

// ---- what it is ----

static void destroy(void *kernel) {
    free(kernel);
    pk_scratch_free();
}

static const char *name(const OrtCustomOp *op) {
    (void)op;
    return "Lora";
}

static int input_type(const OrtCustomOp *op, size_t i) {
    (void)op;
    return i == 2 || i == 3 ? ORT_ANY : ORT_FLOAT;
}

static size_t n_inputs(const OrtCustomOp *op) {
    (void)op;
    return 5;
}

static int input_kind(const OrtCustomOp *op, size_t i) {
    (void)op;
    return i == 4 ? ORT_OPTIONAL : ORT_REQUIRED;
}

// The output may be written over y: an element is read before it is written, by the unit that writes it.
static size_t in_place(int **input, int **output) {
    static int y = 1, out = 0;
    *input = &y;
    *output = &out;
    return 1;
}

static void release_in_place(int *input, int *output) {
    (void)input;
    (void)output;
}

const OrtCustomOp pk_op_lora = {
    PK_OP_OF_ONE_FLOAT_OUTPUT,
    .GetName = name,
    .GetInputType = input_type,
    .GetInputTypeCount = n_inputs,
    .GetInputCharacteristic = input_kind,
    .CreateKernelV2 = pk_op_keep_api,
    .KernelComputeV2 = compute,
    .KernelDestroy = destroy,
    .GetMayInplace = in_place,
    .ReleaseMayInplace = release_in_place,
};
