// SPDX-License-Identifier: Apache-2.0
// standalone.c - a driver for the fuzz target where the compiler has no libFuzzer: some of its arguments.
//
//   pk_fuzz [-runs=N] [-seed=S] [-max_len=L] [-artifact_prefix=PREFIX] [FILE or FOLDER ...]
//
// Runs every file once, then N inputs made from them: the same for the same seed and files. Without coverage
// it finds less than libFuzzer, but under the same sanitizers and against the same definitions.
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

enum { MOST_FILES = 4096, MOST_BYTES = 1 << 20 };

typedef struct {
    uint8_t *data;
    size_t size;
} input;

static struct {
    input files[MOST_FILES];
    size_t n_files;
    input now;  // what runs; a handler saves it
    const char *prefix;
} state = {.prefix = "./"};

void __sanitizer_set_death_callback(void (*callback)(void));

static void save_input(void) {
    char path[4096];
    uint32_t hash = 2166136261u;  // FNV-1a: a name of its own for each input
    for (size_t i = 0; i < state.now.size; i++) hash = (hash ^ state.now.data[i]) * 16777619u;
    snprintf(path, sizeof path, "%scrash-%08x", state.prefix, (unsigned)hash);
    FILE *file = fopen(path, "wb");
    if (!file) return;
    fwrite(state.now.data, 1, state.now.size, file);
    fclose(file);
    fprintf(stderr, "pk_fuzz: input written to %s\n", path);
}

static void on_abort(int number) {
    save_input();
    signal(number, SIG_DFL);
    raise(number);
}

// From a copy of exactly its size, so that a read beyond it is seen.
static void run(const uint8_t *data, size_t size) {
    uint8_t *copy = exact(size);
    memcpy(copy, data, size);
    state.now = (input){copy, size};
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static void read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file || state.n_files == MOST_FILES) {
        fprintf(stderr, "pk_fuzz: %s cannot be read\n", path);
        exit(2);
    }
    uint8_t *data = exact(MOST_BYTES);
    state.files[state.n_files++] = (input){data, fread(data, 1, MOST_BYTES, file)};
    fclose(file);
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// The files of a folder by name, since a system lists them in any order.
static void read_path(const char *path) {
    DIR *folder = opendir(path);
    if (!folder) {
        read_file(path);
        return;
    }
    char *names[MOST_FILES];
    size_t n = 0;
    for (struct dirent *entry; n < MOST_FILES && (entry = readdir(folder)) != NULL;) {
        if (entry->d_name[0] == '.') continue;
        names[n] = exact(strlen(path) + strlen(entry->d_name) + 2);
        sprintf(names[n++], "%s/%s", path, entry->d_name);
    }
    closedir(folder);
    qsort(names, n, sizeof names[0], by_name);
    for (size_t i = 0; i < n; i++) {
        read_file(names[i]);
        free(names[i]);
    }
}

static uint64_t random_bits(uint64_t *seed) {  // xorshift64*
    *seed ^= *seed >> 12;
    *seed ^= *seed << 25;
    *seed ^= *seed >> 27;
    return *seed * UINT64_C(0x2545f4914f6cdd1d) >> 16;
}

// A file with some bytes changed, or bytes from nowhere.
static size_t make_input(uint8_t *to, size_t most, uint64_t *seed) {
    if (state.n_files == 0 || random_bits(seed) % 4 == 0) {
        const size_t size = random_bits(seed) % (most < 256 ? most : 256);
        for (size_t i = 0; i < size; i++) to[i] = (uint8_t)random_bits(seed);
        return size;
    }
    const input *from = &state.files[random_bits(seed) % state.n_files];
    const size_t size = from->size < most ? from->size : most;
    memcpy(to, from->data, size);
    for (size_t n = 1 + random_bits(seed) % 8; size > 0 && n > 0; n--) {
        const uint64_t u = random_bits(seed);
        uint8_t *byte = to + u / 4 % size;
        const uint8_t any = (uint8_t)(u >> 40);
        if (u % 4 == 0) *byte = (uint8_t)(*byte ^ 1u << any % 8);
        else if (u % 4 == 1) *byte = (uint8_t)(*byte + any % 3 - 1);
        else *byte = any;
    }
    return size;
}

int main(int argc, char **argv) {
    size_t runs = 10000, most = 4096;
    uint64_t seed = 1;
    __sanitizer_set_death_callback(save_input);
    signal(SIGABRT, on_abort);
    for (int i = 1; i < argc; i++) {
        if (!strncmp(argv[i], "-runs=", 6)) runs = strtoull(argv[i] + 6, NULL, 10);
        else if (!strncmp(argv[i], "-seed=", 6)) seed = strtoull(argv[i] + 6, NULL, 10) | 1;
        else if (!strncmp(argv[i], "-max_len=", 9)) most = strtoull(argv[i] + 9, NULL, 10) | 1;
        else if (!strncmp(argv[i], "-artifact_prefix=", 17)) state.prefix = argv[i] + 17;
        else if (argv[i][0] != '-') read_path(argv[i]);
    }
    for (size_t i = 0; i < state.n_files; i++) run(state.files[i].data, state.files[i].size);
    uint8_t *made = exact(most);
    for (size_t i = 0; i < runs; i++) {
        const size_t size = make_input(made, most, &seed);
        run(made, size);
    }
    free(made);
    printf("pk_fuzz: %zu files and %zu inputs made from them, no findings\n", state.n_files, runs);
    for (size_t i = 0; i < state.n_files; i++) free(state.files[i].data);
    return 0;
}
