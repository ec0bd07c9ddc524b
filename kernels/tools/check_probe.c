// SPDX-License-Identifier: Apache-2.0
// check_probe.c - every probe against the sums its contract promises, and what one core reaches.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "pk_check.h"
#include "pk_cpu.h"
#include "probe/probe.h"

enum { MOST_CHUNKS = 5 };

static bool check_sums(const pk_probe_variant *v, size_t rounds) {
    uint32_t sum = 0;
    float value = 0.0f;
    const uint64_t macs = v->int8(rounds, &sum) / 2, lanes = v->fp32(rounds, &value) / (2 * rounds);
    return macs >= rounds && lanes >= 1 && sum == (uint32_t)(macs * PK_PROBE_WEIGHT * PK_PROBE_INPUT) &&
           value == (float)(lanes * rounds);  // below 2^24: exact
}

// The memory has exactly the bytes that may be read, from an odd address on: a sanitizer sees any other.
static bool check_read(const pk_probe_variant *v, size_t n_bytes) {
    unsigned char *memory = must_alloc(n_bytes + 1), *bytes = memory + 1;
    uint64_t state = 88172645463325252u, want = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        bytes[i] = (unsigned char)(int)(100.0f * random_sample(&state) + 100.0f);
        want += (uint64_t)bytes[i] << 8 * (i % 8);
    }
    const bool ok = v->read(bytes, n_bytes) == want;
    free(memory);
    return ok;
}

bool check_probe(void) {
    static const size_t rounds[] = {1, 2, 3, 17, 1000};
    bool all = true;
    const pk_probe_variant *v;
    for (size_t row = 0; (v = pk_probe_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) {
            printf("probe %-12s not on this CPU\n", v->name);
            continue;
        }
        size_t n_cases = 0, n_good = 0;
        for (size_t i = 0; i < sizeof rounds / sizeof rounds[0]; i++, n_cases++) {
            n_good += check_sums(v, rounds[i]);
        }
        for (size_t n = 1; n <= MOST_CHUNKS; n++, n_cases++) n_good += check_read(v, n * PK_PROBE_CHUNK);
        printf("probe %-12s %zu of %zu cases add up\n", v->name, n_good, n_cases);
        all = all && n_good == n_cases;
    }
    return all;
}

void bench_probe(void) {
    enum { ROUNDS = 2000000 };
    const pk_probe_variant *v;
    for (size_t row = 0; (v = pk_probe_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) continue;
        uint32_t sum;
        float value;
        double began = now_ns();
        const double int8 = (double)v->int8(ROUNDS, &sum) / (now_ns() - began);
        began = now_ns();
        const double fp32 = (double)v->fp32(ROUNDS, &value) / (now_ns() - began);
        printf("probe %-12s %8.1f GOPS int8 %8.1f GFLOPS fp32\n", v->name, int8, fp32);
    }
}
