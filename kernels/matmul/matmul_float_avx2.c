// SPDX-License-Identifier: Apache-2.0
// matmul_float_avx2.c - float weights with AVX2: two registers are one column of a panel's 16 rows.
//
// Up to 6 tokens keep their 12 registers of sums while a panel's columns pass: one multiply-add a column, in
// order, however many tokens there are.
// Needs AVX2, FMA and F16C; CMake compiles this one file with -mavx2 -mfma -mf16c.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif
#include <immintrin.h>
#include <string.h>

#include "matmul.h"

#define INLINE static inline __attribute__((always_inline))

enum { ROWS = PK_PANEL_ROWS, TOKENS = 6 };

// One panel and `n` tokens of one tile, from token t0 on.
typedef struct {
    float *sum;  // [n][16], of token t0
    const uint8_t *panel;
    const float *x;  // [columns][tile], token t0
    size_t tile, columns;
} part;

// Eight weights from number i on.
INLINE __m256 weights(const uint8_t *panel, size_t i, pk_weight type) {
    if (type == PK_W_F32) return _mm256_loadu_ps((const float *)(const void *)panel + i);
    const __m128i bits = _mm_loadu_si128((const void *)(panel + 2 * i));
    if (type == PK_W_F16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// n and type are constants wherever this is inlined: the sums stay in registers.
INLINE void multiply_n(const part *p, size_t n, pk_weight type) {
    __m256 a[TOKENS], b[TOKENS];
    const float *x = p->x;
    for (size_t t = 0; t < n; t++) a[t] = b[t] = _mm256_setzero_ps();
    for (size_t k = 0; k < p->columns; k++, x += p->tile) {
        const __m256 w0 = weights(p->panel, ROWS * k, type), w1 = weights(p->panel, ROWS * k + 8, type);
        for (size_t t = 0; t < n; t++) {
            const __m256 xt = _mm256_broadcast_ss(x + t);
            a[t] = _mm256_fmadd_ps(w0, xt, a[t]);
            b[t] = _mm256_fmadd_ps(w1, xt, b[t]);
        }
    }
    for (size_t t = 0; t < n; t++) {
        _mm256_storeu_ps(p->sum + ROWS * t, a[t]);
        _mm256_storeu_ps(p->sum + ROWS * t + 8, b[t]);
    }
}

INLINE void multiply_part(const part *p, size_t n, pk_weight type) {
    switch (n) {
        case 1: multiply_n(p, 1, type); break;
        case 2: multiply_n(p, 2, type); break;
        case 3: multiply_n(p, 3, type); break;
        case 4: multiply_n(p, 4, type); break;
        case 5: multiply_n(p, 5, type); break;
        default: multiply_n(p, TOKENS, type); break;
    }
}

static void store(const pk_matmul_args *a, const float *sum, size_t row, size_t token) {
    float *out = a->out + token * a->out_stride + row, before[ROWS] = {0.0f}, after[ROWS];
    const size_t rows = a->rows - row < ROWS ? a->rows - row : ROWS;
    if (a->add) memcpy(before, out, rows * sizeof *out);
    for (size_t r = 0; r < ROWS; r += 8) {
        __m256 v = _mm256_loadu_ps(sum + r);
        if (a->add) v = _mm256_fmadd_ps(v, _mm256_set1_ps(a->scale), _mm256_loadu_ps(before + r));
        _mm256_storeu_ps(after + r, v);
    }
    memcpy(out, after, rows * sizeof *out);
}

INLINE void multiply(const pk_matmul_args *a, pk_weight type) {
    const size_t panel_bytes = (a->columns * ROWS * (type == PK_W_F32 ? 4 : 2) + 63) / 64 * 64;
    const uint8_t *panel = a->w;
    for (size_t row = 0; row < a->rows; row += ROWS, panel += panel_bytes) {
        const float *x = (const float *)(const void *)a->x;
        for (size_t token = 0; token < a->tokens; token += PK_TILE_TOKENS) {
            const size_t left = a->tokens - token, tile = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS;
            float sum[PK_TILE_TOKENS * ROWS];
            for (size_t t = 0; t < tile; t += TOKENS) {
                const part p = {sum + ROWS * t, panel, x + t, tile, a->columns};
                multiply_part(&p, tile - t < TOKENS ? tile - t : TOKENS, type);
            }
            for (size_t t = 0; t < tile; t++) store(a, sum + ROWS * t, row, token + t);
            x += a->columns * tile;
        }
    }
}

void pk_matmul_f16_avx2(const pk_matmul_args *a) { multiply(a, PK_W_F16); }
void pk_matmul_bf16_avx2(const pk_matmul_args *a) { multiply(a, PK_W_BF16); }
void pk_matmul_f32_avx2(const pk_matmul_args *a) { multiply(a, PK_W_F32); }
