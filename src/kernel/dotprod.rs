//! SDOT rows: the activations of sixteen `k` in one register, a step of codes against each of its lanes.
//!
//! Fields of a byte are multiplied where they lie, under a mask, times a power of two; and where a whole
//! byte is the sum of its fields, the topmost is had by multiplying the byte as it is and taking the others
//! off once a group. For four bits that is one AND for two dots and no shift, of which most Arm cores do
//! half as many in a cycle. For three bits, eight ANDs and two shifts that insert make eight dots.
//!
//! The integers become floats without a conversion, too (SCVTF costs four times a subtraction): a sum
//! starts from the bits of a float so large that its last place is worth one, or whatever power of two the
//! field has, and at the end that float is subtracted. Exact, because the dot of a group stays below 2^22 of
//! these units: a field reaches at most half of a byte, and 128 * 128 * 128 for the half below zero with as
//! much added for the other. Zero points of 16 bits can make more of it, and so can a row that is one group:
//! these keep the conversion.
//!
//! Loads come first, then masks, then dots, with at least eight sums in flight: in-order cores run
//! the instructions as they stand here. What the sums of several rows start with is laid out once for several
//! panels.

use super::arm_asm::{floats_together, sdot, splat, together};
use super::arm_codes::{Codes, Q2, Q3, Q4, Q8, one_step, panel_rows, step_bytes};
use super::arm_matmul::{
    Block, Chunk, Few, HAS_MINIMUM, HAS_ZERO, HELD, LONGEST, Span, entries, halves, plain, share,
    twice_word,
};
use std::arch::aarch64::*;

/// 1.5 * 2^23: the last place is worth one.
pub(super) const ONES: f32 = 12_582_912.0;

/// The float whose last place is worth `1 / 2^shift`, 1.5 * 2^(23 - shift).
#[inline]
pub(super) fn base(shift: u32) -> f32 {
    ONES / (1_u32 << shift) as f32
}

/// The number whose bits were added to the bits of `base`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn above(base: f32, bits: int32x4_t) -> float32x4_t {
    vsubq_f32(vreinterpretq_f32_s32(bits), vdupq_n_f32(base))
}

/// Whether the dots of `span` need a conversion to become floats.
#[inline]
pub(super) fn converts(span: &Span) -> bool {
    span.offset == HAS_ZERO || span.group > LONGEST
}

/// The loop for `M` rows, at least two.
pub(super) const fn several<C: Codes, const M: usize, const V: usize, const F: usize>() -> Few {
    Few { lay: Some(lay::<C, M, F>), walk: walk::<C, M, V, F> }
}

/// What the sums of the fields from `part * F` start with where the activations of a group are zeros.
#[inline]
fn bases<C: Codes, const F: usize>(span: &Span, part: usize) -> [i32; F] {
    let converts = converts(span);
    let bits = |f| base(C::SHIFTS[part * F + f]).to_bits() as i32;
    std::array::from_fn(|f| if converts { 0 } else { bits(f) })
}

/// The same where they add up to `sum`.
#[inline]
fn starts<C: Codes, const F: usize>(
    span: &Span,
    part: usize,
    bases: &[i32; F],
    sum: i32,
) -> [i32; F] {
    let mut starts = *bases;
    let mut all = 0_i32;
    for f in 0..F {
        let (shift, less) = (C::SHIFTS[part * F + f], C::LESS[part * F + f]);
        starts[f] = starts[f].wrapping_add(share::<C>(span.offset, less, sum) << shift);
        all = all.wrapping_add(starts[f]);
    }
    if C::IS_SUM && F == C::FIELDS {
        starts[F - 1] = all;
    }
    starts
}

/// Lays out what the sums of all rows, groups and fields start with, for [`part`]s of `F` fields.
#[inline(never)]
#[target_feature(enable = "neon")]
unsafe fn lay<C: Codes, const M: usize, const F: usize>(span: &Span) {
    // SAFETY: the span has the rows and the groups, and what is laid out has room for them.
    unsafe {
        let mut out = (&raw mut (*span.laid).starts).cast::<[u64; 2]>();
        for g in 0..span.groups {
            for r in 0..M {
                for part in 0..C::FIELDS / F {
                    let bases = bases::<C, F>(span, part);
                    for start in starts::<C, F>(span, part, &bases, span.sum(r, g)) {
                        *out = [twice_word(start as u32); 2];
                        out = out.add(1);
                    }
                }
            }
        }
    }
}

/// `M` rows against `V` vectors of a line at a time and `F` fields of those.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn walk<C: Codes, const M: usize, const V: usize, const F: usize>(span: &Span) {
    for vector in (0..4).step_by(V) {
        // SAFETY: handed on.
        unsafe {
            part::<C, M, V, F, 0>(span, vector);
            part::<C, M, V, F, 1>(span, vector);
            part::<C, M, V, F, 2>(span, vector);
            part::<C, M, V, F, 3>(span, vector);
        }
    }
}

/// The vectors from `vector` and the fields from `PART * F`.
#[inline(never)]
#[target_feature(enable = "neon,dotprod")]
unsafe fn part<C: Codes, const M: usize, const V: usize, const F: usize, const PART: usize>(
    span: &Span,
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
    // SAFETY: every place is of a group, a row or an output of the span.
    unsafe {
        let converts = converts(span);
        let bases = bases::<C, F>(span, PART);
        let mut acc = [[[vdupq_n_f32(0.0); F]; V]; M];
        for r in 0..M {
            for v in 0..V {
                for f in 0..F {
                    acc[r][v][f] = vld1q_f32(span.acc.add(r * HELD + row_of(v, f)));
                }
            }
        }
        let mut x_at = [span.x; M];
        for r in 0..M {
            x_at[r] = span.x.add(r * span.x_stride);
        }
        let mut laid = (&raw const (*span.laid).starts).cast::<int32x4_t>().wrapping_add(PART * F);
        for g in 0..span.groups {
            let (mut w, tables) = span.group_at::<C>(g);
            w = w.add(vector * 16);
            let mut dots = [[[vdupq_n_s32(0); F]; V]; M];
            if M == 1 {
                let starts = starts::<C, F>(span, PART, &bases, span.sum(0, g));
                for v in 0..V {
                    for f in 0..F {
                        dots[0][v][f] = splat(starts[f]);
                    }
                }
            } else {
                for r in 0..M {
                    for v in 0..V {
                        for f in 0..F {
                            // A load for each, not one and copies of the register.
                            dots[r][v][f] = laid.add(r * C::FIELDS + f).read_volatile();
                        }
                    }
                }
                laid = laid.add(M * C::FIELDS);
            }
            for _ in 0..span.group / 16 {
                let mut x = [vdupq_n_s8(0); M];
                for r in 0..M {
                    x[r] = vld1q_s8(x_at[r]);
                    x_at[r] = x_at[r].add(16);
                }
                together(&mut x);
                // Eight vectors at a time: of one step, two or four.
                let mut eight = fields::<C, V, F, PART>(w, 0);
                multiply::<0, M, V, F>(&mut dots, &eight, &x);
                if V * F == 8 {
                    eight = fields::<C, V, F, PART>(w, 1);
                }
                multiply::<1, M, V, F>(&mut dots, &eight, &x);
                if V * F > 2 {
                    eight = fields::<C, V, F, PART>(w, 2);
                }
                multiply::<2, M, V, F>(&mut dots, &eight, &x);
                if V * F == 8 {
                    eight = fields::<C, V, F, PART>(w, 3);
                }
                multiply::<3, M, V, F>(&mut dots, &eight, &x);
                w = w.add(4 * step_bytes::<C>());
            }
            if is_sum {
                for r in 0..M {
                    for v in 0..V {
                        for f in 0..F - 1 {
                            dots[r][v][F - 1] = vsubq_s32(dots[r][v][F - 1], dots[r][v][f]);
                        }
                    }
                }
            }
            let mut floats = [[[vdupq_n_f32(0.0); F]; V]; M];
            if converts {
                for v in 0..V {
                    for f in 0..F {
                        let zero = match span.offset {
                            HAS_ZERO => vld1_s16(offset_at(tables, v, f).cast()),
                            _ => vdup_n_s16(0),
                        };
                        for r in 0..M {
                            let dot = vshlq_s32(dots[r][v][f], vdupq_n_s32(-(shift(f) as i32)));
                            // A sum has 16 bits: at most 128 codes of 8. It does not count else.
                            let dot = vmlsl_n_s16(dot, zero, span.sum(r, g) as i16);
                            floats[r][v][f] = vcvtq_f32_s32(dot);
                        }
                    }
                }
            } else {
                for r in 0..M {
                    for v in 0..V {
                        for f in 0..F {
                            floats[r][v][f] = above(base(shift(f)), dots[r][v][f]);
                        }
                    }
                }
            }
            let mut products = [[[vdupq_n_f32(0.0); F]; V]; M];
            for v in 0..V {
                for f in 0..F {
                    let scale = halves(tables.add(row_of(v, f) * 2));
                    for r in 0..M {
                        products[r][v][f] = vmulq_n_f32(scale, span.scale(r, g));
                    }
                }
            }
            floats_together(products.as_flattened_mut().as_flattened_mut());
            for r in 0..M {
                for v in 0..V {
                    for f in 0..F {
                        acc[r][v][f] = vfmaq_f32(acc[r][v][f], floats[r][v][f], products[r][v][f]);
                    }
                }
            }
            if span.offset == HAS_MINIMUM {
                for v in 0..V {
                    for f in 0..F {
                        let minimum = halves(offset_at(tables, v, f));
                        for r in 0..M {
                            let factor = vmulq_n_f32(minimum, span.scale(r, g));
                            let sum = span.sum(r, g) as f32;
                            acc[r][v][f] = vfmaq_n_f32(acc[r][v][f], factor, sum);
                        }
                    }
                }
            }
        }
        for r in 0..M {
            for v in 0..V {
                for f in 0..F {
                    vst1q_f32(span.acc.add(r * HELD + row_of(v, f)), acc[r][v][f]);
                }
            }
        }
    }
}

/// What is multiplied in step `first` of the four at `w` and as many more as make eight vectors.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn fields<C: Codes, const V: usize, const F: usize, const PART: usize>(
    w: *const u8,
    first: usize,
) -> [int8x16_t; 8] {
    let is_sum = C::IS_SUM && F == C::FIELDS;
    let mut fields = [vdupq_n_s8(0); 8];
    for i in 0..8 / F {
        let (step, v) = (first + i / V, i % V);
        let at = w.wrapping_add(step / 2 * 2 * step_bytes::<C>() + step % 2 * C::STEP + v * 16);
        // SAFETY: the caller vouches for four steps.
        let planes = unsafe { one_step::<C>(at) };
        for f in 0..F {
            fields[i * F + f] = match is_sum && f == F - 1 {
                true => planes[0],
                // SAFETY: a field of this format.
                false => unsafe { C::scaled(&planes, PART * F + f) },
            };
        }
    }
    // One row with masks to apply is left to the compiler, which needs every register for it.
    if V * F == 8 && C::BITS < 8 {
        return fields;
    }
    let mut all = fields;
    together(&mut all);
    all
}

/// Adds the dots of the fields of step `LANE` with this lane of the activations.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn multiply<const LANE: usize, const M: usize, const V: usize, const F: usize>(
    dots: &mut [[[int32x4_t; F]; V]; M],
    fields: &[int8x16_t; 8],
    x: &[int8x16_t; M],
) {
    for r in 0..M {
        for v in 0..V {
            for f in 0..F {
                let field = fields[(LANE * V + v) * F % 8 + f];
                dots[r][v][f] = sdot::<LANE>(dots[r][v][f], field, x[r]);
            }
        }
    }
}

/// Four rows of activations by eight outputs of `chunk`, as [`super::arm_matmul`] has them.
#[inline(never)]
#[target_feature(enable = "neon,dotprod")]
unsafe fn tile(chunk: *const Chunk, x: *const Block, part: usize, y: *mut f32, stride: usize) {
    // SAFETY: `chunk` and `x` hold so many groups, and `y` four rows of eight outputs.
    unsafe {
        let mut w = (&raw const (*chunk).codes).cast::<int8x16_t>().add(part * 2);
        let mut scales = (&raw const (*chunk).scales).cast::<float32x4_t>().add(part * 2);
        let mut minima = (&raw const (*chunk).minima).cast::<float32x4_t>().add(part * 2);
        let mut x_scales = (&raw const (*x).scales).cast::<float32x4_t>();
        let mut x_sums = (&raw const (*x).sums).cast::<int32x4_t>();
        let mut rows = (*x).rows;
        let mut acc = [[vdupq_n_f32(0.0); 2]; 4];
        if (*chunk).resumes {
            for r in 0..4 {
                acc[r] = [0, 4].map(|at| vld1q_f32(y.add(r * stride + at)));
            }
        }
        for _ in 0..(*chunk).groups {
            let mut dots = [[vdupq_n_s32(0); 2]; 4];
            for r in 0..4 {
                dots[r] = [0, 0].map(|_| splat(ONES.to_bits() as i32));
            }
            for _ in 0..(*chunk).group / 16 {
                let mut x = rows.map(|row| vld1q_s8(row));
                rows = rows.map(|row| row.add(16));
                let mut steps = [0, 8, 16, 24].map(|step| [*w.add(step), *w.add(step + 1)]);
                together(&mut x);
                together(steps.as_flattened_mut());
                tile_step::<0>(&mut dots, &steps, &x);
                tile_step::<1>(&mut dots, &steps, &x);
                tile_step::<2>(&mut dots, &steps, &x);
                tile_step::<3>(&mut dots, &steps, &x);
                w = w.add(32);
            }
            for half in 0..2 {
                let scale = *scales.add(half);
                let scale = [
                    vmulq_laneq_f32::<0>(scale, *x_scales),
                    vmulq_laneq_f32::<1>(scale, *x_scales),
                    vmulq_laneq_f32::<2>(scale, *x_scales),
                    vmulq_laneq_f32::<3>(scale, *x_scales),
                ];
                for r in 0..4 {
                    acc[r][half] = vfmaq_f32(acc[r][half], above(ONES, dots[r][half]), scale[r]);
                }
            }
            if (*chunk).has_minima {
                let sums = vcvtq_f32_s32(*x_sums);
                for half in 0..2 {
                    let minimum = *minima.add(half);
                    let factor = [
                        vmulq_laneq_f32::<0>(minimum, *x_scales),
                        vmulq_laneq_f32::<1>(minimum, *x_scales),
                        vmulq_laneq_f32::<2>(minimum, *x_scales),
                        vmulq_laneq_f32::<3>(minimum, *x_scales),
                    ];
                    acc[0][half] = vfmaq_laneq_f32::<0>(acc[0][half], factor[0], sums);
                    acc[1][half] = vfmaq_laneq_f32::<1>(acc[1][half], factor[1], sums);
                    acc[2][half] = vfmaq_laneq_f32::<2>(acc[2][half], factor[2], sums);
                    acc[3][half] = vfmaq_laneq_f32::<3>(acc[3][half], factor[3], sums);
                }
            }
            (scales, minima) = (scales.add(16), minima.add(16));
            (x_scales, x_sums) = (x_scales.add(2), x_sums.add(2));
        }
        for r in 0..4 {
            for half in 0..2 {
                vst1q_f32(y.add(r * stride + half * 4), acc[r][half]);
            }
        }
    }
}

/// Four `k` of a tile, of `LANE` of the activations.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn tile_step<const LANE: usize>(
    dots: &mut [[int32x4_t; 2]; 4],
    steps: &[[int8x16_t; 2]; 4],
    x: &[int8x16_t; 4],
) {
    for half in 0..2 {
        for r in 0..4 {
            dots[r][half] = sdot::<LANE>(dots[r][half], steps[LANE][half], x[r]);
        }
    }
}

entries! {
    Some((false, tile));
    /// Signed bytes.
    matmul_q8 = Q8[
        plain(walk::<Q8, 1, 4, 2>), several::<Q8, 2, 2, 2>(), several::<Q8, 3, 1, 2>(), several::<Q8, 4, 1, 2>()
    ];
    /// Four bits.
    matmul_q4 = Q4[
        plain(walk::<Q4, 1, 4, 2>), several::<Q4, 2, 2, 2>(), several::<Q4, 3, 1, 2>(), several::<Q4, 4, 1, 2>()
    ];
    /// Three bits.
    matmul_q3 = Q3[
        plain(walk::<Q3, 1, 1, 8>), several::<Q3, 2, 1, 4>(), several::<Q3, 3, 1, 2>(), several::<Q3, 4, 1, 2>()
    ];
    /// Two bits.
    matmul_q2 = Q2[
        plain(walk::<Q2, 1, 2, 4>), several::<Q2, 2, 1, 4>(), several::<Q2, 3, 1, 2>(), several::<Q2, 4, 1, 2>()
    ];
}
