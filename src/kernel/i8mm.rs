//! SMMLA rows: two rows of activations times two outputs, eight `k` each, in one instruction.
//!
//! SMMLA wants eight `k` of an output side by side where a line has four, so two neighbouring lines
//! are zipped: a register of each gives two registers of two outputs. This is paid once for all rows
//! of activations. The rest is the scheme of [`super::dotprod`]: fields where they lie, sums that
//! start at the bits of a large float.
//!
//! Sums stay in the tiles that SMMLA makes, `[row 0 of output 0, row 0 of 1, row 1 of 0, row 1 of 1]`;
//! scales are doubled to fit them. The activations of a span are laid out in pairs of rows on the
//! stack first. An odd last row is paired with itself. One row alone, and a group too long for the stack,
//! are left to [`super::dotprod`].

use super::arm_asm::{smmla, splat};
use super::arm_codes::{Codes, Q2, Q3, Q4, Q8, panel_rows, step_bytes, two_steps};
use super::arm_matmul::{
    Block, CHUNK, Chunk, GROUPS, HAS_MINIMUM, HAS_ZERO, Span, entries, gather, halves, share, twice,
};
use super::dotprod::{self, ONES, above, base, converts};
use super::layout::MAX_PANEL;
use std::arch::aarch64::*;
use std::mem::MaybeUninit;

/// Two rows of four outputs as two tiles; and back, because the same zips undo it.
#[inline]
#[target_feature(enable = "neon")]
fn zip_rows(rows: [float32x4_t; 2]) -> [float32x4_t; 2] {
    let [near, far] = rows.map(|row| vreinterpretq_f64_f32(row));
    [vreinterpretq_f32_f64(vzip1q_f64(near, far)), vreinterpretq_f32_f64(vzip2q_f64(near, far))]
}

/// `2 * PAIRS` rows, or one less, against `V` vectors of a line at a time and `F` fields of those.
#[target_feature(enable = "neon,dotprod,i8mm")]
unsafe fn walk<C: Codes, const PAIRS: usize, const V: usize, const F: usize>(span: &Span) {
    // SAFETY: handed on.
    unsafe {
        if span.group > CHUNK {
            return match span.rows {
                2 => dotprod::walk::<C, 2, 2, 2>(span),
                3 => dotprod::walk::<C, 3, 1, 2>(span),
                _ => dotprod::walk::<C, 4, 1, 2>(span),
            };
        }
        let mut block = MaybeUninit::uninit();
        let block = block.as_mut_ptr();
        gather(span, true, block);
        let mut starts: MaybeUninit<[int32x4_t; GROUPS * 16]> = MaybeUninit::uninit();
        let starts = starts.as_mut_ptr().cast::<int32x4_t>();
        start::<C, PAIRS>(span, block, C::IS_SUM && F == C::FIELDS, starts);
        for vector in (0..4).step_by(V) {
            part::<C, PAIRS, V, F, 0>(span, block, starts, vector);
            part::<C, PAIRS, V, F, 1>(span, block, starts, vector);
            part::<C, PAIRS, V, F, 2>(span, block, starts, vector);
            part::<C, PAIRS, V, F, 3>(span, block, starts, vector);
        }
    }
}

/// Where the sums of each group, pair and field start; `sums_last` says whether those of the last field
/// are of whole bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn start<C: Codes, const PAIRS: usize>(
    span: &Span,
    block: *const Block,
    sums_last: bool,
    starts: *mut int32x4_t,
) {
    // SAFETY: the block has the groups of the span, and `starts` has room.
    unsafe {
        let sums = (&raw const (*block).sums).cast::<int32x4_t>();
        for g in 0..span.groups {
            for pair in 0..PAIRS {
                let sum = *sums.add(g * 2 + pair);
                let mut all = vdupq_n_s32(0);
                for f in 0..C::FIELDS {
                    let from = if converts(span) { 0 } else { base(C::SHIFTS[f]).to_bits() as i32 };
                    let factor = share::<C>(span.offset, C::LESS[f], 1) << C::SHIFTS[f];
                    let start = vmlaq_n_s32(vdupq_n_s32(from), sum, factor);
                    all = vaddq_s32(all, start);
                    let is_last = sums_last && f == C::FIELDS - 1;
                    *starts.add((g * PAIRS + pair) * C::FIELDS + f) =
                        if is_last { all } else { start };
                }
            }
        }
    }
}

/// The vectors from `vector` and the fields from `PART * F`.
#[inline(never)]
#[target_feature(enable = "neon,i8mm")]
unsafe fn part<C: Codes, const PAIRS: usize, const V: usize, const F: usize, const PART: usize>(
    span: &Span,
    block: *const Block,
    starts: *const int32x4_t,
    vector: usize,
) {
    if PART * F >= C::FIELDS {
        return;
    }
    let is_sum = C::IS_SUM && F == C::FIELDS;
    let shift = |f: usize| C::SHIFTS[PART * F + f];
    let row_of = |v: usize, f: usize| (PART * F + f) * 16 + (vector + v) * 4;
    let offset_at = |tables: *const u8, v: usize, f: usize| {
        tables.wrapping_add((panel_rows::<C>() + row_of(v, f)) * 2)
    };
    // SAFETY: every place is of a group, a row or an output of the span, or of the block.
    unsafe {
        let converts = converts(span);
        let mut codes = (&raw const (*block).codes).cast::<int8x16_t>();
        let mut scales = (&raw const (*block).scales).cast::<float32x4_t>();
        let mut sums = (&raw const (*block).sums).cast::<int32x4_t>();
        let mut acc = [[[[vdupq_n_f32(0.0); 2]; F]; V]; PAIRS];
        for pair in 0..PAIRS {
            for v in 0..V {
                for f in 0..F {
                    let at = span.acc.add(2 * pair * MAX_PANEL + row_of(v, f));
                    acc[pair][v][f] = zip_rows([vld1q_f32(at), vld1q_f32(at.add(MAX_PANEL))]);
                }
            }
        }
        for g in 0..span.groups {
            let (mut w, tables) = span.group_at::<C>(g);
            w = w.add(vector * 16);
            let mut dots = [[[[vdupq_n_s32(0); 2]; F]; V]; PAIRS];
            for pair in 0..PAIRS {
                for f in 0..F {
                    let start = starts.add((g * PAIRS + pair) * C::FIELDS + PART * F + f);
                    for v in 0..V {
                        for half in 0..2 {
                            // A load for each, not one and copies of the register.
                            dots[pair][v][f][half] = start.read_volatile();
                        }
                    }
                }
            }
            for _ in 0..span.group / 16 {
                for _ in 0..2 {
                    let mut x = [vdupq_n_s8(0); PAIRS];
                    for pair in 0..PAIRS {
                        x[pair] = *codes.add(pair);
                    }
                    for v in 0..V {
                        let planes = two_steps::<C, true>(w.add(v * 16));
                        for f in 0..F {
                            for half in 0..2 {
                                let field = match is_sum && f == F - 1 {
                                    true => planes[half][0],
                                    false => C::scaled(&planes[half], PART * F + f),
                                };
                                for pair in 0..PAIRS {
                                    let dots = &mut dots[pair][v][f][half];
                                    *dots = smmla(*dots, x[pair], field);
                                }
                            }
                        }
                    }
                    codes = codes.add(2);
                    w = w.add(2 * step_bytes::<C>());
                }
            }
            if is_sum {
                for pair in 0..PAIRS {
                    for v in 0..V {
                        for f in 0..F - 1 {
                            for half in 0..2 {
                                let less = dots[pair][v][f][half];
                                let dots = &mut dots[pair][v][F - 1][half];
                                *dots = vsubq_s32(*dots, less);
                            }
                        }
                    }
                }
            }
            let mut floats = [[[[vdupq_n_f32(0.0); 2]; F]; V]; PAIRS];
            if converts {
                for v in 0..V {
                    for f in 0..F {
                        let zero = match span.offset {
                            HAS_ZERO => vmovl_s16(vld1_s16(offset_at(tables, v, f).cast())),
                            _ => vdupq_n_s32(0),
                        };
                        let zero = twice(vreinterpretq_f32_s32(zero));
                        let zero = zero.map(|zero| vreinterpretq_s32_f32(zero));
                        let down = vdupq_n_s32(-(shift(f) as i32));
                        for pair in 0..PAIRS {
                            for half in 0..2 {
                                let dot = vshlq_s32(dots[pair][v][f][half], down);
                                let dot = vmlsq_s32(dot, zero[half], *sums.add(pair));
                                floats[pair][v][f][half] = vcvtq_f32_s32(dot);
                            }
                        }
                    }
                }
            } else {
                for pair in 0..PAIRS {
                    for v in 0..V {
                        for f in 0..F {
                            for half in 0..2 {
                                let dot = dots[pair][v][f][half];
                                floats[pair][v][f][half] = above(base(shift(f)), dot);
                            }
                        }
                    }
                }
            }
            for v in 0..V {
                for f in 0..F {
                    let scale = twice(halves(tables.add(row_of(v, f) * 2)));
                    for pair in 0..PAIRS {
                        for half in 0..2 {
                            let scale = vmulq_f32(scale[half], *scales.add(pair));
                            let acc = &mut acc[pair][v][f][half];
                            *acc = vfmaq_f32(*acc, floats[pair][v][f][half], scale);
                        }
                    }
                }
            }
            if span.offset == HAS_MINIMUM {
                for v in 0..V {
                    for f in 0..F {
                        let minimum = twice(halves(offset_at(tables, v, f)));
                        for pair in 0..PAIRS {
                            let sum = vcvtq_f32_s32(*sums.add(pair));
                            for half in 0..2 {
                                let factor = vmulq_f32(minimum[half], *scales.add(pair));
                                let acc = &mut acc[pair][v][f][half];
                                *acc = vfmaq_f32(*acc, factor, sum);
                            }
                        }
                    }
                }
            }
            (scales, sums) = (scales.add(2), sums.add(2));
        }
        for pair in 0..PAIRS {
            for v in 0..V {
                for f in 0..F {
                    let at = span.acc.add(2 * pair * MAX_PANEL + row_of(v, f));
                    let rows = zip_rows(acc[pair][v][f]);
                    vst1q_f32(at, rows[0]);
                    vst1q_f32(at.add(MAX_PANEL), rows[1]);
                }
            }
        }
    }
}

/// Four rows of activations by eight outputs of `chunk`, as [`super::arm_matmul`] has them.
#[inline(never)]
#[target_feature(enable = "neon,i8mm")]
unsafe fn tile(chunk: *const Chunk, x: *const Block, part: usize, y: *mut f32, stride: usize) {
    // SAFETY: `chunk` and `x` hold so many groups, and `y` four rows of eight outputs.
    unsafe {
        let mut w = (&raw const (*chunk).codes).cast::<int8x16_t>().add(part * 4);
        let mut scales = (&raw const (*chunk).scales).cast::<float32x4_t>().add(part * 4);
        let mut minima = (&raw const (*chunk).minima).cast::<float32x4_t>().add(part * 4);
        let mut codes = (&raw const (*x).codes).cast::<int8x16_t>();
        let mut x_scales = (&raw const (*x).scales).cast::<float32x4_t>();
        let mut x_sums = (&raw const (*x).sums).cast::<int32x4_t>();
        let mut acc = [[vdupq_n_f32(0.0); 4]; 2];
        if (*chunk).resumes {
            for pair in 0..2 {
                for half in 0..2 {
                    let y = y.add(pair * 2 * stride + half * 4);
                    let rows = [y, y.add(stride)].map(|y| vld1q_f64(y.cast()));
                    acc[pair][half * 2] = vreinterpretq_f32_f64(vzip1q_f64(rows[0], rows[1]));
                    acc[pair][half * 2 + 1] = vreinterpretq_f32_f64(vzip2q_f64(rows[0], rows[1]));
                }
            }
        }
        for _ in 0..(*chunk).groups {
            let mut dots = [[vdupq_n_s32(0); 4]; 2];
            for pair in 0..2 {
                for i in 0..4 {
                    dots[pair][i] = splat(ONES.to_bits() as i32);
                }
            }
            for _ in 0..(*chunk).group / 16 {
                for _ in 0..2 {
                    for i in 0..4 {
                        for pair in 0..2 {
                            dots[pair][i] = smmla(dots[pair][i], *codes.add(pair), *w.add(i));
                        }
                    }
                    (w, codes) = (w.add(16), codes.add(2));
                }
            }
            for pair in 0..2 {
                for i in 0..4 {
                    let scale = vmulq_f32(*scales.add(i), *x_scales.add(pair));
                    acc[pair][i] = vfmaq_f32(acc[pair][i], above(ONES, dots[pair][i]), scale);
                }
            }
            if (*chunk).has_minima {
                for pair in 0..2 {
                    let sums = vcvtq_f32_s32(*x_sums.add(pair));
                    for i in 0..4 {
                        let factor = vmulq_f32(*minima.add(i), *x_scales.add(pair));
                        acc[pair][i] = vfmaq_f32(acc[pair][i], factor, sums);
                    }
                }
            }
            (scales, minima) = (scales.add(16), minima.add(16));
            (x_scales, x_sums) = (x_scales.add(2), x_sums.add(2));
        }
        for pair in 0..2 {
            for half in 0..2 {
                let y = y.add(pair * 2 * stride + half * 4);
                let tiles = [acc[pair][half * 2], acc[pair][half * 2 + 1]];
                let tiles = tiles.map(|tile| vreinterpretq_f64_f32(tile));
                vst1q_f64(y.cast(), vzip1q_f64(tiles[0], tiles[1]));
                vst1q_f64(y.add(stride).cast(), vzip2q_f64(tiles[0], tiles[1]));
            }
        }
    }
}

entries! {
    Some((true, tile));
    /// Signed bytes.
    matmul_q8 = Q8[dotprod::walk::<Q8, 1, 4, 2>, walk::<Q8, 1, 2, 2>, walk::<Q8, 2, 1, 2>, walk::<Q8, 2, 1, 2>];
    /// Four bits.
    matmul_q4 = Q4[dotprod::walk::<Q4, 1, 4, 2>, walk::<Q4, 1, 2, 2>, walk::<Q4, 2, 1, 2>, walk::<Q4, 2, 1, 2>];
    /// Three bits.
    matmul_q3 = Q3[dotprod::walk::<Q3, 1, 1, 8>, walk::<Q3, 1, 1, 4>, walk::<Q3, 2, 1, 2>, walk::<Q3, 2, 1, 2>];
    /// Two bits.
    matmul_q2 = Q2[dotprod::walk::<Q2, 1, 2, 4>, walk::<Q2, 1, 1, 4>, walk::<Q2, 2, 1, 2>, walk::<Q2, 2, 1, 2>];
}
