// SPDX-License-Identifier: Apache-2.0
// check_logmel.c - every log-mel variant against the scalar one, bit for bit, and what a frame costs.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "logmel/logmel.h"
#include "pk_check.h"
#include "pk_cpu.h"

typedef enum { RANDOM, SILENCE, DC, SQUARE, IMPULSE, TINY, HUGE_SQUARE, N_FILLS } fill;
static const char *const fill_names[] = {"random", "silence", "dc", "square", "impulse", "tiny", "huge"};

static void fill_wave(float *wave, size_t n, fill how) {
    uint64_t state = 88172645463325252u;
    for (size_t i = 0; i < n; i++) {
        const float sign = i / 16 % 2 ? -1.0f : 1.0f;
        switch (how) {
            case RANDOM: wave[i] = random_sample(&state); break;
            case DC: wave[i] = 1.0f; break;
            case SQUARE: wave[i] = sign; break;
            case IMPULSE: wave[i] = i == n / 2 ? 1.0f : 0.0f; break;
            case TINY: wave[i] = sign * FLT_MIN / 1024; break;  // subnormal
            case HUGE_SQUARE: wave[i] = sign * PK_LOGMEL_MAX_SAMPLE; break;
            case SILENCE:
            case N_FILLS: wave[i] = 0.0f; break;
        }
    }
}

static bool silent(const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (y[i] != 0.0f) return false;
    }
    return true;
}

// The wave has exactly the samples the contract names, so that a sanitizer sees any read beyond them.
static bool check_logmel_case(const pk_logmel_variant *v, const pk_logmel_tables *t, size_t n_frames, fill how) {
    enum { GUARD = PK_LOGMEL_BANDS };
    const size_t n_wave = (n_frames - 1) * t->hop_samples + t->window_samples;
    const size_t n_out = n_frames * PK_LOGMEL_BANDS, n_all = n_out + 2 * GUARD;
    float *wave = must_alloc(n_wave * sizeof *wave);
    float *want = must_alloc(n_all * sizeof *want), *got = must_alloc(n_all * sizeof *got);
    fill_wave(wave, n_wave, how);
    for (size_t i = 0; i < n_all; i++) want[i] = got[i] = -1.0f;  // a feature is never negative
    pk_logmel_c(want + GUARD, wave, n_frames, t);
    v->fn(got + GUARD, wave, n_frames, t);
    bool ok = !memcmp(want, got, n_all * sizeof *got);  // the contract: the same bits
    if (how == SILENCE || how == TINY) ok = ok && silent(got + GUARD, n_out);
    for (size_t i = 0; i < GUARD; i++) ok = ok && got[i] == -1.0f && got[GUARD + n_out + i] == -1.0f;
    free(wave);
    free(want);
    free(got);
    return ok;
}

bool check_logmel(void) {
    static const unsigned rates[] = {16000, 8000};
    bool all = true;
    const pk_logmel_variant *v;
    for (size_t row = 0; (v = pk_logmel_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) {
            printf("logmel %-8s not on this CPU\n", v->name);
            continue;
        }
        size_t n_cases = 0, n_bad = 0;
        for (size_t r = 0; r < 2; r++) {
            pk_logmel_tables t;
            if (!pk_logmel_setup(&t, rates[r])) return false;
            for (size_t n_frames = 1; n_frames <= 18; n_frames++) {
                for (fill how = RANDOM; how < N_FILLS; how++, n_cases++) {
                    if (check_logmel_case(v, &t, n_frames, how)) continue;
                    printf("logmel %s differs from c: %u Hz, %zu frames, %s\n", v->name, rates[r], n_frames,
                           fill_names[how]);
                    n_bad++;
                }
            }
        }
        printf("logmel %-8s %zu of %zu cases equal c bit for bit\n", v->name, n_cases - n_bad, n_cases);
        all = all && n_bad == 0;
    }
    return all;
}

void bench_logmel(void) {
    enum { FRAMES = 2998, ROUNDS = 15 };  // 30 s of speech, the best of so many runs
    static pk_logmel_tables t;
    if (!pk_logmel_setup(&t, 16000)) return;
    const size_t n_wave = (FRAMES - 1) * t.hop_samples + t.window_samples;
    float *wave = must_alloc(n_wave * sizeof *wave), *out = must_alloc(FRAMES * PK_LOGMEL_BANDS * sizeof *out);
    fill_wave(wave, n_wave, RANDOM);
    double reference = 0.0;
    const pk_logmel_variant *v;
    for (size_t row = 0; (v = pk_logmel_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) continue;
        double best = 0.0;
        for (int round = 0; round < ROUNDS; round++) {
            const double start = now_ns();
            v->fn(out, wave, FRAMES, &t);
            const double took = (now_ns() - start) / FRAMES;
            if (round == 0 || took < best) best = took;
        }
        if (row == 0) reference = best;
        printf("logmel %-8s %8.0f ns/frame  %5.2f x c\n", v->name, best, reference / best);
    }
    free(wave);
    free(out);
}
