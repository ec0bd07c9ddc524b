// SPDX-License-Identifier: Apache-2.0
// matmul_float_c.c - scalar reference of the float types. Clear first; it is also the fallback.
#include <string.h>

#include "matmul.h"
#include "pk_fp16.h"

enum { ROWS = PK_PANEL_ROWS };

// Column k of a panel.
typedef void (*unpack_fn)(float *restrict to, const uint8_t *panel, size_t k);

static void unpack_f16(float *restrict to, const uint8_t *panel, size_t k) {
    uint16_t bits[ROWS];
    memcpy(bits, panel + k * sizeof bits, sizeof bits);
    for (size_t r = 0; r < ROWS; r++) to[r] = pk_from_fp16(bits[r]);
}

static void unpack_bf16(float *restrict to, const uint8_t *panel, size_t k) {
    uint16_t high[ROWS];
    uint32_t bits[ROWS];
    memcpy(high, panel + k * sizeof high, sizeof high);
    for (size_t r = 0; r < ROWS; r++) bits[r] = (uint32_t)high[r] << 16;
    memcpy(to, bits, sizeof bits);
}

static void unpack_f32(float *restrict to, const uint8_t *panel, size_t k) {
    memcpy(to, panel + k * ROWS * sizeof *to, ROWS * sizeof *to);
}

static void store(const pk_matmul_args *a, const float *sum, size_t row, size_t token) {
    float *out = a->out + token * a->out_stride + row;
    const size_t rows = a->rows - row < ROWS ? a->rows - row : ROWS;
    for (size_t r = 0; r < rows; r++) out[r] = a->add ? out[r] + a->scale * sum[r] : sum[r];
}

static void multiply(const pk_matmul_args *a, size_t weight_bytes, unpack_fn unpack) {
    const size_t panel_bytes = (a->columns * ROWS * weight_bytes + 63) / 64 * 64;
    const uint8_t *panel = a->w;
    for (size_t row = 0; row < a->rows; row += ROWS, panel += panel_bytes) {
        const uint8_t *x = a->x;
        for (size_t token = 0; token < a->tokens; token += PK_TILE_TOKENS) {
            const size_t left = a->tokens - token, tile = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS;
            float sum[PK_TILE_TOKENS][ROWS] = {{0.0f}};
            for (size_t k = 0; k < a->columns; k++) {
                float w[ROWS], xk[PK_TILE_TOKENS];
                unpack(w, panel, k);
                memcpy(xk, x + k * tile * sizeof *xk, tile * sizeof *xk);
                for (size_t t = 0; t < tile; t++) {
                    for (size_t r = 0; r < ROWS; r++) sum[t][r] += w[r] * xk[t];
                }
            }
            for (size_t t = 0; t < tile; t++) store(a, sum[t], row, token + t);
            x += a->columns * tile * sizeof(float);
        }
    }
}

void pk_matmul_f16_c(const pk_matmul_args *a) { multiply(a, 2, unpack_f16); }
void pk_matmul_bf16_c(const pk_matmul_args *a) { multiply(a, 2, unpack_bf16); }
void pk_matmul_f32_c(const pk_matmul_args *a) { multiply(a, 4, unpack_f32); }
