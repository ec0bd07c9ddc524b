// SPDX-License-Identifier: Apache-2.0
// lora.h - the contract of a LoRA's two products: out = base + x W, with W as adapters have it, [depth, columns].
//
//   out[r][c] = base[r][c] + sum over k of x[r][k] * W[k][c]
//
// in float32, whatever W is stored in. W is not packed before, because an adapter comes with the call and not with
// the weights:
//
//   few     a row of W at a time, added to the row of out: W is read once, from end to end, where rows are few
//   many    a panel of W is converted once and used for every row
//
// They differ in the order of sums alone. A variant may fuse a product with its sum. The caller guarantees: rows,
// depth, columns > 0; base is NULL (zeros), out itself, or overlaps nothing; W has the alignment of its type. A variant
// allocates nothing, keeps no state, and touches the elements named only.
#ifndef PK_LORA_H
#define PK_LORA_H

#include <stddef.h>
#include <stdint.h>

#include "pk_cpu.h"  // each variant file defines its own row

typedef enum { PK_LORA_F32, PK_LORA_F16, PK_LORA_S8 } pk_lora_type;  // float16 as bits; int8 is the number itself

// Strides are in elements, from one row to the next.
typedef struct {
    float *out;
    const float *base, *x;
    const void *w;
    size_t out_stride, base_stride, x_stride, w_stride;
    size_t rows, depth, columns;
    pk_lora_type type;  // of w
} pk_lora_args;

typedef struct {
    const char *name;
    unsigned needs;  // PK_CPU_* bits
    void (*few)(const pk_lora_args *a);
    void (*many)(const pk_lora_args *a);
} pk_lora_variant;

static inline size_t pk_lora_bytes(pk_lora_type type) {
    return type == PK_LORA_F32 ? 4 : type == PK_LORA_F16 ? 2 : 1;
}

const pk_lora_variant *pk_lora_at(size_t i);  // slow to fast, NULL past the end: tests walk the table
const pk_lora_variant *pk_lora_best(void);

extern const pk_lora_variant pk_lora_c;  // scalar: the definition of correct
extern const pk_lora_variant pk_lora_avx2;
extern const pk_lora_variant pk_lora_avx512f;

#endif
