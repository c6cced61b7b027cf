//! NEON rows for cores without SDOT (Cortex-A53, A72): SMLAL in 16 bits, widened once every 32
//! values of `k`.
//!
//! A multiple of a field does not fit a 16-bit sum, so fields are taken out as they are stored: for four
//! bits one AND for the low one, one arithmetic shift for the high one, whose nibble is two's complement. A
//! lane of 16 bits takes 8 products of at most 15 * 128 before it is added to its neighbour, which
//! stays below 2^15 (2 * 8 * 15 * 128 = 30720). Two products of bytes fit as well (2 * 128 * 127),
//! because activations are never -128.
//!
//! Many rows go four at a time as well: decoded bytes would fit a sum by twos only, which costs more
//! than to take fields out again.

use super::abi::MatmulArgs;
use super::arm_asm::opaque;
use super::arm_codes::{Codes, Q2, Q3, Q4, Q8, panel_rows, step_bytes, two_steps};
use super::arm_matmul::{HAS_MINIMUM, HAS_ZERO, HELD, Span, entries, halves, plain, share};
use super::layout::PANEL;
use std::arch::aarch64::*;

/// The 32 outputs of `M` activation rows as vectors of four neighbours.
type Quads<const M: usize> = [[float32x4_t; PANEL / 4]; M];

/// `M` rows against `V` vectors of a line at a time and `F` fields of those.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn walk<C: Codes, const M: usize, const V: usize, const F: usize>(span: &Span) {
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
#[target_feature(enable = "neon")]
unsafe fn part<C: Codes, const M: usize, const V: usize, const F: usize, const PART: usize>(
    span: &Span,
    vector: usize,
) {
    if PART * F >= C::FIELDS {
        return;
    }
    let row_of = |v: usize, f: usize| (PART * F + f) * 16 + (vector + v) * 4;
    // Values of `k` whose products fit 16 bits.
    let run = if C::BITS == 8 { 8 } else { span.group.min(32) };
    // SAFETY: every place is of a group, a row or an output of the span.
    unsafe {
        for g in 0..span.groups {
            let (mut w, tables) = span.group_at::<C>(g);
            w = w.add(vector * 16);
            let mut x = span.x.add(g * span.group);
            let mut dots = [[[[vdupq_n_s32(0); 2]; F]; V]; M];
            for _ in 0..span.group / run {
                let mut sums = [[[[vdupq_n_s16(0); 2]; F]; V]; M];
                for _ in 0..run / 8 {
                    for v in 0..V {
                        let planes = two_steps::<C, false>(w.add(v * 16));
                        for step in 0..2 {
                            for f in 0..F {
                                let field = C::stored(&planes[step], PART * F + f);
                                for r in 0..M {
                                    let x = x.add(r * span.x_stride + step * 4).cast();
                                    let x = opaque(vreinterpretq_s8_s32(vld1q_dup_s32(x)));
                                    let [low, high] = &mut sums[r][v][f];
                                    *low = vmlal_s8(*low, vget_low_s8(field), vget_low_s8(x));
                                    *high = vmlal_high_s8(*high, field, x);
                                }
                            }
                        }
                    }
                    x = x.add(8);
                    w = w.add(2 * step_bytes::<C>());
                }
                for r in 0..M {
                    for v in 0..V {
                        for f in 0..F {
                            let [low, high] = sums[r][v][f];
                            let dots = &mut dots[r][v][f];
                            if C::BITS == 8 {
                                dots[0] = vpadalq_s16(dots[0], low);
                                dots[1] = vpadalq_s16(dots[1], high);
                            } else {
                                dots[0] = vpadalq_s16(dots[0], vpaddq_s16(low, high));
                            }
                        }
                    }
                }
            }
            for v in 0..V {
                for f in 0..F {
                    let row = row_of(v, f);
                    let scale = halves(tables.add(row * 2));
                    let offset = tables.wrapping_add((panel_rows::<C>() + row) * 2);
                    for r in 0..M {
                        let (x_scale, sum) = (span.scale(r, g), span.sum(r, g));
                        let share = share::<C>(span.offset, C::LESS[PART * F + f], sum);
                        let [low, high] = dots[r][v][f];
                        let dot = if C::BITS == 8 { vpaddq_s32(low, high) } else { low };
                        let mut dot = vaddq_s32(dot, vdupq_n_s32(share));
                        if span.offset == HAS_ZERO {
                            // A sum has 16 bits: at most 128 codes of 8.
                            dot = vmlsl_n_s16(dot, vld1_s16(offset.cast()), sum as i16);
                        }
                        let at = span.acc.add(r * HELD + row);
                        let scale = vmulq_n_f32(scale, x_scale);
                        let mut acc = vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(dot), scale);
                        if span.offset == HAS_MINIMUM {
                            let factor = vmulq_n_f32(halves(offset), x_scale);
                            acc = vfmaq_n_f32(acc, factor, sum as f32);
                        }
                        vst1q_f32(at, acc);
                    }
                }
            }
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
    // SAFETY: every pointer stays inside the panel and the `M` activation rows from `first_row`,
    // which the caller vouches for.
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
unsafe fn finish<const M: usize>(a: &MatmulArgs, panel: usize, first_row: usize, acc: &Quads<M>) {
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

entries! {
    None;
    /// Signed bytes.
    matmul_q8 = Q8[
        plain(walk::<Q8, 1, 2, 2>), plain(walk::<Q8, 2, 1, 2>), plain(walk::<Q8, 3, 1, 1>), plain(walk::<Q8, 4, 1, 1>)
    ];
    /// Four bits.
    matmul_q4 = Q4[
        plain(walk::<Q4, 1, 2, 2>), plain(walk::<Q4, 2, 1, 2>), plain(walk::<Q4, 3, 1, 2>), plain(walk::<Q4, 4, 1, 2>)
    ];
    /// Three bits.
    matmul_q3 = Q3[
        plain(walk::<Q3, 1, 1, 4>), plain(walk::<Q3, 2, 1, 2>), plain(walk::<Q3, 3, 1, 2>), plain(walk::<Q3, 4, 1, 2>)
    ];
    /// Two bits.
    matmul_q2 = Q2[
        plain(walk::<Q2, 1, 1, 4>), plain(walk::<Q2, 2, 1, 2>), plain(walk::<Q2, 3, 1, 2>), plain(walk::<Q2, 4, 1, 2>)
    ];
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
