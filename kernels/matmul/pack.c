// SPDX-License-Identifier: Apache-2.0
// pack.c - moves weights between ggml's rows and our panels: one walk over the layout serves both directions.
#include "pack.h"

#include <stdbool.h>
#include <string.h>

enum { Q4_0_BYTES = 18, Q8_0_BYTES = 34, Q4_K_BYTES = 144, Q5_K_BYTES = 176, Q6_K_BYTES = 210 };

// columns of a block, bytes of a block in a source row, bytes that one row takes of a panel for each block
static const struct {
    size_t columns, source, panel;
} blocks[PK_W_TYPES] = {
    [PK_W_Q4_0] = {32, Q4_0_BYTES, 18},
    [PK_W_Q8_0] = {32, Q8_0_BYTES, 34},
    [PK_W_Q4_K] = {256, Q4_K_BYTES, 148},
    [PK_W_Q5_K] = {256, Q5_K_BYTES, 180},
    [PK_W_Q6_K] = {256, Q6_K_BYTES, 210},
    [PK_W_F16] = {1, 2, 2},
    [PK_W_BF16] = {1, 2, 2},
    [PK_W_F32] = {1, 4, 4},
};

size_t pk_row_bytes(pk_weight weight, size_t columns) {
    return columns / blocks[weight].columns * blocks[weight].source;
}

size_t pk_panel_bytes(pk_weight weight, size_t columns) {
    const size_t bytes = columns / blocks[weight].columns * blocks[weight].panel * PK_PANEL_ROWS;
    return (bytes + 63) / 64 * 64;
}

static inline void move(uint8_t *panel, uint8_t *source, size_t bytes, bool pack) {
    if (pack) memcpy(panel, source, bytes);
    else memcpy(source, panel, bytes);
}

// n groups of four bytes: next to each other in the source, 64 bytes apart (16 rows) in the panel.
static inline void move_groups(uint8_t *panel, uint8_t *source, size_t n, bool pack) {
    for (size_t g = 0; g < n; g++) move(panel + 64 * g, source + 4 * g, 4, pack);
}

// Below, `panel` and `source` are one row's: panel points at row r of the first group.

static inline void move_32(uint8_t *panel, uint8_t *source, size_t r, size_t columns, size_t bytes,
                           bool pack) {
    const size_t n = columns / 32;
    for (size_t b = 0; b < n; b++, source += 2 + bytes) {
        const pk_block at = pk_place(b, n, bytes * PK_PANEL_ROWS);
        move(panel + at.d + 2 * r, source, 2, pack);
        move_groups(panel + at.q + 4 * r, source + 2, bytes / 4, pack);
    }
}

// Eight scales and minimums in 6 bits each: ggml keeps the first four in the low bits of 8 bytes, the others'
// low four bits in 4 bytes more and their high two above the first's.
static inline void move_scales(uint8_t *s, uint8_t *m, uint8_t *packed, bool pack) {
    if (!pack) memset(packed, 0, 12);
    for (size_t i = 0; i < 4; i++) {
        uint8_t *low_s = packed + i, *low_m = packed + 4 + i, *both = packed + 8 + i;
        uint8_t *s0 = s + 16 * i, *s4 = s0 + 64, *m0 = m + 16 * i, *m4 = m0 + 64;
        if (pack) {
            *s0 = *low_s & 63;
            *m0 = *low_m & 63;
            *s4 = (uint8_t)((*both & 15) | (*low_s >> 6 << 4));
            *m4 = (uint8_t)((*both >> 4) | (*low_m >> 6 << 4));
        } else {
            *low_s = (uint8_t)(*s0 | (*s4 >> 4 << 6));
            *low_m = (uint8_t)(*m0 | (*m4 >> 4 << 6));
            *both = (uint8_t)((*s4 & 15) | (*m4 << 4));
        }
    }
}

static inline void move_q45_k(uint8_t *panel, uint8_t *source, size_t r, size_t columns, bool five,
                              bool pack) {
    const size_t source_bytes = five ? Q5_K_BYTES : Q4_K_BYTES, panel_bytes = five ? 2880 : 2368;
    for (size_t b = 0; b < columns / 256; b++, panel += panel_bytes, source += source_bytes) {
        move(panel + 2 * r, source, 2, pack);
        move(panel + 32 + 2 * r, source + 2, 2, pack);
        move_scales(panel + 64 + r, panel + 192 + r, source + 4, pack);
        move_groups(panel + 320 + 4 * r, source + (five ? 48 : 16), 32, pack);
        if (five) move_groups(panel + 2368 + 4 * r, source + 16, 8, pack);
    }
}

static inline void move_q6_k(uint8_t *panel, uint8_t *source, size_t r, size_t columns, bool pack) {
    const size_t n = columns / 256;
    for (size_t b = 0; b < n; b++, source += Q6_K_BYTES) {
        const pk_block at = pk_place(b, n, PK_Q6_K_BYTES);
        uint8_t *block = panel + at.q;
        for (size_t i = 0; i < 16; i++) move(block + 16 * i + r, source + 192 + i, 1, pack);
        move_groups(block + 256 + 4 * r, source, 32, pack);
        move_groups(block + 2304 + 4 * r, source + 128, 16, pack);
        move(panel + at.d + 2 * r, source + 208, 2, pack);
    }
}

static inline void move_row(uint8_t *panel, uint8_t *source, pk_weight weight, size_t r, size_t columns,
                            bool pack) {
    const size_t bytes = blocks[weight].source;
    switch (weight) {
        case PK_W_Q4_0: move_32(panel, source, r, columns, 16, pack); break;
        case PK_W_Q8_0: move_32(panel, source, r, columns, 32, pack); break;
        case PK_W_Q4_K: move_q45_k(panel, source, r, columns, false, pack); break;
        case PK_W_Q5_K: move_q45_k(panel, source, r, columns, true, pack); break;
        case PK_W_Q6_K: move_q6_k(panel, source, r, columns, pack); break;
        case PK_W_F16:
        case PK_W_BF16:
        case PK_W_F32:
            for (size_t k = 0; k < columns; k++)
                move(panel + (k * PK_PANEL_ROWS + r) * bytes, source + k * bytes, bytes, pack);
            break;
        case PK_W_TYPES: break;
    }
}

void pk_pack(uint8_t *restrict packed, const uint8_t *source, pk_weight weight, size_t rows, size_t columns,
             size_t first, size_t last) {
    const size_t panel_bytes = pk_panel_bytes(weight, columns), row_bytes = pk_row_bytes(weight, columns);
    for (size_t p = first; p < last; p++) {
        uint8_t *panel = packed + p * panel_bytes;
        if ((p + 1) * PK_PANEL_ROWS > rows) memset(panel, 0, panel_bytes);
        for (size_t r = 0; r < PK_PANEL_ROWS && p * PK_PANEL_ROWS + r < rows; r++) {
            // packing only reads the source: the walk writes one side or the other
            move_row(panel, (uint8_t *)(uintptr_t)(source + (p * PK_PANEL_ROWS + r) * row_bytes), weight, r,
                     columns, true);
        }
    }
}

void pk_unpack(uint8_t *restrict source, const uint8_t *packed, pk_weight weight, size_t rows, size_t columns,
               size_t first, size_t last) {
    const size_t panel_bytes = pk_panel_bytes(weight, columns), row_bytes = pk_row_bytes(weight, columns);
    for (size_t p = first; p < last; p++) {
        uint8_t *panel = (uint8_t *)(uintptr_t)(packed + p * panel_bytes);
        for (size_t r = 0; r < PK_PANEL_ROWS && p * PK_PANEL_ROWS + r < rows; r++) {
            move_row(panel, source + (p * PK_PANEL_ROWS + r) * row_bytes, weight, r, columns, false);
        }
    }
}
