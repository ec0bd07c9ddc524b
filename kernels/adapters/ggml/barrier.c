// SPDX-License-Identifier: Apache-2.0
// barrier.c - the barrier between two steps of a graph: a few hundred a token, so it spins before it yields.
#include "threads.h"

#if defined(_WIN32)
#include <windows.h>
#define yield() SwitchToThread()
#else
#include <sched.h>
#define yield() sched_yield()
#endif

#if defined(__x86_64__)
#define relax() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define relax() __asm__ volatile("yield")
#else
#define relax() ((void)0)
#endif

// About 100 us: longer than a step's imbalance. After it a thread gives way, in case the one waited for needs its core.
enum { SPINS = 4000 };

void pk_barrier_wait(pk_barrier *barrier, int n_threads) {
    if (n_threads == 1) return;
    const int round = atomic_load_explicit(&barrier->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) == n_threads - 1) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->round, round + 1, memory_order_release);
        return;
    }
    for (int i = 0; atomic_load_explicit(&barrier->round, memory_order_acquire) == round; i++) {
        if (i < SPINS) relax();
        else yield();
    }
}
