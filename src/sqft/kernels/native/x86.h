/* Kernels for x86, included by avx2.c and avx512.c, which say what TARGET is and whether there is VNNI (dot products
 * of four bytes). One template for all layouts that interleave 8 rows: a register has a lane of 32 bits for each row.
 * Copies for 1, 2, 4 and 8 vectors decode the weight once for all of them. */
#include <immintrin.h>

#include "layouts.h"
#include "positions.h"

#define INLINE static inline __attribute__((always_inline)) TARGET
#define AHEAD 4096 /* bytes that are fetched before they are needed: a processor's own prefetcher stops at a page */

typedef const struct sqft_activation *vectors;

INLINE __m256i load(const void *at) { return _mm256_loadu_si256(at); }
INLINE __m256i low_nibbles(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE __m256i high_nibbles(__m256i x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
INLINE __m256i field(__m256i x, int shift, int mask) {
    return _mm256_and_si256(_mm256_srli_epi32(x, shift), _mm256_set1_epi8((char)mask));
}
/* 16 bytes: a nibble for each slot; rows 0-3 low, rows 4-7 high. */
INLINE __m256i spread_nibbles(const void *at) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(at));
    return low_nibbles(_mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)));
}
typedef __m256i bytes;
INLINE bytes add_bytes(bytes x, bytes y) { return _mm256_add_epi8(x, y); }
INLINE bytes or_bytes(bytes x, bytes y) { return _mm256_or_si256(x, y); }
INLINE __m256i four(int a, int b, int c, int d) { return _mm256_set1_epi32(a | b << 8 | c << 16 | d << 24); }

/* Positions of slots 4 quad .. 4 quad + 3, from the column `base` of the block on, and their codes. */
struct quad {
    __m256i at, code;
    int base;
};

#include "windows.h"

/* The quads of a block, for layouts with slots. Returns how many there are. */
INLINE int decode_quads(const int layout, const uint8_t *p, struct quad *quad) {
    if (layout == SQFT_INDEX4) {
        for (int k = 0; k < 2; k++) {
            __m256i x = load(p + 32 * k);
            quad[k] = (struct quad){low_nibbles(x), high_nibbles(x), 16 * k};
        }
        return 2;
    }
    __m256i index = load(p);
    const uint8_t *nibbles = p + (layout == SQFT_WINDOW3 ? 48 : 32);
    __m256i first = load(nibbles);
    quad[0].code = low_nibbles(first);
    quad[1].code = high_nibbles(first);
    if (layout == SQFT_WINDOW332) {
        quad[2].code = spread_nibbles(nibbles + 32);
    } else {
        __m256i second = load(nibbles + 32);
        quad[2].code = low_nibbles(second);
        quad[3].code = high_nibbles(second);
    }
    return place_quads(layout, index, layout == SQFT_WINDOW3 ? spread_nibbles(p + 32) : index, quad);
}

/* Products of codes 0..15 with bytes, added up: as pairs of 16 bits, or with VNNI as fours of 32 bits. At most 8
 * pairs of 15 * 127 * 2 fit 16 bits. */
INLINE __m256i add_products(__m256i sum, __m256i code, __m256i a) {
#if VNNI
    return _mm256_dpbusd_epi32(sum, code, a);
#else
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(code, a));
#endif
}
INLINE __m256i subtract(__m256i sum, __m256i other) {
    return VNNI ? _mm256_sub_epi32(sum, other) : _mm256_sub_epi16(sum, other);
}
INLINE __m256i in_lanes(__m256i sum) { return VNNI ? sum : _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

/* Sums of products of a block for one vector, where positions are looked up. */
INLINE __m256i sum_quads(const int count, const struct quad *quad, const int8_t *q) {
    __m256i sum = _mm256_setzero_si256(), eights = sum;
    for (int h = 0; h < count; h++) {
        __m256i window = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(q + quad[h].base)));
        __m256i a = _mm256_shuffle_epi8(window, quad[h].at);
        sum = add_products(sum, quad[h].code, a);
        eights = add_products(eights, _mm256_set1_epi8(8), a);
    }
    return in_lanes(subtract(sum, eights));
}

INLINE __m256i mask_positions(const uint8_t *p) {
    return _mm256_set_epi64x((long long)kept_positions(p + 6), (long long)kept_positions(p + 4),
                             (long long)kept_positions(p + 2), (long long)kept_positions(p));
}

/* 8 lanes, one for each row: the sums of a block for each of n vectors. */
INLINE void block_sums(const int layout, const uint8_t *p, vectors x, const int n, int64_t b, __m256i *sum) {
    const __m256i eight = _mm256_set1_epi8(8);
    if (layout == SQFT_DENSE) {
        __m256i code[8];
        for (int k = 0; k < 4; k++) {
            __m256i both = load(p + 32 * k);
            code[2 * k] = low_nibbles(both), code[2 * k + 1] = high_nibbles(both);
        }
        for (int v = 0; v < n; v++) {
            const int32_t *q = (const int32_t *)(x[v].q + b * SQFT_BLOCK);
            __m256i s = _mm256_setzero_si256();
            for (int k = 0; k < 8; k++) s = add_products(s, code[k], _mm256_set1_epi32(q[k]));
            sum[v] = _mm256_sub_epi32(in_lanes(s), _mm256_set1_epi32(x[v].sum8[b]));
        }
    } else if (layout == SQFT_BYTES) {
        for (int v = 0; v < n; v++) {
            const int32_t *q = (const int32_t *)(x[v].q + b * SQFT_BLOCK);
            sum[v] = _mm256_setzero_si256();
            for (int k = 0; k < 8; k++) {
                __m256i a = _mm256_set1_epi32(q[k]);
                __m256i size = _mm256_abs_epi8(a), signed_step = _mm256_sign_epi8(load(p + 32 * k), a);
                sum[v] = _mm256_add_epi32(
                    sum[v], in_lanes(add_products(_mm256_setzero_si256(), size, signed_step)));
            }
        }
    } else if (layout == SQFT_MASK8) {
        __m256i at[4], code[4]; /* rows 0, 1, 4, 5: first and second 16 columns; rows 2, 3, 6, 7 */
        for (int k = 0; k < 4; k++) at[k] = mask_positions(p + 8 * k);
        for (int k = 0; k < 2; k++) {
            __m256i both = load(p + 32 + 32 * k);
            code[2 * k] = low_nibbles(both), code[2 * k + 1] = high_nibbles(both);
        }
        for (int v = 0; v < n; v++) {
            const int8_t *q = x[v].q + b * SQFT_BLOCK;
            __m256i half[2], s[2];
            for (int k = 0; k < 2; k++)
                half[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(q + 16 * k)));
            for (int k = 0; k < 2; k++) {
                __m256i a = _mm256_shuffle_epi8(half[0], at[2 * k]), c = _mm256_shuffle_epi8(half[1], at[2 * k + 1]);
                __m256i plus = add_products(_mm256_setzero_si256(), code[2 * k], a);
                __m256i eights = add_products(_mm256_setzero_si256(), eight, a);
                plus = add_products(plus, code[2 * k + 1], c);
                eights = add_products(eights, eight, c);
                s[k] = in_lanes(subtract(plus, eights));
            }
            sum[v] = _mm256_hadd_epi32(s[0], s[1]);
        }
    } else {
        struct quad quad[4];
        int count = decode_quads(layout, p, quad);
        for (int v = 0; v < n; v++) sum[v] = sum_quads(count, quad, x[v].q + b * SQFT_BLOCK);
    }
}

/* Rows first..last for n vectors. */
INLINE void stripes(const int layout, const int ratio, const int n, const struct sqft_weight *w, vectors x,
                    int64_t first, int64_t last, float *y) {
    const int64_t groups = w->columns / w->group, bytes = sqft_stripe_bytes(w);
    const int block_bytes = sqft_block_bytes(layout);
    for (int64_t row = first; row < last; row += SQFT_LANES) {
        const uint8_t *p = w->data + row / SQFT_LANES * bytes;
        __m256 total[8];
        for (int v = 0; v < n; v++) total[v] = _mm256_setzero_ps();
        for (int64_t g = 0, b = 0; g < groups; g++) {
            __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
            p += 2 * SQFT_LANES;
            for (int k = 0; k < ratio; k++, b++, p += block_bytes) {
                __m256i sum[8];
                const int with_scales = block_bytes + (k == 0 ? 2 * SQFT_LANES : 0); /* or lines would be left out */
                for (int line = 0; line < with_scales; line += 64) _mm_prefetch((const char *)p + AHEAD + line, _MM_HINT_T0);
                block_sums(layout, p, x, n, b, sum);
                for (int v = 0; v < n; v++) {
                    __m256 factor = _mm256_mul_ps(scale, _mm256_broadcast_ss(x[v].scale + b));
                    total[v] = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(sum[v]), total[v]);
                }
            }
        }
        for (int v = 0; v < n; v++) {
            float out[SQFT_LANES];
            int64_t there = last - row < SQFT_LANES ? last - row : SQFT_LANES;
            _mm256_storeu_ps(out, total[v]);
            memcpy(y + v * w->rows + row, out, sizeof(float) * (size_t)there);
        }
    }
}

/* 32 codes of SQFT_MASK, 8 where nothing is kept, in the order of `split` (AVX2) or `q` (AVX-512). */
INLINE __m256i spread_kept(const uint8_t *nibbles, uint32_t mask) {
    const __m256i eight = _mm256_set1_epi8(8);
#if VNNI
    __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)nibbles));
    __m256i code = low_nibbles(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)));
    return _mm256_mask_expand_epi8(eight, mask, _mm256_xor_si256(code, eight));
#else
    uint64_t first, second, nibble = 0x1111111111111111ull;
    uint32_t low = mask & 0xffff, count = (uint32_t)__builtin_popcount(low);
    memcpy(&first, nibbles, 8);
    memcpy(&second, nibbles + (count >> 1), 8); /* packing sees to it that no nibble is lost by the shift */
    first = _pdep_u64(first, _pdep_u64(low, nibble) * 15);
    second = _pdep_u64(second >> (count & 1) * 4, _pdep_u64(mask >> 16, nibble) * 15);
    __m128i both = _mm_set_epi64x((long long)second, (long long)first);
    __m256i code = low_nibbles(_mm256_set_m128i(_mm_srli_epi16(both, 4), both));
    return _mm256_xor_si256(code, eight); /* two's complement to step + 8 */
#endif
}

/* Rows first..last of SQFT_MASK: each row for itself, 32 columns a register. */
INLINE void mask_rows(const int n, const struct sqft_weight *w, vectors x, int64_t first, int64_t last, float *y) {
    const int64_t blocks = w->columns / SQFT_BLOCK, groups = w->columns / w->group;
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const int8_t *q[8];
    for (int v = 0; v < n; v++) q[v] = VNNI ? x[v].q : x[v].split;
    for (int64_t row = first; row < last; row++) {
        const uint8_t *scales = sqft_mask_row(w, row), *masks = scales + 2 * groups, *nibbles = masks + 4 * blocks;
        __m256 total[8], eights[8];
        for (int v = 0; v < n; v++) total[v] = eights[v] = _mm256_setzero_ps();
        for (int64_t b = 0; b < blocks; b += 8) {
            float factor[8][8];
            int there = blocks - b < 8 ? (int)(blocks - b) : 8;
            __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(scales + 64 * b / w->group)));
            if (w->group == 64) scale = _mm256_permutevar8x32_ps(scale, twice);
            /* What was read behind the scales of a row must not count. */
            __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(there), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            scale = _mm256_and_ps(scale, _mm256_castsi256_ps(inside));
            for (int v = 0; v < n; v++) {
                __m256 f = _mm256_mul_ps(scale, _mm256_loadu_ps(x[v].scale + b));
                eights[v] = _mm256_fmadd_ps(f, _mm256_cvtepi32_ps(load(x[v].sum8 + b)), eights[v]);
                _mm256_storeu_ps(factor[v], f);
            }
            for (int k = 0; k < there; k++) {
                uint32_t mask;
                memcpy(&mask, masks + 4 * (b + k), 4);
                __m256i code = spread_kept(nibbles, mask);
                nibbles += (__builtin_popcount(mask) + 1) >> 1;
                for (int v = 0; v < n; v++) {
                    __m256i sum = add_products(_mm256_setzero_si256(), code, load(q[v] + (b + k) * SQFT_BLOCK));
                    __m256 whole = _mm256_cvtepi32_ps(in_lanes(sum));
                    total[v] = _mm256_fmadd_ps(_mm256_broadcast_ss(factor[v] + k), whole, total[v]);
                }
            }
        }
        for (int v = 0; v < n; v++) {
            __m256 sum = _mm256_sub_ps(total[v], eights[v]);
            __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
            half = _mm_add_ps(half, _mm_movehl_ps(half, half));
            half = _mm_add_ss(half, _mm_movehdup_ps(half));
            _mm_store_ss(y + v * w->rows + row, half);
        }
    }
}

/* One vector onto its grid, as in multiply.c, for whole blocks. */
TARGET static void quantize(const float *x, int64_t blocks, const struct sqft_activation *a) {
    for (int64_t b = 0; b < blocks; b++, x += SQFT_BLOCK) {
        __m256 part[4], unordered = _mm256_setzero_ps(), largest = unordered;
        for (int k = 0; k < 4; k++) {
            part[k] = _mm256_loadu_ps(x + 8 * k);
            unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(part[k], part[k], _CMP_UNORD_Q));
            largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), part[k]));
        }
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        half = _mm_max_ss(half, _mm_movehdup_ps(half));
        int none = _mm256_movemask_ps(unordered);
        float inverse = sqft_set_scale(a, b, none ? NAN : _mm_cvtss_f32(half));
        __m256i whole[4], sum = _mm256_setzero_si256();
        for (int k = 0; k < 4; k++) {
            whole[k] = inverse == 0 ? sum : _mm256_cvtps_epi32(_mm256_mul_ps(part[k], _mm256_set1_ps(inverse)));
            if (inverse == 0) whole[k] = _mm256_setzero_si256();
        }
        sum = _mm256_add_epi32(_mm256_add_epi32(whole[0], whole[1]), _mm256_add_epi32(whole[2], whole[3]));
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((void *)(a->q + b * SQFT_BLOCK), bytes);
        const __m256i apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10,
                                               12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, apart), 0xd8);
        _mm256_storeu_si256((void *)(a->split + b * SQFT_BLOCK), bytes);
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
        a->sum8[b] = 8 * _mm_cvtsi128_si32(four);
    }
}

#define COPY(NAME, LAYOUT, N)                                                                                        \
    TARGET static void NAME##_##N(const struct sqft_weight *w, vectors x, int64_t first, int64_t last, float *y) {     \
        if (w->group == 64)                                                                                          \
            stripes(LAYOUT, 2, N, w, x, first, last, y);                                                             \
        else                                                                                                         \
            stripes(LAYOUT, 1, N, w, x, first, last, y);                                                             \
    }
#define COPIES(NAME, LAYOUT) COPY(NAME, LAYOUT, 1) COPY(NAME, LAYOUT, 2) COPY(NAME, LAYOUT, 4) COPY(NAME, LAYOUT, 8)
#define MASK_COPY(N)                                                                                                 \
    TARGET static void mask_##N(const struct sqft_weight *w, vectors x, int64_t first, int64_t last, float *y) {       \
        mask_rows(N, w, x, first, last, y);                                                                          \
    }

COPIES(dense, SQFT_DENSE)
COPIES(window2, SQFT_WINDOW2)
COPIES(window3, SQFT_WINDOW3)
COPIES(window332, SQFT_WINDOW332)
COPIES(index4, SQFT_INDEX4)
COPIES(mask8, SQFT_MASK8)
COPIES(bytes, SQFT_BYTES)
MASK_COPY(1) MASK_COPY(2) MASK_COPY(4) MASK_COPY(8)

typedef void kernel(const struct sqft_weight *w, vectors x, int64_t first, int64_t last, float *y);
#define ROW(NAME) {NAME##_1, NAME##_2, NAME##_4, NAME##_8}
static kernel *const kernels[SQFT_LAYOUTS][4] = {ROW(dense),  ROW(window2), ROW(window3), ROW(window332),
                                                 ROW(index4), ROW(mask8),   ROW(mask),    ROW(bytes)};

static void multiply_rows(const struct sqft_weight *w, vectors x, int batch, int64_t first, int64_t last, float *y) {
    for (int done = 0; done < batch;) {
        int left = batch - done, size = left >= 8 ? 3 : left >= 4 ? 2 : left >= 2 ? 1 : 0;
        kernels[w->layout][size](w, x + done, first, last, y + done * w->rows);
        done += 1 << size;
    }
}
