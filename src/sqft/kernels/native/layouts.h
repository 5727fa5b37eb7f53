/* What lies where in each layout, and the helpers that every instruction set shares.
 *
 * All but SQFT_MASK interleave 8 rows. For each 8 rows, for each group of 32 or 64 columns:
 *
 *     8 scales (float16), then for each block of 32 columns its bytes:
 *
 *     DENSE      128  4 x 32: byte b of row r at 4 r + b of part k: columns 8 k + b (low nibble), 8 k + 4 + b (high)
 *     WINDOW2     96  32: byte b of row r: offsets of slots b, 4 + b, 8 + b, 12 + b, two bits each from the low end
 *                     64: nibbles as above, 2 x 32: slots b and 4 + b, then 8 + b and 12 + b
 *     WINDOW3    112  32: offsets of slots b and 4 + b, three bits each, and the low two bits of slot 8 + b
 *                     16: nibbles, rows 0-3 in the low ones, 4-7 in the high: slot 12 + b, and, in the highest bit of
 *                         the nibble, the high bit of slot 8 + b
 *                     64: nibbles as in WINDOW2
 *     WINDOW332   80  32: offsets of slots b and 4 + b, three bits each, and of slot 8 + b, two bits
 *                     32: nibbles of slots b and 4 + b
 *                     16: nibbles of slot 8 + b, rows 0-3 in the low ones, 4-7 in the high
 *     INDEX4      64  2 x 32, for each 16 columns: column (low nibble) and code (high) of slot b
 *     MASK8       96  32: masks of 16 columns, little-endian: rows 0, 1, 4, 5 of the first 16 columns, of the second,
 *                         then rows 2, 3, 6, 7
 *                     64: nibbles, 8 bytes a row in that order: k-th kept of the first 16 columns (low), the second
 *     BYTES      256  8 x 32: byte b of row r of part k: column 4 k + b, signed
 *
 * A code is step + 8. Slot j of a window layout is the column START[j] + offset. An unused slot has the code 8.
 *
 * SQFT_MASK keeps rows apart: an offset (uint64) of every row from the start of the data, then for each row its
 * scales (float16), 4 mask bytes for every 32 columns, and the nibbles (step & 15) of what is kept, low nibble first,
 * those of each 32 columns in whole bytes. If all of the second 16 columns are kept, an even number of the first 16
 * are, with a zero among them if need be. Behind the last row lie 16 more bytes.
 */
#ifndef SQFT_LAYOUTS_H
#define SQFT_LAYOUTS_H

#include <math.h>
#include <string.h>

#include "sqft_cpu.h"

/* First columns of the windows; patterns.py has the formula. */
static const uint8_t SQFT_START2[16] = {0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 28};
static const uint8_t SQFT_START3[16] = {0, 0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 24, 24};
static const uint8_t SQFT_START332[12] = {0, 0, 2, 5, 8, 10, 13, 16, 20, 23, 26, 28};

/* Bytes of 8 rows by 32 columns, without scales; 0 for SQFT_MASK. */
static inline int sqft_block_bytes(int layout) {
    static const int bytes[SQFT_LAYOUTS] = {128, 96, 112, 80, 64, 96, 0, 256};
    return bytes[layout];
}

static inline int64_t sqft_round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

/* Bytes of 8 rows of a layout that interleaves. */
static inline int64_t sqft_stripe_bytes(const struct sqft_weight *w) {
    int64_t groups = w->columns / w->group;
    return groups * (2 * SQFT_LANES + (w->group / SQFT_BLOCK) * (int64_t)sqft_block_bytes(w->layout));
}

/* Where a row of SQFT_MASK starts. */
static inline const uint8_t *sqft_mask_row(const struct sqft_weight *w, int64_t row) {
    uint64_t offset;
    memcpy(&offset, w->data + 8 * row, 8);
    return w->data + offset;
}

static inline float sqft_half(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    uint32_t out;
    float value;
    if (exponent == 31) {
        out = sign | 0x7f800000 | fraction << 13;
    } else if (exponent == 0) { /* zero or subnormal: an exact product */
        value = (float)fraction * 5.9604644775390625e-8f;
        return sign ? -value : value;
    } else {
        out = sign | (exponent + 112) << 23 | fraction << 13;
    }
    memcpy(&value, &out, 4);
    return value;
}

/* A vector on its grid. q: columns (padded) bytes. split: the same, of each 32 the 16 even columns first. scale: d of
 * each block. sum8: 8 times the sum of a block's q. Behind scale and sum8 lie zeros up to a multiple of 8 blocks. */
struct sqft_activation {
    int8_t *q, *split;
    float *scale;
    int32_t *sum8;
};

/* The scale of a block whose largest absolute value this is (NaN where a value is NaN). Returns the factor that turns values
 * into q, or 0 if every q is 0. */
static inline float sqft_set_scale(const struct sqft_activation *a, int64_t block, float largest) {
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    int too_small = inverse > 3e38f; /* to be told from 0 */
    a->scale[block] = too_small ? 0.0f : largest / 127.0f; /* not finite if a value is not: nor is the result then */
    return too_small ? 0.0f : inverse;
}

/* The functions of one instruction set. quantize: whole blocks of a vector. rows: rows first..last of one product for
 * `batch` vectors, first a multiple of 8; y has the stride weight->rows. */
struct sqft_kernels {
    void (*quantize)(const float *x, int64_t blocks, const struct sqft_activation *a);
    void (*rows)(const struct sqft_weight *w, const struct sqft_activation *x, int batch, int64_t first,
                 int64_t last, float *y);
};

extern const struct sqft_kernels sqft_plain;
#if defined(__x86_64__)
extern const struct sqft_kernels sqft_avx2, sqft_avx512;
#elif defined(__aarch64__)
extern const struct sqft_kernels sqft_neon, sqft_dotprod;
#endif

/* The two halves of a product, for hosts with threads of their own. sqft_activation_bytes: memory of one vector on its
 * grid, for padded columns; aligned to 64. sqft_multiply_rows: rows first..last, first a multiple of 8, for `batch`
 * vectors that stand one after another in memory. */
int64_t sqft_activation_bytes(int64_t padded);
void sqft_quantize_vector(const float *x, int64_t columns, int64_t padded, uint8_t *memory);
void sqft_multiply_rows(const struct sqft_weight *w, uint8_t *memory, int64_t batch, int64_t first, int64_t last,
                        float *y);

/* Calls task(context, part) for part 0..parts-1 on at most `threads` threads; returns when all are done. */
void sqft_parallel(void (*task)(void *context, int64_t part), void *context, int64_t parts, int threads);

#endif
