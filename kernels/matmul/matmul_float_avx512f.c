// SPDX-License-Identifier: Apache-2.0
// matmul_float_avx512f.c - float16, bfloat16 and float32 weights with AVX-512: a register is one column of 16
// rows.
//
// Nothing is rounded but the float32 sums: weights are widened exactly, activations stay as they are. A token's
// sum runs over the even and the odd columns apart, added at the end: one token alone would wait for each addition.
#if !defined(__AVX512F__)
#error "compile with -mavx512f"
#endif
#include <immintrin.h>

#include "matmul.h"

#define INLINE static inline __attribute__((always_inline))

INLINE __m512 column(const uint8_t *panel, size_t k, pk_weight weight) {
    if (weight == PK_W_F32) return _mm512_loadu_ps((const float *)(const void *)panel + k * PK_PANEL_ROWS);
    const __m256i half = _mm256_loadu_si256((const void *)(panel + k * PK_PANEL_ROWS * 2));
    if (weight == PK_W_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// One column onto one chain of sums.
INLINE void onto(__m512 *chain, __m512 w, const float *x, size_t n) {
#pragma GCC unroll 8
    for (size_t t = 0; t < n; t++) chain[t] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[t]), chain[t]);
}

// One panel times n tokens of a tile of `tile`; n and weight are constants wherever this is inlined.
INLINE void tokens(__m512 *sum, const uint8_t *panel, const float *x, size_t tile, size_t n, size_t columns,
                   pk_weight weight) {
    __m512 even[8], odd[8];
#pragma GCC unroll 8
    for (size_t t = 0; t < n; t++) even[t] = odd[t] = _mm512_setzero_ps();
    size_t k = 0;
    for (; k + 2 <= columns; k += 2) {
        onto(even, column(panel, k, weight), x + k * tile, n);
        onto(odd, column(panel, k + 1, weight), x + (k + 1) * tile, n);
    }
    if (k < columns) onto(even, column(panel, k, weight), x + k * tile, n);
#pragma GCC unroll 8
    for (size_t t = 0; t < n; t++) sum[t] = _mm512_add_ps(even[t], odd[t]);
}

INLINE void store(const pk_matmul_args *a, const __m512 *sum, size_t row, size_t token, size_t n) {
    const size_t left = a->rows - row;
    const __mmask16 rows = (__mmask16)(left < PK_PANEL_ROWS ? (1u << left) - 1 : 0xffffu);
    for (size_t t = 0; t < n; t++) {
        float *out = a->out + (token + t) * a->out_stride + row;
        __m512 v = sum[t];
        if (a->add) v = _mm512_fmadd_ps(v, _mm512_set1_ps(a->scale), _mm512_maskz_loadu_ps(rows, out));
        _mm512_mask_storeu_ps(out, rows, v);
    }
}

#define PIECE(n)                                                 \
    for (; tile - t0 >= (n); t0 += (n)) {                        \
        __m512 sum[n];                                           \
        tokens(sum, panel, x + t0, tile, n, a->columns, weight); \
        store(a, sum, row, token + t0, n);                       \
    }

INLINE void matmul(const pk_matmul_args *a, pk_weight weight) {
    const size_t bytes = a->columns * PK_PANEL_ROWS * (weight == PK_W_F32 ? 4 : 2),
                 panel_size = (bytes + 63) / 64 * 64;
    const uint8_t *panel = a->w;
    for (size_t row = 0; row < a->rows; row += PK_PANEL_ROWS, panel += panel_size) {
        const float *x = (const float *)(const void *)a->x;
        for (size_t token = 0; token < a->tokens; token += PK_TILE_TOKENS) {
            const size_t left = a->tokens - token, tile = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS;
            size_t t0 = 0;
            PIECE(8)
            PIECE(4)
            PIECE(2)
            PIECE(1)
            x += tile * a->columns;
        }
    }
}

void pk_matmul_f16_avx512f(const pk_matmul_args *a) { matmul(a, PK_W_F16); }
void pk_matmul_bf16_avx512f(const pk_matmul_args *a) { matmul(a, PK_W_BF16); }
void pk_matmul_f32_avx512f(const pk_matmul_args *a) { matmul(a, PK_W_F32); }
