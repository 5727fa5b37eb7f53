/* Kernels for CPUs with AVX-512 VNNI and VBMI2: Intel since Ice Lake, AMD since Zen 4. Registers stay 256 bits wide. */
#if defined(__x86_64__)
#define TARGET \
    __attribute__((target("avx2,fma,bmi,bmi2,f16c,popcnt,avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi2")))
#define VNNI 1
#include "x86.h"

const struct sqft_kernels sqft_avx512 = {quantize, multiply_rows};
#endif
