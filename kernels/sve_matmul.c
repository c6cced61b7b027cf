//@ arch=aarch64 os=linux,android flags=-march=armv8.2-a+sve
/* Bytes and four bits on scalable vectors: SDOT, which SVE has had from its start, while NEON's is an option of
 * its own. Cores that have both do as much with the one in a cycle as with the other.
 *
 * A line holds four k of sixteen lanes. For bytes a step is two lines, rows 0 to 15 and rows 16 to 31. For
 * four bits it is one: the raw byte as a signed number is 16 * high + low, the masked byte is low, and the
 * high dot is a sixteenth of the difference, once a group. Either way a step gives two vectors that are
 * multiplied by the same four activations.
 */
#include "sve.h"

enum { LINE = 64 };

/* The second vector of a step. */
INLINE svint8_t second(svbool_t lanes, const uint8_t *line, svint8_t first, int bits) {
    if (bits == 4)
        return svand_n_s8_x(svptrue_b8(), first, 15);
    return svreinterpret_s8_s32(svld1_s32(lanes, (const int32_t *)(line + LINE)));
}

INLINE svint8_t first_of(svbool_t lanes, const uint8_t *line) {
    return svreinterpret_s8_s32(svld1_s32(lanes, (const int32_t *)line));
}

/* Stores the dots of the lanes from `lane` of one row of activations. */
INLINE void store(svbool_t lanes, int32_t *dots, svint32_t first, svint32_t second, int bits) {
    /* For bytes the first line is the first rows; for four bits those are the masked ones. */
    svint32_t high = bits == 4 ? svasr_n_s32_x(lanes, svsub_s32_x(lanes, first, second), 4) : second;
    svst1_s32(lanes, dots, bits == 4 ? second : first);
    svst1_s32(lanes, dots + PANEL / 2, high);
}

#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

/* Two sets of sums, so that few rows have more than one chain of dots in flight. */
#define SUMS(r) svint32_t first##r##a = zero, first##r##b = zero, second##r##a = zero, second##r##b = zero;

/* Four steps of row `r`, each with its lane of sixteen activations. */
#define DOTS(r)                                                                                                        \
    if (r < rows) {                                                                                                    \
        const svint8_t x = svld1rq_s8(svptrue_b8(), t->x + r * t->x_stride + k);                                       \
        first##r##a = svdot_lane_s32(first##r##a, first0, x, 0);                                                       \
        second##r##a = svdot_lane_s32(second##r##a, second0, x, 0);                                                    \
        if (rows <= 4) {                                                                                               \
            first##r##b = svdot_lane_s32(first##r##b, first1, x, 1);                                                   \
            second##r##b = svdot_lane_s32(second##r##b, second1, x, 1);                                                \
        } else {                                                                                                       \
            first##r##a = svdot_lane_s32(first##r##a, first1, x, 1);                                                   \
            second##r##a = svdot_lane_s32(second##r##a, second1, x, 1);                                                \
        }                                                                                                              \
        first##r##a = svdot_lane_s32(first##r##a, first2, x, 2);                                                       \
        second##r##a = svdot_lane_s32(second##r##a, second2, x, 2);                                                    \
        if (rows <= 4) {                                                                                               \
            first##r##b = svdot_lane_s32(first##r##b, first3, x, 3);                                                   \
            second##r##b = svdot_lane_s32(second##r##b, second3, x, 3);                                                \
        } else {                                                                                                       \
            first##r##a = svdot_lane_s32(first##r##a, first3, x, 3);                                                   \
            second##r##a = svdot_lane_s32(second##r##a, second3, x, 3);                                                \
        }                                                                                                              \
    }

#define STORE(r)                                                                                                       \
    if (r < rows)                                                                                                      \
        store(lanes, t->dots[r] + lane, svadd_s32_x(lanes, first##r##a, first##r##b),                                  \
              svadd_s32_x(lanes, second##r##a, second##r##b), bits);

/* Vectors up to a line: `rows` rows of activations, known where this is inlined. */
INLINE void dots_of(const struct group *t, const size_t rows, const int bits) {
    const size_t step = bits == 4 ? LINE : 2 * LINE;
    const svint32_t zero = svdup_s32(0);
    for (size_t lane = 0; lane < PANEL / 2; lane += svcntw()) {
        const svbool_t lanes = svwhilelt_b32_u64(lane, PANEL / 2);
        const uint8_t *line = t->lines + lane * 4;
        EACH_ROW(SUMS)
        for (size_t k = 0; k < t->values; k += 16, line += 4 * step) {
            const svint8_t first0 = first_of(lanes, line), second0 = second(lanes, line, first0, bits);
            const uint8_t *const line1 = line + step, *const line2 = line + 2 * step, *const line3 = line + 3 * step;
            const svint8_t first1 = first_of(lanes, line1), second1 = second(lanes, line1, first1, bits);
            const svint8_t first2 = first_of(lanes, line2), second2 = second(lanes, line2, first2, bits);
            const svint8_t first3 = first_of(lanes, line3), second3 = second(lanes, line3, first3, bits);
            EACH_ROW(DOTS)
        }
        EACH_ROW(STORE)
    }
}

#define VARIANT(rows, bits)                                                                                            \
    static void dots##bits##_##rows(const struct group *t) {                                                           \
        dots_of(t, rows, bits);                                                                                        \
    }
#define VARIANTS(bits)                                                                                                 \
    VARIANT(1, bits)                                                                                                   \
    VARIANT(2, bits)                                                                                                   \
    VARIANT(3, bits)                                                                                                   \
    VARIANT(4, bits)                                                                                                   \
    VARIANT(5, bits)                                                                                                   \
    VARIANT(6, bits)                                                                                                   \
    VARIANT(7, bits)                                                                                                   \
    VARIANT(8, bits)                                                                                                   \
    static group_dots *const dots##bits[MOST_ROWS] = {dots##bits##_1, dots##bits##_2, dots##bits##_3, dots##bits##_4, \
                                                      dots##bits##_5, dots##bits##_6, dots##bits##_7, dots##bits##_8};

VARIANTS(8)
VARIANTS(4)

/* A high nibble is stored as its code less 8; a symmetric code means its value less 8. */

void nybl_sve_matmul_q8(const struct matmul_args *a) {
    matmul(a, dots8, 8 * LINE, SYMMETRIC, (struct bias){0, 0});
}

void nybl_sve_matmul_q4(const struct matmul_args *a) {
    matmul(a, dots4, 4 * LINE, SYMMETRIC, (struct bias){8, 0});
}

void nybl_sve_matmul_q4z(const struct matmul_args *a) {
    matmul(a, dots4, 4 * LINE, ZERO_POINTS, (struct bias){0, -8});
}

void nybl_sve_matmul_q4m(const struct matmul_args *a) {
    matmul(a, dots4, 4 * LINE, MINIMA, (struct bias){0, -8});
}
