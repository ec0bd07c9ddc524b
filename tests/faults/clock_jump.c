// SPDX-License-Identifier: Apache-2.0
// clock_jump.c - preloaded into a program: its wall clock is set an hour forward, then back, every 300 ms.
//
// As when a machine finds its time server, wakes up, or is set by hand. The monotonic clock, which nobody can set, is
// left alone. CLOCK_JUMPS names a file that gets the number of times the wall clock was looked at.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long looks;

// What the program would have called. POSIX lets the pointer be read as a function's; ISO C has no word for it.
static void *next(const char *function) {
    void *found = dlsym(RTLD_NEXT, function);
    if (!found) abort();
    return found;
}

static int real_clock(clockid_t clock, struct timespec *time) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) *(void **)&real = next("clock_gettime");
    return real(clock, time);
}

static time_t jump(void) {
    struct timespec now;
    real_clock(CLOCK_MONOTONIC, &now);
    __atomic_add_fetch(&looks, 1, __ATOMIC_SEQ_CST);
    switch ((now.tv_sec * 1000 + now.tv_nsec / 1000000) / 300 % 3) {
        case 0: return 0;
        case 1: return 3600;
        default: return -3600;
    }
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = real_clock(clock, time);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) time->tv_sec += jump();
    return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    (void)zone;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}

__attribute__((destructor)) static void tell(void) {
    const char *path = getenv("CLOCK_JUMPS");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "%ld", looks);
    fclose(file);
}
