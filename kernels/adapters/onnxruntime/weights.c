// SPDX-License-Identifier: Apache-2.0
// weights.c - MatMulNBits' blocks to the panels of matmul.h.
//
// A row of MatMulNBits is columns / 32 blocks; with 4 bits, byte i of a block holds columns 2i (low) and 2i + 1 (high)
// plus 8, with 8 bits column i plus 128. The scales, float32, are in a tensor of their own. Rows of a panel become
// ggml's rows first, with float16 scales, because that is what pack.h takes: it is some kilobytes at a time.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "library.h"
#include "pk_fp16.h"

enum { BLOCK = 32, HUGE_PAGE = 2 << 20 };

// Large matrices in large pages, where the system has them: they are read from end to end for every token.
static uint8_t *allocate(size_t n) {
    if (n < 2 * HUGE_PAGE) return aligned_alloc(64, pk_divide_up(n, 64) * 64);
    uint8_t *memory = aligned_alloc(HUGE_PAGE, pk_divide_up(n, HUGE_PAGE) * HUGE_PAGE);
#if defined(MADV_HUGEPAGE)
    if (memory) (void)madvise(memory, n, MADV_HUGEPAGE);  // a hint: nothing is lost where it is refused
#endif
    return memory;
}

static void put_4(uint8_t *restrict q, const uint8_t *block) {
    for (size_t i = 0; i < BLOCK / 2; i++) {  // column i, and i + 16 above it
        const unsigned low = block[i / 2], high = block[i / 2 + 8], shift = 4 * (i % 2);
        q[i] = (uint8_t)((low >> shift & 15u) | (high >> shift & 15u) << 4);
    }
}

static void put_8(uint8_t *restrict q, const uint8_t *block) {
    for (size_t i = 0; i < BLOCK; i++) q[i] = block[i] ^ 0x80u;
}

// n blocks in ggml's layout; false: a scale is not a float16. NaN never is.
static bool put_blocks(uint8_t *restrict out, pk_weight weight, const uint8_t *blocks, const float *scales, size_t n) {
    const size_t bytes = weight == PK_W_Q4_0 ? BLOCK / 2 : BLOCK;
    bool exact = true;
    for (size_t b = 0; b < n; b++, out += 2 + bytes, blocks += bytes) {
        if (!(fabsf(scales[b]) <= 65504.0f)) return false;
        const uint16_t d = pk_to_fp16(scales[b]);
        exact &= pk_from_fp16(d) == scales[b];
        memcpy(out, &d, sizeof d);
        if (weight == PK_W_Q4_0) put_4(out + 2, blocks);
        else put_8(out + 2, blocks);
    }
    return exact;
}

OrtStatus *pk_pack_blocks(const OrtApi *api, pk_weight weight, size_t rows, size_t columns, const uint8_t *blocks,
                          const float *scales, uint8_t **packed) {
    const size_t n = columns / BLOCK, block_bytes = weight == PK_W_Q4_0 ? BLOCK / 2 : BLOCK;
    const size_t panels = pk_divide_up(rows, PK_PANEL_ROWS), panel_bytes = pk_panel_bytes(weight, columns);
    uint8_t *out = allocate(panels * panel_bytes);
    uint8_t *source = malloc(PK_PANEL_ROWS * pk_row_bytes(weight, columns));
    bool exact = true;
    for (size_t p = 0; out && source && exact && p < panels; p++) {
        const size_t row = p * PK_PANEL_ROWS, some = pk_least(PK_PANEL_ROWS, rows - row);
        exact = put_blocks(source, weight, blocks + row * n * block_bytes, scales + row * n, some * n);
        pk_pack(out + p * panel_bytes, source, weight, some, columns, 0, 1);
    }
    OrtStatus *status = NULL;
    if (!out || !source) status = pk_fail(api, "Failed to allocate %zu bytes of weights", panels * panel_bytes);
    else if (!exact) status = pk_fail(api, "MatMulNBits has a scale that is not exact in float16");
    free(source);
    if (status) free(out);
    else *packed = out;
    return status;
}
