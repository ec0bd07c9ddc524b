// SPDX-License-Identifier: Apache-2.0
// plugin.c - what the host calls: the registry entry, the one device, its backend; and the guard before all
// of it.
#include <stdlib.h>
#include <string.h>

#include <dlfcn.h>

#include "pk_cpu.h"
#include "plugin.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT ggml_reg *ggml_backend_init(void);  // the host's way in
EXPORT const char *pk_ggml_version(void);  // the ggml_version() this was written for
EXPORT int pk_ggml_api(void);              // its backend interface
EXPORT const char *pk_ggml_variant(void);  // the matrix kernels in use
EXPORT const char *pk_ggml_refusal(void);  // why ggml_backend_init gave NULL, or NULL
EXPORT void pk_ggml_counts(
    uint64_t counts[8]);  // graphs, nodes, matmuls, their tokens, attentions, bytes packed, threads

pk_kernels pk_use;
ggml_host pk_host;
pk_counts pk_count;
static const char *refusal;

// ---- the backend: one per llama_context ----

static const char *backend_name(ggml_backend *backend) {
    (void)backend;
    return "PK";
}

static void backend_free(ggml_backend *backend) {
    pk_backend *own = backend->context;
    pk_threads_close(own->threads);
    pk_forget_plan(own);
    free(own);
    free(backend);
}

static int backend_compute(ggml_backend *backend, ggml_graph *graph) {
    pk_backend *own = backend->context;
    if (!pk_plan(own, graph)) return GGML_STATUS_ALLOC_FAILED;
    return pk_run(own);
}

static ggml_backend *device_init(ggml_device *device, const char *params) {
    (void)params;
    static uint8_t guid[16] = {0x70, 0x6b, 0x2d, 0x67, 0x67, 0x6d, 0x6c, 0x2d,
                               0x63, 0x70, 0x75, 0x2d, 0x30, 0x30, 0x30, 0x31};
    ggml_backend *backend = calloc(1, sizeof *backend);
    pk_backend *own = calloc(1, sizeof *own);
    if (own) own->threads = pk_threads_open();
    if (!backend || !own || !own->threads) {
        free(backend);
        free(own);
        return NULL;
    }
    own->n_threads = pk_threads_default();
    backend->guid = &guid;
    backend->iface.get_name = backend_name;
    backend->iface.free = backend_free;
    backend->iface.graph_compute = backend_compute;
    backend->device = device;
    backend->context = own;
    return backend;
}

static void set_n_threads(ggml_backend *backend, int n) {
    ((pk_backend *)backend->context)->n_threads = n < 1 ? 1 : n;
}

static void set_abort(ggml_backend *backend, bool (*abort)(void *), void *context) {
    pk_backend *own = backend->context;
    own->abort = abort;
    own->abort_context = context;
}

// ---- the device ----

static const char *device_name(ggml_device *device) {
    (void)device;
    return "PK";
}

static const char *device_description(ggml_device *device) {
    (void)device;
    return "pocketphi CPU kernels";
}

static void device_memory(ggml_device *device, size_t *free_bytes, size_t *total) {
    (void)device;
    *free_bytes = *total = 0;  // the host's own memory: nothing to report
}

static int device_type(ggml_device *device) {
    (void)device;
    return GGML_DEVICE_ACCEL;
}

static void device_props(ggml_device *device, ggml_device_props *props) {
    *props = (ggml_device_props){
        .name = device_name(device), .description = device_description(device), .type = GGML_DEVICE_ACCEL};
}

static ggml_buffer_type *device_buffer_type(ggml_device *device) {
    ggml_buffer_type *type = pk_buffer_type();
    type->device = device;
    return type;
}

static bool device_supports_op(ggml_device *device, const ggml_tensor *op) {
    (void)device;
    return pk_supports(op);
}

static bool device_supports_buft(ggml_device *device, ggml_buffer_type *type) {
    (void)device;
    return type == pk_buffer_type() || (type->iface.is_host && type->iface.is_host(type));
}

// ---- the registry entry ----

static const char *reg_name(ggml_reg *reg) {
    (void)reg;
    return "PK";
}

static size_t reg_count(ggml_reg *reg) {
    (void)reg;
    return 1;
}

static ggml_device *reg_device(ggml_reg *reg, size_t index) {
    static ggml_device device = {
        .iface = {.get_name = device_name,
                  .get_description = device_description,
                  .get_memory = device_memory,
                  .get_type = device_type,
                  .get_props = device_props,
                  .init_backend = device_init,
                  .get_buffer_type = device_buffer_type,
                  .supports_op = device_supports_op,
                  .supports_buft = device_supports_buft},
    };
    device.reg = reg;
    return index == 0 ? &device : NULL;
}

// Functions come as object pointers: POSIX and Windows promise that both have one size.
static void *as_object(void (*fn)(void)) {
    void *object;
    memcpy(&object, &fn, sizeof object);
    return object;
}

static void *reg_proc_address(ggml_reg *reg, const char *name) {
    (void)reg;
    if (!strcmp(name, "ggml_backend_set_n_threads")) return as_object((void (*)(void))set_n_threads);
    if (!strcmp(name, "ggml_backend_set_abort_callback")) return as_object((void (*)(void))set_abort);
    return NULL;
}

// ---- the guard ----

// A symbol of the library that called us, or of those it is linked to: a process may hold more than one ggml. A
// program with ggml inside exports it itself.
static void *symbol(const void *caller, const char *name) {
    Dl_info host;
    void *library = dladdr(caller, &host) ? dlopen(host.dli_fname, RTLD_NOLOAD | RTLD_LAZY) : NULL;
    void *found = library ? dlsym(library, name) : NULL;
    if (library) dlclose(library);  // the host holds it open
    return found ? found : dlsym(RTLD_DEFAULT, name);
}

static bool find(const void *caller, void *function, const char *name) {
    void *found = symbol(caller, name);
    memcpy(function, &found, sizeof found);
    return found != NULL;
}

static const char *why_not(const void *caller) {
    if (!pk_cpu_mask_is_valid()) return "POCKETPHI_CPU_MASK names an unknown CPU feature";
    if (!find(caller, &pk_host.version, "ggml_version")) return "the host's ggml library was not found";
    if (strcmp(pk_host.version(), PK_GGML_VERSION) != 0)
        return "the host's ggml is not version " PK_GGML_VERSION;
    if (!find(caller, &pk_host.buffer_init, "ggml_backend_buffer_init") || !find(caller, &pk_host.nbytes, "ggml_nbytes") ||
        !find(caller, &pk_host.graph_n_nodes, "ggml_graph_n_nodes") ||
        !find(caller, &pk_host.graph_node, "ggml_graph_node")) {
        return "the host's ggml lacks a function that its version should have";
    }
    return NULL;
}

static const pk_matmul_variant *best_variant(void) {
    const pk_matmul_variant *best = pk_matmul_at(0), *row;
    for (size_t i = 1; (row = pk_matmul_at(i)) != NULL; i++) {
        if (row->fn[PK_W_Q4_0] && pk_cpu_has(row->needs)) best = row;
    }
    return best;
}

ggml_reg *ggml_backend_init(void) {
    static ggml_reg reg = {
        .api_version = PK_GGML_API,
        .iface = {.get_name = reg_name,
                  .get_device_count = reg_count,
                  .get_device = reg_device,
                  .get_proc_address = reg_proc_address},
    };
    refusal = why_not(__builtin_return_address(0));
    if (!refusal && !best_variant()->needs)
        refusal = "this CPU has none of the instruction sets that beat ggml's own";
    if (refusal) return NULL;
    for (pk_weight w = 0; w < PK_W_TYPES; w++) pk_use.matmul[w] = pk_matmul_best(w);
    pk_use.activations = pk_activations_best();
    pk_use.attention = pk_attention_best();
    pk_use.vector = pk_vector_best();
    return &reg;
}

const char *pk_ggml_version(void) { return PK_GGML_VERSION; }
int pk_ggml_api(void) { return PK_GGML_API; }
const char *pk_ggml_variant(void) { return best_variant()->name; }
const char *pk_ggml_refusal(void) { return refusal; }

void pk_ggml_counts(uint64_t counts[8]) {
    counts[0] = atomic_load(&pk_count.graphs);
    counts[1] = atomic_load(&pk_count.nodes);
    counts[2] = atomic_load(&pk_count.matmuls);
    counts[3] = atomic_load(&pk_count.matmul_tokens);
    counts[4] = atomic_load(&pk_count.attentions);
    counts[5] = atomic_load(&pk_count.packed_bytes);
    counts[6] = atomic_load(&pk_count.threads);
    counts[7] = 0;
}
