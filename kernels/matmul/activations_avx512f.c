// SPDX-License-Identifier: Apache-2.0
// activations_avx512f.c - four blocks at once: sums across a block share their steps; and 16 x 16 transposes.
// Needs AVX-512F (which brings AVX2); CMake compiles this file with -mavx512f and with -ffp-contract=off: the
// bytes are the scalar code's.
#if !defined(__AVX512F__)
#error "compile with -mavx512f"
#endif
#include <immintrin.h>
#include <string.h>

#include "activations.h"

enum { GROUP = 4, INFINITE = 0x7f800000, A_NAN = 0x7fc00000 };  // blocks at once; float32 bits

// What a group of blocks has besides q.
typedef struct {
    __m128i d;     // f32 [4]
    __m256i s32;   // [2][4]
} group_scales;

// The bits of the largest |x| of each of four blocks. Without signs, floats order as their bits do, NaN last.
static inline __m128i largest(const float *const x[GROUP]) {
    const __m512i signless = _mm512_set1_epi32(0x7fffffff);
    __m512i m[GROUP];
    for (size_t i = 0; i < GROUP; i++) {
        const __m512i low = _mm512_and_si512(_mm512_loadu_si512(x[i]), signless);
        m[i] = _mm512_max_epi32(low, _mm512_and_si512(_mm512_loadu_si512(x[i] + 16), signless));
    }
    const __m512i a = _mm512_max_epi32(_mm512_unpacklo_epi32(m[0], m[1]), _mm512_unpackhi_epi32(m[0], m[1]));
    const __m512i b = _mm512_max_epi32(_mm512_unpacklo_epi32(m[2], m[3]), _mm512_unpackhi_epi32(m[2], m[3]));
    const __m512i all = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// -32 times the sum of each half, [2][4], of four blocks of q, from sums of eight bytes, each 128 too large.
static inline __m256i scaled_sums(const __m256i q[GROUP]) {
    __m256i s[GROUP];
    for (size_t i = 0; i < GROUP; i++) {
        s[i] = _mm256_sad_epu8(_mm256_xor_si256(q[i], _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    }
    const __m256i a = _mm256_add_epi64(_mm256_unpacklo_epi64(s[0], s[1]), _mm256_unpackhi_epi64(s[0], s[1]));
    const __m256i b = _mm256_add_epi64(_mm256_unpacklo_epi64(s[2], s[3]), _mm256_unpackhi_epi64(s[2], s[3]));
    const __m256i sums = _mm256_castps_si256(
        _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _MM_SHUFFLE(2, 0, 2, 0)));
    return _mm256_sub_epi32(_mm256_set1_epi32(32 * 16 * 128), _mm256_slli_epi32(sums, 5));
}

static inline group_scales quantize_group(uint8_t *const to[GROUP], const float *const x[GROUP], __m128i m) {
    const __m128i infinite = _mm_set1_epi32(INFINITE);
    const __m128 inverse = _mm_div_ps(_mm_set1_ps(127.0f), _mm_castsi128_ps(m));
    const __m128i finite = _mm_cmpgt_epi32(infinite, m);
    const __m128i usable = _mm_and_si128(finite, _mm_cmpgt_epi32(infinite, _mm_castps_si128(inverse)));
    float inverses[GROUP];
    int32_t keep[GROUP];
    _mm_storeu_ps(inverses, inverse);
    _mm_storeu_si128((__m128i *)keep, usable);
    __m256i q[GROUP];
    for (size_t i = 0; i < GROUP; i++) {
        const __m512 by = _mm512_set1_ps(inverses[i]);
        const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x[i]), by));
        const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x[i] + 16), by));
        q[i] = _mm256_set_m128i(_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(low));
        q[i] = _mm256_and_si256(q[i], _mm256_set1_epi32(keep[i]));
        _mm256_storeu_si256((__m256i *)to[i], q[i]);
    }
    const __m128i d = _mm_castps_si128(_mm_div_ps(_mm_castsi128_ps(m), _mm_set1_ps(127.0f)));
    const __m128i poison = _mm_andnot_si128(finite, _mm_set1_epi32(A_NAN));
    return (group_scales){_mm_or_si128(_mm_and_si128(d, usable), poison), scaled_sums(q)};
}

// The largest of four tokens over the blocks that share block's scale.
static inline __m128i largest_of_tokens(const pk_activations_args *args, size_t block, size_t token) {
    const size_t first = block / args->shared * args->shared;
    __m128i m = _mm_setzero_si128();
    for (size_t b = first; b < first + args->shared; b++) {
        const float *x[GROUP];
        for (size_t i = 0; i < GROUP; i++) x[i] = args->x + (token + i) * args->x_stride + b * PK_X_BLOCK;
        m = _mm_max_epi32(m, largest(x));
    }
    return m;
}

// The largest of one token over all blocks that share block's scale, four times.
static inline __m128i largest_of_blocks(const pk_activations_args *args, size_t block, size_t token) {
    const float *first = args->x + token * args->x_stride + block / args->shared * args->shared * PK_X_BLOCK;
    __m128i m = _mm_setzero_si128();
    for (size_t b = 0; b < args->shared; b += GROUP) {
        const float *x[GROUP];
        for (size_t i = 0; i < GROUP; i++) x[i] = first + (b + i) * PK_X_BLOCK;
        m = _mm_max_epi32(m, largest(x));
    }
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
}

// Four tokens of one block: their scales are neighbours.
static inline void quantize_tokens(const pk_activations_args *args, size_t block, size_t token, __m128i m) {
    const size_t tokens = args->tokens;
    uint8_t *q = args->tile + block * tokens * PK_X_BLOCK_BYTES;
    uint8_t *scales = q + tokens * PK_X_BLOCK + 4 * token;
    uint8_t *to[GROUP];
    const float *x[GROUP];
    for (size_t i = 0; i < GROUP; i++) {
        to[i] = q + (token + i) * PK_X_BLOCK;
        x[i] = args->x + (token + i) * args->x_stride + block * PK_X_BLOCK;
    }
    const group_scales found = quantize_group(to, x, m);
    const __m128i half0 = _mm256_castsi256_si128(found.s32), half1 = _mm256_extracti128_si256(found.s32, 1);
    _mm_storeu_si128((__m128i *)scales, found.d);
    _mm_storeu_si128((__m128i *)(scales + 4 * tokens), _mm_srai_epi32(_mm_add_epi32(half0, half1), 2));
    _mm_storeu_si128((__m128i *)(scales + 8 * tokens), half0);
    _mm_storeu_si128((__m128i *)(scales + 12 * tokens), half1);
}

// Four blocks of one token. At the end of the range the last block is done again, which changes nothing.
static inline void quantize_blocks(const pk_activations_args *args, size_t block, size_t token) {
    const size_t tokens = args->tokens;
    uint8_t *to[GROUP], *scales[GROUP];
    const float *x[GROUP];
    for (size_t i = 0; i < GROUP; i++) {
        const size_t b = block + i < args->last ? block + i : args->last - 1;
        uint8_t *q = args->tile + b * tokens * PK_X_BLOCK_BYTES;
        to[i] = q + token * PK_X_BLOCK;
        scales[i] = q + tokens * PK_X_BLOCK + 4 * token;
        x[i] = args->x + token * args->x_stride + b * PK_X_BLOCK;
    }
    const __m128i m = args->shared > 1 ? largest_of_blocks(args, block, token) : largest(x);
    const group_scales found = quantize_group(to, x, m);
    const __m128i half0 = _mm256_castsi256_si128(found.s32), half1 = _mm256_extracti128_si256(found.s32, 1);
    int32_t parts[4][GROUP];
    _mm_storeu_si128((__m128i *)parts[0], found.d);
    _mm_storeu_si128((__m128i *)parts[1], _mm_srai_epi32(_mm_add_epi32(half0, half1), 2));
    _mm_storeu_si128((__m128i *)parts[2], half0);
    _mm_storeu_si128((__m128i *)parts[3], half1);
    for (size_t i = 0; i < GROUP; i++) {
        for (size_t p = 0; p < 4; p++) memcpy(scales[i] + 4 * p * tokens, &parts[p][i], 4);
    }
}

void pk_activations_quantize_avx512f(const pk_activations_args *args) {
    const size_t grouped = args->tokens / GROUP * GROUP;
    for (size_t first = args->first; first < args->last; first += args->shared) {
        for (size_t t = 0; t < grouped; t += GROUP) {
            const __m128i m = largest_of_tokens(args, first, t);
            for (size_t b = first; b < first + args->shared; b++) quantize_tokens(args, b, t, m);
        }
    }
    for (size_t t = grouped; t < args->tokens; t++) {
        for (size_t b = args->first; b < args->last; b += GROUP) quantize_blocks(args, b, t);
    }
}

// rows[i] lane j becomes rows[j] lane i.
static inline void transpose(__m512 rows[16]) {
    __m512 a[16], b[16];
    for (size_t i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (size_t i = 0; i < 16; i += 4) {  // b[i + c]: columns c, 4 + c, 8 + c, 12 + c of rows i..i + 3
        b[i] = _mm512_shuffle_ps(a[i], a[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
        b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
        b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
        b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
    }
    for (size_t c = 0; c < 4; c++) {  // and a 4 x 4 transpose of quarters
        const __m512 low01 = _mm512_shuffle_f32x4(b[c], b[c + 4], _MM_SHUFFLE(2, 0, 2, 0));
        const __m512 odd01 = _mm512_shuffle_f32x4(b[c], b[c + 4], _MM_SHUFFLE(3, 1, 3, 1));
        const __m512 low23 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], _MM_SHUFFLE(2, 0, 2, 0));
        const __m512 odd23 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], _MM_SHUFFLE(3, 1, 3, 1));
        rows[c] = _mm512_shuffle_f32x4(low01, low23, _MM_SHUFFLE(2, 0, 2, 0));
        rows[c + 8] = _mm512_shuffle_f32x4(low01, low23, _MM_SHUFFLE(3, 1, 3, 1));
        rows[c + 4] = _mm512_shuffle_f32x4(odd01, odd23, _MM_SHUFFLE(2, 0, 2, 0));
        rows[c + 12] = _mm512_shuffle_f32x4(odd01, odd23, _MM_SHUFFLE(3, 1, 3, 1));
    }
}

void pk_activations_arrange_avx512f(const pk_activations_args *args) {
    const size_t tokens = args->tokens;
    const size_t end = args->last * PK_X_BLOCK, stop = end < args->columns ? end : args->columns;
    if (tokens == 1) {
        const size_t start = args->first * PK_X_BLOCK;
        memcpy(args->tile + 4 * start, args->x + start, 4 * (stop - start));
        return;
    }
    const __mmask16 live_tokens = (__mmask16)(0xffffu >> (16 - tokens));
    for (size_t k = args->first * PK_X_BLOCK; k < stop; k += 16) {
        const size_t live = stop - k < 16 ? stop - k : 16;
        const __mmask16 live_columns = (__mmask16)(0xffffu >> (16 - live));
        __m512 rows[16];
        for (size_t t = 0; t < 16; t++) {
            const float *x = args->x + (t < tokens ? t : 0) * args->x_stride + k;
            rows[t] = _mm512_maskz_loadu_ps(live_columns, x);
        }
        transpose(rows);
        for (size_t i = 0; i < live; i++) {
            _mm512_mask_storeu_ps(args->tile + 4 * (k + i) * tokens, live_tokens, rows[i]);
        }
    }
}
