// SPDX-License-Identifier: Apache-2.0
// matmul.h - the contract of the matrix multiplication: packed weights times packed activations.
//
//   out[t][r] = sum over k of  W[r][k] * X[t][k]                     (add == 0)
//   out[t][r] += scale * sum over k of  W[r][k] * X[t][k]            (add == 1: a LoRA's second half)
//
// Weights lie in panels of 16 rows, activations in tiles of up to 16 tokens; a lane of SIMD is a row, a register of
// sums is a token. Both are packed once (pack.h, activations.h) so that every load below is sequential.
//
// A panel of ggml's quantized types, where g, r, j say four columns 4g + j of row r, next to each other for the dot
// products of four bytes that every instruction set has. K is the number of columns; the last panel's missing rows
// are zero. A panel starts on 64 bytes and its size is rounded up to 64 (pk_panel_bytes). It is read from end to end:
// scales never lie far from what they scale, a second stream from memory costs a quarter of its speed.
//
//   Q4_0  per 256 columns, or what is left of them (n = 8 blocks of 32, or less; pk_place):
//         u8 q [n][4][16][4]      low nibble: column 4g + j of the block, high: 16 + 4g + j; value d * (q - 8)
//         f16 d [n][16]
//   Q8_0  likewise
//         s8 q [n][8][16][4]      value d * q
//         f16 d [n][16]
//   Q4_K  per 256 columns, 2368 bytes:
//         f16 d [16], f16 dmin [16], u8 s [8][16], u8 m [8][16]      value d * s * q - dmin * m, s and m per 32 columns
//         u8 q [4][8][16][4]      of columns 64p..: low nibble: 4g + j, high: 32 + 4g + j
//   Q5_K  per 256 columns, 2880 bytes: as Q4_K, then
//         u8 h [8][16][4]         bit b: bit 4 of the q of column 32b + 4g + j
//   Q6_K  two blocks of 256 columns, or the one that is left, of 3328 bytes, and behind them f16 d [n][16]:
//         s8 s [16][16]           value d * s * (q - 32), s per 16 columns
//         u8 ql [2][2][8][16][4]  [n][m]: low nibble: column 128n + 32m + 4g + j, high: 64 more
//         u8 qh [2][8][16][4]     [n]: bits 2b, 2b + 1: bits 4, 5 of the q of column 128n + 32b + 4g + j
//   F16, BF16, F32                u16 or f32 w [K][16]
//
// A tile of T tokens (16; the last one what remains) for the quantized types, per block of 32 columns, 48 T bytes:
//         s8  q [T][32]           x is about d * q, -127 <= q <= 127
//         f32 d [T]
//         s32 s8 [T]              -8 times the sum of q: what Q4_0's offset takes from a dot product
//         s32 s32 [2][T]          -32 times the sum of each half of q: Q6_K's
// The d of a token is the same in PK_SHARED_BLOCKS blocks in a row, the first of which is a multiple of that.
// and for F16, BF16 and F32:
//         f32 x [K][T]
//
// The integer dot products are exact. The float32 operations and their order are each variant's own, but fixed: the
// bits of a token's result depend neither on the other tokens nor on the split into ranges of rows and tokens.
//
// The caller guarantees: K > 0, a multiple of the type's block (32, 256; floats: 1); x and w of the layouts above;
// out overlaps neither; an out row has at least `rows` floats. A variant allocates nothing, starts no thread, keeps
// no state, writes out[t][0..rows) and nothing else, and takes any number of rows and tokens.
#ifndef PK_MATMUL_H
#define PK_MATMUL_H

#include <stddef.h>
#include <stdint.h>

#define PK_PANEL_ROWS 16
#define PK_TILE_TOKENS 16
#define PK_X_BLOCK 32        // columns that share an activation's scale
#define PK_X_BLOCK_BYTES 48  // of one token

typedef enum { PK_W_Q4_0, PK_W_Q8_0, PK_W_Q4_K, PK_W_Q5_K, PK_W_Q6_K, PK_W_F16, PK_W_BF16, PK_W_F32, PK_W_TYPES } pk_weight;

// How many blocks of activations share one scale: 32 columns for Q8_0 and 256 for the K-quants, as in ggml; 256 for
// Q4_0 too, where the columns allow it (ggml: 32).
#define PK_SHARED_BLOCKS(weight, columns) ((size_t)((weight) == PK_W_Q8_0 || (columns) % 256 ? 1 : 8))

#define PK_IS_FLOAT(weight) ((weight) >= PK_W_F16)

// Where in a panel of Q4_0, Q8_0 or Q6_K a block lies, and its scales: some blocks, then the scales of all of these.
enum { PK_Q4_0_BYTES = 256, PK_Q8_0_BYTES = 512, PK_Q6_K_BYTES = 3328, PK_SCALE_BYTES = 32 };  // of 16 rows
typedef struct {
    size_t q, d;  // bytes from the panel's start
} pk_block;

static inline pk_block pk_place(size_t block, size_t blocks, size_t block_bytes) {
    const size_t together = block_bytes == PK_Q6_K_BYTES ? 2 : 8, first = block / together * together;
    const size_t n = blocks - first < together ? blocks - first : together, i = block - first;
    const size_t at = first * (block_bytes + PK_SCALE_BYTES);
    return (pk_block){at + i * block_bytes, at + n * block_bytes + i * PK_SCALE_BYTES};
}

typedef struct {
    float *out;         // float32 [tokens, out_stride]: the first of `rows` rows of the first token
    size_t out_stride;  // in floats
    const uint8_t *w;   // the first panel of these rows
    const uint8_t *x;   // the first tile
    size_t rows, tokens;
    size_t columns;     // K
    int add;
    float scale;        // read when add is not 0
} pk_matmul_args;

typedef void (*pk_matmul_fn)(const pk_matmul_args *args);

// One row of the table: what an instruction set has. A type without a kernel of its own is NULL, and the last row
// above that has one is used.
typedef struct {
    const char *name;
    unsigned needs;                // PK_CPU_* bits
    pk_matmul_fn fn[PK_W_TYPES];
} pk_matmul_variant;

const pk_matmul_variant *pk_matmul_at(size_t i);  // slow to fast, NULL past the end: tests walk the table
pk_matmul_fn pk_matmul_best(pk_weight weight);    // the fastest that this CPU can run

#define PK_MATMUL_QUANTIZED(isa)                         \
    void pk_matmul_q4_0_##isa(const pk_matmul_args *a);  \
    void pk_matmul_q8_0_##isa(const pk_matmul_args *a);  \
    void pk_matmul_q4_k_##isa(const pk_matmul_args *a);  \
    void pk_matmul_q5_k_##isa(const pk_matmul_args *a);  \
    void pk_matmul_q6_k_##isa(const pk_matmul_args *a)
#define PK_MATMUL_MANY(isa)                                  \
    void pk_matmul_many_q4_0_##isa(const pk_matmul_args *a); \
    void pk_matmul_many_q8_0_##isa(const pk_matmul_args *a); \
    void pk_matmul_many_q4_k_##isa(const pk_matmul_args *a); \
    void pk_matmul_many_q5_k_##isa(const pk_matmul_args *a); \
    void pk_matmul_many_q6_k_##isa(const pk_matmul_args *a)
#define PK_MATMUL_FLOAT(isa)                             \
    void pk_matmul_f16_##isa(const pk_matmul_args *a);   \
    void pk_matmul_bf16_##isa(const pk_matmul_args *a);  \
    void pk_matmul_f32_##isa(const pk_matmul_args *a)

PK_MATMUL_QUANTIZED(c);  // scalar: the definition of correct
PK_MATMUL_FLOAT(c);
PK_MATMUL_QUANTIZED(avx2);
PK_MATMUL_FLOAT(avx2);
PK_MATMUL_QUANTIZED(avxvnni);
PK_MATMUL_QUANTIZED(avx512vnni);
PK_MATMUL_MANY(avx512vnni);
PK_MATMUL_FLOAT(avx512f);
PK_MATMUL_QUANTIZED(neon_dotprod);
PK_MATMUL_QUANTIZED(neon_i8mm);
PK_MATMUL_FLOAT(neon);

#endif
