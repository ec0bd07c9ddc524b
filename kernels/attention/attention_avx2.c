// SPDX-License-Identifier: Apache-2.0
// attention_avx2.c - eight queries in the lanes of a register (many), or eight columns or keys (one).
// Needs AVX2, FMA and F16C; CMake compiles this one file with -mavx2 -mfma -mf16c.
//
// Many: everything is kept with a query in a lane (q, scores, sums), so keys and values are broadcast from
// memory as they are, the softmax needs no step across lanes, and any number of keys fits. A tile of 4 keys
// (or columns of v) times 24 queries has 12 sums in registers, 7 loads for 12 multiply-adds.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile with -mavx2 -mfma -mf16c"
#endif
#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "attention.h"

#define INLINE static inline __attribute__((always_inline))  // a tile's sums must stay in registers

enum { LANES = 8, KEYS = PK_ATTENTION_KEYS, HEAD = PK_ATTENTION_MAX_HEAD, ROWS = PK_ATTENTION_QUERIES };
enum { SLAB = 3, WIDE = SLAB * LANES, SLABS = ROWS / WIDE, TILE = 4, TOKENS = ROWS + LANES };

typedef struct {
    float q[SLABS][HEAD][WIDE];        // [slab of queries][column][query]
    float sum[SLABS][HEAD][WIDE];      // of p * v
    float k[KEYS][HEAD];
    float v[HEAD / TILE][KEYS][TILE];  // [group of columns][key][column]
    float p[KEYS][WIDE];               // scores, then their exp, of one slab
    float mask[KEYS][TOKENS];          // [key][token]; room behind the last token for a whole register
    float largest[ROWS], next[ROWS], total[ROWS];  // next: of the block in work, too
    int32_t token[ROWS];               // of each query, less that of the first query in its register
} workspace;
_Static_assert(sizeof(workspace) <= PK_ATTENTION_SCRATCH, "the scratch is too small");

// Of one token, whose queries are `group` heads.
typedef struct {
    float sum[ROWS][HEAD], p[ROWS][KEYS], largest[ROWS], total[ROWS];
} workspace_one;
_Static_assert(sizeof(workspace_one) <= PK_ATTENTION_SCRATCH, "the scratch is too small");

INLINE __m256 set(float x) { return _mm256_set1_ps(x); }
INLINE __m256 halves(const uint8_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
INLINE __m256 finite_or_zero(__m256 x) {  // 0 for -infinity
    return _mm256_and_ps(x, _mm256_cmp_ps(x, set(-INFINITY), _CMP_NEQ_UQ));
}

// e^x for x <= 0, within 1 ulp; 0 below -87, where the result would be subnormal. x = n ln 2 + r, and for e^r
// a polynomial of degree 6 that errs by 4e-9 at most.
INLINE __m256 exponential(__m256 x) {
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, set(0x1.715476p+0f)), _MM_FROUND_TO_NEAREST_INT);
    __m256 r = _mm256_fnmadd_ps(n, set(0x1.62e4p-1f), x);  // the high bits of ln 2: n times them is exact
    r = _mm256_fnmadd_ps(n, set(0x1.7f7d1cp-20f), r);
    __m256 y = set(0x1.6a2434p-10f);
    y = _mm256_fmadd_ps(y, r, set(0x1.1239e2p-7f));
    y = _mm256_fmadd_ps(y, r, set(0x1.5558f2p-5f));
    y = _mm256_fmadd_ps(y, r, set(0x1.555492p-3f));
    y = _mm256_fmadd_ps(y, r, set(0x1.fffffcp-2f));
    y = _mm256_fmadd_ps(y, r, set(1.0f));
    y = _mm256_fmadd_ps(y, r, set(1.0f));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    y = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    // NaN passes the comparison, and stays NaN.
    return _mm256_and_ps(y, _mm256_cmp_ps(x, set(-87.0f), _CMP_NLT_UQ));
}

INLINE float sum_of(__m256 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE float largest_of(__m256 x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// The scale of columns d..d + 32 of a row of keys or values; numbers in f16 have none.
INLINE __m256 scale_at(const uint8_t *row, pk_kv type, size_t d) {
    int16_t half;
    if (type == PK_KV_F16) return _mm256_setzero_ps();
    memcpy(&half, row + d / 32 * 34, sizeof half);
    return _mm256_cvtph_ps(_mm_set1_epi16(half));
}

// Columns d + 8 c..d + 8 c + 8 of a row; d is a multiple of 32.
INLINE __m256 load_8(const uint8_t *row, pk_kv type, size_t d, size_t c, __m256 scale) {
    if (type == PK_KV_F16) return halves(row + 2 * (d + LANES * c));
    const uint8_t *bytes = row + d / 32 * 34 + 2 + LANES * c;
    const __m128i x = _mm_loadl_epi64((const __m128i *)(const void *)bytes);
    return _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)));
}

INLINE void load_32(__m256 to[4], const uint8_t *row, pk_kv type, size_t d) {
    const __m256 scale = scale_at(row, type, d);
    for (size_t c = 0; c < 4; c++) to[c] = load_8(row, type, d, c, scale);
}

// Columns d..d + 32, which are about a cache line.
INLINE void prefetch_32(const uint8_t *row, pk_kv type, size_t d) {
    _mm_prefetch((const char *)(row + (type == PK_KV_F16 ? 2 * d : d / 32 * 34)), _MM_HINT_T0);
}

// n rows of keys or values from `from` on, as far as there are any, to the second-level cache.
INLINE void prefetch(const uint8_t *first, size_t row, pk_kv type, const pk_attention_args *a, size_t from,
                     size_t n) {
    const size_t bytes = type == PK_KV_F16 ? 2 * a->head : a->head / 32 * 34;
    for (size_t key = from; key < from + n && key < a->keys; key++) {
        const char *at = (const char *)(first + key * row);
        for (size_t b = 0; b < bytes; b += 64) _mm_prefetch(at + b, _MM_HINT_T1);
    }
}

// 8 x 8 numbers, rows to columns.
INLINE void transpose(__m256 x[LANES]) {
    __m256 y[LANES];
    for (size_t i = 0; i < LANES; i += 2) {
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (size_t i = 0; i < LANES; i += 4) {
        for (size_t half = 0; half < 2; half++) {
            const __m256 a = y[i + half], b = y[i + half + 2];
            x[i + 2 * half] = _mm256_shuffle_ps(a, b, _MM_SHUFFLE(1, 0, 1, 0));
            x[i + 2 * half + 1] = _mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 2, 3, 2));
        }
    }
    for (size_t i = 0; i < 4; i++) {
        y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
        y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
    }
    memcpy(x, y, sizeof y);
}

// ---- the mask ----

// How many of n keys at `at` any token sees (the rest, at the end, is -infinity for all), and whether the
// mask is other than 0 somewhere.
static size_t look_at_mask(bool *restrict masked, const pk_attention_args *a, size_t at, size_t n) {
    *masked = false;
    if (!a->mask) return n;
    enum { REGISTERS = 2 * KEYS / 32 };
    const __m256i hidden = _mm256_set1_epi16((short)0xfc00);
    __m256i any = _mm256_setzero_si256(), seen[REGISTERS];
    for (size_t i = 0; i < REGISTERS; i++) seen[i] = any;
    for (size_t t = 0; t < a->tokens; t++) {
        const uint8_t *row = a->mask + t * a->mask_token + 2 * at;
        uint8_t padded[2 * KEYS];
        if (n < KEYS) {
            memset(padded, 0, sizeof padded);
            row = memcpy(padded, row, 2 * n);
        }
        for (size_t i = 0; i < REGISTERS; i++) {
            const __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)(row + 32 * i));
            any = _mm256_or_si256(any, bits);
            seen[i] = _mm256_or_si256(seen[i], _mm256_xor_si256(bits, hidden));
        }
    }
    *masked = !_mm256_testz_si256(any, any);
    uint16_t seen_key[KEYS];
    memcpy(seen_key, seen, sizeof seen_key);
    while (n && !seen_key[n - 1]) n--;
    return n;
}

INLINE __m256 halves_up_to(const uint8_t *p, size_t n) {
    uint8_t padded[2 * LANES] = {0};
    return halves(n < LANES ? memcpy(padded, p, 2 * n) : p);
}

static void load_mask(workspace *w, const pk_attention_args *a, size_t at, size_t n) {
    for (size_t t = 0; t < a->tokens; t += LANES) {
        for (size_t key = 0; key < n; key += LANES) {
            __m256 x[LANES];
            for (size_t i = 0; i < LANES; i++) {
                x[i] = set(0.0f);
                if (t + i >= a->tokens) continue;
                x[i] = halves_up_to(a->mask + (t + i) * a->mask_token + 2 * (at + key), n - key);
            }
            transpose(x);
            for (size_t i = 0; i < LANES; i++) _mm256_storeu_ps(w->mask[key + i] + t, x[i]);
        }
    }
}

// ---- many ----

static void load_queries(workspace *w, const pk_attention_args *a, size_t rows) {
    for (size_t i = 0; i < rows; i += LANES) {
        for (size_t d = 0; d < a->head; d += LANES) {
            __m256 x[LANES];
            for (size_t l = 0; l < LANES; l++) {
                const size_t token = (i + l) / a->group, head = (i + l) % a->group;
                x[l] = set(0.0f);
                if (i + l >= rows) continue;
                const uint8_t *q = (const uint8_t *)a->q + token * a->q_token + head * a->q_head;
                x[l] = _mm256_loadu_ps((const float *)(const void *)q + d);
            }
            transpose(x);
            for (size_t l = 0; l < LANES; l++) _mm256_store_ps(w->q[i / WIDE][d + l] + i % WIDE, x[l]);
        }
        for (size_t l = 0; l < LANES; l++) {
            w->token[i + l] = (int32_t)((i + l) / a->group - i / a->group);
            w->largest[i + l] = -INFINITY;
            w->total[i + l] = 0.0f;
        }
    }
    for (size_t slab = 0; slab * WIDE < rows; slab++) memset(w->sum[slab], 0, sizeof w->sum[slab]);
}

// The last tile of keys is filled up with zeros.
static void load_keys(workspace *w, const pk_attention_args *a, size_t at, size_t n) {
    const uint8_t *row = a->k + at * a->k_row;
    for (size_t key = 0; key < n; key++, row += a->k_row) {
        for (size_t d = 0; d < a->head; d += 32) {
            __m256 x[4];
            load_32(x, row, a->k_type, d);
            for (size_t i = 0; i < 4; i++) _mm256_store_ps(w->k[key] + d + LANES * i, x[i]);
        }
    }
    for (size_t key = n; key % TILE; key++) memset(w->k[key], 0, sizeof w->k[key]);
}

static void load_values(workspace *w, const pk_attention_args *a, size_t at, size_t n) {
    const uint8_t *row = a->v + at * a->v_row;
    for (size_t key = 0; key < n; key++, row += a->v_row) {
        for (size_t d = 0; d < a->head; d += 32) {
            __m256 x[4];
            load_32(x, row, a->v_type, d);
            for (size_t i = 0; i < 4; i++) {
                const size_t group = (d + LANES * i) / TILE;
                _mm_store_ps(w->v[group][key], _mm256_castps256_ps128(x[i]));
                _mm_store_ps(w->v[group + 1][key], _mm256_extractf128_ps(x[i], 1));
            }
        }
    }
}

// sum[t][z] = the sum over `steps` of  b[step][t] * x[step][z], x being `vectors` registers of queries.
INLINE void product(__m256 sum[TILE][SLAB], const float (*x)[WIDE], const float *b, size_t steps,
                    size_t b_step, size_t b_tile, size_t vectors) {
    for (size_t t = 0; t < TILE; t++) {
        for (size_t z = 0; z < vectors; z++) sum[t][z] = _mm256_setzero_ps();
    }
    for (size_t step = 0; step < steps; step++) {
        __m256 row[SLAB];
        for (size_t z = 0; z < vectors; z++) row[z] = _mm256_load_ps(x[step] + LANES * z);
        for (size_t t = 0; t < TILE; t++) {
            const __m256 y = set(b[b_step * step + b_tile * t]);
            for (size_t z = 0; z < vectors; z++) sum[t][z] = _mm256_fmadd_ps(y, row[z], sum[t][z]);
        }
    }
}

// Scores of n keys from `at` for one slab, and the largest of each query so far.
INLINE void score(workspace *w, const pk_attention_args *a, size_t slab, size_t at, size_t n, bool masked,
                  size_t vectors) {
    const __m256 scale = set(a->scale);
    for (size_t key = 0; key < n; key += TILE) {
        if (slab == 0) prefetch(a->k, a->k_row, a->k_type, a, at + KEYS + key, TILE);
        __m256 s[TILE][SLAB];
        product(s, (const float(*)[WIDE])w->q[slab], w->k[key], a->head, 1, HEAD, vectors);
        for (size_t z = 0; z < vectors; z++) {
            const size_t row = slab * WIDE + LANES * z;
            const __m256i token = _mm256_load_si256((const __m256i *)(const void *)(w->token + row));
            __m256 largest = _mm256_load_ps(w->next + row);
            for (size_t t = 0; t < TILE; t++) {
                if (key + t >= n) break;
                __m256 bias = set(0.0f);
                if (masked) {
                    bias = _mm256_loadu_ps(w->mask[key + t] + row / a->group);
                    bias = _mm256_permutevar8x32_ps(bias, token);
                }
                const __m256 x = _mm256_fmadd_ps(s[t][z], scale, bias);
                largest = _mm256_max_ps(x, largest);  // the second where one is NaN
                _mm256_store_ps(w->p[key + t] + LANES * z, x);
            }
            _mm256_store_ps(w->next + row, largest);
        }
    }
}

INLINE void attend(workspace *w, const pk_attention_args *a, size_t slab, size_t at, size_t n, bool masked,
                   size_t vectors) {
    score(w, a, slab, at, n, masked, vectors);
    __m256 factor[SLAB];
    for (size_t z = 0; z < vectors; z++) {
        const size_t row = slab * WIDE + LANES * z;
        const __m256 largest = _mm256_load_ps(w->next + row), base = finite_or_zero(largest);
        __m256 total = set(0.0f);
        for (size_t key = 0; key < n; key++) {
            float *p = w->p[key] + LANES * z;
            const __m256 x = exponential(_mm256_sub_ps(_mm256_load_ps(p), base));
            _mm256_store_ps(p, x);
            total = _mm256_add_ps(total, x);
        }
        factor[z] = exponential(_mm256_sub_ps(_mm256_load_ps(w->largest + row), base));
        _mm256_store_ps(w->largest + row, largest);
        _mm256_store_ps(w->total + row, _mm256_fmadd_ps(_mm256_load_ps(w->total + row), factor[z], total));
    }
    const size_t ahead = KEYS * TILE / a->head;  // rows of values to fetch with each group of columns
    for (size_t d = 0; d < a->head; d += TILE) {
        if (slab == 0) prefetch(a->v, a->v_row, a->v_type, a, at + KEYS + d / TILE * ahead, ahead);
        __m256 x[TILE][SLAB];
        product(x, (const float(*)[WIDE])w->p, w->v[d / TILE][0], n, TILE, 1, vectors);
        for (size_t t = 0; t < TILE; t++) {
            for (size_t z = 0; z < vectors; z++) {
                float *sum = w->sum[slab][d + t] + LANES * z;
                _mm256_store_ps(sum, _mm256_fmadd_ps(_mm256_load_ps(sum), factor[z], x[t][z]));
            }
        }
    }
}

static void finish(workspace *w, const pk_attention_args *a, size_t rows) {
    for (size_t i = 0; i < rows; i += LANES) {
        const __m256 total = _mm256_load_ps(w->total + i);
        const __m256 some = _mm256_cmp_ps(total, set(0.0f), _CMP_NEQ_UQ);  // no key: zeros
        const __m256 inverse = a->state ? set(1.0f) : _mm256_and_ps(some, _mm256_div_ps(set(1.0f), total));
        for (size_t d = 0; d < a->head; d += LANES) {
            __m256 x[LANES];
            for (size_t l = 0; l < LANES; l++) {
                x[l] = _mm256_mul_ps(inverse, _mm256_load_ps(w->sum[i / WIDE][d + l] + i % WIDE));
            }
            transpose(x);
            for (size_t l = 0; l < LANES && i + l < rows; l++) {
                const size_t token = (i + l) / a->group, head = (i + l) % a->group;
                uint8_t *out = (uint8_t *)a->out + token * a->out_token + head * a->out_head;
                _mm256_storeu_ps((float *)(void *)out + d, x[l]);
            }
        }
    }
    for (size_t i = 0; a->state && i < rows; i++) {
        a->state[2 * i] = w->largest[i];
        a->state[2 * i + 1] = w->total[i];
    }
}

void pk_attention_many_avx2(const pk_attention_args *a) {
    workspace *w = (workspace *)(void *)a->scratch;
    const size_t rows = a->tokens * a->group;
    load_queries(w, a, rows);
    for (size_t at = 0; at < a->keys; at += KEYS) {
        bool masked;
        const size_t n = look_at_mask(&masked, a, at, a->keys - at < KEYS ? a->keys - at : KEYS);
        if (n == 0) continue;
        load_keys(w, a, at, n);
        load_values(w, a, at, n);
        if (masked) load_mask(w, a, at, n);
        memcpy(w->next, w->largest, sizeof w->next);
        for (size_t slab = 0; slab * WIDE < rows; slab++) {
            switch ((rows - slab * WIDE + LANES - 1) / LANES) {
                case 1: attend(w, a, slab, at, n, masked, 1); break;
                case 2: attend(w, a, slab, at, n, masked, 2); break;
                default: attend(w, a, slab, at, n, masked, 3); break;
            }
        }
    }
    finish(w, a, rows);
}

// ---- one ----

enum { HEADS = 3, AT_ONCE = 4 };  // query heads and keys with sums in registers: 12 of them

// The sums of four registers' lanes.
INLINE __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 sum = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}

// p[h][key] = q of head h * key, for n keys of a block and `heads` heads. Where n is no multiple of AT_ONCE,
// the last key stands in for those beyond it. While keys are read, the block's values are fetched.
INLINE void dots(float (*restrict p)[KEYS], const pk_attention_args *a, size_t first, size_t at, size_t n,
                 pk_kv type, size_t heads) {
    const uint8_t *q = (const uint8_t *)a->q + first * a->q_head;
    const pk_kv v_type = a->v_type;
    for (size_t key = 0; key < n; key += AT_ONCE) {
        const uint8_t *k_row[AT_ONCE], *v_row[AT_ONCE];
        __m256 sum[HEADS][AT_ONCE], k_scale[AT_ONCE];
        for (size_t i = 0; i < AT_ONCE; i++) {
            const size_t j = at + (key + i < n ? key + i : n - 1);
            k_row[i] = a->k + j * a->k_row;
            v_row[i] = a->v + j * a->v_row;
            for (size_t h = 0; h < heads; h++) sum[h][i] = _mm256_setzero_ps();
        }
        for (size_t d = 0; d < a->head; d += 32) {
            for (size_t i = 0; i < AT_ONCE; i++) {
                k_scale[i] = scale_at(k_row[i], type, d);
                prefetch_32(v_row[i], v_type, d);
            }
            for (size_t c = 0; c < 4; c++) {
                __m256 query[HEADS];
                for (size_t h = 0; h < heads; h++) {
                    const float *from = (const float *)(const void *)(q + h * a->q_head);
                    query[h] = _mm256_loadu_ps(from + d + LANES * c);
                }
                for (size_t i = 0; i < AT_ONCE; i++) {
                    const __m256 k = load_8(k_row[i], type, d, c, k_scale[i]);
                    for (size_t h = 0; h < heads; h++) sum[h][i] = _mm256_fmadd_ps(k, query[h], sum[h][i]);
                }
            }
        }
        for (size_t h = 0; h < heads; h++) {
            _mm_storeu_ps(p[h] + key, sums_of(sum[h][0], sum[h][1], sum[h][2], sum[h][3]));
        }
    }
}

// From the dots of head h to p, and to what its earlier sums are worth now. The mask is -infinity beyond n.
static float soften(workspace_one *w, const pk_attention_args *a, size_t h, const float *mask, size_t n) {
    const __m256 scale = set(a->scale);
    float *p = w->p[h];
    for (size_t key = n; key < KEYS; key++) p[key] = 0.0f;
    __m256 x[KEYS / LANES], largest = set(w->largest[h]);
    for (size_t i = 0; i < KEYS / LANES; i++) {
        const size_t key = LANES * i;
        x[i] = _mm256_fmadd_ps(_mm256_loadu_ps(p + key), scale, _mm256_loadu_ps(mask + key));
        largest = _mm256_max_ps(x[i], largest);  // the second where one is NaN
    }
    const float most = largest_of(largest);
    const __m256 base = finite_or_zero(set(most));
    __m256 total = set(0.0f);
    for (size_t i = 0; i < KEYS / LANES; i++) {
        x[i] = exponential(_mm256_sub_ps(x[i], base));
        _mm256_storeu_ps(p + LANES * i, x[i]);
        total = _mm256_add_ps(total, x[i]);
    }
    const float factor = _mm256_cvtss_f32(exponential(_mm256_sub_ps(set(w->largest[h]), base)));
    w->largest[h] = most;
    w->total[h] = w->total[h] * factor + sum_of(total);
    return factor;
}

// Adds p * v to the sums of `heads` heads. While values are read, the next block's keys are fetched.
INLINE void weigh(workspace_one *w, const pk_attention_args *a, size_t first, size_t at, size_t n,
                  const float *factor, pk_kv type, size_t heads) {
    for (size_t d = 0; d < a->head; d += 32) {
        const uint8_t *row = a->v + at * a->v_row;
        __m256 sum[HEADS][4];
        for (size_t h = 0; h < heads; h++) {
            for (size_t i = 0; i < 4; i++) sum[h][i] = _mm256_setzero_ps();
        }
        for (size_t key = 0; key < n; key++, row += a->v_row) {
            __m256 v[4], p[HEADS];
            load_32(v, row, type, d);
            if (first == 0 && at + KEYS + key < a->keys) {
                prefetch_32(a->k + (at + KEYS + key) * a->k_row, a->k_type, d);
            }
            for (size_t h = 0; h < heads; h++) p[h] = set(w->p[first + h][key]);
            for (size_t i = 0; i < 4; i++) {
                for (size_t h = 0; h < heads; h++) sum[h][i] = _mm256_fmadd_ps(p[h], v[i], sum[h][i]);
            }
        }
        for (size_t h = 0; h < heads; h++) {
            for (size_t i = 0; i < 4; i++) {
                float *to = w->sum[first + h] + d + LANES * i;
                const __m256 old = _mm256_loadu_ps(to);
                _mm256_storeu_ps(to, _mm256_fmadd_ps(set(factor[first + h]), old, sum[h][i]));
            }
        }
    }
}

// Two and two of four heads, not three and one: each round reads the keys or values again.
static size_t heads_at(const pk_attention_args *a, size_t h) {
    const size_t left = a->group - h;
    return left == 4 ? 2 : left < HEADS ? left : HEADS;
}

static void attend_one(workspace_one *w, const pk_attention_args *a, size_t at, size_t n, const float *mask) {
    float factor[ROWS];
    for (size_t h = 0, heads; h < a->group; h += heads) {
        float(*p)[KEYS] = w->p + h;
        heads = heads_at(a, h);
        switch (heads + (a->k_type == PK_KV_Q8_0 ? HEADS : 0)) {
            case 1: dots(p, a, h, at, n, PK_KV_F16, 1); break;
            case 2: dots(p, a, h, at, n, PK_KV_F16, 2); break;
            case 3: dots(p, a, h, at, n, PK_KV_F16, 3); break;
            case 4: dots(p, a, h, at, n, PK_KV_Q8_0, 1); break;
            case 5: dots(p, a, h, at, n, PK_KV_Q8_0, 2); break;
            default: dots(p, a, h, at, n, PK_KV_Q8_0, 3); break;
        }
    }
    for (size_t h = 0; h < a->group; h++) factor[h] = soften(w, a, h, mask, n);
    for (size_t h = 0, heads; h < a->group; h += heads) {
        heads = heads_at(a, h);
        switch (heads + (a->v_type == PK_KV_Q8_0 ? HEADS : 0)) {
            case 1: weigh(w, a, h, at, n, factor, PK_KV_F16, 1); break;
            case 2: weigh(w, a, h, at, n, factor, PK_KV_F16, 2); break;
            case 3: weigh(w, a, h, at, n, factor, PK_KV_F16, 3); break;
            case 4: weigh(w, a, h, at, n, factor, PK_KV_Q8_0, 1); break;
            case 5: weigh(w, a, h, at, n, factor, PK_KV_Q8_0, 2); break;
            default: weigh(w, a, h, at, n, factor, PK_KV_Q8_0, 3); break;
        }
    }
}

void pk_attention_one_avx2(const pk_attention_args *a) {
    workspace_one *w = (workspace_one *)(void *)a->scratch;
    memset(w->sum, 0, a->group * sizeof w->sum[0]);
    for (size_t h = 0; h < a->group; h++) {
        w->largest[h] = -INFINITY;
        w->total[h] = 0.0f;
    }
    for (size_t at = 0; at < a->keys; at += KEYS) {
        float mask[KEYS] = {0.0f};
        bool masked;
        const size_t n = look_at_mask(&masked, a, at, a->keys - at < KEYS ? a->keys - at : KEYS);
        if (n == 0) continue;
        for (size_t key = 0; masked && key < n; key += LANES) {
            _mm256_storeu_ps(mask + key, halves_up_to(a->mask + 2 * (at + key), n - key));
        }
        for (size_t key = n; key < KEYS; key++) mask[key] = -INFINITY;
        attend_one(w, a, at, n, mask);
    }
    for (size_t h = 0; h < a->group; h++) {
        float *out = (float *)(void *)((uint8_t *)a->out + h * a->out_head);
        const float divisor = a->state || w->total[h] == 0.0f ? 1.0f : w->total[h];  // no key: zeros
        for (size_t d = 0; d < a->head; d++) out[d] = w->sum[h][d] / divisor;
        if (a->state) {
            a->state[2 * h] = w->largest[h];
            a->state[2 * h + 1] = w->total[h];
        }
    }
}
