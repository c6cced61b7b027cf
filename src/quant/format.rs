//! The bit maps of the packed formats, read back: the reference dequantiser.
//!
//! Written from the definition in `docs/formats.md`, one weight at a time, so that packing and
//! kernels have something simple to be compared with. The embedding lookup uses it as well: one row
//! a token is no work.
#![forbid(unsafe_code)]

use crate::kernel::Packed;
use crate::kernel::layout::{Format, PANEL};
use half::{bf16, f16};

/// Writes row `row` of the matrix as `k` floats.
///
/// # Panics
/// When the row does not exist or `out` is not `k` long: a bug of the caller.
pub fn unpack_row(packed: &Packed<'_>, row: usize, out: &mut [f32]) {
    let layout = packed.layout();
    assert!(row < layout.n() && out.len() == layout.k(), "row {row} of {}", layout.n());
    let panel = &packed.bytes()[row / PANEL * layout.panel_bytes()..][..layout.panel_bytes()];
    let row = row % PANEL;
    if !layout.format().is_quantised() {
        for (k, out) in out.iter_mut().enumerate() {
            *out = float_at(layout.format(), panel, k * PANEL + row);
        }
        return;
    }
    let groups = panel.chunks_exact(layout.group_bytes()).zip(out.chunks_mut(layout.group()));
    for (bytes, out) in groups {
        let (codes, tables) = bytes.split_at(layout.code_bytes());
        let scale = f16::from_bits(word_at(tables, row)).to_f32();
        for (k, out) in out.iter_mut().enumerate() {
            let code = code_at(layout.format(), codes, row, k);
            *out = match layout.format() {
                Format::Q4 => scale * (code - 8) as f32,
                Format::Q4Z => {
                    let zero = i32::from(word_at(tables, PANEL + row).cast_signed());
                    scale * (code - zero) as f32
                }
                Format::Q4M => {
                    let minimum = f16::from_bits(word_at(tables, PANEL + row)).to_f32();
                    scale.mul_add(code as f32, minimum)
                }
                _ => scale * code as f32,
            };
        }
    }
}

/// The code of one weight of a group: 0 to 15 for four bits, -128 to 127 for bytes.
fn code_at(format: Format, codes: &[u8], row: usize, k: usize) -> i32 {
    let place = row % 16 * 4 + k % 4;
    if format == Format::Q8 {
        return i32::from(codes[k / 4 * 128 + row / 16 * 64 + place].cast_signed());
    }
    let byte = codes[k / 4 * 64 + place];
    i32::from(if row < 16 { byte & 15 } else { (byte >> 4) ^ 8 })
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
