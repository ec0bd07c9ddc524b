// SPDX-License-Identifier: Apache-2.0
// quantize_avx2.c - eight sub-blocks at once, one in each lane, so that each does the scalar sequence.
// Needs AVX2; CMake compiles this one file with -mavx2, and with -ffp-contract=off: compilers fuse even
// the intrinsics' multiply and add where they may, which would change the bits.
#if !defined(__AVX2__)
#error "compile with -mavx2"
#endif
#include <immintrin.h>

#include "quantize.h"

enum { LANES = 8, LONG = 32, SHORT = 16 };  // lanes; values of a sub-block with a min, and of one of Q6_K

static inline __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
static inline __m256 sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
static inline __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
static inline __m256 quotient(__m256 a, __m256 b) { return _mm256_div_ps(a, b); }
static inline __m256 set(float x) { return _mm256_set1_ps(x); }
static inline __m256 size_of(__m256 x) { return _mm256_andnot_ps(set(-0.0f), x); }
static inline __m256 above(__m256 a, __m256 b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }  // false for NaN
static inline __m256 pick(__m256 no, __m256 yes, __m256 when) { return _mm256_blendv_ps(no, yes, when); }
// a < b ? a : b and a > b ? a : b, so b where one is NaN.
static inline __m256 lower(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
static inline __m256 higher(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }

typedef struct {
    __m256 scale, min, inverse, base;
} fits;

static inline void store(pk_quantize_fit *restrict to, const fits *f) {
    float scale[LANES], min[LANES], inverse[LANES], base[LANES];
    _mm256_storeu_ps(scale, f->scale);
    _mm256_storeu_ps(min, f->min);
    _mm256_storeu_ps(inverse, f->inverse);
    _mm256_storeu_ps(base, f->base);
    for (size_t l = 0; l < LANES; l++) to[l] = (pk_quantize_fit){scale[l], min[l], inverse[l], base[l]};
}

// Four values of row r in the low half and of row r + 4 in the high one.
static inline __m256 two_rows(const float *x, size_t row) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)), _mm_loadu_ps(x + 4 * row), 1);
}

// to[i] is value i of each lane's sub-block, for i in 0..n-1: 4 x 4 transposes in both halves.
static inline void load(__m256 *restrict to, const float *x, size_t n) {
    for (size_t i = 0; i < n; i += 4, x += 4) {
        const __m256 a = two_rows(x, n), b = two_rows(x + n, n);
        const __m256 c = two_rows(x + 2 * n, n), d = two_rows(x + 3 * n, n);
        const __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
        const __m256 ab2 = _mm256_unpackhi_ps(a, b), cd2 = _mm256_unpackhi_ps(c, d);
        to[i] = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0));
        to[i + 1] = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
        to[i + 2] = _mm256_shuffle_ps(ab2, cd2, _MM_SHUFFLE(1, 0, 1, 0));
        to[i + 3] = _mm256_shuffle_ps(ab2, cd2, _MM_SHUFFLE(3, 2, 3, 2));
    }
}

static inline __m256 level_of(__m256 x, __m256 most) {
    const __m256 low = _mm256_castsi256_ps(_mm256_set1_epi32(PK_QUANTIZE_LOW));
    const __m256 exponent = _mm256_castsi256_ps(_mm256_set1_epi32(PK_QUANTIZE_EXPONENT));
    const __m256 r = _mm256_or_ps(_mm256_and_ps(add(x, set(PK_QUANTIZE_ROUND)), low), exponent);
    return sub(lower(higher(r, set(PK_QUANTIZE_ROUND)), most), set(PK_QUANTIZE_ROUND));
}

static inline __m256 error_of(const __m256 *x, const __m256 *w, const __m256 *level, __m256 scale, __m256 min) {
    __m256 sum = set(0.0f);
    for (size_t i = 0; i < LONG; i++) {
        const __m256 diff = sub(add(mul(scale, level[i]), min), x[i]);
        sum = add(sum, mul(w[i], mul(diff, diff)));
    }
    return sum;
}

static inline fits fit_with_min(const float *from, const pk_quantize_ranges *ranges) {
    __m256 x[LONG], w[LONG], level[LONG];
    load(x, from, LONG);
    __m256 squares = set(0.0f);
    for (size_t i = 0; i < LONG; i++) squares = add(squares, mul(x[i], x[i]));
    const __m256 rms = _mm256_sqrt_ps(quotient(squares, set(LONG)));
    for (size_t i = 0; i < LONG; i++) w[i] = add(rms, size_of(x[i]));
    __m256 min = x[0], max = x[0], sum_w = w[0], sum_x = mul(w[0], x[0]);
    for (size_t i = 1; i < LONG; i++) {
        min = lower(x[i], min);
        max = higher(x[i], max);
        sum_w = add(sum_w, w[i]);
        sum_x = add(sum_x, mul(w[i], x[i]));
    }
    min = lower(set(0.0f), min);
    const __m256 most = set(ranges->top + PK_QUANTIZE_ROUND), inverse = quotient(set(ranges->top), sub(max, min));
    fits best = {quotient(set(1.0f), inverse), min, inverse, min};
    for (size_t i = 0; i < LONG; i++) level[i] = level_of(mul(inverse, sub(x[i], min)), most);
    __m256 best_error = error_of(x, w, level, best.scale, min);
    for (size_t r = 0; r < ranges->n_ranges; r++) {
        const __m256 inverse_r = quotient(set(ranges->range[r]), sub(max, min));
        __m256 l = set(0.0f), ll = set(0.0f), lx = set(0.0f);
        for (size_t i = 0; i < LONG; i++) {
            level[i] = level_of(mul(inverse_r, sub(x[i], min)), most);
            const __m256 wl = mul(w[i], level[i]);
            l = add(l, wl);
            ll = add(ll, mul(wl, level[i]));
            lx = add(lx, mul(wl, x[i]));
        }
        const __m256 det = sub(mul(sum_w, ll), mul(l, l)), valid = above(det, set(0.0f));
        const __m256 slope = quotient(sub(mul(sum_w, lx), mul(sum_x, l)), det);
        const __m256 offset = quotient(sub(mul(ll, sum_x), mul(l, lx)), det);
        const __m256 positive = above(offset, set(0.0f));
        const __m256 scale_r = pick(slope, quotient(lx, ll), positive), min_r = pick(offset, set(0.0f), positive);
        const __m256 error = error_of(x, w, level, scale_r, min_r);
        const __m256 better = _mm256_and_ps(valid, above(best_error, error));
        best_error = pick(best_error, error, better);
        best.scale = pick(best.scale, scale_r, better);
        best.inverse = pick(best.inverse, inverse_r, better);
        best.base = pick(best.base, min, better);
        min = pick(min, min_r, better);
    }
    best.min = _mm256_xor_ps(min, set(-0.0f));
    return best;
}

static inline fits fit_q6_k(const float *from, const float inverses[19]) {
    __m256 x[SHORT], w[SHORT], wx[SHORT];
    load(x, from, SHORT);
    __m256 size = set(0.0f), largest = set(0.0f);
    for (size_t i = 0; i < SHORT; i++) {
        const __m256 larger = above(size_of(x[i]), size);
        size = pick(size, size_of(x[i]), larger);
        largest = pick(largest, x[i], larger);
        w[i] = mul(x[i], x[i]);
        wx[i] = mul(w[i], x[i]);
    }
    fits best = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    __m256 best_gain = set(0.0f);
    for (size_t k = 0; k < 19; k++) {
        const __m256 inverse = quotient(set(inverses[k]), largest);
        __m256 lx = set(0.0f), ll = set(0.0f);
        for (size_t i = 0; i < SHORT; i++) {
            __m256 l = sub(add(mul(inverse, x[i]), set(PK_QUANTIZE_ROUND)), set(PK_QUANTIZE_ROUND));
            l = higher(lower(l, set(31.0f)), set(-32.0f));
            lx = add(lx, mul(wx[i], l));
            ll = add(ll, mul(mul(w[i], l), l));
        }
        const __m256 first = _mm256_castsi256_ps(_mm256_set1_epi32(k == 0 ? -1 : 0));
        const __m256 some = above(ll, set(0.0f)), gains = above(mul(lx, lx), mul(best_gain, ll));
        const __m256 better = _mm256_or_ps(first, _mm256_and_ps(some, gains));
        const __m256 scale = _mm256_and_ps(quotient(lx, ll), some);  // 0 without levels
        best_gain = pick(best_gain, mul(scale, lx), better);
        best.scale = pick(best.scale, scale, better);
        best.inverse = pick(best.inverse, inverse, better);
    }
    const __m256 zero = above(set(PK_QUANTIZE_ZERO), size);
    best.scale = _mm256_andnot_ps(zero, best.scale);
    best.inverse = _mm256_andnot_ps(zero, best.inverse);
    return best;
}

void pk_quantize_avx2(uint8_t *restrict out, const float *x, size_t n_blocks, pk_quantize_type type) {
    const size_t bytes = pk_quantize_bytes(type);
    pk_quantize_ranges ranges;
    float inverses[19];
    pk_quantize_set_ranges(&ranges, type);
    pk_quantize_set_inverses(inverses);
    for (size_t b = 0; b < n_blocks; b++, x += PK_QUANTIZE_BLOCK, out += bytes) {
        pk_quantize_fit fit[2 * LANES];
        if (type == PK_Q6_K) {
            for (size_t half = 0; half < 2; half++) {
                const fits found = fit_q6_k(x + half * LANES * SHORT, inverses);
                store(fit + half * LANES, &found);
            }
        } else {
            const fits found = fit_with_min(x, &ranges);
            store(fit, &found);
        }
        pk_quantize_pack(out, x, fit, type);
    }
}
