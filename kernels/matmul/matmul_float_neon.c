// SPDX-License-Identifier: Apache-2.0
// matmul_float_neon.c - float16, bfloat16 and float32 weights with NEON: a register is four rows of one
// token.
//
// A column of weights is converted once for up to 8 tokens, whose x is taken by lane. 16 registers hold sums:
// 8 rows times 8 tokens or 16 rows times 4 tokens; fewer tokens use fewer. Every way adds the columns in
// order, one FMA each.
#if !defined(__aarch64__)
#error "AArch64 only"
#endif
#include <arm_neon.h>
#include <math.h>

#include "matmul.h"

#define INLINE static inline __attribute__((always_inline))
enum { ROWS = PK_PANEL_ROWS };

INLINE size_t bytes_of(pk_weight type) { return type == PK_W_F32 ? 4 : 2; }

// Eight rows of one column.
INLINE void load(float32x4_t *restrict to, pk_weight type, const uint8_t *w) {
    if (type == PK_W_F32) {
        to[0] = vreinterpretq_f32_u8(vld1q_u8(w));
        to[1] = vreinterpretq_f32_u8(vld1q_u8(w + 16));
    } else if (type == PK_W_F16) {
        const float16x8_t both = vreinterpretq_f16_u8(vld1q_u8(w));
        to[0] = vcvt_f32_f16(vget_low_f16(both));
        to[1] = vcvt_high_f32_f16(both);
    } else {
        const uint16x8_t both = vreinterpretq_u16_u8(vld1q_u8(w));
        to[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(both), 16));
        to[1] = vreinterpretq_f32_u32(vshll_high_n_u16(both, 16));
    }
}

INLINE float32x4_t tokens_at(const float *x, size_t tokens) {
    if (tokens == 1) return vdupq_n_f32(x[0]);
    if (tokens == 2) return vcombine_f32(vld1_f32(x), vdup_n_f32(0.0f));
    return vld1q_f32(x);
}

// All columns of 4 * quads rows and of some tokens: sums [tokens][16]. type, tokens and quads are constants.
// w: the first of these rows, x: the first of these tokens, in a tile of `tile`.
INLINE void multiply_part(float *restrict sums, pk_weight type, size_t tokens, size_t quads, const uint8_t *w,
                          const float *x, size_t columns, size_t tile) {
    float32x4_t sum[16];
#pragma GCC unroll 16
    for (size_t i = 0; i < tokens * quads; i++) sum[i] = vdupq_n_f32(0.0f);
    for (size_t k = 0; k < columns; k++, w += ROWS * bytes_of(type), x += tile) {
        float32x4_t row[4], token[2];
#pragma GCC unroll 2
        for (size_t i = 0; i < quads; i += 2) load(row + i, type, w + 4 * i * bytes_of(type));
#pragma GCC unroll 2
        for (size_t t = 0; t < tokens; t += 4) token[t / 4] = tokens_at(x + t, tokens);
#pragma GCC unroll 8
        for (size_t t = 0; t < tokens; t++) {
#pragma GCC unroll 4
            for (size_t i = 0; i < quads; i++) {
                sum[t * quads + i] = vfmaq_n_f32(sum[t * quads + i], row[i], token[t / 4][t % 4]);
            }
        }
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < tokens * quads; i++) vst1q_f32(sums + i / quads * ROWS + i % quads * 4, sum[i]);
}

INLINE void multiply_tile(float *restrict sums, pk_weight type, const uint8_t *w, const float *x,
                          size_t columns, size_t tile) {
    size_t t = 0;
    for (; t + 8 <= tile; t += 8) {
        multiply_part(sums + t * ROWS, type, 8, 2, w, x + t, columns, tile);
        multiply_part(sums + t * ROWS + 8, type, 8, 2, w + 8 * bytes_of(type), x + t, columns, tile);
    }
    if (t + 4 <= tile) {
        multiply_part(sums + t * ROWS, type, 4, 4, w, x + t, columns, tile);
        t += 4;
    }
    if (t + 2 <= tile) {
        multiply_part(sums + t * ROWS, type, 2, 4, w, x + t, columns, tile);
        t += 2;
    }
    if (t < tile) multiply_part(sums + t * ROWS, type, 1, 4, w, x + t, columns, tile);
}

static void store(const pk_matmul_args *a, const float *sums, size_t row, size_t token, size_t tile) {
    const size_t left = a->rows - row, rows = left < ROWS ? left : ROWS;
    for (size_t t = 0; t < tile; t++, sums += ROWS) {
        float *out = a->out + (token + t) * a->out_stride + row;
        for (size_t r = 0; r < rows; r++) out[r] = a->add ? fmaf(a->scale, sums[r], out[r]) : sums[r];
    }
}

INLINE void multiply(const pk_matmul_args *a, pk_weight type) {
    const size_t panel_bytes = (a->columns * ROWS * bytes_of(type) + 63) / 64 * 64;
    const uint8_t *panel = a->w;
    for (size_t row = 0; row < a->rows; row += ROWS, panel += panel_bytes) {
        const float *x = (const float *)(const void *)a->x;
        for (size_t token = 0; token < a->tokens; token += PK_TILE_TOKENS) {
            const size_t left = a->tokens - token, tile = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS;
            _Alignas(64) float sums[PK_TILE_TOKENS * ROWS];
            multiply_tile(sums, type, panel, x, a->columns, tile);
            store(a, sums, row, token, tile);
            x += a->columns * tile;
        }
    }
}

void pk_matmul_f16_neon(const pk_matmul_args *a) { multiply(a, PK_W_F16); }
void pk_matmul_bf16_neon(const pk_matmul_args *a) { multiply(a, PK_W_BF16); }
void pk_matmul_f32_neon(const pk_matmul_args *a) { multiply(a, PK_W_F32); }
