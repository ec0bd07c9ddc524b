// SPDX-License-Identifier: Apache-2.0
// quantize_avx512f.c - sixteen sub-blocks at once, one in each lane: two blocks of Q4_K or Q5_K, one of Q6_K.
// Needs AVX-512F; CMake compiles this one file with -mavx512f, and with -ffp-contract=off: compilers fuse even
// the intrinsics' multiply and add where they may, which would change the bits.
#if !defined(__AVX512F__)
#error "compile with -mavx512f"
#endif
#include <immintrin.h>

#include "quantize.h"

enum { LANES = 16, LONG = 32, SHORT = 16 };  // lanes; values of a sub-block with a min, and of one of Q6_K

static inline __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
static inline __m512 sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
static inline __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
static inline __m512 quotient(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
static inline __m512 set(float x) { return _mm512_set1_ps(x); }
static inline __mmask16 above(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }  // false for NaN
static inline __m512 pick(__m512 no, __m512 yes, __mmask16 when) { return _mm512_mask_blend_ps(when, no, yes); }
static inline __mmask16 both(__mmask16 a, __mmask16 b) { return (__mmask16)(a & b); }
// a < b ? a : b and a > b ? a : b, so b where one is NaN.
static inline __m512 lower(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
static inline __m512 higher(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }

typedef struct {
    __m512 scale, min, inverse, base;
} fits;

static inline void store(pk_quantize_fit *restrict to, const fits *f) {
    float scale[LANES], min[LANES], inverse[LANES], base[LANES];
    _mm512_storeu_ps(scale, f->scale);
    _mm512_storeu_ps(min, f->min);
    _mm512_storeu_ps(inverse, f->inverse);
    _mm512_storeu_ps(base, f->base);
    for (size_t l = 0; l < LANES; l++) to[l] = (pk_quantize_fit){scale[l], min[l], inverse[l], base[l]};
}

// Four values of each of rows r, r + 4, r + 8 and r + 12, which are `row` apart.
static inline __m512 four_rows(const float *x, size_t row, size_t far) {
    const __m256 near = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)), _mm_loadu_ps(x + 4 * row), 1);
    const float *y = x + far;
    const __m256 rest = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(y)), _mm_loadu_ps(y + 4 * row), 1);
    return _mm512_castpd_ps(
        _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castps_pd(near)), _mm256_castps_pd(rest), 1));
}

// to[i] is value i of each lane's sub-block, for i in 0..n-1: 4 x 4 transposes in each quarter. Where one block
// of Q4_K or Q5_K is left (live is 8, else 16), lanes 8 to 15 repeat 0 to 7.
static inline void load(__m512 *restrict to, const float *x, size_t n, size_t live) {
    const size_t far = live == LANES ? 8 * n : 0;
    for (size_t i = 0; i < n; i += 4, x += 4) {
        const __m512 a = four_rows(x, n, far), b = four_rows(x + n, n, far);
        const __m512 c = four_rows(x + 2 * n, n, far), d = four_rows(x + 3 * n, n, far);
        const __m512 ab = _mm512_unpacklo_ps(a, b), cd = _mm512_unpacklo_ps(c, d);
        const __m512 ab2 = _mm512_unpackhi_ps(a, b), cd2 = _mm512_unpackhi_ps(c, d);
        to[i] = _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0));
        to[i + 1] = _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
        to[i + 2] = _mm512_shuffle_ps(ab2, cd2, _MM_SHUFFLE(1, 0, 1, 0));
        to[i + 3] = _mm512_shuffle_ps(ab2, cd2, _MM_SHUFFLE(3, 2, 3, 2));
    }
}

static inline __m512 level_of(__m512 x, __m512 most) {
    enum { AND_THEN_OR = 0xea };  // (a & b) | c as a truth table
    const __m512i bits = _mm512_castps_si512(add(x, set(PK_QUANTIZE_ROUND)));
    const __m512 r = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        bits, _mm512_set1_epi32(PK_QUANTIZE_LOW), _mm512_set1_epi32(PK_QUANTIZE_EXPONENT), AND_THEN_OR));
    return sub(lower(higher(r, set(PK_QUANTIZE_ROUND)), most), set(PK_QUANTIZE_ROUND));
}

static inline __m512 error_of(const __m512 *x, const __m512 *w, const __m512 *level, __m512 scale, __m512 min) {
    __m512 sum = set(0.0f);
    for (size_t i = 0; i < LONG; i++) {
        const __m512 diff = sub(add(mul(scale, level[i]), min), x[i]);
        sum = add(sum, mul(w[i], mul(diff, diff)));
    }
    return sum;
}

static inline fits fit_with_min(const float *from, size_t live, const pk_quantize_ranges *ranges) {
    __m512 x[LONG], w[LONG], level[LONG];
    load(x, from, LONG, live);
    __m512 squares = set(0.0f);
    for (size_t i = 0; i < LONG; i++) squares = add(squares, mul(x[i], x[i]));
    const __m512 rms = _mm512_sqrt_ps(quotient(squares, set(LONG)));
    for (size_t i = 0; i < LONG; i++) w[i] = add(rms, _mm512_abs_ps(x[i]));
    __m512 min = x[0], max = x[0], sum_w = w[0], sum_x = mul(w[0], x[0]);
    for (size_t i = 1; i < LONG; i++) {
        min = lower(x[i], min);
        max = higher(x[i], max);
        sum_w = add(sum_w, w[i]);
        sum_x = add(sum_x, mul(w[i], x[i]));
    }
    min = lower(set(0.0f), min);
    const __m512 most = set(ranges->top + PK_QUANTIZE_ROUND), inverse = quotient(set(ranges->top), sub(max, min));
    fits best = {quotient(set(1.0f), inverse), min, inverse, min};
    for (size_t i = 0; i < LONG; i++) level[i] = level_of(mul(inverse, sub(x[i], min)), most);
    __m512 best_error = error_of(x, w, level, best.scale, min);
    for (size_t r = 0; r < ranges->n_ranges; r++) {
        const __m512 inverse_r = quotient(set(ranges->range[r]), sub(max, min));
        __m512 l = set(0.0f), ll = set(0.0f), lx = set(0.0f);
        for (size_t i = 0; i < LONG; i++) {
            level[i] = level_of(mul(inverse_r, sub(x[i], min)), most);
            const __m512 wl = mul(w[i], level[i]);
            l = add(l, wl);
            ll = add(ll, mul(wl, level[i]));
            lx = add(lx, mul(wl, x[i]));
        }
        const __m512 det = sub(mul(sum_w, ll), mul(l, l));
        const __m512 slope = quotient(sub(mul(sum_w, lx), mul(sum_x, l)), det);
        const __m512 offset = quotient(sub(mul(ll, sum_x), mul(l, lx)), det);
        const __mmask16 positive = above(offset, set(0.0f));
        const __m512 scale_r = pick(slope, quotient(lx, ll), positive), min_r = pick(offset, set(0.0f), positive);
        const __m512 error = error_of(x, w, level, scale_r, min_r);
        const __mmask16 better = both(above(det, set(0.0f)), above(best_error, error));
        best_error = pick(best_error, error, better);
        best.scale = pick(best.scale, scale_r, better);
        best.inverse = pick(best.inverse, inverse_r, better);
        best.base = pick(best.base, min, better);
        min = pick(min, min_r, better);
    }
    best.min = sub(set(-0.0f), min);
    return best;
}

static inline fits fit_q6_k(const float *from, const float inverses[19]) {
    __m512 x[SHORT], w[SHORT], wx[SHORT];
    load(x, from, SHORT, LANES);
    __m512 size = set(0.0f), largest = set(0.0f);
    for (size_t i = 0; i < SHORT; i++) {
        const __mmask16 larger = above(_mm512_abs_ps(x[i]), size);
        size = pick(size, _mm512_abs_ps(x[i]), larger);
        largest = pick(largest, x[i], larger);
        w[i] = mul(x[i], x[i]);
        wx[i] = mul(w[i], x[i]);
    }
    fits best = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    __m512 best_gain = set(0.0f);
    for (size_t k = 0; k < 19; k++) {
        const __m512 inverse = quotient(set(inverses[k]), largest);
        __m512 lx = set(0.0f), ll = set(0.0f);
        for (size_t i = 0; i < SHORT; i++) {
            __m512 l = sub(add(mul(inverse, x[i]), set(PK_QUANTIZE_ROUND)), set(PK_QUANTIZE_ROUND));
            l = higher(lower(l, set(31.0f)), set(-32.0f));
            lx = add(lx, mul(wx[i], l));
            ll = add(ll, mul(mul(w[i], l), l));
        }
        const __mmask16 some = above(ll, set(0.0f)), gains = above(mul(lx, lx), mul(best_gain, ll));
        const __mmask16 better = k == 0 ? 0xffff : both(some, gains);
        const __m512 scale = pick(set(0.0f), quotient(lx, ll), some);  // 0 without levels
        best_gain = pick(best_gain, mul(scale, lx), better);
        best.scale = pick(best.scale, scale, better);
        best.inverse = pick(best.inverse, inverse, better);
    }
    const __mmask16 zero = above(set(PK_QUANTIZE_ZERO), size);
    best.scale = pick(best.scale, set(0.0f), zero);
    best.inverse = pick(best.inverse, set(0.0f), zero);
    return best;
}

void pk_quantize_avx512f(uint8_t *restrict out, const float *x, size_t n_blocks, pk_quantize_type type) {
    const size_t bytes = pk_quantize_bytes(type), step = type == PK_Q6_K ? 1 : 2;
    pk_quantize_ranges ranges;
    float inverses[19];
    pk_quantize_set_ranges(&ranges, type);
    pk_quantize_set_inverses(inverses);
    for (size_t b = 0; b < n_blocks; b += step) {
        const size_t live = n_blocks - b < step ? 1 : step;
        const fits found = type == PK_Q6_K ? fit_q6_k(x, inverses) : fit_with_min(x, live == 2 ? 16 : 8, &ranges);
        pk_quantize_fit fit[LANES];
        store(fit, &found);
        for (size_t i = 0; i < live; i++, x += PK_QUANTIZE_BLOCK, out += bytes) {
            pk_quantize_pack(out, x, fit + i * LANES / 2, type);
        }
    }
}
