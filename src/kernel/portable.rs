//! Fixed-width vectors through the `wide` crate: the row for a target that has no file of its own.
//!
//! Built on 16-bit multiply-adds, which every vector unit has: the even and the odd bytes of a lane
//! are widened in place and meet the matching activations. Scales and accumulation follow the same
//! order as everywhere; without a fused instruction in the target's baseline the one `mul_add` a
//! group costs a call, so this row is correct first.

use super::abi::MatmulArgs;
use super::layout::PANEL;
use half::{bf16, f16};
use wide::{i16x16, i32x8};

const HAS_ZERO: u8 = 1;
const HAS_MINIMUM: u8 = 2;

/// Sixteen 16-bit lanes from 32 bytes.
#[inline]
unsafe fn load(bytes: *const u8) -> i16x16 {
    // SAFETY: the caller vouches for 32 bytes.
    i16x16::new(unsafe { bytes.cast::<[i16; 16]>().read_unaligned() })
}

/// Activations `x[first]` and `x[first + 2]` side by side in every lane: what the even (`first` 0) or
/// the odd (`first` 1) bytes of a lane meet.
#[inline]
unsafe fn pair(x: *const i8, first: usize) -> i16x16 {
    // SAFETY: the caller vouches for four bytes.
    let (a, b) = unsafe { (i16::from(*x.add(first)), i16::from(*x.add(first + 2))) };
    i16x16::new([a, b, a, b, a, b, a, b, a, b, a, b, a, b, a, b])
}

/// The 16-bit word of each of the 32 rows.
#[inline]
unsafe fn table(at: *const u8) -> [u16; PANEL] {
    // SAFETY: the caller vouches for 64 bytes.
    unsafe { at.cast::<[u16; PANEL]>().read_unaligned() }
}

/// Four bits: `M` rows of activations against one panel.
unsafe fn q4_panel<const M: usize, const KIND: u8>(a: &MatmulArgs, panel: usize, first_row: usize) {
    // SAFETY: every pointer stays inside the panel and the `M` activation rows from `first_row`,
    // which the caller vouches for.
    unsafe {
        let stride = a.panel_bytes / a.groups;
        let (mask, flip) = (i16x16::splat(15), i16x16::splat(8));
        let mut acc = [[0.0_f32; PANEL]; M];
        for g in 0..a.groups {
            let codes = a.w.add(panel * a.panel_bytes + g * stride);
            let mut dots = [[i32x8::ZERO; 4]; M];
            for k in (0..a.group).step_by(4) {
                for half in 0..2 {
                    let line = load(codes.add(k * 16 + half * 32));
                    let nibbles = [
                        line & mask,
                        (line >> 8_i32) & mask,
                        ((line >> 4_i32) & mask) ^ flip,
                        ((line >> 12_i32) & mask) ^ flip,
                    ];
                    for r in 0..M {
                        let x = a.x.cast::<i8>();
                        let x = x.add((first_row + r) * a.x_stride + g * a.group + k);
                        let (even, odd) = (pair(x, 0), pair(x, 1));
                        dots[r][half] += nibbles[0].dot(even) + nibbles[1].dot(odd);
                        dots[r][2 + half] += nibbles[2].dot(even) + nibbles[3].dot(odd);
                    }
                }
            }
            let tables = codes.add(a.group * 16);
            for r in 0..M {
                scale_in::<KIND>(a, first_row + r, g, &dots[r], tables, &mut acc[r]);
            }
        }
        finish(a, panel, first_row, &acc);
    }
}

/// Signed bytes: `M` rows of activations against one panel.
unsafe fn q8_panel<const M: usize>(a: &MatmulArgs, panel: usize, first_row: usize) {
    // SAFETY: as in `q4_panel`.
    unsafe {
        let stride = a.panel_bytes / a.groups;
        let mut acc = [[0.0_f32; PANEL]; M];
        for g in 0..a.groups {
            let codes = a.w.add(panel * a.panel_bytes + g * stride);
            let mut dots = [[i32x8::ZERO; 4]; M];
            for k in (0..a.group).step_by(4) {
                for quarter in 0..4 {
                    let line = load(codes.add(k * 32 + quarter * 32));
                    let (evens, odds) = ((line << 8_i32) >> 8_i32, line >> 8_i32);
                    for r in 0..M {
                        let x = a.x.cast::<i8>();
                        let x = x.add((first_row + r) * a.x_stride + g * a.group + k);
                        dots[r][quarter] += evens.dot(pair(x, 0)) + odds.dot(pair(x, 1));
                    }
                }
            }
            let tables = codes.add(a.group * 32);
            for r in 0..M {
                scale_in::<HAS_NOTHING>(a, first_row + r, g, &dots[r], tables, &mut acc[r]);
            }
        }
        finish(a, panel, first_row, &acc);
    }
}

/// Neither an offset table nor the fixed offset of symmetric nibbles.
const HAS_NOTHING: u8 = 3;

/// One group's scales and offsets, applied to the dots of one activation row.
#[inline]
unsafe fn scale_in<const KIND: u8>(
    a: &MatmulArgs,
    row: usize,
    g: usize,
    dots: &[i32x8; 4],
    tables: *const u8,
    acc: &mut [f32; PANEL],
) {
    // SAFETY: the caller vouches for the tables of this group and for the row's scales and sums.
    unsafe {
        let x_scale = *a.x_scales.add(row * a.groups + g);
        let sum = *a.x_sums.add(row * a.groups + g);
        let scales = table(tables);
        let has_offsets = KIND == HAS_ZERO || KIND == HAS_MINIMUM;
        let offsets = if has_offsets { table(tables.add(64)) } else { [0; PANEL] };
        for i in 0..PANEL {
            let mut dot = dots[i / 8].to_array()[i % 8];
            match KIND {
                0 => dot -= 8 * sum,
                HAS_ZERO => dot -= i32::from(offsets[i].cast_signed()) * sum,
                _ => {}
            }
            let scale = f16::from_bits(scales[i]).to_f32();
            acc[i] = (scale * x_scale).mul_add(dot as f32, acc[i]);
            if KIND == HAS_MINIMUM {
                let minimum = f16::from_bits(offsets[i]).to_f32();
                acc[i] = (minimum * x_scale).mul_add(sum as f32, acc[i]);
            }
        }
    }
}

/// Floats: `M` rows of activations against one panel.
unsafe fn float_panel<const M: usize, const BYTES: usize, const BRAIN: bool>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
) {
    // SAFETY: as in `q4_panel`.
    unsafe {
        let w = a.w.add(panel * a.panel_bytes);
        let mut acc = [[0.0_f32; PANEL]; M];
        for k in 0..a.groups {
            let at = w.add(k * PANEL * BYTES);
            let weights: [f32; PANEL] = match (BYTES, BRAIN) {
                (4, _) => at.cast::<[f32; PANEL]>().read_unaligned(),
                (_, false) => table(at).map(|bits| f16::from_bits(bits).to_f32()),
                (_, true) => table(at).map(|bits| bf16::from_bits(bits).to_f32()),
            };
            for r in 0..M {
                let x = *a.x.cast::<f32>().add((first_row + r) * a.x_stride + k);
                for i in 0..PANEL {
                    acc[r][i] = weights[i].mul_add(x, acc[r][i]);
                }
            }
        }
        finish(a, panel, first_row, &acc);
    }
}

/// Writes the outputs of `M` activation rows, or as many of a row as are left.
unsafe fn finish<const M: usize>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
    acc: &[[f32; PANEL]; M],
) {
    let count = PANEL.min(a.n - panel * PANEL);
    for (r, acc) in acc.iter().enumerate() {
        // SAFETY: `count` of the outputs that the caller vouches for.
        unsafe {
            let y = a.y.add((first_row + r) * a.y_stride + panel * PANEL);
            std::ptr::copy_nonoverlapping(acc.as_ptr(), y, count);
        }
    }
}

super::exact_m! {
    [] 4;
    /// Four bits, symmetric.
    matmul_q4 = q4_panel[0];
    /// Four bits with a zero point.
    matmul_q4z = q4_panel[HAS_ZERO];
    /// Four bits with a minimum.
    matmul_q4m = q4_panel[HAS_MINIMUM];
    /// Signed bytes.
    matmul_q8 = q8_panel[];
    /// f32 weights.
    matmul_f32 = float_panel[4, false];
    /// f16 weights.
    matmul_f16 = float_panel[2, false];
    /// bf16 weights.
    matmul_bf16 = float_panel[2, true];
}
