// SPDX-License-Identifier: Apache-2.0
// crash_point.c - preloaded into a program: kills it (SIGKILL) right before its CRASH_AT-th call that changes files.
//
// Counted are rename, unlink, rmdir, mkdir, fsync, ftruncate, and write to what is no standard stream. Between two of
// these nothing on the disk changes but for new, empty files. CRASH_COUNT names a file that gets their number, and
// those of the renames among them, at the end of a program that lives to it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static long renames[64], n_renames;
static long calls;  // threads that write at once may count one call less; a crash point is then one call off

// What the program would have called. POSIX lets the pointer be read as a function's; ISO C has no word for it.
static void *next(const char *function) {
    void *found = dlsym(RTLD_NEXT, function);
    if (!found) abort();
    return found;
}

static void count(const char *function) {
    const char *at = getenv("CRASH_AT");
    if (!at && !getenv("CRASH_COUNT")) return;  // what a forked program was before
    long now = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (at && now == atol(at)) kill(getpid(), SIGKILL);
    if (!strncmp(function, "rename", 6) && n_renames < 64) renames[n_renames++] = now;
}

__attribute__((destructor)) static void tell(void) {
    const char *path = getenv("CRASH_COUNT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "%ld", calls);
    for (long i = 0; i < n_renames; i++) fprintf(file, " %ld", renames[i]);
    fclose(file);
}

#define COUNTED(result, name, declared, ...)       \
    result name declared {                         \
        static result(*real) declared;             \
        if (!real) *(void **)&real = next(#name);  \
        count(#name);                                \
        return real(__VA_ARGS__);                  \
    }

COUNTED(int, rename, (const char *from, const char *to), from, to)
COUNTED(int, renameat, (int old, const char *from, int new, const char *to), old, from, new, to)
COUNTED(int, unlink, (const char *path), path)
COUNTED(int, unlinkat, (int folder, const char *path, int flags), folder, path, flags)
COUNTED(int, rmdir, (const char *path), path)
COUNTED(int, mkdir, (const char *path, mode_t mode), path, mode)
COUNTED(int, mkdirat, (int folder, const char *path, mode_t mode), folder, path, mode)
COUNTED(int, fsync, (int handle), handle)
COUNTED(int, ftruncate, (int handle, off_t size), handle, size)
COUNTED(int, ftruncate64, (int handle, off64_t size), handle, size)

ssize_t write(int handle, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) *(void **)&real = next("write");
    if (handle > 2) count("write");
    return real(handle, data, size);
}
