// SPDX-License-Identifier: Apache-2.0
// pk_check.c - walks every kernel table: each variant this CPU can run, against the scalar reference,
// on random and on extreme input, with sentinels around the output.
//
//   pk_check           check; exit 0 when all agree, 1 otherwise
//   pk_check --bench   then time the same calls
//
// To add a family: write its check_ and bench_ functions, and one row in `families`.
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "logmel/logmel.h"
#include "pk_cpu.h"
#include "quantize/quantize.h"

static void *must_alloc(size_t size) {
    void *p = malloc(size);
    if (!p) {
        fprintf(stderr, "pk_check: no memory for %zu bytes\n", size);
        exit(1);
    }
    return p;
}

// xorshift64*: the same numbers on every machine. [-1, 1).
static float random_sample(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)(int32_t)((*state * UINT64_C(0x2545f4914f6cdd1d)) >> 32) * 0x1p-31f;
}

static double now_ns(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

// ---- log-mel ----

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

static bool check_logmel(void) {
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

static void bench_logmel(void) {
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

// ---- quantise ----

static const struct {
    const char *name;
    pk_quantize_type type;
} quantize_types[] = {{"Q4_K", PK_Q4_K}, {"Q5_K", PK_Q5_K}, {"Q6_K", PK_Q6_K}};
enum { N_QUANTIZE_TYPES = sizeof quantize_types / sizeof quantize_types[0] };

typedef enum {
    W_UNIFORM,
    W_BELL,
    W_ZERO,
    W_CONSTANT,
    W_OUTLIER,
    W_NEGATIVE,
    W_SUBNORMAL,
    W_MIXED,
    W_ZERO_LIMIT,
    W_FAR,
    W_TIES,
    N_WEIGHTS
} weights;
static const char *const weights_names[] = {"uniform",  "bell",      "zero",  "constant",   "outlier",
                                            "negative", "subnormal", "mixed", "zero limit", "far from zero",
                                            "ties"};

static void fill_weights(float *x, size_t n, weights how) {
    static const float limits[] = {PK_QUANTIZE_ZERO, 0.9999999f * PK_QUANTIZE_ZERO};
    uint64_t state = 88172645463325252u;
    float factor = 1.0f;
    for (size_t i = 0; i < n; i++) {
        const float u = random_sample(&state);
        if (i % 16 == 0) {  // for W_MIXED and W_FAR: 2^-140 to 2^14, another for each sub-block
            factor = 0x1p-140f;
            for (int twos = (int)((random_sample(&state) + 1.0f) * 77.0f); twos > 0; twos--) factor *= 2.0f;
        }
        switch (how) {
            case W_UNIFORM: x[i] = u; break;
            case W_BELL: x[i] = 0.02f * (u + random_sample(&state) + random_sample(&state)); break;
            case W_CONSTANT: x[i] = i / 32 % 3 ? 0.7f : -0.7f; break;
            case W_OUTLIER: x[i] = i % 256 == 77 ? PK_QUANTIZE_MAX : 0.02f * u; break;
            case W_NEGATIVE: x[i] = -1.0f + 0.5f * u; break;
            case W_SUBNORMAL: x[i] = u * FLT_MIN / 64; break;
            case W_MIXED: x[i] = u * factor; break;
            case W_ZERO_LIMIT: x[i] = u < 0.0f ? -limits[i / 16 % 2] : limits[i / 16 % 2]; break;
            case W_FAR: x[i] = -PK_QUANTIZE_MAX + (u + 1.0f) * (factor < 1.0f ? factor : 1.0f); break;
            case W_TIES: x[i] = (float)(int)(4.0f * u); break;
            case W_ZERO:
            case N_WEIGHTS: x[i] = 0.0f; break;
        }
    }
}

// Input and output have exactly the contract's size, so that a sanitizer sees any access beyond them; without
// one, the bytes around the output tell.
static bool check_quantize_case(const pk_quantize_variant *v, pk_quantize_type type, size_t n_blocks, weights how) {
    enum { GUARD = 64 };
    const size_t n_out = n_blocks * pk_quantize_bytes(type), n = n_blocks * PK_QUANTIZE_BLOCK;
    float *x = must_alloc(n * sizeof *x);
    uint8_t *want = must_alloc(n_out), *got = must_alloc(n_out), *guarded = must_alloc(n_out + 2 * GUARD);
    fill_weights(x, n, how);
    memset(guarded, 0xa5, n_out + 2 * GUARD);
    pk_quantize_c(want, x, n_blocks, type);
    v->fn(got, x, n_blocks, type);
    v->fn(guarded + GUARD, x, n_blocks, type);
    bool ok = !memcmp(want, got, n_out) && !memcmp(want, guarded + GUARD, n_out);  // the contract: the same bytes
    for (size_t i = 0; i < GUARD; i++) ok = ok && guarded[i] == 0xa5 && guarded[GUARD + n_out + i] == 0xa5;
    free(x);
    free(want);
    free(got);
    free(guarded);
    return ok;
}

static bool check_quantize(void) {
    bool all = true;
    const pk_quantize_variant *v;
    for (size_t row = 0; (v = pk_quantize_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) {
            printf("quantize %-8s not on this CPU\n", v->name);
            continue;
        }
        size_t n_cases = 0, n_bad = 0;
        for (size_t t = 0; t < N_QUANTIZE_TYPES; t++) {
            for (size_t n_blocks = 1; n_blocks <= 9; n_blocks++) {
                for (weights how = W_UNIFORM; how < N_WEIGHTS; how++, n_cases++) {
                    if (check_quantize_case(v, quantize_types[t].type, n_blocks, how)) continue;
                    printf("quantize %s differs from c: %s, %zu blocks, %s\n", v->name, quantize_types[t].name,
                           n_blocks, weights_names[how]);
                    n_bad++;
                }
            }
        }
        printf("quantize %-8s %zu of %zu cases equal c byte for byte\n", v->name, n_cases - n_bad, n_cases);
        all = all && n_bad == 0;
    }
    return all;
}

static void bench_quantize(void) {
    enum { BLOCKS = 1024, N = BLOCKS * PK_QUANTIZE_BLOCK, ROUNDS = 9 };  // the best of so many runs
    float *x = must_alloc(N * sizeof *x);
    uint8_t *out = must_alloc(BLOCKS * (size_t)PK_Q6_K_BYTES);
    fill_weights(x, N, W_BELL);
    for (size_t t = 0; t < N_QUANTIZE_TYPES; t++) {
        double reference = 0.0;
        const pk_quantize_variant *v;
        for (size_t row = 0; (v = pk_quantize_at(row)) != NULL; row++) {
            if (!pk_cpu_has(v->needs)) continue;
            double best = 0.0;
            for (int round = 0; round < ROUNDS; round++) {
                const double start = now_ns();
                v->fn(out, x, BLOCKS, quantize_types[t].type);
                const double took = (now_ns() - start) / N;
                if (round == 0 || took < best) best = took;
            }
            if (row == 0) reference = best;
            printf("quantize %s %-8s %6.2f ns/weight  %5.2f x c\n", quantize_types[t].name, v->name, best,
                   reference / best);
        }
    }
    free(x);
    free(out);
}

// ---- CPU features ----

static bool check_features(void) {
    const pk_cpu_feature *feature;
    unsigned bits = 0, all = 0;
    bool ok = pk_cpu_has(0);
    for (size_t i = 0; (feature = pk_cpu_at(i)) != NULL; i++) {
        ok = ok && pk_cpu_parse(feature->name, &bits) && bits == feature->bit && !(all & feature->bit);
        all |= feature->bit;
    }
    return ok && !(pk_cpu_features() & ~all);
}

static bool check_parse(void) {
    static const char *const wrong[] = {"avx3", "avx2,", ",avx2", "avx2 fma", "avx", "avx22", "none,avx2", ","};
    unsigned bits = 0;
    bool ok = pk_cpu_parse("avx2,fma", &bits) && bits == (PK_CPU_AVX2 | PK_CPU_FMA);
    ok = ok && pk_cpu_parse("none", &bits) && bits == 0;
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        bits = 1;
        ok = ok && !pk_cpu_parse(wrong[i], &bits) && bits == 0;
    }
    return ok;
}

static bool check_cpu(void) {
    const pk_cpu_feature *feature;
    printf("cpu   ");
    for (size_t i = 0; (feature = pk_cpu_at(i)) != NULL; i++) {
        if (pk_cpu_has(feature->bit)) printf(" %s", feature->name);
    }
    printf(pk_cpu_features() ? "\n" : " none\n");
    const bool features = check_features(), parse = check_parse(), mask = pk_cpu_mask_is_valid();
    if (!features) printf("cpu    the feature table is wrong\n");
    if (!parse) printf("cpu    the mask is parsed wrongly\n");
    if (!mask) printf("cpu    POCKETPHI_CPU_MASK names an unknown feature\n");
    return features && parse && mask;
}

static const struct {
    bool (*check)(void);
    void (*bench)(void);
} families[] = {
    {check_cpu, NULL},
    {check_logmel, bench_logmel},
    {check_quantize, bench_quantize},
};
enum { N_FAMILIES = sizeof families / sizeof families[0] };

int main(int argc, char **argv) {
    const bool bench = argc == 2 && !strcmp(argv[1], "--bench");
    if (argc > 1 && !bench) {
        fprintf(stderr, "usage: pk_check [--bench]\n");
        return 2;
    }
    bool ok = true;
    for (size_t i = 0; i < N_FAMILIES; i++) ok = families[i].check() && ok;
    for (size_t i = 0; bench && ok && i < N_FAMILIES; i++) {
        if (families[i].bench) families[i].bench();
    }
    return ok ? 0 : 1;
}
