// SPDX-License-Identifier: Apache-2.0
// run.c - runs a planned graph: all threads walk the same steps and take units of each until none is left.
//
// A step is over when its units are done, not when every thread has come by: a thread that the system has put
// aside holds nobody up unless it is in the middle of a unit. It finds the steps it missed exhausted and
// catches up.
#include <sched.h>
#include <stdlib.h>

#include "plugin.h"

enum {
    CACHE_LINE = 64,
    SPINS = 2000,  // about 50 us, longer than a unit of one token; then a thread gives way: the one it waits
                   // for may need its core
};

typedef struct {
    pk_backend *backend;
    atomic_bool stop;
} run_state;

static void wait_for(const pk_step *step) {
    for (int i = 0; atomic_load_explicit(&step->done, memory_order_acquire) < step->units; i++) {
        if (i < SPINS) pk_relax();
        else sched_yield();
    }
}

static void walk(void *context, int thread, int n_threads) {
    (void)n_threads;
    run_state *state = context;
    pk_backend *backend = state->backend;
    uint8_t *scratch = backend->scratch ? backend->scratch + (size_t)thread * backend->scratch_bytes : NULL;
    for (size_t i = 0; i < backend->n_steps && !atomic_load_explicit(&state->stop, memory_order_relaxed);
         i++) {
        pk_step *step = &backend->steps[i];
        size_t mine = 0;
        for (;; mine++) {
            const size_t unit = atomic_fetch_add_explicit(&step->next, 1, memory_order_relaxed);
            if (unit >= step->units) break;
            step->unit(backend, step, unit, scratch);
        }
        if (mine) atomic_fetch_add_explicit(&step->done, mine, memory_order_release);
        wait_for(step);
        if (thread == 0 && backend->abort && backend->abort(backend->abort_context))
            atomic_store(&state->stop, true);
    }
}

static bool grow(uint8_t **memory, size_t *bytes, size_t need) {
    if (need <= *bytes) return true;
    free(*memory);
    *bytes = 0;
    need = pk_divide_up(need, CACHE_LINE) * CACHE_LINE;
    *memory = aligned_alloc(CACHE_LINE, need);
    if (*memory) *bytes = need;
    return *memory != NULL;
}

int pk_run(pk_backend *backend) {
    for (pk_slot s = 0; s < PK_SLOTS; s++) {
        if (!grow(&backend->slots[s], &backend->slot_bytes[s], backend->slot_needs[s]))
            return GGML_STATUS_ALLOC_FAILED;
    }
    backend->scratch_bytes = pk_divide_up(backend->scratch_bytes, CACHE_LINE) * CACHE_LINE;
    if (!grow(&backend->scratch, &backend->scratch_room,
              backend->scratch_bytes * (size_t)backend->n_threads)) {
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
}
