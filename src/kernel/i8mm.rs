//! SMMLA rows: two rows of activations times two outputs, eight `k` each, in one instruction.
//!
//! SMMLA wants eight `k` of an output side by side where a line has four, so two neighbouring lines
//! are zipped: a register of each gives two registers of two outputs. This is paid once for all rows
//! of activations, up to eight. More than four take half a register of a line at a time, or their sums would
//! not fit the registers. The rest is the scheme of [`super::dotprod`]: fields where they lie, sums that
//! start at the bits of a large float.
//!
//! Sums stay in the tiles that SMMLA makes, `[row 0 of output 0, row 0 of 1, row 1 of 0, row 1 of 1]`,
//! and FCMLA makes scales that fit them. What does not depend on the weights is laid out on the stack first,
//! for several panels: activations in pairs of rows, what sums start with, and scales. An odd last row is
//! paired with itself. One row alone, and a group too long for the stack, are left to [`super::dotprod`].
//!
//! Where a whole byte is the sum of its fields, all of them are summed in units of the topmost one. So one
//! subtraction of floats takes a lower field off the whole and the large float with it. Exact, since the
//! dot of whole bytes, offsets included, stays below 255 * 128 * 128 units, less than 2^22. The lower fields
//! come out a power of two too small, for which their scales are as much larger. That changes no
//! bit unless a scale is near the ends of what f32 can hold ([`USUAL`]); then the dots are converted.

use super::arm_asm::{floats_together, pair_times, smmla, splat, together};
use super::arm_codes::{Codes, Q2, Q3, Q4, Q8, half_steps, panel_rows, step_bytes, two_steps};
use super::arm_matmul::{
    Block, CHUNK, Chunk, Few, HAS_MINIMUM, HAS_ZERO, HELD, Span, entries, halves_of, pair_up,
    plain, share, twice, twice_word,
};
use super::dotprod::{self, ONES, above, base, converts};
use std::arch::aarch64::*;
use std::ops::RangeInclusive;

/// Bits of the scales of activations, from 2^-100 to 2^100, that multiplied with any f16 and with 2^6 are
/// normal numbers.
const USUAL: RangeInclusive<u32> = (27 << 23)..=(227 << 23);

/// Whether `scale` is among [`USUAL`] or zero, either way up.
fn is_usual(scale: f32) -> bool {
    scale == 0.0 || USUAL.contains(&scale.abs().to_bits())
}

/// The loop for `2 * PAIRS` rows or one less: `V` times `2 * H` outputs of a line at a time, and `F` fields
/// of those.
const fn paired<C: Codes, const PAIRS: usize, const V: usize, const F: usize, const H: usize>()
-> Few {
    Few { lay: Some(lay::<C, PAIRS, F>), walk: walk::<C, PAIRS, V, F, H> }
}

/// Whether the topmost of `F` fields is had from whole bytes.
const fn is_sum<C: Codes, const F: usize>() -> bool {
    C::IS_SUM && F == C::FIELDS
}

/// The power of two that the dots of a field are summed times, where `F` fields are taken at a time.
const fn unit<C: Codes, const F: usize>(field: usize) -> u32 {
    C::SHIFTS[if is_sum::<C, F>() { F - 1 } else { field }]
}

/// How many scales each row has in a group: one for all fields, or one for each.
const fn scales_of<C: Codes, const F: usize>() -> usize {
    if is_sum::<C, F>() { F } else { 1 }
}

/// Lays out the activations of `span` for [`part`]s that take `F` fields at a time.
#[inline(never)]
#[target_feature(enable = "neon")]
unsafe fn lay<C: Codes, const PAIRS: usize, const F: usize>(span: &Span) {
    if span.group > CHUNK {
        return;
    }
    let laid = span.laid;
    // SAFETY: the span has the rows and the groups, and `laid` has room for them.
    unsafe {
        let rows: [[usize; 2]; PAIRS] =
            std::array::from_fn(|pair| [2 * pair, 2 * pair + 1].map(|row| row.min(span.rows - 1)));
        let starts = rows.map(|pair| pair.map(|row| span.x.add(row * span.x_stride)));
        pair_up(starts, span.groups * span.group, (&raw mut (*laid).codes).cast());
        (*laid).converts = converts(span);
        if !lay_words::<C, PAIRS, F>(span, rows) {
            (*laid).converts = true;
            lay_words::<C, PAIRS, F>(span, rows);
        }
    }
}

/// Lays out what the sums of the `rows` start with and what they are scaled by; says whether the scales
/// allow to do so without a conversion.
#[inline(never)]
#[target_feature(enable = "neon")]
unsafe fn lay_words<C: Codes, const PAIRS: usize, const F: usize>(
    span: &Span,
    rows: [[usize; 2]; PAIRS],
) -> bool {
    let laid = span.laid;
    // SAFETY: as above.
    unsafe {
        let converts = (*laid).converts;
        let mut are_usual = true;
        let mut starts = (&raw mut (*laid).starts).cast::<[u64; 2]>();
        let mut scales = (&raw mut (*laid).scales).cast::<[u64; 2]>();
        let mut sums = (&raw mut (*laid).sums).cast::<[u64; 2]>();
        for g in 0..span.groups {
            for pair in 0..PAIRS {
                let sum = rows[pair].map(|row| span.sum(row, g));
                let scale = rows[pair].map(|row| span.scale(row, g));
                are_usual &= scale.map(is_usual) == [true; 2];
                let mut all = [0_i32; 2];
                for f in 0..C::FIELDS {
                    let factor = share::<C>(span.offset, C::LESS[f], 1) << C::SHIFTS[f];
                    let mut start = sum.map(|sum| sum * factor);
                    for row in 0..2 {
                        all[row] += start[row];
                    }
                    if is_sum::<C, F>() && f == F - 1 {
                        start = all;
                    }
                    let from = if converts { 0 } else { base(unit::<C, F>(f)).to_bits() };
                    *starts = start.map(|start| twice_word((start as u32).wrapping_add(from)));
                    starts = starts.add(1);
                    if f < scales_of::<C, F>() {
                        let more = if converts { 0 } else { unit::<C, F>(f) - C::SHIFTS[f] };
                        let scale = scale.map(|scale| scale * (1_u32 << more) as f32);
                        // FCMLA takes every other lane.
                        *scales = scale.map(|scale| u64::from(scale.to_bits()));
                        scales = scales.add(1);
                    }
                }
                *sums = sum.map(|sum| twice_word(sum as u32));
                sums = sums.add(1);
            }
        }
        converts || scales_of::<C, F>() == 1 || are_usual
    }
}

/// Adds a span that is laid out.
#[target_feature(enable = "neon,dotprod,i8mm,fcma")]
unsafe fn walk<C: Codes, const PAIRS: usize, const V: usize, const F: usize, const H: usize>(
    span: &Span,
) {
    // SAFETY: handed on.
    unsafe {
        if span.group > CHUNK {
            return without::<C>(span);
        }
        for pair in (0..8).step_by(V * H) {
            part::<C, PAIRS, V, F, H, 0>(span, pair);
            part::<C, PAIRS, V, F, H, 1>(span, pair);
            part::<C, PAIRS, V, F, H, 2>(span, pair);
            part::<C, PAIRS, V, F, H, 3>(span, pair);
        }
    }
}

/// Adds a span of two to eight rows with a group that is too long to be laid out.
#[target_feature(enable = "neon,dotprod")]
unsafe fn without<C: Codes>(span: &Span) {
    let mut rest = *span;
    loop {
        let (rows, few) = match rest.rows {
            2 => (2, dotprod::several::<C, 2, 2, 2>()),
            3 | 5 => (3, dotprod::several::<C, 3, 1, 2>()),
            _ => (4, dotprod::several::<C, 4, 1, 2>()),
        };
        // SAFETY: handed on, some rows at a time.
        unsafe {
            let now = Span { rows, ..rest };
            few.prepare(&now);
            (few.walk)(&now);
            if rest.rows == rows {
                return;
            }
            rest = rest.rows_after(rows);
        }
    }
}

/// The outputs of a line from the pair `first` on and the fields from `PART * F`.
#[inline(never)]
#[target_feature(enable = "neon,i8mm,fcma")]
unsafe fn part<
    C: Codes,
    const PAIRS: usize,
    const V: usize,
    const F: usize,
    const H: usize,
    const PART: usize,
>(
    span: &Span,
    first: usize,
) {
    if PART * F >= C::FIELDS {
        return;
    }
    let shift = |f: usize| C::SHIFTS[PART * F + f];
    let row_of = |v: usize, f: usize| (PART * F + f) * 16 + (first + v * H) * 2;
    let scales_at = |tables: *const u8, v: usize, f: usize| tables.wrapping_add(row_of(v, f) * 2);
    let offsets_at = |tables: *const u8, v: usize, f: usize| {
        scales_at(tables, v, f).wrapping_add(panel_rows::<C>() * 2)
    };
    // SAFETY: every place is of a group, a row or an output of the span, or of what was laid out.
    unsafe {
        let converts = (*span.laid).converts;
        let mut codes = (&raw const (*span.laid).codes).cast::<int8x16_t>();
        let mut starts = (&raw const (*span.laid).starts).cast::<int32x4_t>().add(PART * F);
        let mut scales = (&raw const (*span.laid).scales).cast::<float32x4_t>();
        let mut sums = (&raw const (*span.laid).sums).cast::<int32x4_t>();
        let mut acc = [[[[vdupq_n_f32(0.0); H]; F]; V]; PAIRS];
        for pair in 0..PAIRS {
            for v in 0..V {
                for f in 0..F {
                    let at = span.acc.add(2 * pair * HELD + row_of(v, f));
                    acc[pair][v][f] = load_tiles(at);
                }
            }
        }
        for g in 0..span.groups {
            let (mut w, tables) = span.group_at::<C>(g);
            w = w.add(first * 8);
            let mut dots = [[[[vdupq_n_s32(0); H]; F]; V]; PAIRS];
            for pair in 0..PAIRS {
                for f in 0..F {
                    for v in 0..V {
                        for half in 0..H {
                            // A load for each, not one and copies of the register.
                            let start = starts.add(pair * C::FIELDS + f);
                            dots[pair][v][f][half] = start.read_volatile();
                        }
                    }
                }
            }
            for _ in 0..span.group / 16 {
                let mut x = [[vdupq_n_s8(0); PAIRS]; 2];
                for step in 0..2 {
                    for pair in 0..PAIRS {
                        x[step][pair] = *codes.add(step * PAIRS + pair);
                    }
                }
                codes = codes.add(2 * PAIRS);
                // Eight vectors at a time: of both steps, or of one.
                let at_once = 2 * V * F * H <= 8;
                let mut fields = [[[[vdupq_n_s8(0); H]; F]; V]; 2];
                for step in 0..2 {
                    for v in 0..V {
                        let at = w.add(step * 2 * step_bytes::<C>() + v * H * 8);
                        fields[step][v] = fields_of::<C, F, H, PART>(at);
                    }
                    if !at_once {
                        together(fields[step].as_flattened_mut().as_flattened_mut());
                        multiply(&mut dots, &fields[step], &x[step]);
                    }
                }
                if at_once {
                    together(fields.as_flattened_mut().as_flattened_mut().as_flattened_mut());
                    multiply(&mut dots, &fields[0], &x[0]);
                    multiply(&mut dots, &fields[1], &x[1]);
                }
                w = w.add(4 * step_bytes::<C>());
            }
            let mut floats = [[[[vdupq_n_f32(0.0); H]; F]; V]; PAIRS];
            if converts {
                for v in 0..V {
                    for f in 0..F {
                        let zero = match span.offset {
                            HAS_ZERO => vmovl_s16(words::<H>(offsets_at(tables, v, f))),
                            _ => vdupq_n_s32(0),
                        };
                        let zero = twice(vreinterpretq_f32_s32(zero));
                        let down = vdupq_n_s32(-(shift(f) as i32));
                        for pair in 0..PAIRS {
                            for half in 0..H {
                                let mut dot = dots[pair][v][f][half];
                                if is_sum::<C, F>() && f == F - 1 {
                                    for f in 0..F - 1 {
                                        dot = vsubq_s32(dot, dots[pair][v][f][half]);
                                    }
                                }
                                let dot = vshlq_s32(dot, down);
                                let zero = vreinterpretq_s32_f32(zero[half]);
                                let dot = vmlsq_s32(dot, zero, *sums.add(pair));
                                floats[pair][v][f][half] = vcvtq_f32_s32(dot);
                            }
                        }
                    }
                }
            } else {
                for pair in 0..PAIRS {
                    for v in 0..V {
                        for half in 0..H {
                            let of_fields = std::array::from_fn(|f| dots[pair][v][f][half]);
                            let of_fields = floats_of::<C, F, PART>(of_fields);
                            for f in 0..F {
                                floats[pair][v][f][half] = of_fields[f];
                            }
                        }
                    }
                }
            }
            let each = scales_of::<C, F>();
            let mut x = [[vdupq_n_f32(0.0); F]; PAIRS];
            for pair in 0..PAIRS {
                for f in 0..each {
                    x[pair][f] = *scales.add(pair * each + f);
                }
            }
            let mut weights = [[vdupq_n_f32(0.0); F]; V];
            for v in 0..V {
                for f in 0..F {
                    weights[v][f] = halves_of(words::<H>(scales_at(tables, v, f)));
                }
            }
            if each == F && PAIRS <= 2 {
                floats_together(x.as_flattened_mut());
            }
            floats_together(weights.as_flattened_mut());
            // Two pairs at a time, all products before the sums.
            for pairs in (0..PAIRS).step_by(2) {
                let mut products = [[[[vdupq_n_f32(0.0); H]; F]; V]; 2];
                for pair in pairs..PAIRS.min(pairs + 2) {
                    for v in 0..V {
                        for f in 0..F {
                            for half in 0..H {
                                products[pair - pairs][v][f][half] =
                                    times(x[pair][f.min(each - 1)], weights[v][f], half);
                            }
                        }
                    }
                }
                if pairs + 2 <= PAIRS {
                    floats_together(
                        products.as_flattened_mut().as_flattened_mut().as_flattened_mut(),
                    );
                }
                for pair in pairs..PAIRS.min(pairs + 2) {
                    for v in 0..V {
                        for f in 0..F {
                            for half in 0..H {
                                let product = products[pair - pairs][v][f][half];
                                let acc = &mut acc[pair][v][f][half];
                                *acc = vfmaq_f32(*acc, floats[pair][v][f][half], product);
                            }
                        }
                    }
                }
            }
            if span.offset == HAS_MINIMUM {
                for v in 0..V {
                    for f in 0..F {
                        let minimum = halves_of(words::<H>(offsets_at(tables, v, f)));
                        for pair in 0..PAIRS {
                            // The topmost field has the scale itself.
                            let x = *scales.add((pair + 1) * scales_of::<C, F>() - 1);
                            let sum = vcvtq_f32_s32(*sums.add(pair));
                            for half in 0..H {
                                let factor = times(x, minimum, half);
                                let acc = &mut acc[pair][v][f][half];
                                *acc = vfmaq_f32(*acc, factor, sum);
                            }
                        }
                    }
                }
            }
            starts = starts.add(PAIRS * C::FIELDS);
            scales = scales.add(PAIRS * scales_of::<C, F>());
            sums = sums.add(PAIRS);
        }
        for pair in 0..PAIRS {
            for v in 0..V {
                for f in 0..F {
                    let at = span.acc.add(2 * pair * HELD + row_of(v, f));
                    store_tiles(at, acc[pair][v][f]);
                }
            }
        }
    }
}

/// Fields `PART * F` and on of `2 * H` outputs at `at` and eight `k` of each.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn fields_of<C: Codes, const F: usize, const H: usize, const PART: usize>(
    at: *const u8,
) -> [[int8x16_t; H]; F] {
    // SAFETY: handed on; a field of this format.
    unsafe {
        let both = match H {
            2 => two_steps::<C, true>(at),
            _ => [half_steps::<C>(at); 2],
        };
        let mut fields = [[vdupq_n_s8(0); H]; F];
        for f in 0..F {
            for half in 0..H {
                fields[f][half] = match is_sum::<C, F>() && f == F - 1 {
                    true => both[half][0],
                    false => C::scaled(&both[half], PART * F + f),
                };
            }
        }
        fields
    }
}

/// The dots of fields `PART * F` and on as floats, of which all but the last are still to be multiplied with a
/// power of two if the last is the whole byte.
#[inline]
#[target_feature(enable = "neon")]
fn floats_of<C: Codes, const F: usize, const PART: usize>(
    dots: [int32x4_t; F],
) -> [float32x4_t; F] {
    let mut floats = [vdupq_n_f32(0.0); F];
    for f in 0..F {
        floats[f] = above(base(unit::<C, F>(PART * F + f)), dots[f]);
    }
    if is_sum::<C, F>() {
        let [first, whole] = [dots[0], dots[F - 1]].map(|dot| vreinterpretq_f32_s32(dot));
        let mut rest = vsubq_f32(whole, first);
        for f in 1..F - 1 {
            rest = vsubq_f32(rest, floats[f]);
        }
        floats[F - 1] = rest;
    }
    floats
}

/// Adds the dots of `fields` with the rows in `x`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn multiply<const PAIRS: usize, const V: usize, const F: usize, const H: usize>(
    dots: &mut [[[[int32x4_t; H]; F]; V]; PAIRS],
    fields: &[[[int8x16_t; H]; F]; V],
    x: &[int8x16_t; PAIRS],
) {
    for v in 0..V {
        for f in 0..F {
            for half in 0..H {
                for pair in 0..PAIRS {
                    let dots = &mut dots[pair][v][f][half];
                    *dots = smmla(*dots, x[pair], fields[v][f][half]);
                }
            }
        }
    }
}

/// `2 * H` words of 16 bits.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn words<const H: usize>(table: *const u8) -> int16x4_t {
    // SAFETY: the caller vouches for them.
    unsafe {
        match H {
            2 => vld1_s16(table.cast()),
            _ => {
                let both = table.cast::<u32>().read_unaligned();
                vreinterpret_s16_u32(vset_lane_u32::<0>(both, vdup_n_u32(0)))
            }
        }
    }
}

/// The products of the pair of `w` that `half` names with the scales of two rows.
#[inline]
#[target_feature(enable = "neon,fcma")]
fn times(x: float32x4_t, w: float32x4_t, half: usize) -> float32x4_t {
    if half == 0 { pair_times::<0>(x, w) } else { pair_times::<1>(x, w) }
}

/// Two rows of `2 * H` outputs, as tiles.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_tiles<const H: usize>(at: *const f32) -> [float32x4_t; H] {
    // SAFETY: the caller vouches for both rows.
    unsafe {
        let tile = |at: *const f32| vcombine_f32(vld1_f32(at), vld1_f32(at.add(HELD)));
        std::array::from_fn(|half| tile(at.add(2 * half)))
    }
}

/// The same back.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store_tiles<const H: usize>(at: *mut f32, tiles: [float32x4_t; H]) {
    for half in 0..H {
        // SAFETY: the caller vouches for both rows.
        unsafe {
            let at = at.add(2 * half);
            vst1_f32(at, vget_low_f32(tiles[half]));
            vst1_f32(at.add(HELD), vget_high_f32(tiles[half]));
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
    matmul_q8 = Q8[
        plain(dotprod::walk::<Q8, 1, 4, 2>), paired::<Q8, 1, 2, 2, 2>(),
        paired::<Q8, 2, 1, 2, 2>(), paired::<Q8, 2, 1, 2, 2>(),
        paired::<Q8, 3, 1, 2, 1>(), paired::<Q8, 3, 1, 2, 1>(),
        paired::<Q8, 4, 1, 2, 1>(), paired::<Q8, 4, 1, 2, 1>()
    ];
    /// Four bits.
    matmul_q4 = Q4[
        plain(dotprod::walk::<Q4, 1, 4, 2>), paired::<Q4, 1, 2, 2, 2>(),
        paired::<Q4, 2, 1, 2, 2>(), paired::<Q4, 2, 1, 2, 2>(),
        paired::<Q4, 3, 1, 2, 1>(), paired::<Q4, 3, 1, 2, 1>(),
        paired::<Q4, 4, 1, 2, 1>(), paired::<Q4, 4, 1, 2, 1>()
    ];
    /// Three bits.
    matmul_q3 = Q3[
        plain(dotprod::walk::<Q3, 1, 1, 8>), paired::<Q3, 1, 1, 4, 2>(),
        paired::<Q3, 2, 1, 2, 2>(), paired::<Q3, 2, 1, 2, 2>(),
        paired::<Q3, 3, 1, 2, 1>(), paired::<Q3, 3, 1, 2, 1>(),
        paired::<Q3, 4, 1, 2, 1>(), paired::<Q3, 4, 1, 2, 1>()
    ];
    /// Two bits.
    matmul_q2 = Q2[
        plain(dotprod::walk::<Q2, 1, 2, 4>), paired::<Q2, 1, 1, 4, 2>(),
        paired::<Q2, 2, 1, 2, 2>(), paired::<Q2, 2, 1, 2, 2>(),
        paired::<Q2, 3, 1, 2, 1>(), paired::<Q2, 3, 1, 2, 1>(),
        paired::<Q2, 4, 1, 2, 1>(), paired::<Q2, 4, 1, 2, 1>()
    ];
}
