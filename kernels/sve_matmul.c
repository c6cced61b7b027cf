//@ arch=aarch64 os=linux,android flags=-march=armv8.2-a+sve
/* Bytes, four, three and two bits on scalable vectors: SDOT, which SVE has had from its start, while NEON's is
 * an option of its own.
 *
 * All fields of a byte meet the same four activations, so each is multiplied where it lies, under a mask: the
 * dot comes out times a power of two and is shifted once a group. The topmost field of a byte is stored so that
 * the sign of the byte is its own. Fields are taken in pairs, which is two sums for each row of activations and
 * leaves registers for eight rows; a line with more fields is read again for each pair, from the nearest cache.
 */
#include "sve.h"

enum { LINE = 64 };

/* Where a field of sixteen rows lies in a step of four k. */
struct field {
    /* The plane, a line of the step for bytes, and the bits of its bytes. */
    uint8_t plane, mask;
    /* The power of two that the masked field has too much. */
    uint8_t shift;
};

static const struct field fields8[] = {{0, 0xff, 0}, {1, 0xff, 0}};
/* The byte as it is has field 0 in it, which is taken off the dots. */
static const struct field fields4[] = {{0, 0x0f, 0}, {0, 0xff, 4}};
/* Fields 6 and 7 have one bit in the last plane. */
static const struct field fields3[] = {{0, 0x1c, 2}, {0, 0xe0, 5}, {1, 0x07, 0}, {1, 0x38, 3},
                                       {2, 0x0e, 1}, {2, 0x70, 4}, {0, 0x03, 0}, {1, 0xc0, 5}};
static const struct field fields2[] = {{0, 0x03, 0}, {0, 0x0c, 2}, {0, 0x30, 4}, {0, 0xc0, 6}};

INLINE struct field field_of(unsigned bits, unsigned index) {
    return bits == 8 ? fields8[index] : bits == 4 ? fields4[index] : bits == 3 ? fields3[index] : fields2[index];
}

/* Bytes of sixteen k. */
INLINE size_t bytes_of(unsigned bits) {
    return bits == 8 ? 8 * LINE : bits == 3 ? 12 * LINE : 4 * LINE;
}

INLINE svint8_t masked(svbool_t lanes, const uint8_t *line, uint8_t mask) {
    const svint8_t bytes = svreinterpret_s8_s32(svld1_s32(lanes, (const int32_t *)line));
    return mask == 0xff ? bytes : svand_n_s8_x(svptrue_b8(), bytes, (int8_t)mask);
}

/* The bytes of a field in one of the four steps of sixteen k. */
INLINE svint8_t bytes_in(svbool_t lanes, const uint8_t *lines, unsigned step, unsigned bits, unsigned index) {
    const struct field field = field_of(bits, index);
    if (bits != 3)
        return masked(lanes, lines + (bits == 8 ? 2 : 1) * step * LINE + field.plane * LINE, field.mask);
    /* Pairs of steps lie plane by plane. */
    lines += step / 2 * 6 * LINE + step % 2 * LINE;
    const svint8_t bytes = masked(lanes, lines + field.plane * 2 * LINE, field.mask);
    const svbool_t all = svptrue_b8();
    if (index == 6)
        return svorr_s8_x(all, bytes, svlsl_n_s8_x(all, masked(lanes, lines + 4 * LINE, 0x01), 2));
    if (index == 7) {
        const svuint8_t last = svreinterpret_u8_s8(masked(lanes, lines + 4 * LINE, 0x80));
        return svorr_s8_x(all, bytes, svreinterpret_s8_u8(svlsr_n_u8_x(all, last, 2)));
    }
    return bytes;
}

#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

/* Up to four sets of sums, so that few rows of activations have more than two chains of dots in flight. */
#define SUMS(r)                                                                                                        \
    svint32_t first##r##a = none, first##r##b = none, first##r##c = none, first##r##d = none;                          \
    svint32_t second##r##a = none, second##r##b = none, second##r##c = none, second##r##d = none;

/* Four activations in every lane. A64FX, whose rows these are, takes twice as long for an SDOT by a lane. */
INLINE svint8_t broadcast(const int8_t *x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return svreinterpret_s8_s32(svdup_s32(four));
}

/* One step of row `r`. */
#define DOT(r, set, step)                                                                                              \
    {                                                                                                                  \
        const svint8_t x = broadcast(t->x + r * t->x_stride + k + 4 * step);                                           \
        first##r##set = svdot_s32(first##r##set, first##step, x);                                                      \
        second##r##set = svdot_s32(second##r##set, second##step, x);                                                   \
    }

#define DOTS(r)                                                                                                        \
    if (r < rows) {                                                                                                    \
        if (rows <= 2) {                                                                                               \
            DOT(r, a, 0) DOT(r, b, 1) DOT(r, c, 2) DOT(r, d, 3)                                                        \
        } else if (rows <= 4) {                                                                                        \
            DOT(r, a, 0) DOT(r, b, 1) DOT(r, a, 2) DOT(r, b, 3)                                                        \
        } else {                                                                                                       \
            DOT(r, a, 0) DOT(r, a, 1) DOT(r, a, 2) DOT(r, a, 3)                                                        \
        }                                                                                                              \
    }

#define TOTAL(field, r)                                                                                                \
    svadd_s32_x(lanes, svadd_s32_x(lanes, field##r##a, field##r##b), svadd_s32_x(lanes, field##r##c, field##r##d))

#define STORE(r)                                                                                                       \
    if (r < rows) {                                                                                                    \
        const svint32_t first = TOTAL(first, r);                                                                       \
        svint32_t second = TOTAL(second, r);                                                                           \
        if (bits == 4)                                                                                                 \
            second = svsub_s32_x(lanes, second, first);                                                                \
        int32_t *const out = t->dots[r] + index * LANES + lane;                                                        \
        svst1_s32(lanes, out, svasr_s32_x(lanes, first, svdup_u32(field_of(bits, index).shift)));                      \
        svst1_s32(lanes, out + LANES, svasr_s32_x(lanes, second, svdup_u32(field_of(bits, index + 1).shift)));         \
    }

#define STEP(step)                                                                                                     \
    const svint8_t first##step = bytes_in(lanes, lines, step, bits, index);                                            \
    const svint8_t second##step = bytes_in(lanes, lines, step, bits, index + 1);

/* Field `index` and the next, for `rows` rows of activations. All but the group is known where this is inlined. */
INLINE void two_fields(const struct group *t, const size_t rows, const unsigned bits, const unsigned index) {
    const svint32_t none = svdup_s32(0);
    for (size_t lane = 0; lane < LANES; lane += svcntw()) {
        const svbool_t lanes = svwhilelt_b32_u64(lane, LANES);
        const uint8_t *lines = t->lines + lane * 4;
        EACH_ROW(SUMS)
        for (size_t k = 0; k < t->values; k += 16, lines += bytes_of(bits)) {
            STEP(0)
            STEP(1)
            STEP(2)
            STEP(3)
            EACH_ROW(DOTS)
        }
        EACH_ROW(STORE)
    }
}

/* The functions of a format, and the row of the table. */
#define DOTS_OF(rows, bits)                                                                                            \
    static void dots##bits##_##rows(const struct group *t) {                                                           \
        two_fields(t, rows, bits, 0);                                                                                  \
        if (bits < 4)                                                                                                  \
            two_fields(t, rows, bits, 2);                                                                              \
        if (bits == 3) {                                                                                               \
            two_fields(t, rows, bits, 4);                                                                              \
            two_fields(t, rows, bits, 6);                                                                              \
        }                                                                                                              \
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

MATMUL(nybl_sve_matmul_q8, 8, 32, .middle = 0)
MATMUL(nybl_sve_matmul_q4, 4, 32, .middle = 8, .less = {0, 8})
MATMUL(nybl_sve_matmul_q3, 3, 128, .middle = 4, .less = {[1] = 4, [7] = 4})
MATMUL(nybl_sve_matmul_q2, 2, 64, .middle = 2, .less = {[3] = 2})
