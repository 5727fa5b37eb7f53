/* Products of 4-bit weights with vectors, straight from a packed form. Plain C interface, no dependencies.
 *
 * A weight (rows, columns) is integer steps -8..7 and one scale for every 32 columns, or every 64, of a row:
 *
 *     y[v][r] = sum over blocks b of 32 columns:  scale[r][b] * d[v][b] * sum over c in b:  step[r][c] * q[v][c]
 *
 * where d and q are the vector on a grid of its own: d[b] = max |x| / 127, q = round to even(x / d). Sums of one
 * block are exact integers; blocks are added in float.
 */
#ifndef SQFT_CPU_H
#define SQFT_CPU_H

#include <stdint.h>

#if defined(_WIN32)
#define SQFT_API __declspec(dllexport)
#else
#define SQFT_API __attribute__((visibility("default")))
#endif

#define SQFT_ABI 1
#define SQFT_BLOCK 32 /* columns that share a scale of the activations */
#define SQFT_LANES 8  /* rows that are interleaved */

/* How steps are packed; layouts.h says what lies where. Bytes for 32 weights with scales for 32 columns. */
enum sqft_layout {
    SQFT_DENSE = 0,      /* 18    any steps */
    SQFT_WINDOW2 = 1,    /* 14    16 of 32, each in a window of 4 columns */
    SQFT_WINDOW3 = 2,    /* 16    16 of 32, each in a window of 8 columns */
    SQFT_WINDOW332 = 3,  /* 12    12 of 32, windows of 8, 8 and 4 columns */
    SQFT_INDEX4 = 4,     /* 10    4 of 16, anywhere */
    SQFT_MASK8 = 5,      /* 14    8 of 16, anywhere */
    SQFT_MASK = 6,       /* 6 + 16 * density    any steps, zeros left out */
    SQFT_BYTES = 7,      /* 34    steps -127..127, for heads and embeddings */
    SQFT_LAYOUTS = 8
};

enum sqft_isa { SQFT_PLAIN = 0, SQFT_AVX2 = 1, SQFT_AVX512 = 2, SQFT_NEON = 3, SQFT_DOTPROD = 4, SQFT_ISAS = 5 };

/* A packed weight. columns is padded to group (32 or 64), rows to 8; data holds sqft_pack's output and 64 bytes
 * behind it that may be read and are not used. */
struct sqft_weight {
    int32_t layout;
    int32_t group;
    int64_t rows;
    int64_t columns;
    const uint8_t *data;
};

SQFT_API int sqft_abi(void);

/* The instructions that are used: the best there are, or what sqft_use_isa chose (tests, benchmarks). */
SQFT_API int sqft_isa(void);
/* Returns what is used from now on, at most `isa` of those that this processor's kind can have. Not while products run. */
SQFT_API int sqft_use_isa(int isa);

/* Bytes of a packed weight, without the 64 behind it; -1 if the shape or layout is none. `steps` (rows, columns)
 * is looked at for SQFT_MASK only. columns need not be padded. */
SQFT_API int64_t sqft_packed_bytes(int layout, int group, int64_t rows, int64_t columns, const int8_t *steps);

/* Pack steps (rows, columns) with scales as float16 bits (rows, columns / group rounded up). Returns 0, or 1 + the
 * first row that does not fit the layout. */
SQFT_API int64_t sqft_pack(int layout, int group, int64_t rows, int64_t columns, const int8_t *steps,
                           const uint16_t *scales, uint8_t *data);

/* Undo sqft_pack for one row: steps and float scales of padded columns. */
SQFT_API void sqft_unpack_row(const struct sqft_weight *weight, int64_t row, int8_t *steps, float *scales);

/* y (batch, rows) = x (batch, columns) times the weight; `columns` of x as given, the rest counts as 0. Returns 0,
 * or -1 if memory for the activations is missing. threads: at most so many; small products take fewer. */
SQFT_API int sqft_multiply(const struct sqft_weight *weight, const float *x, int64_t columns, int64_t batch,
                           float *y, int threads);

#endif
