// SPDX-License-Identifier: Apache-2.0
// check_vector.c - every variant of the vector operations against the scalar one; and what a number costs.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pk_check.h"
#include "vector/vector.h"

typedef enum { RMS_NORM, RMS_NORM_PLAIN, SWIGLU, ADD, SCALE, TO_F16, TO_Q8_0, ROPE, ROPE_PART, N_OPS } op;
static const char *const op_names[] = {
    "rms_norm", "rms_norm without weights", "swiglu", "add", "scale", "to_f16", "to_q8_0", "rope", "rope of a part",
};

typedef enum { UNIFORM, WIDE, ZERO, SUBNORMAL, HUGE_SIGNED, STEEP, TIES, BROKEN, N_FILLS } fill;
static const char *const fill_names[] = {"uniform", "wide", "zero", "subnormal",
                                         "huge", "-110 to 110", "ties", "infinite and NaN"};

// [0]: x, a or gate; [1]: weight, up, b or cos; [2]: sin. Each has exactly n floats and is not aligned.
typedef struct {
    size_t n;
    float *memory[3];
    float *in[3];
} inputs;

static float filled(fill how, size_t i, float u, float v) {
    static const float broken[] = {INFINITY, -INFINITY, NAN};
    switch (how) {
        case UNIFORM: return u;
        case WIDE: return ldexpf(u, (int)(138.0f * v) - 11);  // 2^-149 to 2^127
        case SUBNORMAL: return u * FLT_MIN;
        case HUGE_SIGNED: return u < 0.0f ? -1e38f : 1e38f;
        case STEEP: return 110.0f * u;
        case TIES:  // halves, for to_q8_0 with d == 1; and half of float16's last bit
            if (i % 32 == 5) return 0x1.fffffep-2f;
            if (i % 64 < 32) return i % 32 == 3 ? 127.0f : 0.5f * (float)(int)(254.0f * u);
            return ldexpf((float)((int)(2048.0f * u) * 2 + 1), (int)(20.0f * v) - 16);
        case BROKEN: return i % 7 == 3 ? broken[i / 32 % 3] : u;  // one kind in a block of q8_0
        case ZERO:
        case N_FILLS: break;
    }
    return u < 0.0f ? -0.0f : 0.0f;
}

// rope's cos and sin stay within [-1, 1].
static inputs make_inputs(op which, size_t n, fill how) {
    inputs made = {n, {NULL}, {NULL}};
    uint64_t state = 88172645463325252u + n;
    for (size_t k = 0; k < 3; k++) {
        made.memory[k] = must_alloc((n + 1) * sizeof(float));
        made.in[k] = made.memory[k] + 1;
        for (size_t i = 0; i < n; i++) {
            const float u = random_sample(&state);
            const bool angle = k > 0 && (which == ROPE || which == ROPE_PART);
            made.in[k][i] = filled(angle ? UNIFORM : how, i, u, random_sample(&state));
        }
    }
    return made;
}

static void free_inputs(inputs *made) {
    for (size_t k = 0; k < 3; k++) free(made->memory[k]);
}

static size_t out_bytes(op which, size_t n) {
    if (which == TO_F16) return 2 * n;
    return which == TO_Q8_0 ? n / 32 * 34 : 4 * n;
}

static size_t rotated(op which, size_t n) { return (which == ROPE ? n : n / 2) / 2 * 2; }

static void run(const pk_vector_variant *v, op which, void *out, const inputs *from) {
    const float *x = from->in[0], *y = from->in[1];
    const size_t n = from->n;
    switch (which) {
        case RMS_NORM: v->rms_norm(out, x, y, n, 1e-5f); break;
        case RMS_NORM_PLAIN: v->rms_norm(out, x, NULL, n, 1e-5f); break;
        case SWIGLU: v->swiglu(out, x, y, n); break;
        case ADD: v->add(out, x, y, n); break;
        case SCALE: v->scale(out, x, n, 1.7f, -0.3f); break;
        case TO_F16: v->to_f16(out, x, n); break;
        case TO_Q8_0: v->to_q8_0(out, x, n); break;
        case ROPE:
        case ROPE_PART: v->rope(out, x, y, from->in[2], rotated(which, n), n); break;
        case N_OPS: break;
    }
}

// How far a right result of swiglu may be from the definition (`sides` 1), and two of them apart (2).
static double swiglu_bound(const inputs *from, size_t i, double want, double sides) {
    const double u = 0x1p-24, subnormal = 0x1p-149, y = fabs((double)from->in[1][i]);
    // exp: 4 u; the sum, the quotient and the product: 3 u. Below -88.7 exp may be infinite and the quotient 0,
    // which is 89 / FLT_MAX at most.
    const double lost = from->in[0][i] < -88.0f ? 0x1p-121 : subnormal;
    return sides * 7.0 * u * fabs(want) + lost * y + subnormal;
}

// How far two right results may be apart. u is half an ulp, relative: each side is off by at most half of this.
static double bound(op which, const inputs *from, size_t i, double want) {
    const double u = 0x1p-24, subnormal = 0x1p-149;
    const double x = fabs((double)from->in[0][i]), y = fabs((double)from->in[1][i]);
    if (which == RMS_NORM || which == RMS_NORM_PLAIN) {  // the factor, and two products
        return 6.0 * u * fabs(want) + subnormal * ((which == RMS_NORM ? y : 1.0) + 1.0);
    }
    if (which == SWIGLU) return swiglu_bound(from, i, want, 2.0);
    if (which == ROPE || which == ROPE_PART) {  // two products and a sum, or one of the products fused
        const size_t half = rotated(which, from->n) / 2;
        if (i >= 2 * half) return 0.0;
        const size_t j = i % half;
        const double other = fabs((double)from->in[0][i < half ? i + half : j]);
        const double c = fabs((double)from->in[1][j]), s = fabs((double)from->in[2][j]);
        return 4.0 * u * (x * c + other * s) + 3.0 * subnormal;
    }
    return 0.0;
}

static bool same(float want, float got) {
    return (isnan(want) && isnan(got)) || !memcmp(&want, &got, sizeof want);
}

static bool close_to(op which, const inputs *from, const void *want, const void *got) {
    if (which == TO_F16 || which == TO_Q8_0) return !memcmp(want, got, out_bytes(which, from->n));
    for (size_t i = 0; i < from->n; i++) {
        float a, b;
        memcpy(&a, (const char *)want + 4 * i, sizeof a);
        memcpy(&b, (const char *)got + 4 * i, sizeof b);
        if (same(a, b)) continue;
        if (!isfinite(a) || !isfinite(b) || !(fabs((double)a - b) <= bound(which, from, i, a))) return false;
    }
    return true;
}

// The definition itself, where exp decides: the scalar code is held to it as well.
static bool swiglu_is_right(const inputs *from, const float *got) {
    for (size_t i = 0; i < from->n; i++) {
        const double g = from->in[0][i], want = g / (1.0 + exp(-g)) * from->in[1][i];
        if (!isfinite(want) || fabs(want) > FLT_MAX) continue;
        if (!(fabs(got[i] - want) <= swiglu_bound(from, i, want, 1.0))) return false;
    }
    return true;
}

static bool check_case(const pk_vector_variant *v, op which, size_t n, fill how) {
    enum { GUARD = 64 };
    const size_t bytes = out_bytes(which, n), all = bytes + 2 * GUARD;
    inputs from = make_inputs(which, n, how);
    uint8_t *want = must_alloc(all), *got = must_alloc(all);
    memset(want, 0xa5, all);
    memset(got, 0xa5, all);
    run(&pk_vector_c, which, want + GUARD, &from);
    run(v, which, got + GUARD, &from);
    bool ok = close_to(which, &from, want + GUARD, got + GUARD);
    for (size_t i = 0; i < GUARD; i++) ok = ok && got[i] == 0xa5 && got[GUARD + bytes + i] == 0xa5;
    if (which == SWIGLU) ok = ok && swiglu_is_right(&from, (const float *)(void *)(got + GUARD));
    if (which != TO_F16 && which != TO_Q8_0) {  // in place: the same bytes
        run(v, which, from.in[0], &from);
        ok = ok && !memcmp(from.in[0], got + GUARD, bytes);
    }
    free_inputs(&from);
    free(want);
    free(got);
    return ok;
}

static bool check_variant(const pk_vector_variant *v) {
    size_t n_cases = 0, n_bad = 0;
    for (size_t n = 1; n <= 1024; n += n == 99 ? 925 : 1) {  // 1 to 99 and 1024
        for (op which = RMS_NORM; which < N_OPS; which++) {
            if (which == TO_Q8_0 && n % 32) continue;
            for (fill how = UNIFORM; how < N_FILLS; how++, n_cases++) {
                if (check_case(v, which, n, how)) continue;
                printf("vector %s is wrong: %s, %zu numbers, %s\n", v->name, op_names[which], n, fill_names[how]);
                n_bad++;
            }
        }
    }
    printf("vector %-8s %zu of %zu cases equal c or lie within the bound\n", v->name, n_cases - n_bad, n_cases);
    return n_bad == 0;
}

bool check_vector(void) {
    bool all = true;
    const pk_vector_variant *v;
    for (size_t row = 0; (v = pk_vector_at(row)) != NULL; row++) {
        if (pk_cpu_has(v->needs)) {
            all = check_variant(v) && all;
        } else {
            printf("vector %-8s not on this CPU\n", v->name);
        }
    }
    return all;
}

void bench_vector(void) {
    enum { N = 8192, CALLS = 200, ROUNDS = 9 };
    inputs from = make_inputs(ROPE, N, UNIFORM);
    float *out = must_alloc(N * sizeof *out);
    for (op which = RMS_NORM; which < N_OPS; which++) {
        double reference = 0.0;
        const pk_vector_variant *v;
        for (size_t row = 0; (v = pk_vector_at(row)) != NULL; row++) {
            if (!pk_cpu_has(v->needs)) continue;
            double best = 0.0;
            for (int round = 0; round < ROUNDS; round++) {
                const double start = now_ns();
                for (int call = 0; call < CALLS; call++) run(v, which, out, &from);
                const double took = (now_ns() - start) / (CALLS * (double)N);
                if (round == 0 || took < best) best = took;
            }
            if (row == 0) reference = best;
            printf("%-24s %-8s %6.3f ns/number  %5.2f x c\n", op_names[which], v->name, best, reference / best);
        }
    }
    free_inputs(&from);
    free(out);
}
