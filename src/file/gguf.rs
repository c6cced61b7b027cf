//! GGUF, versions 2 and 3: the container and its tensors, in place.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
#![forbid(unsafe_code)]

use super::blocks::{Type, readable, type_name};
use super::metadata::Metadata;
use super::reader::{Reader, size};
use super::source::Source;
use super::tensor::Tensor;
use crate::error::{Error, Result};
use crate::kernel::layout::MAX_DIMENSION;
use std::collections::BTreeMap;
use std::ops::Range;

/// An opened GGUF file.
pub struct Gguf {
    source: Source,
    metadata: Metadata,
    version: u32,
    tensors: BTreeMap<String, Tensor>,
}

impl Gguf {
    /// Whether the bytes start like a GGUF file.
    #[must_use]
    pub fn recognises(bytes: &[u8]) -> bool {
        bytes.starts_with(b"GGUF")
    }

    /// Reads header, metadata and tensor directory.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the field; [`Error::Unsupported`] for other versions and for tensor types
    /// without a reader.
    pub fn open(source: Source) -> Result<Self> {
        let mut reader = Reader::new(source.name(), source.bytes());
        if reader.take("magic", 4)? != b"GGUF" {
            return Err(reader.error("magic", "is not that of a GGUF file"));
        }
        let version = reader.u32("version")?;
        if !(2..=3).contains(&version) {
            let why = match version.swap_bytes() {
                2 | 3 => "GGUF for big-endian machines".to_owned(),
                _ => format!("GGUF version {version}; versions 2 and 3 are read"),
            };
            return Err(Error::Unsupported(format!("{}: {why}", source.name())));
        }
        let tensor_count = reader.u64("tensor count")?;
        let metadata_count = reader.u64("metadata count")?;
        // The shortest entries: a length, a type and one byte; a length, a count, a dimension, a type
        // and an offset.
        for (field, count, least) in
            [("metadata count", metadata_count, 13), ("tensor count", tensor_count, 32)]
        {
            if count.checked_mul(least).is_none_or(|bytes| bytes > reader.left() as u64) {
                return Err(reader.error(field, format!("{count} is more than the file can hold")));
            }
        }
        let metadata = Metadata::read(source.name(), &mut reader, metadata_count)?;
        let alignment = size(metadata.integer("general.alignment", 1 << 20)?.unwrap_or(32));
        if !alignment.is_power_of_two() {
            return Err(metadata.error("general.alignment", "is not a power of two"));
        }
        let mut entries = BTreeMap::new();
        for index in 0..tensor_count {
            let name = reader.string(&format!("name of tensor {index}"))?;
            let entry = read_entry(&mut reader, name, alignment)?;
            if entries.insert(name.to_owned(), entry).is_some() {
                return Err(reader.error(name, "is the name of two tensors"));
            }
        }
        let start = reader.position().next_multiple_of(alignment);
        let length = source.bytes().len();
        let mut tensors = BTreeMap::new();
        for (name, Entry { kind, shape, is_vector, range }) in entries {
            let begin = range.start.checked_add(start);
            let end = range.end.checked_add(start).filter(|end| *end <= length);
            let (Some(begin), Some(end)) = (begin, end) else {
                let reason = format!(
                    "ends at byte {} of the tensor data, the file after {} of it",
                    range.end,
                    length.saturating_sub(start)
                );
                return Err(Error::corrupt(source.name(), name, reason));
            };
            let tensor = Tensor::blocks(kind, source.clone(), begin..end, shape, is_vector);
            tensors.insert(name, tensor);
        }
        Ok(Self { source, metadata, version, tensors })
    }

    /// The file's name, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        self.source.name()
    }
    /// 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }
    /// All metadata.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
    /// Metadata, version and tensors.
    #[must_use]
    pub fn into_parts(self) -> (Metadata, u32, BTreeMap<String, Tensor>) {
        (self.metadata, self.version, self.tensors)
    }
    /// All tensors by name.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }
}

/// One entry of the directory; the range is relative to the tensor data.
struct Entry {
    kind: Type,
    shape: (usize, usize),
    is_vector: bool,
    range: Range<usize>,
}

fn read_entry(reader: &mut Reader<'_>, name: &str, alignment: usize) -> Result<Entry> {
    let dimensions = reader.u32(name)? as usize;
    if !(1..=4).contains(&dimensions) {
        return Err(reader.error(name, format!("has {dimensions} dimensions; 1 to 4 are possible")));
    }
    let mut shape = [1_u64; 4];
    for dimension in &mut shape[..dimensions] {
        *dimension = reader.u64(name)?;
    }
    let code = reader.u32(name)?;
    let offset = reader.u64(name)?;
    let limit = MAX_DIMENSION as u64;
    if shape.iter().any(|size| *size == 0 || *size > limit) {
        let reason = format!("has the shape {shape:?}; each dimension must be 1 to {limit}");
        return Err(reader.error(name, reason));
    }
    if shape[2] != 1 || shape[3] != 1 {
        return Err(reader.error(name, format!("has the shape {shape:?}; only matrices are read")));
    }
    let Some(kind) = Type::from_code(code) else {
        return Err(Error::Unsupported(format!(
            "{}: tensor {name} has the type {}; read are {}",
            reader.file(),
            type_name(code),
            readable()
        )));
    };
    let (k, n) = (size(shape[0]), size(shape[1]));
    let (block, bytes) = kind.block();
    if !k.is_multiple_of(block) {
        let reason = format!("rows of {k} weights are no whole blocks of {block}");
        return Err(reader.error(name, reason));
    }
    // At most 2^24 * 2^24 * 4 bytes: no overflow.
    let length = k / block * bytes * n;
    let start = usize::try_from(offset).ok().filter(|start| start.is_multiple_of(alignment));
    let Some((start, end)) = start.and_then(|start| Some((start, start.checked_add(length)?)))
    else {
        return Err(reader.error(name, format!("has the impossible offset {offset}")));
    };
    Ok(Entry { kind, shape: (n, k), is_vector: dimensions == 1, range: start..end })
}
