// SPDX-License-Identifier: Apache-2.0
// matmul_neon_i8mm.c - quantized weights with Arm's SMMLA: 2 tokens times 2 rows, 8 columns at a time.
//
// Work goes in pieces of up to 8 blocks (256 columns): each is unpacked to signed bytes with two rows in a
// register, then 8 rows times 4 tokens have their sums in registers (8 integer, 8 float), as 2 by 2 until
// they are written. Tiles of fewer tokens, or not of a multiple of 4, go to SDOT. The float operations on a
// sum are the same ones in the same order there and here. Levels stay as stored, without their offset: the
// sums that a tile holds are where such a product starts.
#if !defined(__aarch64__) || !defined(__ARM_FEATURE_MATMUL_INT8)
#error "compile for AArch64 with -march=armv8.2-a+dotprod+i8mm"
#endif
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "matmul.h"

#define INLINE static inline __attribute__((always_inline))
// Compilers move loads far ahead, run out of registers and spill: no load passes this.
#define KEEP_ORDER() __asm__ volatile("" ::: "memory")
enum { ROWS = PK_PANEL_ROWS, PIECE = 8, GROUP = 4 * ROWS, GROUPS = PK_X_BLOCK / 4, BLOCK = GROUPS * GROUP };
enum { TOKENS = 4, PAIRS = 4, SUMS = TOKENS / 2 * PAIRS };  // at once: tokens, pairs of rows, registers

// Up to 8 blocks of 32 columns of a panel. Rows come in pairs.
typedef struct {
    int8_t q[PIECE][GROUPS / 2][ROWS / 2][2][8];  // 8 columns of a row, then of the next
    float d[PIECE][2][2 * ROWS];  // every factor but the activation's; [1]: Q6_K's second half
    float min[PIECE][2 * ROWS];   // Q4_K, Q5_K: dmin * m / 8, for the -8 of the stored sums
} piece;

// ---- weights ----

INLINE int has_min(pk_weight type) { return type == PK_W_Q4_K || type == PK_W_Q5_K; }

INLINE float32x4_t halves(const uint8_t *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }

INLINE float32x4_t four_u8(const uint8_t *p) {
    uint32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    const uint16x8_t wide = vmovl_u8(vcreate_u8(bytes));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
}

INLINE float32x4_t four_s8(const uint8_t *p) {
    uint32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    const int16x8_t wide = vmovl_s8(vcreate_s8(bytes));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

INLINE uint8x16_t nibbles(const uint8_t *q, int high) {
    const uint8x16_t both = vld1q_u8(q);
    return high ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
}

// Bits of 16 bytes, moved from position `at` to position 4.
INLINE uint8x16_t high_bits(const uint8_t *q, size_t at, uint8_t mask) {
    return vandq_u8(vshlq_u8(vld1q_u8(q), vdupq_n_s8((int8_t)(4 - (int)at))), vdupq_n_u8(mask));
}

// Rows [row, row + 4) of columns 4g.. of block b of a piece whose levels begin at w. high: where this block's
// nibbles are; a constant, so that no shift is by a variable.
INLINE int8x16_t levels(pk_weight type, const uint8_t *w, size_t b, size_t g, size_t row, int high) {
    const size_t at = g * GROUP + 4 * row;
    switch (type) {
        case PK_W_Q4_0: return vreinterpretq_s8_u8(nibbles(w + b * BLOCK / 2 + at % (4 * GROUP), g >= 4));
        case PK_W_Q4_K: return vreinterpretq_s8_u8(nibbles(w + b / 2 * BLOCK + at, high));
        case PK_W_Q5_K:
            return vreinterpretq_s8_u8(vorrq_u8(nibbles(w + b / 2 * BLOCK + at, high),
                                                high_bits(w + 2048 + at, b, 16)));
        case PK_W_Q6_K:
            return vreinterpretq_s8_u8(vorrq_u8(nibbles(w + (b / 4 * 2 + b % 2) * BLOCK + at, high),
                                                high_bits(w + 2048 + b / 4 * BLOCK + at, b % 4 * 2, 48)));
        default: return vld1q_s8((const int8_t *)w + b * BLOCK + at);
    }
}

// Where piece i begins, and its scales, which Q4_K and Q5_K have among the first bytes.
INLINE pk_block piece_at(pk_weight type, size_t columns, size_t i) {
    switch (type) {
        case PK_W_Q4_0: return pk_place(i * PIECE, columns / PK_X_BLOCK, PK_Q4_0_BYTES);
        case PK_W_Q4_K: return (pk_block){i * 2368, i * 2368};
        case PK_W_Q5_K: return (pk_block){i * 2880, i * 2880};
        case PK_W_Q6_K: return pk_place(i, columns / 256, PK_Q6_K_BYTES);
        default: return pk_place(i * PIECE, columns / PK_X_BLOCK, PK_Q8_0_BYTES);
    }
}

INLINE const uint8_t *levels_at(pk_weight type, const uint8_t *panel, size_t columns, size_t i) {
    return panel + piece_at(type, columns, i).q + (has_min(type) ? 320 : type == PK_W_Q6_K ? 256 : 0);
}

// Rows r and r + 1 twice, for a register of sums.
INLINE void put(float *restrict to, size_t row, float32x4_t factors) {
    vst1q_f32(to + 2 * row, vcombine_f32(vget_low_f32(factors), vget_low_f32(factors)));
    vst1q_f32(to + 2 * row + 4, vcombine_f32(vget_high_f32(factors), vget_high_f32(factors)));
}

// The factors of piece i.
INLINE void scales(piece *restrict to, pk_weight type, const uint8_t *panel, size_t columns, size_t i,
                   size_t blocks) {
    const pk_block at = piece_at(type, columns, i);
    const uint8_t *p = panel + at.q, *d16 = panel + at.d;
    for (size_t row = 0; row < ROWS; row += 4) {
        if (has_min(type)) {
            const float32x4_t d = halves(p + 2 * row), dmin = vmulq_n_f32(halves(p + 32 + 2 * row), 0.125f);
            for (size_t b = 0; b < blocks; b++) {
                put(to->d[b][0], row, vmulq_f32(d, four_u8(p + 64 + b * ROWS + row)));
                put(to->min[b], row, vmulq_f32(dmin, four_u8(p + 192 + b * ROWS + row)));
            }
        } else if (type == PK_W_Q6_K) {
            const float32x4_t d = halves(d16 + 2 * row);
            for (size_t b = 0; b < 2 * blocks; b++) {
                put(to->d[b / 2][b % 2], row, vmulq_f32(d, four_s8(p + b * ROWS + row)));
            }
        } else {
            for (size_t b = 0; b < blocks; b++) {
                put(to->d[b][0], row, halves(d16 + b * PK_SCALE_BYTES + 2 * row));
            }
        }
    }
}

INLINE void unpack_block(int8_t *restrict to, pk_weight type, const uint8_t *w, size_t b, int high) {
#pragma GCC unroll 4
    for (size_t i = 0; i < GROUPS / 2; i++) {
#pragma GCC unroll 4
        for (size_t row = 0; row < ROWS; row += 4) {
            const int32x4_t left = vreinterpretq_s32_s8(levels(type, w, b, 2 * i, row, high));
            const int32x4_t right = vreinterpretq_s32_s8(levels(type, w, b, 2 * i + 1, row, high));
            vst1q_s8(to + 2 * GROUP * i + 8 * row, vreinterpretq_s8_s32(vzip1q_s32(left, right)));
            vst1q_s8(to + 2 * GROUP * i + 8 * row + 16, vreinterpretq_s8_s32(vzip2q_s32(left, right)));
        }
    }
}

// Blocks whose nibbles are low and as many whose nibbles are high take turns.
INLINE void unpack(piece *restrict to, pk_weight type, const uint8_t *w, size_t blocks) {
    const size_t turn = type == PK_W_Q6_K ? 2 : 1;
    for (size_t b = 0; b < blocks;) {
        for (const size_t last = b + turn; b < last; b++) unpack_block(to->q[b][0][0][0], type, w, b, 0);
        if (type == PK_W_Q4_0 || type == PK_W_Q8_0) continue;
        for (const size_t last = b + turn; b < last; b++) unpack_block(to->q[b][0][0][0], type, w, b, 1);
    }
}

// ---- products: [t][r] of 2 tokens and 2 rows in a register ----

// The numbers of 4 tokens, each for two rows.
INLINE void begin(int32x4_t *dot, const int32_t *start) {
    const int32x4_t s = start ? vld1q_s32(start) : vdupq_n_s32(0);
    const int32x4_t pairs[2] = {vzip1q_s32(s, s), vzip2q_s32(s, s)};
#pragma GCC unroll 8
    for (size_t i = 0; i < SUMS; i++) dot[i] = pairs[i / PAIRS];
}

// Adds 16 columns; w: the first 8 of them, of the first of the 8 rows.
INLINE void add_half(int32x4_t *dot, const int8_t *w, const uint8_t *q) {
    int8x16_t x[TOKENS];
#pragma GCC unroll 2
    for (size_t t = 0; t < TOKENS; t += 2) {
        const int64x2_t a = vreinterpretq_s64_u8(vld1q_u8(q + t * PK_X_BLOCK));
        const int64x2_t b = vreinterpretq_s64_u8(vld1q_u8(q + (t + 1) * PK_X_BLOCK));
        x[t] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
        x[t + 1] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
    }
#pragma GCC unroll 2
    for (size_t eight = 0; eight < 2; eight++) {
        KEEP_ORDER();
#pragma GCC unroll 4
        for (size_t i = 0; i < PAIRS; i++) {
            const int8x16_t level = vld1q_s8(w + eight * 2 * GROUP + 16 * i);
            dot[i] = vmmlaq_s32(dot[i], x[eight], level);
            dot[PAIRS + i] = vmmlaq_s32(dot[PAIRS + i], x[2 + eight], level);
        }
    }
}

INLINE void end(float32x4_t *sum, const int32x4_t *dot, const float *d, float32x4_t x_d) {
    const float32x4_t first = vzip1q_f32(x_d, x_d), second = vzip2q_f32(x_d, x_d);
#pragma GCC unroll 4
    for (size_t i = 0; i < PAIRS; i++) {
        const float32x4_t factor = vld1q_f32(d + 4 * i);
        sum[i] = vfmaq_f32(sum[i], vcvtq_f32_s32(dot[i]), vmulq_f32(factor, first));
        sum[PAIRS + i] = vfmaq_f32(sum[PAIRS + i], vcvtq_f32_s32(dot[PAIRS + i]), vmulq_f32(factor, second));
    }
}

// Adds block b of a piece to sum, [tokens / 2][4] of two rows from `row` on; x: that block of the tokens from
// t0 on.
INLINE void add_block(float32x4_t *sum, pk_weight type, const piece *p, size_t b, size_t row,
                      const uint8_t *x, size_t tile, size_t t0) {
    const uint8_t *q = x + PK_X_BLOCK * t0;
    const uint8_t *d = x + PK_X_BLOCK * tile + 4 * t0;
    const int32_t *s8 = (const int32_t *)(const void *)(d + 4 * tile), *s32 = s8 + tile;
    const int8_t *w = p->q[b][0][row / 2][0];
    const float32x4_t x_d = vreinterpretq_f32_u8(vld1q_u8(d));
    int32x4_t dot[SUMS];
    begin(dot, type == PK_W_Q4_0 ? s8 : type == PK_W_Q6_K ? s32 : NULL);
    add_half(dot, w, q);
    if (type == PK_W_Q6_K) {
        end(sum, dot, p->d[b][0] + 2 * row, x_d);
        begin(dot, s32 + tile);
    }
    add_half(dot, w + BLOCK / 2, q + 16);
    end(sum, dot, p->d[b][type == PK_W_Q6_K] + 2 * row, x_d);
    if (!has_min(type)) return;
    const float32x4_t x_sum = vmulq_f32(x_d, vcvtq_f32_s32(vld1q_s32(s8)));
    const float32x4_t first = vzip1q_f32(x_sum, x_sum), second = vzip2q_f32(x_sum, x_sum);
#pragma GCC unroll 4
    for (size_t i = 0; i < PAIRS; i++) {
        const float32x4_t min = vld1q_f32(p->min[b] + 2 * row + 4 * i);
        sum[i] = vfmaq_f32(sum[i], min, first);
        sum[PAIRS + i] = vfmaq_f32(sum[PAIRS + i], min, second);
    }
}

// Adds a piece to 8 rows from `row` on of 4 tokens from t0 on in sums [tile][16].
INLINE void add_piece(float *restrict sums, pk_weight type, const piece *p, size_t blocks, size_t row,
                      const uint8_t *x, size_t tile, size_t t0) {
    float32x4_t sum[SUMS];
    float *to = sums + t0 * ROWS + row;
#pragma GCC unroll 8
    for (size_t i = 0; i < SUMS; i++) {
        const float *from = to + i / PAIRS * 2 * ROWS + i % PAIRS * 2;
        sum[i] = vcombine_f32(vld1_f32(from), vld1_f32(from + ROWS));
    }
    for (size_t b = 0; b < blocks; b++, x += tile * PK_X_BLOCK_BYTES) {
        add_block(sum, type, p, b, row, x, tile, t0);
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < SUMS; i++) {
        float *at = to + i / PAIRS * 2 * ROWS + i % PAIRS * 2;
        vst1_f32(at, vget_low_f32(sum[i]));
        vst1_f32(at + ROWS, vget_high_f32(sum[i]));
    }
}

// All columns of a panel times a tile of a multiple of 4 tokens.
INLINE void multiply_tile(float *restrict sums, pk_weight type, const uint8_t *panel, size_t columns,
                          const uint8_t *x, size_t tile) {
    _Alignas(64) piece p;
    const size_t blocks = columns / PK_X_BLOCK;
    for (size_t first = 0; first < blocks; first += PIECE, x += PIECE * tile * PK_X_BLOCK_BYTES) {
        const size_t left = blocks - first, n = left < PIECE ? left : PIECE;
        scales(&p, type, panel, columns, first / PIECE, n);
        unpack(&p, type, levels_at(type, panel, columns, first / PIECE), n);
        for (size_t t = 0; t < tile; t += TOKENS) {
            for (size_t row = 0; row < ROWS; row += 2 * PAIRS) add_piece(sums, type, &p, n, row, x, tile, t);
        }
    }
}

static void store(const pk_matmul_args *a, const float *sums) {
    for (size_t t = 0; t < a->tokens; t++, sums += ROWS) {
        float *out = a->out + t * a->out_stride;
        for (size_t r = 0; r < a->rows; r++) out[r] = a->add ? fmaf(a->scale, sums[r], out[r]) : sums[r];
    }
}

INLINE void multiply(const pk_matmul_args *a, pk_weight type, size_t panel_bytes, pk_matmul_fn few) {
    const size_t blocks = a->columns / PK_X_BLOCK;
    pk_matmul_args part = *a;  // one panel and one tile
    for (size_t row = 0; row < a->rows; row += ROWS, part.w += (panel_bytes + 63) / 64 * 64) {
        part.x = a->x;
        part.rows = a->rows - row < ROWS ? a->rows - row : ROWS;
        for (size_t token = 0; token < a->tokens; token += PK_TILE_TOKENS) {
            const size_t left = a->tokens - token;
            part.tokens = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS;
            part.out = a->out + token * a->out_stride + row;
            if (part.tokens % TOKENS) {
                few(&part);
            } else {
                _Alignas(64) float sums[PK_TILE_TOKENS * ROWS] = {0.0f};
                multiply_tile(sums, type, part.w, a->columns, part.x, part.tokens);
                store(&part, sums);
            }
            part.x += blocks * part.tokens * PK_X_BLOCK_BYTES;
        }
    }
}

void pk_matmul_q4_0_neon_i8mm(const pk_matmul_args *a) {
    multiply(a, PK_W_Q4_0, a->columns / 32 * 288, pk_matmul_q4_0_neon_dotprod);
}

void pk_matmul_q8_0_neon_i8mm(const pk_matmul_args *a) {
    multiply(a, PK_W_Q8_0, a->columns / 32 * 544, pk_matmul_q8_0_neon_dotprod);
}

void pk_matmul_q4_k_neon_i8mm(const pk_matmul_args *a) {
    multiply(a, PK_W_Q4_K, a->columns / 256 * 2368, pk_matmul_q4_k_neon_dotprod);
}

void pk_matmul_q5_k_neon_i8mm(const pk_matmul_args *a) {
    multiply(a, PK_W_Q5_K, a->columns / 256 * 2880, pk_matmul_q5_k_neon_dotprod);
}

void pk_matmul_q6_k_neon_i8mm(const pk_matmul_args *a) {
    multiply(a, PK_W_Q6_K, a->columns / 256 * 3360, pk_matmul_q6_k_neon_dotprod);
}
