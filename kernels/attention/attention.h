// SPDX-License-Identifier: Apache-2.0
// attention.h - the contract of grouped-query attention over a key-value cache, in one pass (FlashAttention-2).
//
//   s[i][j]  = scale * dot(q[i], k[j]) + mask[token of i][j]
//   out[i]   = sum over j of  softmax(s[i])[j] * v[j]
//
// for one key-value head and the `group` query heads that share it: i runs over `tokens` tokens times `group` heads.
// Sums are float32; the largest s so far is kept and earlier sums are scaled down when it grows. Keys whose mask is
// -infinity for all tokens of a call cost nothing (causal attention). A query that sees no key gives zeros.
//
// A call may cover part of the keys only: then `state` says what the parts need to be put together
// (pk_attention_merge), so that one token's long context can be shared out among threads.
//
// Keys and values are rows of 128 or fewer numbers, a multiple of 32: f16, or ggml's q8_0 (f16 d and 32 s8 a block).
// The caller guarantees: those shapes, no overlap, scratch of pk_attention_scratch_bytes on 64 bytes. A variant
// allocates nothing, starts no thread, keeps no state, writes what `out`, `state` and `scratch` say and nothing else.
#ifndef PK_ATTENTION_H
#define PK_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#define PK_ATTENTION_MAX_HEAD 128
#define PK_ATTENTION_QUERIES 96  // rows of queries (tokens times group) at most in a call; a multiple of every group up to 4, 6 and 8
#define PK_ATTENTION_KEYS 64     // keys a variant works on at a time
#define PK_ATTENTION_SCRATCH ((size_t)256 << 10)  // bytes: what a call works on stays in a second-level cache

typedef enum { PK_KV_F16, PK_KV_Q8_0, PK_KV_TYPES } pk_kv;

// A byte distance that is the host's: rows of a tensor need not be contiguous.
typedef struct {
    const float *q;         // float32, [tokens][group] rows of `head`
    size_t q_token, q_head; // bytes from one token, one head, to the next
    const uint8_t *k, *v;   // the first key and value of this head
    size_t k_row, v_row;    // bytes from one key to the next
    pk_kv k_type, v_type;
    const uint8_t *mask;    // f16 [tokens][keys], NULL for none
    size_t mask_token;      // bytes from one token to the next
    float *out;             // float32, [tokens][group] rows of `head`
    size_t out_token, out_head;  // bytes
    float *state;           // NULL: out is final. Else float32 [tokens * group][2]: the largest s and the sum of
                            // exp(s - largest); out is then the sum of exp(s - largest) * v, not divided
    size_t tokens, group, keys, head;
    float scale;
    uint8_t *scratch;
} pk_attention_args;

typedef void (*pk_attention_fn)(const pk_attention_args *args);

typedef struct {
    const char *name;
    unsigned needs;      // PK_CPU_* bits
    pk_attention_fn many, one;  // tokens * group <= PK_ATTENTION_QUERIES; tokens == 1 (and the same group)
} pk_attention_variant;

size_t pk_attention_scratch_bytes(void);  // enough for every variant

// Puts `parts` partial results of the same queries together: part p's out [queries][head] (dense) at out_parts +
// p * queries * head, its state [queries][2] likewise; gives out [queries] rows of `head`, out_row bytes apart.
void pk_attention_merge(float *restrict out, size_t out_row, const float *out_parts, const float *state_parts,
                        size_t parts, size_t queries, size_t head);

const pk_attention_variant *pk_attention_at(size_t i);  // slow to fast, NULL past the end: tests walk the table
const pk_attention_variant *pk_attention_best(void);

void pk_attention_many_c(const pk_attention_args *args);  // scalar: the definition of correct
void pk_attention_one_c(const pk_attention_args *args);
void pk_attention_many_avx2(const pk_attention_args *args);
void pk_attention_one_avx2(const pk_attention_args *args);
void pk_attention_many_avx512f(const pk_attention_args *args);
void pk_attention_one_avx512f(const pk_attention_args *args);
void pk_attention_many_neon(const pk_attention_args *args);
void pk_attention_one_neon(const pk_attention_args *args);

#endif
