// SPDX-License-Identifier: Apache-2.0
// matmul_avx512vnni.c - quantized weights with AVX-512 VNNI: a register is 16 rows, one vpdpbusd four columns
// of them.
//
// vpdpbusd multiplies unsigned by signed bytes: weights stay unsigned (their offset comes back through the
// sums that the tile stores as each product's start) and activations are broadcast four bytes at a time from
// memory. Up to 8 tokens share one unpacking.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "compile with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
#endif
#include <immintrin.h>
#include <string.h>

#include "matmul.h"

#define INLINE static inline __attribute__((always_inline))
enum {
    MANY = 4,              // tokens: from here on matmul_many_avx512vnni.c is faster
    GROUPS = 8,            // of four columns in a block of 32
    ROWS_BYTES = 64,       // 16 rows of one group
    AHEAD_BYTES = 8192,    // measured: 1 to 4 KiB reach two thirds of it
};

// Where the tokens [t0, t0 + n) of a tile of `tile` tokens keep their share of one block of 32 columns.
typedef struct {
    const uint8_t *q;
    const float *d;
    const int32_t *s8, *s32;
} block_x;

INLINE block_x x_at(const uint8_t *x, size_t block, size_t tile, size_t t0) {
    const uint8_t *p = x + block * tile * PK_X_BLOCK_BYTES;
    const int32_t *s = (const int32_t *)(const void *)(p + 36 * tile);
    return (block_x){p + 32 * t0, (const float *)(const void *)(p + 32 * tile) + t0, s + t0, s + tile + t0};
}

INLINE __m512i four(const uint8_t *q, size_t t, size_t g) {
    int32_t bytes;
    memcpy(&bytes, q + 32 * t + 4 * g, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

INLINE __m512 halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE __m512 bytes_u8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)));
}
INLINE __m512 bytes_s8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}

INLINE __m512i dot(__m512i start, const __m512i *w, const uint8_t *q, size_t t, size_t first, size_t last) {
    for (size_t g = first; g < last; g++) start = _mm512_dpbusd_epi32(start, w[g], four(q, t, g));
    return start;
}

// One or two tokens: the time is memory's. The hardware looks ahead within a 4 KiB page only.
INLINE void look_ahead(const uint8_t *p, size_t bytes, size_t n) {
    if (n > 2) return;
    for (size_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)(p + AHEAD_BYTES + i), _MM_HINT_T0);
}

INLINE void low_nibbles(__m512i *w, const uint8_t *q) {
    for (size_t g = 0; g < GROUPS; g++) {
        w[g] = _mm512_and_si512(_mm512_loadu_si512(q + ROWS_BYTES * g), _mm512_set1_epi8(15));
    }
}

INLINE void high_nibbles(__m512i *w, const uint8_t *q) {
    for (size_t g = 0; g < GROUPS; g++) {
        const __m512i v = _mm512_srli_epi16(_mm512_loadu_si512(q + ROWS_BYTES * g), 4);
        w[g] = _mm512_and_si512(v, _mm512_set1_epi8(15));
    }
}

// ---- one panel times n tokens of a tile; n is a constant wherever these are inlined ----

INLINE void zero(__m512 *sum, size_t n) {
#pragma GCC unroll 8
    for (size_t t = 0; t < n; t++) sum[t] = _mm512_setzero_ps();
}

// The sums of 256 columns, which share the activations' scale, onto the whole.
INLINE void close(__m512 *sum, const __m512 *part, block_x xb, size_t n) {
#pragma GCC unroll 8
    for (size_t t = 0; t < n; t++) sum[t] = _mm512_fmadd_ps(part[t], _mm512_set1_ps(xb.d[t]), sum[t]);
}

INLINE void q4_0(__m512 *sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t t0, size_t n,
                 size_t columns) {
    const size_t blocks = columns / PK_X_BLOCK, shared = PK_SHARED_BLOCKS(PK_W_Q4_0, columns);
    __m512 part[8];
    zero(part, n);
    for (size_t b = 0; b < blocks; b++) {
        const pk_block at = pk_place(b, blocks, PK_Q4_0_BYTES);
        __m512i w[GROUPS];
        look_ahead(panel + b * (PK_Q4_0_BYTES + PK_SCALE_BYTES), PK_Q4_0_BYTES + PK_SCALE_BYTES, n);
        for (size_t g = 0; g < GROUPS / 2; g++) {
            const __m512i both = _mm512_loadu_si512(panel + at.q + ROWS_BYTES * g);
            w[g] = _mm512_and_si512(both, _mm512_set1_epi8(15));
            w[g + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
        }
        const __m512 d = halves(panel + at.d);
        const block_x xb = x_at(x, b, tile, t0);
#pragma GCC unroll 8
        for (size_t t = 0; t < n; t++) {
            const __m512 dots = _mm512_cvtepi32_ps(dot(_mm512_set1_epi32(xb.s8[t]), w, xb.q, t, 0, GROUPS));
            if (shared > 1) part[t] = _mm512_fmadd_ps(dots, d, part[t]);
            else sum[t] = _mm512_fmadd_ps(_mm512_mul_ps(dots, d), _mm512_set1_ps(xb.d[t]), sum[t]);
        }
        if (shared > 1 && b % shared == shared - 1) {
            close(sum, part, xb, n);
            zero(part, n);
        }
    }
}

INLINE void q8_0(__m512 *sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t t0, size_t n,
                 size_t columns) {
    const size_t blocks = columns / PK_X_BLOCK;
    for (size_t b = 0; b < blocks; b++) {
        const pk_block at = pk_place(b, blocks, PK_Q8_0_BYTES);
        __m512i w[GROUPS];
        look_ahead(panel + b * (PK_Q8_0_BYTES + PK_SCALE_BYTES), PK_Q8_0_BYTES + PK_SCALE_BYTES, n);
        for (size_t g = 0; g < GROUPS; g++) {  // + 128: unsigned
            const __m512i q = _mm512_loadu_si512(panel + at.q + ROWS_BYTES * g);
            w[g] = _mm512_xor_si512(q, _mm512_set1_epi8(-128));
        }
        const __m512 d = halves(panel + at.d);
        const block_x xb = x_at(x, b, tile, t0);
#pragma GCC unroll 8
        for (size_t t = 0; t < n; t++) {
            const __m512i start = _mm512_slli_epi32(_mm512_set1_epi32(xb.s8[t]), 4);  // -128 times the sum
            const __m512i dots = dot(start, w, xb.q, t, 0, GROUPS);
            sum[t] =
                _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dots), d), _mm512_set1_ps(xb.d[t]), sum[t]);
        }
    }
}

// A sub-block of Q4_K or Q5_K: dm is dmin * m / 8, which meets -8 times the sum.
INLINE void with_minimum(__m512 *sum, const __m512i *w, __m512 ds, __m512 dm, block_x xb, size_t n) {
#pragma GCC unroll 8
    for (size_t t = 0; t < n; t++) {
        const __m512i dots = dot(_mm512_setzero_si512(), w, xb.q, t, 0, GROUPS);
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), ds, sum[t]);
        sum[t] = _mm512_fmadd_ps(dm, _mm512_cvtepi32_ps(_mm512_set1_epi32(xb.s8[t])), sum[t]);
    }
}

// w | (all rotated left & mask): moves bits of each byte to the place that mask names. A rotation takes its
// count from a register, so that one loop serves all sub-blocks: unrolled, Q5_K's and Q6_K's would outgrow
// the op cache.
INLINE void or_bits(__m512i *w, const uint8_t *high, unsigned left, char mask) {
    const __m512i count = _mm512_set1_epi32((int)(left & 31));
    for (size_t g = 0; g < GROUPS; g++) {
        const __m512i moved = _mm512_rolv_epi32(_mm512_loadu_si512(high + ROWS_BYTES * g), count);
        w[g] = _mm512_ternarylogic_epi32(w[g], moved, _mm512_set1_epi8(mask), 0xf8);
    }
}

INLINE void qk(__m512 *sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t t0, size_t n,
               size_t columns, int five) {
    const size_t blocks = columns / 256, bytes = five ? 2880 : 2368;
    for (size_t b = 0; b < blocks; b++, panel += bytes) {
        const __m512 d = halves(panel), dmin8 = _mm512_mul_ps(halves(panel + 32), _mm512_set1_ps(0.125f));
        const uint8_t *s = panel + 64, *m = panel + 192, *q = panel + 320, *h = q + 2048;
        __m512 part[8];
        zero(part, n);
#pragma GCC unroll 1
        for (unsigned i = 0; i < 8; i += 2, q += 512) {
            __m512i w[GROUPS];
            look_ahead(panel + i * (bytes / 8), bytes / 4, n);
            low_nibbles(w, q);
            if (five) or_bits(w, h, 4 - i, 16);
            with_minimum(part, w, _mm512_mul_ps(d, bytes_u8(s + 16 * i)),
                         _mm512_mul_ps(dmin8, bytes_u8(m + 16 * i)), x_at(x, 8 * b + i, tile, t0), n);
            high_nibbles(w, q);
            if (five) or_bits(w, h, 3 - i, 16);
            with_minimum(part, w, _mm512_mul_ps(d, bytes_u8(s + 16 * i + 16)),
                         _mm512_mul_ps(dmin8, bytes_u8(m + 16 * i + 16)), x_at(x, 8 * b + i + 1, tile, t0),
                         n);
        }
        close(sum, part, x_at(x, 8 * b, tile, t0), n);
    }
}

INLINE void q4_k(__m512 *sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t t0, size_t n,
                 size_t columns) {
    qk(sum, panel, x, tile, t0, n, columns, 0);
}

INLINE void q5_k(__m512 *sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t t0, size_t n,
                 size_t columns) {
    qk(sum, panel, x, tile, t0, n, columns, 1);
}

// One block of 32 columns of Q6_K: two scales for 16 columns each.
INLINE void with_halves(__m512 *sum, const __m512i *w, __m512 d0, __m512 d1, block_x xb, size_t tile,
                        size_t n) {
#pragma GCC unroll 8
    for (size_t t = 0; t < n; t++) {
        const __m512i first = dot(_mm512_set1_epi32(xb.s32[t]), w, xb.q, t, 0, 4);
        const __m512i second = dot(_mm512_set1_epi32(xb.s32[tile + t]), w, xb.q, t, 4, 8);
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first), d0, sum[t]);
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), d1, sum[t]);
    }
}

INLINE void q6_k(__m512 *sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t t0, size_t n,
                 size_t columns) {
    const size_t blocks = columns / 256;
    for (size_t b = 0; b < blocks; b++) {
        const pk_block at = pk_place(b, blocks, PK_Q6_K_BYTES);
        const uint8_t *block = panel + at.q;
        const __m512 d = halves(panel + at.d);
        __m512 part[8];
        zero(part, n);
#pragma GCC unroll 1
        for (unsigned i = 0; i < 8; i++) {
            const uint8_t *ql = block + 256 + (i / 4 * 2 + i % 2) * 512, *s = block + 32 * i;
            __m512i w[GROUPS];
            look_ahead(panel + (8 * b + i) * 420, 420, n);
            if (i & 2) high_nibbles(w, ql);
            else low_nibbles(w, ql);
            or_bits(w, block + 2304 + i / 4 * 512, 4 - i % 4 * 2, 48);
            const __m512 d0 = _mm512_mul_ps(d, bytes_s8(s)), d1 = _mm512_mul_ps(d, bytes_s8(s + 16));
            with_halves(part, w, d0, d1, x_at(x, 8 * b + i, tile, t0), tile, n);
        }
        close(sum, part, x_at(x, 8 * b, tile, t0), n);
    }
}

// ---- all panels, all tiles ----

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

// A tile goes in pieces of 8, 4, 2 and 1 tokens: each piece is a loop of its own with the sums in registers.
#define PIECE(kernel, n)                                               \
    for (; tile - t0 >= (n); t0 += (n)) {                              \
        __m512 sum[n];                                                 \
        for (size_t t = 0; t < (n); t++) sum[t] = _mm512_setzero_ps(); \
        kernel(sum, panel, x, tile, t0, n, a->columns);                \
        store(a, sum, row, token + t0, n);                             \
    }

#define MATMUL(kernel, panel_bytes)                                                                          \
    void pk_matmul_##kernel##_avx512vnni(const pk_matmul_args *a) {                                          \
        if (a->tokens >= MANY) {                                                                             \
            pk_matmul_many_##kernel##_avx512vnni(a);                                                         \
            return;                                                                                          \
        }                                                                                                    \
        const size_t panel_size = ((panel_bytes) + 63) / 64 * 64;                                            \
        const uint8_t *panel = a->w;                                                                         \
        for (size_t row = 0; row < a->rows; row += PK_PANEL_ROWS, panel += panel_size) {                     \
            const uint8_t *x = a->x;                                                                         \
            for (size_t token = 0; token < a->tokens; token += PK_TILE_TOKENS) {                             \
                const size_t left = a->tokens - token, tile = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS; \
                size_t t0 = 0;                                                                               \
                PIECE(kernel, 8)                                                                             \
                PIECE(kernel, 4)                                                                             \
                PIECE(kernel, 2)                                                                             \
                PIECE(kernel, 1)                                                                             \
                x += tile * a->columns / PK_X_BLOCK * PK_X_BLOCK_BYTES;                                      \
            }                                                                                                \
        }                                                                                                    \
    }

MATMUL(q4_0, a->columns / 32 * 288)
MATMUL(q8_0, a->columns / 32 * 544)
MATMUL(q4_k, a->columns / 256 * 2368)
MATMUL(q5_k, a->columns / 256 * 2880)
MATMUL(q6_k, a->columns / 256 * 3360)
