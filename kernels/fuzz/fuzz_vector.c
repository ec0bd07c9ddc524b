// SPDX-License-Identifier: Apache-2.0
// fuzz_vector.c - the operations on one row: each variant near the definition, or the same bytes as c.
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "pk.h"

typedef enum { RMS_NORM, SWIGLU, ADD, SCALE, TO_F16, TO_Q8_0, ROPE, N_OPS } op;
static const char *const names[] = {"pk_vector_rms_norm", "pk_vector_swiglu", "pk_vector_add",
                                    "pk_vector_scale",    "pk_vector_to_f16", "pk_vector_to_q8_0",
                                    "pk_vector_rope"};

// One call. a: x or gate; b: weight, up, b or cos; c: sin. `n_out` is to_q8_0's.
typedef struct {
    op which;
    size_t n, n_rot, n_out;
    float *a, *b, *c;
    float s, bias;  // of scale; s is rms_norm's eps
    const char *variant;
} call;

static int run(const call *k, void *out, const char *variant) {
    switch (k->which) {
        case RMS_NORM: return pk_vector_rms_norm(out, k->a, k->b, k->n, k->s, variant);
        case SWIGLU: return pk_vector_swiglu(out, k->a, k->b, k->n, variant);
        case ADD: return pk_vector_add(out, k->a, k->b, k->n, variant);
        case SCALE: return pk_vector_scale(out, k->a, k->n, k->s, k->bias, variant);
        case TO_F16: return pk_vector_to_f16(out, k->a, k->n, variant);
        case TO_Q8_0: return pk_vector_to_q8_0(out, k->n_out, k->a, k->n, variant);
        case ROPE: return pk_vector_rope(out, k->a, k->b, k->c, k->n_rot, k->n, variant);
        case N_OPS: break;
    }
    return PK_ERR_TYPE;
}

static size_t out_bytes(const call *k) {
    if (k->which == TO_F16) return 2 * k->n;
    return k->which == TO_Q8_0 ? k->n / 32 * 34 : 4 * k->n;
}

static double magnitude(float x) { return fabs((double)x); }

// Element i by the definition, in float64, and how far float32 may be from it: u is half of its last bit. For
// bounds see tools/check_vector.c, here for one side.
typedef struct {
    double want, bound;
} expectation;

static expectation swiglu_of(const call *k, size_t i) {
    const double u = 0x1p-24, subnormal = 0x1p-149, gate = (double)k->a[i];
    const double want = gate / (1.0 + exp(-gate)) * (double)k->b[i];
    const double lost = gate < -88.0 ? 0x1p-121 : subnormal;  // exp may be infinite and the quotient 0
    return (expectation){want, 7.0 * u * fabs(want) + lost * magnitude(k->b[i]) + subnormal};
}

static expectation rope_of(const call *k, size_t i) {
    const size_t half = k->n_rot / 2, j = i % half;
    const double x = (double)k->a[j], y = (double)k->a[j + half], c = (double)k->b[j], s = (double)k->c[j];
    const double one = i < half ? x * c : x * s, two = i < half ? -y * s : y * c;
    return (expectation){one + two, 2.0 * 0x1p-24 * (fabs(one) + fabs(two)) + 3.0 * 0x1p-149};
}

static expectation norm_of(const call *k, size_t i, double factor) {
    const double weight = k->b ? (double)k->b[i] : 1.0, want = (double)k->a[i] * factor * weight;
    return (expectation){want, 3.0 * 0x1p-24 * fabs(want) * 1.01 + 0x1p-149 * (fabs(weight) + 1.0)};
}

static double norm_factor(const call *k) {
    double sum = 0.0;
    for (size_t i = 0; i < k->n; i++) sum += (double)k->a[i] * (double)k->a[i];
    return 1.0 / sqrt(sum / (double)k->n + (double)k->s);
}

// Where a step overflows the contract says nothing. NaN stays NaN.
static void check_near(const call *k, const float *got) {
    const double factor = k->which == RMS_NORM ? norm_factor(k) : 1.0;
    // float32 must hold the factor, and so x * factor
    const bool usable = factor < FLT_MAX && (factor == 0.0 || factor > FLT_MIN);
    for (size_t i = 0; i < k->n; i++) {
        if (k->which == ROPE && i >= k->n_rot) {
            must(!memcmp(&got[i], &k->a[i], sizeof got[i]), names[k->which], k->variant,
                 "changed what it copies");
            continue;
        }
        const size_t half = k->n_rot / 2, j = k->which == ROPE ? i % half : i;
        const float second = k->b ? k->b[j] : 1.0f, x = k->a[j], y = k->which == ROPE ? k->a[j + half] : 0.0f;
        const float third = k->which == ROPE ? k->c[j] : 0.0f;
        if (isnan(x) || isnan(second) || isnan(y) || isnan(third)) {
            must(isnan(got[i]), names[k->which], k->variant, "lost a NaN");
            continue;
        }
        if (!isfinite(x) || !isfinite(second) || !isfinite(y) || !isfinite(third) || !usable) continue;
        const expectation e = k->which == SWIGLU ? swiglu_of(k, i)
                              : k->which == ROPE ? rope_of(k, i)
                                                 : norm_of(k, i, factor);
        if (fabs(e.want) < 1e38 && e.bound < 1e38) {
            must(is_near((double)got[i], e.want, e.bound), names[k->which], k->variant,
                 "is not near its definition");
        }
    }
}

static void check_result(const call *k, const uint8_t *got, size_t n_bytes) {
    if (k->which == RMS_NORM || k->which == SWIGLU || k->which == ROPE) {
        check_near(k, (const float *)(const void *)got);
        return;
    }
    uint8_t *want = exact(n_bytes);
    must(run(k, want, "c") == PK_OK, names[k->which], "c", "refuses");
    const bool same = k->which == TO_F16 || k->which == TO_Q8_0
                          ? !memcmp(got, want, n_bytes)
                          : same_floats((const float *)(const void *)got, (const float *)(void *)want, k->n);
    must(same, names[k->which], k->variant, "differs from c");
    free(want);
}

// A call that must be refused: a wrong size, no memory, or memory in part the same.
static void check_refusals(bytes *in, call k, uint8_t *out) {
    const char *const variant = k.variant;
    call bad = k;
    bad.n = 0;
    must(run(&bad, out, variant) != PK_OK, names[k.which], variant, "takes no numbers");
    bad.n = SIZE_MAX / sizeof(float) + 1 + take_hostile(in) % 1000;
    must(run(&bad, out, variant) != PK_OK, names[k.which], variant, "takes more numbers than memory has");
    must(run(&k, NULL, variant) == PK_ERR_NULL, names[k.which], variant, "takes NULL");
    bad = k;
    bad.a = NULL;
    must(run(&bad, out, variant) == PK_ERR_NULL, names[k.which], variant, "takes NULL");
    if (k.which == ROPE) {
        bad = k;
        bad.n_rot = take_hostile(in);
        if (bad.n_rot % 2 || bad.n_rot > k.n) {
            must(run(&bad, out, variant) != PK_OK, names[k.which], variant, "turns what is not there");
        }
    }
    if (k.which == TO_Q8_0) {
        bad = k;
        bad.n_out = take_hostile(in);
        must(bad.n_out == k.n_out || run(&bad, out, variant) != PK_OK, names[k.which], variant,
             "takes a wrong size");
    }
    if (k.n > 1 && k.which != TO_F16 && k.which != TO_Q8_0) {
        must(run(&k, k.a + 1, variant) != PK_OK, names[k.which], variant, "writes over what it reads");
    }
}

void fuzz_vector(bytes *in) {
    call k = {.which = (op)(take(in, 1) % N_OPS), .variant = take_variant(in, "vector")};
    const uint64_t flags = take(in, 1);  // 1: no weight, 2: in place, 4: see what is refused
    k.n = 1 + take_below(in, 600);
    k.n_rot = take_below(in, k.n + 1) / 2 * 2;
    if (k.which == TO_Q8_0 && take(in, 1) % 8) k.n = (k.n + 31) / 32 * 32;
    k.n_out = k.n / 32 * 34;
    k.s = take_float(in);
    k.bias = take_float(in);
    k.a = new_floats(in, k.n);
    k.b = k.which == RMS_NORM && flags & 1 ? NULL : new_floats(in, k.which == ROPE ? k.n_rot / 2 : k.n);
    k.c = new_floats(in, k.which == ROPE ? k.n_rot / 2 : 1);
    const size_t n_bytes = out_bytes(&k);
    uint8_t *out = exact(n_bytes + 1);
    uint8_t *to = k.which == TO_Q8_0 ? out + 1 : out;  // blocks of bytes may lie anywhere
    const bool good = is_variant("vector", k.variant) && (k.which != RMS_NORM || k.s > 0.0f) &&
                      (k.which != TO_Q8_0 || k.n % 32 == 0);
    must((run(&k, to, k.variant) == PK_OK) == good, names[k.which], k.variant, "has the wrong status");
    if (good) check_result(&k, to, n_bytes);
    if (flags & 4) check_refusals(in, k, to);
    if (good && flags & 2 && k.which != TO_F16 && k.which != TO_Q8_0) {
        must(run(&k, k.a, k.variant) == PK_OK, names[k.which], k.variant, "refuses to work in place");
        must(!memcmp(k.a, to, n_bytes), names[k.which], k.variant, "differs in place");
    }
    free_floats(k.a);
    free_floats(k.b);
    free_floats(k.c);
    free(out);
}
