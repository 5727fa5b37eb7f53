/* The product: activations onto their grid, rows shared out among threads, the best instructions that are there. */
#include <math.h>
#include <stdlib.h>

#include "layouts.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#define HAS_DOTPROD (getauxval(AT_HWCAP) >> 20 & 1) /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
#define HAS_DOTPROD 1
#else
#define HAS_DOTPROD 0
#endif

#define BATCH 8     /* vectors that are multiplied in one pass over the weight */
#define PAD 64      /* bytes behind the activations that kernels may read */
#define SMALL 65536 /* weights worth a thread of their own */

static int chosen_isa = -1;

static int best_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                 __builtin_cpu_supports("avx512vbmi2");
    return avx512 ? SQFT_AVX512 : avx2 ? SQFT_AVX2 : SQFT_PLAIN;
#elif defined(__aarch64__)
    return HAS_DOTPROD ? SQFT_DOTPROD : SQFT_NEON;
#else
    return SQFT_PLAIN;
#endif
}

int sqft_abi(void) { return SQFT_ABI; }

int sqft_isa(void) {
    if (chosen_isa < 0) chosen_isa = best_isa();
    return chosen_isa;
}

int sqft_use_isa(int isa) {
    int best = best_isa(), least = best >= SQFT_NEON ? SQFT_NEON : SQFT_AVX2;
    chosen_isa = isa < least ? SQFT_PLAIN : isa < best ? isa : best;
    return chosen_isa;
}

static const struct sqft_kernels *kernels_of(int isa) {
#if defined(__x86_64__)
    if (isa == SQFT_AVX512) return &sqft_avx512;
    if (isa == SQFT_AVX2) return &sqft_avx2;
#elif defined(__aarch64__)
    if (isa == SQFT_DOTPROD) return &sqft_dotprod;
    if (isa == SQFT_NEON) return &sqft_neon;
#endif
    (void)isa;
    return &sqft_plain;
}

struct product {
    const struct sqft_weight *weight;
    const struct sqft_activation *x;
    const struct sqft_kernels *kernels;
    float *y;
    int64_t chunk;
    int batch;
};

static void multiply_part(void *context, int64_t part) {
    const struct product *p = context;
    int64_t first = part * p->chunk, last = first + p->chunk;
    if (last > p->weight->rows) last = p->weight->rows;
    p->kernels->rows(p->weight, p->x, p->batch, first, last, p->y);
}

int64_t sqft_activation_bytes(int64_t padded) {
    return 2 * sqft_round_up(padded + PAD, 64) + 2 * sqft_round_up(padded / SQFT_BLOCK, 16) * 4;
}

static struct sqft_activation activation_at(uint8_t *memory, int64_t padded) {
    int64_t values = sqft_round_up(padded + PAD, 64), blocks = sqft_round_up(padded / SQFT_BLOCK, 16);
    float *scale = (float *)(memory + 2 * values);
    return (struct sqft_activation){(int8_t *)memory, (int8_t *)memory + values, scale, (int32_t *)(scale + blocks)};
}

void sqft_quantize_vector(const float *x, int64_t columns, int64_t padded, uint8_t *memory) {
    const struct sqft_kernels *kernels = kernels_of(sqft_isa());
    struct sqft_activation activation = activation_at(memory, padded), *a = &activation;
    int64_t whole = columns / SQFT_BLOCK, blocks = padded / SQFT_BLOCK;
    memset(a->scale, 0, (size_t)(8 * sqft_round_up(blocks, 16)));
    kernels->quantize(x, whole, a);
    for (int64_t b = whole; b < blocks; b++) {
        float values[SQFT_BLOCK] = {0};
        struct sqft_activation end = {a->q + b * SQFT_BLOCK, a->split + b * SQFT_BLOCK, a->scale + b, a->sum8 + b};
        if (b == whole) memcpy(values, x + b * SQFT_BLOCK, sizeof(float) * (size_t)(columns - b * SQFT_BLOCK));
        kernels->quantize(values, 1, &end);
    }
}

int sqft_multiply(const struct sqft_weight *w, const float *x, int64_t columns, int64_t batch, float *y, int threads) {
    int64_t each = sqft_activation_bytes(w->columns), together = batch < BATCH ? batch : BATCH;
    uint8_t *memory = aligned_alloc(64, (size_t)(together * each));
    if (!memory) return -1;
    struct sqft_activation a[BATCH];
    struct product product = {w, a, kernels_of(sqft_isa()), y, 0, 0};
    int64_t most = w->rows * w->columns * together / SMALL + 1;
    if (threads > most) threads = (int)most;
    if (threads < 1) threads = 1;
    /* A few parts for each thread, so that one that is held up does not hold up all. */
    int64_t stripes = (w->rows + SQFT_LANES - 1) / SQFT_LANES, parts = threads == 1 ? 1 : 4 * (int64_t)threads;
    int64_t in_part = (stripes + parts - 1) / parts;
    product.chunk = in_part * SQFT_LANES;
    for (int64_t done = 0; done < batch; done += product.batch) {
        product.batch = (int)(batch - done < BATCH ? batch - done : BATCH);
        for (int v = 0; v < product.batch; v++) {
            sqft_quantize_vector(x + (done + v) * columns, columns, w->columns, memory + v * each);
            a[v] = activation_at(memory + v * each, w->columns);
        }
        product.y = y + done * w->rows;
        sqft_parallel(multiply_part, &product, (stripes + in_part - 1) / in_part, threads);
    }
    free(memory);
    return 0;
}

void sqft_multiply_rows(const struct sqft_weight *w, uint8_t *memory, int64_t batch, int64_t first, int64_t last,
                        float *y) {
    const struct sqft_kernels *kernels = kernels_of(sqft_isa());
    int64_t each = sqft_activation_bytes(w->columns);
    struct sqft_activation a[BATCH];
    for (int64_t done = 0; done < batch; done += BATCH) {
        int count = (int)(batch - done < BATCH ? batch - done : BATCH);
        for (int v = 0; v < count; v++) a[v] = activation_at(memory + (done + v) * each, w->columns);
        kernels->rows(w, a, count, first, last, y + done * w->rows);
    }
}
