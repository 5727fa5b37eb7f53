/* Where the slots of windowed layouts lie (layouts.h), said once for every instruction set. Included by x86.h and arm.h,
 * which before that say what a register of `bytes` is, its operations field, four, add_bytes and or_bytes, and struct
 * quad. */
#ifndef SQFT_WINDOWS_H
#define SQFT_WINDOWS_H

/* Sets positions and bases of the quads of a block; returns how many there are. index: the bytes with what is in one
 * for each row and quad; narrow: a nibble for each slot with the rest of it, of windows of 3 bits alone. */
INLINE int place_quads(const int layout, bytes index, bytes narrow, struct quad *quad) {
    if (layout == SQFT_WINDOW332) {
        quad[0].at = add_bytes(field(index, 0, 7), four(0, 0, 2, 5)), quad[0].base = 0;
        quad[1].at = add_bytes(field(index, 3, 7), four(0, 2, 5, 8)), quad[1].base = 8;
        quad[2].at = add_bytes(field(index, 6, 3), four(4, 7, 10, 12)), quad[2].base = 16;
        return 3;
    }
    if (layout == SQFT_WINDOW2) {
        quad[0].at = add_bytes(field(index, 0, 3), four(0, 1, 3, 5)), quad[0].base = 0;
        quad[1].at = add_bytes(field(index, 2, 3), four(0, 2, 4, 6)), quad[1].base = 7;
        quad[2].at = add_bytes(field(index, 4, 3), four(0, 2, 4, 6)), quad[2].base = 15;
        quad[3].at = add_bytes(field(index, 6, 3), four(7, 9, 11, 12)), quad[3].base = 16;
        return 4;
    }
    quad[0].at = add_bytes(field(index, 0, 7), four(0, 0, 1, 3)), quad[0].base = 0;
    quad[1].at = add_bytes(field(index, 3, 7), four(0, 2, 4, 6)), quad[1].base = 5;
    quad[2].at = add_bytes(or_bytes(field(index, 6, 3), field(narrow, 1, 4)), four(0, 2, 4, 6)), quad[2].base = 13;
    quad[3].at = add_bytes(field(narrow, 0, 7), four(5, 7, 8, 8)), quad[3].base = 16;
    return 4;
}

#endif
