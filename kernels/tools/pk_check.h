// SPDX-License-Identifier: Apache-2.0
// pk_check.h - what the check files share: one pair of functions for each kernel family, and their few tools.
#ifndef PK_CHECK_H
#define PK_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *must_alloc(size_t size);         // malloc, or a message and exit 1
float random_sample(uint64_t *state);  // [-1, 1), the same numbers on every machine; *state is not 0
double now_ns(void);                   // CPU time of this process, in steps of a microsecond or so

// check_: each variant that this CPU can run, against the scalar reference; says what it found.
// bench_: then the same calls, timed.
bool check_logmel(void);
void bench_logmel(void);
bool check_quantize(void);
void bench_quantize(void);
bool check_matmul(void);
void bench_matmul(void);
bool check_activations(void);
void bench_activations(void);
bool check_attention(void);
void bench_attention(void);
bool check_vector(void);
void bench_vector(void);
bool check_probe(void);
void bench_probe(void);
bool check_fp16(void);  // pk_fp16.h: no variants, nothing timed

#endif
