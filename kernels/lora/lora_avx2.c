// SPDX-License-Identifier: Apache-2.0
// lora_avx2.c - eight columns at once; the last ones by way of a buffer.
// Needs AVX2, FMA and F16C; CMake compiles this one file with -mavx2 -mfma -mf16c.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif
#include <immintrin.h>
#include <string.h>

#include "lora.h"

#define INLINE static inline __attribute__((always_inline))  // a tile's sums must stay in registers

enum {
    LANES = 8,
    GROUP = 8,    // rows of W between a load and a store of out
    PANEL = 16,   // columns of a tile: 6 rows of 2 registers are 12 sums
    TILE_ROWS = 6,
    DEPTH = 384,  // of a panel: 24 KB, and no LoRA of Phi-4 is deeper
};

// 8 columns of W.
INLINE __m256 load(const uint8_t *w, pk_lora_type type) {
    if (type == PK_LORA_F32) return _mm256_loadu_ps((const float *)w);
    if (type == PK_LORA_F16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)));
}

// n < 8 of them, and zeros.
INLINE __m256 load_some(const uint8_t *w, size_t n, pk_lora_type type) {
    uint8_t buffer[LANES * sizeof(float)] = {0};
    memcpy(buffer, w, n * pk_lora_bytes(type));
    return load(buffer, type);
}

// The first n lanes, all of them from 8 on.
INLINE __m256i first(size_t n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(n < LANES ? n : LANES)), lanes);
}

// out += x W, for `depth` rows of W, of which `ahead` more follow: they are asked for early.
INLINE void add_rows(float *out, const float *x, const uint8_t *w, const pk_lora_args *a, size_t depth, size_t ahead,
                     pk_lora_type type) {
    const size_t bytes = pk_lora_bytes(type), row = a->w_stride * bytes, n = a->columns;
    const size_t next = ahead >= depth ? depth * row : 0;
    __m256 by[GROUP];
    for (size_t k = 0; k < depth; k++) by[k] = _mm256_set1_ps(x[k]);
    size_t c = 0;
    for (; c + 2 * LANES <= n; c += 2 * LANES) {
        __m256 low = _mm256_loadu_ps(out + c), high = _mm256_loadu_ps(out + c + LANES);
        for (size_t k = 0; k < depth; k++) {
            const uint8_t *at = w + k * row + c * bytes;
            _mm_prefetch((const char *)(at + next), _MM_HINT_T0);
            low = _mm256_fmadd_ps(by[k], load(at, type), low);
            high = _mm256_fmadd_ps(by[k], load(at + LANES * bytes, type), high);
        }
        _mm256_storeu_ps(out + c, low);
        _mm256_storeu_ps(out + c + LANES, high);
    }
    for (; c < n; c += LANES) {
        const size_t left = n - c;
        __m256 sum = _mm256_maskload_ps(out + c, first(left));
        for (size_t k = 0; k < depth; k++) {
            const uint8_t *at = w + k * row + c * bytes;
            sum = _mm256_fmadd_ps(by[k], left < LANES ? load_some(at, left, type) : load(at, type), sum);
        }
        _mm256_maskstore_ps(out + c, first(left), sum);
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
            _mm256_store_ps(panel, load(w, type));
            _mm256_store_ps(panel + LANES, load(w + part, type));
        } else {
            const int one = columns < LANES;
            _mm256_store_ps(panel, one ? load_some(w, columns, type) : load(w, type));
            _mm256_store_ps(panel + LANES, one ? _mm256_setzero_ps() : load_some(w + part, columns - LANES, type));
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
    __m256 sums[TILE_ROWS][2];
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++) {
        if (base) {
            _mm_prefetch((const char *)(base + r * base_stride), _MM_HINT_T0);
            _mm_prefetch((const char *)(base + r * base_stride + columns - 1), _MM_HINT_T0);
        }
        sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    }
    for (size_t k = 0; k < depth; k++) {
        const __m256 low = _mm256_load_ps(panel + k * PANEL), high = _mm256_load_ps(panel + k * PANEL + LANES);
#pragma GCC unroll 6
        for (size_t r = 0; r < rows; r++) {
            const __m256 by = _mm256_set1_ps(x[r * a->x_stride + k]);
            sums[r][0] = _mm256_fmadd_ps(by, low, sums[r][0]);
            sums[r][1] = _mm256_fmadd_ps(by, high, sums[r][1]);
        }
    }
    const size_t live[2] = {columns, columns < LANES ? 0 : columns - LANES};
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < 2; i++) {
            __m256 sum = sums[r][i];
            if (!live[i]) continue;
            if (base) sum = _mm256_add_ps(_mm256_maskload_ps(base + r * base_stride + i * LANES, first(live[i])), sum);
            _mm256_maskstore_ps(out + r * a->out_stride + i * LANES, first(live[i]), sum);
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
                rows = left >= TILE_ROWS ? TILE_ROWS : left >= 3 ? 3 : 1;
                if (rows == TILE_ROWS) tile(out, base, x, panel, a, base_stride, depth, columns, TILE_ROWS);
                else if (rows == 3) tile(out, base, x, panel, a, base_stride, depth, columns, 3);
                else tile(out, base, x, panel, a, base_stride, depth, columns, 1);
                out += rows * a->out_stride;
                x += rows * a->x_stride;
                if (base) base += rows * base_stride;
            }
        }
    }
}

const pk_lora_variant pk_lora_avx2 = {
    .name = "avx2",
    .needs = PK_CPU_AVX2 | PK_CPU_FMA | PK_CPU_F16C,
    .few = few,
    .many = many,
};
