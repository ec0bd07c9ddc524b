// SPDX-License-Identifier: Apache-2.0
// fuzz.c - the entry point of a fuzzer, which hands the input to one family; and their tools.
#include "fuzz.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pk.h"
#include "pk_fp16.h"

static void (*const families[])(bytes *in) = {
    fuzz_names,       fuzz_logmel, fuzz_quantize, fuzz_probe,     fuzz_vector,
    fuzz_activations, fuzz_pack,   fuzz_matmul,   fuzz_attention,
};
enum { N_FAMILIES = sizeof families / sizeof families[0] };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    bytes in = {data, size};
    families[take(&in, 1) % N_FAMILIES](&in);
    return 0;
}

uint64_t take(bytes *in, size_t n) {
    uint64_t value = 0;
    for (size_t i = 0; i < n && in->left > 0; i++, in->left--) value |= (uint64_t)*in->at++ << 8 * i;
    return value;
}

size_t take_below(bytes *in, size_t n) { return (size_t)take(in, 2) % n; }

size_t take_hostile(bytes *in) {
    static const uint64_t bases[] = {
        0, 1, 32, 256, 1u << 16, UINT64_C(1) << 31, UINT64_C(1) << 32, UINT64_C(1) << 62, UINT64_C(1) << 63,
        0};
    const uint64_t base = bases[take(in, 1) % (sizeof bases / sizeof bases[0])];
    return (size_t)(base + (uint64_t)(int64_t)(int8_t)take(in, 1));  // a little more or less, wrapping around
}

const char *take_variant(bytes *in, const char *kernel) {
    size_t n = 0;
    while (pk_variant(kernel, n)) n++;
    const size_t chosen = (size_t)take(in, 1) % (n + 3);
    if (chosen < n) return pk_variant(kernel, chosen);
    return chosen == n ? "" : chosen == n + 1 ? "avx1024" : NULL;
}

bool is_variant(const char *kernel, const char *name) {
    const char *row;
    for (size_t i = 0; name && (row = pk_variant(kernel, i)) != NULL; i++) {
        if (!strcmp(row, name)) return true;
    }
    return !name;
}

void *exact(size_t n) {
    void *p = malloc(n);
    if (!p) {
        fprintf(stderr, "pk_fuzz: no memory for %zu bytes\n", n);
        abort();
    }
    return p;
}

// Four bytes before the first: no variant may want an alignment that the contract does not.
float *new_floats(bytes *in, size_t n) {
    float *x = (float *)exact((n + 1) * sizeof(float)) + 1;
    fill_floats(in, x, n);
    return x;
}

void free_floats(float *x) {
    if (x) free(x - 1);
}

// xorshift64*
static uint64_t random_bits(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

void fill_bytes(bytes *in, uint8_t *p, size_t n) {
    const uint64_t how = take(in, 1) % 4, given = take(in, 1);
    const bytes rest = *in;
    uint64_t state = given + 1;
    for (size_t i = 0; i < n; i++) {
        const uint8_t own = rest.left ? rest.at[i % rest.left] : 0,
                      any = (uint8_t)(random_bits(&state) >> 56);
        p[i] = how == 0 ? own : how == 1 ? any : how == 2 ? (uint8_t)given : (uint8_t)(any & own);
    }
    take(in, how == 0 ? 8 : 0);  // so that the next array differs
}

static float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

float take_float(bytes *in) {
    static const float usual[] = {0.0f, 1.0f, -0.75f, 1e-5f, 0.125f, 2.5f, 1e-30f, 1e30f};
    const uint64_t how = take(in, 1);
    return how < 192 ? usual[how % 8] : from_bits((uint32_t)take(in, 4));
}

// What numbers are mostly not.
static float odd_number(uint64_t bits) {
    static const uint32_t some[] = {0x7fc00000, 0xffc00001, 0x7f800001, 0x7f800000, 0xff800000,
                                    0x00000001, 0x80000001, 0x007fffff, 0x00800000, 0x7f7fffff,
                                    0xff7fffff, 0x80000000, 0x477fe000, 0x33800000};
    return from_bits(some[bits % (sizeof some / sizeof some[0])]);
}

void fill_floats(bytes *in, float *x, size_t n) {
    const uint64_t how = take(in, 1) % 8, given = take(in, 2);
    uint64_t state = given * 8 + how + 1;
    const bytes rest = *in;
    for (size_t i = 0; i < n; i++) {
        const uint64_t u = random_bits(&state);
        const float number = (float)(int32_t)(u >> 32) * 0x1p-31f;
        uint32_t own = 0;
        for (size_t b = 0; b < 4 && rest.left; b++)
            own |= (uint32_t)rest.at[(4 * i + b) % rest.left] << 8 * b;
        switch (how) {
            case 0: x[i] = from_bits(own); break;
            case 1: x[i] = from_bits((uint32_t)(u >> 32)); break;  // wide: every exponent
            case 2: x[i] = u % 64 ? number : odd_number(u >> 8); break;
            case 3: x[i] = i == given % n ? odd_number(u) : number; break;  // one among good ones
            case 4: x[i] = ldexpf(number, (int)(u % 64) - 32); break;
            case 5: x[i] = (float)(int)(number * 8.0f); break;  // ties and zeros
            case 6: x[i] = ldexpf(number, -100 - (int)(given % 48)); break;
            default: x[i] = number; break;
        }
    }
    take(in, how == 0 ? 8 : 0);
}

_Noreturn void wrong(const char *call, const char *variant, const char *what) {
    fprintf(stderr, "pk_fuzz: %s, variant %s: %s\n", call, variant ? variant : "(fastest)", what);
    abort();
}

void must(bool ok, const char *call, const char *variant, const char *what) {
    if (!ok) wrong(call, variant, what);
}

double half_value(const uint8_t *p) { return (double)pk_from_fp16((uint16_t)(p[0] | p[1] << 8)); }

bool same_floats(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (memcmp(&a[i], &b[i], sizeof a[i]) != 0 && !(isnan(a[i]) && isnan(b[i]))) return false;
    }
    return true;
}

bool is_near(double got, double want, double bound) { return fabs(got - want) <= bound; }
