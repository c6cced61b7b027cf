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
                let mut dots = [[i32x8::ZERO; 4]; M];
                for step in 0..a.group / 4 {
                    for quarter in 0..4 {
                        let [even, odd] = codes::<BITS>(group, step, pair, quarter);
                        for r in 0..M {
                            let x = a.x.cast::<i8>();
                            let x = x.add((first_row + r) * a.x_stride + g * a.group + step * 4);
                            dots[r][quarter] +=
                                even.dot(self::pair(x, 0)) + odd.dot(self::pair(x, 1));
                        }
                    }
                }
                let tables = group.add(a.group * rows * BITS / 8);
                for r in 0..M {
                    let middle = if BITS == 8 || a.offset != 0 { 0 } else { 1 << (BITS - 1) };
                    let tables = [tables, tables.add(rows * 2)].map(|t| t.add(pair * PANEL * 2));
                    scale_in(a, first_row + r, g, &dots[r], tables, middle, &mut acc[r]);
                }
            }
        }
        // SAFETY: as above.
        unsafe { finish(a, panel * rows + pair * PANEL, first_row, &acc) };
    }
}

/// One group's scales and offsets, applied to the dots of one activation row with 32 outputs.
unsafe fn scale_in(
    a: &MatmulArgs,
    row: usize,
    g: usize,
    dots: &[i32x8; 4],
    tables: [*const u8; 2],
    middle: i32,
    acc: &mut [f32; PANEL],
) {
    // SAFETY: the caller vouches for the tables of this group, of which the second is only there with
    // an offset, and for the row's scales and sums.
    unsafe {
        let x_scale = *a.x_scales.add(row * a.groups + g);
        let sum = *a.x_sums.add(row * a.groups + g);
        let scales = table(tables[0]);
        let offsets = if a.offset != 0 { table(tables[1]) } else { [0; PANEL] };
        for i in 0..PANEL {
            let zero = if a.offset == 1 { i32::from(offsets[i].cast_signed()) } else { middle };
            let dot = dots[i / 8].to_array()[i % 8] - zero * sum;
            let scale = f16::from_bits(scales[i]).to_f32();
            acc[i] = (scale * x_scale).mul_add(dot as f32, acc[i]);
            if a.offset == 2 {
                let minimum = f16::from_bits(offsets[i]).to_f32();
                acc[i] = (minimum * x_scale).mul_add(sum as f32, acc[i]);
            }
        }
    }
}

/// 32 halves as floats. In a function of its own, as the next one, for the many calls that both are where the
/// target's baseline has no such instructions.
#[inline(never)]
unsafe fn halves(at: *const u8) -> [f32; PANEL] {
    // SAFETY: the caller vouches for 64 bytes.
    unsafe { table(at) }.map(|bits| f16::from_bits(bits).to_f32())
}

/// `acc += weights * x`, each rounded once.
#[inline(never)]
fn multiply_in(weights: &[f32; PANEL], x: f32, acc: &mut [f32; PANEL]) {
    for i in 0..PANEL {
        acc[i] = weights[i].mul_add(x, acc[i]);
    }
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
