/* Tables by which SQFT_MASK8 is decoded; one copy for each instruction set. */
#ifndef SQFT_POSITIONS_H
#define SQFT_POSITIONS_H

#include <stdint.h>

/* Positions of the kept of a mask of 8 columns: packed from the first byte on, or up to the last one. */
static uint64_t kept_first[256], kept_last[256];

__attribute__((constructor)) static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++) {
        int used = 0, count = __builtin_popcount((unsigned)mask);
        for (int c = 0; c < 8; c++) {
            if (!(mask >> c & 1)) continue;
            kept_first[mask] |= (uint64_t)c << 8 * used;
            kept_last[mask] |= (uint64_t)(8 + c) << 8 * (8 - count + used);
            used++;
        }
    }
}

/* Positions of the 8 that are kept of 16 columns, one a byte. */
static inline uint64_t kept_positions(const uint8_t *mask) { return kept_first[mask[0]] | kept_last[mask[1]]; }

#endif
