// SPDX-License-Identifier: Apache-2.0
// host.c - tensors and errors as ONNX Runtime has them, and memory that is used again from one call to the next.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "library.h"

OrtStatus *pk_fail(const OrtApi *api, const char *format, ...) {
    char message[256];
    va_list args;
    va_start(args, format);
    (void)vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

// Fills all of `out` but its data.
static OrtStatus *shape_of(const OrtApi *api, const OrtTensorInfo *info, const char *what, pk_tensor *out) {
    OrtStatus *status = api->GetTensorElementType(info, &out->type);
    if (!status) status = api->GetDimensionsCount(info, &out->n_dims);
    if (status) return status;
    if (out->n_dims > PK_MAX_DIMS) {
        return pk_fail(api, "%s has %zu dimensions, expected up to %d", what, out->n_dims, PK_MAX_DIMS);
    }
    status = api->GetDimensions(info, out->dims, out->n_dims);
    out->count = 1;
    for (size_t i = 0; !status && i < out->n_dims; i++) out->count *= (size_t)out->dims[i];  // it is in memory: no overflow
    return status;
}

OrtStatus *pk_tensor_of(const OrtApi *api, const OrtValue *value, const char *what, pk_tensor *out) {
    OrtTensorInfo *info = NULL;
    OrtStatus *status = api->GetTensorTypeAndShape(value, &info);
    if (status) return status;
    status = shape_of(api, info, what, out);
    api->ReleaseTensorTypeAndShapeInfo(info);
    return status ? status : api->GetTensorMutableData(value, &out->data);
}

OrtStatus *pk_input(const OrtApi *api, const OrtKernelContext *context, size_t i, const char *what, pk_tensor *out) {
    const OrtValue *value = NULL;
    OrtStatus *status = api->KernelContext_GetInput(context, i, &value);
    if (status) return status;
    return value ? pk_tensor_of(api, value, what, out) : pk_fail(api, "%s is missing", what);
}

// ---- what our operators have in common ----

const char *pk_op_provider(const OrtCustomOp *op) {
    (void)op;
    return NULL;
}

int pk_op_output_type(const OrtCustomOp *op, size_t i) {
    (void)op;
    (void)i;
    return ORT_FLOAT;
}

size_t pk_op_n_outputs(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

int pk_op_output_kind(const OrtCustomOp *op, size_t i) {
    (void)op;
    (void)i;
    return ORT_REQUIRED;
}

int pk_op_memory(const OrtCustomOp *op, size_t i) {
    (void)op;
    (void)i;
    return 0;  // OrtMemTypeDefault
}

int pk_op_since(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

int pk_op_until(const OrtCustomOp *op) {
    (void)op;
    return INT32_MAX;
}

OrtStatus *pk_op_keep_api(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    (void)info;
    const OrtApi **own = malloc(sizeof *own);
    if (!own) return pk_fail(api, "Failed to allocate a %s", op->GetName(op));
    *own = api;
    *kernel = own;
    return NULL;
}

// ---- memory for one call ----

struct pk_scratch {
    size_t size;  // of the bytes that follow from 64 on
};

static _Atomic(pk_scratch *) kept;  // by whoever gave last; NULL while a call has it

pk_scratch *pk_scratch_take(size_t n) {
    pk_scratch *scratch = atomic_exchange(&kept, NULL);
    if (scratch && scratch->size >= n) return scratch;
    free(scratch);
    const size_t bytes = pk_divide_up(n, 64) * 64;
    scratch = aligned_alloc(64, 64 + bytes);
    if (scratch) scratch->size = bytes;
    return scratch;
}

uint8_t *pk_scratch_bytes(pk_scratch *scratch) { return (uint8_t *)scratch + 64; }

void pk_scratch_give(pk_scratch *scratch) { free(atomic_exchange(&kept, scratch)); }

void pk_scratch_free(void) { free(atomic_exchange(&kept, NULL)); }
