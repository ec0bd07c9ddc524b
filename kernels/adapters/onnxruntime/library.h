// SPDX-License-Identifier: Apache-2.0
// library.h - what the files of the library for ONNX Runtime share: the kernels chosen, counters, a tensor's shape.
//
//   library.c   RegisterCustomOps, the guard before it, the counters
//   host.c      tensors, errors and memory of ONNX Runtime's and ours
//   weights.c   MatMulNBits' blocks -> the panels of matmul.h, once, when a session is made
//   linear.c    MatMulNBits
//   gate.c      SwiGLU
//   lora.c      Lora
#ifndef PK_ORT_LIBRARY_H
#define PK_ORT_LIBRARY_H

#include <stdatomic.h>
#include <stdbool.h>

#include "abi.h"
#include "lora/lora.h"
#include "matmul/activations.h"
#include "matmul/matmul.h"
#include "matmul/pack.h"
#include "vector/vector.h"

// The fastest variants this CPU can run, chosen before the first operator is registered.
typedef struct {
    pk_matmul_fn matmul[PK_W_TYPES];
    const pk_activations_variant *activations;
    const pk_vector_variant *vector;
    const pk_lora_variant *lora;
} pk_kernels;
extern pk_kernels pk_use;

// Totals since the library was loaded: so that a test, or a user, sees that work came here.
typedef struct {
    atomic_uint_fast64_t products, tokens, gates, packed_bytes, loras;
} pk_counts;
extern pk_counts pk_count;

static inline size_t pk_divide_up(size_t a, size_t b) { return (a + b - 1) / b; }
static inline size_t pk_least(size_t a, size_t b) { return a < b ? a : b; }

extern const OrtCustomOp pk_op_linear, pk_op_gate, pk_op_lora;

// ---- host.c ----
enum { PK_MAX_DIMS = 8 };

typedef struct {
    int type;
    size_t n_dims, count;  // count: of elements
    int64_t dims[PK_MAX_DIMS];
    void *data;            // read only, unless it is an output
} pk_tensor;

OrtStatus *pk_fail(const OrtApi *api, const char *format, ...);
OrtStatus *pk_tensor_of(const OrtApi *api, const OrtValue *value, const char *what, pk_tensor *out);
OrtStatus *pk_input(const OrtApi *api, const OrtKernelContext *context, size_t i, const char *what, pk_tensor *out);

// What our operators have in common.
const char *pk_op_provider(const OrtCustomOp *op);
int pk_op_output_type(const OrtCustomOp *op, size_t i);
size_t pk_op_n_outputs(const OrtCustomOp *op);
int pk_op_output_kind(const OrtCustomOp *op, size_t i);
int pk_op_memory(const OrtCustomOp *op, size_t i);
int pk_op_since(const OrtCustomOp *op);
int pk_op_until(const OrtCustomOp *op);
// Makes a kernel that is the host's table alone, a `const OrtApi *`, to be freed with free().
OrtStatus *pk_op_keep_api(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
#define PK_OP_OF_ONE_FLOAT_OUTPUT                                                                                      \
    .version = PK_ORT_API, .GetExecutionProviderType = pk_op_provider, .GetOutputType = pk_op_output_type,              \
    .GetOutputTypeCount = pk_op_n_outputs, .GetOutputCharacteristic = pk_op_output_kind,                                \
    .GetInputMemoryType = pk_op_memory, .GetStartVersion = pk_op_since, .GetEndVersion = pk_op_until

// Memory of at least n bytes, from 64 on, for one call: the last such memory, where nobody else has it. NULL: none.
typedef struct pk_scratch pk_scratch;
pk_scratch *pk_scratch_take(size_t n);
uint8_t *pk_scratch_bytes(pk_scratch *scratch);
void pk_scratch_give(pk_scratch *scratch);
void pk_scratch_free(void);  // what is kept

// ---- weights.c ----
// Panels of `weight` (Q4_0 or Q8_0) from MatMulNBits' blocks of 32 and their scales, to be freed with free(). An error
// when a scale is no float16, or there is no memory.
OrtStatus *pk_pack_blocks(const OrtApi *api, pk_weight weight, size_t rows, size_t columns, const uint8_t *blocks,
                          const float *scales, uint8_t **packed);

#endif
