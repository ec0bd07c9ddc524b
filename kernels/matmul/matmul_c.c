// SPDX-License-Identifier: Apache-2.0
// matmul_c.c - scalar reference of the quantized types. Clear first; it is also the fallback.
//
// A block of 32 columns of a panel is unpacked once for all tokens of a tile; compilers can vectorise the
// loops over 16 rows.
#include <string.h>

#include "matmul.h"
#include "pk_fp16.h"

enum { ROWS = PK_PANEL_ROWS, GROUPS = PK_X_BLOCK / 4 };
enum { Q4_K_BYTES = 2368, Q5_K_BYTES = 2880 };  // of 256 columns of a panel

// 32 columns of 16 rows: levels as stored, without their offset; d holds every factor but the activation's.
typedef struct {
    int8_t q[GROUPS][ROWS][4];
    float d[2][ROWS];  // of columns 0-15 and 16-31: the same but for Q6_K
    float min[ROWS];   // Q4_K, Q5_K: dmin * m
} block_w;

// 32 columns of one token.
typedef struct {
    int8_t q[PK_X_BLOCK];
    float d;
    int32_t s8, s32[2];
} block_x;

typedef void (*unpack_fn)(block_w *restrict to, const uint8_t *panel, size_t columns, size_t block);

static float half_at(const uint8_t *p, size_t i) {
    uint16_t bits;
    memcpy(&bits, p + 2 * i, sizeof bits);
    return pk_from_fp16(bits);
}

static void scale_rows(block_w *restrict to, const uint8_t *halves) {
    for (size_t r = 0; r < ROWS; r++) to->d[0][r] = to->d[1][r] = half_at(halves, r);
}

static void unpack_q4_0(block_w *restrict to, const uint8_t *panel, size_t columns, size_t block) {
    const pk_block at = pk_place(block, columns / PK_X_BLOCK, PK_Q4_0_BYTES);
    const uint8_t *q = panel + at.q;
    int8_t *low = to->q[0][0], *high = to->q[GROUPS / 2][0];
    for (size_t i = 0; i < 256; i++) {
        low[i] = (int8_t)(q[i] & 15);
        high[i] = (int8_t)(q[i] >> 4);
    }
    scale_rows(to, panel + at.d);
}

static void unpack_q8_0(block_w *restrict to, const uint8_t *panel, size_t columns, size_t block) {
    const pk_block at = pk_place(block, columns / PK_X_BLOCK, PK_Q8_0_BYTES);
    memcpy(to->q, panel + at.q, sizeof to->q);
    scale_rows(to, panel + at.d);
}

// Block i of 8 in 256 columns whose bytes begin at p.
static void unpack_with_min(block_w *restrict to, const uint8_t *p, size_t i) {
    const uint8_t *s = p + 64 + 16 * i, *m = p + 192 + 16 * i, *q = p + 320 + i / 2 * 512;
    for (size_t r = 0; r < ROWS; r++) {
        to->d[0][r] = to->d[1][r] = half_at(p, r) * (float)s[r];
        to->min[r] = half_at(p + 32, r) * (float)m[r];
    }
    int8_t *level = to->q[0][0];
    for (size_t j = 0; j < 512; j++) level[j] = (int8_t)(i % 2 ? q[j] >> 4 : q[j] & 15);
}

static void unpack_q4_k(block_w *restrict to, const uint8_t *panel, size_t columns, size_t block) {
    (void)columns;
    unpack_with_min(to, panel + block / 8 * Q4_K_BYTES, block % 8);
}

static void unpack_q5_k(block_w *restrict to, const uint8_t *panel, size_t columns, size_t block) {
    (void)columns;
    const uint8_t *p = panel + block / 8 * Q5_K_BYTES, *h = p + 320 + 2048;
    unpack_with_min(to, p, block % 8);
    int8_t *level = to->q[0][0];
    for (size_t j = 0; j < 512; j++) level[j] = (int8_t)(level[j] | (h[j] >> block % 8 & 1) << 4);
}

static void unpack_q6_k(block_w *restrict to, const uint8_t *panel, size_t columns, size_t block) {
    const size_t n = block % 8 / 4, b = block % 4;  // which 128 columns, which 32 of them
    const pk_block at = pk_place(block / 8, columns / 256, PK_Q6_K_BYTES);
    const uint8_t *p = panel + at.q, *s = p + 32 * (block % 8), *d = panel + at.d;
    const uint8_t *ql = p + 256 + (2 * n + b % 2) * 512, *qh = p + 256 + 2048 + 512 * n;
    for (size_t half = 0; half < 2; half++) {
        for (size_t r = 0; r < ROWS; r++) to->d[half][r] = half_at(d, r) * (float)(int8_t)s[ROWS * half + r];
    }
    int8_t *level = to->q[0][0];
    for (size_t j = 0; j < 512; j++) {
        level[j] = (int8_t)((b / 2 ? ql[j] >> 4 : ql[j] & 15) | (qh[j] >> 2 * b & 3) << 4);
    }
}

static block_x x_at(const uint8_t *x, size_t block, size_t tile, size_t t) {
    const uint8_t *p = x + block * tile * PK_X_BLOCK_BYTES;
    block_x at;
    memcpy(at.q, p + 32 * t, sizeof at.q);
    memcpy(&at.d, p + 32 * tile + 4 * t, sizeof at.d);
    memcpy(&at.s8, p + 36 * tile + 4 * t, sizeof at.s8);
    memcpy(&at.s32[0], p + 40 * tile + 4 * t, sizeof at.s32[0]);
    memcpy(&at.s32[1], p + 44 * tile + 4 * t, sizeof at.s32[1]);
    return at;
}

// Of 16 columns. At most 16 * 128 * 127, so exact in int32, and the sum of two is in float.
static void dots(int32_t *restrict dot, const int8_t (*q)[ROWS][4], const int8_t *x) {
    for (size_t r = 0; r < ROWS; r++) dot[r] = 0;
    for (size_t g = 0; g < GROUPS / 2; g++) {
        for (size_t r = 0; r < ROWS; r++) {
            for (size_t j = 0; j < 4; j++) dot[r] += q[g][r][j] * x[4 * g + j];
        }
    }
}

static void add_block(float *restrict sum, const block_w *w, const block_x *x, pk_weight weight) {
    int32_t a[ROWS], b[ROWS];
    dots(a, w->q, x->q);
    dots(b, w->q + GROUPS / 2, x->q + PK_X_BLOCK / 2);
    if (weight == PK_W_Q6_K) {
        for (size_t r = 0; r < ROWS; r++) {
            sum[r] += w->d[0][r] * x->d * (float)(a[r] + x->s32[0]);
            sum[r] += w->d[1][r] * x->d * (float)(b[r] + x->s32[1]);
        }
    } else if (weight == PK_W_Q4_K || weight == PK_W_Q5_K) {
        const float x_sum = (float)x->s8 * -0.125f;  // exact
        for (size_t r = 0; r < ROWS; r++) {
            sum[r] += x->d * (w->d[0][r] * (float)(a[r] + b[r]) - w->min[r] * x_sum);
        }
    } else {
        const int32_t start = weight == PK_W_Q4_0 ? x->s8 : 0;
        for (size_t r = 0; r < ROWS; r++) sum[r] += w->d[0][r] * x->d * (float)(a[r] + b[r] + start);
    }
}

static void store(const pk_matmul_args *a, const float *sum, size_t row, size_t token) {
    float *out = a->out + token * a->out_stride + row;
    const size_t rows = a->rows - row < ROWS ? a->rows - row : ROWS;
    for (size_t r = 0; r < rows; r++) out[r] = a->add ? out[r] + a->scale * sum[r] : sum[r];
}

static void multiply(const pk_matmul_args *a, size_t panel_bytes, pk_weight weight, unpack_fn unpack) {
    const size_t blocks = a->columns / PK_X_BLOCK;
    const uint8_t *panel = a->w;
    for (size_t row = 0; row < a->rows; row += ROWS, panel += (panel_bytes + 63) / 64 * 64) {
        const uint8_t *x = a->x;
        for (size_t token = 0; token < a->tokens; token += PK_TILE_TOKENS) {
            const size_t left = a->tokens - token, tile = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS;
            float sum[PK_TILE_TOKENS][ROWS] = {{0.0f}};
            for (size_t b = 0; b < blocks; b++) {
                block_w w;
                unpack(&w, panel, a->columns, b);
                for (size_t t = 0; t < tile; t++) {
                    const block_x at = x_at(x, b, tile, t);
                    add_block(sum[t], &w, &at, weight);
                }
            }
            for (size_t t = 0; t < tile; t++) store(a, sum[t], row, token + t);
            x += blocks * tile * PK_X_BLOCK_BYTES;
        }
    }
}

void pk_matmul_q4_0_c(const pk_matmul_args *a) {
    multiply(a, a->columns / 32 * (PK_Q4_0_BYTES + PK_SCALE_BYTES), PK_W_Q4_0, unpack_q4_0);
}

void pk_matmul_q8_0_c(const pk_matmul_args *a) {
    multiply(a, a->columns / 32 * (PK_Q8_0_BYTES + PK_SCALE_BYTES), PK_W_Q8_0, unpack_q8_0);
}

void pk_matmul_q4_k_c(const pk_matmul_args *a) {
    multiply(a, a->columns / 256 * Q4_K_BYTES, PK_W_Q4_K, unpack_q4_k);
}

void pk_matmul_q5_k_c(const pk_matmul_args *a) {
    multiply(a, a->columns / 256 * Q5_K_BYTES, PK_W_Q5_K, unpack_q5_k);
}

void pk_matmul_q6_k_c(const pk_matmul_args *a) {
    multiply(a, a->columns / 256 * (PK_Q6_K_BYTES + PK_SCALE_BYTES), PK_W_Q6_K, unpack_q6_k);
}
