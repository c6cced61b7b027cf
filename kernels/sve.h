/* What the SVE rows share: how the dots of a group are scaled, and the walk over panels and rows.
 *
 * A vector has 128 to 2048 bits, which only the running core knows. It takes as much of a 64-byte line as it
 * has room for, and a predicate ends it where the line ends: at 384 bits in the middle of a vector, above 512
 * always. No core has vectors above 512 bits and none is announced, so what those leave idle costs nobody
 * anything, and every length runs the same code.
 *
 * A group is done in two steps. A function of the format writes the integer dots of up to eight rows of
 * activations to memory; `scale_in` makes floats of them, in the order that docs/numerics.md fixes. Vectors of
 * unknown length fit into no array, so rows of activations are unrolled by macros.
 */
#ifndef NYBL_SVE_H
#define NYBL_SVE_H

#include "kernel_abi.h"
#include <arm_sve.h>

/* Output rows in a panel, 16-bit words in each of its tables. */
#define PANEL 32
/* Most rows of activations that a line is unpacked for at once. */
#define MOST_ROWS 8

#define INLINE static inline __attribute__((always_inline))

/* What a format has beside its scales. */
enum offsets { SYMMETRIC, ZERO_POINTS, MINIMA };

/* One group of one panel and the activations it meets. */
struct group {
    const uint8_t *lines;
    const int8_t *x;
    /* From one row of activations to the next. */
    size_t x_stride;
    /* Values of k: a multiple of 16. */
    size_t values;
    /* Where the dots go: for every row of activations, those of the panel's rows. */
    int32_t (*dots)[PANEL];
};

/* Writes the dots of one group for a fixed number of rows of activations. */
typedef void group_dots(const struct group *);

/* The floats of 16-bit halves. */
INLINE svfloat32_t halves(svbool_t rows, const uint16_t *table) {
    return svcvt_f32_f16_x(rows, svreinterpret_f16_u32(svld1uh_u32(rows, table)));
}

/* How much more a dot was computed with than the codes say: for the panel's first sixteen rows and the others. */
struct bias {
    int32_t low, high;
};

/* Adds the dots of a group to the outputs of `count` rows of activations, scaled. */
INLINE void scale_in(const struct matmul_args *a, size_t first, size_t count, size_t g, const uint8_t *tables,
                     int32_t (*dots)[PANEL], float (*sums)[PANEL], enum offsets kind, struct bias bias) {
    const uint16_t *scales = (const uint16_t *)tables, *offsets = scales + PANEL;
    for (size_t row = 0; row < PANEL; row += svcntw()) {
        svbool_t rows = svwhilelt_b32_u64(row, PANEL);
        svfloat32_t scale = halves(rows, scales + row);
        svfloat32_t minimum = kind == MINIMA ? halves(rows, offsets + row) : svdup_f32(0);
        /* What the sum of the activations is multiplied by and taken off. */
        svbool_t low = svwhilelt_b32_u64(row, PANEL / 2);
        svint32_t zero = svsel_s32(low, svdup_s32(bias.low), svdup_s32(bias.high));
        if (kind == ZERO_POINTS)
            zero = svadd_s32_x(rows, zero, svld1sh_s32(rows, (const int16_t *)offsets + row));
        for (size_t r = 0; r < count; r++) {
            size_t at = (first + r) * a->groups + g;
            int32_t sum = a->x_sums[at];
            float x_scale = a->x_scales[at];
            svint32_t dot = svld1_s32(rows, dots[r] + row);
            dot = svmls_n_s32_x(rows, dot, zero, sum);
            svfloat32_t y = svld1_f32(rows, sums[r] + row);
            y = svmla_f32_x(rows, y, svmul_n_f32_x(rows, scale, x_scale), svcvt_f32_s32_x(rows, dot));
            if (kind == MINIMA)
                y = svmla_n_f32_x(rows, y, svmul_n_f32_x(rows, minimum, x_scale), (float)sum);
            svst1_f32(rows, sums[r] + row, y);
        }
    }
}

/* All panels and all rows of activations. `dots[m - 1]` is for m rows; `bytes` are those of 16 values of k. */
INLINE void matmul(const struct matmul_args *a, group_dots *const dots[MOST_ROWS], size_t bytes,
                   enum offsets kind, struct bias bias) {
    const size_t codes = a->group / 16 * bytes;
    const size_t tables = kind == SYMMETRIC ? 2 * PANEL : 4 * PANEL;
    for (size_t panel = 0; panel < a->panels; panel++) {
        const size_t left = a->n - panel * PANEL;
        const size_t width = left < PANEL ? left : PANEL;
        for (size_t first = 0; first < a->m; first += MOST_ROWS) {
            const size_t count = a->m - first < MOST_ROWS ? a->m - first : MOST_ROWS;
            int32_t ints[MOST_ROWS][PANEL];
            float sums[MOST_ROWS][PANEL];
            for (size_t r = 0; r < count; r++)
                for (size_t row = 0; row < PANEL; row++)
                    sums[r][row] = 0;
            const uint8_t *w = a->w + panel * a->panel_bytes;
            for (size_t g = 0; g < a->groups; g++) {
                const struct group group = {
                    .lines = w,
                    .x = (const int8_t *)a->x + first * a->x_stride + g * a->group,
                    .x_stride = a->x_stride,
                    .values = a->group,
                    .dots = ints,
                };
                dots[count - 1](&group);
                scale_in(a, first, count, g, w + codes, ints, sums, kind, bias);
                w += codes + tables;
            }
            for (size_t r = 0; r < count; r++) {
                float *y = a->y + (first + r) * a->y_stride + panel * PANEL;
                for (size_t row = 0; row < width; row += svcntw()) {
                    svbool_t rows = svwhilelt_b32_u64(row, width);
                    svst1_f32(rows, y + row, svld1_f32(rows, sums[r] + row));
                }
            }
        }
    }
}

#endif
