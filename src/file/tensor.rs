//! One tensor of a checkpoint, whatever its encoding: rows in, panels of the packed layout out.
//!
//! A tensor is a view: it may be some rows of what is stored, in another order, and its columns may
//! be sorted so that weights which share a scale lie together. Nothing is read before it is asked for.
#![forbid(unsafe_code)]

use super::blocks::{Blocks, Keeps, Type};
use super::source::Source;
#[cfg(feature = "huggingface")]
use super::words::Words;
use crate::error::{Error, Result};
use crate::kernel::layout::Layout;
use crate::kernel::{Format, Packed};
use crate::memory::Aligned;
use crate::quant::format::unpack_row;
use crate::quant::pack::{Rows, pack_panel};
use crate::quant::rtn;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// Which column of the activations meets which column of a matrix: column `i` of the matrix is
/// multiplied by activation `order[i]`.
pub type Order = Arc<[u32]>;

/// A matrix or a vector of a checkpoint.
#[derive(Clone)]
pub struct Tensor {
    storage: Storage,
    n: usize,
    k: usize,
    is_vector: bool,
    first: usize,
    rows: RowOrder,
    in_order: bool,
    plus: f32,
}

/// Where row `i` of a tensor is stored.
#[derive(Clone, Default)]
pub enum RowOrder {
    /// At `i`.
    #[default]
    AsStored,
    /// Rotary halves become neighbouring pairs: of the `rotated` leading rows of each `head` rows, the
    /// first half and the second half alternate.
    Pairs {
        /// Rows of a head.
        head: usize,
        /// Leading rows of a head that are rotated.
        rotated: usize,
    },
    /// Where a list says.
    Listed(Order),
}

impl RowOrder {
    fn of(&self, i: usize) -> usize {
        match self {
            Self::AsStored => i,
            Self::Pairs { head, rotated } => {
                let (start, i) = (i / head * head, i % head);
                start + if i < *rotated { i % 2 * (rotated / 2) + i / 2 } else { i }
            }
            Self::Listed(order) => order[i] as usize,
        }
    }
}

/// The encodings.
#[derive(Clone)]
enum Storage {
    /// Rows of blocks, one after the other.
    Blocks { kind: Type, source: Source, range: Range<usize> },
    /// Codes in words of 32 bits.
    #[cfg(feature = "huggingface")]
    Words(Arc<Words>),
}

impl Tensor {
    /// Rows of whole blocks in `range` of `source`, which the caller has checked to be as long as the
    /// shape says.
    pub(super) fn blocks(
        kind: Type,
        source: Source,
        range: Range<usize>,
        shape: (usize, usize),
        is_vector: bool,
    ) -> Self {
        Self::new(Storage::Blocks { kind, source, range }, shape, is_vector)
    }

    /// A matrix of codes in words.
    #[cfg(feature = "huggingface")]
    pub(super) fn words(words: Words) -> Self {
        let shape = words.shape();
        Self::new(Storage::Words(Arc::new(words)), shape, false)
    }

    fn new(storage: Storage, (n, k): (usize, usize), is_vector: bool) -> Self {
        Self {
            storage,
            n,
            k,
            is_vector,
            first: 0,
            rows: RowOrder::AsStored,
            in_order: false,
            plus: 0.0,
        }
    }

    /// Rows; 1 for a vector.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }
    /// Length of a row.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }
    /// Whether it is a vector of floats rather than a matrix.
    #[must_use]
    pub fn is_vector(&self) -> bool {
        self.is_vector
    }
    /// Whether the source holds floats, which may be rounded, rather than codes, which are kept.
    #[must_use]
    pub fn is_float(&self) -> bool {
        !self.packed().0.is_quantised()
    }
    /// The encoding's name.
    #[must_use]
    pub fn encoding(&self) -> String {
        match &self.storage {
            Storage::Blocks { kind, .. } => kind.name().into(),
            #[cfg(feature = "huggingface")]
            Storage::Words(words) => words.encoding(),
        }
    }
    /// Bytes on file.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::Blocks { kind, .. } => self.n * row_bytes(*kind, self.k),
            #[cfg(feature = "huggingface")]
            Storage::Words(words) => words.bytes() / words.shape().0 * self.n,
        }
    }
    /// The order of the columns, where it is not that of the activations.
    #[must_use]
    pub fn order(&self) -> Option<&Order> {
        if self.in_order {
            return None;
        }
        match &self.storage {
            Storage::Blocks { .. } => None,
            #[cfg(feature = "huggingface")]
            Storage::Words(words) => words.order(),
        }
    }
    /// The format and group that hold the weights as they are, or come nearest.
    fn packed(&self) -> (Format, usize) {
        match &self.storage {
            Storage::Blocks { kind, .. } => kind.packed(),
            #[cfg(feature = "huggingface")]
            Storage::Words(words) => words.packed(),
        }
    }
    /// What the layout of [`Tensor::layout`] keeps of the source.
    #[must_use]
    pub fn keeps(&self) -> Keeps {
        match &self.storage {
            Storage::Blocks { kind, .. } => kind.keeps(),
            #[cfg(feature = "huggingface")]
            Storage::Words(words) => words.keeps(),
        }
    }

    /// The layout that holds these weights as they are, or comes nearest.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a dimension that no layout has.
    pub fn layout(&self) -> Result<Layout> {
        let (format, group) = self.packed();
        Layout::new(format, group, self.n, self.k)
    }

    /// Rows `first..first + count`; of a vector, elements. Before their order is changed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there are not so many.
    pub fn slice(&self, first: usize, count: usize) -> Result<Self> {
        let all = if self.is_vector { self.k } else { self.n };
        if count == 0
            || first.checked_add(count).is_none_or(|end| end > all)
            || !matches!(self.rows, RowOrder::AsStored)
        {
            let what = format!("rows {first} and {count} more of a tensor with {all}");
            return Err(Error::InvalidArgument(what));
        }
        let mut slice = self.clone();
        slice.first += first;
        *if self.is_vector { &mut slice.k } else { &mut slice.n } = count;
        Ok(slice)
    }

    /// The same rows, or elements of a vector, in another order.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the order is of another number of rows.
    pub fn with_rows(mut self, rows: RowOrder) -> Result<Self> {
        let all = if self.is_vector { self.k } else { self.n };
        let fits = match &rows {
            RowOrder::AsStored => true,
            RowOrder::Pairs { head, rotated } => {
                *head > 0 && all.is_multiple_of(*head) && rotated <= head && rotated % 2 == 0
            }
            RowOrder::Listed(order) => {
                order.len() == all && order.iter().all(|row| (*row as usize) < all)
            }
        };
        if !fits || !matches!(self.rows, RowOrder::AsStored) {
            let what = format!("an order that is not one of the {all} rows of a tensor");
            return Err(Error::InvalidArgument(what));
        }
        self.rows = rows;
        Ok(self)
    }

    /// The same vector with a number added to each element.
    #[must_use]
    pub fn plus(mut self, number: f32) -> Self {
        self.plus += number;
        self
    }

    /// The same matrix for a host that brings activations in the order of [`Tensor::order`]: because the
    /// rows of what makes them are in that order.
    #[must_use]
    pub fn in_order(mut self) -> Self {
        self.in_order = true;
        self
    }

    /// The floats of a vector.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when it is none, [`Error::OutOfMemory`].
    pub fn vector(&self) -> Result<Vec<f32>> {
        let (kind, source, range) = match &self.storage {
            Storage::Blocks { kind, source, range } if self.is_vector && self.is_float() => {
                (*kind, source, range)
            }
            _ => return Err(Error::InvalidArgument("is not a vector of floats".into())),
        };
        let mut stored = Vec::new();
        reserve(&mut stored, self.first + self.k)?;
        let end = range.start + row_bytes(kind, self.first + self.k);
        kind.dequantise(&source.bytes()[range.start..end], &mut stored);
        let place = |i| self.first + self.rows.of(i);
        Ok((0..self.k).map(|i| stored[place(i)] + self.plus).collect())
    }

    /// Appends rows `first..first + count` as floats, their columns in the order of [`Tensor::order`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn rows(&self, first: usize, count: usize, out: &mut Vec<f32>) -> Result<()> {
        reserve(out, count * self.k)?;
        match &self.storage {
            Storage::Blocks { kind, source, range } => {
                for row in first..first + count {
                    kind.dequantise(self.row(*kind, source, range, row), out);
                }
            }
            #[cfg(feature = "huggingface")]
            Storage::Words(words) => {
                let mut line = Vec::new();
                for row in first..first + count {
                    words.dequantise(self.stored_row(row), &mut line, out);
                }
            }
        }
        Ok(())
    }

    /// Packs panel `index` into `layout`: as it is where the layout is that of [`Tensor::layout`],
    /// else rounded to nearest. Says how far the weights have moved.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the layout has another shape or the weights do not fit it,
    /// [`Error::OutOfMemory`].
    pub fn pack(&self, layout: &Layout, index: usize, panel: &mut [u8]) -> Result<Deviation> {
        if (layout.n(), layout.k()) != (self.n, self.k) {
            return Err(Error::InvalidArgument("a layout of another shape".into()));
        }
        let first = index * layout.panel_rows();
        let rows = first..self.n.min(first + layout.panel_rows());
        let keeps = if self.layout()? == *layout { self.keeps() } else { Keeps::Nothing };
        if keeps != Keeps::Nothing {
            self.pack_as_it_is(layout, rows.clone(), panel)?;
        }
        if keeps == Keeps::Weights {
            return Ok(Deviation::default());
        }
        let mut floats = Vec::new();
        self.rows(first, rows.len(), &mut floats)?;
        if keeps == Keeps::Nothing {
            rtn::pack_panel(layout, rows.len(), &floats, panel)?;
        }
        Deviation::of(layout, &floats, panel)
    }

    /// Packs rows without choosing codes anew.
    fn pack_as_it_is(&self, layout: &Layout, rows: Range<usize>, panel: &mut [u8]) -> Result<()> {
        let (count, values) = (rows.len(), rows.len() * self.k);
        let mut blocks = Blocks::default();
        match &self.storage {
            Storage::Blocks { kind: Type::F32, .. } => {
                let mut x = Vec::new();
                self.rows(rows.start, count, &mut x)?;
                return pack_panel(layout, count, Rows::F32(&x), panel);
            }
            Storage::Blocks { kind: kind @ Type::F16, source, range } => {
                let mut x = Vec::new();
                reserve(&mut x, values)?;
                for row in rows {
                    let row = self.row(*kind, source, range, row).as_chunks().0;
                    x.extend(row.iter().map(|b| f16::from_le_bytes(*b)));
                }
                return pack_panel(layout, count, Rows::F16(&x), panel);
            }
            Storage::Blocks { kind: kind @ Type::Bf16, source, range } => {
                let mut x = Vec::new();
                reserve(&mut x, values)?;
                for row in rows {
                    let row = self.row(*kind, source, range, row).as_chunks().0;
                    x.extend(row.iter().map(|b| bf16::from_le_bytes(*b)));
                }
                return pack_panel(layout, count, Rows::Bf16(&x), panel);
            }
            Storage::Blocks { kind, source, range } => {
                reserve(&mut blocks.codes, values)?;
                for row in rows {
                    kind.read(self.row(*kind, source, range, row), &mut blocks);
                }
            }
            #[cfg(feature = "huggingface")]
            Storage::Words(words) => {
                reserve(&mut blocks.codes, values)?;
                let mut line = Vec::new();
                for row in rows {
                    words.read(self.stored_row(row), &mut line, &mut blocks);
                }
            }
        }
        let Blocks { codes, scales, offsets } = &blocks;
        if self.keeps() == Keeps::Codes && !scales.iter().all(|scale| scale.is_finite()) {
            let what = "a scale that is infinite or no number, or too large for an f16";
            return Err(Error::InvalidArgument(what.into()));
        }
        pack_panel(layout, count, Rows::Codes { codes, scales, offsets }, panel)
    }

    /// Gives the pages of the file back to the system, so that a long conversion does not hold them all.
    pub fn release(&self) {
        match &self.storage {
            Storage::Blocks { source, range, .. } => source.release(range.clone()),
            #[cfg(feature = "huggingface")]
            Storage::Words(words) => words.release(),
        };
    }

    /// Where a row is stored.
    fn stored_row(&self, row: usize) -> usize {
        self.first + self.rows.of(row)
    }

    /// The blocks of a row.
    fn row<'a>(
        &self,
        kind: Type,
        source: &'a Source,
        range: &Range<usize>,
        row: usize,
    ) -> &'a [u8] {
        let length = row_bytes(kind, self.k);
        let start = range.start + self.stored_row(row) * length;
        &source.bytes()[start..start + length]
    }
}

fn row_bytes(kind: Type, k: usize) -> usize {
    let (block, bytes) = kind.block();
    k / block * bytes
}

fn reserve<T>(out: &mut Vec<T>, count: usize) -> Result<()> {
    let bytes = count.saturating_mul(size_of::<T>());
    out.try_reserve_exact(count).map_err(|_| Error::OutOfMemory { what: "tensor rows", bytes })
}

/// How far packed weights are from those of the source.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Deviation {
    /// Largest difference of a weight.
    pub worst: f64,
    /// Largest magnitude of a weight.
    pub top: f64,
    /// Sum of the squares of the differences.
    pub squares: f64,
    /// Sum of the squares of the weights.
    pub total: f64,
}

impl Deviation {
    /// Compares the rows of a panel with what they were packed from.
    fn of(layout: &Layout, rows: &[f32], panel: &[u8]) -> Result<Self> {
        let count = rows.len() / layout.k();
        let alone = Layout::new(layout.format(), layout.group(), count, layout.k())?;
        let packed = Packed::new(alone, panel)?;
        let mut row = Aligned::<f32>::zeroed("a row", layout.k())?;
        let mut deviation = Self::default();
        for (index, weights) in rows.chunks_exact(layout.k()).enumerate() {
            unpack_row(&packed, index, &mut row);
            for (was, is) in weights.iter().zip(row.iter()) {
                let (was, difference) = (f64::from(*was), f64::from(was - is));
                deviation.worst = deviation.worst.max(difference.abs());
                deviation.top = deviation.top.max(was.abs());
                deviation.squares += difference * difference;
                deviation.total += was * was;
            }
        }
        Ok(deviation)
    }

    /// Both together.
    pub fn add(&mut self, other: &Self) {
        self.worst = self.worst.max(other.worst);
        self.top = self.top.max(other.top);
        self.squares += other.squares;
        self.total += other.total;
    }

    /// Whether no weight differs.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.worst == 0.0
    }

    /// The largest difference in parts of the largest weight.
    #[must_use]
    pub fn worst_relative(&self) -> f64 {
        if self.worst == 0.0 { 0.0 } else { self.worst / self.top }
    }

    /// The root of the mean square of the differences in parts of that of the weights.
    #[must_use]
    pub fn rms_relative(&self) -> f64 {
        if self.squares == 0.0 { 0.0 } else { (self.squares / self.total).sqrt() }
    }
}
