// SPDX-License-Identifier: Apache-2.0
// gate.c - SwiGLU: silu(gate) * up in one pass. Input float32 [.., 2 D], gate first; output float32 [.., D].
#include <stdlib.h>

#include "library.h"

enum { UNIT = 4096 };  // numbers of an output row

typedef struct {
    const float *x;
    float *out;
    size_t columns, chunks;  // D; units of a row
} gate_job;

static void gate_unit(void *data, size_t unit) {
    const gate_job *j = data;
    const size_t row = unit / j->chunks, first = unit % j->chunks * UNIT;
    const float *gate = j->x + 2 * row * j->columns + first;
    pk_use.vector->swiglu(j->out + row * j->columns + first, gate, gate + j->columns,
                          pk_least(UNIT, j->columns - first));
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    const OrtApi *api = *(const OrtApi **)kernel;
    pk_tensor x;
    OrtStatus *status = pk_input(api, context, 0, "SwiGLU's input", &x);
    if (status) return status;
    const int64_t both = x.n_dims ? x.dims[x.n_dims - 1] : 0;
    if (x.type != ORT_FLOAT || both < 2 || both % 2) {
        return pk_fail(api, "SwiGLU: the last dimension is %lld, type %d, expected an even one of float32",
                       (long long)both, x.type);
    }
    gate_job job = {.x = x.data, .columns = (size_t)both / 2};
    OrtValue *out = NULL;
    void *data = NULL;
    x.dims[x.n_dims - 1] = both / 2;
    status = api->KernelContext_GetOutput(context, 0, x.dims, x.n_dims, &out);
    if (!status) status = api->GetTensorMutableData(out, &data);
    if (status || x.count == 0) return status;
    job.out = data;
    job.chunks = pk_divide_up(job.columns, UNIT);
    atomic_fetch_add(&pk_count.gates, 1);
    return api->KernelContext_ParallelFor(context, gate_unit, x.count / (size_t)both * job.chunks, 0, &job);
}

static const char *name(const OrtCustomOp *op) {
    (void)op;
    return "SwiGLU";
}

static int input_type(const OrtCustomOp *op, size_t i) {
    (void)op;
    (void)i;
    return ORT_FLOAT;
}

static size_t n_inputs(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

static int input_kind(const OrtCustomOp *op, size_t i) {
    (void)op;
    (void)i;
    return ORT_REQUIRED;
}

const OrtCustomOp pk_op_gate = {
    PK_OP_OF_ONE_FLOAT_OUTPUT,
    .GetName = name,
    .GetInputType = input_type,
    .GetInputTypeCount = n_inputs,
    .GetInputCharacteristic = input_kind,
    .CreateKernelV2 = pk_op_keep_api,
    .KernelComputeV2 = compute,
    .KernelDestroy = free,
};
