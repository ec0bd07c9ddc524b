// SPDX-License-Identifier: Apache-2.0
// pk.h - the C API of libpk: what adapters/capi.c exports, and all that it exports.
//
// Every call checks its arguments and returns a status; nothing aborts. All calls are safe from several
// threads at once. Strings are static ASCII.
#ifndef PK_H
#define PK_H

#include <stddef.h>

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
#define PK_ERR_TYPE 8     // a quantised type other than Q4_K, Q5_K and Q6_K

PK_EXPORT int pk_abi(void);                    // PK_ABI of the library, to compare with the caller's
PK_EXPORT const char *pk_version(void);        // "0.1.0"
PK_EXPORT const char *pk_status(int status);   // what a status means, one line; never NULL

PK_EXPORT int pk_check_mask(void);             // PK_OK or PK_ERR_MASK
PK_EXPORT const char *pk_feature(size_t i);    // i-th CPU feature in use here, NULL past the end
PK_EXPORT const char *pk_known_feature(size_t i);  // i-th name that POCKETPHI_CPU_MASK may hold

// The i-th variant of kernel `kernel` ("logmel", "quantize") that this CPU can run, slow to fast. NULL past the
// end, and for a kernel that does not exist.
PK_EXPORT const char *pk_variant(const char *kernel, size_t i);

// Log-mel features: see logmel/logmel.h.
// wave float32 [n_samples] at sample_rate Hz; out float32 [n_out] = [frames, 80].
// variant: a name from pk_variant("logmel", i), or NULL for the fastest.
PK_EXPORT int pk_logmel(float *out, size_t n_out, const float *wave, size_t n_samples, unsigned sample_rate,
                        const char *variant);

// Weights in ggml's blocks, byte for byte as ggml quantises them without importances: see quantize/quantize.h.
// x float32 [n], n a multiple of 256; type: 12 is Q4_K, 13 Q5_K, 14 Q6_K; out [n_out] bytes = n / 256 blocks.
// variant: a name from pk_variant("quantize", i), or NULL for the fastest.
PK_EXPORT int pk_quantize(void *out, size_t n_out, const float *x, size_t n, int type, const char *variant);

#endif
