/* Kernels for 64-bit ARM with nothing but NEON, which all of them have. */
#if defined(__aarch64__)
#define TARGET
#define DOT 0
#include "arm.h"

const struct sqft_kernels sqft_neon = {quantize, multiply_rows};
#endif
