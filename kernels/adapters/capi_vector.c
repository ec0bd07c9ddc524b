// SPDX-License-Identifier: Apache-2.0
// capi_vector.c - checked entry points of the vector operations and the activation packers.
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "matmul/activations.h"
#include "pk.h"
#include "pk_cpu.h"
#include "vector/vector.h"

static const pk_vector_variant *vector_named(const char *name) {
    if (!name) return pk_vector_best();
    const pk_vector_variant *variant;
    for (size_t row = 0; (variant = pk_vector_at(row)) != NULL; row++) {
        if (!strcmp(variant->name, name)) return pk_cpu_has(variant->needs) ? variant : NULL;
    }
    return NULL;
}

static const pk_activations_variant *activations_named(const char *name) {
    if (!name) return pk_activations_best();
    const pk_activations_variant *variant;
    for (size_t row = 0; (variant = pk_activations_at(row)) != NULL; row++) {
        if (!strcmp(variant->name, name)) return pk_cpu_has(variant->needs) ? variant : NULL;
    }
    return NULL;
}

static bool overlap(const void *a, size_t bytes_a, const void *b, size_t bytes_b) {
    const uintptr_t from_a = (uintptr_t)a, from_b = (uintptr_t)b;
    return from_a < from_b + bytes_b && from_b < from_a + bytes_a;
}

// What every operation wants: pointers, a number of elements, a variant. *chosen is set if this is PK_OK.
static int choose(const pk_vector_variant **chosen, const void *out, const void *x, size_t n, const char *name) {
    if (!out || !x) return PK_ERR_NULL;
    if (!pk_cpu_mask_is_valid()) return PK_ERR_MASK;
    *chosen = vector_named(name);
    if (!*chosen) return PK_ERR_VARIANT;
    return n == 0 || n > SIZE_MAX / sizeof(float) ? PK_ERR_SIZE : PK_OK;
}

// Whether out [n] shares memory with x [n_x] in another way than being it.
static bool clash(const float *out, size_t n, const float *x, size_t n_x) {
    return x && !(out == x && n == n_x) && overlap(out, n * sizeof *out, x, n_x * sizeof *x);
}

int pk_vector_rms_norm(float *out, const float *x, const float *weight, size_t n, float eps, const char *variant) {
    const pk_vector_variant *v;
    const int status = choose(&v, out, x, n, variant);
    if (status) return status;
    if (!(eps > 0.0f)) return PK_ERR_VALUE;
    if (clash(out, n, x, n) || (weight && overlap(out, n * sizeof *out, weight, n * sizeof *weight))) {
        return PK_ERR_OVERLAP;
    }
    v->rms_norm(out, x, weight, n, eps);
    return PK_OK;
}

int pk_vector_swiglu(float *out, const float *gate, const float *up, size_t n, const char *variant) {
    const pk_vector_variant *v;
    const int status = choose(&v, out, gate, n, variant);
    if (status) return status;
    if (!up) return PK_ERR_NULL;
    if (clash(out, n, gate, n) || clash(out, n, up, n)) return PK_ERR_OVERLAP;
    v->swiglu(out, gate, up, n);
    return PK_OK;
}

int pk_vector_add(float *out, const float *a, const float *b, size_t n, const char *variant) {
    const pk_vector_variant *v;
    const int status = choose(&v, out, a, n, variant);
    if (status) return status;
    if (!b) return PK_ERR_NULL;
    if (clash(out, n, a, n) || clash(out, n, b, n)) return PK_ERR_OVERLAP;
    v->add(out, a, b, n);
    return PK_OK;
}

int pk_vector_scale(float *out, const float *x, size_t n, float s, float bias, const char *variant) {
    const pk_vector_variant *v;
    const int status = choose(&v, out, x, n, variant);
    if (status) return status;
    if (clash(out, n, x, n)) return PK_ERR_OVERLAP;
    v->scale(out, x, n, s, bias);
    return PK_OK;
}

int pk_vector_to_f16(uint16_t *out, const float *x, size_t n, const char *variant) {
    const pk_vector_variant *v;
    const int status = choose(&v, out, x, n, variant);
    if (status) return status;
    if (overlap(out, n * sizeof *out, x, n * sizeof *x)) return PK_ERR_OVERLAP;
    v->to_f16(out, x, n);
    return PK_OK;
}

int pk_vector_to_q8_0(void *out, size_t n_out, const float *x, size_t n, const char *variant) {
    const pk_vector_variant *v;
    const int status = choose(&v, out, x, n, variant);
    if (status) return status;
    if (n % 32 || n_out % 34 || n_out / 34 != n / 32) return PK_ERR_SIZE;
    if (overlap(out, n_out, x, n * sizeof *x)) return PK_ERR_OVERLAP;
    v->to_q8_0(out, x, n);
    return PK_OK;
}

int pk_vector_rope(float *out, const float *x, const float *cos, const float *sin, size_t n_rot, size_t n,
                   const char *variant) {
    const pk_vector_variant *v;
    const int status = choose(&v, out, x, n, variant);
    if (status) return status;
    if (!cos || !sin) return PK_ERR_NULL;
    if (n_rot % 2 || n_rot > n) return PK_ERR_SIZE;
    const size_t bytes = n * sizeof *out, half = n_rot / 2 * sizeof *cos;
    if (clash(out, n, x, n) || overlap(out, bytes, cos, half) || overlap(out, bytes, sin, half)) {
        return PK_ERR_OVERLAP;
    }
    v->rope(out, x, cos, sin, n_rot, n);
    return PK_OK;
}

int pk_activations(void *tile, size_t n_tile, const float *x, size_t tokens, size_t columns, size_t first,
                   size_t last, size_t shared, int arrange, const char *variant) {
    if (!tile || !x) return PK_ERR_NULL;
    if (!pk_cpu_mask_is_valid()) return PK_ERR_MASK;
    const pk_activations_variant *v = activations_named(variant);
    if (!v) return PK_ERR_VARIANT;
    if (tokens == 0 || tokens > PK_TILE_TOKENS || columns == 0) return PK_ERR_SIZE;
    if (columns > SIZE_MAX / sizeof *x / PK_TILE_TOKENS || (!arrange && columns % PK_X_BLOCK)) return PK_ERR_SIZE;
    const size_t blocks = (columns + PK_X_BLOCK - 1) / PK_X_BLOCK;
    if (first >= last || last > blocks) return PK_ERR_SIZE;
    if (shared != 1 && (arrange || shared != 8 || blocks % 8 || first % 8 || last % 8)) return PK_ERR_SIZE;
    if (n_tile != pk_tile_bytes(arrange ? PK_W_F32 : PK_W_Q8_0, columns, tokens)) return PK_ERR_SIZE;
    if (overlap(tile, n_tile, x, tokens * columns * sizeof *x)) return PK_ERR_OVERLAP;
    const pk_activations_args args = {tile, x, columns, tokens, columns, first, last, shared};
    (arrange ? v->arrange : v->quantize)(&args);
    return PK_OK;
}
