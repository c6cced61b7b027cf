//! The packed file: one header, then tensors exactly as the kernels read them.
//!
//! `docs/formats.md` specifies every byte. Opening reads the head only; a matrix is a range of the
//! mapping, aligned and complete, so nothing is copied, converted or touched before it is needed.
#![forbid(unsafe_code)]

use super::checkpoint::parts;
use super::metadata::Metadata;
use super::reader::{Reader, size};
use super::source::Source;
use super::tensor::Order;
pub use super::writer::{Target, Writer};
use crate::error::{Error, Result};
use crate::kernel::layout::{Format, Layout, MAX_DIMENSION};
use std::ops::Range;
use std::path::Path;
use xxhash_rust::xxh64::{Xxh64, xxh64};

/// First bytes of a packed file. The high bit and the line ends betray transfers that mangle bytes.
pub(super) const MAGIC: [u8; 8] = *b"\x89NYBL\r\n\x1a";

/// The version this build writes and the newest it reads.
pub const VERSION: u32 = 2;

/// The oldest version it reads.
const OLDEST: u32 = 1;

/// Reads as another number on a machine of the other byte order.
pub(super) const ENDIAN: u32 = 0x0102_0304;

pub(super) const HEAD_BYTES: usize = 64;

/// Where the head's own checksum lies.
pub(super) const CHECKSUM: Range<usize> = 32..40;

/// Where the number lies that all shards of a model share; zero in a file that is whole.
pub(super) const SET: Range<usize> = 48..56;

/// Matrices start at multiples of this: the largest page of any phone.
const PAGE: usize = 16 * 1024;

/// Vectors start at multiples of this.
const LINE: usize = 64;

/// Directory code of a vector of f32.
pub(super) const VECTOR: u8 = 255;

/// Directory code of an order of columns.
pub(super) const ORDER: u8 = 254;

/// What a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// So many f32.
    Vector(usize),
    /// So many u32: the activation that each column of a matrix is multiplied by.
    Order(usize),
    /// A packed matrix.
    Matrix(Layout),
}

impl Kind {
    /// Bytes of the tensor.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Vector(len) | Self::Order(len) => len * 4,
            Self::Matrix(layout) => layout.bytes(),
        }
    }

    /// What it is called in reports: format and group.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Vector(_) => "f32 vector".into(),
            Self::Order(_) => "order".into(),
            Self::Matrix(layout) if layout.format().is_quantised() => {
                format!("{} g{}", layout.format().name(), layout.group())
            }
            Self::Matrix(layout) => layout.format().name().into(),
        }
    }

    pub(super) fn alignment(&self) -> usize {
        match self {
            Self::Vector(_) | Self::Order(_) => LINE,
            Self::Matrix(_) => PAGE,
        }
    }
}

/// One tensor of a packed file.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// The name, as GGUF names the tensors of a model.
    pub name: String,
    /// Type and shape.
    pub kind: Kind,
    /// Where its bytes lie.
    pub range: Range<usize>,
    /// In which of the files.
    file: usize,
    checksum: u64,
}

/// An opened packed file, or all shards of one.
pub struct Nybl {
    files: Vec<Source>,
    metadata: Metadata,
    tensors: Vec<Tensor>,
}

impl Nybl {
    /// Whether the bytes start like a packed file.
    #[must_use]
    pub fn recognises(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC)
    }

    /// Opens the file at `path`, with all others when it is named like one of several shards.
    ///
    /// # Errors
    /// As [`Nybl::open_all`], and [`Error::Io`].
    pub fn open_path(path: &Path) -> Result<Self> {
        let sources: Result<_> = parts(path)?.iter().map(|path| Source::open(path)).collect();
        Self::open_all(sources?)
    }

    /// Opens a file that holds a whole model.
    ///
    /// # Errors
    /// As [`Nybl::open_all`].
    pub fn open(source: Source) -> Result<Self> {
        Self::open_all(vec![source])
    }

    /// Opens all shards of a model, in order.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming file and field, [`Error::Unsupported`] for a newer version.
    pub fn open_all(sources: Vec<Source>) -> Result<Self> {
        let count = sources.len() as u64;
        let mut whole: Option<(Self, u64)> = None;
        for (index, source) in sources.into_iter().enumerate() {
            let (mut shard, set) = Self::open_one(source, index)?;
            let limit = u64::from(u16::MAX);
            let number = shard.metadata.integer("split.no", limit)?.unwrap_or(0);
            let of = shard.metadata.integer("split.count", limit)?.unwrap_or(1);
            if (number, of) != (index as u64, count) {
                let reason = format!("is shard {} of {of}; all are needed, in order", number + 1);
                return Err(shard.metadata.error("split.no", reason));
            }
            match &mut whole {
                None => whole = Some((shard, set)),
                Some((_, first)) if *first != set => {
                    let reason = "is not that of the first shard: they are of two conversions";
                    return Err(shard.metadata.error("set of shards", reason));
                }
                Some((whole, _)) => {
                    whole.tensors.append(&mut shard.tensors);
                    whole.files.append(&mut shard.files);
                }
            }
        }
        let Some((mut whole, _)) = whole else {
            return Err(Error::InvalidArgument("a model without files".into()));
        };
        whole.metadata.remove_prefix("split.");
        whole.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(twice) = whole.tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            let reason = "is the name of two tensors";
            return Err(Error::corrupt(whole.name(), &twice[0].name, reason));
        }
        Ok(whole)
    }

    /// Reads the head: metadata and directory, verified by their checksum, and the number of its set.
    fn open_one(source: Source, file: usize) -> Result<(Self, u64)> {
        let bytes = source.bytes();
        let mut reader = Reader::new(source.name(), bytes);
        if reader.take("magic", 8)? != MAGIC {
            return Err(reader.error("magic", "is not that of a packed nybl file"));
        }
        let version = reader.u32("version")?;
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(Error::Unsupported(format!(
                "{}: format version {version}; this build reads versions {OLDEST} to {VERSION}: convert the model again",
                source.name()
            )));
        }
        if reader.u32("byte order")? != ENDIAN {
            return Err(reader.error("byte order", "is not little-endian"));
        }
        let length = reader.u64("file length")?;
        let head_length = reader.u64("head length")?;
        let checksum = reader.u64("head checksum")?;
        let pairs = reader.u32("metadata count")?;
        let tensor_count = reader.u32("tensor count")?;
        let set = reader.u64("set of shards")?;
        reader.take("reserved", HEAD_BYTES - SET.end)?;
        if length != bytes.len() as u64 {
            let reason = format!("says {length}, but the file has {} bytes", bytes.len());
            return Err(reader.error("file length", reason));
        }
        if head_length < HEAD_BYTES as u64 || head_length > length {
            return Err(reader.error("head length", format!("{head_length} does not fit the file")));
        }
        let head = &bytes[..size(head_length)];
        if head_checksum(head) != checksum {
            return Err(reader.error("head checksum", "does not match: the file is damaged"));
        }
        let head = &head[HEAD_BYTES..];
        let mut reader = Reader::new(source.name(), head);
        let metadata = Metadata::read(source.name(), &mut reader, u64::from(pairs))?;
        let mut tensors = Vec::new();
        for index in 0..tensor_count {
            let mut tensor = read_tensor(&mut reader, index, head_length, length)?;
            tensor.file = file;
            tensors.push(tensor);
        }
        Ok((Self { files: vec![source], metadata, tensors }, set))
    }

    /// The name of the first file, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        self.files.first().map_or("", Source::name)
    }
    /// All files.
    #[must_use]
    pub fn files(&self) -> &[Source] {
        &self.files
    }
    /// The file that the range of a tensor is of.
    #[must_use]
    pub fn file_of(&self, tensor: &Tensor) -> &Source {
        &self.files[tensor.file]
    }
    /// The bytes of a tensor.
    fn bytes(&self, tensor: &Tensor) -> &[u8] {
        &self.file_of(tensor).bytes()[tensor.range.clone()]
    }
    /// All metadata.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
    /// All tensors in the order of their names.
    #[must_use]
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of that name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let found = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name));
        found.ok().map(|index| &self.tensors[index])
    }

    /// The floats of a vector.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the tensor is a matrix.
    pub fn vector(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        match tensor.kind {
            Kind::Vector(_) => {
                let bytes = self.bytes(tensor);
                Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
            _ => Err(Error::corrupt(self.file_of(tensor).name(), &tensor.name, "is not a vector")),
        }
    }

    /// The order of the columns of the matrix `name`, where it is not that of the activations.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is none for a matrix of `k` columns.
    pub fn order(&self, name: &str, k: usize) -> Result<Option<Order>> {
        let Some(tensor) = self.tensor(&order_name(name)) else { return Ok(None) };
        let bytes = self.bytes(tensor);
        let order: Order = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        if tensor.kind != Kind::Order(k) || order.iter().any(|column| *column as usize >= k) {
            let reason = format!("is not an order of {k} columns");
            return Err(Error::corrupt(self.file_of(tensor).name(), &tensor.name, reason));
        }
        Ok(Some(order))
    }

    /// Compares every tensor with its checksum; reads the whole file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the first tensor that differs.
    pub fn verify(&self) -> Result<()> {
        for tensor in &self.tensors {
            if xxh64(self.bytes(tensor), 0) != tensor.checksum {
                let reason = "does not match its checksum: the file is damaged";
                return Err(Error::corrupt(self.file_of(tensor).name(), &tensor.name, reason));
            }
        }
        Ok(())
    }
}

/// The name of the order that belongs to the matrix `name`.
#[must_use]
pub fn order_name(name: &str) -> String {
    format!("{}.order", name.strip_suffix(".weight").unwrap_or(name))
}

/// The checksum of a head: all of it but the field that holds the checksum.
pub(super) fn head_checksum(head: &[u8]) -> u64 {
    let mut hash = Xxh64::new(0);
    hash.update(&head[..CHECKSUM.start]);
    hash.update(&head[CHECKSUM.end..]);
    hash.digest()
}

fn read_tensor(
    reader: &mut Reader<'_>,
    index: u32,
    head_length: u64,
    length: u64,
) -> Result<Tensor> {
    let name = reader.string(&format!("name of tensor {index}"))?;
    let code = reader.u8(name)?;
    reader.take(name, 3)?;
    let group = reader.u32(name)? as usize;
    let (n, k) = (reader.u64(name)?, reader.u64(name)?);
    let (offset, bytes) = (reader.u64(name)?, reader.u64(name)?);
    let checksum = reader.u64(name)?;
    let limit = MAX_DIMENSION as u64;
    if n == 0 || k == 0 || n > limit || k > limit {
        let reason = format!("has the shape {n} x {k}; each dimension must be 1 to {limit}");
        return Err(reader.error(name, reason));
    }
    let kind = if code == VECTOR {
        Kind::Vector(size(k))
    } else if code == ORDER {
        Kind::Order(size(k))
    } else {
        let Some(format) = Format::from_code(code) else {
            return Err(reader.error(name, format!("has the unknown format {code}")));
        };
        let layout = Layout::new(format, group, size(n), size(k));
        Kind::Matrix(layout.map_err(|error| reader.error(name, error.to_string()))?)
    };
    let end = offset.checked_add(bytes).filter(|end| *end <= length);
    let aligned = offset.is_multiple_of(kind.alignment() as u64);
    match end {
        Some(end) if aligned && offset >= head_length && bytes == kind.bytes() as u64 => {
            let range = size(offset)..size(end);
            Ok(Tensor { name: name.to_owned(), kind, range, file: 0, checksum })
        }
        _ => {
            let reason = format!(
                "lies at byte {offset} with {bytes} bytes, which its shape, its alignment or the file length contradict"
            );
            Err(reader.error(name, reason))
        }
    }
}
