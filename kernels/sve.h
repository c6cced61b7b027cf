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

/* Lanes of four bytes in a line: the rows of a field. */
#define LANES 16
/* Rows of the highest panel. */
#define MOST_PANEL 128
/* Most rows of activations that a line is unpacked for at once. */
#define MOST_ROWS 8

#define INLINE static inline __attribute__((always_inline))

/* One group of one panel and the activations it meets. */
struct group {
    const uint8_t *lines;
    const int8_t *x;
    /* From one row of activations to the next. */
    size_t x_stride;
    /* Values of k: a multiple of 16. */
    size_t values;
    /* Where the dots go: for every row of activations, those of the panel's rows. */
    int32_t (*dots)[MOST_PANEL];
};

/* What a format is made of. */
struct format {
    unsigned bits;
    /* Rows in a panel. */
    size_t rows;
    /* The code that means zero where no offset says otherwise. */
    int32_t middle;
    /* By how much the codes of each field are stored too low. */
    int32_t less[MOST_PANEL / LANES];
    /* Writes the dots of a group for 1 to 8 rows of activations. */
    void (*dots[MOST_ROWS])(const struct group *);
};

/* The floats of 16-bit halves. */
INLINE svfloat32_t halves(svbool_t lanes, const uint16_t *table) {
    return svcvt_f32_f16_x(lanes, svreinterpret_f16_u32(svld1uh_u32(lanes, table)));
}

/* Adds the dots of group `g` to the sums of `count` rows of activations from `first`, scaled. */
INLINE void scale_in(const struct matmul_args *a, const struct format *format, size_t first, size_t count, size_t g,
                     const uint16_t *tables, int32_t (*dots)[MOST_PANEL], float (*sums)[MOST_PANEL]) {
    for (size_t row = 0; row < format->rows; row += LANES) {
        const int32_t less = format->less[row / LANES];
        for (size_t lane = 0; lane < LANES; lane += svcntw()) {
            const svbool_t lanes = svwhilelt_b32_u64(lane, LANES);
            const uint16_t *const scales = tables + row + lane, *const offsets = scales + format->rows;
            const svfloat32_t scale = halves(lanes, scales);
            svfloat32_t minimum = svdup_f32(0);
            /* Times the sum of the activations, it is what a dot of the stored codes has too much. */
            svint32_t zero = svdup_s32(-less);
            if (a->offset == 0)
                zero = svadd_n_s32_x(lanes, zero, format->middle);
            else if (a->offset == 1)
                zero = svadd_s32_x(lanes, zero, svld1sh_s32(lanes, (const int16_t *)offsets));
            else
                minimum = halves(lanes, offsets);
            for (size_t r = 0; r < count; r++) {
                const size_t at = (first + r) * a->groups + g;
                const int32_t sum = a->x_sums[at];
                const float x_scale = a->x_scales[at];
                float *const out = sums[r] + row + lane;
                svint32_t dot = svld1_s32(lanes, dots[r] + row + lane);
                dot = svmls_n_s32_x(lanes, dot, zero, sum);
                svfloat32_t y = svld1_f32(lanes, out);
                y = svmla_f32_x(lanes, y, svmul_n_f32_x(lanes, scale, x_scale), svcvt_f32_s32_x(lanes, dot));
                if (a->offset == 2)
                    y = svmla_n_f32_x(lanes, y, svmul_n_f32_x(lanes, minimum, x_scale), (float)sum);
                svst1_f32(lanes, out, y);
            }
        }
    }
}

/* All panels and all rows of activations. */
INLINE void matmul(const struct matmul_args *a, const struct format *format) {
    const size_t codes = a->group * format->rows * format->bits / 8;
    const size_t tables = format->rows * (a->offset ? 4 : 2);
    int32_t dots[MOST_ROWS][MOST_PANEL];
    float sums[MOST_ROWS][MOST_PANEL];
    for (size_t panel = 0; panel < a->panels; panel++) {
        const size_t left = a->n - panel * format->rows;
        const size_t width = left < format->rows ? left : format->rows;
        for (size_t first = 0; first < a->m; first += MOST_ROWS) {
            const size_t count = a->m - first < MOST_ROWS ? a->m - first : MOST_ROWS;
            for (size_t r = 0; r < count; r++)
                for (size_t row = 0; row < format->rows; row++)
                    sums[r][row] = 0;
            const uint8_t *w = a->w + panel * a->panel_bytes;
            for (size_t g = 0; g < a->groups; g++) {
                const struct group group = {
                    .lines = w,
                    .x = (const int8_t *)a->x + first * a->x_stride + g * a->group,
                    .x_stride = a->x_stride,
                    .values = a->group,
                    .dots = dots,
                };
                format->dots[count - 1](&group);
                scale_in(a, format, first, count, g, (const uint16_t *)(w + codes), dots, sums);
                w += codes + tables;
            }
            for (size_t r = 0; r < count; r++) {
                float *const y = a->y + (first + r) * a->y_stride + panel * format->rows;
                for (size_t row = 0; row < width; row += svcntw()) {
                    const svbool_t rows = svwhilelt_b32_u64(row, width);
                    svst1_f32(rows, y + row, svld1_f32(rows, sums[r] + row));
                }
            }
        }
    }
}

#endif
