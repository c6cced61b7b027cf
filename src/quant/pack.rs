//! Codes, scales and offsets into panels.
//!
//! A panel is packed from up to 32 rows, so a converter holds one panel of a matrix at a time however
//! large the matrix is, and panels can be packed on any thread.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::kernel::layout::{Format, Layout, PANEL};
use half::{bf16, f16};

/// Up to 32 rows of a matrix before packing, row after row.
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
        /// `k` codes a row: 0 to 15 for four bits, the byte of an i8 for [`Format::Q8`].
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
/// [`Error::InvalidArgument`] when the lengths or the kind of `data` do not fit the layout, or a
/// four-bit code is above 15.
pub fn pack_panel(layout: &Layout, rows: usize, data: Rows<'_>, panel: &mut [u8]) -> Result<()> {
    let wrong = |what: &str| {
        Err(Error::InvalidArgument(format!("packing {}: {what}", layout.format().name())))
    };
    if rows == 0 || rows > PANEL || panel.len() != layout.panel_bytes() {
        return wrong("a panel has 1 to 32 rows and a fixed number of bytes");
    }
    let values = rows * layout.k();
    match (layout.format(), data) {
        (Format::F32, Rows::F32(x)) if x.len() == values => {
            pack_floats(layout.k(), rows, panel, |i| x[i].to_le_bytes());
        }
        (Format::F16, Rows::F16(x)) if x.len() == values => {
            pack_floats(layout.k(), rows, panel, |i| x[i].to_le_bytes());
        }
        (Format::Bf16, Rows::Bf16(x)) if x.len() == values => {
            pack_floats(layout.k(), rows, panel, |i| x[i].to_le_bytes());
        }
        (format, Rows::Codes { codes, scales, offsets }) if format.is_quantised() => {
            let tables = rows * layout.groups();
            let with_offsets = matches!(format, Format::Q4Z | Format::Q4M);
            if codes.len() != values || scales.len() != tables {
                return wrong("as many codes and scales as the rows have");
            }
            if offsets.len() != if with_offsets { tables } else { 0 } {
                return wrong("one offset for each scale, or none for a symmetric format");
            }
            if format != Format::Q8 && codes.iter().any(|code| *code > 15) {
                return wrong("codes are 0 to 15");
            }
            pack_codes(layout, rows, panel, codes, scales, offsets);
        }
        _ => return wrong("rows of that type and as many values as the layout has"),
    }
    Ok(())
}

fn pack_floats<const BYTES: usize>(
    k: usize,
    rows: usize,
    panel: &mut [u8],
    value: impl Fn(usize) -> [u8; BYTES],
) {
    panel.fill(0);
    let (elements, _) = panel.as_chunks_mut::<BYTES>();
    for (k_index, elements) in elements.chunks_exact_mut(PANEL).enumerate() {
        for (row, element) in elements[..rows].iter_mut().enumerate() {
            *element = value(row * k + k_index);
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
            out.row(row, codes, scales[row * groups + g], offset.unwrap_or(0));
        }
    }
}

/// Writes one group of one panel, row by row.
pub(super) struct GroupPacker<'a> {
    format: Format,
    lines: &'a mut [u8],
    tables: &'a mut [u8],
}

impl<'a> GroupPacker<'a> {
    /// An empty group over its bytes.
    ///
    /// Rows that are not written have the value zero in every format: their scale is zero, and so
    /// are the activations that meet the padding along k.
    pub(super) fn new(layout: &Layout, bytes: &'a mut [u8]) -> Self {
        let (lines, tables) = bytes.split_at_mut(layout.code_bytes());
        lines.fill(if layout.format() == Format::Q8 { 0 } else { 0x80 });
        tables.fill(0);
        Self { format: layout.format(), lines, tables }
    }

    /// The codes of one row, as many as it has in this group, its scale, and its offset for the formats
    /// that have one.
    pub(super) fn row(&mut self, row: usize, codes: &[u8], scale: f16, offset: u16) {
        for (i, &code) in codes.iter().enumerate() {
            let place = row % 16 * 4 + i % 4;
            if self.format == Format::Q8 {
                self.lines[i / 4 * 128 + row / 16 * 64 + place] = code;
                continue;
            }
            let byte = &mut self.lines[i / 4 * 64 + place];
            *byte = if row < 16 { *byte & 0xf0 | code } else { *byte & 0x0f | (code ^ 8) << 4 };
        }
        self.tables[row * 2..row * 2 + 2].copy_from_slice(&scale.to_bits().to_le_bytes());
        if let Some(slot) = self.tables.get_mut((PANEL + row) * 2..(PANEL + row) * 2 + 2) {
            slot.copy_from_slice(&offset.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Packed;
    use crate::memory::Aligned;
    use crate::quant::format::unpack_row;

    /// Packs `n` rows whose codes follow a pattern and reads every weight back.
    fn round_trip(format: Format, group: usize, n: usize, k: usize) {
        let layout = Layout::new(format, group, n, k).unwrap();
        let groups = layout.groups();
        let code = |row: usize, i: usize| ((row * 31 + i * 7 + i / 16) % 256) as u8;
        let code = |row, i| if format == Format::Q8 { code(row, i) } else { code(row, i) % 16 };
        let scale = |row: usize, g: usize| f16::from_f32(0.25 + (row % 5) as f32 + g as f32);
        let offset = |row: usize, g: usize| match format {
            Format::Q4Z => ((row + g) as i16 - 3).cast_unsigned(),
            _ => f16::from_f32(row as f32 - 2.5 * g as f32).to_bits(),
        };
        let mut bytes = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
        for (index, panel) in bytes.chunks_exact_mut(layout.panel_bytes()).enumerate() {
            let rows = PANEL.min(n - index * PANEL);
            let all = |f: &dyn Fn(usize, usize)| {
                for row in index * PANEL..index * PANEL + rows {
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
                if matches!(format, Format::Q4Z | Format::Q4M) {
                    offsets.borrow_mut().push(offset(row, g));
                }
            });
            let codes: Vec<u8> = (index * PANEL..index * PANEL + rows)
                .flat_map(|row| (0..k).map(move |i| code(row, i)))
                .collect();
            let (scales, offsets) = (scales.into_inner(), offsets.into_inner());
            let data = Rows::Codes { codes: &codes, scales: &scales, offsets: &offsets };
            pack_panel(&layout, rows, data, panel).unwrap();
        }
        let packed = Packed::new(layout, &bytes).unwrap();
        let mut out = vec![0.0; k];
        for row in 0..n {
            unpack_row(&packed, row, &mut out);
            for (i, got) in out.iter().enumerate() {
                let g = i / group;
                let (q, s) = (f32::from(code(row, i)), scale(row, g).to_f32());
                let want = match format {
                    Format::Q8 => s * f32::from(code(row, i).cast_signed()),
                    Format::Q4 => s * (q - 8.0),
                    Format::Q4Z => s * (q - f32::from(offset(row, g).cast_signed())),
                    _ => s * q + f16::from_bits(offset(row, g)).to_f32(),
                };
                assert_eq!(*got, want, "{} row {row} k {i}", format.name());
            }
        }
    }

    #[test]
    fn every_format_reads_back_what_was_packed() {
        for format in [Format::Q8, Format::Q4, Format::Q4Z, Format::Q4M] {
            for (group, n, k) in [(32, 32, 64), (32, 70, 172), (64, 33, 128), (128, 1, 130)] {
                round_trip(format, group, n, k);
            }
        }
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
