// SPDX-License-Identifier: Apache-2.0
// pk_count.c - calls each variant once with nothing but a write() before and after it, for whoever counts
// instructions between the two: qemu_count.c. A line is "family what variant work", work being the number of
// multiply-adds or of numbers; then comes a line that only ends the count.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "attention/attention.h"
#include "matmul/activations.h"
#include "matmul/matmul.h"
#include "matmul/pack.h"
#include "pk_cpu.h"
#include "vector/vector.h"

enum { COLUMNS = 1024, PANELS = 2, TOKENS = 16, GROUP = 3, KEYS = 512, HEAD = 128, NUMBERS = 3072 };
static const uint8_t A_BYTE = 0x2c;  // twice a usual float16, four times a usual float32

typedef enum { RMS_NORM, SWIGLU, ADD, SCALE, TO_F16, TO_Q8_0, ROPE, N_VECTOR } vector_op;
static const char *const vector_names[] = {"rms_norm", "swiglu", "add", "scale", "to_f16", "to_q8_0", "rope"};
static const char *const weight_names[] = {"Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"};

static uint8_t *filled(size_t size) {
    uint8_t *p = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!p) exit(1);
    return memset(p, A_BYTE, size);
}

static void say(const char *line) {
    if (write(STDOUT_FILENO, line, strlen(line)) < 0) exit(1);
}

static void name(char line[128], const char *what, const char *variant, size_t work) {
    snprintf(line, 128, "%s %s %zu", what, variant, work);
}

static void count_matmul(void) {
    const pk_matmul_variant *v;
    for (pk_weight w = PK_W_Q4_0; w < PK_W_TYPES; w++) {
        uint8_t *panels = filled(PANELS * pk_panel_bytes(w, COLUMNS));
        uint8_t *tile = filled(pk_tile_bytes(w, COLUMNS, TOKENS));
        float *out = (float *)(void *)filled(TOKENS * PANELS * PK_PANEL_ROWS * sizeof *out);
        pk_matmul_args a = {.out = out, .out_stride = PANELS * PK_PANEL_ROWS, .w = panels, .x = tile,
                            .rows = PANELS * PK_PANEL_ROWS, .columns = COLUMNS};
        for (size_t row = 0; (v = pk_matmul_at(row)) != NULL; row++) {
            if (!v->fn[w] || !pk_cpu_has(v->needs)) continue;
            for (a.tokens = 1; a.tokens <= TOKENS; a.tokens *= 4) {
                char what[32], line[128];
                snprintf(what, sizeof what, "matmul %s*%zu", weight_names[w], a.tokens);
                name(line, what, v->name, a.rows * a.columns * a.tokens);
                v->fn[w](&a);  // pages and lazily bound symbols
                say(line);
                v->fn[w](&a);
                say("\n");
            }
        }
        free(panels);
        free(tile);
        free(out);
    }
}

static void count_activations(void) {
    uint8_t *x = filled(TOKENS * COLUMNS * sizeof(float)), *tile = filled(TOKENS * COLUMNS * sizeof(float));
    static const char *const names[] = {"activations quantize*32", "activations quantize*256",
                                        "activations arrange"};
    pk_activations_args a = {.tile = tile, .x = (const float *)(const void *)x, .x_stride = COLUMNS,
                             .tokens = TOKENS, .columns = COLUMNS, .last = COLUMNS / PK_X_BLOCK};
    const pk_activations_variant *v;
    for (size_t row = 0; (v = pk_activations_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) continue;
        for (int way = 0; way < 3; way++) {
            const pk_activations_fn fn = way == 2 ? v->arrange : v->quantize;
            char line[128];
            a.shared = way == 0 ? 1 : 8;
            name(line, names[way], v->name, TOKENS * COLUMNS);
            fn(&a);
            say(line);
            fn(&a);
            say("\n");
        }
    }
    free(x);
    free(tile);
}

static void count_attention(void) {
    static const char *const names[][PK_KV_TYPES] = {{"attention many*f16", "attention many*q8_0"},
                                                     {"attention one*f16", "attention one*q8_0"}};
    uint8_t *q = filled(TOKENS * GROUP * HEAD * sizeof(float)), *kv = filled(KEYS * HEAD * 2);
    uint8_t *out = filled(TOKENS * GROUP * HEAD * sizeof(float));
    uint8_t *scratch = filled(pk_attention_scratch_bytes());
    const pk_attention_variant *v;
    for (size_t row = 0; (v = pk_attention_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) continue;
        for (int one = 0; one < 2; one++) {
            for (pk_kv type = PK_KV_F16; type < PK_KV_TYPES; type++) {
                const size_t kv_row = type == PK_KV_F16 ? 2 * HEAD : HEAD / 32 * 34;
                const size_t row_bytes = HEAD * sizeof(float), tokens = one ? 1 : TOKENS;
                const pk_attention_args a = {
                    .q = (const float *)(const void *)q, .q_token = GROUP * row_bytes, .q_head = row_bytes,
                    .k = kv, .v = kv, .k_row = kv_row, .v_row = kv_row, .k_type = type, .v_type = type,
                    .out = (float *)(void *)out, .out_token = GROUP * row_bytes, .out_head = row_bytes,
                    .tokens = tokens, .group = GROUP, .keys = KEYS, .head = HEAD, .scale = 1.0f,
                    .scratch = scratch};
                const pk_attention_fn fn = one ? v->one : v->many;
                char line[128];
                name(line, names[one][type], v->name, 2 * tokens * GROUP * KEYS * HEAD);
                fn(&a);
                say(line);
                fn(&a);
                say("\n");
            }
        }
    }
    free(q);
    free(kv);
    free(out);
    free(scratch);
}

static void call_vector(const pk_vector_variant *v, vector_op op, uint8_t *to, const float *x) {
    float *out = (float *)(void *)to;
    switch (op) {
        case RMS_NORM: v->rms_norm(out, x, x, NUMBERS, 1e-5f); break;
        case SWIGLU: v->swiglu(out, x, x, NUMBERS); break;
        case ADD: v->add(out, x, x, NUMBERS); break;
        case SCALE: v->scale(out, x, NUMBERS, 2.0f, 1.0f); break;
        case TO_F16: v->to_f16((uint16_t *)(void *)to, x, NUMBERS); break;
        case TO_Q8_0: v->to_q8_0(to, x, NUMBERS); break;
        case ROPE: v->rope(out, x, x, x, NUMBERS, NUMBERS); break;
        case N_VECTOR: break;
    }
}

static void count_vector(void) {
    uint8_t *x = filled(NUMBERS * sizeof(float)), *out = filled(NUMBERS * sizeof(float));
    const pk_vector_variant *v;
    for (size_t row = 0; (v = pk_vector_at(row)) != NULL; row++) {
        if (!pk_cpu_has(v->needs)) continue;
        for (vector_op op = RMS_NORM; op < N_VECTOR; op++) {
            char what[32], line[128];
            snprintf(what, sizeof what, "vector %s", vector_names[op]);
            name(line, what, v->name, NUMBERS);
            call_vector(v, op, out, (const float *)(const void *)x);
            say(line);
            call_vector(v, op, out, (const float *)(const void *)x);
            say("\n");
        }
    }
    free(x);
    free(out);
}

int main(void) {
    say("empty - - 1");
    say("\n");
    count_matmul();
    count_activations();
    count_attention();
    count_vector();
    return 0;
}
