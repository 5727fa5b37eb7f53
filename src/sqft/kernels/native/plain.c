/* Without instructions of any CPU: a row is unpacked, then multiplied. */
#include <stdlib.h>

#include "layouts.h"

static void quantize(const float *x, int64_t blocks, const struct sqft_activation *a) {
    for (int64_t b = 0; b < blocks; b++, x += SQFT_BLOCK) {
        float largest = 0, inverse;
        int32_t sum = 0;
        for (int i = 0; i < SQFT_BLOCK; i++) {
            float size = fabsf(x[i]);
            largest = size > largest || size != size ? size : largest; /* what is not a number stays */
        }
        inverse = sqft_set_scale(a, b, largest);
        for (int i = 0; i < SQFT_BLOCK; i++) {
            /* Adding and taking away 1.5 * 2^23 rounds to the nearest, ties to even. */
            float rounded = inverse == 0 ? 0 : (x[i] * inverse + 12582912.0f) - 12582912.0f;
            int8_t step = (int8_t)rounded;
            a->q[b * SQFT_BLOCK + i] = step;
            a->split[b * SQFT_BLOCK + 16 * (i & 1) + (i >> 1)] = step;
            sum += step;
        }
        a->sum8[b] = 8 * sum;
    }
}

static void multiply_rows(const struct sqft_weight *w, const struct sqft_activation *x, int batch, int64_t first,
                          int64_t last, float *y) {
    int64_t blocks = w->columns / SQFT_BLOCK, ratio = w->group / SQFT_BLOCK;
    int8_t *steps = malloc((size_t)(w->columns + 4 * (blocks / ratio)));
    float *scales = (float *)(steps + w->columns); /* columns are whole blocks of 32, so it is aligned */
    for (int64_t r = first; r < last; r++) {
        if (steps) sqft_unpack_row(w, r, steps, scales);
        for (int v = 0; v < batch; v++) {
            float sum = steps ? 0 : NAN;
            for (int64_t b = 0; steps && b < blocks; b++) {
                int32_t whole = 0;
                for (int64_t c = b * SQFT_BLOCK; c < (b + 1) * SQFT_BLOCK; c++) whole += steps[c] * x[v].q[c];
                sum += scales[b / ratio] * x[v].scale[b] * (float)whole;
            }
            y[v * w->rows + r] = sum;
        }
    }
    free(steps);
}

const struct sqft_kernels sqft_plain = {quantize, multiply_rows};
