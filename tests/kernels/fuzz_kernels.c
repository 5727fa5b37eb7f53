/* Random shapes, layouts and batches through the CPU kernels, under sanitizers: every buffer ends where it is said to.
 * usage: fuzz_kernels ROUNDS SEED. Exits with 1 and one line if a result differs from the plain kernels'. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sqft_cpu.h"

static uint64_t state;

static uint32_t draw(uint32_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}

/* Steps that may or may not fit a layout: some columns of each 16 or 32. */
static void draw_steps(int layout, int64_t count, int8_t *steps) {
    int density = 1 + (int)draw(16), byte = layout == SQFT_BYTES;
    for (int64_t i = 0; i < count; i++) {
        int value = byte ? (int)draw(255) - 127 : (int)draw(16) - 8;
        int keep = (int)draw(16) < density;
        if (layout == SQFT_WINDOW2) keep = i % 2 == 0; /* always fits */
        if (layout == SQFT_INDEX4) keep = i % 16 < 4;
        if (layout == SQFT_WINDOW3 || layout == SQFT_MASK8) keep = (i / (1 + density % 2)) % 2;
        if (layout == SQFT_WINDOW332) keep = i % 8 < 3;
        steps[i] = (int8_t)(keep ? value : 0);
    }
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 100, fitted = 0;
    state = argc > 2 ? (uint64_t)atoll(argv[2]) : 1;
    for (int round = 0; round < rounds; round++) {
        int layout = (int)draw(SQFT_LAYOUTS), group = draw(2) ? 64 : 32, batch = 1 + (int)draw(18);
        int64_t rows = 1 + draw(40), columns = 1 + draw(400), groups = (columns + group - 1) / group;
        int8_t *steps = malloc((size_t)(rows * columns));
        uint16_t *scales = malloc(2 * (size_t)(rows * groups));
        draw_steps(layout, rows * columns, steps);
        for (int64_t i = 0; i < rows * groups; i++) scales[i] = (uint16_t)(0x2000 + draw(0x1000));
        int64_t bytes = sqft_packed_bytes(layout, group, rows, columns, steps);
        uint8_t *data = malloc((size_t)bytes + 64);
        memset(data, (int)draw(256), (size_t)bytes + 64);
        if (sqft_pack(layout, group, rows, columns, steps, scales, data) == 0) {
            struct sqft_weight weight = {layout, group, rows, groups * group, data};
            float *x = malloc(sizeof(float) * (size_t)(batch * columns)), *y[SQFT_ISAS];
            int8_t *row = malloc((size_t)weight.columns);
            float *scale = malloc(sizeof(float) * (size_t)groups);
            fitted++;
            for (int64_t r = 0; r < rows; r++) {
                sqft_unpack_row(&weight, r, row, scale);
                if (memcmp(row, steps + r * columns, (size_t)columns)) return printf("steps differ\n"), 1;
            }
            for (int64_t i = 0; i < batch * columns; i++) x[i] = (float)draw(2001) / 1000 - 1;
            for (int isa = 0; isa < SQFT_ISAS; isa++) {
                y[isa] = malloc(sizeof(float) * (size_t)(batch * rows));
                sqft_use_isa(isa);
                if (sqft_multiply(&weight, x, columns, batch, y[isa], 1 + (int)draw(4))) return printf("memory\n"), 1;
                for (int64_t i = 0; i < batch * rows; i++)
                    if (!(fabsf(y[isa][i] - y[0][i]) <= 1e-3f * (1 + fabsf(y[0][i]))))
                        return printf("layout %d, %d, isa %d: %g, not %g\n", layout, group, isa, y[isa][i], y[0][i]), 1;
            }
            for (int isa = 0; isa < SQFT_ISAS; isa++) free(y[isa]);
            free(x), free(row), free(scale);
        }
        free(steps), free(scales), free(data);
    }
    printf("%d of %d fitted\n", fitted, rounds);
    return 0;
}
