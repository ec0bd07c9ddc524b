// SPDX-License-Identifier: Apache-2.0
// threads_openmp.c - the team as OpenMP's own: the pool that ggml's CPU backend and we share.
#include <omp.h>
#include <stdlib.h>

#include "threads.h"

struct pk_threads {
    int unused;  // the runtime keeps the threads
};

int pk_threads_default(void) { return omp_get_max_threads(); }

pk_threads *pk_threads_open(void) { return calloc(1, sizeof(pk_threads)); }
void pk_threads_close(pk_threads *team) { free(team); }

void pk_threads_run(pk_threads *team, int n, pk_threads_fn fn, void *context) {
    (void)team;
    if (n <= 1) {
        fn(context, 0, 1);
        return;
    }
#pragma omp parallel num_threads(n)
    fn(context, omp_get_thread_num(), omp_get_num_threads());
}
