//! Fixed-width vectors through the `wide` crate: the row for a target that has no file of its own.
//!
//! Built on 16-bit multiply-adds, which every vector unit has: the even and the odd bytes of a lane
//! are widened in place and meet the matching activations. Scales and accumulation follow the same
//! order as everywhere, with [`super::fused`] for targets that have no fused instruction.

use super::abi::MatmulArgs;
use super::fused::fused_lanes;
use super::layout::PANEL;
use half::bf16;
use wide::{i16x16, i32x8};

/// Sixteen 16-bit lanes from 32 bytes.
#[inline]
unsafe fn load(bytes: *const u8) -> i16x16 {
    // SAFETY: the caller vouches for 32 bytes.
    i16x16::new(unsafe { bytes.cast::<[i16; 16]>().read_unaligned() })
}

/// Four activations as two pairs: `x[0]` and `x[2]`, which the even bytes of a lane meet, and `x[1]` and `x[3]` for the odd ones.
/// In a function of its own, whose loop is there once for all numbers of rows and bits.
#[inline(never)]
unsafe fn pairs(x: *const i8, steps: usize, pairs: &mut [[i32; 2]; COLUMNS / 4]) {
    // SAFETY: the caller vouches for four bytes a step.
    let fours = unsafe { std::slice::from_raw_parts(x.cast::<[i8; 4]>(), steps) };
    for (pair, &[a, b, c, d]) in pairs.iter_mut().zip(fours) {
        let beside = |a, b| i32::from(b) << 16 | i32::from(i16::from(a).cast_unsigned());
        *pair = [beside(a, c), beside(b, d)];
    }
}

/// The 16-bit word of each of the 32 rows.
#[inline]
unsafe fn table(at: *const u8) -> [u16; PANEL] {
    // SAFETY: the caller vouches for 64 bytes.
    unsafe { at.cast::<[u16; PANEL]>().read_unaligned() }
}

/// The codes of a step of four columns: the even and the odd bytes of rows `8 * quarter` and on of the
/// 32 rows that start with field `2 * pair` of the panel.
#[inline]
unsafe fn codes<const BITS: usize>(
    group: *const u8,
    step: usize,
    pair: usize,
    quarter: usize,
) -> [i16x16; 2] {
    // Sixteen rows are a field of a line, eight of them one half of it.
    let (field, half) = (2 * pair + quarter / 2, quarter % 2 * 32);
    // SAFETY: the caller vouches for a group, in which the step lies.
    let line = |at: usize| unsafe { load(group.add(at + half)) };
    let both = |bytes: i16x16, shift: i32, mask: i16| {
        let mask = i16x16::splat(mask);
        [(bytes >> shift) & mask, (bytes >> (8 + shift)) & mask]
    };
    let flipped = |codes: [i16x16; 2], bit: i16| codes.map(|codes| codes ^ i16x16::splat(bit));
    match BITS {
        8 => {
            let bytes = line(step * 128 + field * 64);
            [(bytes << 8_i32) >> 8_i32, bytes >> 8_i32]
        }
        4 if field == 0 => both(line(step * 64), 0, 15),
        4 => flipped(both(line(step * 64), 4, 15), 8),
        3 => {
            let at = step / 2 * 384 + step % 2 * 64;
            match field {
                0 => both(line(at), 2, 7),
                1 => flipped(both(line(at), 5, 7), 4),
                2 => both(line(at + 128), 0, 7),
                3 => both(line(at + 128), 3, 7),
                4 => both(line(at + 256), 1, 7),
                5 => both(line(at + 256), 4, 7),
                6 => {
                    let (low, high) = (both(line(at), 0, 3), both(line(at + 256), 0, 1));
                    [low[0] | high[0] << 2_i32, low[1] | high[1] << 2_i32]
                }
                _ => {
                    let (high, low) = (both(line(at + 128), 6, 3), both(line(at + 256), 7, 1));
                    flipped([low[0] | high[0] << 1_i32, low[1] | high[1] << 1_i32], 4)
                }
            }
        }
        _ if field == 3 => flipped(both(line(step * 64), 6, 3), 2),
        _ => both(line(step * 64), 2 * field as i32, 3),
    }
}

/// The most columns whose activations are laid out at once.
const COLUMNS: usize = 64;

/// Codes of `BITS` bits: `M` rows of activations against one panel, 32 rows of it at a time.
unsafe fn panel<const M: usize, const BITS: usize>(a: &MatmulArgs, panel: usize, first_row: usize) {
    let rows = match BITS {
        3 => 128,
        2 => 64,
        _ => PANEL,
    };
    let outputs = rows.min(a.n - panel * rows);
    for pair in 0..outputs.div_ceil(PANEL) {
        let mut acc = [[0.0_f32; PANEL]; M];
        for g in 0..a.groups {
            // SAFETY: every pointer stays inside the panel and the `M` activation rows from
            // `first_row`, which the caller vouches for.
            unsafe {
                let group = a.w.add(panel * a.panel_bytes + g * (a.panel_bytes / a.groups));
                let mut dots = [[[0_i32; 8]; 4]; M];
                for first in (0..a.group).step_by(COLUMNS) {
                    let steps = COLUMNS.min(a.group - first) / 4;
                    let mut x = [[[0_i32; 2]; COLUMNS / 4]; M];
                    for r in 0..M {
                        let at = (first_row + r) * a.x_stride + g * a.group + first;
                        pairs(a.x.cast::<i8>().add(at), steps, &mut x[r]);
                    }
                    for quarter in 0..4 {
                        let mut sums = [i32x8::ZERO; M];
                        for step in 0..steps {
                            let [even, odd] = codes::<BITS>(group, first / 4 + step, pair, quarter);
                            for r in 0..M {
                                let [near, far] =
                                    x[r][step].map(|pair| bytemuck::cast(i32x8::splat(pair)));
                                sums[r] += even.dot(near) + odd.dot(far);
                            }
                        }
                        for r in 0..M {
                            let dots = &mut dots[r][quarter];
                            *dots = (i32x8::new(*dots) + sums[r]).to_array();
                        }
                    }
                }
                let tables = group.add(a.group * rows * BITS / 8);
                let [scales, offsets] =
                    [tables, tables.add(rows * 2)].map(|t| t.add(pair * PANEL * 2));
                let middle = if BITS == 8 || a.offset != 0 { 0 } else { 1 << (BITS - 1) };
                scale_in(a, [scales, offsets], middle, first_row * a.groups + g, &dots, &mut acc);
            }
        }
        // SAFETY: as above.
        unsafe { finish(a, panel * rows + pair * PANEL, first_row, &acc) };
    }
}

/// The dots of a group with 32 outputs, for each row of activations, less what belongs to the zero points, scaled. `first` is
/// where the group of the first row has its scale and its sum; `middle` is the zero point of symmetric codes.
#[inline(never)]
unsafe fn scale_in(
    a: &MatmulArgs,
    [scales, offsets]: [*const u8; 2],
    middle: i32,
    first: usize,
    dots: &[[[i32; 8]; 4]],
    acc: &mut [[f32; PANEL]],
) {
    // SAFETY: the caller vouches for the tables of 32 outputs that `a.offset` names and for the rows.
    unsafe {
        let scales = halves(scales);
        let zeros = if a.offset == 1 {
            table(offsets).map(|zero| i32::from(zero.cast_signed()))
        } else {
            [middle; PANEL]
        };
        let minima = if a.offset == 2 { halves(offsets) } else { [0.0; PANEL] };
        for (r, (dots, acc)) in dots.iter().zip(acc).enumerate() {
            let at = first + r * a.groups;
            let (x_scale, sum) = (*a.x_scales.add(at), *a.x_sums.add(at));
            let dots = dots.as_flattened();
            let mut numbers = [0.0; PANEL];
            for i in 0..PANEL {
                numbers[i] = (dots[i] - zeros[i] * sum) as f32;
            }
            fused_lanes(&scales.map(|scale| scale * x_scale), &numbers, acc);
            if a.offset == 2 {
                multiply_in(&minima.map(|minimum| minimum * x_scale), sum as f32, acc);
            }
        }
    }
}

/// 32 halves as floats. In a function of its own, as its neighbours, so that it becomes vectors.
#[inline(never)]
unsafe fn halves(at: *const u8) -> [f32; PANEL] {
    // SAFETY: the caller vouches for 64 bytes.
    unsafe { table(at) }.map(|bits| {
        let (sign, rest) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff));
        // The bias of f32 is larger by 112; the product makes numbers of subnormal halves, too.
        let number = (f32::from_bits(rest << 13) * f32::from_bits((127 + 112) << 23)).to_bits();
        let number = if rest < 0x7c00 { number } else { 0x7f80_0000 | rest << 13 };
        f32::from_bits(sign | number)
    })
}

/// `acc += weights * x`, each rounded once.
#[inline(never)]
fn multiply_in(weights: &[f32; PANEL], x: f32, acc: &mut [f32; PANEL]) {
    fused_lanes(weights, &[x; PANEL], acc);
}

/// Floats: `M` rows of activations against one panel.
unsafe fn float_panel<const M: usize, const BYTES: usize, const BRAIN: bool>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
) {
    // SAFETY: as in `panel`.
    unsafe {
        let w = a.w.add(panel * a.panel_bytes);
        let mut acc = [[0.0_f32; PANEL]; M];
        for k in 0..a.groups {
            let at = w.add(k * PANEL * BYTES);
            let weights: [f32; PANEL] = match (BYTES, BRAIN) {
                (4, _) => at.cast::<[f32; PANEL]>().read_unaligned(),
                (_, false) => halves(at),
                (_, true) => table(at).map(|bits| bf16::from_bits(bits).to_f32()),
            };
            for r in 0..M {
                let x = *a.x.cast::<f32>().add((first_row + r) * a.x_stride + k);
                multiply_in(&weights, x, &mut acc[r]);
            }
        }
        finish(a, panel * PANEL, first_row, &acc);
    }
}

/// Writes 32 outputs of `M` activation rows, or as many as are left.
unsafe fn finish<const M: usize>(
    a: &MatmulArgs,
    first_output: usize,
    first_row: usize,
    acc: &[[f32; PANEL]; M],
) {
    let count = PANEL.min(a.n - first_output);
    for (r, acc) in acc.iter().enumerate() {
        // SAFETY: `count` of the outputs that the caller vouches for.
        unsafe {
            let y = a.y.add((first_row + r) * a.y_stride + first_output);
            std::ptr::copy_nonoverlapping(acc.as_ptr(), y, count);
        }
    }
}

super::exact_m! {
    [] 4;
    /// Signed bytes.
    matmul_q8 = panel[8];
    /// Four bits.
    matmul_q4 = panel[4];
    /// Three bits.
    matmul_q3 = panel[3];
    /// Two bits.
    matmul_q2 = panel[2];
    /// f32 weights.
    matmul_f32 = float_panel[4, false];
    /// f16 weights.
    matmul_f16 = float_panel[2, false];
    /// bf16 weights.
    matmul_bf16 = float_panel[2, true];
}
