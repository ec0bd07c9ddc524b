// SPDX-License-Identifier: Apache-2.0
// capi_matmul.c - checked entry point of the matrix multiplication: packs both sides and multiplies.
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "matmul/activations.h"
#include "matmul/matmul.h"
#include "matmul/pack.h"
#include "pk.h"
#include "pk_cpu.h"

static const struct {
    int type;  // ggml's number
    pk_weight weight;
    size_t columns;  // of a block
} types[] = {
    {0, PK_W_F32, 1},     {1, PK_W_F16, 1},     {2, PK_W_Q4_0, 32},   {8, PK_W_Q8_0, 32},
    {12, PK_W_Q4_K, 256}, {13, PK_W_Q5_K, 256}, {14, PK_W_Q6_K, 256}, {30, PK_W_BF16, 1},
};
enum { N_TYPES = sizeof types / sizeof types[0] };

static bool find_type(int type, pk_weight *weight, size_t *block) {
    for (size_t i = 0; i < N_TYPES; i++) {
        if (types[i].type != type) continue;
        *weight = types[i].weight;
        *block = types[i].columns;
        return true;
    }
    return false;
}

static pk_matmul_fn named(const char *name, pk_weight weight) {
    if (!name) return pk_matmul_best(weight);
    const pk_matmul_variant *variant;
    for (size_t row = 0; (variant = pk_matmul_at(row)) != NULL; row++) {
        if (!strcmp(variant->name, name)) return pk_cpu_has(variant->needs) ? variant->fn[weight] : NULL;
    }
    return NULL;
}

static bool overlap(const void *a, size_t bytes_a, const void *b, size_t bytes_b) {
    const uintptr_t from_a = (uintptr_t)a, from_b = (uintptr_t)b;
    return from_a < from_b + bytes_b && from_b < from_a + bytes_a;
}

static bool is_product(size_t n, size_t a, size_t b) { return n % a == 0 && n / a == b; }

static void pack_tiles(uint8_t *tiles, const float *x, pk_weight weight, size_t tokens, size_t columns) {
    const pk_activations_variant *variant = pk_activations_best();
    const pk_activations_fn fn = PK_IS_FLOAT(weight) ? variant->arrange : variant->quantize;
    for (size_t first = 0; first < tokens; first += PK_TILE_TOKENS) {
        const size_t left = tokens - first, n = left < PK_TILE_TOKENS ? left : PK_TILE_TOKENS;
        fn(&(pk_activations_args){
            .tile = tiles, .x = x + first * columns, .x_stride = columns, .tokens = n, .columns = columns,
            .first = 0, .last = (columns + PK_X_BLOCK - 1) / PK_X_BLOCK,
            .shared = PK_SHARED_BLOCKS(weight, columns)});
        tiles += pk_tile_bytes(weight, columns, n);
    }
}

int pk_matmul(float *out, size_t n_out, const void *w, size_t n_w, const float *x, size_t n_x, size_t rows,
              size_t columns, size_t tokens, int type, float scale, int add, const char *variant) {
    const size_t most = SIZE_MAX / 128;  // the packed sizes below cannot overflow
    pk_weight weight;
    size_t block;
    if (!out || !w || !x) return PK_ERR_NULL;
    if (!pk_cpu_mask_is_valid()) return PK_ERR_MASK;
    if (!find_type(type, &weight, &block)) return PK_ERR_TYPE;
    const pk_matmul_fn fn = named(variant, weight);
    if (!fn) return PK_ERR_VARIANT;
    if (n_out > most || n_w > most || n_x > most) return PK_ERR_SIZE;
    if (rows == 0 || columns == 0 || tokens == 0 || columns % block) return PK_ERR_SIZE;
    if (!is_product(n_x, columns, tokens) || !is_product(n_out, rows, tokens)) return PK_ERR_SIZE;
    if (!is_product(n_w, pk_row_bytes(weight, columns), rows)) return PK_ERR_SIZE;
    if (overlap(out, n_out * sizeof *out, w, n_w)) return PK_ERR_OVERLAP;
    if (overlap(out, n_out * sizeof *out, x, n_x * sizeof *x)) return PK_ERR_OVERLAP;

    const size_t n_panels = (rows + PK_PANEL_ROWS - 1) / PK_PANEL_ROWS;
    const size_t n_packed = n_panels * pk_panel_bytes(weight, columns);
    uint8_t *memory = malloc(n_packed + 63), *tiles = malloc(pk_tile_bytes(weight, columns, tokens));
    if (memory && tiles) {
        uint8_t *packed = memory + (64 - (uintptr_t)memory % 64) % 64;
        pk_pack(packed, w, weight, rows, columns, 0, n_panels);
        pack_tiles(tiles, x, weight, tokens, columns);
        fn(&(pk_matmul_args){.out = out, .out_stride = rows, .w = packed, .x = tiles, .rows = rows,
                             .tokens = tokens, .columns = columns, .add = add, .scale = scale});
    }
    const int status = memory && tiles ? PK_OK : PK_ERR_MEMORY;
    free(memory);
    free(tiles);
    return status;
}
