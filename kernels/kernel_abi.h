/* The argument blocks of the kernel rows, for those that are written in C.
 *
 * Generated from src/kernel by cbindgen; `BLESS=1 cargo test --test header` writes it anew. No part of
 * the interface of the library: that is include/nybl.h.
 */

#ifndef NYBL_KERNEL_ABI_H
#define NYBL_KERNEL_ABI_H

#include <stddef.h>
#include <stdint.h>

/**
 * The version of the block.
 */
#define HEXAGON_VERSION 1

/**
 * Done.
 */
#define HEXAGON_OK 0

/**
 * The buffer is missing, or does not start at a multiple of 64.
 */
#define HEXAGON_BUFFER 1

/**
 * The block is of another version.
 */
#define HEXAGON_OTHER_VERSION 2

/**
 * No such format.
 */
#define HEXAGON_FORMAT 3

/**
 * Sizes that do not belong together.
 */
#define HEXAGON_SHAPE 4

/**
 * Something does not lie in the buffer, or not at a multiple of 64.
 */
#define HEXAGON_RANGE 5

/**
 * `y[m, n] = x[m, k] * w[n, k]^T` for a run of panels.
 */
struct matmul_args {
    /**
     * First panel.
     */
    const uint8_t *w;
    /**
     * Bytes from one panel to the next.
     */
    size_t panel_bytes;
    /**
     * Panels to multiply.
     */
    size_t panels;
    /**
     * Groups along `k`; for float formats `k` itself.
     */
    size_t groups;
    /**
     * Values of `k` in a group, a multiple of 16; 1 for float formats.
     */
    size_t group;
    /**
     * What follows the scales of a group: 0 nothing, 1 zero points (i16), 2 minima (f16).
     */
    uint32_t offset;
    /**
     * Activations: int8 for quantised formats, f32 for float formats; `m` rows.
     */
    const uint8_t *x;
    /**
     * Elements from one activation row to the next.
     */
    size_t x_stride;
    /**
     * One scale for each activation row and group; unused by float formats.
     */
    const float *x_scales;
    /**
     * The sum of each activation row and group; unused by float formats.
     */
    const int32_t *x_sums;
    /**
     * Activation rows.
     */
    size_t m;
    /**
     * First output: row 0, first output row of the first panel.
     */
    float *y;
    /**
     * Elements from one output row to the next.
     */
    size_t y_stride;
    /**
     * Outputs to write in each row: at most what the panels have, and into the last of them.
     */
    size_t n;
};

/**
 * One matmul in a shared buffer: what `MatmulArgs` says, in numbers of fixed width, with offsets in bytes
 * from the start of the buffer where that has pointers. Offsets are multiples of 64.
 */
struct hexagon_matmul {
    /**
     * `HEXAGON_VERSION`.
     */
    uint32_t version;
    /**
     * Bits of a code: 8, 4, 3 or 2.
     */
    uint32_t bits;
    /**
     * What follows the scales of a group: 0 nothing, 1 zero points (i16), 2 minima (f16).
     */
    uint32_t offset;
    /**
     * Values of `k` in a group, a multiple of 16.
     */
    uint32_t group;
    /**
     * Groups along `k`.
     */
    uint32_t groups;
    /**
     * Panels to multiply.
     */
    uint32_t panels;
    /**
     * Activation rows.
     */
    uint32_t m;
    /**
     * Outputs to write in each row: at most what the panels have, and into the last of them.
     */
    uint32_t n;
    /**
     * Bytes from one activation row to the next, a multiple of 16.
     */
    uint32_t x_stride;
    /**
     * Floats from one output row to the next.
     */
    uint32_t y_stride;
    /**
     * The panels, packed.
     */
    uint64_t w;
    /**
     * Activations: int8.
     */
    uint64_t x;
    /**
     * One f32 for each activation row and group.
     */
    uint64_t x_scales;
    /**
     * One i32 for each activation row and group.
     */
    uint64_t x_sums;
    /**
     * The outputs: f32.
     */
    uint64_t y;
};

#endif  /* NYBL_KERNEL_ABI_H */
