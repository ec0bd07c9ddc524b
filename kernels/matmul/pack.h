// SPDX-License-Identifier: Apache-2.0
// pack.h - weights from ggml's rows to the panels of matmul.h, once at load, and back.
//
// A row of the source is K/32 or K/256 of ggml's blocks (little-endian), or K numbers. Panels are independent, so
// the caller may give each thread some. Unpacking gives the source's bytes back exactly: saved models and state
// are the host's own format.
//
// The caller guarantees: columns a multiple of the type's block; out and source do not overlap.
#ifndef PK_PACK_H
#define PK_PACK_H

#include "matmul.h"

size_t pk_row_bytes(pk_weight weight, size_t columns);    // of one row of the source
size_t pk_panel_bytes(pk_weight weight, size_t columns);  // of one panel, a multiple of 64

// Panels [first, last) of weights with `rows` rows. packed: the first panel of all; source: the first row of all.
void pk_pack(uint8_t *restrict packed, const uint8_t *source, pk_weight weight, size_t rows, size_t columns,
             size_t first, size_t last);
void pk_unpack(uint8_t *restrict source, const uint8_t *packed, pk_weight weight, size_t rows, size_t columns,
               size_t first, size_t last);

#endif
