// SPDX-License-Identifier: Apache-2.0
// vector.h - the contract of the operations between the matrix multiplications: one row of float32 at a time.
//
//   rms_norm    out = x * (1 / sqrt(mean(x^2) + eps)) * weight; the factor in float64, rounded to float32
//   swiglu      out = gate / (1 + exp(-gate)) * up
//   add         out = a + b
//   scale       out = x * s + bias, rounded twice
//   to_f16      out = x rounded to float16, ties to even (beyond 65504: infinity, as IEEE says); a NaN stays
//               one, quiet, with the upper ten bits of its payload
//   to_q8_0     out = ggml's q8_0 blocks (f16 d, 32 s8) of x: d = max |x| / 127 in float32, q = x * (1 / d)
//               rounded to nearest, ties away from zero, d then stored as float16 (quantize_row_q8_0_ref).
//               Where ggml's q is undefined ours is 0: 1 / d infinite, or an x not finite (d: 7e00, NaN)
//   rope        NeoX pairs: for i < n_rot / 2, with c = cos[i], s = sin[i]:
//               out[i] = x[i] * c - x[i + n_rot/2] * s,  out[i + n_rot/2] = x[i] * s + x[i + n_rot/2] * c;
//               elements from n_rot on are copied
//
// add, scale, to_f16 and to_q8_0 give the same bytes in every variant (but any NaN may stand for another in
// add and scale). exp is float32 with an error below 2 ulp over its whole range (down to 0, up to infinity);
// NaN gives NaN.
// The caller guarantees: n > 0; eps > 0; out may be x, a, b, gate or up itself, otherwise nothing overlaps;
// to_q8_0: n % 32 == 0; rope: n_rot even, n_rot <= n. A variant allocates nothing, keeps no state, and
// touches n elements only.
#ifndef PK_VECTOR_H
#define PK_VECTOR_H

#include <stddef.h>
#include <stdint.h>

#include "pk_cpu.h"  // each variant file defines its own row

// exp(x) = 2^k * exp(r), with k = x / ln 2 rounded and r = x - k * ln 2, so |r| <= ln 2 / 2. Beyond MIN and
// MAX the result is 0 or infinity. ln 2 is HI + LO; HI has 15 bits, so k * HI is exact. exp(r) is
// 1 + r + r^2 * (C0 + C1 r + .. + C4 r^4), of least relative error (0.07 * 2^-24). 2^k comes in
// so that a subnormal result is rounded once: by two powers of two, or an instruction that does it.
#define PK_EXP_MIN (-104.0f)
#define PK_EXP_MAX 89.0f
#define PK_EXP_PER_LN2 0x1.715476p+0f
#define PK_EXP_LN2_HI 0x1.62e4p-1f
#define PK_EXP_LN2_LO 0x1.7f7d1cp-20f
#define PK_EXP_C0 0x1.fffffcp-2f
#define PK_EXP_C1 0x1.555492p-3f
#define PK_EXP_C2 0x1.5558f2p-5f
#define PK_EXP_C3 0x1.1239e2p-7f
#define PK_EXP_C4 0x1.6a2434p-10f

typedef struct {
    const char *name;
    unsigned needs;  // PK_CPU_* bits
    // weight NULL: ones
    void (*rms_norm)(float *out, const float *x, const float *weight, size_t n, float eps);
    void (*swiglu)(float *out, const float *gate, const float *up, size_t n);
    void (*add)(float *out, const float *a, const float *b, size_t n);
    void (*scale)(float *out, const float *x, size_t n, float s, float bias);
    void (*to_f16)(uint16_t *out, const float *x, size_t n);
    void (*to_q8_0)(uint8_t *out, const float *x, size_t n);
    void (*rope)(float *out, const float *x, const float *cos, const float *sin, size_t n_rot, size_t n);
} pk_vector_variant;

const pk_vector_variant *pk_vector_at(size_t i);  // slow to fast, NULL past the end: tests walk the table
const pk_vector_variant *pk_vector_best(void);

extern const pk_vector_variant pk_vector_c;  // scalar: the definition of correct
extern const pk_vector_variant pk_vector_avx2;
extern const pk_vector_variant pk_vector_avx512f;
extern const pk_vector_variant pk_vector_neon;

#endif
