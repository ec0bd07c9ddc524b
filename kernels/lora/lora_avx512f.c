// SPDX-License-Identifier: Apache-2.0
// lora_avx512f.c - sixteen columns at once; the last ones by way of a buffer.
// Needs AVX-512F (which brings F16C's conversion); CMake compiles this one file with -mavx512f.
#if !defined(__AVX512F__)
#error "compile with -mavx512f"
#endif
#include <immintrin.h>
#include <string.h>

#include "lora.h"

#define INLINE static inline __attribute__((always_inline))  // a tile's sums must stay in registers

enum {
    LANES = 16,
    GROUP = 8,     // rows of W between a load and a store of out
    PANEL = 32,    // columns of a tile: 12 rows of 2 registers are 24 sums
    TILE_ROWS = 12,
    DEPTH = 384,   // of a panel: 48 KB, and no LoRA of Phi-4 is deeper
};

// 16 columns of W.
INLINE __m512 load(const uint8_t *w, pk_lora_type type) {
    if (type == PK_LORA_F32) return _mm512_loadu_ps(w);
    if (type == PK_LORA_F16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)w));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
}

// n < 16 of them, and zeros.
INLINE __m512 load_some(const uint8_t *w, size_t n, pk_lora_type type) {
    uint8_t buffer[LANES * sizeof(float)] = {0};
    memcpy(buffer, w, n * pk_lora_bytes(type));
    return load(buffer, type);
}

INLINE __mmask16 first(size_t n) { return (__mmask16)(n < LANES ? (1u << n) - 1 : 0xffffu); }

// out += x W, for `depth` rows of W, of which `ahead` more follow: they are asked for early.
INLINE void add_rows(float *out, const float *x, const uint8_t *w, const pk_lora_args *a, size_t depth, size_t ahead,
                     pk_lora_type type) {
    const size_t bytes = pk_lora_bytes(type), row = a->w_stride * bytes, n = a->columns;
    const size_t next = ahead >= depth ? depth * row : 0;
    __m512 by[GROUP];
    for (size_t k = 0; k < depth; k++) by[k] = _mm512_set1_ps(x[k]);
    size_t c = 0;
    for (; c + 2 * LANES <= n; c += 2 * LANES) {
        __m512 low = _mm512_loadu_ps(out + c), high = _mm512_loadu_ps(out + c + LANES);
        for (size_t k = 0; k < depth; k++) {
            const uint8_t *at = w + k * row + c * bytes;
            _mm_prefetch((const char *)(at + next), _MM_HINT_T0);
            low = _mm512_fmadd_ps(by[k], load(at, type), low);
            high = _mm512_fmadd_ps(by[k], load(at + LANES * bytes, type), high);
        }
        _mm512_storeu_ps(out + c, low);
        _mm512_storeu_ps(out + c + LANES, high);
    }
    for (; c < n; c += LANES) {
        const size_t left = n - c;
        __m512 sum = _mm512_maskz_loadu_ps(first(left), out + c);
        for (size_t k = 0; k < depth; k++) {
            const uint8_t *at = w + k * row + c * bytes;
            sum = _mm512_fmadd_ps(by[k], left < LANES ? load_some(at, left, type) : load(at, type), sum);
        }
        _mm512_mask_storeu_ps(out + c, first(left), sum);
    }
}

INLINE void few_of(const pk_lora_args *a, pk_lora_type type) {
    const size_t row = a->w_stride * pk_lora_bytes(type);
    for (size_t r = 0; r < a->rows; r++) {
        float *out = a->out + r * a->out_stride;
        const float *base = a->base ? a->base + r * a->base_stride : NULL;
        if (!base) memset(out, 0, a->columns * sizeof *out);
        else if (base != out) memcpy(out, base, a->columns * sizeof *out);
    }
    size_t k = 0;
    for (; k + GROUP <= a->depth; k += GROUP) {
        for (size_t r = 0; r < a->rows; r++) {
            add_rows(a->out + r * a->out_stride, a->x + r * a->x_stride + k, (const uint8_t *)a->w + k * row, a, GROUP,
                     a->depth - k - GROUP, type);
        }
    }
    for (; k < a->depth; k++) {
        for (size_t r = 0; r < a->rows; r++) {
            add_rows(a->out + r * a->out_stride, a->x + r * a->x_stride + k, (const uint8_t *)a->w + k * row, a, 1, 0,
                     type);
        }
    }
}

static void few(const pk_lora_args *a) {
    switch (a->type) {
        case PK_LORA_F32: few_of(a, PK_LORA_F32); break;
        case PK_LORA_F16: few_of(a, PK_LORA_F16); break;
        case PK_LORA_S8: few_of(a, PK_LORA_S8); break;
    }
}

INLINE void convert_of(float *panel, const uint8_t *w, size_t row, size_t depth, size_t columns, pk_lora_type type) {
    const size_t bytes = pk_lora_bytes(type), part = LANES * bytes;
    for (size_t k = 0; k < depth; k++, w += row, panel += PANEL) {
        if (columns == PANEL) {
            _mm512_store_ps(panel, load(w, type));
            _mm512_store_ps(panel + LANES, load(w + part, type));
        } else {
            const int one = columns < LANES;
            _mm512_store_ps(panel, one ? load_some(w, columns, type) : load(w, type));
            _mm512_store_ps(panel + LANES, one ? _mm512_setzero_ps() : load_some(w + part, columns - LANES, type));
        }
    }
}

// The panel of W from row k and column c on: [depth][PANEL], beyond the last column zeros.
static void convert(float *panel, const pk_lora_args *a, size_t k, size_t c, size_t depth, size_t columns) {
    const size_t bytes = pk_lora_bytes(a->type), row = a->w_stride * bytes;
    const uint8_t *w = (const uint8_t *)a->w + k * row + c * bytes;
    switch (a->type) {
        case PK_LORA_F32: convert_of(panel, w, row, depth, columns, PK_LORA_F32); break;
        case PK_LORA_F16: convert_of(panel, w, row, depth, columns, PK_LORA_F16); break;
        case PK_LORA_S8: convert_of(panel, w, row, depth, columns, PK_LORA_S8); break;
    }
}

// `rows` rows, a constant, of up to PANEL columns: out = base + x panel. base is looked at last, but asked for first.
INLINE void tile(float *out, const float *base, const float *x, const float *panel, const pk_lora_args *a,
                 size_t base_stride, size_t depth, size_t columns, size_t rows) {
    __m512 sums[TILE_ROWS][2];
#pragma GCC unroll 12
    for (size_t r = 0; r < rows; r++) {
        if (base) {
            _mm_prefetch((const char *)(base + r * base_stride), _MM_HINT_T0);
            _mm_prefetch((const char *)(base + r * base_stride + columns - 1), _MM_HINT_T0);
        }
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    }
    for (size_t k = 0; k < depth; k++) {
        const __m512 low = _mm512_load_ps(panel + k * PANEL), high = _mm512_load_ps(panel + k * PANEL + LANES);
#pragma GCC unroll 12
        for (size_t r = 0; r < rows; r++) {
            const __m512 by = _mm512_set1_ps(x[r * a->x_stride + k]);
            sums[r][0] = _mm512_fmadd_ps(by, low, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(by, high, sums[r][1]);
        }
    }
    const __mmask16 live[2] = {first(columns), first(columns < LANES ? 0 : columns - LANES)};
#pragma GCC unroll 12
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < 2; i++) {
            __m512 sum = sums[r][i];
            if (!live[i]) continue;
            if (base) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(live[i], base + r * base_stride + i * LANES), sum);
            _mm512_mask_storeu_ps(out + r * a->out_stride + i * LANES, live[i], sum);
        }
    }
}

static void many(const pk_lora_args *a) {
    _Alignas(64) float panel[DEPTH * PANEL];
    for (size_t c = 0; c < a->columns; c += PANEL) {
        const size_t columns = a->columns - c < PANEL ? a->columns - c : PANEL;
        for (size_t k = 0; k < a->depth; k += DEPTH) {
            const size_t depth = a->depth - k < DEPTH ? a->depth - k : DEPTH;
            const size_t base_stride = k ? a->out_stride : a->base_stride;
            const float *base = k ? a->out + c : a->base ? a->base + c : NULL, *x = a->x + k;
            float *out = a->out + c;
            convert(panel, a, k, c, depth, columns);
            for (size_t left = a->rows, rows; left > 0; left -= rows) {
                rows = left >= TILE_ROWS ? TILE_ROWS : left >= 4 ? 4 : 1;
                if (rows == TILE_ROWS) tile(out, base, x, panel, a, base_stride, depth, columns, TILE_ROWS);
                else if (rows == 4) tile(out, base, x, panel, a, base_stride, depth, columns, 4);
                else tile(out, base, x, panel, a, base_stride, depth, columns, 1);
                out += rows * a->out_stride;
                x += rows * a->x_stride;
                if (base) base += rows * base_stride;
            }
        }
    }
}

const pk_lora_variant pk_lora_avx512f = {.name = "avx512f", .needs = PK_CPU_AVX512F, .few = few, .many = many};
