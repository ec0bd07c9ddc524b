// SPDX-License-Identifier: Apache-2.0
// threads.h - a team of threads that runs one function at a time.
//
// Two implementations, one of which is built in: threads_openmp.c uses the OpenMP runtime, where the compiler has one.
// A ggml that was built on the same machine has the same: a second pool spinning beside the first would be ruinous on
// two cores. threads_pool.c keeps threads of its own, which spin for a moment between runs and then sleep.
#ifndef PK_GGML_THREADS_H
#define PK_GGML_THREADS_H

typedef struct pk_threads pk_threads;
typedef void (*pk_threads_fn)(void *context, int thread, int n_threads);

int pk_threads_default(void);              // how many this machine, or the environment, offers
pk_threads *pk_threads_open(void);         // NULL: no memory
void pk_threads_close(pk_threads *team);   // joins every thread

// Calls fn on n threads at once, thread 0 being the caller, and returns when all are done. n may differ from call to
// call. Where fewer threads can be had, fn is called with a smaller n_threads.
void pk_threads_run(pk_threads *team, int n, pk_threads_fn fn, void *context);

// Between two looks at a number that another thread is about to change.
static inline void pk_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
