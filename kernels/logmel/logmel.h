// SPDX-License-Identifier: Apache-2.0
// logmel.h - the contract of the log-mel kernels. A variant file includes only this.
//
// For each frame f of `window_samples` samples x, `hop_samples` after the one before:
//
//   y[n]   = float32(x[n] - float32(0.97 * x[n - 1])),  x[-1] read as x[0]
//   S      = real FFT of  32768 * hamming[n] * y[n],  zero-padded to 2 * n_points
//   out[f][m] = float32(ln(max(1, sum over k of  mel[m][k] * |S[k]|^2)))
//
// Pre-emphasis rounds to float32 as the model's own front end does; everything after it is float64.
//
//   rate   window  hop  FFT   bins used
//   16000     400  160  512   1 ... 245
//    8000     200   80  256   1 ... 127   the same mel bands; those above 4 kHz stay at 0
//
// Shapes: wave float32 [(n_frames - 1) * hop_samples + window_samples], out float32 [n_frames, 80].
// The caller guarantees: n_frames > 0, every |sample| <= PK_LOGMEL_MAX_SAMPLE, out and wave do not overlap.
// A variant allocates nothing, starts no thread, keeps no state, takes any number of frames, reads and
// writes nothing outside the shapes above: the caller owns memory, threads and the split into ranges.
//
// Every variant does the same IEEE operations in the same order for one frame (SIMD puts frames in
// lanes, and no multiply-add is fused), so all give the same bits.
//
// Source: the feature extractor of microsoft/Phi-4-multimodal-instruct (processing_phi4mm.py).
#ifndef PK_LOGMEL_H
#define PK_LOGMEL_H

#include <float.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PK_LOGMEL_BANDS 80
#define PK_LOGMEL_MAX_WINDOW 400
#define PK_LOGMEL_MAX_POINTS 256            // complex points: half the longest real FFT
#define PK_LOGMEL_MAX_TAPS 512              // each of 245 bins lies under at most two triangles
#define PK_LOGMEL_PREEMPHASIS 0.97f
#define PK_LOGMEL_MAX_SAMPLE (FLT_MAX / 2)  // above it the pre-emphasis may overflow

// ln x of x >= 1: x = 2^e m with m in [sqrt(1/2), sqrt 2), s = (m - 1) / (m + 1), z = s^2 <= 0.0295, and
// ln x = e ln 2 + 2 s (1 + z/3 + z^2/5 + ... + z^6/13). The first term left out is below 2e-12 of the sum.
#define PK_LOGMEL_SQRT_HALF UINT64_C(0x3fe6a09e667f3bcd)  // the bits of sqrt(1/2) as a double
#define PK_LOGMEL_EXPONENT UINT64_C(0xfff0000000000000)   // sign and exponent of a double
#define PK_LOGMEL_LN2 0x1.62e42fefa39efp-1

typedef struct {
    size_t window_samples;
    size_t hop_samples;
    size_t n_points;                        // a power of two; the real FFT has 2 * n_points
    size_t n_bins;                          // bins 1 ... n_bins - 1 are used
    double window[PK_LOGMEL_MAX_WINDOW];    // 32768 * Hamming, [window_samples]
    double cosine[PK_LOGMEL_MAX_POINTS];    // of 2 pi k / (2 n_points), [n_points]
    double sine[PK_LOGMEL_MAX_POINTS];
    uint16_t place[PK_LOGMEL_MAX_POINTS];   // where the FFT wants point n: n with its bits reversed
    uint16_t first_bin[PK_LOGMEL_BANDS];
    uint16_t n_taps[PK_LOGMEL_BANDS];       // bins under the band's triangle, 0 for a band above 4 kHz at 8 kHz
    double taps[PK_LOGMEL_MAX_TAPS];        // the bands' weights, one after the other
} pk_logmel_tables;

// Fills the caller's tables for 8000 or 16000 Hz. False for any other rate.
bool pk_logmel_setup(pk_logmel_tables *tables, unsigned sample_rate);

#define PK_LOGMEL(name) \
    void name(float *restrict out, const float *wave, size_t n_frames, const pk_logmel_tables *t)

PK_LOGMEL(pk_logmel_c);  // scalar: the definition of correct
PK_LOGMEL(pk_logmel_avx2);
PK_LOGMEL(pk_logmel_neon);

typedef PK_LOGMEL((*pk_logmel_fn));
typedef struct {
    const char *name;
    unsigned needs;  // PK_CPU_* bits
    pk_logmel_fn fn;
} pk_logmel_variant;

const pk_logmel_variant *pk_logmel_at(size_t i);  // slow to fast, NULL past the end: tests walk the table
pk_logmel_fn pk_logmel_best(void);

#endif
