/* Kernels for CPUs with AVX2, FMA, BMI2 and F16C: Intel since Haswell, AMD since Zen. */
#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma,bmi,bmi2,f16c,popcnt")))
#define VNNI 0
#include "x86.h"

const struct sqft_kernels sqft_avx2 = {quantize, multiply_rows};
#endif
