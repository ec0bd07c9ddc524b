// SPDX-License-Identifier: Apache-2.0
// capi_probe.c - checked entry points of the probes: what one thread of this machine can do at most.
#include <string.h>

#include "pk.h"
#include "pk_cpu.h"
#include "probe/probe.h"

static const pk_probe_variant *named(const char *name) {
    if (!name) return pk_probe_best();
    const pk_probe_variant *row;
    for (size_t at = 0; (row = pk_probe_at(at)) != NULL; at++) {
        if (!strcmp(row->name, name)) return pk_cpu_has(row->needs) ? row : NULL;
    }
    return NULL;
}

int pk_probe_int8(uint64_t *operations, uint32_t *sum, size_t rounds, const char *variant) {
    if (!operations || !sum) return PK_ERR_NULL;
    if (!pk_cpu_mask_is_valid()) return PK_ERR_MASK;
    const pk_probe_variant *row = named(variant);
    if (!row) return PK_ERR_VARIANT;
    if (rounds == 0 || rounds > PK_PROBE_MAX_ROUNDS) return PK_ERR_SIZE;
    *operations = row->int8(rounds, sum);
    return PK_OK;
}

int pk_probe_fp32(uint64_t *operations, float *value, size_t rounds, const char *variant) {
    if (!operations || !value) return PK_ERR_NULL;
    if (!pk_cpu_mask_is_valid()) return PK_ERR_MASK;
    const pk_probe_variant *row = named(variant);
    if (!row) return PK_ERR_VARIANT;
    if (rounds == 0 || rounds > PK_PROBE_MAX_ROUNDS) return PK_ERR_SIZE;
    *operations = row->fp32(rounds, value);
    return PK_OK;
}

int pk_probe_read(uint64_t *sum, const void *bytes, size_t n_bytes, const char *variant) {
    if (!sum || !bytes) return PK_ERR_NULL;
    if (!pk_cpu_mask_is_valid()) return PK_ERR_MASK;
    const pk_probe_variant *row = named(variant);
    if (!row) return PK_ERR_VARIANT;
    if (n_bytes == 0 || n_bytes % PK_PROBE_CHUNK) return PK_ERR_SIZE;
    *sum = row->read(bytes, n_bytes);
    return PK_OK;
}
