/* The argument blocks of the kernel rows, for those that are written in C.
 *
 * Generated from src/kernel/abi.rs by cbindgen; `BLESS=1 cargo test --test header` writes it anew. No part of
 * the interface of the library: that is include/nybl.h.
 */

#ifndef NYBL_KERNEL_ABI_H
#define NYBL_KERNEL_ABI_H

#include <stddef.h>
#include <stdint.h>

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

#endif  /* NYBL_KERNEL_ABI_H */
