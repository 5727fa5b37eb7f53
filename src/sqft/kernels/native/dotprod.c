/* Kernels for 64-bit ARM with dot products of four bytes: Armv8.2 and later, so nearly all since 2018. */
#if defined(__aarch64__)
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define DOT 1
#include "arm.h"

const struct sqft_kernels sqft_dotprod = {quantize, multiply_rows};
#endif
