// SPDX-License-Identifier: Apache-2.0
// linear.c - MatMulNBits: y = x Wᵀ [+ bias], as ONNX Runtime's com.microsoft.MatMulNBits with what pocketphi writes.
//
//   inputs      A float32 [.., K]; B uint8 [N, K / 32, 4 * bits], scales float32 [N, K / 32], both constant; bias [N]
//   attributes  K, N, bits (4 or 8), block_size (32)
//   output      float32 [.., N]
//
// Zero points are 8 and 128. The rows of A are rounded to 8 bits; see activations.h and matmul.h.
//
// A unit of work is some tokens times some panels of W: tokens enough to use a panel many times, few enough that their
// packed activations stay in a core's second-level cache. What a unit is depends on the shapes and never on how many
// threads there are; they are ONNX Runtime's own.
#include <stdlib.h>

#include "library.h"

enum {
    X_BYTES = 600 << 10,       // packed activations of a unit: over half of a 1 MB L2
    CHUNK_BYTES = 1024 << 10,  // weights of a unit when there are few tokens: a long sequential read
    CHUNK_PANELS = 4,          // and when there are many
    LEAST_UNITS = 16,          // so that a slow thread is not waited for long
    PACK_BLOCKS = 16,          // blocks of 32 columns in a unit of packing
    FEW_TOKENS = 2,            // packed by the calling thread
};

typedef struct {
    const OrtApi *api;
    pk_weight weight;
    size_t rows, columns;
    uint8_t *packed;
} linear_kernel;

// ---- making ----

static OrtStatus *size_attribute(const OrtApi *api, const OrtKernelInfo *info, const char *name, size_t *out) {
    int64_t value = 0;
    OrtStatus *status = api->KernelInfoGetAttribute_int64(info, name, &value);
    if (status) return status;
    if (value < 1 || value > INT32_MAX) {
        return pk_fail(api, "MatMulNBits has %s = %lld, expected 1 to 2^31 - 1", name, (long long)value);
    }
    *out = (size_t)value;
    return NULL;
}

static OrtStatus *constant(const OrtApi *api, const OrtKernelInfo *info, size_t i, const char *what, int type,
                           size_t count, pk_tensor *out) {
    int is_constant = 0;
    const OrtValue *value = NULL;
    OrtStatus *status = api->KernelInfoGetConstantInput_tensor(info, i, &is_constant, &value);
    if (status) return status;
    if (!is_constant || !value) return pk_fail(api, "MatMulNBits: %s is not a constant", what);
    status = pk_tensor_of(api, value, what, out);
    if (status) return status;
    if (out->type != type || out->count != count) {
        return pk_fail(api, "MatMulNBits: %s has %zu elements of type %d, K, N and bits need %zu of type %d", what,
                       out->count, out->type, count, type);
    }
    return NULL;
}

static OrtStatus *read_kernel(linear_kernel *k, const OrtKernelInfo *info) {
    const OrtApi *api = k->api;
    size_t bits = 0, block = 0;
    OrtStatus *status = size_attribute(api, info, "K", &k->columns);
    if (!status) status = size_attribute(api, info, "N", &k->rows);
    if (!status) status = size_attribute(api, info, "bits", &bits);
    if (!status) status = size_attribute(api, info, "block_size", &block);
    if (status) return status;
    if ((bits != 4 && bits != 8) || block != PK_X_BLOCK || k->columns % PK_X_BLOCK) {
        return pk_fail(api, "MatMulNBits has bits = %zu, block_size = %zu, K = %zu: expected 4 or 8, 32, whole blocks",
                       bits, block, k->columns);
    }
    k->weight = bits == 4 ? PK_W_Q4_0 : PK_W_Q8_0;
    const size_t n_blocks = k->rows * (k->columns / PK_X_BLOCK);
    pk_tensor blocks, scales;
    status = constant(api, info, 1, "B", ORT_UINT8, n_blocks * PK_X_BLOCK * bits / 8, &blocks);
    if (!status) status = constant(api, info, 2, "scales", ORT_FLOAT, n_blocks, &scales);
    return status ? status : pk_pack_blocks(api, k->weight, k->rows, k->columns, blocks.data, scales.data, &k->packed);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    (void)op;
    linear_kernel *k = calloc(1, sizeof *k);
    if (!k) return pk_fail(api, "Failed to allocate a MatMulNBits");
    k->api = api;
    OrtStatus *status = read_kernel(k, info);
    if (status) {
        free(k);
        return status;
    }
    atomic_fetch_add(&pk_count.packed_bytes,
                     pk_divide_up(k->rows, PK_PANEL_ROWS) * pk_panel_bytes(k->weight, k->columns));
    *kernel = k;
    return NULL;
}

static void destroy(void *kernel) {
    linear_kernel *k = kernel;
    free(k->packed);
    free(k);
    pk_scratch_free();
}

// ---- running ----

typedef struct {
    const linear_kernel *kernel;
    const float *x, *bias;
    float *out;
    uint8_t *tiles;
    size_t tokens, block_tokens;  // in all; of a unit
    size_t chunk_panels, chunks;  // of a unit; how many there are
    size_t packs;                 // units of packing a tile
} linear_job;

static void pack_unit(void *data, size_t unit) {
    const linear_job *j = data;
    const linear_kernel *k = j->kernel;
    const size_t tile = unit / j->packs, first = unit % j->packs * PACK_BLOCKS, token = tile * PK_TILE_TOKENS;
    pk_use.activations->quantize(&(pk_activations_args){
        .tile = j->tiles + tile * pk_tile_bytes(k->weight, k->columns, PK_TILE_TOKENS),
        .x = j->x + token * k->columns,
        .x_stride = k->columns,
        .tokens = pk_least(PK_TILE_TOKENS, j->tokens - token),
        .columns = k->columns,
        .first = first,
        .last = pk_least(first + PACK_BLOCKS, k->columns / PK_X_BLOCK),
        .shared = PK_SHARED_BLOCKS(k->weight, k->columns),
    });
}

static void multiply_unit(void *data, size_t unit) {
    const linear_job *j = data;
    const linear_kernel *k = j->kernel;
    const size_t token = unit / j->chunks * j->block_tokens, panel = unit % j->chunks * j->chunk_panels;
    const size_t row = panel * PK_PANEL_ROWS, rows = pk_least(j->chunk_panels * PK_PANEL_ROWS, k->rows - row);
    const size_t tokens = pk_least(j->block_tokens, j->tokens - token);
    float *out = j->out + token * k->rows + row;
    pk_use.matmul[k->weight](&(pk_matmul_args){
        .out = out,
        .out_stride = k->rows,
        .w = k->packed + panel * pk_panel_bytes(k->weight, k->columns),
        .x = j->tiles + token / PK_TILE_TOKENS * pk_tile_bytes(k->weight, k->columns, PK_TILE_TOKENS),
        .rows = rows,
        .tokens = tokens,
        .columns = k->columns,
    });
    for (size_t t = 0; j->bias && t < tokens; t++) {
        pk_use.vector->add(out + t * k->rows, out + t * k->rows, j->bias + row, rows);
    }
}

// Few tokens: the weights are read once, in long pieces. Many: blocks of tokens that fit the cache, short pieces.
static void share_out(linear_job *j) {
    const linear_kernel *k = j->kernel;
    const size_t tile = pk_tile_bytes(k->weight, k->columns, PK_TILE_TOKENS);
    const size_t panels = pk_divide_up(k->rows, PK_PANEL_ROWS), panel = pk_panel_bytes(k->weight, k->columns);
    const size_t tiles = X_BYTES / tile ? X_BYTES / tile : 1;
    j->block_tokens = pk_least(tiles, pk_divide_up(j->tokens, PK_TILE_TOKENS)) * PK_TILE_TOKENS;
    const size_t fair = panels * pk_divide_up(j->tokens, j->block_tokens) / LEAST_UNITS;
    j->chunk_panels = pk_least(j->tokens > PK_TILE_TOKENS ? CHUNK_PANELS : CHUNK_BYTES / panel, fair);
    if (!j->chunk_panels) j->chunk_panels = 1;
    j->chunks = pk_divide_up(panels, j->chunk_panels);
    j->packs = pk_divide_up(k->columns / PK_X_BLOCK, PACK_BLOCKS);
}

static OrtStatus *run(linear_job *j, const OrtKernelContext *context) {
    const linear_kernel *k = j->kernel;
    share_out(j);
    const size_t tile = pk_tile_bytes(k->weight, k->columns, PK_TILE_TOKENS);
    const size_t tiles = pk_divide_up(j->tokens, PK_TILE_TOKENS);
    pk_scratch *scratch = pk_scratch_take(tiles * tile);
    if (!scratch) return pk_fail(k->api, "MatMulNBits: Failed to allocate for %zu tokens", j->tokens);
    j->tiles = pk_scratch_bytes(scratch);
    OrtStatus *status = NULL;
    if (j->tokens <= FEW_TOKENS) {
        for (size_t i = 0; i < j->packs; i++) pack_unit(j, i);
    } else {
        status = k->api->KernelContext_ParallelFor(context, pack_unit, tiles * j->packs, 0, j);
    }
    const size_t units = pk_divide_up(j->tokens, j->block_tokens) * j->chunks;
    if (!status) status = k->api->KernelContext_ParallelFor(context, multiply_unit, units, 0, j);
    pk_scratch_give(scratch);
    return status;
}

static OrtStatus *read_bias(linear_job *j, const OrtKernelContext *context) {
    const linear_kernel *k = j->kernel;
    size_t n_inputs = 0;
    const OrtValue *value = NULL;
    OrtStatus *status = k->api->KernelContext_GetInputCount(context, &n_inputs);
    if (!status && n_inputs > 3) status = k->api->KernelContext_GetInput(context, 3, &value);
    if (status || !value) return status;
    pk_tensor bias;
    status = pk_tensor_of(k->api, value, "bias", &bias);
    if (status) return status;
    if (bias.type != ORT_FLOAT || bias.count != k->rows) {
        return pk_fail(k->api, "MatMulNBits: bias has %zu elements of type %d, expected %zu of float32", bias.count,
                       bias.type, k->rows);
    }
    j->bias = bias.data;
    return NULL;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    const linear_kernel *k = kernel;
    pk_tensor x;
    OrtStatus *status = pk_input(k->api, context, 0, "A", &x);
    if (status) return status;
    if (x.type != ORT_FLOAT || x.n_dims < 1 || x.dims[x.n_dims - 1] != (int64_t)k->columns) {
        return pk_fail(k->api, "MatMulNBits: A has a last dimension of %lld, type %d, expected %zu of float32",
                       x.n_dims ? (long long)x.dims[x.n_dims - 1] : 0LL, x.type, k->columns);
    }
    linear_job job = {.kernel = k, .x = x.data, .tokens = x.count / k->columns};
    status = read_bias(&job, context);
    if (status) return status;
    OrtValue *out = NULL;
    void *data = NULL;
    x.dims[x.n_dims - 1] = (int64_t)k->rows;
    status = k->api->KernelContext_GetOutput(context, 0, x.dims, x.n_dims, &out);
    if (!status) status = k->api->GetTensorMutableData(out, &data);
    if (status || job.tokens == 0) return status;
    job.out = data;
    atomic_fetch_add(&pk_count.products, 1);
    atomic_fetch_add(&pk_count.tokens, job.tokens);
    return run(&job, context);
}

// ---- what it is ----

static const char *name(const OrtCustomOp *op) {
    (void)op;
    return "MatMulNBits";
}

static int input_type(const OrtCustomOp *op, size_t i) {
    (void)op;
    return i == 1 ? ORT_UINT8 : ORT_FLOAT;
}

static size_t n_inputs(const OrtCustomOp *op) {
    (void)op;
    return 4;
}

static int input_kind(const OrtCustomOp *op, size_t i) {
    (void)op;
    return i == 3 ? ORT_OPTIONAL : ORT_REQUIRED;
}

const OrtCustomOp pk_op_linear = {
    PK_OP_OF_ONE_FLOAT_OUTPUT,
    .GetName = name,
    .GetInputType = input_type,
    .GetInputTypeCount = n_inputs,
    .GetInputCharacteristic = input_kind,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .KernelDestroy = destroy,
};
