// SPDX-License-Identifier: Apache-2.0
// lora_c.c - scalar reference. Clear first; it is also the fallback.
#include <string.h>

#include "lora.h"
#include "pk_fp16.h"

// out += x * w, for n numbers
static void add_times(float *out, float x, const void *w, size_t n, pk_lora_type type) {
    const float *f32 = w;
    const uint16_t *f16 = w;
    const int8_t *s8 = w;
    if (type == PK_LORA_F32) {
        for (size_t c = 0; c < n; c++) out[c] += x * f32[c];
    } else if (type == PK_LORA_F16) {
        for (size_t c = 0; c < n; c++) out[c] += x * pk_from_fp16(f16[c]);
    } else {
        for (size_t c = 0; c < n; c++) out[c] += x * (float)s8[c];
    }
}

static void product(const pk_lora_args *a) {
    for (size_t r = 0; r < a->rows; r++) {
        float *out = a->out + r * a->out_stride;
        const float *base = a->base ? a->base + r * a->base_stride : NULL;
        if (!base) memset(out, 0, a->columns * sizeof *out);
        else if (base != out) memcpy(out, base, a->columns * sizeof *out);
        const uint8_t *w = a->w;
        for (size_t k = 0; k < a->depth; k++, w += a->w_stride * pk_lora_bytes(a->type)) {
            add_times(out, a->x[r * a->x_stride + k], w, a->columns, a->type);
        }
    }
}

const pk_lora_variant pk_lora_c = {.name = "c", .few = product, .many = product};
