// SPDX-License-Identifier: Apache-2.0
// activations.h - the contract of the activation packers: float32 rows to the tiles of matmul.h.
//
// quantize: for each `shared` blocks of 32 columns, m = the largest |x|, d = m / 127, q = x * (127 / m) rounded to
// nearest, ties to even (m == 0, or so small that 127 / m is infinite: d = 0, q = 0). All in float32: every variant
// gives the same bytes. An x that is not finite makes d NaN (7fc00000) and q 0 in all blocks of its scale: the poison
// stays visible.
// arrange: the same x, one column's tokens next to each other.
//
// One call does blocks [first, last) of one tile: columns 32 first..; arrange: the same columns, `columns` may
// end inside the last block. x: the tile's first row; rows are x_stride floats apart; tile: the tile's first byte.
// The caller guarantees: 1 <= tokens <= PK_TILE_TOKENS, first < last <= ceil(columns / 32), tile and x do not
// overlap, the tile starts on 4 bytes.
#ifndef PK_ACTIVATIONS_H
#define PK_ACTIVATIONS_H

#include "matmul.h"

typedef struct {
    uint8_t *tile;
    const float *x;     // float32 [tokens, x_stride]
    size_t x_stride;    // in floats
    size_t tokens, columns;
    size_t first, last; // blocks of 32 columns
    size_t shared;      // quantize: PK_SHARED_BLOCKS, of which first and last are multiples
} pk_activations_args;

typedef void (*pk_activations_fn)(const pk_activations_args *args);

typedef struct {
    const char *name;
    unsigned needs;  // PK_CPU_* bits
    pk_activations_fn quantize, arrange;
} pk_activations_variant;

size_t pk_tile_bytes(pk_weight weight, size_t columns, size_t tokens);  // of a tile of `tokens` tokens

const pk_activations_variant *pk_activations_at(size_t i);  // slow to fast, NULL past the end: tests walk the table
const pk_activations_variant *pk_activations_best(void);

void pk_activations_quantize_c(const pk_activations_args *args);  // scalar: the definition of correct
void pk_activations_arrange_c(const pk_activations_args *args);
void pk_activations_quantize_avx2(const pk_activations_args *args);
void pk_activations_arrange_avx2(const pk_activations_args *args);
void pk_activations_quantize_avx512f(const pk_activations_args *args);
void pk_activations_arrange_avx512f(const pk_activations_args *args);
void pk_activations_quantize_neon(const pk_activations_args *args);
void pk_activations_arrange_neon(const pk_activations_args *args);

#endif
