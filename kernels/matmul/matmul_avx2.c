// SPDX-License-Identifier: Apache-2.0
// matmul_avx2.c - quantized weights with AVX2: a register holds four columns of 8 rows, half a panel.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds pairs into 16 bits: weights stay unsigned (the sums
// that the tile stores take their offset back), activations are broadcast four bytes at a time. As long as no
// sum can leave 16 bits (8 products of Q4, 4 of Q5, 2 of Q6), products are added there, then widened.
// 8 registers hold the weights of 32 columns for all tokens of a tile; the float sums lie in the first cache.
// Needs AVX2, FMA and F16C; CMake compiles this one file with -mavx2 -mfma -mf16c.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif
#include <immintrin.h>
#include <string.h>

#include "matmul.h"

#define INLINE static inline __attribute__((always_inline))

enum { ROWS = PK_PANEL_ROWS, GROUPS = PK_X_BLOCK / 4, GROUP_BYTES = 4 * ROWS };  // a group is four columns
enum { Q4_K_BYTES = 2368, Q5_K_BYTES = 2880 };  // of 256 columns of a panel

// What all tokens of a tile know about 32 columns.
typedef struct {
    const int8_t *q;  // [tile][32]
    const float *d;
    const int32_t *s8, *s32;
    size_t tile;  // tokens
} block_x;

// One panel times one tile: sum float32 [tile][16]. next: bytes from a panel to the one after it.
typedef void (*panel_fn)(float *restrict sum, const uint8_t *panel, const uint8_t *x, size_t tile,
                         size_t columns, size_t next);

INLINE block_x x_at(const uint8_t *x, size_t block, size_t tile) {
    const uint8_t *p = x + block * tile * PK_X_BLOCK_BYTES;
    const int32_t *s = (const int32_t *)(const void *)(p + 36 * tile);
    return (block_x){(const int8_t *)p, (const float *)(const void *)(p + 32 * tile), s, s + tile, tile};
}

INLINE __m256i load(const void *p) { return _mm256_loadu_si256(p); }

INLINE __m256i four(const int8_t *q, size_t g) {
    int32_t bytes;
    memcpy(&bytes, q + 4 * g, sizeof bytes);
    return _mm256_set1_epi32(bytes);
}

// Eight numbers as floats.
INLINE __m256 halves(const uint8_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE __m128i eight(const uint8_t *p) { return _mm_loadl_epi64((const void *)p); }
INLINE __m256 u8(const uint8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(p))); }
INLINE __m256 s8(const uint8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(p))); }

INLINE __m256i low(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE __m256i high(__m256i v) { return low(_mm256_srli_epi16(v, 4)); }
INLINE __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// Groups first..first + n of one token, in 16 bits: the caller knows that n are few enough.
INLINE __m256i pairs(const __m256i *w, const int8_t *q, size_t first, size_t n) {
    __m256i sum = _mm256_maddubs_epi16(w[first], four(q, first));
    for (size_t g = first + 1; g < first + n; g++) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[g], four(q, g)));
    }
    return sum;
}

INLINE void accumulate(float *restrict sum, __m256 value, float d) {
    _mm256_storeu_ps(sum, _mm256_fmadd_ps(value, _mm256_set1_ps(d), _mm256_loadu_ps(sum)));
}

// The next panel has at the same place what a block reads of this one. The CPU alone follows a panel's planes
// badly; asked so early, memory keeps up with one token. Beyond the last panel a prefetch does not fault.
INLINE void prefetch(const uint8_t *p, size_t next, size_t bytes) {
    const uintptr_t from = (uintptr_t)p + next;
    for (size_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)(from + i), _MM_HINT_T1);
}

// ---- one panel times one tile ----

static void q4_0(float *restrict sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t columns,
                 size_t next) {
    const size_t blocks = columns / PK_X_BLOCK;
    for (size_t b = 0; b < blocks; b++) {
        const block_x at = x_at(x, b, tile);
        const pk_block place = pk_place(b, blocks, PK_Q4_0_BYTES);
        prefetch(panel + place.q, next, PK_Q4_0_BYTES);
        prefetch(panel + place.d, next, PK_SCALE_BYTES);
        for (size_t r = 0; r < ROWS; r += 8) {
            const uint8_t *q = panel + place.q + 4 * r;
            const __m256 d = halves(panel + place.d + 2 * r);
            __m256i w[GROUPS];
            for (size_t g = 0; g < GROUPS / 2; g++) {
                w[g] = low(load(q + GROUP_BYTES * g));
                w[g + GROUPS / 2] = high(load(q + GROUP_BYTES * g));
            }
            for (size_t t = 0; t < tile; t++) {
                const __m256i all = pairs(w, at.q + PK_X_BLOCK * t, 0, GROUPS);  // 8 * 2 * 15 * 127 = 30480
                const __m256i dot = _mm256_add_epi32(widen(all), _mm256_set1_epi32(at.s8[t]));
                accumulate(sum + ROWS * t + r, _mm256_mul_ps(d, _mm256_cvtepi32_ps(dot)), at.d[t]);
            }
        }
    }
}

// The sign of w moves to the activation. |w| may be 128: pairs reach 2 * 128 * 127 = 32512, alone.
static void q8_0(float *restrict sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t columns,
                 size_t next) {
    const size_t blocks = columns / PK_X_BLOCK;
    for (size_t b = 0; b < blocks; b++) {
        const block_x at = x_at(x, b, tile);
        const pk_block place = pk_place(b, blocks, PK_Q8_0_BYTES);
        prefetch(panel + place.q, next, PK_Q8_0_BYTES);
        prefetch(panel + place.d, next, PK_SCALE_BYTES);
        for (size_t r = 0; r < ROWS; r += 8) {
            const uint8_t *q = panel + place.q + 4 * r;
            const __m256 d = halves(panel + place.d + 2 * r);
            __m256i size[GROUPS];
            for (size_t g = 0; g < GROUPS; g++) size[g] = _mm256_abs_epi8(load(q + GROUP_BYTES * g));
            for (size_t t = 0; t < tile; t++) {
                __m256i dot = _mm256_setzero_si256();
                for (size_t g = 0; g < GROUPS; g++) {
                    const __m256i x4 = four(at.q + PK_X_BLOCK * t, g);
                    const __m256i v = _mm256_sign_epi8(x4, load(q + GROUP_BYTES * g));
                    dot = _mm256_add_epi32(dot, widen(_mm256_maddubs_epi16(size[g], v)));
                }
                accumulate(sum + ROWS * t + r, _mm256_mul_ps(d, _mm256_cvtepi32_ps(dot)), at.d[t]);
            }
        }
    }
}

// 32 columns of Q4_K (top 15) or Q5_K (31). min: dmin * m / 8, which meets -8 times the sum.
INLINE void with_min(float *restrict sum, const __m256i *w, __m256 d, __m256 min, block_x at, int top) {
    for (size_t t = 0; t < at.tile; t++) {
        const int8_t *q = at.q + PK_X_BLOCK * t;
        __m256i dot;
        if (top == 15) {  // 8 * 2 * 15 * 127 = 30480
            dot = widen(pairs(w, q, 0, GROUPS));
        } else {          // 4 * 2 * 31 * 127 = 31496
            dot = _mm256_add_epi32(widen(pairs(w, q, 0, 4)), widen(pairs(w, q, 4, 4)));
        }
        const __m256 offset = _mm256_mul_ps(min, _mm256_cvtepi32_ps(_mm256_set1_epi32(at.s8[t])));
        accumulate(sum + ROWS * t, _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(dot), offset), at.d[t]);
    }
}

static void q4_k(float *restrict sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t columns,
                 size_t next) {
    for (size_t i = 0; i < columns / PK_X_BLOCK; i++) {
        const uint8_t *p = panel + i / 8 * Q4_K_BYTES, *s = p + 64 + i % 8 * ROWS, *m = s + 8 * ROWS;
        prefetch(p + i % 8 * 296, next, 296);
        for (size_t r = 0; r < ROWS; r += 8) {
            const uint8_t *q = p + 320 + i % 8 / 2 * 512 + 4 * r;
            __m256i w[GROUPS];
            if (i % 2 == 0) {
                for (size_t g = 0; g < GROUPS; g++) w[g] = low(load(q + GROUP_BYTES * g));
            } else {
                for (size_t g = 0; g < GROUPS; g++) w[g] = high(load(q + GROUP_BYTES * g));
            }
            const __m256 d = _mm256_mul_ps(halves(p + 2 * r), u8(s + r));
            const __m256 min = _mm256_mul_ps(halves(p + 32 + 2 * r), u8(m + r));
            with_min(sum + r, w, d, _mm256_mul_ps(min, _mm256_set1_ps(0.125f)), x_at(x, i, tile), 15);
        }
    }
}

static void q5_k(float *restrict sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t columns,
                 size_t next) {
    for (size_t i = 0; i < columns / PK_X_BLOCK; i++) {
        const uint8_t *p = panel + i / 8 * Q5_K_BYTES, *s = p + 64 + i % 8 * ROWS, *m = s + 8 * ROWS;
        prefetch(p + i % 8 * 360, next, 360);
        const __m256i bit = _mm256_set1_epi8((char)(1 << i % 8)), sixteen = _mm256_set1_epi8(16);
        for (size_t r = 0; r < ROWS; r += 8) {
            const uint8_t *q = p + 320 + i % 8 / 2 * 512 + 4 * r, *h = p + 320 + 2048 + 4 * r;
            __m256i w[GROUPS];
            for (size_t g = 0; g < GROUPS; g++) {
                const __m256i both = load(q + GROUP_BYTES * g);
                const __m256i fifth = _mm256_and_si256(load(h + GROUP_BYTES * g), bit);
                const __m256i top = _mm256_and_si256(_mm256_cmpeq_epi8(fifth, bit), sixteen);
                w[g] = _mm256_or_si256(i % 2 == 0 ? low(both) : high(both), top);
            }
            const __m256 d = _mm256_mul_ps(halves(p + 2 * r), u8(s + r));
            const __m256 min = _mm256_mul_ps(halves(p + 32 + 2 * r), u8(m + r));
            with_min(sum + r, w, d, _mm256_mul_ps(min, _mm256_set1_ps(0.125f)), x_at(x, i, tile), 31);
        }
    }
}

// 16 columns of Q6_K, groups first..: two groups reach 2 * 2 * 63 * 127 = 32004.
INLINE __m256 half_dot(const __m256i *w, const int8_t *q, size_t first, int32_t start) {
    const __m256i dot = _mm256_add_epi32(widen(pairs(w, q, first, 2)), widen(pairs(w, q, first + 2, 2)));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(dot, _mm256_set1_epi32(start)));
}

// Bits 4 and 5 of columns 32b.. of 128, in place.
INLINE __m256i two_bits(__m256i v, int b) {
    const __m256i moved = b == 0   ? _mm256_slli_epi16(v, 4)
                          : b == 1 ? _mm256_slli_epi16(v, 2)
                          : b == 2 ? v
                                   : _mm256_srli_epi16(v, 2);
    return _mm256_and_si256(moved, _mm256_set1_epi8(48));
}

// 32 columns: d and s as in the panel, ql and qh at their first group. b, constant here: which 32 of 128.
INLINE void q6_k_block(float *restrict sum, const uint8_t *d16, const uint8_t *s, const uint8_t *ql,
                       const uint8_t *qh, block_x at, int b) {
    for (size_t r = 0; r < ROWS; r += 8) {
        __m256i w[GROUPS];
        for (size_t g = 0; g < GROUPS; g++) {
            const __m256i both = load(ql + GROUP_BYTES * g + 4 * r);
            const __m256i bits = load(qh + GROUP_BYTES * g + 4 * r);
            w[g] = _mm256_or_si256(b < 2 ? low(both) : high(both), two_bits(bits, b));
        }
        const __m256 d = halves(d16 + 2 * r);
        const __m256 d0 = _mm256_mul_ps(d, s8(s + r)), d1 = _mm256_mul_ps(d, s8(s + ROWS + r));
        for (size_t t = 0; t < at.tile; t++) {
            const int8_t *q = at.q + PK_X_BLOCK * t;
            const __m256 first = _mm256_mul_ps(d0, half_dot(w, q, 0, at.s32[t]));
            const __m256 value = _mm256_fmadd_ps(d1, half_dot(w, q, 4, at.s32[at.tile + t]), first);
            accumulate(sum + ROWS * t + r, value, at.d[t]);
        }
    }
}

static void q6_k(float *restrict sum, const uint8_t *panel, const uint8_t *x, size_t tile, size_t columns,
                 size_t next) {
    for (size_t i = 0; i < columns / 128; i++) {
        const pk_block place = pk_place(i / 2, columns / 256, PK_Q6_K_BYTES);
        const uint8_t *d = panel + place.d, *p = panel + place.q, *s = p + i % 2 * 8 * ROWS;
        const uint8_t *ql = p + 256 + i % 2 * 1024, *qh = p + 256 + 2048 + i % 2 * 512;
        prefetch(d, next, PK_SCALE_BYTES);
        prefetch(p + i % 2 * (PK_Q6_K_BYTES / 2), next, PK_Q6_K_BYTES / 2);
        q6_k_block(sum, d, s, ql, qh, x_at(x, 4 * i, tile), 0);
        q6_k_block(sum, d, s + 2 * ROWS, ql + 512, qh, x_at(x, 4 * i + 1, tile), 1);
        q6_k_block(sum, d, s + 4 * ROWS, ql, qh, x_at(x, 4 * i + 2, tile), 2);
        q6_k_block(sum, d, s + 6 * ROWS, ql + 512, qh, x_at(x, 4 * i + 3, tile), 3);
    }
}

// ---- all panels, all tiles ----

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

static void multiply(const pk_matmul_args *a, size_t panel_bytes, panel_fn fn) {
    const size_t next = (panel_bytes + 63) / 64 * 64;
    const uint8_t *panel = a->w;
    for (size_t row = 0; row < a->rows; row += ROWS, panel += next) {
        const uint8_t *x = a->x;
        for (size_t token = 0; token < a->tokens; token += PK_TILE_TOKENS) {
            const size_t left = a->tokens - token, tile = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS;
            float sum[PK_TILE_TOKENS * ROWS];
            memset(sum, 0, tile * ROWS * sizeof *sum);
            fn(sum, panel, x, tile, a->columns, next);
            for (size_t t = 0; t < tile; t++) store(a, sum + ROWS * t, row, token + t);
            x += a->columns / PK_X_BLOCK * tile * PK_X_BLOCK_BYTES;
        }
    }
}

void pk_matmul_q4_0_avx2(const pk_matmul_args *a) {
    multiply(a, a->columns / 32 * (PK_Q4_0_BYTES + PK_SCALE_BYTES), q4_0);
}

void pk_matmul_q8_0_avx2(const pk_matmul_args *a) {
    multiply(a, a->columns / 32 * (PK_Q8_0_BYTES + PK_SCALE_BYTES), q8_0);
}

void pk_matmul_q4_k_avx2(const pk_matmul_args *a) { multiply(a, a->columns / 256 * Q4_K_BYTES, q4_k); }
void pk_matmul_q5_k_avx2(const pk_matmul_args *a) { multiply(a, a->columns / 256 * Q5_K_BYTES, q5_k); }

void pk_matmul_q6_k_avx2(const pk_matmul_args *a) {
    multiply(a, a->columns / 256 * (PK_Q6_K_BYTES + PK_SCALE_BYTES), q6_k);
}
