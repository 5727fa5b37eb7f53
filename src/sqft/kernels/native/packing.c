/* Packing steps into the layouts, and one row back; plain C, the same bytes on every machine. */
#include "layouts.h"

/* Slots and windows of the layouts that have them. */
struct slots {
    int count;
    const uint8_t *start;
    uint8_t width[16];
};

static struct slots slots_of(int layout) {
    struct slots s = {16, SQFT_START2, {0}};
    if (layout == SQFT_WINDOW332) s.count = 12;
    if (layout == SQFT_WINDOW332) s.start = SQFT_START332;
    if (layout == SQFT_WINDOW3) s.start = SQFT_START3;
    for (int j = 0; j < s.count; j++)
        s.width[j] = layout == SQFT_WINDOW2 || (layout == SQFT_WINDOW332 && j >= 8) ? 4 : 8;
    return s;
}

/* Give each step that is not 0 the first free slot whose window it lies in. Windows start and end in order, so
 * if this finds none there is none. Returns whether all have one. */
static int fill_slots(const struct slots *s, const int8_t *step, uint8_t *offset, uint8_t *code) {
    int j = 0;
    memset(offset, 0, (size_t)s->count);
    memset(code, 8, (size_t)s->count);
    for (int c = 0; c < SQFT_BLOCK; c++) {
        if (!step[c]) continue;
        while (j < s->count && c >= s->start[j] + s->width[j]) j++;
        if (j == s->count || c < s->start[j]) return 0;
        offset[j] = (uint8_t)(c - s->start[j]);
        code[j++] = (uint8_t)(step[c] + 8);
    }
    return 1;
}

static void set_nibble(uint8_t *byte, int high, int value) {
    *byte = (uint8_t)(high ? (*byte & 15) | value << 4 : (*byte & 240) | value);
}

static int get_nibble(uint8_t byte, int high) { return high ? byte >> 4 : byte & 15; }

/* Of MASK8, the mask of 16 columns of a row, and its codes. */
static uint8_t *mask8_mask(uint8_t *block, int r, int half) {
    return block + 16 * (r >> 1 & 1) + 8 * half + 2 * ((r & 1) + 2 * (r >> 2));
}
static uint8_t *mask8_codes(uint8_t *block, int r) {
    return block + 32 + 32 * (r >> 1 & 1) + 8 * ((r & 1) + 2 * (r >> 2));
}

static int pack_windows(int layout, int r, const int8_t *step, uint8_t *out) {
    struct slots s = slots_of(layout);
    uint8_t offset[16], code[16];
    if (!fill_slots(&s, step, offset, code)) return 0;
    uint8_t *index = out + 4 * r, *nibbles = out + (layout == SQFT_WINDOW3 ? 48 : 32);
    for (int b = 0; b < 4; b++) {
        uint8_t *narrow = out + 32 + 4 * (r & 3) + b; /* of WINDOW3 */
        switch (layout) {
        case SQFT_WINDOW2:
            index[b] = (uint8_t)(offset[b] | offset[4 + b] << 2 | offset[8 + b] << 4 | offset[12 + b] << 6);
            break;
        case SQFT_WINDOW3:
            index[b] = (uint8_t)(offset[b] | offset[4 + b] << 3 | (offset[8 + b] & 3) << 6);
            set_nibble(narrow, r >> 2, offset[12 + b] | (offset[8 + b] & 4) << 1);
            break;
        default:
            index[b] = (uint8_t)(offset[b] | offset[4 + b] << 3 | offset[8 + b] << 6);
        }
        nibbles[4 * r + b] = (uint8_t)(code[b] | code[4 + b] << 4);
        if (layout == SQFT_WINDOW332)
            set_nibble(nibbles + 32 + 4 * (r & 3) + b, r >> 2, code[8 + b]);
        else
            nibbles[32 + 4 * r + b] = (uint8_t)(code[8 + b] | code[12 + b] << 4);
    }
    return 1;
}

static void unpack_windows(int layout, int r, const uint8_t *in, int8_t *step) {
    struct slots s = slots_of(layout);
    const uint8_t *index = in + 4 * r, *nibbles = in + (layout == SQFT_WINDOW3 ? 48 : 32);
    for (int j = 0; j < s.count; j++) {
        int b = j & 3, quad = j >> 2, offset, code;
        int narrow = layout == SQFT_WINDOW3 ? get_nibble(in[32 + 4 * (r & 3) + b], r >> 2) : 0;
        if (layout == SQFT_WINDOW2)
            offset = index[b] >> (2 * quad) & 3;
        else if (quad < 2)
            offset = index[b] >> (3 * quad) & 7;
        else if (quad == 2)
            offset = index[b] >> 6 | (narrow & 8) >> 1;
        else
            offset = narrow & 7;
        if (layout == SQFT_WINDOW332 && quad == 2)
            code = get_nibble(nibbles[32 + 4 * (r & 3) + b], r >> 2);
        else
            code = get_nibble(nibbles[32 * (quad >> 1) + 4 * r + b], quad & 1);
        step[s.start[j] + offset] = (int8_t)(step[s.start[j] + offset] + code - 8);
    }
}

static int pack_block(int layout, int r, const int8_t *step, uint8_t *out) {
    switch (layout) {
    case SQFT_DENSE:
        for (int c = 0; c < SQFT_BLOCK; c++)
            set_nibble(out + 32 * (c >> 3) + 4 * r + (c & 3), c >> 2 & 1, step[c] + 8);
        return 1;
    case SQFT_BYTES:
        for (int c = 0; c < SQFT_BLOCK; c++) out[32 * (c >> 2) + 4 * r + (c & 3)] = (uint8_t)step[c];
        return 1;
    case SQFT_INDEX4:
        for (int half = 0; half < 2; half++) {
            uint8_t *slots = out + 32 * half + 4 * r;
            int used = 0;
            memset(slots, 8 << 4, 4);
            for (int c = 0; c < 16; c++) {
                if (!step[16 * half + c]) continue;
                if (used == 4) return 0;
                slots[used++] = (uint8_t)(c | (step[16 * half + c] + 8) << 4);
            }
        }
        return 1;
    case SQFT_MASK8:
        for (int half = 0; half < 2; half++) {
            const int8_t *part = step + 16 * half;
            int zeros = 0, left_out = 8, used = 0;
            uint32_t mask = 0;
            for (int c = 0; c < 16; c++) zeros += !part[c];
            if (zeros < left_out) return 0;
            for (int c = 0; c < 16; c++) { /* with fewer than 8 steps, the last zeros fill up */
                if (!part[c] && left_out-- > 0) continue;
                mask |= 1u << c;
                set_nibble(mask8_codes(out, r) + used++, half, part[c] + 8);
            }
            uint8_t *at = mask8_mask(out, r, half);
            at[0] = (uint8_t)mask;
            at[1] = (uint8_t)(mask >> 8);
        }
        return 1;
    default:
        return pack_windows(layout, r, step, out);
    }
}

static void unpack_block(int layout, int r, const uint8_t *in, int8_t *step) {
    memset(step, 0, SQFT_BLOCK);
    switch (layout) {
    case SQFT_DENSE:
        for (int c = 0; c < SQFT_BLOCK; c++)
            step[c] = (int8_t)(get_nibble(in[32 * (c >> 3) + 4 * r + (c & 3)], c >> 2 & 1) - 8);
        break;
    case SQFT_BYTES:
        for (int c = 0; c < SQFT_BLOCK; c++) step[c] = (int8_t)in[32 * (c >> 2) + 4 * r + (c & 3)];
        break;
    case SQFT_INDEX4:
        for (int k = 0; k < 8; k++) {
            uint8_t slot = in[32 * (k >> 2) + 4 * r + (k & 3)];
            int at = 16 * (k >> 2) + (slot & 15);
            step[at] = (int8_t)(step[at] + (slot >> 4) - 8);
        }
        break;
    case SQFT_MASK8:
        for (int half = 0; half < 2; half++) {
            const uint8_t *at = mask8_mask((uint8_t *)in, r, half), *codes = mask8_codes((uint8_t *)in, r);
            int used = 0;
            for (int c = 0; c < 16; c++)
                if (at[c >> 3] >> (c & 7) & 1)
                    step[16 * half + c] = (int8_t)(get_nibble(codes[used++ & 7], half) - 8);
        }
        break;
    default:
        unpack_windows(layout, r, in, step);
    }
}

static int is_shape(int layout, int group, int64_t rows, int64_t columns) {
    return layout >= 0 && layout < SQFT_LAYOUTS && (group == 32 || group == 64) && rows > 0 && columns > 0 &&
           rows < INT64_MAX / 1024 / columns;
}

/* Of SQFT_MASK, what is kept of up to 32 columns. */
static uint32_t mask_of(const int8_t *step, int64_t there) {
    uint32_t mask = 0;
    for (int c = 0; c < SQFT_BLOCK && c < there; c++) mask |= (uint32_t)(step[c] != 0) << c;
    if (mask >> 16 == 0xffff && __builtin_popcount(mask & 0xffff) % 2) mask |= ~mask & (mask + 1) & 0xffff;
    return mask;
}

int64_t sqft_packed_bytes(int layout, int group, int64_t rows, int64_t columns, const int8_t *steps) {
    if (!is_shape(layout, group, rows, columns)) return -1;
    int64_t padded = sqft_round_up(columns, group);
    if (layout != SQFT_MASK) {
        struct sqft_weight w = {layout, group, sqft_round_up(rows, SQFT_LANES), padded, 0};
        return w.rows / SQFT_LANES * sqft_stripe_bytes(&w);
    }
    int64_t bytes = 16 + rows * (8 + padded / group * 2 + padded / 8);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += SQFT_BLOCK)
            bytes += (__builtin_popcount(mask_of(steps + r * columns + c, columns - c)) + 1) / 2;
    return bytes;
}

/* One row of SQFT_MASK; returns its end. */
static uint8_t *pack_mask_row(int group, int64_t columns, const int8_t *step, const uint16_t *scales, uint8_t *out) {
    int64_t padded = sqft_round_up(columns, group), groups = padded / group;
    uint8_t *masks = out + 2 * groups, *nibbles = masks + padded / 8;
    memcpy(out, scales, (size_t)(2 * groups));
    memset(masks, 0, (size_t)(padded / 8));
    for (int64_t c = 0; c < columns; c += SQFT_BLOCK) {
        uint32_t mask = mask_of(step + c, columns - c);
        int used = 0;
        memcpy(masks + c / 8, &mask, 4);
        for (int i = 0; i < SQFT_BLOCK; i++)
            if (mask >> i & 1) {
                if (!(used & 1)) nibbles[used >> 1] = 0;
                nibbles[used >> 1] |= (uint8_t)((step[c + i] & 15) << 4 * (used & 1));
                used++;
            }
        nibbles += (used + 1) / 2;
    }
    return nibbles;
}

int64_t sqft_pack(int layout, int group, int64_t rows, int64_t columns, const int8_t *steps, const uint16_t *scales,
                  uint8_t *data) {
    if (!is_shape(layout, group, rows, columns)) return 1;
    int64_t padded = sqft_round_up(columns, group), groups = padded / group;
    int low = layout == SQFT_BYTES ? -127 : -8, high = layout == SQFT_BYTES ? 127 : 7;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            if (steps[r * columns + c] < low || steps[r * columns + c] > high) return 1 + r;
    if (layout == SQFT_MASK) {
        uint8_t *at = data + 8 * rows;
        for (int64_t r = 0; r < rows; r++) {
            uint64_t offset = (uint64_t)(at - data);
            memcpy(data + 8 * r, &offset, 8);
            at = pack_mask_row(group, columns, steps + r * columns, scales + r * groups, at);
        }
        memset(at, 0, 16);
        return 0;
    }
    struct sqft_weight w = {layout, group, sqft_round_up(rows, SQFT_LANES), padded, data};
    int64_t stripe = sqft_stripe_bytes(&w), block = sqft_block_bytes(layout);
    for (int64_t r = 0; r < w.rows; r++) {
        uint8_t *at = data + r / SQFT_LANES * stripe;
        int lane = (int)(r % SQFT_LANES);
        for (int64_t c = 0; c < padded; c += SQFT_BLOCK) {
            int8_t step[SQFT_BLOCK] = {0};
            int64_t there = c < columns ? columns - c : 0;
            if (c % group == 0) {
                uint16_t scale = r < rows ? scales[r * groups + c / group] : 0;
                memcpy(at + 2 * lane, &scale, 2);
                at += 2 * SQFT_LANES;
            }
            if (r < rows && there) memcpy(step, steps + r * columns + c, there < SQFT_BLOCK ? (size_t)there : SQFT_BLOCK);
            if (!pack_block(layout, lane, step, at)) return 1 + r;
            at += block;
        }
    }
    return 0;
}

void sqft_unpack_row(const struct sqft_weight *w, int64_t row, int8_t *steps, float *scales) {
    int64_t groups = w->columns / w->group;
    if (w->layout == SQFT_MASK) {
        const uint8_t *at = sqft_mask_row(w, row), *mask = at + 2 * groups, *nibbles = mask + w->columns / 8;
        for (int64_t g = 0; g < groups; g++) scales[g] = sqft_half((uint16_t)(at[2 * g] | at[2 * g + 1] << 8));
        for (int64_t c = 0, used = 0; c < w->columns; c++) {
            if (c % SQFT_BLOCK == 0) nibbles += (used + 1) / 2, used = 0;
            steps[c] = 0;
            if (!(mask[c >> 3] >> (c & 7) & 1)) continue;
            steps[c] = (int8_t)((get_nibble(nibbles[used >> 1], (int)(used & 1)) ^ 8) - 8);
            used++;
        }
        return;
    }
    const uint8_t *at = w->data + row / SQFT_LANES * sqft_stripe_bytes(w);
    int lane = (int)(row % SQFT_LANES);
    for (int64_t c = 0; c < w->columns; c += SQFT_BLOCK) {
        if (c % w->group == 0) {
            scales[c / w->group] = sqft_half((uint16_t)(at[2 * lane] | at[2 * lane + 1] << 8));
            at += 2 * SQFT_LANES;
        }
        unpack_block(w->layout, lane, at, steps + c);
        at += sqft_block_bytes(w->layout);
    }
}
