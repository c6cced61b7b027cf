//! The safetensors files of a Hugging Face folder: headers, and where each tensor lies.
//!
//! Headers are parsed by the `safetensors` crate, which checks that the tensors of a file lie one after
//! the other and fill it.
#![forbid(unsafe_code)]

use super::source::Source;
use crate::error::{Error, Result};
pub use safetensors::Dtype;
use safetensors::{SafeTensorError, SafeTensors};
use std::collections::BTreeMap;
use std::ops::Range;

/// A tensor as it is stored.
#[derive(Clone)]
pub struct Stored {
    /// The file.
    pub source: Source,
    /// Type of an element.
    pub dtype: Dtype,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Where it lies in the file.
    pub range: Range<usize>,
}

impl Stored {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.source.bytes()[self.range.clone()]
    }
}

/// All tensors of some files by name.
///
/// # Errors
/// [`Error::Corrupt`] naming the file.
pub fn read(files: &[Source]) -> Result<BTreeMap<String, Stored>> {
    let mut all = BTreeMap::new();
    for source in files {
        let wrong = |reason: &SafeTensorError| {
            Error::corrupt(source.name(), "safetensors header", reason.to_string())
        };
        let bytes = source.bytes();
        let (header, metadata) =
            SafeTensors::read_metadata(bytes).map_err(|reason| wrong(&reason))?;
        let start = 8 + header;
        for (name, info) in metadata.tensors() {
            let (begin, end) = info.data_offsets;
            let stored = Stored {
                source: source.clone(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                range: start + begin..start + end,
            };
            if stored.range.end > bytes.len() {
                return Err(Error::corrupt(source.name(), name, "lies beyond the file"));
            }
            if all.insert(name.clone(), stored).is_some() {
                return Err(Error::corrupt(source.name(), name, "is in two files"));
            }
        }
    }
    Ok(all)
}
