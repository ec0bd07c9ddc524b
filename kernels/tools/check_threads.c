// SPDX-License-Identifier: Apache-2.0
// check_threads.c - a team of threads under stress: each run does its work once, and the caller sees it.
//
// Built with each implementation of adapters/ggml/threads.h, our own pool also with ThreadSanitizer, which
// does not know libgomp's locks. What threads share here is plain memory wherever the team promises order.
#include <stdatomic.h>
#include <stdbool.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#if defined(__linux__)
#include <dirent.h>
#endif

#include "adapters/ggml/threads.h"

#if defined(__SANITIZE_THREAD__)
enum { RUNS = 300, OF_SANITIZER = 1 };  // runs are slow, and the first thread of ours brings one of its own
#else
enum { RUNS = 1000, OF_SANITIZER = 0 };
#endif
enum { MOST = 8, MANY = 600, PHASES = 4, TEAMS = 100, UNITS = 37 };

typedef struct {
    int asked, n_threads[MANY];   // what each thread was told
    uint64_t calls[MANY], sum;    // plain: the caller reads them when the run is over
    int phase[MANY];              // plain: read by the others when all have met
    atomic_int bad, next, units;
    atomic_int arrived;
    bool no_phases;
} job;

// All threads of a run have come for the `time`th time.
static void meet(job *j, int time, int n_threads) {
    atomic_fetch_add_explicit(&j->arrived, 1, memory_order_acq_rel);
    while (atomic_load_explicit(&j->arrived, memory_order_acquire) < time * n_threads) sched_yield();
}

static void work(void *context, int thread, int n_threads) {
    job *j = context;
    if (thread < 0 || thread >= n_threads || n_threads > (j->asked < 1 ? 1 : j->asked)) {
        atomic_fetch_add(&j->bad, 1);
        return;
    }
    j->calls[thread]++;
    for (int p = 1; p <= PHASES && !j->no_phases; p++) {
        j->phase[thread] = p;
        meet(j, 2 * p - 1, n_threads);
        for (int t = 0; t < n_threads; t++) {
            if (j->phase[t] != p) atomic_fetch_add(&j->bad, 1);
        }
        meet(j, 2 * p, n_threads);
    }
    while (atomic_fetch_add(&j->next, 1) < UNITS) atomic_fetch_add(&j->units, 1);
    j->n_threads[thread] = n_threads;  // behind the last meeting: the end of the run alone orders it
}

// One run; the number of threads that took part, or 0 if anything is wrong.
static int run(pk_threads *team, job *j, int n) {
    j->asked = n;
    atomic_store(&j->next, 0);
    atomic_store(&j->arrived, 0);
    atomic_store(&j->units, 0);
    for (int t = 0; t < MANY; t++) {
        j->calls[t] = 0;
        j->n_threads[t] = 0;
    }
    pk_threads_run(team, n, work, j);
    const int took_part = j->n_threads[0];
    for (int t = 0; t < MANY; t++) {
        const int wanted = t < took_part ? took_part : 0;
        if (j->n_threads[t] != wanted || j->calls[t] != (t < took_part)) return 0;
    }
    j->sum += (uint64_t)took_part;
    return atomic_load(&j->bad) || atomic_load(&j->units) != UNITS ? 0 : took_part;
}

static job *new_job(void) {
    job *j = calloc(1, sizeof *j);
    if (!j) exit(1);
    return j;
}

// Thousands of runs of changing size on one team. A pool that promises n threads gives n.
static bool check_runs(uint64_t seed) {
    pk_threads *team = pk_threads_open();
    job *j = new_job();
    if (!team) return false;
    bool good = true;
    uint64_t wanted = 0;
    for (int i = 0; i < RUNS && good; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        const int kind = (int)(seed >> 40) % 64;
        const int n = kind < 60 ? 1 + kind % 3 : kind == 60 ? MOST : kind - 62;  // mostly 1 to 3; -1, 0, 1, 8
        wanted += n < 1 ? 1 : (uint64_t)n;
        good = run(team, j, n) == (n < 1 ? 1 : n);
    }
    good = good && j->sum == wanted;
    free(j);
    pk_threads_close(team);
    return good;
}

static void *other_caller(void *seed) { return check_runs(*(const uint64_t *)seed) ? seed : NULL; }

// Two callers, each with a team of its own, as two contexts have.
static bool check_two_callers(void) {
    uint64_t seeds[2] = {3, 4};
    pthread_t thread;
    if (pthread_create(&thread, NULL, other_caller, &seeds[0])) return false;
    const bool mine = check_runs(seeds[1]);
    void *theirs = NULL;
    pthread_join(thread, &theirs);
    return mine && theirs;
}

// Threads of this process; 0: this system does not say.
static int count_threads(void) {
    int n = 0;
#if defined(__linux__)
    DIR *tasks = opendir("/proc/self/task");
    for (const struct dirent *entry; tasks && (entry = readdir(tasks)) != NULL;) n += entry->d_name[0] != '.';
    if (tasks) closedir(tasks);
#endif
    return n;
}

// A joined thread is listed until the kernel has put it away: up to a second is waited for that.
static bool is_back_at(int threads) {
    for (int i = 0; i < 1000; i++) {
        if (count_threads() <= threads) return true;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return false;
}

// Teams closed at once, after a run, and after two: no more threads than `most` are left.
static bool check_no_thread_stays(int most) {
    job *j = new_job();
    bool good = true;
    for (int i = 0; i < TEAMS && good; i++) {
        pk_threads *team = pk_threads_open();
        good = team != NULL;
        for (int k = 0; good && k < i % 3; k++) good = run(team, j, 1 + (i + k) % 4) > 0;
        pk_threads_close(team);
        good = good && is_back_at(most);
    }
    free(j);
    pk_threads_close(NULL);
    return good;
}

#if defined(PK_OWN_THREADS)
// More than there can be: fewer take part, and say so.
static bool check_too_many(void) {
    pk_threads *team = pk_threads_open();
    job *j = new_job();
    if (!team) return false;
    j->no_phases = true;
    const int got = run(team, j, MANY);
    free(j);
    pk_threads_close(team);
    return got >= 1;
}
#endif

static bool report(const char *name, bool good) {
    printf("%-22s %s\n", name, good ? "ok" : "FAILED");
    return good;
}

int main(void) {
    if (pk_threads_default() < 1) return 1;
    const int at_start = count_threads();
#if defined(PK_OWN_THREADS)
    const int most = at_start + OF_SANITIZER;
    bool good = report("more than there can be", check_too_many());
#else
    // OpenMP keeps its threads for the next team, whoever opens it, and ends the program where it cannot have
    // as many as were asked for.
    const int most = at_start - 1 + MOST;
    bool good = true;
#endif
    good = report("runs", check_runs(1)) && good;
    good = report("no thread stays", check_no_thread_stays(most)) && good;
    good = report("two callers", check_two_callers()) && good;
    good = report("none stays of these", is_back_at(most)) && good;
    return good ? 0 : 1;
}
