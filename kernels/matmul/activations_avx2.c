// SPDX-License-Identifier: Apache-2.0
// activations_avx2.c - four blocks at once: sums across a block share their steps; and 8 x 8 transposes.
// Needs AVX2; CMake compiles this one file with -mavx2, and with -ffp-contract=off: the bytes are the scalar
// code's.
#if !defined(__AVX2__)
#error "compile with -mavx2"
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

static inline __m256i size_of(const float *x) {
    return _mm256_and_si256(_mm256_loadu_si256((const __m256i *)x), _mm256_set1_epi32(0x7fffffff));
}

// The bits of the largest |x| of each of four blocks. Without signs, floats order as their bits do, NaN last.
static inline __m128i largest(const float *const x[GROUP]) {
    __m256i m[GROUP];
    for (size_t i = 0; i < GROUP; i++) {
        const __m256i low = _mm256_max_epi32(size_of(x[i]), size_of(x[i] + 8));
        m[i] = _mm256_max_epi32(low, _mm256_max_epi32(size_of(x[i] + 16), size_of(x[i] + 24)));
    }
    const __m256i a = _mm256_max_epi32(_mm256_unpacklo_epi32(m[0], m[1]), _mm256_unpackhi_epi32(m[0], m[1]));
    const __m256i b = _mm256_max_epi32(_mm256_unpacklo_epi32(m[2], m[3]), _mm256_unpackhi_epi32(m[2], m[3]));
    const __m256i all = _mm256_max_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    return _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

static inline __m256i rounded(const float *x, __m256 by) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), by));
}

// 32 levels as bytes, in order. The packing instructions work on halves, so the quarters come out mixed.
static inline __m256i levels(const float *x, __m256 by) {
    const __m256i low = _mm256_packs_epi32(rounded(x, by), rounded(x + 8, by));
    const __m256i high = _mm256_packs_epi32(rounded(x + 16, by), rounded(x + 24, by));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
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
        q[i] = _mm256_and_si256(levels(x[i], _mm256_set1_ps(inverses[i])), _mm256_set1_epi32(keep[i]));
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

void pk_activations_quantize_avx2(const pk_activations_args *args) {
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

// All ones in the first n of eight lanes.
static inline __m256i first_lanes(size_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// rows[i] lane j becomes rows[j] lane i.
static inline void transpose(__m256 rows[8]) {
    __m256 a[8], b[8];
    for (size_t i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (size_t i = 0; i < 8; i += 4) {  // b[i + c]: columns c and 4 + c of rows i..i + 3
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
    }
    for (size_t c = 0; c < 4; c++) {
        rows[c] = _mm256_permute2f128_ps(b[c], b[c + 4], 0x20);
        rows[c + 4] = _mm256_permute2f128_ps(b[c], b[c + 4], 0x31);
    }
}

void pk_activations_arrange_avx2(const pk_activations_args *args) {
    const size_t tokens = args->tokens;
    const size_t end = args->last * PK_X_BLOCK, stop = end < args->columns ? end : args->columns;
    if (tokens == 1) {
        const size_t start = args->first * PK_X_BLOCK;
        memcpy(args->tile + 4 * start, args->x + start, 4 * (stop - start));
        return;
    }
    for (size_t k = args->first * PK_X_BLOCK; k < stop; k += 8) {
        const size_t columns = stop - k < 8 ? stop - k : 8;
        for (size_t token = 0; token < tokens; token += 8) {
            const size_t live = tokens - token < 8 ? tokens - token : 8;
            __m256 rows[8];
            for (size_t t = 0; t < 8; t++) {
                const float *x = args->x + (token + (t < live ? t : 0)) * args->x_stride + k;
                rows[t] = _mm256_maskload_ps(x, first_lanes(columns));
            }
            transpose(rows);
            float *to = (float *)(void *)args->tile + k * tokens + token;
            for (size_t i = 0; i < columns; i++) {
                _mm256_maskstore_ps(to + i * tokens, first_lanes(live), rows[i]);
            }
        }
    }
}
