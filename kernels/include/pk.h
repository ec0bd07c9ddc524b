// SPDX-License-Identifier: Apache-2.0
// pk.h - the C API of libpk: what adapters/capi.c exports, and all that it exports.
//
// Every call checks its arguments and returns a status; nothing aborts. All calls are safe from several
// threads at once. Strings are static ASCII.
#ifndef PK_H
#define PK_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(PK_BUILD)
#define PK_EXPORT __declspec(dllexport)
#elif defined(_WIN32)
#define PK_EXPORT __declspec(dllimport)
#else
#define PK_EXPORT __attribute__((visibility("default")))
#endif

#define PK_ABI 1  // goes up when a signature or a meaning below changes

#define PK_OK 0
#define PK_ERR_NULL 1     // a pointer is NULL
#define PK_ERR_RATE 2     // a sample rate other than 8000 or 16000
#define PK_ERR_SIZE 3     // too short for one frame, too long, not whole blocks, or not the output's size
#define PK_ERR_OVERLAP 4  // output and input share memory
#define PK_ERR_VALUE 5    // not finite, a sample beyond half of float32's range, or a weight beyond 65504
#define PK_ERR_VARIANT 6  // no such variant, or this CPU cannot run it
#define PK_ERR_MASK 7     // POCKETPHI_CPU_MASK names an unknown feature
#define PK_ERR_TYPE 8     // a type that the call does not have: quantize has Q4_K, Q5_K and Q6_K
#define PK_ERR_MEMORY 9   // no memory for the work

PK_EXPORT int pk_abi(void);                    // PK_ABI of the library, to compare with the caller's
PK_EXPORT const char *pk_version(void);        // "0.1.0"
PK_EXPORT const char *pk_status(int status);   // what a status means, one line; never NULL

PK_EXPORT int pk_check_mask(void);             // PK_OK or PK_ERR_MASK
PK_EXPORT const char *pk_feature(size_t i);    // i-th CPU feature in use here, NULL past the end
PK_EXPORT const char *pk_known_feature(size_t i);  // i-th name that POCKETPHI_CPU_MASK may hold

// The i-th variant of kernel `kernel` ("logmel", "quantize", "matmul", "activations", "attention", "vector",
// "probe") that this CPU can run, slow to fast. NULL past the end, and for a kernel that does not exist.
PK_EXPORT const char *pk_variant(const char *kernel, size_t i);

// Log-mel features: see logmel/logmel.h.
// wave float32 [n_samples] at sample_rate Hz; out float32 [n_out] = [frames, 80].
// variant: a name from pk_variant("logmel", i), or NULL for the fastest.
PK_EXPORT int pk_logmel(float *out, size_t n_out, const float *wave, size_t n_samples, unsigned sample_rate,
                        const char *variant);

// Weights in ggml's blocks, byte for byte as ggml quantizes them without importances: see quantize/quantize.h.
// x float32 [n], n a multiple of 256; type: 12 is Q4_K, 13 Q5_K, 14 Q6_K; out [n_out] bytes = n / 256 blocks.
// variant: a name from pk_variant("quantize", i), or NULL for the fastest.
PK_EXPORT int pk_quantize(void *out, size_t n_out, const float *x, size_t n, int type, const char *variant);

// What one thread of this machine can do at most: see probe/probe.h. One call on each thread, timed by the caller.
// rounds 1 ... 2^30; n_bytes a multiple of 512; variant: a name from pk_variant("probe", i), or NULL for the fastest.
PK_EXPORT int pk_probe_int8(uint64_t *operations, uint32_t *sum, size_t rounds, const char *variant);
PK_EXPORT int pk_probe_fp32(uint64_t *operations, float *value, size_t rounds, const char *variant);
PK_EXPORT int pk_probe_read(uint64_t *sum, const void *bytes, size_t n_bytes, const char *variant);

// The operations on one row of float32, and the tiles of activations: see vector/vector.h and matmul/activations.h.
// x, out float32 [n], cos and sin [n_rot / 2]; weight may be NULL; to_q8_0: n_out = n / 32 * 34 bytes. Activations:
// x float32 [tokens, columns], blocks first to last - 1 of 32 columns; shared: blocks of one scale, 1 or 8, of which
// the blocks, first and last are multiples (arrange: 1); arrange 0: quantize, 1: arrange; n_tile bytes for all blocks.
// variant: a name from pk_variant("vector", i) or ("activations", i), or NULL for the fastest.
PK_EXPORT int pk_vector_rms_norm(float *out, const float *x, const float *weight, size_t n, float eps,
                                 const char *variant);
PK_EXPORT int pk_vector_swiglu(float *out, const float *gate, const float *up, size_t n, const char *variant);
PK_EXPORT int pk_vector_add(float *out, const float *a, const float *b, size_t n, const char *variant);
PK_EXPORT int pk_vector_scale(float *out, const float *x, size_t n, float s, float bias, const char *variant);
PK_EXPORT int pk_vector_to_f16(uint16_t *out, const float *x, size_t n, const char *variant);
PK_EXPORT int pk_vector_to_q8_0(void *out, size_t n_out, const float *x, size_t n, const char *variant);
PK_EXPORT int pk_vector_rope(float *out, const float *x, const float *cos, const float *sin, size_t n_rot, size_t n,
                             const char *variant);
PK_EXPORT int pk_activations(void *tile, size_t n_tile, const float *x, size_t tokens, size_t columns, size_t first,
                             size_t last, size_t shared, int arrange, const char *variant);

// out[t][r] = sum of W[r][k] * x[t][k], or scale times that added to out: see matmul/matmul.h. Packs both sides.
// w: `rows` rows of ggml's blocks or numbers, n_w bytes; x float32 [n_x] = [tokens, columns]; out float32
// [n_out] = [tokens, rows]; type: 0 is F32, 1 F16, 2 Q4_0, 8 Q8_0, 12 Q4_K, 13 Q5_K, 14 Q6_K, 30 BF16; scale is
// read when add is not 0. For the quantized types x is rounded to 8 bits: see matmul/activations.h.
// Values are not checked.
// variant: a name from pk_variant("matmul", i) that has the type, or NULL for the fastest.
PK_EXPORT int pk_matmul(float *out, size_t n_out, const void *w, size_t n_w, const float *x, size_t n_x,
                        size_t rows, size_t columns, size_t tokens, int type, float scale, int add,
                        const char *variant);

// Grouped-query attention: see attention/attention.h. shape: {tokens, heads, kv_heads, keys, head}; q and out
// float32 [tokens, heads, head], n_out numbers; k and v [keys, kv_heads, head], n_k and n_v bytes of type 1 (F16) or
// 8 (Q8_0); mask f16 [tokens, keys] or NULL; parts: 1 ... 64, into which the keys are cut and whose results are
// merged. Values are not checked. variant: a name from pk_variant("attention", i), or NULL for the fastest.
PK_EXPORT int pk_attention(float *out, size_t n_out, const float *q, const void *k, size_t n_k, const void *v,
                           size_t n_v, const uint16_t *mask, const size_t shape[5], int k_type, int v_type,
                           float scale, size_t parts, const char *variant);

#endif
