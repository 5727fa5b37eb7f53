/* Kernels for 64-bit ARM, included by neon.c and dotprod.c, which say what TARGET is and whether there are dot products
 * of four bytes (DOT). As in x86.h a lane of 32 bits is a row, but a register holds four: 8 rows are two halves. */
#include <arm_neon.h>

#include "layouts.h"
#include "positions.h"

#define INLINE static inline __attribute__((always_inline)) TARGET
#define AHEAD 1024 /* bytes that are fetched before they are needed; not tuned, as no such machine was at hand */

typedef const struct sqft_activation *vectors;

INLINE int8x16_t step_of(uint8x16_t code) { return vsubq_s8(vreinterpretq_s8_u8(code), vdupq_n_s8(8)); }
INLINE uint8x16_t low_nibbles(uint8x16_t x) { return vandq_u8(x, vdupq_n_u8(15)); }
INLINE uint8x16_t high_nibbles(uint8x16_t x) { return vshrq_n_u8(x, 4); }
INLINE uint8x16_t field(uint8x16_t x, int shift, int mask) {
    return vandq_u8(vshlq_u8(x, vdupq_n_s8((int8_t)-shift)), vdupq_n_u8((uint8_t)mask));
}
typedef uint8x16_t bytes;
INLINE bytes add_bytes(bytes x, bytes y) { return vaddq_u8(x, y); }
INLINE bytes or_bytes(bytes x, bytes y) { return vorrq_u8(x, y); }
INLINE uint8x16_t four(int a, int b, int c, int d) {
    return vreinterpretq_u8_u32(vdupq_n_u32((uint32_t)(a | b << 8 | c << 16 | d << 24)));
}
INLINE int8x16_t broadcast4(const int8_t *q) {
    int32_t word;
    memcpy(&word, q, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

/* Adds to each lane the products of its four bytes. */
INLINE int32x4_t add_products(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if DOT
    return vdotq_s32(sum, a, b);
#else
    int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

/* Positions of slots 4 quad .. 4 quad + 3 of four rows, from the column `base` of the block on, and their steps. */
struct quad {
    uint8x16_t at;
    int8x16_t step;
    int base;
};

#include "windows.h"

/* The quads of four rows of a block, half 0 or 1, for layouts with slots. Returns how many there are. */
INLINE int decode_quads(const int layout, const uint8_t *p, const int half, struct quad *quad) {
    if (layout == SQFT_INDEX4) {
        for (int k = 0; k < 2; k++) {
            uint8x16_t x = vld1q_u8(p + 32 * k + 16 * half);
            quad[k] = (struct quad){low_nibbles(x), step_of(high_nibbles(x)), 16 * k};
        }
        return 2;
    }
    const uint8_t *nibbles = p + (layout == SQFT_WINDOW3 ? 48 : 32);
    uint8x16_t index = vld1q_u8(p + 16 * half), first = vld1q_u8(nibbles + 16 * half);
    quad[0].step = step_of(low_nibbles(first));
    quad[1].step = step_of(high_nibbles(first));
    if (layout == SQFT_WINDOW332) {
        uint8x16_t both = vld1q_u8(nibbles + 32);
        quad[2].step = step_of(half ? high_nibbles(both) : low_nibbles(both));
    } else {
        uint8x16_t second = vld1q_u8(nibbles + 32 + 16 * half);
        quad[2].step = step_of(low_nibbles(second));
        quad[3].step = step_of(high_nibbles(second));
    }
    uint8x16_t narrow = index;
    if (layout == SQFT_WINDOW3) {
        uint8x16_t both = vld1q_u8(p + 32);
        narrow = half ? high_nibbles(both) : low_nibbles(both);
    }
    return place_quads(layout, index, narrow, quad);
}

/* 4 lanes, one for each row of a half: the sums of a block for each of n vectors. */
INLINE void block_sums(const int layout, const uint8_t *p, const int half, vectors x, const int n, int64_t b,
                       int32x4_t *sum) {
    if (layout == SQFT_DENSE || layout == SQFT_BYTES) {
        int8x16_t step[8];
        for (int k = 0; k < 8; k++) {
            uint8x16_t in = vld1q_u8(p + 32 * (layout == SQFT_DENSE ? k / 2 : k) + 16 * half);
            if (layout == SQFT_DENSE)
                step[k] = step_of(k % 2 ? high_nibbles(in) : low_nibbles(in));
            else
                step[k] = vreinterpretq_s8_u8(in);
        }
        for (int v = 0; v < n; v++) {
            const int8_t *q = x[v].q + b * SQFT_BLOCK;
            sum[v] = vdupq_n_s32(0);
            for (int k = 0; k < 8; k++) sum[v] = add_products(sum[v], step[k], broadcast4(q + 4 * k));
        }
    } else if (layout == SQFT_MASK8) {
        uint8x16_t at[4]; /* two rows: first and second 16 columns; the next two rows */
        int8x16_t step[4];
        for (int k = 0; k < 4; k++) {
            const uint8_t *mask = p + 8 * k + 4 * half;
            at[k] = vcombine_u8(vcreate_u8(kept_positions(mask)), vcreate_u8(kept_positions(mask + 2)));
            uint8x16_t both = vld1q_u8(p + 32 + 32 * (k / 2) + 16 * half);
            step[k] = step_of(k % 2 ? high_nibbles(both) : low_nibbles(both));
        }
        for (int v = 0; v < n; v++) {
            const int8_t *q = x[v].q + b * SQFT_BLOCK;
            int32x4_t rows[2] = {vdupq_n_s32(0), vdupq_n_s32(0)}; /* two lanes for each row */
            for (int k = 0; k < 4; k++)
                rows[k / 2] = add_products(rows[k / 2], step[k], vqtbl1q_s8(vld1q_s8(q + 16 * (k % 2)), at[k]));
            sum[v] = vpaddq_s32(rows[0], rows[1]);
        }
    } else {
        struct quad quad[4];
        int count = decode_quads(layout, p, half, quad);
        for (int v = 0; v < n; v++) {
            const int8_t *q = x[v].q + b * SQFT_BLOCK;
            sum[v] = vdupq_n_s32(0);
            for (int h = 0; h < count; h++)
                sum[v] = add_products(sum[v], quad[h].step, vqtbl1q_s8(vld1q_s8(q + quad[h].base), quad[h].at));
        }
    }
}

/* Rows first..last for n vectors. */
INLINE void stripes(const int layout, const int ratio, const int n, const struct sqft_weight *w, vectors x,
                    int64_t first, int64_t last, float *y) {
    const int64_t groups = w->columns / w->group, bytes = sqft_stripe_bytes(w);
    const int block_bytes = sqft_block_bytes(layout);
    for (int64_t row = first; row < last; row += SQFT_LANES) {
        const uint8_t *p = w->data + row / SQFT_LANES * bytes;
        float32x4_t total[2][8];
        for (int v = 0; v < n; v++) total[0][v] = total[1][v] = vdupq_n_f32(0);
        for (int64_t g = 0, b = 0; g < groups; g++) {
            float16x8_t half_scales = vreinterpretq_f16_u8(vld1q_u8(p));
            float32x4_t scale[2] = {vcvt_f32_f16(vget_low_f16(half_scales)), vcvt_high_f32_f16(half_scales)};
            p += 2 * SQFT_LANES;
            for (int k = 0; k < ratio; k++, b++, p += block_bytes) {
                for (int line = 0; line < block_bytes; line += 64) __builtin_prefetch(p + AHEAD + line);
                for (int half = 0; half < 2; half++) {
                    int32x4_t sum[8];
                    block_sums(layout, p, half, x, n, b, sum);
                    for (int v = 0; v < n; v++) {
                        float32x4_t factor = vmulq_n_f32(scale[half], x[v].scale[b]);
                        total[half][v] = vfmaq_f32(total[half][v], factor, vcvtq_f32_s32(sum[v]));
                    }
                }
            }
        }
        for (int v = 0; v < n; v++) {
            float out[SQFT_LANES];
            int64_t there = last - row < SQFT_LANES ? last - row : SQFT_LANES;
            vst1q_f32(out, total[0][v]);
            vst1q_f32(out + 4, total[1][v]);
            memcpy(y + v * w->rows + row, out, sizeof(float) * (size_t)there);
        }
    }
}

#define COPY(NAME, LAYOUT, N)                                                                                        \
    TARGET static void NAME##_##N(const struct sqft_weight *w, vectors x, int64_t first, int64_t last, float *y) {     \
        if (w->group == 64)                                                                                          \
            stripes(LAYOUT, 2, N, w, x, first, last, y);                                                             \
        else                                                                                                         \
            stripes(LAYOUT, 1, N, w, x, first, last, y);                                                             \
    }
#define COPIES(NAME, LAYOUT) COPY(NAME, LAYOUT, 1) COPY(NAME, LAYOUT, 2) COPY(NAME, LAYOUT, 4)

COPIES(dense, SQFT_DENSE)
COPIES(window2, SQFT_WINDOW2)
COPIES(window3, SQFT_WINDOW3)
COPIES(window332, SQFT_WINDOW332)
COPIES(index4, SQFT_INDEX4)
COPIES(mask8, SQFT_MASK8)
COPIES(bytes, SQFT_BYTES)

typedef void kernel(const struct sqft_weight *w, vectors x, int64_t first, int64_t last, float *y);
#define ROW(NAME) {NAME##_1, NAME##_2, NAME##_4}
static kernel *const kernels[SQFT_LAYOUTS][3] = {
    [SQFT_DENSE] = ROW(dense),         [SQFT_WINDOW2] = ROW(window2), [SQFT_WINDOW3] = ROW(window3),
    [SQFT_WINDOW332] = ROW(window332), [SQFT_INDEX4] = ROW(index4),   [SQFT_MASK8] = ROW(mask8),
    [SQFT_BYTES] = ROW(bytes),
};

/* Arbitrary masks are left to the plain kernels. */
static void multiply_rows(const struct sqft_weight *w, vectors x, int batch, int64_t first, int64_t last, float *y) {
    if (!kernels[w->layout][0]) {
        sqft_plain.rows(w, x, batch, first, last, y);
        return;
    }
    for (int done = 0; done < batch;) {
        int left = batch - done, size = left >= 4 ? 2 : left >= 2 ? 1 : 0;
        kernels[w->layout][size](w, x + done, first, last, y + done * w->rows);
        done += 1 << size;
    }
}

static void quantize(const float *x, int64_t blocks, const struct sqft_activation *a) {
    sqft_plain.quantize(x, blocks, a);
}
