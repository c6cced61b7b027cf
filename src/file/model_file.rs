//! A model's file or files, whatever their kind, with nothing but their heads read.
//!
//! What opens a model and what only plans for one go through here, so that both see the same model.
#![forbid(unsafe_code)]

use super::checkpoint::Checkpoint;
use super::gguf::Gguf;
use super::metadata::Metadata;
use super::nybl::{Kind, Nybl};
use super::source::Source;
use super::tensor::Tensor;
use crate::error::{Error, Result};
use crate::kernel::Layout;
use std::path::Path;

/// An opened model file whose weights have not been touched.
pub enum ModelFile {
    /// Kernels multiply out of it.
    Packed(Nybl),
    /// Its weights are packed into memory before use.
    Checkpoint(Checkpoint),
}

/// What a tensor will be in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A packed matrix, with an order of its columns or without.
    Matrix(Layout, bool),
    /// So many floats.
    Vector(usize),
}

impl ModelFile {
    /// Opens the file at `path`: a packed file, GGUF, either with all its parts when it is named like one
    /// of several, or a Hugging Face folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] or [`Error::Unsupported`] naming file and field.
    pub fn open_path(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Ok(Self::Checkpoint(Checkpoint::open(path)?));
        }
        let source = Source::open(path)?;
        if Gguf::recognises(source.bytes()) {
            Ok(Self::Checkpoint(Checkpoint::open(path)?))
        } else if Nybl::recognises(source.bytes()) {
            Ok(Self::Packed(Nybl::open_path(path)?))
        } else {
            Err(unknown(&source))
        }
    }

    /// Opens a model from its bytes: one source, or those of all its parts in order.
    ///
    /// # Errors
    /// As [`ModelFile::open_path`]; [`Error::InvalidArgument`] for none.
    pub fn open(sources: Vec<Source>) -> Result<Self> {
        let Some(first) = sources.first() else {
            return Err(Error::InvalidArgument("a model without files".into()));
        };
        if Gguf::recognises(first.bytes()) {
            Ok(Self::Checkpoint(Checkpoint::from_sources(sources)?))
        } else if Nybl::recognises(first.bytes()) {
            Ok(Self::Packed(Nybl::open_all(sources)?))
        } else {
            Err(unknown(first))
        }
    }

    /// The name of the file, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Packed(file) => file.name(),
            Self::Checkpoint(checkpoint) => &checkpoint.name,
        }
    }

    /// All metadata.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        match self {
            Self::Packed(file) => file.metadata(),
            Self::Checkpoint(checkpoint) => &checkpoint.metadata,
        }
    }

    /// Whether the kernels multiply out of the file as it is.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        matches!(self, Self::Packed(_))
    }

    /// What becomes of each tensor, by name.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a matrix that has no layout.
    pub fn parts(&self) -> Result<Vec<(&str, Part)>> {
        match self {
            Self::Packed(file) => {
                let part = |tensor: &super::nybl::Tensor| match tensor.kind {
                    Kind::Vector(len) => Some(Part::Vector(len)),
                    Kind::Matrix(layout) => {
                        let order = file.tensor(&super::nybl::order_name(&tensor.name));
                        Some(Part::Matrix(layout, order.is_some()))
                    }
                    Kind::Order(_) => None,
                };
                let tensors = file.tensors().iter();
                Ok(tensors.filter_map(|t| Some((t.name.as_str(), part(t)?))).collect())
            }
            Self::Checkpoint(checkpoint) => {
                let part = |(name, tensor): (&String, &Tensor)| {
                    if tensor.is_vector() {
                        return Ok(Part::Vector(tensor.k()));
                    }
                    let layout = tensor.layout();
                    let layout = layout.map_err(|e| e.in_tensor(&checkpoint.name, name))?;
                    Ok(Part::Matrix(layout, tensor.order().is_some()))
                };
                let named = checkpoint
                    .tensors
                    .iter()
                    .map(|(name, tensor)| part((name, tensor)).map(|part| (name.as_str(), part)));
                named.collect()
            }
        }
    }
}

fn unknown(source: &Source) -> Error {
    let reason = "is neither that of a packed .nybl file nor that of GGUF";
    Error::corrupt(source.name(), "magic", reason)
}
