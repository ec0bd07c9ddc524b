// SPDX-License-Identifier: Apache-2.0
// quantize.h - the contract of the weight quantizers: float32 to ggml's Q4_K, Q5_K and Q6_K without importances.
//
// A block holds 256 weights, in 8 sub-blocks of 32 (Q4_K, Q5_K) or 16 of 16 (Q6_K):
//
//   type   a weight               level q  of a sub-block  bytes of a block, little-endian
//   Q4_K   d * s * q - dmin * m   0..15    s, m in 6 bits  f16 d, f16 dmin, 12 of s and m, 128 of q
//   Q5_K   d * s * q - dmin * m   0..31    s, m in 6 bits  f16 d, f16 dmin, 12 of s and m, 32 of q's bit 4, 128
//   Q6_K   d * s * (q - 32)       0..63    s, int8         128 of q, 64 of q's bits 4 and 5, 16 of s, f16 d
//
// Each sub-block is fitted alone (a variant's work: nearly all of the time), then a block's scales are
// rounded and its levels chosen (pk_quantize_pack, the same for all variants).
//
// The fit of Q4_K and Q5_K: weigh each value by w = rms + |x|; for each of some ranges of levels, a little
// more or less than 0..top, round to levels, take the scale and min of least w-squared error, min not above 0;
// keep the best. A fit moves the min from which the next one's range starts.
// The fit of Q6_K: weigh by w = x^2; for each of 19 inverse scales around -32 / (the largest value), round to
// levels and take the scale of least error; keep the best.
//
// Shapes: x float32 [n_blocks, 256], out uint8 [n_blocks, PK_Q4_K_BYTES or ...].
// The caller guarantees: n_blocks > 0, every |x| <= PK_QUANTIZE_MAX (so no NaN), type is a member of
// pk_quantize_type, out and x do not overlap.
// A variant allocates nothing, starts no thread, keeps no state, takes any number of blocks, reads and
// writes nothing outside the shapes above.
//
// Every variant gives the bytes of ggml's quantize_row_q4_K_ref, _q5_K_ref and _q6_K_ref as compiled for
// x86-64: the same IEEE operations in the same order for each sub-block (SIMD puts sub-blocks in lanes, and no
// multiply-add is fused), the same ties, and the same answer where they round a number beyond 2^22.
#ifndef PK_QUANTIZE_H
#define PK_QUANTIZE_H

#include <stddef.h>
#include <stdint.h>

#define PK_QUANTIZE_BLOCK 256
#define PK_QUANTIZE_MAX 65504.0f       // the largest float16
#define PK_QUANTIZE_ZERO 1e-15f        // Q6_K: a sub-block or block whose values or scales are smaller is zero
#define PK_QUANTIZE_MAX_RANGES 21

#define PK_Q4_K_BYTES 144
#define PK_Q5_K_BYTES 176
#define PK_Q6_K_BYTES 210

// x + 1.5 * 2^23 has x, rounded to an integer with ties to even, in its low bits, whose zero is 2^22.
#define PK_QUANTIZE_ROUND 12582912.0f
#define PK_QUANTIZE_LOW 0x007fffffu
#define PK_QUANTIZE_EXPONENT 0x4b000000u  // of every float from 2^23 to 2^24

typedef enum { PK_Q4_K = 12, PK_Q5_K = 13, PK_Q6_K = 14 } pk_quantize_type;  // numbers as in GGUF

// One sub-block: x is about scale * q - min, or scale * (q - 32) for Q6_K.
// The levels that gave it: round(inverse * (x - base)), clamped. For Q6_K, inverse 0 means a zero sub-block.
typedef struct {
    float scale, min, inverse, base;
} pk_quantize_fit;

// How many ranges a fit of Q4_K or Q5_K tries after 0..top, and the length of each.
typedef struct {
    float top;                              // 15 or 31
    size_t n_ranges;
    float range[PK_QUANTIZE_MAX_RANGES];
} pk_quantize_ranges;

// quantize_pack.c: fit [8] or [16] and x [256] to the bytes of one block.
void pk_quantize_pack(uint8_t *restrict out, const float *x, const pk_quantize_fit *fit, pk_quantize_type type);
size_t pk_quantize_bytes(pk_quantize_type type);           // of a block, 0 for what is no member
void pk_quantize_set_ranges(pk_quantize_ranges *ranges, pk_quantize_type type);
void pk_quantize_set_inverses(float inverses[19]);         // Q6_K: times 1 / the largest value; the first is -32

#define PK_QUANTIZE(name) \
    void name(uint8_t *restrict out, const float *x, size_t n_blocks, pk_quantize_type type)

PK_QUANTIZE(pk_quantize_c);  // scalar: the definition of correct
PK_QUANTIZE(pk_quantize_avx2);
PK_QUANTIZE(pk_quantize_avx512f);

typedef PK_QUANTIZE((*pk_quantize_fn));
typedef struct {
    const char *name;
    unsigned needs;  // PK_CPU_* bits
    pk_quantize_fn fn;
} pk_quantize_variant;

const pk_quantize_variant *pk_quantize_at(size_t i);  // slow to fast, NULL past the end: tests walk the table
pk_quantize_fn pk_quantize_best(void);

#endif
