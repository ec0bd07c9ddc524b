// SPDX-License-Identifier: Apache-2.0
// matmul_many_avx512vnni.c - quantized weights times many tokens: two panels are unpacked once for up to 128
// tokens.
//
// With one panel in registers (matmul_avx512vnni.c) every product needs an activation broadcast of its own,
// and the load ports are as busy as the multipliers. Here a tile is two panels by four tokens: a broadcast
// serves two products, a register of weights four. Weights of 256 columns at a time lie unpacked in the
// first-level cache, as unsigned bytes whatever their type; sums are float32 and wait in the second array
// between those stretches.
//
// The float32 operations and their order are those of matmul_avx512vnni.c: a token's result is the same bits
// in both.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "compile with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
#endif
#include <immintrin.h>
#include <string.h>

#include "matmul.h"

#define INLINE static inline __attribute__((always_inline))
enum {
    STRETCH = 8,  // blocks of 32 columns unpacked at a time
    GROUPS = 8,   // of four columns in a block
    PANELS = 2,
    TOKENS = 4,
    MOST_TOKENS = 128,  // whose sums the second array holds
};

// 256 columns of two panels. scale [1] of a block: the second half's (Q6_K) or the minimum's (Q4_K, Q5_K)
// over 8.
typedef struct {
    __m512i w[PANELS][STRETCH][GROUPS];
    __m512 scale[PANELS][STRETCH][2];
} stretch;

INLINE __m512 halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }

INLINE __m512 bytes(const uint8_t *p, int is_signed) {
    const __m128i v = _mm_loadu_si128((const void *)p);
    return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(v) : _mm512_cvtepu8_epi32(v));
}

INLINE __m512i low(const uint8_t *q) { return _mm512_and_si512(_mm512_loadu_si512(q), _mm512_set1_epi8(15)); }

INLINE __m512i high(const uint8_t *q) {
    return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(q), 4), _mm512_set1_epi8(15));
}

INLINE __m512i more(__m512i w, const uint8_t *bits, unsigned left, char mask) {
    const __m512i moved = _mm512_rolv_epi32(_mm512_loadu_si512(bits), _mm512_set1_epi32((int)(left & 31)));
    return _mm512_ternarylogic_epi32(w, moved, _mm512_set1_epi8(mask), 0xf8);
}

INLINE void unpack_32(stretch *s, size_t p, const uint8_t *panel, size_t first, size_t blocks, size_t columns,
                      pk_weight type) {
    const size_t bytes = type == PK_W_Q4_0 ? PK_Q4_0_BYTES : PK_Q8_0_BYTES;
    for (size_t b = 0; b < blocks; b++) {
        const pk_block at = pk_place(first + b, columns / PK_X_BLOCK, bytes);
        const uint8_t *q = panel + at.q;
        s->scale[p][b][0] = halves(panel + at.d);
        for (size_t g = 0; g < GROUPS; g++) {
            if (type == PK_W_Q4_0) s->w[p][b][g] = g < 4 ? low(q + 64 * g) : high(q + 64 * (g - 4));
            else s->w[p][b][g] = _mm512_xor_si512(_mm512_loadu_si512(q + 64 * g), _mm512_set1_epi8(-128));
        }
    }
}

INLINE void unpack_45_k(stretch *s, size_t p, const uint8_t *panel, int five) {
    const __m512 d = halves(panel), dmin8 = _mm512_mul_ps(halves(panel + 32), _mm512_set1_ps(0.125f));
    for (size_t b = 0; b < STRETCH; b++) {
        const uint8_t *q = panel + 320 + b / 2 * 512;
        s->scale[p][b][0] = _mm512_mul_ps(d, bytes(panel + 64 + 16 * b, 0));
        s->scale[p][b][1] = _mm512_mul_ps(dmin8, bytes(panel + 192 + 16 * b, 0));
        for (size_t g = 0; g < GROUPS; g++) {
            const __m512i w = b % 2 ? high(q + 64 * g) : low(q + 64 * g);
            s->w[p][b][g] = five ? more(w, panel + 2368 + 64 * g, 4 - (unsigned)b, 16) : w;
        }
    }
}

INLINE void unpack_6_k(stretch *s, size_t p, const uint8_t *panel, const uint8_t *scales) {
    const __m512 d = halves(scales);
    for (size_t b = 0; b < STRETCH; b++) {
        const uint8_t *ql = panel + 256 + (b / 4 * 2 + b % 2) * 512, *qh = panel + 2304 + b / 4 * 512;
        s->scale[p][b][0] = _mm512_mul_ps(d, bytes(panel + 32 * b, 1));
        s->scale[p][b][1] = _mm512_mul_ps(d, bytes(panel + 32 * b + 16, 1));
        for (size_t g = 0; g < GROUPS; g++) {
            const __m512i w = b & 2 ? high(ql + 64 * g) : low(ql + 64 * g);
            s->w[p][b][g] = more(w, qh + 64 * g, 4 - (unsigned)(b % 4) * 2, 48);
        }
    }
}

INLINE void unpack(stretch *s, size_t p, const uint8_t *panel, size_t first, size_t blocks, size_t columns,
                   pk_weight type) {
    switch (type) {
        case PK_W_Q4_K: unpack_45_k(s, p, panel + first / 8 * 2368, 0); break;
        case PK_W_Q5_K: unpack_45_k(s, p, panel + first / 8 * 2880, 1); break;
        case PK_W_Q6_K: {
            const pk_block at = pk_place(first / 8, columns / 256, PK_Q6_K_BYTES);
            unpack_6_k(s, p, panel + at.q, panel + at.d);
            break;
        }
        default: unpack_32(s, p, panel, first, blocks, columns, type); break;
    }
}

// ---- one block times four tokens ----

typedef struct {
    const uint8_t *q;
    const float *d;
    const int32_t *s8, *s32;
    size_t tile;
} block_x;

INLINE block_x x_at(const uint8_t *x, size_t block, size_t tile, size_t t0) {
    const uint8_t *p = x + block * tile * PK_X_BLOCK_BYTES;
    const int32_t *s = (const int32_t *)(const void *)(p + 36 * tile);
    return (block_x){p + 32 * t0, (const float *)(const void *)(p + 32 * tile) + t0, s + t0, s + tile + t0,
                     tile};
}

INLINE void dots(__m512i dot[PANELS][TOKENS], const stretch *s, size_t b, block_x x, size_t panels, size_t n,
                 size_t first, size_t last) {
#pragma GCC unroll 8
    for (size_t g = first; g < last; g++) {
        __m512i w[PANELS];
#pragma GCC unroll 2
        for (size_t p = 0; p < panels; p++) w[p] = s->w[p][b][g];
#pragma GCC unroll 4
        for (size_t t = 0; t < n; t++) {
            int32_t four;
            memcpy(&four, x.q + 32 * t + 4 * g, sizeof four);
            const __m512i v = _mm512_set1_epi32(four);
#pragma GCC unroll 2
            for (size_t p = 0; p < panels; p++) dot[p][t] = _mm512_dpbusd_epi32(dot[p][t], w[p], v);
        }
    }
}

INLINE void block_times(__m512 sum[PANELS][TOKENS], const stretch *s, size_t b, block_x x, size_t panels,
                        size_t n, pk_weight type, int shared) {
    __m512i dot[PANELS][TOKENS];
    if (type == PK_W_Q6_K) {
#pragma GCC unroll 4
        for (size_t t = 0; t < n; t++) {
            for (size_t p = 0; p < panels; p++) dot[p][t] = _mm512_set1_epi32(x.s32[t]);
        }
        dots(dot, s, b, x, panels, n, 0, 4);
#pragma GCC unroll 4
        for (size_t t = 0; t < n; t++) {
            for (size_t p = 0; p < panels; p++) {
                sum[p][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[p][t]), s->scale[p][b][0], sum[p][t]);
                dot[p][t] = _mm512_set1_epi32(x.s32[x.tile + t]);
            }
        }
        dots(dot, s, b, x, panels, n, 4, 8);
#pragma GCC unroll 4
        for (size_t t = 0; t < n; t++) {
            for (size_t p = 0; p < panels; p++) {
                sum[p][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[p][t]), s->scale[p][b][1], sum[p][t]);
            }
        }
        return;
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < n; t++) {
        __m512i start = _mm512_setzero_si512();
        if (type == PK_W_Q4_0) start = _mm512_set1_epi32(x.s8[t]);
        if (type == PK_W_Q8_0) start = _mm512_slli_epi32(_mm512_set1_epi32(x.s8[t]), 4);
        for (size_t p = 0; p < panels; p++) dot[p][t] = start;
    }
    dots(dot, s, b, x, panels, n, 0, 8);
#pragma GCC unroll 4
    for (size_t t = 0; t < n; t++) {
        const __m512 d = _mm512_set1_ps(x.d[t]), s8 = _mm512_cvtepi32_ps(_mm512_set1_epi32(x.s8[t]));
        for (size_t p = 0; p < panels; p++) {
            const __m512 v = _mm512_cvtepi32_ps(dot[p][t]);
            if (!shared) {
                sum[p][t] = _mm512_fmadd_ps(_mm512_mul_ps(v, s->scale[p][b][0]), d, sum[p][t]);
                continue;
            }
            sum[p][t] = _mm512_fmadd_ps(v, s->scale[p][b][0], sum[p][t]);
            if (type == PK_W_Q4_K || type == PK_W_Q5_K)
                sum[p][t] = _mm512_fmadd_ps(s->scale[p][b][1], s8, sum[p][t]);
        }
    }
}

// ---- all tokens of a stretch; n and panels are constants wherever this is inlined ----

INLINE void tokens_times(__m512 (*sums)[MOST_TOKENS], const stretch *s, const uint8_t *x, size_t first,
                         size_t blocks, size_t tile, size_t t0, size_t at, size_t panels, size_t n,
                         pk_weight type, int shared) {
    __m512 sum[PANELS][TOKENS];
    for (size_t t = 0; t < n; t++) {
        for (size_t p = 0; p < panels; p++)
            sum[p][t] = first && !shared ? sums[p][at + t] : _mm512_setzero_ps();
    }
#pragma GCC unroll 1
    for (size_t b = 0; b < blocks; b++)
        block_times(sum, s, b, x_at(x, first + b, tile, t0), panels, n, type, shared);
    for (size_t t = 0; t < n; t++) {
        const __m512 d = _mm512_set1_ps(x_at(x, first, tile, t0).d[t]);
        for (size_t p = 0; p < panels; p++) {
            const __m512 before = first ? sums[p][at + t] : _mm512_setzero_ps();
            sums[p][at + t] = shared ? _mm512_fmadd_ps(sum[p][t], d, before) : sum[p][t];
        }
    }
}

INLINE void store(const pk_matmul_args *a, const __m512 *sums, size_t row, size_t token, size_t n) {
    const size_t left = a->rows - row;
    const __mmask16 rows = (__mmask16)(left < PK_PANEL_ROWS ? (1u << left) - 1 : 0xffffu);
    for (size_t t = 0; t < n; t++) {
        float *out = a->out + (token + t) * a->out_stride + row;
        __m512 v = sums[t];
        if (a->add) v = _mm512_fmadd_ps(v, _mm512_set1_ps(a->scale), _mm512_maskz_loadu_ps(rows, out));
        _mm512_mask_storeu_ps(out, rows, v);
    }
}

// While a stretch is in work the next but one is fetched, of these panels or the next ones, a few lines for each
// four tokens: with few tokens the weights' way from memory is as long as the work, and more lines at once than
// a core can wait for hold it up.
typedef struct {
    const uint8_t *at[PANELS];
    size_t next, bytes, step;
} ahead;

INLINE ahead ahead_of(const uint8_t *panel, size_t panel_size, size_t panels, size_t first, size_t blocks,
                      size_t count) {
    const size_t whole = (blocks + STRETCH - 1) / STRETCH * STRETCH, later = first + 2 * STRETCH;
    const size_t bytes = panel_size * STRETCH / blocks, turns = (count + TOKENS - 1) / TOKENS;
    ahead a = {.bytes = bytes, .step = (bytes / 64 / turns + 1) * 64};
    if (later >= whole) panel += panels * panel_size;
    for (size_t p = 0; p < panels; p++) a.at[p] = panel + p * panel_size + later % whole * bytes / STRETCH;
    return a;
}

INLINE void fetch(ahead *a, size_t panels) {
    const size_t last = a->next + a->step < a->bytes ? a->next + a->step : a->bytes;
    for (size_t p = 0; p < panels; p++) {
        for (size_t i = a->next; i < last; i += 64) _mm_prefetch((const char *)(a->at[p] + i), _MM_HINT_T0);
    }
    a->next = last;
}

INLINE void some_tokens(const pk_matmul_args *a, const uint8_t *panel, size_t panel_size, const uint8_t *x,
                        size_t row, size_t token, size_t count, size_t panels, pk_weight type, int shared) {
    stretch s;
    __m512 sums[PANELS][MOST_TOKENS];
    const size_t blocks = a->columns / PK_X_BLOCK, tile_bytes = blocks * PK_TILE_TOKENS * PK_X_BLOCK_BYTES;
    for (size_t first = 0; first < blocks; first += STRETCH) {
        const size_t here = blocks - first < STRETCH ? blocks - first : STRETCH;
        for (size_t p = 0; p < panels; p++)
            unpack(&s, p, panel + p * panel_size, first, here, a->columns, type);
        ahead next = ahead_of(panel, panel_size, panels, first, blocks, count);
        const uint8_t *tile_x = x;
        for (size_t at = 0; at < count; at += PK_TILE_TOKENS, tile_x += tile_bytes) {
            const size_t tile = count - at < PK_TILE_TOKENS ? count - at : PK_TILE_TOKENS;
            size_t t0 = 0;
            for (; t0 + TOKENS <= tile; t0 += TOKENS) {
                fetch(&next, panels);
                tokens_times(sums, &s, tile_x, first, here, tile, t0, at + t0, panels, TOKENS, type, shared);
            }
            for (; t0 < tile; t0++) {
                fetch(&next, panels);
                tokens_times(sums, &s, tile_x, first, here, tile, t0, at + t0, panels, 1, type, shared);
            }
        }
    }
    for (size_t p = 0; p < panels; p++) store(a, sums[p], row + p * PK_PANEL_ROWS, token, count);
}

INLINE void matmul(const pk_matmul_args *a, size_t panel_bytes, pk_weight type, int shared) {
    const size_t panel_size = (panel_bytes + 63) / 64 * 64,
                 tile_bytes = a->columns / PK_X_BLOCK * PK_TILE_TOKENS * PK_X_BLOCK_BYTES;
    for (size_t token = 0; token < a->tokens; token += MOST_TOKENS) {
        const size_t count = a->tokens - token < MOST_TOKENS ? a->tokens - token : MOST_TOKENS;
        const uint8_t *panel = a->w, *x = a->x + token / PK_TILE_TOKENS * tile_bytes;
        size_t row = 0;
        for (; row + PK_PANEL_ROWS < a->rows; row += 2 * PK_PANEL_ROWS, panel += 2 * panel_size) {
            some_tokens(a, panel, panel_size, x, row, token, count, 2, type, shared);
        }
        if (row < a->rows) some_tokens(a, panel, panel_size, x, row, token, count, 1, type, shared);
    }
}

void pk_matmul_many_q4_0_avx512vnni(const pk_matmul_args *a) {
    if (PK_SHARED_BLOCKS(PK_W_Q4_0, a->columns) == STRETCH) matmul(a, a->columns / 32 * 288, PK_W_Q4_0, 1);
    else matmul(a, a->columns / 32 * 288, PK_W_Q4_0, 0);
}

void pk_matmul_many_q8_0_avx512vnni(const pk_matmul_args *a) {
    matmul(a, a->columns / 32 * 544, PK_W_Q8_0, 0);
}
void pk_matmul_many_q4_k_avx512vnni(const pk_matmul_args *a) {
    matmul(a, a->columns / 256 * 2368, PK_W_Q4_K, 1);
}
void pk_matmul_many_q5_k_avx512vnni(const pk_matmul_args *a) {
    matmul(a, a->columns / 256 * 2880, PK_W_Q5_K, 1);
}
void pk_matmul_many_q6_k_avx512vnni(const pk_matmul_args *a) {
    matmul(a, a->columns / 256 * 3360, PK_W_Q6_K, 1);
}
