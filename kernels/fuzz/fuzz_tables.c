// SPDX-License-Identifier: Apache-2.0
// fuzz_tables.c - names, log-mel, quantize and probe: calls whose variants give the same bits.
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "logmel/logmel.h"
#include "pk.h"
#include "probe/probe.h"
#include "quantize/quantize.h"

// Names and numbers from outside: never past a table, never no text.
void fuzz_names(bytes *in) {
    const size_t n = in->left < 32 ? in->left : 32;
    char *kernel = exact(n + 1);
    for (size_t i = 0; i < n; i++) kernel[i] = (char)in->at[i];
    kernel[n] = '\0';
    const size_t at = take_hostile(in);
    (void)pk_variant(kernel, at);
    must(!pk_variant(NULL, at), "pk_variant", NULL, "found a variant of no kernel");
    must(at < 32 || (!pk_feature(at) && !pk_known_feature(at)), "pk_feature", NULL, "has a feature too many");
    const char *text = pk_status((int)(uint32_t)take(in, 4));
    must(text && text[0], "pk_status", NULL, "has no text");
    must(pk_abi() == PK_ABI && pk_version() && pk_check_mask() == PK_OK, "pk_abi", NULL, "is another");
    free(kernel);
}

static bool all_between(const float *x, size_t n, float most) {
    for (size_t i = 0; i < n; i++) {
        if (!(x[i] >= -most && x[i] <= most)) return false;
    }
    return true;
}

void fuzz_logmel(bytes *in) {
    const unsigned rates[] = {16000, 8000, 16000, (unsigned)take(in, 4)};
    const unsigned rate = rates[take(in, 1) % 4];
    const size_t window = rate == 8000 ? 200 : 400, hop = rate == 8000 ? 80 : 160;
    const size_t n = take_below(in, 4000);
    const size_t n_frames = n >= window ? (n - window) / hop + 1 : 0, n_out = n_frames * PK_LOGMEL_BANDS;
    const char *variant = take_variant(in, "logmel");
    const uint64_t lie = take(in, 1) % 8;  // 1: about the output's size, 2: the same memory, 3: no input
    const size_t n_said = lie == 1 ? take_hostile(in) : n_out;
    float *wave = new_floats(in, n), *out = exact(n_out * sizeof *out), *want = exact(n_out * sizeof *out);
    const int got = pk_logmel(lie == 2 ? wave : out, n_said, lie == 3 ? NULL : wave, n, rate, variant);
    const bool known = rate == 16000 || rate == 8000, usable = all_between(wave, n, PK_LOGMEL_MAX_SAMPLE);
    const bool good = known && n >= window && n_said == n_out && lie != 2 && lie != 3 && usable &&
                      is_variant("logmel", variant);
    must((got == PK_OK) == good, "pk_logmel", variant, "has the wrong status");
    if (good) {
        must(pk_logmel(want, n_out, wave, n, rate, "c") == PK_OK, "pk_logmel", "c", "refuses");
        must(!memcmp(out, want, n_out * sizeof *out), "pk_logmel", variant, "differs from c");
        for (size_t i = 0; i < n_out; i++) must(out[i] >= 0.0f, "pk_logmel", variant, "is below its floor");
    }
    free_floats(wave);
    free(out);
    free(want);
}

void fuzz_quantize(bytes *in) {
    const int types[] = {PK_Q4_K, PK_Q5_K, PK_Q6_K, (int)(uint32_t)take(in, 4)};
    const int type = types[take(in, 1) % 4];
    const uint64_t lie =
        take(in, 1) % 8;  // 1: about the output's size, 2: not whole blocks, 3: none, 4: overlap
    const size_t n_blocks = 1 + take_below(in, 9), n = n_blocks * PK_QUANTIZE_BLOCK;
    const size_t bytes_each = type == PK_Q4_K   ? 144
                              : type == PK_Q5_K ? 176
                                                : 210,
                 n_out = n_blocks * bytes_each;
    const char *variant = take_variant(in, "quantize");
    const size_t said = lie == 1 ? take_hostile(in) : n_out;
    const size_t n_said = lie == 2 ? n - 1 - take_below(in, 255) : lie == 3 ? 0 : n;
    float *x = new_floats(in, n);
    uint8_t *out = exact(n_out), *want = exact(n_out);
    const int got = pk_quantize(lie == 4 ? (void *)x : out, said, x, n_said, type, variant);
    const bool known = type == PK_Q4_K || type == PK_Q5_K || type == PK_Q6_K;
    const bool good = known && said == n_out && n_said == n && lie != 4 &&
                      all_between(x, n, PK_QUANTIZE_MAX) && is_variant("quantize", variant);
    must((got == PK_OK) == good, "pk_quantize", variant, "has the wrong status");
    if (good) {
        must(pk_quantize(want, n_out, x, n, type, "c") == PK_OK, "pk_quantize", "c", "refuses");
        must(!memcmp(out, want, n_out), "pk_quantize", variant, "differs from c");
    }
    free_floats(x);
    free(out);
    free(want);
}

void fuzz_probe(bytes *in) {
    const char *variant = take_variant(in, "probe");
    const bool known = is_variant("probe", variant), lie = take(in, 1) % 4 == 0;
    size_t rounds = take_below(in, 2000), n = take_below(in, 8) * PK_PROBE_CHUNK;
    if (lie) {
        const size_t hostile = take_hostile(in);
        rounds = hostile <= PK_PROBE_MAX_ROUNDS && hostile > 2000 ? 0 : hostile;  // else it takes seconds
        n = n == 0 ? 0 : n - 1 - hostile % (PK_PROBE_CHUNK - 1);
    }
    uint8_t *memory = exact(n + 1);
    fill_bytes(in, memory, n + 1);
    uint64_t operations = 0, total = 0, want = 0;
    uint32_t sum = 0;
    float value = 0.0f;
    const int good = known && rounds > 0 && rounds <= PK_PROBE_MAX_ROUNDS;
    must((pk_probe_int8(&operations, &sum, rounds, variant) == PK_OK) == good, "pk_probe_int8", variant,
         "status");
    must(!good || sum == (uint32_t)(operations / 2 * PK_PROBE_WEIGHT * PK_PROBE_INPUT), "pk_probe_int8",
         variant, "does not add up");
    must((pk_probe_fp32(&operations, &value, rounds, variant) == PK_OK) == good, "pk_probe_fp32", variant,
         "status");
    must(!good || value == (float)(operations / 2), "pk_probe_fp32", variant,
         "does not add up");  // below 2^24
    const bool whole = known && n > 0 && n % PK_PROBE_CHUNK == 0;
    must((pk_probe_read(&total, memory + 1, n, variant) == PK_OK) == whole, "pk_probe_read", variant,
         "status");
    for (size_t i = 0; i < n; i++) want += (uint64_t)memory[1 + i] << 8 * (i % 8);
    must(!whole || total == want, "pk_probe_read", variant, "does not add up");
    must(pk_probe_read(NULL, memory, n, variant) == PK_ERR_NULL, "pk_probe_read", variant, "takes NULL");
    free(memory);
}
