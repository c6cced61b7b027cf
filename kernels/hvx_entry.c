//@ arch=hexagon flags=-mv67 -mhvx -mhvx-length=128b
/* What a host calls on the DSP: a block of offsets becomes the argument block of a row.
 *
 * The functions have the names and types that the generated side of `hexagon.idl` calls, and need nothing of
 * the SDK themselves. Block and buffer come from another processor and are not trusted: every offset and
 * length is checked before anything is read, and a block that is refused changes nothing.
 */
#include "kernel_abi.h"

void nybl_hvx_matmul_q8(const struct matmul_args *);
void nybl_hvx_matmul_q4(const struct matmul_args *);
void nybl_hvx_matmul_q3(const struct matmul_args *);
void nybl_hvx_matmul_q2(const struct matmul_args *);

__attribute__((visibility("default"))) int nybl_hexagon_open(const char *uri, uint64_t *handle);
__attribute__((visibility("default"))) int nybl_hexagon_close(uint64_t handle);
__attribute__((visibility("default"))) int nybl_hexagon_matmul(uint64_t handle, unsigned char *buffer, int length,
                                                               uint64_t block);

/* Largest dimension: products of two of them stay far from overflow in 64 bits. */
#define MOST (1u << 24)

/* Whether `bytes` from `offset` lie in the buffer, and start at a whole line. */
static int is_inside(uint64_t offset, uint64_t bytes, uint64_t length) {
    return offset % 64 == 0 && offset <= length && bytes <= length - offset;
}

static int is_dimension(uint32_t value) {
    return value > 0 && value <= MOST;
}

static int run(unsigned char *buffer, uint64_t length, const struct hexagon_matmul *b) {
    void (*row)(const struct matmul_args *);
    uint64_t rows = 32;
    switch (b->bits) {
    case 8:
        row = nybl_hvx_matmul_q8;
        break;
    case 4:
        row = nybl_hvx_matmul_q4;
        break;
    case 3:
        row = nybl_hvx_matmul_q3;
        rows = 128;
        break;
    case 2:
        row = nybl_hvx_matmul_q2;
        rows = 64;
        break;
    default:
        return HEXAGON_FORMAT;
    }
    if (b->offset > (b->bits == 8 ? 0 : 2))
        return HEXAGON_FORMAT;
    if (b->group % 16 != 0 || b->group == 0 || b->group > (b->bits == 8 ? 1u << 17 : 128u))
        return HEXAGON_SHAPE;
    if (!is_dimension(b->groups) || !is_dimension(b->panels) || !is_dimension(b->m) || !is_dimension(b->n))
        return HEXAGON_SHAPE;
    if (!is_dimension(b->x_stride) || !is_dimension(b->y_stride) || b->x_stride % 16 != 0)
        return HEXAGON_SHAPE;
    const uint64_t k = (uint64_t)b->group * b->groups;
    const uint64_t panel_bytes = b->groups * (b->group * rows * b->bits / 8 + rows * (b->offset ? 4 : 2));
    if (b->x_stride < k || b->y_stride < b->n || b->n > b->panels * rows || b->n <= (b->panels - 1) * rows)
        return HEXAGON_SHAPE;
    const uint64_t last = b->m - 1, tables = (uint64_t)b->m * b->groups * 4;
    if (panel_bytes > length || !is_inside(b->w, panel_bytes * b->panels, length) ||
        !is_inside(b->x, last * b->x_stride + k, length) || !is_inside(b->x_scales, tables, length) ||
        !is_inside(b->x_sums, tables, length) || !is_inside(b->y, (last * b->y_stride + b->n) * 4, length))
        return HEXAGON_RANGE;
    const struct matmul_args args = {
        .w = buffer + b->w,
        .panel_bytes = panel_bytes,
        .panels = b->panels,
        .groups = b->groups,
        .group = b->group,
        .offset = b->offset,
        .x = buffer + b->x,
        .x_stride = b->x_stride,
        .x_scales = (const float *)(buffer + b->x_scales),
        .x_sums = (const int32_t *)(buffer + b->x_sums),
        .m = b->m,
        .y = (float *)(buffer + b->y),
        .y_stride = b->y_stride,
        .n = b->n,
    };
    row(&args);
    return HEXAGON_OK;
}

int nybl_hexagon_open(const char *uri, uint64_t *handle) {
    (void)uri;
    *handle = 0;
    return HEXAGON_OK;
}

int nybl_hexagon_close(uint64_t handle) {
    (void)handle;
    return HEXAGON_OK;
}

int nybl_hexagon_matmul(uint64_t handle, unsigned char *buffer, int length, uint64_t block) {
    (void)handle;
    if (!buffer || length < 0 || (uintptr_t)buffer % 64 != 0)
        return HEXAGON_BUFFER;
    if (!is_inside(block, sizeof(struct hexagon_matmul), (uint64_t)length))
        return HEXAGON_RANGE;
    /* A copy: the outputs may lie on it, and the host may write to it meanwhile. */
    const struct hexagon_matmul copy = *(const volatile struct hexagon_matmul *)(buffer + block);
    if (copy.version != HEXAGON_VERSION)
        return HEXAGON_OTHER_VERSION;
    return run(buffer, (uint64_t)length, &copy);
}
