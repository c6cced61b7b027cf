//! Weights as other projects lay them out in memory, packed without a copy in between.
//!
//! Each source is read field by field from its definition; nothing is rounded. Layouts after the papers'
//! own code: GPTQ (Frantar et al. 2022) as AutoGPTQ writes it, AWQ (Lin et al. 2023) as AutoAWQ's GEMM
//! version does, and GGUF's blocks of 32.
#![forbid(unsafe_code)]

use super::pack::GroupPacker;
use crate::error::{Error, Result};
use crate::kernel::layout::{Format, Layout, Offset};
use half::f16;

/// A matrix `W[n, k]` in somebody else's layout.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// Codes along `k` and zero points along `n` in 32-bit words, lowest bits first, and scales by group:
    /// `qweight[k * bits / 32, n]`, `qzeros[groups, n * bits / 32]`, `scales[groups, n]`. Groups are of
    /// neighbouring columns; with `desc_act` the caller sorts columns and activations by `g_idx` first.
    Gptq {
        /// Codes.
        qweight: &'a [u32],
        /// Zero points.
        qzeros: &'a [u32],
        /// Scales.
        scales: &'a [f16],
        /// Whether zero points were stored less one, as all but version 2 of the layout does.
        less_one: bool,
    },
    /// Four bits: `qweight[k, n / 8]`, `qzeros[groups, n / 8]`, `scales[groups, n]`; the nibbles of a word
    /// are columns 0, 2, 4, 6, 1, 3, 5, 7 of eight.
    Awq {
        /// Codes.
        qweight: &'a [u32],
        /// Zero points.
        qzeros: &'a [u32],
        /// Scales.
        scales: &'a [f16],
    },
    /// GGUF blocks of 32, row after row: Q4_0 for [`Format::Q4`], Q4_1 for [`Format::Q4M`], Q8_0 for
    /// [`Format::Q8`].
    Gguf(&'a [u8]),
}

/// Where AWQ keeps the nibble of each of eight columns.
const AWQ_NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Field number `at` of `bits` bits in a stream of words that are `stride` apart.
fn field(words: &[u32], first: usize, stride: usize, bits: usize, at: usize) -> u8 {
    let (word, shift) = (at * bits / 32, at * bits % 32);
    let mut value = words[first + word * stride] >> shift;
    if shift + bits > 32 {
        value |= words[first + (word + 1) * stride] << (32 - shift);
    }
    (value & ((1 << bits) - 1)) as u8
}

impl Source<'_> {
    /// Whether the arrays are as long as the layout asks for, and of a format that they fit.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that says what does not fit.
    pub fn check(&self, layout: &Layout) -> Result<()> {
        let (format, n, k, groups) = (layout.format(), layout.n(), layout.k(), layout.groups());
        let wrong = |what: String| Err(Error::InvalidArgument(what));
        let name = format.name();
        let bits = format.bits();
        let whole = |columns: usize, rows: usize| {
            (rows * bits).is_multiple_of(32) && (columns * bits).is_multiple_of(32)
        };
        let sizes = match self {
            Self::Gptq { qweight, qzeros, scales, .. } => {
                if bits > 4 && bits != 8 || format.offset() == Offset::Minimum {
                    return wrong(format!("GPTQ weights do not fit {name}"));
                }
                if bits == 8 || !whole(k, n) {
                    return wrong(format!(
                        "GPTQ weights of {bits} bits and {n} x {k} have no whole words"
                    ));
                }
                [
                    (qweight.len(), k * bits / 32 * n),
                    (qzeros.len(), groups * (n * bits / 32)),
                    (scales.len(), groups * n),
                ]
            }
            Self::Awq { qweight, qzeros, scales } => {
                if bits != 4 || format.offset() == Offset::Minimum || !n.is_multiple_of(8) {
                    return wrong(format!("AWQ weights do not fit {name} with {n} outputs"));
                }
                [
                    (qweight.len(), k * (n / 8)),
                    (qzeros.len(), groups * (n / 8)),
                    (scales.len(), groups * n),
                ]
            }
            Self::Gguf(blocks) => {
                if layout.group() != 32 || !k.is_multiple_of(32) {
                    return wrong(format!(
                        "GGUF blocks are groups of 32, not {}, of a whole row, not {k}",
                        layout.group()
                    ));
                }
                let Some(size) = block_bytes(format) else {
                    return wrong(format!("no GGUF blocks of 32 have the values of {name}"));
                };
                [(blocks.len(), n * (k / 32) * size), (0, 0), (0, 0)]
            }
        };
        match sizes.into_iter().find(|(have, want)| have != want) {
            Some((have, want)) => {
                wrong(format!("{have} elements where {n} x {k} {name} has {want}"))
            }
            None => Ok(()),
        }
    }

    /// Packs panel number `index`; `check` must have passed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a symmetric format meets a zero point that is not its middle.
    ///
    /// # Panics
    /// When the arrays are too short: a bug of the caller.
    pub fn pack_panel(&self, layout: &Layout, index: usize, panel: &mut [u8]) -> Result<()> {
        let (format, n, k, group) = (layout.format(), layout.n(), layout.k(), layout.group());
        let bits = format.bits();
        let first = index * layout.panel_rows();
        let rows = layout.panel_rows().min(n - first);
        for (g, bytes) in panel.chunks_exact_mut(layout.group_bytes()).enumerate() {
            let mut out = GroupPacker::new(layout, bytes);
            let columns = g * group..k.min((g + 1) * group);
            for row in 0..rows {
                let output = first + row;
                match self {
                    Self::Gptq { qweight, qzeros, scales, less_one } => {
                        let zero = field(qzeros, g * (n * bits / 32), 1, bits, output);
                        // Each field on its own: the writers take one off in each.
                        let zero = (zero + u8::from(*less_one)) & ((1 << bits) - 1);
                        let codes = columns.clone().map(|k| field(qweight, output, n, bits, k));
                        let offset = zero_point(format, zero)?;
                        out.row(row, codes, scales[g * n + output], offset);
                    }
                    Self::Awq { qweight, qzeros, scales } => {
                        let shift = 4 * AWQ_NIBBLE[output % 8];
                        let nibble = |words: &[u32], row: usize| {
                            (words[row * (n / 8) + output / 8] >> shift & 15) as u8
                        };
                        let codes = columns.clone().map(|k| nibble(qweight, k));
                        let offset = zero_point(format, nibble(qzeros, g))?;
                        out.row(row, codes, scales[g * n + output], offset);
                    }
                    Self::Gguf(blocks) => {
                        let size = block_bytes(format).unwrap_or(0);
                        let block = &blocks[(output * (k / 32) + g) * size..][..size];
                        let word = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
                        let scale = f16::from_bits(word(0));
                        match format {
                            Format::Q8 => out.row(row, block[2..].iter().copied(), scale, 0),
                            _ => {
                                let head = size - 16;
                                let nibbles = &block[head..];
                                let low = nibbles.iter().map(|byte| byte & 15);
                                let codes = low.chain(nibbles.iter().map(|byte| byte >> 4));
                                let minimum = if head == 4 { word(2) } else { 0 };
                                out.row(row, codes, scale, minimum);
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// The offset to store for a zero point: the point itself, or none where it is the middle anyway.
fn zero_point(format: Format, zero: u8) -> Result<u16> {
    if format.offset() == Offset::None && i32::from(zero) != format.middle() {
        return Err(Error::InvalidArgument(format!(
            "a zero point of {zero}, where {} has {}: use the format with zero points",
            format.name(),
            format.middle()
        )));
    }
    Ok(u16::from(zero))
}

/// Bytes of a GGUF block of 32 with the values of `format`.
fn block_bytes(format: Format) -> Option<usize> {
    match format {
        Format::Q4 => Some(18),
        Format::Q4M => Some(20),
        Format::Q8 => Some(34),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Packed;
    use crate::memory::Aligned;
    use crate::quant::format::unpack_row;

    fn packed(layout: &Layout, source: &Source<'_>) -> Aligned<u8> {
        source.check(layout).unwrap();
        let mut bytes = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
        for (index, panel) in bytes.chunks_exact_mut(layout.panel_bytes()).enumerate() {
            source.pack_panel(layout, index, panel).unwrap();
        }
        bytes
    }

    fn all(layout: Layout, bytes: &[u8]) -> Vec<f32> {
        let packed = Packed::new(layout, bytes).unwrap();
        let mut out = vec![0.0; layout.n() * layout.k()];
        out.chunks_exact_mut(layout.k())
            .enumerate()
            .for_each(|(i, out)| unpack_row(&packed, i, out));
        out
    }

    /// A stream of fields, lowest bits first, as a number: bit `i` of the stream is bit `i % 32` of word
    /// `i / 32`.
    fn stream(bits: usize, values: &[u8]) -> Vec<u32> {
        let mut words = vec![0; (values.len() * bits).div_ceil(32)];
        for (i, value) in values.iter().enumerate() {
            for bit in (0..bits).filter(|bit| value >> bit & 1 == 1) {
                words[(i * bits + bit) / 32] |= 1 << ((i * bits + bit) % 32);
            }
        }
        words
    }

    #[test]
    fn gptq_of_every_width() {
        for (format, bits) in [(Format::Q4Z, 4), (Format::Q3Z, 3), (Format::Q2Z, 2)] {
            for less_one in [false, true] {
                let (n, k, group) = (64, 96, 32);
                let layout = Layout::new(format, group, n, k).unwrap();
                let mask = (1_u8 << bits) - 1;
                let code = |n: usize, k: usize| (n * 7 + k * 5 + k / 11) as u8 & mask;
                let zero = |n: usize, g: usize| ((n + g) as u8 & mask).max(1);
                let scale = |n: usize, g: usize| f16::from_f32((n + 1) as f32 / 8.0 + g as f32);
                let mut qweight = vec![0; k * bits / 32 * n];
                for column in 0..n {
                    let codes: Vec<u8> = (0..k).map(|k| code(column, k)).collect();
                    for (i, word) in stream(bits, &codes).into_iter().enumerate() {
                        qweight[i * n + column] = word;
                    }
                }
                let stored = |n, g| zero(n, g) - u8::from(less_one);
                let zeros = (0..3).map(|g| (0..n).map(|n| stored(n, g)).collect::<Vec<_>>());
                let qzeros: Vec<u32> = zeros.flat_map(|zeros| stream(bits, &zeros)).collect();
                let scales: Vec<f16> =
                    (0..3).flat_map(|g| (0..n).map(move |n| scale(n, g))).collect();
                let source =
                    Source::Gptq { qweight: &qweight, qzeros: &qzeros, scales: &scales, less_one };
                let got = all(layout, &packed(&layout, &source));
                for (i, got) in got.iter().enumerate() {
                    let (n, k) = (i / k, i % k);
                    let difference = f32::from(code(n, k)) - f32::from(zero(n, k / group));
                    assert_eq!(*got, scale(n, k / group).to_f32() * difference, "{n} {k}");
                }
            }
        }
    }

    #[test]
    fn awq_in_its_order() {
        let (n, k) = (40, 64);
        let code = |n: usize, k: usize| (n * 3 + k * 5) as u32 % 16;
        let words = |f: &dyn Fn(usize) -> u32| -> Vec<u32> {
            let order = [0, 2, 4, 6, 1, 3, 5, 7];
            let word = |c: usize| (0..8).map(|i| f(8 * c + order[i]) << (4 * i)).sum();
            (0..n / 8).map(word).collect()
        };
        let qweight: Vec<u32> = (0..k).flat_map(|k| words(&|n| code(n, k))).collect();
        let scales = vec![f16::from_f32(0.5); n];
        let layout = Layout::new(Format::Q4Z, 64, n, k).unwrap();
        let qzeros = words(&|n| n as u32 % 16);
        let source = Source::Awq { qweight: &qweight, qzeros: &qzeros, scales: &scales };
        for (i, got) in all(layout, &packed(&layout, &source)).iter().enumerate() {
            let (n, k) = (i / k, i % k);
            assert_eq!(*got, 0.5 * (code(n, k) as f32 - (n % 16) as f32));
        }
        // Zero points that are all in the middle need not be stored.
        let symmetric = Layout::new(Format::Q4, 64, n, k).unwrap();
        let middle = words(&|_| 8);
        let source = Source::Awq { qweight: &qweight, qzeros: &middle, scales: &scales };
        assert_eq!(all(symmetric, &packed(&symmetric, &source))[1], 0.5 * (5.0 - 8.0));
        let source = Source::Awq { qweight: &qweight, qzeros: &qzeros, scales: &scales };
        let mut panel = vec![0; symmetric.panel_bytes()];
        assert!(source.pack_panel(&symmetric, 0, &mut panel).is_err());
        assert!(source.check(&Layout::new(Format::Q4Z, 32, n, k).unwrap()).is_err());
        assert!(source.check(&Layout::new(Format::Q3Z, 64, n, k).unwrap()).is_err());
    }

    #[test]
    fn gguf_blocks_of_each_kind() {
        let (n, k) = (3, 64);
        for (format, size) in [(Format::Q4, 18), (Format::Q4M, 20), (Format::Q8, 34)] {
            let layout = Layout::new(format, 32, n, k).unwrap();
            let mut blocks: Vec<u8> = (0..n * 2 * size).map(|i| (i * 37 % 251) as u8).collect();
            for block in blocks.chunks_exact_mut(size) {
                block[..2].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
                if size == 20 {
                    block[2..4].copy_from_slice(&f16::from_f32(-1.5).to_le_bytes());
                }
            }
            let got = all(layout, &packed(&layout, &Source::Gguf(&blocks)));
            for (i, got) in got.iter().enumerate() {
                let (block, j) = (&blocks[i / 32 * size..][..size], i % 32);
                let want = if size == 34 {
                    0.25 * f32::from(block[2 + j].cast_signed())
                } else {
                    let byte = block[size - 16 + j % 16];
                    let code = f32::from(if j < 16 { byte % 16 } else { byte / 16 });
                    if size == 20 { 0.25 * code - 1.5 } else { 0.25 * (code - 8.0) }
                };
                assert_eq!(*got, want, "{} {i}", format.name());
            }
        }
    }
}
