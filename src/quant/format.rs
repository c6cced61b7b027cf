//! The bit maps of the packed formats, read back: the reference dequantiser.
//!
//! Written from the definition in `docs/formats.md`, one weight at a time, so that packing and
//! kernels have something simple to be compared with. The embedding lookup uses it as well: one row
//! a token is no work.
#![forbid(unsafe_code)]

use crate::kernel::Packed;
use crate::kernel::layout::{Format, Offset};
use half::{bf16, f16};

/// Writes row `row` of the matrix as `k` floats.
///
/// # Panics
/// When the row does not exist or `out` is not `k` long: a bug of the caller.
pub fn unpack_row(packed: &Packed<'_>, row: usize, out: &mut [f32]) {
    let layout = packed.layout();
    assert!(row < layout.n() && out.len() == layout.k(), "row {row} of {}", layout.n());
    let rows = layout.panel_rows();
    let panel = &packed.bytes()[row / rows * layout.panel_bytes()..][..layout.panel_bytes()];
    let row = row % rows;
    if !layout.format().is_quantised() {
        for (k, out) in out.iter_mut().enumerate() {
            *out = float_at(layout.format(), panel, k * rows + row);
        }
        return;
    }
    let middle = layout.format().middle();
    let groups = panel.chunks_exact(layout.group_bytes()).zip(out.chunks_mut(layout.group()));
    for (bytes, out) in groups {
        let (codes, tables) = bytes.split_at(layout.code_bytes());
        let scale = f16::from_bits(word_at(tables, row)).to_f32();
        for (k, out) in out.iter_mut().enumerate() {
            let code = code_at(layout.format(), codes, row, k);
            *out = match layout.format().offset() {
                Offset::None => scale * (code - middle) as f32,
                Offset::Zero => {
                    let zero = i32::from(word_at(tables, rows + row).cast_signed());
                    scale * (code - zero) as f32
                }
                Offset::Minimum => {
                    let minimum = f16::from_bits(word_at(tables, rows + row)).to_f32();
                    scale.mul_add(code as f32, minimum)
                }
            };
        }
    }
}

/// The code of one weight of a group: -128 to 127 for bytes, else from 0 up.
fn code_at(format: Format, codes: &[u8], row: usize, k: usize) -> i32 {
    let (step, field) = (k / 4, row / 16);
    let place = row % 16 * 4 + k % 4;
    let code = match format.bits() {
        8 => return i32::from(codes[step * 128 + field * 64 + place].cast_signed()),
        4 => {
            let byte = codes[step * 64 + place];
            if field == 0 { byte & 15 } else { (byte >> 4) ^ 8 }
        }
        3 => {
            let at = step / 2 * 384 + step % 2 * 64 + place;
            let [p, q, r] = [codes[at], codes[at + 128], codes[at + 256]];
            match field {
                0 => (p >> 2) & 7,
                1 => (p >> 5) ^ 4,
                2 => q & 7,
                3 => (q >> 3) & 7,
                4 => (r >> 1) & 7,
                5 => (r >> 4) & 7,
                6 => (p & 3) | (r & 1) << 2,
                _ => ((q >> 6) ^ 2) << 1 | r >> 7,
            }
        }
        _ => {
            let byte = codes[step * 64 + place] ^ 0x80;
            (byte >> (2 * field)) & 3
        }
    };
    i32::from(code)
}

fn word_at(table: &[u8], index: usize) -> u16 {
    u16::from_le_bytes([table[index * 2], table[index * 2 + 1]])
}

fn float_at(format: Format, panel: &[u8], index: usize) -> f32 {
    match format {
        Format::F16 => f16::from_bits(word_at(panel, index)).to_f32(),
        Format::Bf16 => bf16::from_bits(word_at(panel, index)).to_f32(),
        _ => {
            let at = index * 4;
            f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]])
        }
    }
}
