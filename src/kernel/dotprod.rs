//! SDOT rows: the activations of sixteen `k` in one register, four lines against its four lanes.
//!
//! A byte of a line holds two rows at the same `k`. The kernel multiplies the raw byte, which as a
//! signed number is `16 * high + low` (the high nibble is stored in two's complement), and the byte
//! masked with 15, which is `low`; the high dot is `(raw - low) / 16`, once a group. That is one AND
//! for two dots and no shift, of which most Arm cores do half as many in a cycle.
//!
//! The integers become floats without a conversion, too (SCVTF costs four times a subtraction): the
//! accumulators start from the bits of a float so large that its last place is worth one, or a
//! sixteenth for the high dots, and at the end that float is subtracted. Exact, because the dot of a
//! group stays below 2^22 of these units: 16 * 15 * 128 * 128 at most. Zero points of 16 bits can make
//! more of it, so that format keeps the conversion.
//!
//! Loads come first, then masks, then dots, with at least eight sums in flight: in-order cores run
//! the instructions as they stand here.

use super::abi::MatmulArgs;
use super::arm_asm::sdot;
use super::layout::PANEL;
use super::neon::{HAS_MINIMUM, HAS_ZERO, Quads, RowGroup, Terms, assert_group, finish};
use std::arch::aarch64::*;

/// 1.5 * 2^23: the last place is worth one.
pub(super) const ONES: f32 = 12_582_912.0;
/// 1.5 * 2^19: the last place is worth a sixteenth.
pub(super) const SIXTEENTHS: f32 = 786_432.0;

/// Where the raw and the low sums of a group start, for activations that sum up to `sum`.
///
/// Symmetric weights take 8 off, which the high row has by its two's complement; the others add it
/// to the high row again, times 16 here.
#[inline]
pub(super) fn starts<const KIND: u8>(sum: i32) -> (i32, i32) {
    let (ones, sixteenths) = (ONES.to_bits() as i32, SIXTEENTHS.to_bits() as i32);
    let (low, high) = match KIND {
        HAS_ZERO => (0, 128 * sum),
        HAS_MINIMUM => (ones, sixteenths + 128 * sum),
        _ => (ones - 8 * sum, sixteenths),
    };
    (low.wrapping_add(high), low)
}

/// The number whose bits were added to the bits of `base`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn above(base: f32, bits: int32x4_t) -> float32x4_t {
    vsubq_f32(vreinterpretq_f32_s32(bits), vdupq_n_f32(base))
}

/// Four bits: `M` rows of activations against one panel, `PARTS` of the four vectors of a line at a
/// time.
#[inline(never)]
#[target_feature(enable = "neon,dotprod")]
unsafe fn q4_walk<const M: usize, const PARTS: usize, const KIND: u8>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
) {
    // SAFETY: every pointer stays inside the panel and the `M` activation rows from `first_row`,
    // which the caller vouches for.
    unsafe {
        assert_group(a);
        let mut w = a.w.add(panel * a.panel_bytes);
        let mut acc: Quads<M> = [[vdupq_n_f32(0.0); PANEL / 4]; M];
        for g in 0..a.groups {
            let tables = w.add(a.group * 16);
            for part in (0..4 / PARTS).map(|part| part * PARTS) {
                let mut raw = [[vdupq_n_s32(0); PARTS]; M];
                let mut low = [[vdupq_n_s32(0); PARTS]; M];
                for r in 0..M {
                    let (start, start_low) =
                        starts::<KIND>(RowGroup::load(a, first_row + r, g).sum);
                    raw[r] = [vdupq_n_s32(start); PARTS];
                    low[r] = [vdupq_n_s32(start_low); PARTS];
                }
                for k in (0..a.group).step_by(16) {
                    let mut x = [vdupq_n_s8(0); M];
                    for r in 0..M {
                        let at = (first_row + r) * a.x_stride + g * a.group + k;
                        x[r] = vld1q_s8(a.x.cast::<i8>().add(at));
                    }
                    let lines = w.add(k * 16 + part * 16);
                    q4_line::<0, M, PARTS>(lines, &x, &mut raw, &mut low);
                    q4_line::<1, M, PARTS>(lines, &x, &mut raw, &mut low);
                    q4_line::<2, M, PARTS>(lines, &x, &mut raw, &mut low);
                    q4_line::<3, M, PARTS>(lines, &x, &mut raw, &mut low);
                }
                for p in 0..PARTS {
                    let quads = [part + p, 4 + part + p];
                    let terms = [
                        Terms::load::<KIND>(tables, quads[0]),
                        Terms::load::<KIND>(tables, quads[1]),
                    ];
                    for r in 0..M {
                        let x = RowGroup::load(a, first_row + r, g);
                        let high = vsubq_s32(raw[r][p], low[r][p]);
                        let dots = if KIND == HAS_ZERO {
                            let high = vshrq_n_s32::<4>(high);
                            [
                                vcvtq_f32_s32(terms[0].less_zeros(low[r][p], x.sum)),
                                vcvtq_f32_s32(terms[1].less_zeros(high, x.sum)),
                            ]
                        } else {
                            [above(ONES, low[r][p]), above(SIXTEENTHS, high)]
                        };
                        for half in 0..2 {
                            let acc = acc[r].get_unchecked_mut(quads[half]);
                            *acc = terms[half].scale_in::<KIND>(*acc, dots[half], x);
                        }
                    }
                }
            }
            w = tables.add(if KIND == 0 { 64 } else { 128 });
        }
        finish(a, panel, first_row, &acc);
    }
}

/// The line for `LANE` of the activations.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn q4_line<const LANE: usize, const M: usize, const PARTS: usize>(
    lines: *const u8,
    x: &[int8x16_t; M],
    raw: &mut [[int32x4_t; PARTS]; M],
    low: &mut [[int32x4_t; PARTS]; M],
) {
    let mut whole = [vdupq_n_s8(0); PARTS];
    let mut masked = [vdupq_n_s8(0); PARTS];
    for p in 0..PARTS {
        // SAFETY: the caller vouches for four lines.
        whole[p] = unsafe { vld1q_s8(lines.add(LANE * 64 + p * 16).cast()) };
        masked[p] = vandq_s8(whole[p], vdupq_n_s8(15));
    }
    for r in 0..M {
        for p in 0..PARTS {
            raw[r][p] = sdot::<LANE>(raw[r][p], whole[p], x[r]);
        }
    }
    for r in 0..M {
        for p in 0..PARTS {
            low[r][p] = sdot::<LANE>(low[r][p], masked[p], x[r]);
        }
    }
}

/// Signed bytes: `M` rows of activations against one panel, `PARTS` of the eight vectors of a step
/// at a time.
#[inline(never)]
#[target_feature(enable = "neon,dotprod")]
unsafe fn q8_walk<const M: usize, const PARTS: usize>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
) {
    // SAFETY: as in `q4_walk`.
    unsafe {
        assert_group(a);
        let mut w = a.w.add(panel * a.panel_bytes);
        let mut acc: Quads<M> = [[vdupq_n_f32(0.0); PANEL / 4]; M];
        for g in 0..a.groups {
            let tables = w.add(a.group * 32);
            for part in (0..8 / PARTS).map(|part| part * PARTS) {
                let mut dots = [[vdupq_n_s32(ONES.to_bits() as i32); PARTS]; M];
                for k in (0..a.group).step_by(16) {
                    let mut x = [vdupq_n_s8(0); M];
                    for r in 0..M {
                        let at = (first_row + r) * a.x_stride + g * a.group + k;
                        x[r] = vld1q_s8(a.x.cast::<i8>().add(at));
                    }
                    let lines = w.add(k * 32 + part * 16);
                    q8_line::<0, M, PARTS>(lines, &x, &mut dots);
                    q8_line::<1, M, PARTS>(lines, &x, &mut dots);
                    q8_line::<2, M, PARTS>(lines, &x, &mut dots);
                    q8_line::<3, M, PARTS>(lines, &x, &mut dots);
                }
                for p in 0..PARTS {
                    let quad = part + p;
                    let terms = Terms::load::<0>(tables, quad);
                    for r in 0..M {
                        let x = RowGroup::load(a, first_row + r, g);
                        let dots = above(ONES, dots[r][p]);
                        let acc = acc[r].get_unchecked_mut(quad);
                        *acc = terms.scale_in::<0>(*acc, dots, x);
                    }
                }
            }
            w = tables.add(64);
        }
        finish(a, panel, first_row, &acc);
    }
}

/// The two lines for `LANE` of the activations.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn q8_line<const LANE: usize, const M: usize, const PARTS: usize>(
    lines: *const u8,
    x: &[int8x16_t; M],
    dots: &mut [[int32x4_t; PARTS]; M],
) {
    let mut whole = [vdupq_n_s8(0); PARTS];
    for p in 0..PARTS {
        // SAFETY: the caller vouches for four times two lines.
        whole[p] = unsafe { vld1q_s8(lines.add(LANE * 128 + p * 16).cast()) };
    }
    for r in 0..M {
        for p in 0..PARTS {
            dots[r][p] = sdot::<LANE>(dots[r][p], whole[p], x[r]);
        }
    }
}

/// As many vectors of a line at a time as leave registers for the sums of `M` rows.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn q4_panel<const M: usize, const KIND: u8>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
) {
    // SAFETY: handed on.
    unsafe {
        match M {
            1 | 2 => q4_walk::<M, 4, KIND>(a, panel, first_row),
            3 | 4 => q4_walk::<M, 2, KIND>(a, panel, first_row),
            _ => q4_walk::<M, 1, KIND>(a, panel, first_row),
        }
    }
}

/// As many vectors of a step at a time as leave registers for the sums of `M` rows.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn q8_panel<const M: usize>(a: &MatmulArgs, panel: usize, first_row: usize) {
    // SAFETY: handed on.
    unsafe {
        match M {
            1 | 2 => q8_walk::<M, 8>(a, panel, first_row),
            3 | 4 => q8_walk::<M, 4>(a, panel, first_row),
            _ => q8_walk::<M, 2>(a, panel, first_row),
        }
    }
}

super::exact_m! {
    [#[target_feature(enable = "neon,dotprod")]] 8;
    /// Four bits, symmetric.
    matmul_q4 = q4_panel[0];
    /// Four bits with a zero point.
    matmul_q4z = q4_panel[HAS_ZERO];
    /// Four bits with a minimum.
    matmul_q4m = q4_panel[HAS_MINIMUM];
    /// Signed bytes.
    matmul_q8 = q8_panel[];
}
