//! NEON rows for cores without SDOT (Cortex-A53, A72): SMLAL in 16 bits, widened once every 32
//! values of `k`. What all the Arm files share is here, too.
//!
//! The raw byte of a nibble pair does not fit a 16-bit sum, so both nibbles are isolated: one AND for
//! the low row, one arithmetic shift for the high row, whose stored nibble is two's complement. A
//! lane of 16 bits takes 8 products of at most 15 * 128 before it is added to its neighbour, which
//! stays below 2^15 (2 * 8 * 15 * 128 = 30720). Two products of bytes fit as well (2 * 128 * 127),
//! because activations are never -128.

use super::abi::MatmulArgs;
use super::arm_asm::opaque;
use super::layout::PANEL;
use std::arch::aarch64::*;

pub(super) const HAS_ZERO: u8 = 1;
pub(super) const HAS_MINIMUM: u8 = 2;

/// The 32 outputs of `M` activation rows as vectors of four neighbours.
pub(super) type Quads<const M: usize> = [[float32x4_t; PANEL / 4]; M];

/// Four f32 from four f16.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn halves(table: *const u8) -> float32x4_t {
    // SAFETY: the caller vouches for 8 bytes.
    vcvt_f32_f16(vreinterpret_f16_u16(unsafe { vld1_u16(table.cast()) }))
}

/// The four activations of `LANE` in every lane.
#[inline]
#[target_feature(enable = "neon")]
fn broadcast<const LANE: i32>(x: int8x16_t) -> int8x16_t {
    opaque(vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(x))))
}

/// Tells the compiler what a group is, which spares it a way around every loop.
///
/// # Safety
/// The block is one of a quantised format.
#[inline]
pub(super) unsafe fn assert_group(a: &MatmulArgs) {
    // SAFETY: groups are of 32, 64 or 128.
    unsafe { std::hint::assert_unchecked(a.group >= 32 && a.group.is_multiple_of(32)) };
}

/// The scale and the sum of one activation row in one group.
#[derive(Clone, Copy)]
pub(super) struct RowGroup {
    pub(super) scale: f32,
    pub(super) sum: i32,
}

impl RowGroup {
    /// # Safety
    /// `a` has activation row `row` and group `g`.
    #[inline]
    pub(super) unsafe fn load(a: &MatmulArgs, row: usize, g: usize) -> Self {
        // SAFETY: the caller vouches for the place.
        unsafe {
            let at = row * a.groups + g;
            Self { scale: *a.x_scales.add(at), sum: *a.x_sums.add(at) }
        }
    }
}

/// The scales of four rows in one group, and their offsets where the format has them: loaded once
/// for all rows of activations.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    scale: float32x4_t,
    minimum: float32x4_t,
    zero: int16x4_t,
}

impl Terms {
    /// The terms of the rows of `quad`.
    ///
    /// # Safety
    /// `tables` points to the scales of a group and to the offsets that `KIND` has.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn load<const KIND: u8>(tables: *const u8, quad: usize) -> Self {
        let mut terms =
            Self { scale: vdupq_n_f32(0.0), minimum: vdupq_n_f32(0.0), zero: vdup_n_s16(0) };
        let offsets = tables.wrapping_add(64 + quad * 8);
        // SAFETY: the caller vouches for both tables.
        unsafe {
            terms.scale = halves(tables.add(quad * 8));
            match KIND {
                HAS_ZERO => terms.zero = vld1_s16(offsets.cast()),
                HAS_MINIMUM => terms.minimum = halves(offsets),
                _ => {}
            }
        }
        terms
    }

    /// `dots` less the zero points times the sum of the activations, which has 16 bits: at most 128
    /// codes of 8.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn less_zeros(&self, dots: int32x4_t, sum: i32) -> int32x4_t {
        vmlsl_n_s16(dots, self.zero, sum as i16)
    }

    /// Adds the dots of one group to `acc`, scaled.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn scale_in<const KIND: u8>(
        &self,
        acc: float32x4_t,
        dots: float32x4_t,
        x: RowGroup,
    ) -> float32x4_t {
        let acc = vfmaq_f32(acc, dots, vmulq_n_f32(self.scale, x.scale));
        if KIND == HAS_MINIMUM {
            vfmaq_n_f32(acc, vmulq_n_f32(self.minimum, x.scale), x.sum as f32)
        } else {
            acc
        }
    }
}

/// Four bits: `M` rows of activations against one panel, `PARTS` of the four vectors of a line at a
/// time.
#[inline(never)]
#[target_feature(enable = "neon")]
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
                let mut low = [[vdupq_n_s32(0); PARTS]; M];
                let mut high = [[vdupq_n_s32(0); PARTS]; M];
                for first in (0..a.group).step_by(32) {
                    let mut low16 = [[[vdupq_n_s16(0); 2]; PARTS]; M];
                    let mut high16 = [[[vdupq_n_s16(0); 2]; PARTS]; M];
                    for k in [first, first + 16] {
                        let mut x = [vdupq_n_s8(0); M];
                        for r in 0..M {
                            let at = (first_row + r) * a.x_stride + g * a.group + k;
                            x[r] = vld1q_s8(a.x.cast::<i8>().add(at));
                        }
                        let lines = w.add(k * 16 + part * 16);
                        q4_line::<0, M, PARTS>(lines, &x, &mut low16, &mut high16);
                        q4_line::<1, M, PARTS>(lines, &x, &mut low16, &mut high16);
                        q4_line::<2, M, PARTS>(lines, &x, &mut low16, &mut high16);
                        q4_line::<3, M, PARTS>(lines, &x, &mut low16, &mut high16);
                    }
                    for r in 0..M {
                        for p in 0..PARTS {
                            low[r][p] = widen(low[r][p], low16[r][p]);
                            high[r][p] = widen(high[r][p], high16[r][p]);
                        }
                    }
                }
                for p in 0..PARTS {
                    let quads = [part + p, 4 + part + p];
                    let terms = [
                        Terms::load::<KIND>(tables, quads[0]),
                        Terms::load::<KIND>(tables, quads[1]),
                    ];
                    for r in 0..M {
                        let x = RowGroup::load(a, first_row + r, g);
                        // Eight times the sum is still in the low dots of symmetric weights, and
                        // missing in the high dots, stored less 8, of the others.
                        let eight = vdupq_n_s32(8 * x.sum);
                        let mut dots = [low[r][p], high[r][p]];
                        if KIND == 0 {
                            dots[0] = vsubq_s32(dots[0], eight);
                        } else {
                            dots[1] = vaddq_s32(dots[1], eight);
                        }
                        for half in 0..2 {
                            if KIND == HAS_ZERO {
                                dots[half] = terms[half].less_zeros(dots[half], x.sum);
                            }
                            let acc = acc[r].get_unchecked_mut(quads[half]);
                            let dots = vcvtq_f32_s32(dots[half]);
                            *acc = terms[half].scale_in::<KIND>(*acc, dots, x);
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
#[target_feature(enable = "neon")]
unsafe fn q4_line<const LANE: i32, const M: usize, const PARTS: usize>(
    lines: *const u8,
    x: &[int8x16_t; M],
    low: &mut [[[int16x8_t; 2]; PARTS]; M],
    high: &mut [[[int16x8_t; 2]; PARTS]; M],
) {
    let mut lows = [vdupq_n_s8(0); PARTS];
    let mut highs = [vdupq_n_s8(0); PARTS];
    for p in 0..PARTS {
        // SAFETY: the caller vouches for four lines.
        let line = unsafe { vld1q_s8(lines.add(LANE as usize * 64 + p * 16).cast()) };
        lows[p] = vandq_s8(line, vdupq_n_s8(15));
        highs[p] = vshrq_n_s8::<4>(line);
    }
    for r in 0..M {
        let x = broadcast::<LANE>(x[r]);
        for p in 0..PARTS {
            low[r][p] = multiply_add(low[r][p], lows[p], x);
            high[r][p] = multiply_add(high[r][p], highs[p], x);
        }
    }
}

/// Adds sixteen products of bytes to two vectors of 16-bit sums.
#[inline]
#[target_feature(enable = "neon")]
fn multiply_add(sums: [int16x8_t; 2], w: int8x16_t, x: int8x16_t) -> [int16x8_t; 2] {
    [vmlal_s8(sums[0], vget_low_s8(w), vget_low_s8(x)), vmlal_high_s8(sums[1], w, x)]
}

/// Adds the sixteen 16-bit sums of four rows to their four dots.
#[inline]
#[target_feature(enable = "neon")]
fn widen(dots: int32x4_t, sums: [int16x8_t; 2]) -> int32x4_t {
    vpadalq_s16(dots, vpaddq_s16(sums[0], sums[1]))
}

/// Signed bytes: `M` rows of activations against one panel, `PARTS` of the eight vectors of a step
/// at a time.
#[inline(never)]
#[target_feature(enable = "neon")]
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
                let mut dots = [[[vdupq_n_s32(0); 2]; PARTS]; M];
                for k in (0..a.group).step_by(16) {
                    let mut x = [vdupq_n_s8(0); M];
                    for r in 0..M {
                        let at = (first_row + r) * a.x_stride + g * a.group + k;
                        x[r] = vld1q_s8(a.x.cast::<i8>().add(at));
                    }
                    let lines = w.add(k * 32 + part * 16);
                    q8_lines::<0, 1, M, PARTS>(lines, &x, &mut dots);
                    q8_lines::<2, 3, M, PARTS>(lines, &x, &mut dots);
                }
                for p in 0..PARTS {
                    let quad = part + p;
                    let terms = Terms::load::<0>(tables, quad);
                    for r in 0..M {
                        let x = RowGroup::load(a, first_row + r, g);
                        let dots = vcvtq_f32_s32(vpaddq_s32(dots[r][p][0], dots[r][p][1]));
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

/// The lines for the activations of `NEAR` and `FAR`, the next.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn q8_lines<const NEAR: i32, const FAR: i32, const M: usize, const PARTS: usize>(
    lines: *const u8,
    x: &[int8x16_t; M],
    dots: &mut [[[int32x4_t; 2]; PARTS]; M],
) {
    for p in 0..PARTS {
        let at = lines.wrapping_add(NEAR as usize * 128 + p * 16).cast::<i8>();
        // SAFETY: the caller vouches for four times two lines.
        let (near, far) = unsafe { (vld1q_s8(at), vld1q_s8(at.add(128))) };
        for r in 0..M {
            let sums = multiply_add([vdupq_n_s16(0); 2], near, broadcast::<NEAR>(x[r]));
            let sums = multiply_add(sums, far, broadcast::<FAR>(x[r]));
            dots[r][p][0] = vpadalq_s16(dots[r][p][0], sums[0]);
            dots[r][p][1] = vpadalq_s16(dots[r][p][1], sums[1]);
        }
    }
}

/// Floats of `BYTES` bytes each: `M` rows of activations against one panel.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn float_panel<const M: usize, const BYTES: usize, const BRAIN: bool>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
) {
    // SAFETY: as in `q4_walk`.
    unsafe {
        let mut w = a.w.add(panel * a.panel_bytes);
        let mut acc: Quads<M> = [[vdupq_n_f32(0.0); PANEL / 4]; M];
        for k in 0..a.groups {
            for quad in 0..PANEL / 4 {
                let at = w.add(quad * 4 * BYTES);
                let weights = match (BYTES, BRAIN) {
                    (4, _) => vld1q_f32(at.cast()),
                    (_, false) => halves(at),
                    (_, true) => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(at.cast()))),
                };
                for r in 0..M {
                    let x = *a.x.cast::<f32>().add((first_row + r) * a.x_stride + k);
                    acc[r][quad] = vfmaq_n_f32(acc[r][quad], weights, x);
                }
            }
            w = w.add(PANEL * BYTES);
        }
        finish(a, panel, first_row, &acc);
    }
}

/// Writes the outputs of `M` activation rows, or as many of a row as are left.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn finish<const M: usize>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
    acc: &Quads<M>,
) {
    let count = PANEL.min(a.n - panel * PANEL);
    for (r, acc) in acc.iter().enumerate() {
        let mut outputs = [0.0_f32; PANEL];
        // SAFETY: 32 floats on the stack; then `count` of the outputs that the caller vouches for.
        unsafe {
            for (quad, acc) in acc.iter().enumerate() {
                vst1q_f32(outputs.as_mut_ptr().add(quad * 4), *acc);
            }
            let y = a.y.add((first_row + r) * a.y_stride + panel * PANEL);
            std::ptr::copy_nonoverlapping(outputs.as_ptr(), y, count);
        }
    }
}

/// As many vectors of a line at a time as leave registers for the sums of `M` rows.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn q4_panel<const M: usize, const KIND: u8>(a: &MatmulArgs, panel: usize, first_row: usize) {
    // SAFETY: handed on.
    unsafe {
        match M {
            1 => q4_walk::<M, 2, KIND>(a, panel, first_row),
            _ => q4_walk::<M, 1, KIND>(a, panel, first_row),
        }
    }
}

/// As many vectors of a step at a time as leave registers for the sums of `M` rows.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn q8_panel<const M: usize>(a: &MatmulArgs, panel: usize, first_row: usize) {
    // SAFETY: handed on.
    unsafe {
        match M {
            1 => q8_walk::<M, 4>(a, panel, first_row),
            2 => q8_walk::<M, 2>(a, panel, first_row),
            _ => q8_walk::<M, 1>(a, panel, first_row),
        }
    }
}

super::exact_m! {
    [#[target_feature(enable = "neon")]] 4;
    /// Four bits, symmetric.
    matmul_q4 = q4_panel[0];
    /// Four bits with a zero point.
    matmul_q4z = q4_panel[HAS_ZERO];
    /// Four bits with a minimum.
    matmul_q4m = q4_panel[HAS_MINIMUM];
    /// Signed bytes.
    matmul_q8 = q8_panel[];
}

super::exact_m! {
    // Eight sums a row: four rows would not fit the registers.
    [#[target_feature(enable = "neon")]] 3;
    /// f32 weights.
    matmul_f32 = float_panel[4, false];
    /// f16 weights.
    matmul_f16 = float_panel[2, false];
    /// bf16 weights.
    matmul_bf16 = float_panel[2, true];
}

super::ops::instantiate!("neon");
