//@ arch=hexagon flags=-mv67 -mhvx -mhvx-length=128b -fno-strict-aliasing
/* Bytes, four, three and two bits on Hexagon's vectors of 128 bytes, which hold two lines.
 *
 * The multiplication is of 32 lanes of four unsigned bytes by the same four signed activations, which come from
 * a scalar register. The two lines of a vector are steps with activations of their own, though, so two fields
 * are shuffled into each other: the first line of both makes one vector, the second line of both the other,
 * and a sum holds the dots of 32 rows. Fields are multiplied where they lie in the byte, under a mask, and the
 * dots are shifted once a group. Topmost fields are stored for a signed dot, with their top bit inverted: a
 * XOR turns it back. Bytes become unsigned the same way, and 128 times the sum of the activations is taken off.
 *
 * Version 67 has no floating point on vectors, so the products with the scales are the scalar core's work, in
 * the order of docs/numerics.md.
 */
#include "kernel_abi.h"
#include <hexagon_protos.h>
#include <hexagon_types.h>
#include <hvx_hexagon_protos.h>

/* Lanes of four bytes in a vector: rows of two fields. */
#define LANES 32
#define MOST_PANEL 128
/* Most rows of activations that a line is unpacked for at once. */
#define MOST_ROWS 8

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("unroll")

typedef HVX_Vector vector;
/* The dots of a panel's rows. Vectors write them and read them as what they are, so aliasing is not strict here. */
typedef int32_t panel_of_dots[MOST_PANEL] __attribute__((aligned(128)));

/* One group of one panel and the activations it meets. */
struct group {
    const uint8_t *lines;
    const int8_t *x;
    size_t x_stride;
    /* Values of k: a multiple of 16. */
    size_t values;
    panel_of_dots *dots;
};

INLINE vector load(const uint8_t *at) {
    return *(const HVX_UVector *)at;
}

INLINE vector masked(vector bytes, int mask) {
    return Q6_V_vand_VV(bytes, Q6_Vb_vsplat_R(mask));
}

INLINE vector flipped(vector bytes) {
    return Q6_V_vxor_VV(bytes, Q6_Vb_vsplat_R(0x80));
}

/* Field by field two steps, eight k, of all rows of a panel. Fields come out times a power of two. */
INLINE void unpack(const unsigned bits, const uint8_t *lines, vector *fields) {
    if (bits == 4) {
        const vector bytes = flipped(load(lines));
        fields[0] = masked(bytes, 0x0f);
        /* With the other field in it, which is taken off the dots. */
        fields[1] = bytes;
    } else if (bits == 2) {
        const vector bytes = flipped(load(lines));
        fields[0] = masked(bytes, 0x03);
        fields[1] = masked(bytes, 0x0c);
        fields[2] = masked(bytes, 0x30);
        fields[3] = masked(bytes, 0xc0);
    } else {
        const vector p = flipped(load(lines)), q = flipped(load(lines + 128)), r = load(lines + 256);
        fields[0] = masked(p, 0x1c);
        fields[1] = masked(p, 0xe0);
        fields[2] = masked(q, 0x07);
        fields[3] = masked(q, 0x38);
        fields[4] = masked(r, 0x0e);
        fields[5] = masked(r, 0x70);
        /* What a shift of more than a byte brings in from the next one, the mask takes out. */
        fields[6] = Q6_V_vor_VV(masked(p, 0x03), masked(Q6_Vh_vasl_VhR(r, 2), 0x04));
        fields[7] = Q6_V_vor_VV(masked(q, 0xc0), masked(Q6_Vuh_vlsr_VuhR(r, 2), 0x20));
    }
}

/* The power of two that a field has too much. */
INLINE int shift_of(const unsigned bits, const unsigned field) {
    static const int of_three[] = {2, 5, 0, 3, 1, 4, 0, 5};
    return bits == 4 ? 4 * field : bits == 2 ? 2 * field : of_three[field];
}

INLINE vector dot(vector sums, vector bytes, const struct group *t, size_t row, size_t k) {
    return Q6_Vw_vrmpyacc_VwVubRb(sums, bytes, *(const int32_t *)(t->x + row * t->x_stride + k));
}

/* The dots of `rows` rows of activations. A step of bytes is a whole vector with the same activations. */
INLINE void dots_of_bytes(const struct group *t, const unsigned rows) {
    /* Two chains: a packet takes two multiplications, but not two that add to the same sums. */
    vector near_sums[MOST_ROWS], far_sums[MOST_ROWS];
    UNROLL for (unsigned r = 0; r < rows; r++)
        near_sums[r] = far_sums[r] = Q6_V_vzero();
    for (size_t k = 0; k < t->values; k += 8) {
        const vector near = flipped(load(t->lines + k * 32)), far = flipped(load(t->lines + k * 32 + 128));
        UNROLL for (unsigned r = 0; r < rows; r++) {
            near_sums[r] = dot(near_sums[r], near, t, r, k);
            far_sums[r] = dot(far_sums[r], far, t, r, k + 4);
        }
    }
    UNROLL for (unsigned r = 0; r < rows; r++)
        *(vector *)t->dots[r] = Q6_Vw_vadd_VwVw(near_sums[r], far_sums[r]);
}

/* The dots of `rows` rows of activations with `pairs` pairs of fields from pair `first`. */
INLINE void dots_of_pairs(const struct group *t, const unsigned rows, const unsigned bits, const unsigned first,
                          const unsigned pairs) {
    const unsigned step = bits == 3 ? 384 : 128;
    /* Two chains as above, where there are registers for them. */
    const unsigned other = rows * pairs <= 8 ? 1 : 0;
    vector sums[MOST_ROWS][4][2];
    UNROLL for (unsigned r = 0; r < rows; r++)
        UNROLL for (unsigned pair = 0; pair < pairs; pair++)
            sums[r][pair][0] = sums[r][pair][1] = Q6_V_vzero();
    const uint8_t *lines = t->lines;
    for (size_t k = 0; k < t->values; k += 8, lines += step) {
        vector fields[8];
        unpack(bits, lines, fields);
        UNROLL for (unsigned pair = 0; pair < pairs; pair++) {
            const unsigned field = 2 * (first + pair);
            const HVX_VectorPair both = Q6_W_vshuff_VVR(fields[field + 1], fields[field], 64);
            const vector near = Q6_V_lo_W(both), far = Q6_V_hi_W(both);
            UNROLL for (unsigned r = 0; r < rows; r++) {
                sums[r][pair][0] = dot(sums[r][pair][0], near, t, r, k);
                sums[r][pair][other] = dot(sums[r][pair][other], far, t, r, k + 4);
            }
        }
    }
    const HVX_VectorPred half = Q6_Q_vsetq_R(64);
    UNROLL for (unsigned pair = 0; pair < pairs; pair++) {
        const unsigned field = 2 * (first + pair);
        const vector shift = Q6_V_vmux_QVV(half, Q6_V_vsplat_R(shift_of(bits, field)),
                                           Q6_V_vsplat_R(shift_of(bits, field + 1)));
        UNROLL for (unsigned r = 0; r < rows; r++) {
            vector sum = Q6_Vw_vadd_VwVw(sums[r][pair][0], sums[r][pair][1]);
            if (bits == 4)
                sum = Q6_Vw_vsub_VwVw(sum, Q6_V_vmux_QVV(half, Q6_V_vzero(), Q6_V_vror_VR(sum, 64)));
            ((vector *)t->dots[r])[first + pair] = Q6_Vw_vasr_VwVw(sum, shift);
        }
    }
}

/* As many pairs of fields at once as leave registers for the rows of activations. */
INLINE void dots_of(const struct group *t, const unsigned rows, const unsigned bits) {
    if (bits == 8) {
        dots_of_bytes(t, rows);
    } else if (bits == 4) {
        dots_of_pairs(t, rows, 4, 0, 1);
    } else if (bits == 2) {
        dots_of_pairs(t, rows, 2, 0, 2);
    } else if (rows <= 3) {
        dots_of_pairs(t, rows, 3, 0, 4);
    } else {
        dots_of_pairs(t, rows, 3, 0, 2);
        dots_of_pairs(t, rows, 3, 2, 2);
    }
}

INLINE vector word(int32_t value) {
    return Q6_V_vsplat_R(value);
}

/* Where `test` holds the first, elsewhere the second. */
INLINE vector either(HVX_VectorPred test, vector first, vector second) {
    return Q6_V_vmux_QVV(test, first, second);
}

/* The floats nearest to unsigned integers, ties to even. */
INLINE vector floats_of_unsigned(vector x) {
    const vector zeros = Q6_Vuw_vcl0_Vuw(x);
    const vector up = Q6_Vw_vasl_VwVw(x, zeros);
    const vector fraction = Q6_Vuw_vlsr_VuwR(up, 8);
    /* The leading one of the fraction adds one to the exponent, and so does a carry out of rounding. */
    const vector exponent = Q6_Vw_vasl_VwR(Q6_Vw_vsub_VwVw(word(157), zeros), 23);
    const vector bits = Q6_Vw_vadd_VwVw(exponent, fraction);
    const vector rest = Q6_Vw_vadd_VwVw(Q6_V_vand_VV(up, word(0xff)), Q6_V_vand_VV(fraction, word(1)));
    const HVX_VectorPred is_more = Q6_Q_vcmp_gt_VuwVuw(rest, word(0x80));
    const vector rounded = either(is_more, Q6_Vw_vadd_VwVw(bits, word(1)), bits);
    return either(Q6_Q_vcmp_eq_VwVw(x, Q6_V_vzero()), Q6_V_vzero(), rounded);
}

INLINE vector floats_of_integers(vector x) {
    const vector sign = Q6_V_vand_VV(x, word(INT32_MIN));
    return Q6_V_vor_VV(floats_of_unsigned(Q6_Vw_vabs_Vw(x)), sign);
}

/* The floats of 16-bit halves, which have words to themselves: exact, whatever they are. */
INLINE vector floats_of_halves(vector halves) {
    const vector sign = Q6_Vw_vasl_VwR(Q6_V_vand_VV(halves, word(0x8000)), 16);
    const vector rest = Q6_V_vand_VV(halves, word(0x7fff));
    const vector moved = Q6_Vw_vasl_VwR(rest, 13);
    const vector normal = Q6_Vw_vadd_VwVw(moved, word(112 << 23));
    /* Without an exponent: so many times 2^-24. */
    const HVX_VectorPred is_zero = Q6_Q_vcmp_eq_VwVw(rest, Q6_V_vzero());
    const vector tiny = Q6_Vw_vsub_VwVw(floats_of_unsigned(rest), either(is_zero, Q6_V_vzero(), word(24 << 23)));
    const vector infinite = Q6_V_vor_VV(moved, word(0x7f800000));
    const vector finite = either(Q6_Q_vcmp_gt_VwVw(word(0x0400), rest), tiny, normal);
    return Q6_V_vor_VV(either(Q6_Q_vcmp_gt_VwVw(rest, word(0x7bff)), infinite, finite), sign);
}

/* The 32 words of a table from `at`, in the second half of a vector: what lies before belongs to the same group,
 * and what lies behind may belong to nobody. */
INLINE vector table(const uint16_t *at) {
    return load((const uint8_t *)at - 64);
}

INLINE vector halves_of(const uint16_t *at) {
    return floats_of_halves(Q6_V_hi_W(Q6_Wuw_vunpack_Vuh(table(at))));
}

/* What a format is made of. */
struct format {
    unsigned bits;
    /* Rows in a panel. */
    size_t rows;
    /* Times the sum of the activations, it is what a dot has too much: without zero points, and always. */
    int32_t symmetric, always;
    /* Writes the dots of a group for 1 to 8 rows of activations. */
    void (*dots[MOST_ROWS])(const struct group *);
};

/* The sums of the panel's rows plus factor times `x_scale`, times these floats. */
static void multiply_in(size_t rows, float *restrict sums, const float *restrict factors, float x_scale,
                        const float *restrict floats) {
    for (size_t row = 0; row < rows; row++)
        sums[row] = Q6_R_sfmpyacc_RR(sums[row], factors[row] * x_scale, floats[row]);
}

/* The same with one float for all. */
static void multiply_all_in(size_t rows, float *restrict sums, const float *restrict factors, float x_scale,
                            float value) {
    for (size_t row = 0; row < rows; row++)
        sums[row] = Q6_R_sfmpyacc_RR(sums[row], factors[row] * x_scale, value);
}

/* Adds the dots of group `g` to the sums of `count` rows of activations from `first`, scaled. Conversions are
 * integer work, which the vectors do; what is left for the scalar core is the two products and the sum. */
static void scale_in(const struct matmul_args *a, const struct format *format, size_t first, size_t count, size_t g,
                     const uint16_t *tables, panel_of_dots *dots, float (*sums)[MOST_PANEL]) {
    const size_t vectors = format->rows / LANES;
    vector scales[MOST_PANEL / LANES], minima[MOST_PANEL / LANES], zeros[MOST_PANEL / LANES];
    for (size_t v = 0; v < vectors; v++) {
        const uint16_t *const offsets = tables + format->rows + v * LANES;
        scales[v] = halves_of(tables + v * LANES);
        minima[v] = a->offset == 2 ? halves_of(offsets) : Q6_V_vzero();
        zeros[v] = a->offset == 1 ? Q6_V_hi_W(Q6_Ww_vunpack_Vh(table(offsets))) : Q6_V_vzero();
    }
    for (size_t r = 0; r < count; r++) {
        const size_t at = (first + r) * a->groups + g;
        const int32_t sum = a->x_sums[at];
        const float x_scale = a->x_scales[at];
        /* Wraps where a row of bytes is one group; what is left when the excess is gone does not. */
        const int32_t factor = format->always + (a->offset == 0 ? format->symmetric : 0);
        const vector excess = word((int32_t)((uint32_t)factor * (uint32_t)sum));
        vector *const out = (vector *)dots[r];
        for (size_t v = 0; v < vectors; v++) {
            vector dot = Q6_Vw_vsub_VwVw(out[v], excess);
            /* The sum of up to 128 activations has 16 bits, and formats with zero points have no longer groups. */
            if (a->offset == 1)
                dot = Q6_Vw_vsub_VwVw(dot, Q6_Vw_vmpyi_VwRh(zeros[v], Q6_R_combine_RlRl(sum, sum)));
            out[v] = floats_of_integers(dot);
        }
        multiply_in(format->rows, sums[r], (const float *)scales, x_scale, (const float *)out);
        if (a->offset == 2)
            multiply_all_in(format->rows, sums[r], (const float *)minima, x_scale, (float)sum);
    }
}

/* All panels and all rows of activations. */
static void matmul(const struct matmul_args *a, const struct format *format) {
    const size_t codes = a->group * format->rows * format->bits / 8;
    const size_t tables = format->rows * (a->offset ? 4 : 2);
    panel_of_dots dots[MOST_ROWS];
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
                for (size_t row = 0; row < width; row++)
                    y[row] = sums[r][row];
            }
        }
    }
}

#define DOTS_OF(rows, bits)                                                                                            \
    static void dots##bits##_##rows(const struct group *t) {                                                           \
        dots_of(t, rows, bits);                                                                                        \
    }

#define MATMUL(name, width, panel, ...)                                                                                \
    DOTS_OF(1, width)                                                                                                  \
    DOTS_OF(2, width)                                                                                                  \
    DOTS_OF(3, width)                                                                                                  \
    DOTS_OF(4, width)                                                                                                  \
    DOTS_OF(5, width)                                                                                                  \
    DOTS_OF(6, width)                                                                                                  \
    DOTS_OF(7, width)                                                                                                  \
    DOTS_OF(8, width)                                                                                                  \
    void name(const struct matmul_args *a) {                                                                           \
        static const struct format format = {                                                                          \
            .bits = width,                                                                                             \
            .rows = panel,                                                                                             \
            .dots = {dots##width##_1, dots##width##_2, dots##width##_3, dots##width##_4, dots##width##_5,              \
                     dots##width##_6, dots##width##_7, dots##width##_8},                                               \
            __VA_ARGS__,                                                                                               \
        };                                                                                                             \
        matmul(a, &format);                                                                                            \
    }

MATMUL(nybl_hvx_matmul_q8, 8, 32, .always = 128)
MATMUL(nybl_hvx_matmul_q4, 4, 32, .symmetric = 8)
MATMUL(nybl_hvx_matmul_q3, 3, 128, .symmetric = 4)
MATMUL(nybl_hvx_matmul_q2, 2, 64, .symmetric = 2)
