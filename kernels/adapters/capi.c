// SPDX-License-Identifier: Apache-2.0
// capi.c - checked entry points for ctypes: the border between the outside and the core, which assumes.
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "attention/attention.h"
#include "logmel/logmel.h"
#include "matmul/activations.h"
#include "matmul/matmul.h"
#include "pk.h"
#include "pk_cpu.h"
#include "probe/probe.h"
#include "quantize/quantize.h"
#include "vector/vector.h"

int pk_abi(void) { return PK_ABI; }

const char *pk_version(void) { return PK_VERSION; }

const char *pk_status(int status) {
    static const char *const texts[] = {
        [PK_OK] = "ok",
        [PK_ERR_NULL] = "a pointer is NULL",
        [PK_ERR_RATE] = "the sample rate is neither 8000 nor 16000 Hz",
        [PK_ERR_SIZE] = "the input is shorter than one frame or not in whole blocks, or the output does not fit it",
        [PK_ERR_OVERLAP] = "output and input share memory",
        [PK_ERR_VALUE] = "a value is not finite, or beyond half of float32's range (samples) or 65504 (weights)",
        [PK_ERR_VARIANT] = "no such variant, or this CPU cannot run it",
        [PK_ERR_MASK] = "POCKETPHI_CPU_MASK names an unknown CPU feature",
        [PK_ERR_TYPE] = "the type is none of Q4_K, Q5_K and Q6_K (matmul: nor Q4_0, Q8_0, F16, BF16 and F32)",
        [PK_ERR_MEMORY] = "no memory for the work",
    };
    const size_t n = sizeof texts / sizeof texts[0];
    return status >= 0 && (size_t)status < n ? texts[status] : "unknown status";
}

int pk_check_mask(void) { return pk_cpu_mask_is_valid() ? PK_OK : PK_ERR_MASK; }

const char *pk_feature(size_t i) {
    const pk_cpu_feature *feature;
    for (size_t row = 0; (feature = pk_cpu_at(row)) != NULL; row++) {
        if (pk_cpu_has(feature->bit) && i-- == 0) return feature->name;
    }
    return NULL;
}

const char *pk_known_feature(size_t i) {
    const pk_cpu_feature *feature = pk_cpu_at(i);
    return feature ? feature->name : NULL;
}

// What the rows of all tables have; name NULL: past the end.
typedef struct {
    const char *name;
    unsigned needs;
} variant_row;

#define ROW_OF(family)                                                       \
    static variant_row family##_row(size_t i) {                              \
        const pk_##family##_variant *found = pk_##family##_at(i);            \
        return found ? (variant_row){found->name, found->needs} : (variant_row){NULL, 0}; \
    }
ROW_OF(logmel)
ROW_OF(quantize)
ROW_OF(matmul)
ROW_OF(activations)
ROW_OF(attention)
ROW_OF(vector)
ROW_OF(probe)

static const struct {
    const char *name;
    variant_row (*row)(size_t i);
} families[] = {
    {"logmel", logmel_row},           {"quantize", quantize_row},   {"matmul", matmul_row},
    {"activations", activations_row}, {"attention", attention_row}, {"vector", vector_row},
    {"probe", probe_row},
};

const char *pk_variant(const char *kernel, size_t i) {
    for (size_t f = 0; kernel && f < sizeof families / sizeof families[0]; f++) {
        if (strcmp(families[f].name, kernel) != 0) continue;
        variant_row found;
        for (size_t at = 0; (found = families[f].row(at)).name; at++) {
            if (pk_cpu_has(found.needs) && i-- == 0) return found.name;
        }
    }
    return NULL;
}

static pk_logmel_fn logmel_named(const char *name) {
    if (!name) return pk_logmel_best();
    const pk_logmel_variant *variant;
    for (size_t row = 0; (variant = pk_logmel_at(row)) != NULL; row++) {
        if (!strcmp(variant->name, name)) return pk_cpu_has(variant->needs) ? variant->fn : NULL;
    }
    return NULL;
}

static pk_quantize_fn quantize_named(const char *name) {
    if (!name) return pk_quantize_best();
    const pk_quantize_variant *variant;
    for (size_t row = 0; (variant = pk_quantize_at(row)) != NULL; row++) {
        if (!strcmp(variant->name, name)) return pk_cpu_has(variant->needs) ? variant->fn : NULL;
    }
    return NULL;
}

static bool overlap(const void *a, size_t bytes_a, const void *b, size_t bytes_b) {
    const uintptr_t from_a = (uintptr_t)a, from_b = (uintptr_t)b;
    return from_a < from_b + bytes_b && from_b < from_a + bytes_a;
}

static bool all_usable(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (!(x[i] >= -PK_LOGMEL_MAX_SAMPLE && x[i] <= PK_LOGMEL_MAX_SAMPLE)) return false;  // NaN too
    }
    return true;
}

int pk_logmel(float *out, size_t n_out, const float *wave, size_t n_samples, unsigned sample_rate,
              const char *variant) {
    if (!out || !wave) return PK_ERR_NULL;
    if (!pk_cpu_mask_is_valid()) return PK_ERR_MASK;
    const pk_logmel_fn fn = logmel_named(variant);
    if (!fn) return PK_ERR_VARIANT;
    pk_logmel_tables tables;  // 12 KB; filling it takes about as long as 50 frames
    if (!pk_logmel_setup(&tables, sample_rate)) return PK_ERR_RATE;
    if (n_samples < tables.window_samples || n_samples > SIZE_MAX / sizeof(float)) return PK_ERR_SIZE;
    const size_t n_frames = (n_samples - tables.window_samples) / tables.hop_samples + 1;
    if (n_out % PK_LOGMEL_BANDS || n_out / PK_LOGMEL_BANDS != n_frames) return PK_ERR_SIZE;
    if (overlap(out, n_out * sizeof *out, wave, n_samples * sizeof *wave)) return PK_ERR_OVERLAP;
    if (!all_usable(wave, n_samples)) return PK_ERR_VALUE;
    fn(out, wave, n_frames, &tables);
    return PK_OK;
}

static bool all_weights_usable(const float *x, size_t n_blocks) {
    for (size_t b = 0; b < n_blocks; b++, x += PK_QUANTIZE_BLOCK) {
        unsigned good = 1;  // one test for a block: the loop has no branch and becomes SIMD
        for (size_t i = 0; i < PK_QUANTIZE_BLOCK; i++) {
            good &= (unsigned)(x[i] >= -PK_QUANTIZE_MAX) & (unsigned)(x[i] <= PK_QUANTIZE_MAX);  // NaN too
        }
        if (!good) return false;
    }
    return true;
}

int pk_quantize(void *out, size_t n_out, const float *x, size_t n, int type, const char *variant) {
    if (!out || !x) return PK_ERR_NULL;
    if (!pk_cpu_mask_is_valid()) return PK_ERR_MASK;
    const pk_quantize_fn fn = quantize_named(variant);
    if (!fn) return PK_ERR_VARIANT;
    if (type != PK_Q4_K && type != PK_Q5_K && type != PK_Q6_K) return PK_ERR_TYPE;
    const size_t bytes = pk_quantize_bytes((pk_quantize_type)type), n_blocks = n / PK_QUANTIZE_BLOCK;
    if (n_blocks == 0 || n % PK_QUANTIZE_BLOCK || n > SIZE_MAX / sizeof(float)) return PK_ERR_SIZE;
    if (n_out % bytes || n_out / bytes != n_blocks) return PK_ERR_SIZE;
    if (overlap(out, n_out, x, n * sizeof *x)) return PK_ERR_OVERLAP;
    if (!all_weights_usable(x, n_blocks)) return PK_ERR_VALUE;
    fn(out, x, n_blocks, (pk_quantize_type)type);
    return PK_OK;
}
