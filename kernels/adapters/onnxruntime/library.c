// SPDX-License-Identifier: Apache-2.0
// library.c - what the host calls: RegisterCustomOps; and the guard before it.
#include <stdlib.h>
#include <string.h>

#include "library.h"
#include "pk_cpu.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);  // the host's way in
EXPORT int pk_ort_abi(void);                       // of the functions below
EXPORT const char *pk_ort_variant(void);           // the matrix kernels in use; NULL: a mask that names no feature
EXPORT void pk_ort_counts(uint64_t counts[8]);     // products, their tokens, gates, bytes packed, LoRAs

#define DOMAIN_NAME "pocketphi"
enum { PK_ORT_OWN_ABI = 1, MAX_HOSTS = 8 };

pk_kernels pk_use;
pk_counts pk_count;

// A process may have loaded more than one ONNX Runtime: each has its own table, and so its own domain object. They are
// kept for the life of the process, because a session refers to its domain until it ends.
static struct {
    const OrtApi *api;
    OrtCustomOpDomain *domain;
} hosts[MAX_HOSTS];
static atomic_flag busy = ATOMIC_FLAG_INIT;

static const pk_matmul_variant *best_variant(void) {
    const pk_matmul_variant *best = pk_matmul_at(0), *row;
    for (size_t i = 1; (row = pk_matmul_at(i)) != NULL; i++) {
        if (row->fn[PK_W_Q4_0] && pk_cpu_has(row->needs)) best = row;
    }
    return best;
}

static OrtStatus *new_domain(const OrtApi *api, OrtCustomOpDomain **out) {
    OrtStatus *status = api->CreateCustomOpDomain(DOMAIN_NAME, out);
    if (status) return status;
    const OrtCustomOp *const ops[] = {&pk_op_linear, &pk_op_gate, &pk_op_lora};
    for (size_t i = 0; i < sizeof ops / sizeof ops[0] && !status; i++) status = api->CustomOpDomain_Add(*out, ops[i]);
    if (status) api->ReleaseCustomOpDomain(*out);
    return status;
}

// The domain of this host, made when it is first asked for.
static OrtStatus *domain_of(const OrtApi *api, OrtCustomOpDomain **out) {
    size_t i = 0;
    while (i < MAX_HOSTS && hosts[i].api && hosts[i].api != api) i++;
    if (i == MAX_HOSTS) return pk_fail(api, "pocketphi: more than %d copies of ONNX Runtime", MAX_HOSTS);
    if (!hosts[i].api) {
        OrtStatus *status = new_domain(api, &hosts[i].domain);
        if (status) return status;
        hosts[i].api = api;
    }
    *out = hosts[i].domain;
    return NULL;
}

static void choose(void) {
    for (pk_weight w = 0; w < PK_W_TYPES; w++) pk_use.matmul[w] = pk_matmul_best(w);
    pk_use.activations = pk_activations_best();
    pk_use.lora = pk_lora_best();
    pk_use.vector = pk_vector_best();
}

// Whether a version is 1.20 or a later 1.x: the promise that entries keep their places was made for those.
static bool is_known(const char *version) {
    if (!version || strncmp(version, "1.", 2) != 0) return false;
    const char *minor = version + 2;
    const size_t digits = strspn(minor, "0123456789");
    return digits > 0 && digits < 6 && atoi(minor) >= PK_ORT_API;
}

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *oldest = base->GetApi(1);  // CreateStatus is the first entry of every version
    const OrtApi *api = is_known(base->GetVersionString()) ? base->GetApi(PK_ORT_API) : NULL;
    if (!api) {
        return !oldest ? NULL : oldest->CreateStatus(ORT_FAIL, "pocketphi: ONNX Runtime is not 1.20 or a later 1.x");
    }
    if (!pk_cpu_mask_is_valid()) return pk_fail(api, "pocketphi: POCKETPHI_CPU_MASK names an unknown CPU feature");
    while (atomic_flag_test_and_set(&busy)) continue;  // held for some calls, once a session
    if (!pk_use.vector) choose();
    OrtCustomOpDomain *domain = NULL;
    OrtStatus *status = domain_of(api, &domain);
    atomic_flag_clear(&busy);
    return status ? status : api->AddCustomOpDomain(options, domain);
}

int pk_ort_abi(void) { return PK_ORT_OWN_ABI; }
const char *pk_ort_variant(void) { return pk_cpu_mask_is_valid() ? best_variant()->name : NULL; }

void pk_ort_counts(uint64_t counts[8]) {
    memset(counts, 0, 8 * sizeof *counts);
    counts[0] = atomic_load(&pk_count.products);
    counts[1] = atomic_load(&pk_count.tokens);
    counts[2] = atomic_load(&pk_count.gates);
    counts[3] = atomic_load(&pk_count.packed_bytes);
    counts[4] = atomic_load(&pk_count.loras);
}
