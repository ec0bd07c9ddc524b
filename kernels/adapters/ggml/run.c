// SPDX-License-Identifier: Apache-2.0
// run.c - runs a planned graph: all threads walk the same steps, take units of each until none is left, and meet.
#include <stdlib.h>
#include <string.h>

#include "plugin.h"

enum { CACHE_LINE = 64 };

typedef struct {
    pk_backend *backend;
    pk_barrier barrier;
    atomic_bool stop;
} run_state;

static void walk(void *context, int thread, int n_threads) {
    run_state *state = context;
    pk_backend *backend = state->backend;
    uint8_t *scratch = backend->scratch ? backend->scratch + (size_t)thread * backend->scratch_bytes : NULL;
    for (size_t i = 0; i < backend->n_steps; i++) {
        pk_step *step = &backend->steps[i];
        for (;;) {
            const size_t unit = atomic_fetch_add_explicit(&step->next, 1, memory_order_relaxed);
            if (unit >= step->units) break;
            step->unit(backend, step, unit, scratch);
        }
        if (thread == 0 && backend->abort && backend->abort(backend->abort_context)) atomic_store(&state->stop, true);
        pk_barrier_wait(&state->barrier, n_threads);
        if (atomic_load_explicit(&state->stop, memory_order_relaxed)) return;
    }
}

static bool grow(uint8_t **memory, size_t *bytes, size_t need) {
    if (need <= *bytes) return true;
    free(*memory);
    *bytes = 0;
    need = (need + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    *memory = aligned_alloc(CACHE_LINE, need);
    if (*memory) *bytes = need;
    return *memory != NULL;
}

int pk_run(pk_backend *backend) {
    for (pk_slot s = 0; s < PK_SLOTS; s++) {
        if (!grow(&backend->slots[s], &backend->slot_bytes[s], backend->slot_needs[s])) return GGML_STATUS_ALLOC_FAILED;
    }
    backend->scratch_bytes = (backend->scratch_bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    if (!grow(&backend->scratch, &backend->scratch_room, backend->scratch_bytes * (size_t)backend->n_threads)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    run_state state = {.backend = backend};
    pk_threads_run(backend->threads, backend->n_threads, walk, &state);
    atomic_fetch_add(&pk_count.graphs, 1);
    atomic_store(&pk_count.threads, (uint_fast64_t)backend->n_threads);
    return atomic_load(&state.stop) ? GGML_STATUS_ABORTED : GGML_STATUS_SUCCESS;
}

void pk_forget_plan(pk_backend *backend) {
    for (pk_slot s = 0; s < PK_SLOTS; s++) free(backend->slots[s]);
    free(backend->scratch);
    free(backend->steps);
    free(backend->uses);
}
