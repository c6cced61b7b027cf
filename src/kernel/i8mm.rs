//! SMMLA rows: two rows of activations times two outputs, eight `k` each, in one instruction.
//!
//! SMMLA wants eight `k` of an output side by side where a line has four, so two neighbouring lines
//! are zipped: a register of each gives two registers of two outputs. This is paid once for all rows
//! of activations. The rest is the scheme of [`super::dotprod`]: the raw and the masked byte, sums that
//! start at the bits of a large float.
//!
//! Sums stay in the tiles that SMMLA makes, `[row 0 of output 0, row 0 of 1, row 1 of 0, row 1 of 1]`,
//! until a panel is done; scales are doubled to fit them. The activations of a group are laid out in
//! pairs of rows on the stack, through general registers, which leaves the vector pipes to the dots.
//! An odd last row is paired with itself. Where zipping or the idle half of a pair would cost more than
//! SMMLA saves, for one row or three and for two rows of bytes, [`super::dotprod`] does the work.

use super::abi::MatmulArgs;
use super::arm_asm::smmla;
use super::dotprod::{self, ONES, SIXTEENTHS, above};
use super::layout::PANEL;
use super::neon::{HAS_MINIMUM, HAS_ZERO, Quads, RowGroup, assert_group, finish, halves};
use std::arch::aarch64::*;

/// Two rows of activations times the panel's outputs: two tiles for four outputs.
type Tiles = [[float32x4_t; 2]; PANEL / 4];

/// Sixteen steps of eight `k`, the most a group has, of up to four pairs of rows.
type Pairs = [[u64; 2]; 16 * 4];

/// The `count` activation rows from `first`, as pairs.
#[derive(Clone, Copy)]
struct Rows {
    first: usize,
    count: usize,
}

impl Rows {
    /// The two rows of `pair`, the last one twice where it is alone.
    #[inline]
    fn of(self, pair: usize) -> [usize; 2] {
        [self.first + 2 * pair, self.first + (2 * pair + 1).min(self.count - 1)]
    }
}

/// Lays out the activations of group `g` for [`smmla`]: `PAIRS` registers for each eight `k`.
#[inline(always)]
unsafe fn pair_up<const PAIRS: usize>(a: &MatmulArgs, rows: Rows, g: usize, out: &mut Pairs) {
    for first in (0..a.group).step_by(32) {
        for pair in 0..PAIRS {
            // SAFETY: the caller vouches for whole groups of the rows; a group has at most 16 steps.
            unsafe {
                let [near, far] = rows.of(pair).map(|row| {
                    let at = row * a.x_stride + g * a.group + first;
                    a.x.add(at).cast::<[u64; 4]>().read_unaligned()
                });
                for step in 0..4 {
                    *out.get_unchecked_mut((first / 8 + step) * PAIRS + pair) =
                        [near[step], far[step]];
                }
            }
        }
    }
}

/// Loads the scales and sums of all pairs in group `g`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn pair_groups<const PAIRS: usize>(
    a: &MatmulArgs,
    rows: Rows,
    g: usize,
) -> [PairGroup; PAIRS] {
    // SAFETY: handed on.
    let mut x = [unsafe { PairGroup::load(a, rows, 0, g) }; PAIRS];
    for pair in 1..PAIRS {
        // SAFETY: handed on.
        x[pair] = unsafe { PairGroup::load(a, rows, pair, g) };
    }
    x
}

/// The scales and the sums of two activation rows in one group, as SMMLA's tiles have them.
#[derive(Clone, Copy)]
struct PairGroup {
    scale: float32x4_t,
    sum: int32x4_t,
}

impl PairGroup {
    /// # Safety
    /// `a` has the rows of `pair` and group `g`.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(a: &MatmulArgs, rows: Rows, pair: usize, g: usize) -> Self {
        // SAFETY: handed on.
        let [near, far] = rows.of(pair).map(|row| unsafe { RowGroup::load(a, row, g) });
        Self {
            scale: vcombine_f32(vdup_n_f32(near.scale), vdup_n_f32(far.scale)),
            sum: vcombine_s32(vdup_n_s32(near.sum), vdup_n_s32(far.sum)),
        }
    }

    /// Where the raw and the low sums start; see [`dotprod::starts`].
    #[inline]
    #[target_feature(enable = "neon")]
    fn starts<const KIND: u8>(&self) -> [int32x4_t; 2] {
        let ones = vdupq_n_s32(ONES.to_bits() as i32);
        let sixteenths = vdupq_n_s32(SIXTEENTHS.to_bits() as i32);
        let (low, high) = match KIND {
            HAS_ZERO => (vdupq_n_s32(0), vshlq_n_s32::<7>(self.sum)),
            HAS_MINIMUM => (ones, vaddq_s32(sixteenths, vshlq_n_s32::<7>(self.sum))),
            _ => (vsubq_s32(ones, vshlq_n_s32::<3>(self.sum)), sixteenths),
        };
        [vaddq_s32(low, high), low]
    }
}

/// The scales of two times two outputs in one group, each output twice, and their offsets where the
/// format has them.
#[derive(Clone, Copy)]
struct TileTerms {
    scale: [float32x4_t; 2],
    minimum: [float32x4_t; 2],
    zero: [int32x4_t; 2],
}

impl TileTerms {
    /// The terms of the rows of `quad`.
    ///
    /// # Safety
    /// `tables` points to the scales of a group and to the offsets that `KIND` has.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load<const KIND: u8>(tables: *const u8, quad: usize) -> Self {
        let nothing = vdupq_n_f32(0.0);
        let mut terms =
            Self { scale: [nothing; 2], minimum: [nothing; 2], zero: [vdupq_n_s32(0); 2] };
        let offsets = tables.wrapping_add(64 + quad * 8);
        // SAFETY: the caller vouches for both tables.
        unsafe {
            terms.scale = twice(halves(tables.add(quad * 8)));
            match KIND {
                HAS_ZERO => {
                    let zero = vreinterpretq_f32_s32(vmovl_s16(vld1_s16(offsets.cast())));
                    terms.zero = twice(zero).map(|zero| vreinterpretq_s32_f32(zero));
                }
                HAS_MINIMUM => terms.minimum = twice(halves(offsets)),
                _ => {}
            }
        }
        terms
    }

    /// Adds the dots of one group to the tile of outputs `2 * half` and the next, scaled.
    #[inline]
    #[target_feature(enable = "neon")]
    fn scale_in<const KIND: u8>(
        &self,
        half: usize,
        acc: float32x4_t,
        dots: float32x4_t,
        x: &PairGroup,
    ) -> float32x4_t {
        let acc = vfmaq_f32(acc, dots, vmulq_f32(self.scale[half], x.scale));
        if KIND == HAS_MINIMUM {
            let factor = vmulq_f32(self.minimum[half], x.scale);
            vfmaq_f32(acc, factor, vcvtq_f32_s32(x.sum))
        } else {
            acc
        }
    }
}

/// The first two lanes twice, and the last two twice.
#[inline]
#[target_feature(enable = "neon")]
fn twice(quad: float32x4_t) -> [float32x4_t; 2] {
    let pairs = vreinterpretq_f64_f32(quad);
    [
        vreinterpretq_f32_f64(vdupq_laneq_f64::<0>(pairs)),
        vreinterpretq_f32_f64(vdupq_laneq_f64::<1>(pairs)),
    ]
}

/// Two registers of eight `k` of two outputs each, from four `k` of four outputs at `near` and the
/// next four `k` at `near + step`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn zip_lines(near: *const u8, step: usize) -> [int8x16_t; 2] {
    // SAFETY: the caller vouches for both lines.
    let (near, far) = unsafe { (vld1q_s32(near.cast()), vld1q_s32(near.add(step).cast())) };
    [vreinterpretq_s8_s32(vzip1q_s32(near, far)), vreinterpretq_s8_s32(vzip2q_s32(near, far))]
}

/// Four bits: `PAIRS` pairs of activation rows against one panel, `PARTS` of the four vectors of a
/// line at a time.
#[inline(never)]
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn q4_walk<const PAIRS: usize, const PARTS: usize, const KIND: u8>(
    a: &MatmulArgs,
    panel: usize,
    rows: Rows,
) {
    // SAFETY: every pointer stays inside the panel and the activation `rows`, which the caller vouches
    // for.
    unsafe {
        assert_group(a);
        let mask = vdupq_n_s8(15);
        let mut w = a.w.add(panel * a.panel_bytes);
        let mut pairs: Pairs = [[0; 2]; 64];
        let mut acc: [Tiles; PAIRS] = [[[vdupq_n_f32(0.0); 2]; PANEL / 4]; PAIRS];
        for g in 0..a.groups {
            let tables = w.add(a.group * 16);
            pair_up::<PAIRS>(a, rows, g, &mut pairs);
            let x_group = pair_groups::<PAIRS>(a, rows, g);
            for part in (0..4 / PARTS).map(|part| part * PARTS) {
                let mut raw = [[[vdupq_n_s32(0); 2]; PARTS]; PAIRS];
                let mut low = [[[vdupq_n_s32(0); 2]; PARTS]; PAIRS];
                for pair in 0..PAIRS {
                    let starts = x_group[pair].starts::<KIND>();
                    raw[pair] = [[starts[0]; 2]; PARTS];
                    low[pair] = [[starts[1]; 2]; PARTS];
                }
                for step in 0..a.group / 8 {
                    let mut x = [vdupq_n_s8(0); PAIRS];
                    for pair in 0..PAIRS {
                        x[pair] = vld1q_s8(pairs.as_ptr().add(step * PAIRS + pair).cast());
                    }
                    for p in 0..PARTS {
                        let whole = zip_lines(w.add(step * 128 + (part + p) * 16), 64);
                        for half in 0..2 {
                            let masked = vandq_s8(whole[half], mask);
                            for pair in 0..PAIRS {
                                let raw = &mut raw[pair][p][half];
                                *raw = smmla(*raw, x[pair], whole[half]);
                                let low = &mut low[pair][p][half];
                                *low = smmla(*low, x[pair], masked);
                            }
                        }
                    }
                }
                for p in 0..PARTS {
                    let quads = [part + p, 4 + part + p];
                    let terms = [
                        TileTerms::load::<KIND>(tables, quads[0]),
                        TileTerms::load::<KIND>(tables, quads[1]),
                    ];
                    for pair in 0..PAIRS {
                        let x = &x_group[pair];
                        for half in 0..2 {
                            let low = low[pair][p][half];
                            let high = vsubq_s32(raw[pair][p][half], low);
                            let dots = if KIND == HAS_ZERO {
                                let high = vshrq_n_s32::<4>(high);
                                [
                                    vcvtq_f32_s32(vmlsq_s32(low, terms[0].zero[half], x.sum)),
                                    vcvtq_f32_s32(vmlsq_s32(high, terms[1].zero[half], x.sum)),
                                ]
                            } else {
                                [above(ONES, low), above(SIXTEENTHS, high)]
                            };
                            for (i, quad) in quads.into_iter().enumerate() {
                                let acc = &mut acc[pair].get_unchecked_mut(quad)[half];
                                *acc = terms[i].scale_in::<KIND>(half, *acc, dots[i], x);
                            }
                        }
                    }
                }
            }
            w = tables.add(if KIND == 0 { 64 } else { 128 });
        }
        finish_tiles(a, panel, rows, &acc);
    }
}

/// Signed bytes: `PAIRS` pairs of activation rows against one panel, `PARTS` of the eight vectors of
/// a step at a time.
#[inline(never)]
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn q8_walk<const PAIRS: usize, const PARTS: usize>(
    a: &MatmulArgs,
    panel: usize,
    rows: Rows,
) {
    // SAFETY: as in `q4_walk`.
    unsafe {
        assert_group(a);
        let mut w = a.w.add(panel * a.panel_bytes);
        let mut pairs: Pairs = [[0; 2]; 64];
        let mut acc: [Tiles; PAIRS] = [[[vdupq_n_f32(0.0); 2]; PANEL / 4]; PAIRS];
        for g in 0..a.groups {
            let tables = w.add(a.group * 32);
            pair_up::<PAIRS>(a, rows, g, &mut pairs);
            let x_group = pair_groups::<PAIRS>(a, rows, g);
            for part in (0..8 / PARTS).map(|part| part * PARTS) {
                let mut dots = [[[vdupq_n_s32(ONES.to_bits() as i32); 2]; PARTS]; PAIRS];
                for step in 0..a.group / 8 {
                    let mut x = [vdupq_n_s8(0); PAIRS];
                    for pair in 0..PAIRS {
                        x[pair] = vld1q_s8(pairs.as_ptr().add(step * PAIRS + pair).cast());
                    }
                    for p in 0..PARTS {
                        let whole = zip_lines(w.add(step * 256 + (part + p) * 16), 128);
                        for pair in 0..PAIRS {
                            for half in 0..2 {
                                let dots = &mut dots[pair][p][half];
                                *dots = smmla(*dots, x[pair], whole[half]);
                            }
                        }
                    }
                }
                for p in 0..PARTS {
                    let quad = part + p;
                    let terms = TileTerms::load::<0>(tables, quad);
                    for pair in 0..PAIRS {
                        let x = &x_group[pair];
                        for half in 0..2 {
                            let dots = above(ONES, dots[pair][p][half]);
                            let acc = &mut acc[pair].get_unchecked_mut(quad)[half];
                            *acc = terms.scale_in::<0>(half, *acc, dots, x);
                        }
                    }
                }
            }
            w = tables.add(64);
        }
        finish_tiles(a, panel, rows, &acc);
    }
}

/// Takes the tiles apart and writes `rows`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn finish_tiles<const PAIRS: usize>(
    a: &MatmulArgs,
    panel: usize,
    rows: Rows,
    acc: &[Tiles; PAIRS],
) {
    for (pair, tiles) in acc.iter().enumerate() {
        let mut quads: Quads<2> = [[vdupq_n_f32(0.0); PANEL / 4]; 2];
        for (quad, tiles) in tiles.iter().enumerate() {
            let (near, far) = (vreinterpretq_f64_f32(tiles[0]), vreinterpretq_f64_f32(tiles[1]));
            quads[0][quad] = vreinterpretq_f32_f64(vzip1q_f64(near, far));
            quads[1][quad] = vreinterpretq_f32_f64(vzip2q_f64(near, far));
        }
        let first = rows.first + 2 * pair;
        // SAFETY: handed on; an odd last row is written once.
        unsafe {
            if 2 * pair + 1 < rows.count {
                finish(a, panel, first, &quads);
            } else {
                finish(a, panel, first, &[quads[0]]);
            }
        }
    }
}

/// As many vectors of a line at a time as leave registers for the sums of `M` rows.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn q4_panel<const M: usize, const KIND: u8>(a: &MatmulArgs, panel: usize, first_row: usize) {
    let rows = Rows { first: first_row, count: M };
    // SAFETY: handed on.
    unsafe {
        match M {
            1 | 3 => dotprod::q4_panel::<M, KIND>(a, panel, first_row),
            2 => q4_walk::<1, 4, KIND>(a, panel, rows),
            4 => q4_walk::<2, 2, KIND>(a, panel, rows),
            5 | 6 => q4_walk::<3, 1, KIND>(a, panel, rows),
            _ => q4_walk::<4, 1, KIND>(a, panel, rows),
        }
    }
}

/// As many vectors of a step at a time as leave registers for the sums of `M` rows.
#[inline]
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn q8_panel<const M: usize>(a: &MatmulArgs, panel: usize, first_row: usize) {
    let rows = Rows { first: first_row, count: M };
    // SAFETY: handed on.
    unsafe {
        match M {
            1..=3 => dotprod::q8_panel::<M>(a, panel, first_row),
            4 => q8_walk::<2, 4>(a, panel, rows),
            5 | 6 => q8_walk::<3, 2>(a, panel, rows),
            _ => q8_walk::<4, 2>(a, panel, rows),
        }
    }
}

super::exact_m! {
    [#[target_feature(enable = "neon,dotprod,i8mm")]] 8;
    /// Four bits, symmetric.
    matmul_q4 = q4_panel[0];
    /// Four bits with a zero point.
    matmul_q4z = q4_panel[HAS_ZERO];
    /// Four bits with a minimum.
    matmul_q4m = q4_panel[HAS_MINIMUM];
    /// Signed bytes.
    matmul_q8 = q8_panel[];
}
