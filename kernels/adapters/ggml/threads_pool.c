// SPDX-License-Identifier: Apache-2.0
// threads_pool.c - the team as threads of our own, for hosts without OpenMP.
//
// A thread that waits for the next run spins for a moment (a graph is one run, and the next token's follows
// at once) and then sleeps on a condition: an idle program costs nothing.
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "threads.h"

enum { SPINS = 20000, MAX_THREADS = 512 };

typedef struct {
    pthread_t thread;
    pk_threads *team;
    int index;
    unsigned seen;  // the last run this thread took part in or skipped
} member;

struct pk_threads {
    pthread_mutex_t mutex;
    pthread_cond_t start, done;
    member members[MAX_THREADS];
    int n_members;    // threads besides the caller
    atomic_uint run;  // counts runs; moves under the mutex
    atomic_int busy;  // members still at work in this run
    bool leaving;
    int n;  // of this run
    pk_threads_fn fn;
    void *context;
};

static void *work(void *argument) {
    member *me = argument;
    pk_threads *team = me->team;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&team->run, memory_order_acquire) == me->seen; i++)
            pk_relax();
        pthread_mutex_lock(&team->mutex);
        while (atomic_load_explicit(&team->run, memory_order_relaxed) == me->seen && !team->leaving) {
            pthread_cond_wait(&team->start, &team->mutex);
        }
        const bool leaving = team->leaving, mine = me->index < team->n;
        const pk_threads_fn fn = team->fn;
        void *context = team->context;
        const int n = team->n;
        me->seen = atomic_load_explicit(&team->run, memory_order_relaxed);
        pthread_mutex_unlock(&team->mutex);
        if (leaving) return NULL;
        if (!mine) continue;
        fn(context, me->index, n);
        if (atomic_fetch_sub_explicit(&team->busy, 1, memory_order_acq_rel) == 1) {
            pthread_mutex_lock(&team->mutex);  // the caller is between its test and its wait, or waits
            pthread_cond_signal(&team->done);
            pthread_mutex_unlock(&team->mutex);
        }
    }
}

int pk_threads_default(void) {
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : (int)n;
}

pk_threads *pk_threads_open(void) {
    pk_threads *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->start, NULL);
    pthread_cond_init(&team->done, NULL);
    return team;
}

// Members needed for n threads, as many as can be had. A new member has seen every run so far.
static int grow(pk_threads *team, int n) {
    if (n > MAX_THREADS) n = MAX_THREADS;
    while (team->n_members < n - 1) {
        member *m = &team->members[team->n_members];
        *m = (member){.team = team, .index = team->n_members + 1, .seen = atomic_load(&team->run)};
        if (pthread_create(&m->thread, NULL, work, m)) break;
        team->n_members++;
    }
    return team->n_members + 1 < n ? team->n_members + 1 : n;
}

void pk_threads_run(pk_threads *team, int n, pk_threads_fn fn, void *context) {
    if (n > 1) n = grow(team, n);
    if (n <= 1) {
        fn(context, 0, 1);
        return;
    }
    pthread_mutex_lock(&team->mutex);
    team->n = n;
    team->fn = fn;
    team->context = context;
    atomic_store_explicit(&team->busy, n - 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&team->run, 1, memory_order_release);
    pthread_cond_broadcast(&team->start);
    pthread_mutex_unlock(&team->mutex);
    fn(context, 0, n);
    for (int i = 0; i < SPINS && atomic_load_explicit(&team->busy, memory_order_acquire); i++) pk_relax();
    pthread_mutex_lock(&team->mutex);
    while (atomic_load_explicit(&team->busy, memory_order_acquire))
        pthread_cond_wait(&team->done, &team->mutex);
    pthread_mutex_unlock(&team->mutex);
}

void pk_threads_close(pk_threads *team) {
    if (!team) return;
    pthread_mutex_lock(&team->mutex);
    team->leaving = true;
    pthread_cond_broadcast(&team->start);
    pthread_mutex_unlock(&team->mutex);
    for (int i = 0; i < team->n_members; i++) pthread_join(team->members[i].thread, NULL);
    pthread_mutex_destroy(&team->mutex);
    pthread_cond_destroy(&team->start);
    pthread_cond_destroy(&team->done);
    free(team);
}
