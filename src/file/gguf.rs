//! GGUF, versions 2 and 3: the container and its tensors, in place.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
#![forbid(unsafe_code)]

use super::blocks::{Blocks, Type, type_name};
use super::metadata::Metadata;
use super::reader::{Reader, size};
use super::source::Source;
use crate::error::{Error, Result};
use crate::kernel::layout::{Layout, MAX_DIMENSION};
use crate::quant::pack::{Rows, pack_panel};
use crate::quant::rtn;
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::ops::Range;

/// An opened GGUF file.
pub struct Gguf {
    source: Source,
    metadata: Metadata,
    version: u32,
    tensors: BTreeMap<String, Tensor>,
}

/// One tensor: its type, shape and place in the file, all checked.
#[derive(Clone, Debug)]
pub struct Tensor {
    kind: Type,
    n: usize,
    k: usize,
    dimensions: usize,
    range: Range<usize>,
}

impl Tensor {
    /// The type.
    #[must_use]
    pub fn kind(&self) -> Type {
        self.kind
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
        self.dimensions == 1
    }
    /// Bytes on file.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.range.len()
    }

    /// The layout that holds these weights as they are.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a dimension that no layout has.
    pub fn exact_layout(&self) -> Result<Layout> {
        Layout::new(self.kind.packed(), 32, self.n, self.k)
    }
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
        let mut tensors = BTreeMap::new();
        for index in 0..tensor_count {
            let name = reader.string(&format!("name of tensor {index}"))?;
            let tensor = read_tensor(&mut reader, name, alignment)?;
            if tensors.insert(name.to_owned(), tensor).is_some() {
                return Err(reader.error(name, "is the name of two tensors"));
            }
        }
        let start = reader.position().next_multiple_of(alignment);
        let length = source.bytes().len();
        for (name, tensor) in &mut tensors {
            let begin = tensor.range.start.checked_add(start);
            let end = tensor.range.end.checked_add(start).filter(|end| *end <= length);
            let (Some(begin), Some(end)) = (begin, end) else {
                let reason = format!(
                    "ends at byte {} of the tensor data, the file after {} of it",
                    tensor.range.end,
                    length.saturating_sub(start)
                );
                return Err(Error::corrupt(source.name(), name, reason));
            };
            tensor.range = begin..end;
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
    /// All tensors by name.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// A vector of floats.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the tensor is no vector, [`Error::OutOfMemory`].
    pub fn vector(&self, name: &str, tensor: &Tensor) -> Result<Vec<f32>> {
        if !tensor.is_vector() || tensor.kind.packed().is_quantised() {
            return Err(Error::corrupt(self.name(), name, "is not a vector of floats"));
        }
        let mut out = Vec::new();
        reserve(&mut out, tensor.k)?;
        tensor.kind.dequantise(&self.source.bytes()[tensor.range.clone()], &mut out);
        Ok(out)
    }

    /// Packs panel `index` of a matrix into `layout`: as it is where the layout is that of
    /// [`Tensor::exact_layout`], else rounded to nearest from its floats.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the layout has another shape or the weights do not fit it,
    /// [`Error::OutOfMemory`].
    pub fn pack(
        &self,
        tensor: &Tensor,
        layout: &Layout,
        index: usize,
        panel: &mut [u8],
    ) -> Result<()> {
        if (layout.n(), layout.k()) != (tensor.n, tensor.k) {
            return Err(Error::InvalidArgument("a layout of another shape".into()));
        }
        let first = index * layout.panel_rows();
        let rows = layout.panel_rows().min(tensor.n - first);
        let (block, bytes) = tensor.kind.block();
        let row_bytes = tensor.k / block * bytes;
        let start = tensor.range.start + first * row_bytes;
        let bytes = &self.source.bytes()[start..start + rows * row_bytes];
        if tensor.exact_layout()? == *layout {
            return pack_exact(tensor.kind, layout, rows, bytes, panel);
        }
        let mut floats = Vec::new();
        reserve(&mut floats, rows * tensor.k)?;
        tensor.kind.dequantise(bytes, &mut floats);
        rtn::pack_panel(layout, rows, &floats, panel)
    }
}

fn reserve<T>(out: &mut Vec<T>, count: usize) -> Result<()> {
    let bytes = count.saturating_mul(size_of::<T>());
    out.try_reserve_exact(count).map_err(|_| Error::OutOfMemory { what: "tensor rows", bytes })
}

fn pack_exact(
    kind: Type,
    layout: &Layout,
    rows: usize,
    bytes: &[u8],
    panel: &mut [u8],
) -> Result<()> {
    // Tensors lie at multiples of the file's alignment, not of ours: copied, not cast.
    match kind {
        Type::F32 => {
            let mut x = Vec::new();
            reserve(&mut x, bytes.len() / 4)?;
            kind.dequantise(bytes, &mut x);
            pack_panel(layout, rows, Rows::F32(&x), panel)
        }
        Type::F16 => {
            let x: Vec<_> = bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
            pack_panel(layout, rows, Rows::F16(&x), panel)
        }
        Type::Bf16 => {
            let x: Vec<_> = bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)).collect();
            pack_panel(layout, rows, Rows::Bf16(&x), panel)
        }
        _ => {
            let mut blocks = Blocks::default();
            reserve(&mut blocks.codes, rows * layout.k())?;
            kind.read(bytes, &mut blocks);
            let Blocks { codes, scales, offsets } = &blocks;
            pack_panel(layout, rows, Rows::Codes { codes, scales, offsets }, panel)
        }
    }
}

/// One entry of the directory; the range is still relative to the tensor data.
fn read_tensor(reader: &mut Reader<'_>, name: &str, alignment: usize) -> Result<Tensor> {
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
            "{}: tensor {name} has the type {}; read are F32, F16, BF16, Q4_0, Q4_1, Q5_0 and Q8_0",
            reader.file(),
            type_name(code)
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
    Ok(Tensor { kind, n, k, dimensions, range: start..end })
}
