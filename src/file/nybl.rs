//! The packed file: one header, then tensors exactly as the kernels read them.
//!
//! `docs/formats.md` specifies every byte. Opening reads the head only; a matrix is a range of the
//! mapping, aligned and complete, so nothing is copied, converted or touched before it is needed.
#![forbid(unsafe_code)]

use super::metadata::Metadata;
use super::reader::{Reader, size};
use super::source::Source;
use super::tensor::Order;
use crate::error::{Error, Result};
use crate::kernel::layout::{Format, Layout, MAX_DIMENSION};
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh64::{Xxh64, xxh64};

/// First bytes of a packed file. The high bit and the line ends betray transfers that mangle bytes.
const MAGIC: [u8; 8] = *b"\x89NYBL\r\n\x1a";

/// The version this build writes and the newest it reads.
pub const VERSION: u32 = 1;

/// Reads as another number on a machine of the other byte order.
const ENDIAN: u32 = 0x0102_0304;

const HEAD_BYTES: usize = 64;

/// Where the head's own checksum lies.
const CHECKSUM: Range<usize> = 32..40;

/// Matrices start at multiples of this: the largest page of any phone.
const PAGE: usize = 16 * 1024;

/// Vectors start at multiples of this.
const LINE: usize = 64;

/// Directory code of a vector of f32.
const VECTOR: u8 = 255;

/// Directory code of an order of columns.
const ORDER: u8 = 254;

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

    fn alignment(&self) -> usize {
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
    checksum: u64,
}

/// An opened packed file.
pub struct Nybl {
    source: Source,
    metadata: Metadata,
    tensors: Vec<Tensor>,
}

impl Nybl {
    /// Whether the bytes start like a packed file.
    #[must_use]
    pub fn recognises(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC)
    }

    /// Reads the head: metadata and directory, verified by their checksum.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the field, [`Error::Unsupported`] for a newer version.
    pub fn open(source: Source) -> Result<Self> {
        let bytes = source.bytes();
        let mut reader = Reader::new(source.name(), bytes);
        if reader.take("magic", 8)? != MAGIC {
            return Err(reader.error("magic", "is not that of a packed nybl file"));
        }
        let version = reader.u32("version")?;
        if version != VERSION {
            return Err(Error::Unsupported(format!(
                "{}: format version {version}; this build reads version {VERSION}: convert the model again",
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
        reader.take("reserved", HEAD_BYTES - 48)?;
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
            tensors.push(read_tensor(&mut reader, index, head_length, length)?);
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(twice) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(reader.error(&twice[0].name, "is the name of two tensors"));
        }
        Ok(Self { source, metadata, tensors })
    }

    /// The mapping that the ranges of the tensors are of.
    #[must_use]
    pub fn source(&self) -> &Source {
        &self.source
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
                let bytes = &self.source.bytes()[tensor.range.clone()];
                Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
            _ => Err(Error::corrupt(self.source.name(), &tensor.name, "is not a vector")),
        }
    }

    /// The order of the columns of the matrix `name`, where it is not that of the activations.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is none for a matrix of `k` columns.
    pub fn order(&self, name: &str, k: usize) -> Result<Option<Order>> {
        let Some(tensor) = self.tensor(&order_name(name)) else { return Ok(None) };
        let bytes = &self.source.bytes()[tensor.range.clone()];
        let order: Order = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        if tensor.kind != Kind::Order(k) || order.iter().any(|column| *column as usize >= k) {
            let reason = format!("is not an order of {k} columns");
            return Err(Error::corrupt(self.source.name(), &tensor.name, reason));
        }
        Ok(Some(order))
    }

    /// Compares every tensor with its checksum; reads the whole file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the first tensor that differs.
    pub fn verify(&self) -> Result<()> {
        for tensor in &self.tensors {
            if xxh64(&self.source.bytes()[tensor.range.clone()], 0) != tensor.checksum {
                let reason = "does not match its checksum: the file is damaged";
                return Err(Error::corrupt(self.source.name(), &tensor.name, reason));
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
fn head_checksum(head: &[u8]) -> u64 {
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
            Ok(Tensor { name: name.to_owned(), kind, range, checksum })
        }
        _ => {
            let reason = format!(
                "lies at byte {offset} with {bytes} bytes, which its shape, its alignment or the file length contradict"
            );
            Err(reader.error(name, reason))
        }
    }
}

/// A count as the head holds it.
fn count(number: usize) -> Result<u32> {
    u32::try_from(number)
        .map_err(|_| Error::InvalidArgument(format!("{number} does not fit the head of a file")))
}

/// Writes a packed file under a temporary name and renames it when it is complete: whatever happens,
/// the old file or the new one is there, never half of one.
pub struct Writer {
    path: PathBuf,
    temporary: PathBuf,
    out: BufWriter<File>,
    metadata: Vec<u8>,
    pairs: u32,
    tensors: Vec<Tensor>,
    next: usize,
    at: usize,
    hash: Xxh64,
    done: bool,
}

impl Writer {
    /// Starts a file that will hold `metadata` and the tensors `plan`, in that order.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be created.
    pub fn create(path: &Path, metadata: &Metadata, plan: &[(String, Kind)]) -> Result<Self> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}.partial", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let name = path.display().to_string();
        let file = File::create(&temporary).map_err(|reason| Error::io(&name, &reason))?;
        let mut bytes = Vec::new();
        metadata.write(&mut bytes);
        let entries: usize = plan.iter().map(|(name, _)| 8 + name.len() + 48).sum();
        let mut end = HEAD_BYTES + bytes.len() + entries;
        let tensors: Vec<_> = plan
            .iter()
            .map(|(name, kind)| {
                let start = end.next_multiple_of(kind.alignment());
                end = start + kind.bytes();
                Tensor { name: name.clone(), kind: *kind, range: start..end, checksum: 0 }
            })
            .collect();
        let mut writer = Self {
            path: path.into(),
            temporary,
            out: BufWriter::new(file),
            metadata: bytes,
            pairs: count(metadata.len())?,
            tensors,
            next: 0,
            at: 0,
            hash: Xxh64::new(0),
            done: false,
        };
        writer.begin_tensor()?;
        Ok(writer)
    }

    fn io<T>(&self, outcome: std::io::Result<T>) -> Result<T> {
        outcome.map_err(|reason| Error::io(self.path.display().to_string(), &reason))
    }

    /// Moves on to where the next tensor starts.
    fn begin_tensor(&mut self) -> Result<()> {
        if let Some(tensor) = self.tensors.get(self.next) {
            self.at = tensor.range.start;
            let moved = self.out.seek(SeekFrom::Start(self.at as u64));
            self.io(moved)?;
            self.hash = Xxh64::new(0);
        }
        Ok(())
    }

    /// Appends bytes to the current tensor; the next one follows when it is complete.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk is full or fails; [`Error::InvalidArgument`] when the bytes are more
    /// than were planned.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.tensors.get(self.next).map_or(0, |tensor| tensor.range.end);
        if self.at + bytes.len() > end {
            return Err(Error::InvalidArgument(
                "more bytes than the tensor was planned for".into(),
            ));
        }
        let written = self.out.write_all(bytes);
        self.io(written)?;
        self.hash.update(bytes);
        self.at += bytes.len();
        if self.at == end {
            self.tensors[self.next].checksum = self.hash.digest();
            self.next += 1;
            self.begin_tensor()?;
        }
        Ok(())
    }

    /// Writes the head and gives the file its name.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidArgument`] when a planned tensor is missing.
    pub fn finish(mut self) -> Result<()> {
        if self.next != self.tensors.len() {
            return Err(Error::InvalidArgument("a planned tensor was not written".into()));
        }
        let mut head = std::mem::take(&mut self.metadata);
        for tensor in &self.tensors {
            let (code, group, n, k) = match tensor.kind {
                Kind::Vector(len) => (VECTOR, 1, 1, len),
                Kind::Order(len) => (ORDER, 1, 1, len),
                Kind::Matrix(layout) => {
                    (layout.format() as u8, layout.group(), layout.n(), layout.k())
                }
            };
            head.extend((tensor.name.len() as u64).to_le_bytes());
            head.extend(tensor.name.as_bytes());
            head.extend([code, 0, 0, 0]);
            head.extend(count(group)?.to_le_bytes());
            for number in [n, k, tensor.range.start, tensor.range.len()] {
                head.extend((number as u64).to_le_bytes());
            }
            head.extend(tensor.checksum.to_le_bytes());
        }
        let head_end = HEAD_BYTES + head.len();
        let length = self.tensors.last().map_or(head_end, |tensor| tensor.range.end);
        let mut start = Vec::with_capacity(head_end);
        start.extend(MAGIC);
        start.extend(VERSION.to_le_bytes());
        start.extend(ENDIAN.to_le_bytes());
        start.extend((length as u64).to_le_bytes());
        start.extend((head_end as u64).to_le_bytes());
        start.extend([0; 8]);
        start.extend(self.pairs.to_le_bytes());
        start.extend(count(self.tensors.len())?.to_le_bytes());
        start.resize(HEAD_BYTES, 0);
        start.extend(head);
        let checksum = head_checksum(&start).to_le_bytes();
        start[CHECKSUM].copy_from_slice(&checksum);
        let written = self
            .out
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.out.write_all(&start))
            .and_then(|()| self.out.flush())
            .and_then(|()| self.out.get_ref().set_len(length as u64))
            .and_then(|()| self.out.get_ref().sync_all())
            .and_then(|()| std::fs::rename(&self.temporary, &self.path));
        self.io(written)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.done {
            // An unfinished file is of no use; if it cannot be removed, its name tells what it is.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}
