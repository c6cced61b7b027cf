//! Codes, scales and offsets into panels.
//!
//! A panel is packed from the rows that it holds, so a converter holds one panel of a matrix at a time however
//! large the matrix is, and panels can be packed on any thread.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::kernel::layout::{Format, Layout, Offset};
use half::{bf16, f16};

/// The rows of one panel before packing, row after row.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// For [`Format::F32`]: `k` floats a row.
    F32(&'a [f32]),
    /// For [`Format::F16`].
    F16(&'a [f16]),
    /// For [`Format::Bf16`].
    Bf16(&'a [bf16]),
    /// For the quantised formats.
    Codes {
        /// `k` codes a row: from 0 up (0 to 15 for four bits), the byte of an i8 for [`Format::Q8`].
        codes: &'a [u8],
        /// One scale for each group of a row.
        scales: &'a [f16],
        /// One offset for each group of a row: the bits of an i16 zero point or of an f16 minimum;
        /// empty for formats without.
        offsets: &'a [u16],
    },
}

/// Packs the first `rows` rows of `data` as one panel.
///
/// # Errors
/// [`Error::InvalidArgument`] when the lengths or the kind of `data` do not fit the layout, or a code
/// has more bits than the format.
pub fn pack_panel(layout: &Layout, rows: usize, data: Rows<'_>, panel: &mut [u8]) -> Result<()> {
    let wrong = |what: &str| {
        Err(Error::InvalidArgument(format!("packing {}: {what}", layout.format().name())))
    };
    if rows == 0 || rows > layout.panel_rows() || panel.len() != layout.panel_bytes() {
        return wrong("a panel has so many rows at most, and a fixed number of bytes");
    }
    let values = rows * layout.k();
    match (layout.format(), data) {
        (Format::F32, Rows::F32(x)) if x.len() == values => {
            pack_floats(layout, rows, panel, |i| x[i].to_le_bytes());
        }
        (Format::F16, Rows::F16(x)) if x.len() == values => {
            pack_floats(layout, rows, panel, |i| x[i].to_le_bytes());
        }
        (Format::Bf16, Rows::Bf16(x)) if x.len() == values => {
            pack_floats(layout, rows, panel, |i| x[i].to_le_bytes());
        }
        (format, Rows::Codes { codes, scales, offsets }) if format.is_quantised() => {
            let tables = rows * layout.groups();
            let with_offsets = format.offset() != Offset::None;
            if codes.len() != values || scales.len() != tables {
                return wrong("as many codes and scales as the rows have");
            }
            if offsets.len() != if with_offsets { tables } else { 0 } {
                return wrong("one offset for each scale, or none for a symmetric format");
            }
            let most = u8::MAX >> (8 - format.bits());
            if codes.iter().any(|code| *code > most) {
                return wrong(&format!("codes are 0 to {most}"));
            }
            pack_codes(layout, rows, panel, codes, scales, offsets);
        }
        _ => return wrong("rows of that type and as many values as the layout has"),
    }
    Ok(())
}

fn pack_floats<const BYTES: usize>(
    layout: &Layout,
    rows: usize,
    panel: &mut [u8],
    value: impl Fn(usize) -> [u8; BYTES],
) {
    panel.fill(0);
    let (elements, _) = panel.as_chunks_mut::<BYTES>();
    for (k, elements) in elements.chunks_exact_mut(layout.panel_rows()).enumerate() {
        for (row, element) in elements[..rows].iter_mut().enumerate() {
            *element = value(row * layout.k() + k);
        }
    }
}

fn pack_codes(
    layout: &Layout,
    rows: usize,
    panel: &mut [u8],
    codes: &[u8],
    scales: &[f16],
    offsets: &[u16],
) {
    let (k, group, groups) = (layout.k(), layout.group(), layout.groups());
    for (g, bytes) in panel.chunks_exact_mut(layout.group_bytes()).enumerate() {
        let mut out = GroupPacker::new(layout, bytes);
        for row in 0..rows {
            let codes = &codes[row * k..(row + 1) * k];
            let codes = &codes[g * group..k.min((g + 1) * group)];
            let offset = offsets.get(row * groups + g).copied();
            let scale = scales[row * groups + g];
            out.codes(row, 0, codes);
            out.tables(row, scale, offset.unwrap_or(0));
        }
    }
}

/// Writes one group of one panel, row by row.
pub(super) struct GroupPacker<'a> {
    bits: usize,
    panel_rows: usize,
    lines: &'a mut [u8],
    tables: &'a mut [u8],
}

impl<'a> GroupPacker<'a> {
    /// A group of zero codes over its bytes.
    ///
    /// Rows that are not written have the value zero in every format: their scale is zero, and so
    /// are the activations that meet the padding along k.
    pub(super) fn new(layout: &Layout, bytes: &'a mut [u8]) -> Self {
        let (lines, tables) = bytes.split_at_mut(layout.code_bytes());
        let bits = layout.format().bits();
        lines.fill(if bits == 8 { 0 } else { 0x80 });
        if bits == 3 {
            lines.chunks_exact_mut(384).for_each(|six| six[256..].fill(0));
        }
        tables.fill(0);
        Self { bits, panel_rows: layout.panel_rows(), lines, tables }
    }

    /// The codes of one row, as many as it has in this group, its scale, and its offset for the formats
    /// that have one.
    pub(super) fn row(
        &mut self,
        row: usize,
        mut codes: impl Iterator<Item = u8>,
        scale: f16,
        offset: u16,
    ) {
        let mut some = [0; 128];
        for first in (0..).step_by(some.len()) {
            let filled = some.iter_mut().zip(&mut codes).map(|(place, code)| *place = code).count();
            self.codes(row, first, &some[..filled]);
            if filled < some.len() {
                break;
            }
        }
        self.tables(row, scale, offset);
    }

    /// Some codes of one row, those from column `first` of the group on, a multiple of 8. Each once: the bits
    /// of a code go on top of those of code zero.
    pub(super) fn codes(&mut self, row: usize, first: usize, codes: &[u8]) {
        let (field, place) = (row / 16, row % 16 * 4);
        let quads = codes.chunks(4).zip(first / 4..);
        match self.bits {
            8 => {
                for (codes, step) in quads {
                    let at = step * 128 + field * 64 + place;
                    self.lines[at..][..codes.len()].copy_from_slice(codes);
                }
            }
            3 => {
                for (codes, step) in quads {
                    let at = step / 2 * 384 + step % 2 * 64 + place;
                    for (at, code) in (at..).zip(codes) {
                        self.three_bits(field, [at, at + 128, at + 256], *code);
                    }
                }
            }
            bits => {
                let shift = bits * field;
                for (codes, step) in quads {
                    let line = &mut self.lines[step * 64 + place..][..codes.len()];
                    line.iter_mut().zip(codes).for_each(|(byte, code)| *byte ^= code << shift);
                }
            }
        }
    }

    fn three_bits(&mut self, field: usize, [p, q, r]: [usize; 3], code: u8) {
        match field {
            0 => self.lines[p] ^= code << 2,
            1 => self.lines[p] ^= code << 5,
            2 => self.lines[q] ^= code,
            3 => self.lines[q] ^= code << 3,
            4 => self.lines[r] ^= code << 1,
            5 => self.lines[r] ^= code << 4,
            6 => {
                self.lines[p] ^= code & 3;
                self.lines[r] ^= code >> 2;
            }
            _ => {
                self.lines[q] ^= code >> 1 << 6;
                self.lines[r] ^= code << 7;
            }
        }
    }

    /// The scale of one row, and its offset for the formats that have one.
    pub(super) fn tables(&mut self, row: usize, scale: f16, offset: u16) {
        let mut put = |row: usize, word: u16| {
            if let Some(slot) = self.tables.get_mut(row * 2..row * 2 + 2) {
                slot.copy_from_slice(&word.to_le_bytes());
            }
        };
        put(row, scale.to_bits());
        put(self.panel_rows + row, offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Packed;
    use crate::kernel::layout::WHOLE_ROW;
    use crate::memory::Aligned;
    use crate::quant::format::unpack_row;

    /// Packs `n` rows whose codes follow a pattern and reads every weight back.
    fn round_trip(format: Format, group: usize, n: usize, k: usize) {
        let layout = Layout::new(format, group, n, k).unwrap();
        let groups = layout.groups();
        let code = |row: usize, i: usize| ((row * 31 + i * 7 + i / 16) % 256) as u8;
        let code = |row, i| code(row, i) & (u8::MAX >> (8 - format.bits()));
        let scale = |row: usize, g: usize| f16::from_f32(0.25 + (row % 5) as f32 + g as f32);
        let offset = |row: usize, g: usize| match format.offset() {
            Offset::Zero => ((row + g) as i16 - 3).cast_unsigned(),
            _ => f16::from_f32(row as f32 - 2.5 * g as f32).to_bits(),
        };
        let mut bytes = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
        for (index, panel) in bytes.chunks_exact_mut(layout.panel_bytes()).enumerate() {
            let first = index * layout.panel_rows();
            let rows = layout.panel_rows().min(n - first);
            let all = |f: &dyn Fn(usize, usize)| {
                for row in first..first + rows {
                    for g in 0..groups {
                        f(row, g);
                    }
                }
            };
            let (scales, offsets) = (std::cell::RefCell::default(), std::cell::RefCell::default());
            all(&|row, g| {
                let scales: &std::cell::RefCell<Vec<f16>> = &scales;
                let offsets: &std::cell::RefCell<Vec<u16>> = &offsets;
                scales.borrow_mut().push(scale(row, g));
                if format.offset() != Offset::None {
                    offsets.borrow_mut().push(offset(row, g));
                }
            });
            let codes: Vec<u8> =
                (first..first + rows).flat_map(|row| (0..k).map(move |i| code(row, i))).collect();
            let (scales, offsets) = (scales.into_inner(), offsets.into_inner());
            let data = Rows::Codes { codes: &codes, scales: &scales, offsets: &offsets };
            pack_panel(&layout, rows, data, panel).unwrap();
        }
        let packed = Packed::new(layout, &bytes).unwrap();
        let mut out = vec![0.0; k];
        for row in 0..n {
            unpack_row(&packed, row, &mut out);
            for (i, got) in out.iter().enumerate() {
                let g = i / layout.group();
                let (q, s) = (f32::from(code(row, i)), scale(row, g).to_f32());
                let want = match format.offset() {
                    Offset::None if format == Format::Q8 => {
                        s * f32::from(code(row, i).cast_signed())
                    }
                    Offset::None => s * (q - format.middle() as f32),
                    Offset::Zero => s * (q - f32::from(offset(row, g).cast_signed())),
                    Offset::Minimum => s * q + f16::from_bits(offset(row, g)).to_f32(),
                };
                assert_eq!(*got, want, "{} row {row} k {i}", format.name());
            }
        }
    }

    #[test]
    fn every_format_reads_back_what_was_packed() {
        let shapes = [(128, 1, 130), (16, 200, 40), (32, 32, 64), (32, 70, 172), (64, 129, 128)];
        let shapes = if cfg!(miri) { &shapes[..1] } else { &shapes };
        for format in Format::ALL.into_iter().filter(|format| format.is_quantised()) {
            for (group, n, k) in shapes {
                round_trip(format, *group, *n, *k);
            }
        }
        round_trip(Format::Q8, WHOLE_ROW, 40, 300);
    }

    #[test]
    fn floats_read_back_what_was_packed() {
        let layout = Layout::new(Format::Bf16, 0, 3, 5).unwrap();
        let rows: Vec<bf16> = (0..15).map(|i| bf16::from_f32(i as f32 * 0.5)).collect();
        let mut panel = vec![0_u32; layout.panel_bytes() / 4];
        let panel: &mut [u8] = bytemuck::cast_slice_mut(&mut panel);
        pack_panel(&layout, 3, Rows::Bf16(&rows), panel).unwrap();
        let mut out = [0.0; 5];
        unpack_row(&Packed::new(layout, panel).unwrap(), 2, &mut out);
        assert_eq!(out, [5.0, 5.5, 6.0, 6.5, 7.0]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let layout = Layout::new(Format::Q4, 32, 2, 32).unwrap();
        let mut panel = vec![0; layout.panel_bytes()];
        let (codes, scales) = ([16_u8; 64], [f16::ONE; 2]);
        let data = Rows::Codes { codes: &codes, scales: &scales, offsets: &[] };
        let error = pack_panel(&layout, 2, data, &mut panel).unwrap_err().to_string();
        assert!(error.contains("0 to 15"), "{error}");
        let data = Rows::F32(&[0.0; 64]);
        assert!(pack_panel(&layout, 2, data, &mut panel).is_err());
    }
}
