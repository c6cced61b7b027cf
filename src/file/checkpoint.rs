//! A checkpoint: named tensors and metadata, in the names and keys of GGUF wherever they come from.
//!
//! What is written for GGUF works for a Hugging Face folder as well, because [`super::huggingface`]
//! translates it here, where files are read, and nowhere else.
#![forbid(unsafe_code)]

use super::gguf::Gguf;
use super::metadata::Metadata;
use super::source::Source;
use super::tensor::Tensor;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// An opened checkpoint that is not packed yet.
pub struct Checkpoint {
    /// The file or folder, for messages.
    pub name: String,
    /// The kind of file, for reports.
    pub format: String,
    /// Everything that is said about the model.
    pub metadata: Metadata,
    /// All tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// The files that the tensors lie in.
    pub files: Vec<Source>,
}

impl Checkpoint {
    /// Opens a GGUF file, the first of a split one, or a Hugging Face folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] or [`Error::Unsupported`] naming file and field.
    pub fn open(path: &Path) -> Result<Self> {
        #[cfg(feature = "huggingface")]
        if path.is_dir() {
            return super::huggingface::open(path);
        }
        Self::from_sources(sources(path)?)
    }

    /// Opens GGUF from bytes that are there already: one file, or all of a split one in order.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_sources(sources: Vec<Source>) -> Result<Self> {
        let mut whole: Option<Self> = None;
        let count = sources.len();
        for (index, source) in sources.into_iter().enumerate() {
            let gguf = Gguf::open(source.clone())?;
            let (number, of) = split(gguf.metadata())?;
            if (number, of) != (index as u64, count as u64) {
                let reason =
                    format!("is part {} of {of}; all parts are needed, in order", number + 1);
                return Err(gguf.metadata().error("split.no", reason));
            }
            let (metadata, version, tensors) = gguf.into_parts();
            match &mut whole {
                None => {
                    whole = Some(Self {
                        name: source.name().to_owned(),
                        format: format!("GGUF, version {version}"),
                        metadata,
                        tensors,
                        files: vec![source],
                    });
                }
                Some(whole) => {
                    for (name, tensor) in tensors {
                        if whole.tensors.insert(name.clone(), tensor).is_some() {
                            let reason = "is the name of two tensors";
                            return Err(Error::corrupt(source.name(), name, reason));
                        }
                    }
                    whole.files.push(source);
                }
            }
        }
        let mut whole =
            whole.ok_or_else(|| Error::InvalidArgument("a checkpoint without files".into()))?;
        if count > 1 {
            whole.format += &format!(" in {count} files");
            let all = whole.metadata.integer("split.tensors.count", u64::MAX)?;
            if all.is_some_and(|all| all != whole.tensors.len() as u64) {
                let reason =
                    format!("is not {}, which is what the files hold", whole.tensors.len());
                return Err(whole.metadata.error("split.tensors.count", reason));
            }
            whole.metadata.remove_prefix("split.");
        }
        super::unfuse::unfuse(&mut whole)?;
        Ok(whole)
    }
}

/// Which file of how many this is, counted from 0.
fn split(metadata: &Metadata) -> Result<(u64, u64)> {
    let limit = u64::from(u16::MAX);
    let count = metadata.integer("split.count", limit)?.unwrap_or(1).max(1);
    Ok((metadata.integer("split.no", limit)?.unwrap_or(0), count))
}

/// The file, or all files `...-00001-of-0000N.gguf` when it is named like one of them.
fn sources(path: &Path) -> Result<Vec<Source>> {
    parts(path)?.iter().map(|path| Source::open(path)).collect()
}

/// The paths of all parts of the file that `path` is a part of, itself alone when it is whole.
pub(super) fn parts(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((stem, count, extension)) = part_name(name) else {
        return Ok(vec![path.into()]);
    };
    (1..=count)
        .map(|number| {
            let part = path.with_file_name(format!("{stem}-{number:05}-of-{count:05}{extension}"));
            if part.exists() {
                return Ok(part);
            }
            let reason = format!("is missing; {name} is one of {count} files");
            Err(Error::Io { path: part.display().to_string(), reason })
        })
        .collect()
}

/// Stem, number of parts and extension of a name like `stem-00001-of-00003.gguf`.
pub(super) fn part_name(name: &str) -> Option<(&str, u32, &str)> {
    let (name, extension) = name.split_at(name.rfind('.')?);
    let (rest, count) = name.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let count: u32 = count.parse().ok().filter(|_| digits(count))?;
    let number: u32 = number.parse().ok().filter(|_| digits(number))?;
    (1..=count).contains(&number).then_some((stem, count, extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        assert_eq!(part_name("m.Q4-00002-of-00003.gguf"), Some(("m.Q4", 3, ".gguf")));
        for whole in ["m.gguf", "m-1-of-2.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf"] {
            assert_eq!(part_name(whole), None, "{whole}");
        }
    }
}
