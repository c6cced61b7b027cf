//! Quantised matrices of Hugging Face folders: GPTQ, AWQ and compressed-tensors.
//!
//! All three put codes of a few bits into 32-bit words and differ in the direction of a line of codes,
//! in the place of a code in its words, and in what a zero point is counted from. So there is one
//! description, [`Grid`], and one constructor for each convention. A weight is `s * (q - z)`
//! everywhere, with codes and zero points from 0 up.
//!
//! Bit maps: GPTQ <https://github.com/AutoGPTQ/AutoGPTQ>, <https://github.com/ModelCloud/GPTQModel>; AWQ
//! <https://github.com/casper-hansen/AutoAWQ>; <https://github.com/vllm-project/compressed-tensors>.
#![forbid(unsafe_code)]

use super::blocks::{Blocks, Keeps};
use super::safetensors::{Dtype, Stored};
use super::tensor::Order;
use crate::error::{Error, Result};
use crate::kernel::Format;
use crate::kernel::layout::{MAX_DIMENSION, Offset};
use half::{bf16, f16};

/// Where the bits of a code lie in the words of its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fields {
    /// Code `i` at bit `i * bits`, across words where it does not fit.
    Dense,
    /// As many codes as fit into a word, the rest of its bits unused.
    Padded,
    /// For every 32 codes planes of 4, 2 and 1 bits, the lowest bits first.
    Planar,
    /// Four bits, eight codes a word in the order 0, 2, 4, 6, 1, 3, 5, 7.
    Interleaved,
    /// Four bits, four lines together: of every 64 codes of each 8 words, one line after the other.
    Fourfold,
}

/// Some bits of a code: word of the period, shift there, bits, place in the code.
#[derive(Clone, Copy, Default)]
struct Piece {
    word: usize,
    shift: u32,
    mask: u32,
    at: u32,
}

/// Codes in the words of a stored tensor.
#[derive(Clone)]
struct Grid {
    stored: Stored,
    /// The pieces of every code of a period.
    pieces: Vec<[Piece; 3]>,
    /// Words of a period.
    words: usize,
    /// Words from one word of a line to the next, and from one line to the next.
    stride: usize,
    pitch: usize,
    /// Lines that lie together, and how many words the next one of them begins later.
    together: (usize, usize),
}

impl Grid {
    /// Lines of `length` codes along dimension `along` of a matrix of words, `lines` of them.
    fn new(
        stored: Stored,
        fields: Fields,
        bits: u32,
        along: usize,
        length: usize,
        lines: usize,
    ) -> Result<Self> {
        let [rows, columns] = stored.shape[..] else {
            return Err(wrong(format!(
                "has the shape {:?} where a matrix was expected",
                stored.shape
            )));
        };
        let fourfold = fields == Fields::Fourfold;
        let typed = if fourfold {
            stored.dtype == Dtype::I16
        } else {
            matches!(stored.dtype, Dtype::I32 | Dtype::U32)
        };
        if !typed {
            let want = if fourfold { "I16" } else { "I32" };
            return Err(wrong(format!(
                "has the type {:?} where {want} was expected",
                stored.dtype
            )));
        }
        let (pieces, words) = pieces(fields, bits);
        let (have, have_lines) = match along {
            _ if fourfold => (columns, rows * 4),
            0 => (rows, columns),
            _ => (columns, rows),
        };
        let bits = bits as usize;
        let need = match fields {
            Fields::Dense => (length * bits).div_ceil(32),
            Fields::Padded => length.div_ceil(32 / bits),
            Fields::Planar => length.div_ceil(32) * bits,
            Fields::Interleaved => length.div_ceil(8),
            Fields::Fourfold => length.next_multiple_of(64),
        };
        if have < need || have_lines < lines {
            let shape = &stored.shape;
            return Err(wrong(format!(
                "has the shape {shape:?}, too small for {lines} lines of {length}"
            )));
        }
        let (stride, pitch, together) = match along {
            _ if fourfold => (1, columns / 2, (4, 8)),
            0 => (columns, 1, (1, 0)),
            _ => (1, columns, (1, 0)),
        };
        Ok(Self { stored, pieces, words, stride, pitch, together })
    }

    fn word(&self, line: usize, index: usize) -> u32 {
        let (lines, later) = self.together;
        let start = line / lines * self.pitch + line % lines * later;
        let at = (start + index * self.stride) * 4;
        let bytes = self.stored.bytes();
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    }

    fn get(&self, line: usize, index: usize) -> u8 {
        let base = index / self.pieces.len() * self.words;
        let pieces = &self.pieces[index % self.pieces.len()];
        let part = |piece: &Piece| match piece.mask {
            0 => 0,
            mask => (self.word(line, base + piece.word) >> piece.shift & mask) << piece.at,
        };
        byte(part(&pieces[0]) | part(&pieces[1]) | part(&pieces[2]))
    }

    /// Appends `length` codes of a line.
    fn line(&self, line: usize, length: usize, out: &mut Vec<u8>) {
        let mut words = [0_u32; 8];
        for start in (0..length).step_by(self.pieces.len()) {
            let pieces = &self.pieces[..self.pieces.len().min(length - start)];
            let base = start / self.pieces.len() * self.words;
            let last = pieces.iter().flatten().filter(|piece| piece.mask != 0);
            let used = last.map(|piece| piece.word + 1).max().unwrap_or(0);
            for (index, word) in words[..used].iter_mut().enumerate() {
                *word = self.word(line, base + index);
            }
            out.extend(pieces.iter().map(|[a, b, c]| {
                let part =
                    |piece: &Piece| (words[piece.word] >> piece.shift & piece.mask) << piece.at;
                byte(part(a) | part(b) | part(c))
            }));
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "codes have at most eight bits")]
fn byte(code: u32) -> u8 {
    code as u8
}

/// The pieces of the codes of one period, and its words: 32 codes, or those of one word.
fn pieces(fields: Fields, bits: u32) -> (Vec<[Piece; 3]>, usize) {
    let mask = |bits: u32| (1 << bits) - 1;
    let none = Piece::default();
    match fields {
        Fields::Dense => {
            let piece = |index: u32| {
                let bit = index * bits;
                let low = bits.min(32 - bit % 32);
                let word = (bit / 32) as usize;
                let first = Piece { word, shift: bit % 32, mask: mask(low), at: 0 };
                if low == bits {
                    return [first, none, none];
                }
                [first, Piece { word: word + 1, shift: 0, mask: mask(bits - low), at: low }, none]
            };
            ((0..32).map(piece).collect(), bits as usize)
        }
        Fields::Padded => {
            let piece = |index: u32| {
                [Piece { word: 0, shift: index * bits, mask: mask(bits), at: 0 }, none, none]
            };
            ((0..32 / bits).map(piece).collect(), 1)
        }
        Fields::Interleaved => {
            let place = [0, 4, 1, 5, 2, 6, 3, 7];
            let piece =
                |place: u32| [Piece { word: 0, shift: place * 4, mask: 15, at: 0 }, none, none];
            (place.map(piece).to_vec(), 1)
        }
        Fields::Fourfold => {
            // Of 32 codes, those of column pair g of each of four runs of eight lie together, even ones first.
            let piece = |index: u32| {
                let (run, pair, odd) = (index % 32 / 8, index % 8 / 2, index % 2);
                let at = index / 32 * 32 + pair * 8 + odd * 4 + run;
                let first = Piece { word: (at / 8) as usize, shift: at % 8 * 4, mask: 15, at: 0 };
                [first, none, none]
            };
            ((0..64).map(piece).collect(), 32)
        }
        Fields::Planar => {
            let piece = |index: u32| {
                let (mut out, mut count, mut word, mut at) = ([none; 3], 0, 0, 0);
                for width in [8, 4, 2, 1] {
                    // Eight bits are one plane of eight, others are split into 4, 2 and 1.
                    let wanted =
                        if bits == 8 { width == 8 } else { width < 8 && bits & width != 0 };
                    if wanted {
                        let in_word = 32 / width;
                        out[count] = Piece {
                            word: word + (index / in_word) as usize,
                            shift: index % in_word * width,
                            mask: mask(width),
                            at,
                        };
                        (count, word, at) = (count + 1, word + width as usize, at + width);
                    }
                }
                out
            };
            ((0..32).map(piece).collect(), bits as usize)
        }
    }
}

/// The parts of a module, as the folder stores them.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) codes: Option<Stored>,
    pub(super) scales: Option<Stored>,
    pub(super) zeros: Option<Stored>,
    pub(super) groups: Option<Stored>,
    pub(super) shape: Option<Stored>,
}

/// What the folder says about how its modules are quantised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scheme {
    pub(super) convention: Convention,
    /// Bits of a code: several where modules differ, of which the shapes say which.
    pub(super) bits: Vec<u32>,
    /// Columns that share a scale, 0 for a whole row: several where modules differ, of which the number of
    /// scales says which.
    pub(super) groups: Vec<usize>,
}

/// How codes and zero points are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Convention {
    /// GPTQ, whose first version stores zero points less one.
    Gptq {
        /// Whether zero points are stored less one.
        less_one: bool,
        /// Whether codes are stored in planes.
        planar: bool,
    },
    /// AutoAWQ's GEMM.
    AwqGemm,
    /// AutoAWQ's GEMV.
    AwqGemv,
    /// AutoAWQ's GEMVFast, which has a scaled zero point, a float, for each group.
    AwqGemvFast,
    /// compressed-tensors, pack-quantized.
    PackQuantized,
}

/// A quantised matrix.
#[derive(Clone)]
pub(super) struct Words {
    codes: Grid,
    /// Whether a line of codes is a row of the matrix; else it is a column.
    by_rows: bool,
    zeros: Option<(Grid, bool)>,
    /// What is added to a stored zero point, within its bits.
    plus: u8,
    /// What is added to a code times its scale, in place of zero points.
    minima: Option<Scales>,
    scales: Scales,
    bits: u32,
    n: usize,
    k: usize,
    group: usize,
    order: Option<Order>,
    format: Format,
    packed_group: usize,
    keeps: Keeps,
    name: &'static str,
    planar: bool,
    bytes: usize,
}

#[derive(Clone)]
struct Scales {
    stored: Stored,
    /// Elements from one row of the matrix to the next, and from one group to the next.
    row: usize,
    group: usize,
}

impl Scales {
    fn new(stored: Stored, by_rows: bool, n: usize, groups: usize) -> Result<Self> {
        if !matches!(stored.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32) {
            return Err(wrong(format!("scales of the type {:?}", stored.dtype)));
        }
        let (rows, columns) = match stored.shape[..] {
            [rows, columns] => (rows, columns),
            [one] if one == n && groups == 1 => {
                if by_rows {
                    (n, 1)
                } else {
                    (1, n)
                }
            }
            [] | [1] => (1, 1),
            _ => return Err(wrong(format!("scales of the shape {:?}", stored.shape))),
        };
        let (have_n, have_groups) = if by_rows { (rows, columns) } else { (columns, rows) };
        // One scale for the whole matrix is as good as one for each row.
        let one = (have_n, have_groups) == (1, 1) && groups == 1;
        if !one && (have_n < n || have_groups < groups) {
            let shape = &stored.shape;
            return Err(wrong(format!(
                "scales of the shape {shape:?} for {n} rows of {groups} groups"
            )));
        }
        let (row, group) = match (one, by_rows) {
            (true, _) => (0, 0),
            (_, true) => (columns, 1),
            (_, false) => (1, columns),
        };
        Ok(Self { stored, row, group })
    }

    fn get(&self, row: usize, group: usize) -> f32 {
        let (at, bytes) = (row * self.row + group * self.group, self.stored.bytes());
        let half = || [bytes[at * 2], bytes[at * 2 + 1]];
        match self.stored.dtype {
            Dtype::F16 => f16::from_le_bytes(half()).to_f32(),
            Dtype::BF16 => bf16::from_le_bytes(half()).to_f32(),
            _ => {
                let at = at * 4;
                f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }
        }
    }
}

fn wrong(what: impl Into<String>) -> Error {
    Error::InvalidArgument(what.into())
}

impl Words {
    /// The matrix that `parts` make up.
    pub(super) fn new(scheme: &Scheme, parts: Parts) -> Result<Self> {
        let missing = |what: &str| wrong(format!("is quantised, but has no {what}"));
        let codes = parts.codes.ok_or_else(|| missing("codes"))?;
        let scales = parts.scales.ok_or_else(|| missing("scales"))?;
        let bytes = [&codes, &scales].map(|stored| stored.range.len()).iter().sum::<usize>()
            + parts.zeros.as_ref().map_or(0, |zeros| zeros.range.len());
        let [rows, columns] = codes.shape[..] else {
            return Err(wrong(format!("has codes of the shape {:?}", codes.shape)));
        };
        let order = parts.groups.as_ref().map(integers).transpose()?;
        let (n, k, bits, fields) =
            scheme.shape(rows, columns, order.as_deref(), parts.shape.as_ref())?;
        if [n, k].iter().any(|size| *size == 0 || *size > MAX_DIMENSION) {
            return Err(wrong(format!(
                "is {n} x {k}; each dimension must be 1 to {MAX_DIMENSION}"
            )));
        }
        if let Some(order) = order.as_ref().filter(|order| order.len() != k) {
            return Err(wrong(format!("has a g_idx of {} columns for {k}", order.len())));
        }
        let convention = scheme.convention;
        let by_rows = matches!(convention, Convention::AwqGemv | Convention::PackQuantized);
        let group = scheme.group(k, &scales, by_rows)?;
        let groups = k.div_ceil(group);
        let packed_group =
            [128, 64, 32, 16].into_iter().find(|size| group.is_multiple_of(*size) || group == k);
        let packed_group = packed_group.ok_or_else(|| {
            Error::Unsupported(format!("groups of {group} columns: they must be a multiple of 16"))
        })?;
        let order = order.map(|of| sorted(&of, group)).transpose()?.flatten();

        let gptq = matches!(convention, Convention::Gptq { .. });
        let (along, length, lines) = match convention {
            Convention::Gptq { .. } => (0, k, n),
            Convention::AwqGemm => (1, n, k),
            Convention::AwqGemv | Convention::AwqGemvFast | Convention::PackQuantized => (1, k, n),
        };
        let codes = Grid::new(codes, fields, bits, along, length, lines)?;
        let (zeros, minima) = match convention {
            Convention::AwqGemvFast => (None, Some(parts.zeros.ok_or_else(|| missing("zeros"))?)),
            _ => (parts.zeros, None),
        };
        let minima = minima.map(|stored| Scales::new(stored, by_rows, n, groups)).transpose()?;
        // A line of zero points is a row of the matrix for GEMV, else a group.
        let zeros = zeros.map(|stored| match convention {
            Convention::Gptq { .. } | Convention::AwqGemm => {
                Ok((Grid::new(stored, fields, bits, 1, n, groups)?, false))
            }
            Convention::AwqGemv => Ok((Grid::new(stored, fields, bits, 1, groups, n)?, true)),
            Convention::PackQuantized | Convention::AwqGemvFast => {
                Ok((Grid::new(stored, fields, bits, 0, n, groups)?, false))
            }
        });
        let scales = Scales::new(scales, by_rows, n, groups)?;
        let plus = u8::from(matches!(convention, Convention::Gptq { less_one: true, .. }));
        let mut words = Self {
            codes,
            by_rows: along == 0 || fields == Fields::Fourfold || by_rows,
            zeros: zeros.transpose()?,
            plus,
            minima,
            scales,
            bits,
            n,
            k,
            group,
            order,
            format: Format::Q8,
            packed_group,
            keeps: Keeps::Weights,
            name: if gptq {
                "GPTQ"
            } else if convention == Convention::PackQuantized {
                "compressed-tensors"
            } else {
                "AWQ"
            },
            planar: fields == Fields::Planar,
            bytes,
        };
        words.choose_format()?;
        Ok(words)
    }

    /// Finds the packed format by looking at all zero points and scales.
    fn choose_format(&mut self) -> Result<()> {
        let middle = 1_u8 << (self.bits - 1);
        let (mut symmetric, mut exact) = (true, true);
        for row in 0..self.n {
            for group in 0..self.k.div_ceil(self.group) {
                symmetric &= self.zero(row, group) == middle;
                let minimum = self.minima.as_ref().map(|minima| minima.get(row, group));
                for scale in std::iter::once(self.scales.get(row, group)).chain(minimum) {
                    let half = f16::from_f32(scale);
                    if !half.is_finite() {
                        return Err(wrong(format!("has the scale {scale}, which no f16 can hold")));
                    }
                    exact &= half.to_f32() == scale;
                }
            }
        }
        self.keeps = if exact { Keeps::Weights } else { Keeps::Codes };
        self.format = match (self.bits, symmetric) {
            (4, _) if self.minima.is_some() => Format::Q4M,
            (4, true) => Format::Q4,
            (4, false) => Format::Q4Z,
            (3, true) => Format::Q3,
            (3, false) => Format::Q3Z,
            (2, true) => Format::Q2,
            (2, false) => Format::Q2Z,
            _ => Format::Q8,
        };
        // Less a zero point, eight bits may not fit a signed byte; fewer do.
        if self.bits == 8 && !symmetric {
            self.keeps = Keeps::Nothing;
        }
        Ok(())
    }

    pub(super) fn shape(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    pub(super) fn packed(&self) -> (Format, usize) {
        (self.format, self.packed_group)
    }

    pub(super) fn keeps(&self) -> Keeps {
        self.keeps
    }

    pub(super) fn order(&self) -> Option<&Order> {
        self.order.as_ref()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn release(&self) -> usize {
        let stored = &self.codes.stored;
        stored.source.release(stored.range.clone())
    }

    pub(super) fn encoding(&self) -> String {
        let planar = if self.planar { ", planar" } else { "" };
        let order = if self.order.is_some() { ", act-order" } else { "" };
        format!("{} {} bits g{}{planar}{order}", self.name, self.bits, self.group)
    }

    fn zero(&self, row: usize, group: usize) -> u8 {
        match &self.zeros {
            None => 1 << (self.bits - 1),
            Some((grid, by_rows)) => {
                let (line, index) = if *by_rows { (row, group) } else { (group, row) };
                // Within its bits: what AutoGPTQ subtracted from wrapped around as well.
                grid.get(line, index).wrapping_add(self.plus) & (u8::MAX >> (8 - self.bits))
            }
        }
    }

    /// Appends the codes of a row in the order of [`Words::order`]. `line` is scratch.
    fn codes(&self, row: usize, line: &mut Vec<u8>, out: &mut Vec<u8>) {
        line.clear();
        if self.by_rows {
            self.codes.line(row, self.k, line);
        } else {
            line.extend((0..self.k).map(|column| self.codes.get(column, row)));
        }
        match &self.order {
            None => out.extend_from_slice(line),
            Some(order) => out.extend(order.iter().map(|column| line[*column as usize])),
        }
    }

    /// Appends a row as the packed format wants it.
    pub(super) fn read(&self, row: usize, line: &mut Vec<u8>, out: &mut Blocks) {
        let start = out.codes.len();
        self.codes(row, line, &mut out.codes);
        for (index, codes) in out.codes[start..].chunks_mut(self.packed_group).enumerate() {
            let group = index * self.packed_group / self.group;
            let zero = self.zero(row, group);
            out.scales.push(f16::from_f32(self.scales.get(row, group)));
            match (self.format.offset(), &self.minima) {
                (Offset::Minimum, Some(minima)) => {
                    out.offsets.push(f16::from_f32(minima.get(row, group)).to_bits());
                }
                (Offset::Zero, _) => out.offsets.push(zero.into()),
                _ => {}
            }
            if self.format == Format::Q8 {
                codes.iter_mut().for_each(|code| *code = code.wrapping_sub(zero));
            }
        }
    }

    /// Appends a row as floats.
    pub(super) fn dequantise(&self, row: usize, line: &mut Vec<u8>, out: &mut Vec<f32>) {
        let mut codes = Vec::with_capacity(self.k);
        self.codes(row, line, &mut codes);
        for (group, codes) in codes.chunks(self.group).enumerate() {
            let scale = self.scales.get(row, group);
            if let Some(minima) = &self.minima {
                let minimum = minima.get(row, group);
                out.extend(codes.iter().map(|code| scale.mul_add(f32::from(*code), minimum)));
                continue;
            }
            let zero = i16::from(self.zero(row, group));
            out.extend(codes.iter().map(|code| scale * f32::from(i16::from(*code) - zero)));
        }
    }
}

impl Scheme {
    /// Columns of a group of a matrix of `k` columns with these scales.
    fn group(&self, k: usize, scales: &Stored, by_rows: bool) -> Result<usize> {
        let stored = match scales.shape[..] {
            [_, columns] if by_rows => columns,
            [rows, _] => rows,
            _ => 1,
        };
        let sizes = self.groups.iter().map(|size| if *size == 0 { k } else { (*size).min(k) });
        let fits = |size: &usize| match self.convention {
            // Padded, so that rows of scales begin where a GPU likes it.
            Convention::AwqGemv | Convention::AwqGemvFast => k.div_ceil(*size) <= stored,
            _ => k.div_ceil(*size) == stored,
        };
        let unexplained = || {
            let sizes: Vec<_> = sizes.clone().collect();
            wrong(format!("has {stored} groups of scales, and groups of {sizes:?} of {k} columns"))
        };
        sizes.clone().find(fits).ok_or_else(unexplained)
    }

    /// Rows, columns, bits and the place of fields, from the shape of the words and whatever else says it.
    fn shape(
        &self,
        rows: usize,
        columns: usize,
        groups: Option<&[u32]>,
        shape: Option<&Stored>,
    ) -> Result<(usize, usize, u32, Fields)> {
        let unknown = || {
            let bits = &self.bits;
            wrong(format!("has {rows} x {columns} words, which no code of {bits:?} bits explains"))
        };
        let bits = self.bits.iter().copied();
        match self.convention {
            Convention::Gptq { planar, .. } => {
                let fields = |bits| {
                    if planar || !matches!(bits, 2 | 3 | 4 | 8) {
                        Fields::Planar
                    } else {
                        Fields::Dense
                    }
                };
                let words = |bits: u32| bits as usize * groups.map_or(0, <[u32]>::len);
                let found = match groups {
                    // Modules may have bits of their own.
                    Some(of) => bits
                        .chain(2..=8)
                        .find(|bits| words(*bits) == rows * 32)
                        .map(|bits| (of.len(), bits)),
                    None => bits.clone().next().map(|bits| (rows * 32 / bits as usize, bits)),
                };
                let (k, bits) = found.ok_or_else(unknown)?;
                Ok((columns, k, bits, fields(bits)))
            }
            Convention::AwqGemm => Ok((columns.saturating_mul(8), rows, 4, Fields::Interleaved)),
            Convention::AwqGemv => Ok((rows, columns.saturating_mul(8), 4, Fields::Dense)),
            Convention::AwqGemvFast if columns.is_multiple_of(64) => {
                Ok((rows.saturating_mul(4), columns, 4, Fields::Fourfold))
            }
            Convention::AwqGemvFast => Err(unknown()),
            Convention::PackQuantized => {
                let shape = shape.map(integers).transpose()?;
                let Some([n, k]) = shape.as_deref() else {
                    return Err(wrong("has no weight_shape of two numbers"));
                };
                let (n, k) = (*n as usize, *k as usize);
                if n != rows {
                    return Err(unknown());
                }
                // Until 2026 three bits were padded to ten codes a word.
                let found = bits.into_iter().find_map(|bits| {
                    let dense = (k * bits as usize).div_ceil(32) == columns;
                    let padded = k.div_ceil(32 / bits as usize) == columns;
                    match (dense, padded) {
                        (true, _) => Some((bits, Fields::Dense)),
                        (false, true) => Some((bits, Fields::Padded)),
                        _ => None,
                    }
                });
                let (bits, fields) = found.ok_or_else(unknown)?;
                Ok((n, k, bits, fields))
            }
        }
    }
}

/// The numbers of a vector of integers that are not negative.
fn integers(stored: &Stored) -> Result<Vec<u32>> {
    let bytes = stored.bytes();
    let numbers: Option<Vec<u32>> = match stored.dtype {
        Dtype::I32 => {
            bytes.as_chunks().0.iter().map(|b| u32::try_from(i32::from_le_bytes(*b)).ok()).collect()
        }
        Dtype::I64 => {
            bytes.as_chunks().0.iter().map(|b| u32::try_from(i64::from_le_bytes(*b)).ok()).collect()
        }
        other => return Err(wrong(format!("has integers of the type {other:?}"))),
    };
    numbers.ok_or_else(|| wrong("has a negative or absurd number among its sizes or groups"))
}

/// The columns by group, in their own order within a group; nothing where they are so already.
fn sorted(groups: &[u32], size: usize) -> Result<Option<Order>> {
    let fits = |group: u32, place: usize| group as usize == place / size;
    if groups.iter().enumerate().all(|(place, group)| fits(*group, place)) {
        return Ok(None);
    }
    let mut order: Vec<u32> = (0..).take(groups.len()).collect();
    order.sort_by_key(|column| groups[*column as usize]);
    if !order.iter().enumerate().all(|(place, column)| fits(groups[*column as usize], place)) {
        let what = format!("g_idx with groups of another number of columns than {size}");
        return Err(Error::Unsupported(what));
    }
    Ok(Some(order.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::blocks::Type;
    use crate::file::source::Source;
    use crate::file::tensor::Tensor;
    use crate::kernel::Packed;
    use crate::memory::Aligned;
    use crate::quant::format::unpack_row;

    /// Every code of a line that was written bit by bit is read back.
    #[test]
    fn a_code_is_where_its_convention_puts_it() {
        let place = |fields: Fields, bits: u32, index: usize, bit: u32| match fields {
            Fields::Dense => index * bits as usize + bit as usize,
            Fields::Padded => {
                let in_word = 32 / bits as usize;
                index / in_word * 32 + index % in_word * bits as usize + bit as usize
            }
            Fields::Interleaved => {
                index / 8 * 32 + [0, 4, 1, 5, 2, 6, 3, 7][index % 8] * 4 + bit as usize
            }
            Fields::Fourfold => {
                unreachable!("it is not one line: the package's own file covers it")
            }
            Fields::Planar => {
                let block = index / 32 * 32 * bits as usize;
                let planes: &[(u32, u32)] = match bits {
                    3 => &[(2, 0), (1, 2)],
                    5 => &[(4, 0), (1, 4)],
                    6 => &[(4, 0), (2, 4)],
                    7 => &[(4, 0), (2, 4), (1, 6)],
                    bits => &[(bits, 0)],
                };
                let mut start = 0;
                for (width, first) in planes {
                    if (*first..first + width).contains(&bit) {
                        return block
                            + start
                            + index % 32 * *width as usize
                            + (bit - first) as usize;
                    }
                    start += 32 * *width as usize;
                }
                unreachable!("the planes hold every bit")
            }
        };
        let cases = [
            (Fields::Dense, 2),
            (Fields::Dense, 3),
            (Fields::Dense, 4),
            (Fields::Dense, 8),
            (Fields::Padded, 3),
            (Fields::Interleaved, 4),
            (Fields::Planar, 2),
            (Fields::Planar, 3),
            (Fields::Planar, 4),
            (Fields::Planar, 5),
            (Fields::Planar, 6),
            (Fields::Planar, 7),
            (Fields::Planar, 8),
        ];
        for (fields, bits) in cases {
            let (pieces, words) = pieces(fields, bits);
            let code = |i: usize| u32::try_from(i * 37 + i / 5).unwrap() % (1 << bits);
            let mut line = vec![0_u32; 96];
            for i in 0..96 {
                for bit in 0..bits {
                    let at = place(fields, bits, i, bit);
                    line[at / 32] |= (code(i) >> bit & 1) << (at % 32);
                }
            }
            for i in 0..96 {
                let base = i / pieces.len() * words;
                let parts = pieces[i % pieces.len()].iter().filter(|piece| piece.mask != 0);
                let got = parts.map(|p| (line[base + p.word] >> p.shift & p.mask) << p.at);
                assert_eq!(got.sum::<u32>(), code(i), "{fields:?} {bits} code {i}");
            }
        }
    }

    #[test]
    fn columns_are_sorted_by_group() {
        assert_eq!(sorted(&[0, 0, 1, 1], 2), Ok(None));
        assert_eq!(sorted(&[1, 0, 1, 0], 2), Ok(Some([1, 3, 0, 2].into())));
        assert!(sorted(&[0, 0, 0, 1], 2).is_err());
        assert!(sorted(&[0, 7, 0, 7], 2).is_err());
    }

    const GPTQ: [(&str, u32, bool, bool, Format); 14] = [
        ("gptq.2.v2", 2, false, false, Format::Q2Z),
        ("gptq.3.v1", 3, true, false, Format::Q3Z),
        ("gptq.3.v1sym", 3, true, false, Format::Q3),
        ("gptq.3.v2", 3, false, false, Format::Q3Z),
        ("gptq.4.v1", 4, true, false, Format::Q4Z),
        ("gptq.4.v2sym", 4, false, false, Format::Q4),
        ("gptq.4.v2.act", 4, false, false, Format::Q4Z),
        ("gptq.8.v1sym", 8, true, false, Format::Q8),
        ("gptq.8.v2", 8, false, false, Format::Q8),
        ("gptq.3.p", 3, false, true, Format::Q3Z),
        ("gptq.4.p.act", 4, false, true, Format::Q4Z),
        ("gptq.5.p", 5, false, true, Format::Q8),
        ("gptq.6.p", 6, false, true, Format::Q8),
        ("gptq.7.p", 7, false, true, Format::Q8),
    ];

    /// What the packages that define the encodings read from them, and what the packed layout holds.
    #[test]
    #[cfg_attr(miri, ignore = "maps a file")]
    fn matrices_are_what_their_packages_read() {
        let gptq = GPTQ.map(|(case, bits, less_one, planar, format)| {
            (case, vec![bits], Convention::Gptq { less_one, planar }, format)
        });
        let ct = Convention::PackQuantized;
        let others = [
            ("awq.gemm", vec![4], Convention::AwqGemm, Format::Q4Z),
            ("awq.gemv", vec![4], Convention::AwqGemv, Format::Q4Z),
            ("awq.gemv_fast", vec![4], Convention::AwqGemvFast, Format::Q4M),
            ("ct.4.asym", vec![4], ct, Format::Q4Z),
            ("ct.4.sym.act", vec![4], ct, Format::Q4),
            ("ct.3.asym", vec![4, 3], ct, Format::Q3Z),
            ("ct.3.asym.old", vec![3], ct, Format::Q3Z),
            ("ct.8.sym", vec![8], ct, Format::Q8),
        ];
        let stored = fixtures();
        for (case, bits, convention, format) in gptq.into_iter().chain(others) {
            let part = |name: &str| stored.get(&format!("{case}.{name}")).cloned();
            let parts = Parts {
                codes: part("codes"),
                scales: part("scales"),
                zeros: part("zeros"),
                groups: part("groups"),
                shape: part("shape"),
            };
            let words = Words::new(&Scheme { convention, bits, groups: vec![32] }, parts).unwrap();
            assert_eq!((words.shape(), words.packed()), ((32, 64), (format, 32)), "{case}");
            assert_eq!(words.order().is_some(), case.ends_with(".act"), "{case}");
            let want = floats(&part("reference").unwrap());
            let column = |i: usize| words.order().map_or(i, |order| order[i] as usize);
            let tensor = Tensor::words(words.clone());
            let mut got = Vec::new();
            tensor.rows(0, 32, &mut got).unwrap();
            for (i, x) in got.iter().enumerate() {
                assert_eq!(*x, want[i / 64 * 64 + column(i % 64)], "{case} weight {i}");
            }
            let layout = tensor.layout().unwrap();
            let mut panel = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
            let deviation = tensor.pack(&layout, 0, &mut panel).unwrap();
            let packed = Packed::new(layout, &panel).unwrap();
            let mut row = vec![0.0; 64];
            // Of eight bits with zero points, a code less its zero point may not fit a byte.
            let exact = case != "gptq.8.v2";
            assert_eq!(words.keeps() == Keeps::Weights, exact, "{case}");
            assert!(deviation.rms_relative() < 0.01, "{case}");
            for (index, want) in got.chunks(64).enumerate() {
                unpack_row(&packed, index, &mut row);
                assert!(!exact || row == want, "{case} row {index}");
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "maps a file")]
    fn parts_that_do_not_fit_are_refused() {
        let stored = fixtures();
        let part = |name: &str| stored.get(&format!("gptq.4.v2.act.{name}")).cloned();
        let parts = || Parts {
            codes: part("codes"),
            scales: part("scales"),
            zeros: part("zeros"),
            groups: part("groups"),
            shape: None,
        };
        let convention = Convention::Gptq { less_one: false, planar: false };
        let scheme = Scheme { convention, bits: vec![4], groups: vec![32] };
        assert!(Words::new(&scheme, parts()).is_ok());
        let error =
            |parts: Parts, scheme: &Scheme| Words::new(scheme, parts).err().unwrap().to_string();
        let no = |change: fn(&mut Parts)| {
            let mut parts = parts();
            change(&mut parts);
            error(parts, &scheme)
        };
        assert!(no(|parts| parts.codes = None).contains("codes"));
        assert!(no(|parts| parts.scales = None).contains("scales"));
        assert!(no(|parts| parts.codes.as_mut().unwrap().shape = vec![256]).contains("shape"));
        assert!(no(|parts| parts.zeros.as_mut().unwrap().shape = vec![2, 3]).contains("too small"));
        assert!(no(|parts| parts.scales.as_mut().unwrap().shape = vec![1, 32]).contains("scales"));
        assert!(no(|parts| parts.scales.as_mut().unwrap().dtype = Dtype::I64).contains("scales"));
        assert!(no(|parts| parts.groups.as_mut().unwrap().range.end -= 4).contains("words"));
        assert!(no(|parts| parts.codes.as_mut().unwrap().dtype = Dtype::F32).contains("I32 was"));
        assert!(no(|parts| parts.scales.as_mut().unwrap().shape = vec![1; 3]).contains("scales"));
        assert!(no(|parts| parts.groups.as_mut().unwrap().dtype = Dtype::F32).contains("integers"));
        let packed = Scheme { convention: Convention::PackQuantized, ..scheme.clone() };
        assert!(error(parts(), &packed).contains("weight_shape"));
        let fast = Scheme { convention: Convention::AwqGemvFast, ..scheme.clone() };
        assert!(Words::new(&fast, parts()).is_err());
        let ct = Scheme { convention: Convention::AwqGemm, ..scheme.clone() };
        assert!(error(parts(), &ct).contains("g_idx of 64 columns for 8"));
        // Sizes that make two groups of 64 columns, as there are scales, and some that do not.
        for (sizes, word) in [
            (vec![40], "multiple of 16"),
            (vec![48], "g_idx"),
            (vec![16], "2 groups of scales"),
            (vec![0, 128], "2 groups of scales"),
        ] {
            let text = error(parts(), &Scheme { groups: sizes, ..scheme.clone() });
            assert!(text.contains(word), "{text}");
        }
        // Modules may differ: the number of scales says which size is meant.
        let mixed = Scheme { groups: vec![0, 16, 32], ..scheme };
        assert_eq!(Words::new(&mixed, parts()).unwrap().group, 32);
    }

    fn fixtures() -> std::collections::BTreeMap<String, Stored> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/ffi-tests/fixtures/encodings.safetensors");
        crate::file::safetensors::read(&[Source::open(path.as_ref()).unwrap()]).unwrap()
    }

    fn floats(stored: &Stored) -> Vec<f32> {
        match stored.dtype {
            Dtype::F16 => {
                let halves = stored.bytes().as_chunks().0.iter();
                halves.map(|b| f16::from_le_bytes(*b).to_f32()).collect()
            }
            _ => stored.bytes().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        }
    }

    /// Every block type, against the reader of the `gguf` package.
    #[test]
    #[cfg_attr(miri, ignore = "maps a file")]
    fn blocks_are_what_the_gguf_package_reads() {
        let stored = fixtures();
        for kind in [
            Type::F16,
            Type::Bf16,
            Type::Q4_0,
            Type::Q4_1,
            Type::Q5_0,
            Type::Q5_1,
            Type::Q8_0,
            Type::Q2K,
            Type::Q3K,
            Type::Q4K,
            Type::Q5K,
            Type::Q6K,
        ] {
            let name = kind.name();
            let blocks = &stored[&format!("{name}.blocks")];
            let want = floats(&stored[&format!("{name}.reference")]);
            let (source, range) = (blocks.source.clone(), blocks.range.clone());
            let tensor = Tensor::blocks(kind, source, range, (2, 256), false);
            let mut got = Vec::new();
            tensor.rows(0, 2, &mut got).unwrap();
            assert_eq!(got, want, "{name}");
            let layout = tensor.layout().unwrap();
            let mut panel = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
            let deviation = tensor.pack(&layout, 0, &mut panel).unwrap();
            let mut row = vec![0.0; 256];
            let packed = Packed::new(layout, &panel).unwrap();
            for (index, want) in want.chunks(256).enumerate() {
                unpack_row(&packed, index, &mut row);
                assert!(kind.keeps() != Keeps::Weights || row == want, "{name}");
            }
            // Half a unit in the last place of f16 for scale and minimum each, or half a step of bytes.
            let most = match kind.keeps() {
                Keeps::Weights => 0.0,
                Keeps::Codes => 1e-3,
                Keeps::Nothing => 1e-2,
            };
            assert!(deviation.rms_relative() <= most, "{name}: {}", deviation.rms_relative());
        }
    }
}
