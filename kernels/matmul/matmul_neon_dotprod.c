// SPDX-License-Identifier: Apache-2.0
// matmul_neon_dotprod.c - quantized weights with Arm's SDOT: a register is four rows, one SDOT four columns
// of them.
//
// SDOT takes its second factor by lane, so 16 bytes of a token serve four groups of columns without a
// broadcast. Work goes in pieces of up to 8 blocks (256 columns). From 4 tokens on a piece is first unpacked
// to signed bytes, and the sums of 8 rows times 4 tokens stay in registers (8 integer, 8 float); for fewer,
// 16 rows are unpacked on the way. Both do the same float operations in the same order. Levels stay as
// stored, without their offset: the sums that a tile holds are where such a product starts.
#if !defined(__aarch64__) || !defined(__ARM_FEATURE_DOTPROD)
#error "compile for AArch64 with -march=armv8.2-a+dotprod"
#endif
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "matmul.h"

#define INLINE static inline __attribute__((always_inline))
// Compilers move loads far ahead, run out of registers and spill: no load passes this.
#define KEEP_ORDER() __asm__ volatile("" ::: "memory")
enum { ROWS = PK_PANEL_ROWS, PIECE = 8, GROUP = 4 * ROWS, GROUPS = PK_X_BLOCK / 4, BLOCK = GROUPS * GROUP };

// Up to 8 blocks of 32 columns of a panel, unpacked.
typedef struct {
    int8_t q[PIECE][GROUPS][ROWS][4];  // Q8_0's own order
    float d[PIECE][2][ROWS];           // every factor but the activation's; [1]: Q6_K's second half
    float min[PIECE][ROWS];            // Q4_K, Q5_K: dmin * m / 8, for the -8 of the stored sums
} piece;

// What a register tile is made of.
typedef struct {
    const uint8_t *w;  // levels of a piece, of the first row that is meant
    const piece *p;    // its factors
    size_t row;        // that first row
    const uint8_t *x;  // the piece's first block in the tile
    size_t tile, t0;   // its tokens, and the first one that is meant
} part;

// One block of the tokens from t0 on.
typedef struct {
    size_t b;  // which
    const int8_t *q;
    const uint8_t *d;
    const int32_t *s8, *s32[2];
} block_x;

INLINE block_x x_at(const part *m, size_t block) {
    const uint8_t *p = m->x + block * m->tile * PK_X_BLOCK_BYTES;
    const int32_t *s8 = (const int32_t *)(const void *)(p + 36 * m->tile) + m->t0;
    return (block_x){
        .b = block,
        .q = (const int8_t *)p + PK_X_BLOCK * m->t0,
        .d = p + 32 * m->tile + 4 * m->t0,
        .s8 = s8,
        .s32 = {s8 + m->tile, s8 + 2 * m->tile},
    };
}

// Four bytes of each of 4, 2 or 1 tokens: in the first lanes, or in all.
INLINE uint8x16_t of_tokens(const uint8_t *x, size_t tokens) {
    if (tokens == 4) return vld1q_u8(x);
    if (tokens == 2) return vcombine_u8(vld1_u8(x), vdup_n_u8(0));
    uint32_t bits;
    memcpy(&bits, x, sizeof bits);
    return vreinterpretq_u8_u32(vdupq_n_u32(bits));
}

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

// The factors of piece i.
INLINE void scales(piece *restrict to, pk_weight type, const uint8_t *panel, size_t columns, size_t i,
                   size_t blocks) {
    const pk_block at = piece_at(type, columns, i);
    const uint8_t *p = panel + at.q, *d16 = panel + at.d;
    for (size_t row = 0; row < ROWS; row += 4) {
        if (has_min(type)) {
            const float32x4_t d = halves(p + 2 * row), dmin = vmulq_n_f32(halves(p + 32 + 2 * row), 0.125f);
            for (size_t b = 0; b < blocks; b++) {
                vst1q_f32(to->d[b][0] + row, vmulq_f32(d, four_u8(p + 64 + b * ROWS + row)));
                vst1q_f32(to->min[b] + row, vmulq_f32(dmin, four_u8(p + 192 + b * ROWS + row)));
            }
        } else if (type == PK_W_Q6_K) {
            const float32x4_t d = halves(d16 + 2 * row);
            for (size_t b = 0; b < 2 * blocks; b++) {
                vst1q_f32(to->d[b / 2][b % 2] + row, vmulq_f32(d, four_s8(p + b * ROWS + row)));
            }
        } else {
            for (size_t b = 0; b < blocks; b++) {
                vst1q_f32(to->d[b][0] + row, halves(d16 + b * PK_SCALE_BYTES + 2 * row));
            }
        }
    }
}

INLINE void unpack_block(int8_t *restrict to, pk_weight type, const uint8_t *w, size_t b, int high) {
#pragma GCC unroll 4
    for (size_t g = 0; g < GROUPS / 2; g++) {  // two at a time: Q4_0 has them in one byte
#pragma GCC unroll 4
        for (size_t row = 0; row < ROWS; row += 4) {
            vst1q_s8(to + g * GROUP + 4 * row, levels(type, w, b, g, row, high));
            vst1q_s8(to + (g + 4) * GROUP + 4 * row, levels(type, w, b, g + 4, row, high));
        }
    }
}

// Blocks whose nibbles are low and as many whose nibbles are high take turns.
INLINE size_t same_nibbles(pk_weight type) { return type == PK_W_Q6_K ? 2 : 1; }

INLINE void unpack(piece *restrict to, pk_weight type, const uint8_t *w, size_t blocks) {
    const size_t turn = same_nibbles(type);
    for (size_t b = 0; b < blocks;) {
        for (const size_t last = b + turn; b < last; b++) unpack_block(to->q[b][0][0], type, w, b, 0);
        if (type == PK_W_Q4_0) continue;
        for (const size_t last = b + turn; b < last; b++) unpack_block(to->q[b][0][0], type, w, b, 1);
    }
}

// ---- products ----

// Adds 16 columns, half of a block, to dot [tokens][quads]. Here and below type, from, high, tokens and quads
// are constants: `type` says what is to be done, `from` how the levels are laid out.
INLINE void add_half(int32x4_t *dot, pk_weight from, int high, size_t tokens, size_t quads, const part *m,
                     const block_x *x, size_t half) {
    int8x16_t q[4];
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; t++) q[t] = vld1q_s8(x->q + half * 16 + t * PK_X_BLOCK);
#define COLUMNS(lane)                                                                    \
    if (from != PK_W_Q4_0) KEEP_ORDER();                                                 \
    _Pragma("GCC unroll 4") for (size_t i = 0; i < quads; i++) {                         \
        const int8x16_t level = levels(from, m->w, x->b, half * 4 + lane, 4 * i, high);  \
        _Pragma("GCC unroll 4") for (size_t t = 0; t < tokens; t++) {                    \
            dot[t * quads + i] = vdotq_laneq_s32(dot[t * quads + i], level, q[t], lane); \
        }                                                                                \
    }
    COLUMNS(0)
    COLUMNS(1)
    COLUMNS(2)
    COLUMNS(3)
#undef COLUMNS
}

INLINE void begin(int32x4_t *dot, const int32_t *start, size_t tokens, size_t quads) {
#pragma GCC unroll 8
    for (size_t i = 0; i < tokens * quads; i++) {
        dot[i] = start ? vld1q_dup_s32(start + i / quads) : vdupq_n_s32(0);
    }
}

INLINE void end(float32x4_t *sum, const int32x4_t *dot, const float *d, float32x4_t x_d, size_t tokens,
                size_t quads) {
#pragma GCC unroll 4
    for (size_t i = 0; i < quads; i++) {
        const float32x4_t factor = vld1q_f32(d + 4 * i);
#pragma GCC unroll 4
        for (size_t t = 0; t < tokens; t++) {
            float32x4_t *to = &sum[t * quads + i];
            *to = vfmaq_f32(*to, vcvtq_f32_s32(dot[t * quads + i]), vmulq_n_f32(factor, x_d[t]));
        }
    }
}

// Adds block b to sum, [tokens][quads] of four rows each.
INLINE void add_block(float32x4_t *sum, pk_weight type, pk_weight from, int high, size_t tokens, size_t quads,
                      const part *m, size_t b) {
    const block_x x = x_at(m, b);
    const float32x4_t x_d = vreinterpretq_f32_u8(of_tokens(x.d, tokens));
    int32x4_t dot[8];
    begin(dot, type == PK_W_Q4_0 ? x.s8 : type == PK_W_Q6_K ? x.s32[0] : NULL, tokens, quads);
    add_half(dot, from, high, tokens, quads, m, &x, 0);
    if (type == PK_W_Q6_K) {
        end(sum, dot, m->p->d[b][0] + m->row, x_d, tokens, quads);
        begin(dot, x.s32[1], tokens, quads);
    }
    add_half(dot, from, high, tokens, quads, m, &x, 1);
    end(sum, dot, m->p->d[b][type == PK_W_Q6_K] + m->row, x_d, tokens, quads);
    if (!has_min(type)) return;
    const int32x4_t s8 = vreinterpretq_s32_u8(of_tokens((const uint8_t *)x.s8, tokens));
    const float32x4_t x_sum = vmulq_f32(x_d, vcvtq_f32_s32(s8));
#pragma GCC unroll 4
    for (size_t i = 0; i < quads; i++) {
        const float32x4_t min = vld1q_f32(m->p->min[b] + m->row + 4 * i);
#pragma GCC unroll 4
        for (size_t t = 0; t < tokens; t++) {
            sum[t * quads + i] = vfmaq_n_f32(sum[t * quads + i], min, x_sum[t]);
        }
    }
}

// Adds a piece of so many blocks to sums [tile][16].
INLINE void add_piece(float *restrict sums, pk_weight type, pk_weight from, size_t tokens, size_t quads,
                      const part *m, size_t blocks) {
    const size_t turn = same_nibbles(from);
    float *to = sums + m->t0 * ROWS + m->row;
    float32x4_t sum[8];
#pragma GCC unroll 8
    for (size_t i = 0; i < tokens * quads; i++) sum[i] = vld1q_f32(to + i / quads * ROWS + i % quads * 4);
    for (size_t b = 0; b < blocks;) {
        for (const size_t last = b + turn; b < last; b++) add_block(sum, type, from, 0, tokens, quads, m, b);
        if (from == PK_W_Q4_0 || from == PK_W_Q8_0) continue;
        for (const size_t last = b + turn; b < last; b++) add_block(sum, type, from, 1, tokens, quads, m, b);
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < tokens * quads; i++) vst1q_f32(to + i / quads * ROWS + i % quads * 4, sum[i]);
}

// All columns of a panel times a tile.
INLINE void multiply_tile(float *restrict sums, pk_weight type, const uint8_t *panel, size_t columns,
                          const uint8_t *x, size_t tile) {
    _Alignas(64) piece p;
    const size_t blocks = columns / PK_X_BLOCK;
    for (size_t first = 0; first < blocks; first += PIECE, x += PIECE * tile * PK_X_BLOCK_BYTES) {
        const size_t left = blocks - first, n = left < PIECE ? left : PIECE;
        const uint8_t *w = levels_at(type, panel, columns, first / PIECE), *plain = w;
        scales(&p, type, panel, columns, first / PIECE, n);
        if (type != PK_W_Q8_0 && tile >= 4) {
            unpack(&p, type, w, n);
            plain = (const uint8_t *)p.q;
        }
        size_t t = 0;
        for (; t + 4 <= tile; t += 4) {
            for (size_t row = 0; row < ROWS; row += 8) {
                add_piece(sums, type, PK_W_Q8_0, 4, 2, &(part){plain + 4 * row, &p, row, x, tile, t}, n);
            }
        }
        if (t + 2 <= tile) {
            add_piece(sums, type, type, 2, 4, &(part){w, &p, 0, x, tile, t}, n);
            t += 2;
        }
        if (t < tile) add_piece(sums, type, type, 1, 4, &(part){w, &p, 0, x, tile, t}, n);
    }
}

static void store(const pk_matmul_args *a, const float *sums, size_t row, size_t token, size_t tile) {
    const size_t left = a->rows - row, rows = left < ROWS ? left : ROWS;
    for (size_t t = 0; t < tile; t++, sums += ROWS) {
        float *out = a->out + (token + t) * a->out_stride + row;
        for (size_t r = 0; r < rows; r++) out[r] = a->add ? fmaf(a->scale, sums[r], out[r]) : sums[r];
    }
}

INLINE void multiply(const pk_matmul_args *a, pk_weight type, size_t panel_bytes) {
    const size_t blocks = a->columns / PK_X_BLOCK;
    const uint8_t *panel = a->w;
    for (size_t row = 0; row < a->rows; row += ROWS, panel += (panel_bytes + 63) / 64 * 64) {
        const uint8_t *x = a->x;
        for (size_t token = 0; token < a->tokens; token += PK_TILE_TOKENS) {
            const size_t left = a->tokens - token, tile = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS;
            _Alignas(64) float sums[PK_TILE_TOKENS * ROWS] = {0.0f};
            multiply_tile(sums, type, panel, a->columns, x, tile);
            store(a, sums, row, token, tile);
            x += blocks * tile * PK_X_BLOCK_BYTES;
        }
    }
}

void pk_matmul_q4_0_neon_dotprod(const pk_matmul_args *a) { multiply(a, PK_W_Q4_0, a->columns / 32 * 288); }
void pk_matmul_q8_0_neon_dotprod(const pk_matmul_args *a) { multiply(a, PK_W_Q8_0, a->columns / 32 * 544); }
void pk_matmul_q4_k_neon_dotprod(const pk_matmul_args *a) { multiply(a, PK_W_Q4_K, a->columns / 256 * 2368); }
void pk_matmul_q5_k_neon_dotprod(const pk_matmul_args *a) { multiply(a, PK_W_Q5_K, a->columns / 256 * 2880); }
void pk_matmul_q6_k_neon_dotprod(const pk_matmul_args *a) { multiply(a, PK_W_Q6_K, a->columns / 256 * 3360); }
