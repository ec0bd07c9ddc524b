// SPDX-License-Identifier: Apache-2.0
// attention_neon.c - tiles of 8 queries by 8 keys (many), or a few heads by 4 keys straight from the cache
// (one).
//
// Many: a block's keys are turned to [column][key] and its values to float32 once for all queries; then
// scores and sums are the same product, 8 rows by 8 columns in 16 registers, the rows' factor taken by lane.
#if !defined(__aarch64__)
#error "AArch64 only"
#endif
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "attention.h"

#define INLINE static inline __attribute__((always_inline))
// Compilers move loads far ahead, run out of registers and spill: no load passes this.
#define KEEP_ORDER() __asm__ volatile("" ::: "memory")
enum { LANES = 4, KEYS = PK_ATTENTION_KEYS, HEAD = PK_ATTENTION_MAX_HEAD, ROWS = PK_ATTENTION_QUERIES };
enum { TILE = 8, HIDDEN = 0xfc00 };  // rows and columns of a product; -infinity as a float16

typedef struct {
    float q[ROWS][HEAD], k[HEAD][KEYS], v[KEYS][HEAD];
    float p[TILE][KEYS];  // scores, then their exp, of one tile of queries
    float sum[ROWS][HEAD], largest[ROWS], total[ROWS];
} workspace;
_Static_assert(sizeof(workspace) <= PK_ATTENTION_SCRATCH, "the scratch is too small");

INLINE float32x4_t set(float x) { return vdupq_n_f32(x); }

// e^x for x <= 0, within 1 ulp; 0 below -87, where the result would be subnormal; NaN stays. x = n ln 2 + r
// with ln 2 in two parts, and a polynomial of degree 6 whose relative error is least over |r| <= ln 2 / 2.
INLINE float32x4_t exponential(float32x4_t x) {
    const uint32x4_t tiny = vcltq_f32(x, set(-87.0f));
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 0x1.715476p+0f));
    float32x4_t r = vfmsq_f32(x, n, set(0x1.62e4p-1f));
    r = vfmsq_f32(r, n, set(0x1.7f7d1cp-20f));
    float32x4_t p = vfmaq_f32(set(0x1.1239e2p-7f), set(0x1.6a2434p-10f), r);
    p = vfmaq_f32(set(0x1.5558f2p-5f), p, r);
    p = vfmaq_f32(set(0x1.555492p-3f), p, r);
    p = vfmaq_f32(set(0x1.fffffcp-2f), p, r);
    const float32x4_t y = vaddq_f32(set(1.0f), vfmaq_f32(r, vmulq_f32(r, r), p));
    // Unsigned, because n is anything where x is tiny. NaN has no n: it is 0 then, and y's own bits stay.
    const uint32x4_t twos = vshlq_n_u32(vreinterpretq_u32_s32(vcvtq_s32_f32(n)), 23);
    return vreinterpretq_f32_u32(vbicq_u32(vaddq_u32(vreinterpretq_u32_f32(y), twos), tiny));
}

// ---- keys, values and masks ----

// Columns d.. of a row: eight numbers. d is a multiple of 8.
INLINE void load_8(float32x4_t *restrict to, const uint8_t *row, pk_kv type, size_t d) {
    if (type == PK_KV_F16) {
        const float16x8_t x = vreinterpretq_f16_u8(vld1q_u8(row + 2 * d));
        to[0] = vcvt_f32_f16(vget_low_f16(x));
        to[1] = vcvt_high_f32_f16(x);
        return;
    }
    const uint8_t *block = row + d / 32 * 34;
    uint16_t bits;
    memcpy(&bits, block, sizeof bits);
    const float32x4_t scale = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits)));
    const int16x8_t q = vmovl_s8(vreinterpret_s8_u8(vld1_u8(block + 2 + d % 32)));
    to[0] = vmulq_f32(scale, vcvtq_f32_s32(vmovl_s16(vget_low_s16(q))));
    to[1] = vmulq_f32(scale, vcvtq_f32_s32(vmovl_high_s16(q)));
}

INLINE void turn(float32x4_t *restrict x) {
    const float32x4_t a = vtrn1q_f32(x[0], x[1]), b = vtrn2q_f32(x[0], x[1]);
    const float32x4_t c = vtrn1q_f32(x[2], x[3]), d = vtrn2q_f32(x[2], x[3]);
    const float64x2_t a2 = vreinterpretq_f64_f32(a), b2 = vreinterpretq_f64_f32(b);
    const float64x2_t c2 = vreinterpretq_f64_f32(c), d2 = vreinterpretq_f64_f32(d);
    x[0] = vreinterpretq_f32_f64(vtrn1q_f64(a2, c2));
    x[1] = vreinterpretq_f32_f64(vtrn1q_f64(b2, d2));
    x[2] = vreinterpretq_f32_f64(vtrn2q_f64(a2, c2));
    x[3] = vreinterpretq_f32_f64(vtrn2q_f64(b2, d2));
}

// n keys; the last one stands in for those that fill up a tile.
INLINE void load_keys(workspace *w, const pk_attention_args *a, size_t at, size_t n, pk_kv type) {
    for (size_t key = 0; key < n || key % TILE; key += LANES) {
        const uint8_t *row[LANES];
        for (size_t i = 0; i < LANES; i++) row[i] = a->k + (at + (key + i < n ? key + i : n - 1)) * a->k_row;
        for (size_t d = 0; d < a->head; d += 8) {
            float32x4_t both[LANES][2], x[2][LANES];
            for (size_t i = 0; i < LANES; i++) load_8(both[i], row[i], type, d);
            for (size_t half = 0; half < 2; half++) {
                for (size_t i = 0; i < LANES; i++) x[half][i] = both[i][half];
                turn(x[half]);
                for (size_t i = 0; i < LANES; i++) vst1q_f32(w->k[d + 4 * half + i] + key, x[half][i]);
            }
        }
    }
}

// n keys, and zeros to fill up four.
INLINE void load_values(workspace *w, const pk_attention_args *a, size_t at, size_t n, pk_kv type) {
    for (size_t key = 0; key < n; key++) {
        for (size_t d = 0; d < a->head; d += 8) {
            float32x4_t x[2];
            load_8(x, a->v + (at + key) * a->v_row, type, d);
            vst1q_f32(w->v[key] + d, x[0]);
            vst1q_f32(w->v[key] + d + 4, x[1]);
        }
    }
    for (size_t key = n; key % LANES; key++) memset(w->v[key], 0, sizeof w->v[key]);
}

// How many of n keys at `at` any token sees: the rest, at the end, costs nothing.
static size_t seen(const pk_attention_args *a, size_t at, size_t n) {
    if (!a->mask) return n;
    uint16_t some[KEYS] = {0}, bits[KEYS] = {0};
    for (size_t t = 0; t < a->tokens; t++) {
        memcpy(bits, a->mask + t * a->mask_token + 2 * at, n * sizeof bits[0]);
        for (size_t i = 0; i < KEYS; i++) some[i] |= bits[i] ^ HIDDEN;
    }
    while (n && !some[n - 1]) n--;
    return n;
}

// ---- softmax ----

// Four of n scores from `key` on, scaled and masked; -infinity behind the last.
INLINE float32x4_t masked(const float *p, const uint8_t *mask, float scale, size_t key, size_t n) {
    uint8_t four[2 * LANES] = {0};
    const uint8_t *from = mask ? mask + 2 * key : four;
    if (mask && key + LANES > n) from = memcpy(four, from, 2 * (n - key));
    const float32x4_t bias = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
    const float32x4_t x = vfmaq_n_f32(bias, vld1q_f32(p + key), scale);
    if (key + LANES <= n) return x;
    const uint32_t lanes[LANES] = {0, 1, 2, 3};
    return vbslq_f32(vcltq_u32(vld1q_u32(lanes), vdupq_n_u32((uint32_t)(n - key))), x, set(-INFINITY));
}

// Turns a query's n scores in p to their exp, zeros filling up four; returns what its earlier sums are worth.
static float soften(float *restrict p, float *restrict largest, float *restrict total, const uint8_t *mask,
                    float scale, size_t n) {
    float32x4_t most = set(*largest), sum = set(0.0f);
    for (size_t key = 0; key < n; key += LANES) {
        const float32x4_t x = masked(p, mask, scale, key, n);
        most = vmaxnmq_f32(most, x);  // the number where one is NaN
        vst1q_f32(p + key, x);
    }
    const float now = vmaxnmvq_f32(most);
    const float base = now == -INFINITY ? 0.0f : now;  // -infinity less itself would be NaN
    for (size_t key = 0; key < n; key += LANES) {
        const float32x4_t x = exponential(vsubq_f32(vld1q_f32(p + key), set(base)));
        sum = vaddq_f32(sum, x);
        vst1q_f32(p + key, x);
    }
    const float factor = vgetq_lane_f32(exponential(set(*largest - base)), 0);
    *largest = now;
    *total = fmaf(*total, factor, vaddvq_f32(sum));
    return factor;
}

INLINE const float *query_at(const pk_attention_args *a, size_t i) {
    const uint8_t *q = (const uint8_t *)a->q + i / a->group * a->q_token + i % a->group * a->q_head;
    return (const float *)(const void *)q;
}

static void begin(workspace *w, size_t rows) {
    for (size_t i = 0; i < rows; i++) {
        w->largest[i] = -INFINITY;
        w->total[i] = 0.0f;
        memset(w->sum[i], 0, sizeof w->sum[i]);
    }
}

static void finish(const workspace *w, const pk_attention_args *a, size_t rows) {
    for (size_t i = 0; i < rows; i++) {
        uint8_t *row = (uint8_t *)a->out + i / a->group * a->out_token + i % a->group * a->out_head;
        float *out = (float *)(void *)row;
        float divisor = w->total[i] == 0.0f ? 1.0f : w->total[i];  // no key: the sums are zeros
        if (a->state) {
            a->state[2 * i] = w->largest[i];
            a->state[2 * i + 1] = w->total[i];
            divisor = 1.0f;
        }
        for (size_t d = 0; d < a->head; d += LANES) {
            vst1q_f32(out + d, vdivq_f32(vld1q_f32(w->sum[i] + d), set(divisor)));
        }
    }
}

// ---- many ----

// to[r][0..7] = the sum over `steps`, a multiple of 4, of  x[r][step] * y[step][0..7]
INLINE void product(float *restrict to, size_t to_row, const float *x, size_t x_row, const float *y,
                    size_t y_row, size_t steps) {
    float32x4_t sum[TILE][2];
#pragma GCC unroll 8
    for (size_t r = 0; r < TILE; r++) sum[r][0] = sum[r][1] = set(0.0f);
    for (size_t step = 0; step < steps; step += 4, x += 4, y += 4 * y_row) {
        float32x4_t four[TILE];
#pragma GCC unroll 8
        for (size_t r = 0; r < TILE; r++) four[r] = vld1q_f32(x + r * x_row);
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; i++) {
            KEEP_ORDER();
            const float32x4_t left = vld1q_f32(y + i * y_row), right = vld1q_f32(y + i * y_row + 4);
#pragma GCC unroll 8
            for (size_t r = 0; r < TILE; r++) {
                sum[r][0] = vfmaq_n_f32(sum[r][0], left, four[r][i]);
                sum[r][1] = vfmaq_n_f32(sum[r][1], right, four[r][i]);
            }
        }
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < TILE; r++, to += to_row) {
        vst1q_f32(to, sum[r][0]);
        vst1q_f32(to + 4, sum[r][1]);
    }
}

// Adds n keys from `at` to queries [first, first + 8), of which `rows` are there.
static void attend(workspace *w, const pk_attention_args *a, size_t first, size_t rows, size_t at, size_t n) {
    float factor[TILE];
    for (size_t key = 0; key < n; key += TILE) {
        product(w->p[0] + key, KEYS, w->q[first], HEAD, w->k[0] + key, KEYS, a->head);
    }
    for (size_t r = 0; r < rows; r++) {
        const size_t i = first + r;
        const uint8_t *mask = a->mask ? a->mask + i / a->group * a->mask_token + 2 * at : NULL;
        factor[r] = soften(w->p[r], &w->largest[i], &w->total[i], mask, a->scale, n);
    }
    for (size_t d = 0; d < a->head; d += TILE) {
        float sum[TILE][TILE];
        product(sum[0], TILE, w->p[0], KEYS, w->v[0] + d, HEAD, (n + 3) / 4 * 4);
        for (size_t r = 0; r < rows; r++) {
            float *to = w->sum[first + r] + d;
            vst1q_f32(to, vfmaq_n_f32(vld1q_f32(sum[r]), vld1q_f32(to), factor[r]));
            vst1q_f32(to + 4, vfmaq_n_f32(vld1q_f32(sum[r] + 4), vld1q_f32(to + 4), factor[r]));
        }
    }
}

void pk_attention_many_neon(const pk_attention_args *a) {
    workspace *w = (workspace *)(void *)a->scratch;
    const size_t rows = a->tokens * a->group;
    begin(w, rows);
    for (size_t i = 0; i < rows; i++) memcpy(w->q[i], query_at(a, i), a->head * sizeof *a->q);
    for (size_t i = rows; i % TILE; i++) memset(w->q[i], 0, sizeof w->q[i]);
    for (size_t at = 0; at < a->keys; at += KEYS) {
        const size_t n = seen(a, at, a->keys - at < KEYS ? a->keys - at : KEYS);
        if (n == 0) continue;
        a->k_type == PK_KV_F16 ? load_keys(w, a, at, n, PK_KV_F16) : load_keys(w, a, at, n, PK_KV_Q8_0);
        a->v_type == PK_KV_F16 ? load_values(w, a, at, n, PK_KV_F16) : load_values(w, a, at, n, PK_KV_Q8_0);
        for (size_t i = 0; i < rows; i += TILE) attend(w, a, i, rows - i < TILE ? rows - i : TILE, at, n);
    }
    finish(w, a, rows);
}

// ---- one ----

enum { HEADS = 4 };  // query heads that share a load

// p[h][key] = q of head first + h times key, for n keys. The last key stands in for those that fill up four.
INLINE void dots(workspace *w, const pk_attention_args *a, size_t first, size_t at, size_t n, pk_kv type,
                 size_t heads) {
    for (size_t key = 0; key < n; key += LANES) {
        const uint8_t *row[LANES];
        float32x4_t sum[HEADS][LANES];
#pragma GCC unroll 4
        for (size_t i = 0; i < LANES; i++) row[i] = a->k + (at + (key + i < n ? key + i : n - 1)) * a->k_row;
#pragma GCC unroll 16
        for (size_t i = 0; i < heads * LANES; i++) sum[i / LANES][i % LANES] = set(0.0f);
        for (size_t d = 0; d < a->head; d += 8) {
            float32x4_t k[LANES][2];
#pragma GCC unroll 4
            for (size_t i = 0; i < LANES; i++) load_8(k[i], row[i], type, d);
#pragma GCC unroll 4
            for (size_t h = 0; h < heads; h++) {
                const float *query = query_at(a, first + h) + d;
                const float32x4_t left = vld1q_f32(query), right = vld1q_f32(query + 4);
#pragma GCC unroll 4
                for (size_t i = 0; i < LANES; i++) {
                    sum[h][i] = vfmaq_f32(vfmaq_f32(sum[h][i], k[i][0], left), k[i][1], right);
                }
            }
        }
#pragma GCC unroll 4
        for (size_t h = 0; h < heads; h++) {
            const float32x4_t low = vpaddq_f32(sum[h][0], sum[h][1]), high = vpaddq_f32(sum[h][2], sum[h][3]);
            vst1q_f32(w->p[h] + key, vpaddq_f32(low, high));
        }
    }
}

INLINE void values(workspace *w, const pk_attention_args *a, size_t first, size_t at, size_t n, pk_kv type,
                   size_t heads, const float *factor) {
    for (size_t d = 0; d < a->head; d += 16) {
        float32x4_t sum[HEADS][4];
#pragma GCC unroll 16
        for (size_t i = 0; i < heads * 4; i++) sum[i / 4][i % 4] = set(0.0f);
        const uint8_t *row = a->v + at * a->v_row;
        for (size_t key = 0; key < n; key++, row += a->v_row) {
            float32x4_t v[4];
            load_8(v, row, type, d);
            load_8(v + 2, row, type, d + 8);
#pragma GCC unroll 4
            for (size_t h = 0; h < heads; h++) {
                const float p = w->p[h][key];
#pragma GCC unroll 4
                for (size_t i = 0; i < 4; i++) sum[h][i] = vfmaq_n_f32(sum[h][i], v[i], p);
            }
        }
#pragma GCC unroll 16
        for (size_t i = 0; i < heads * 4; i++) {
            float *to = w->sum[first + i / 4] + d + i % 4 * 4;
            vst1q_f32(to, vfmaq_n_f32(sum[i / 4][i % 4], vld1q_f32(to), factor[i / 4]));
        }
    }
}

INLINE void attend_one(workspace *w, const pk_attention_args *a, size_t first, size_t at, size_t n,
                       size_t heads) {
    float factor[HEADS];
    const uint8_t *mask = a->mask ? a->mask + 2 * at : NULL;
    a->k_type == PK_KV_F16 ? dots(w, a, first, at, n, PK_KV_F16, heads)
                           : dots(w, a, first, at, n, PK_KV_Q8_0, heads);
    for (size_t h = 0; h < heads; h++) {
        factor[h] = soften(w->p[h], &w->largest[first + h], &w->total[first + h], mask, a->scale, n);
    }
    a->v_type == PK_KV_F16 ? values(w, a, first, at, n, PK_KV_F16, heads, factor)
                           : values(w, a, first, at, n, PK_KV_Q8_0, heads, factor);
}

void pk_attention_one_neon(const pk_attention_args *a) {
    workspace *w = (workspace *)(void *)a->scratch;
    begin(w, a->group);
    for (size_t at = 0; at < a->keys; at += KEYS) {
        const size_t n = seen(a, at, a->keys - at < KEYS ? a->keys - at : KEYS);
        for (size_t h = 0; n && h < a->group; h += HEADS) {
            switch (a->group - h) {
                case 1: attend_one(w, a, h, at, n, 1); break;
                case 2: attend_one(w, a, h, at, n, 2); break;
                case 3: attend_one(w, a, h, at, n, 3); break;
                default: attend_one(w, a, h, at, n, 4); break;
            }
        }
    }
    finish(w, a, a->group);
}
