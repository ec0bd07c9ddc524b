// SPDX-License-Identifier: Apache-2.0
// fuzz.h - what the fuzz files share: an input's bytes as choices and numbers, memory of exact size.
//
// Each family is one function that takes a call, its shapes and its data from the input, makes the call for
// every variant of this CPU, and compares: status against what the arguments deserve, result against variant
// "c" or the definition within the family's bound. A sanitizer watches the memory; all buffers have exactly
// the contract's size.
#ifndef PK_FUZZ_H
#define PK_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    const uint8_t *at;
    size_t left;
} bytes;

uint64_t take(bytes *in, size_t n);      // the next n <= 8 bytes, little-endian; what is missing is 0
size_t take_below(bytes *in, size_t n);  // 0 ... n - 1, from two bytes
size_t take_hostile(bytes *in);  // a size that breaks what is careless: 0, 1, around 2^31, 2^63, SIZE_MAX
const char *take_variant(bytes *in, const char *kernel);  // one that is there (mostly), NULL or a wrong name
bool is_variant(const char *kernel, const char *name);    // whether a call may take it

void *exact(size_t n);                   // malloc(n), or the end
float *new_floats(bytes *in, size_t n);  // one heap block that ends where they end; free with free_floats
void free_floats(float *x);
void fill_bytes(bytes *in, uint8_t *p,
                size_t n);  // bytes of the input over and over, random ones, or one value
void fill_floats(bytes *in, float *x,
                 size_t n);  // as those; or numbers, with or without NaN, infinity, subnormals
float take_float(bytes *in);

// Ends the process with a line on stderr; the input that led here is the driver's to save.
_Noreturn void wrong(const char *call, const char *variant, const char *what);
void must(bool ok, const char *call, const char *variant, const char *what);

double half_value(const uint8_t *p);                         // of a little-endian float16
bool same_floats(const float *a, const float *b, size_t n);  // bit for bit, but any NaN stands for another
bool is_near(double got, double want, double bound);         // false for NaN

void fuzz_names(bytes *in);
void fuzz_logmel(bytes *in);
void fuzz_quantize(bytes *in);
void fuzz_probe(bytes *in);
void fuzz_vector(bytes *in);
void fuzz_activations(bytes *in);
void fuzz_pack(bytes *in);
void fuzz_matmul(bytes *in);
void fuzz_attention(bytes *in);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);  // libFuzzer's name

#endif
