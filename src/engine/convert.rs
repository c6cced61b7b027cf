//! A checkpoint into one packed file.
//!
//! Panels are packed and written one after the other, so memory stays at a few panels however large the
//! model is. What the source quantised stays as it is; floats may be rounded to nearest on the way.
#![forbid(unsafe_code)]

use super::runtime::Runtime;
use crate::error::{Error, Result};
use crate::file::checkpoint::Checkpoint;
use crate::file::metadata::Metadata;
use crate::file::nybl::{Kind, Target, VERSION, Writer, order_name};
use crate::file::tensor::{Deviation, Tensor};
use crate::kernel::{Format, Layout};
use crate::memory::Aligned;
use crate::model::config::Config;
use crate::model::weights::Weights;
use crate::text::vocabulary;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use xxhash_rust::xxh64::Xxh64;

/// What float matrices become. Everything else keeps its codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recipe {
    /// The floats as they are.
    #[default]
    Keep,
    /// Signed bytes in groups.
    Bytes {
        /// Weights that share a scale.
        group: usize,
    },
    /// A few bits in groups; embedding and output head become bytes in groups of 32, because every token
    /// passes through single rows of them.
    Bits {
        /// 2, 3 or 4.
        bits: u8,
        /// Weights that share a scale.
        group: usize,
        /// With a zero point for each group.
        zero_points: bool,
    },
}

impl Recipe {
    fn layout(self, name: &str, tensor: &Tensor) -> Result<Layout> {
        if !tensor.is_float() {
            return tensor.layout();
        }
        let is_table = matches!(name, "token_embd.weight" | "output.weight");
        let (format, group) = match self {
            Self::Keep => return tensor.layout(),
            Self::Bytes { group } => (Format::Q8, group),
            Self::Bits { .. } if is_table => (Format::Q8, 32),
            Self::Bits { bits, group, zero_points } => {
                let format = match (bits, zero_points) {
                    (2, false) => Format::Q2,
                    (2, true) => Format::Q2Z,
                    (3, false) => Format::Q3,
                    (3, true) => Format::Q3Z,
                    (4, false) => Format::Q4,
                    (4, true) => Format::Q4Z,
                    _ => {
                        let what = format!("rounding to {bits} bits; there are 2, 3, 4 and 8");
                        return Err(Error::InvalidArgument(what));
                    }
                };
                (format, group)
            }
        };
        Layout::new(format, group, tensor.n(), tensor.k())
    }
}

/// How to convert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// What float matrices become.
    pub recipe: Recipe,
    /// Most bytes of tensors in a file, where there may be several.
    pub shard_bytes: Option<u64>,
}

impl From<Recipe> for Options {
    fn from(recipe: Recipe) -> Self {
        Self { recipe, ..Self::default() }
    }
}

/// What a conversion did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// What became of the matrices, by their encoding in the source and the packed format.
    pub lines: BTreeMap<(String, String), Line>,
    /// Tensors that an unfinished file already held; nothing is known about their deviation.
    pub found: usize,
    /// The files.
    pub files: Vec<PathBuf>,
}

/// The matrices that went the same way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Line {
    /// How many.
    pub matrices: usize,
    /// Their weights.
    pub weights: usize,
    /// How far they are from the source.
    pub deviation: Deviation,
}

/// Packs the checkpoint `from` into `to`, calling `progress(done, total)` with bytes of packed weights.
///
/// # Errors
/// [`Error::Corrupt`] or [`Error::Unsupported`] for a source that could not be run; [`Error::Io`] when
/// writing fails. `to` is whole or untouched. After a failure to write, or when the process ended, the same
/// call goes on where that one stopped.
pub fn convert(
    runtime: &Runtime,
    from: &Path,
    to: &Path,
    options: &Options,
    mut progress: impl FnMut(usize, usize),
) -> Result<Report> {
    let checkpoint = Checkpoint::open(from)?;
    let config = Config::read(&checkpoint.metadata)?;
    Weights::check(&checkpoint, &config)?;
    let metadata = metadata(&checkpoint)?;
    let mut plan = Vec::new();
    let mut tensors = Vec::new();
    for (name, tensor) in in_order(&checkpoint) {
        if let Some(order) = tensor.order() {
            plan.push((order_name(name), Kind::Order(order.len())));
            tensors.push(tensor);
        }
        let kind = if tensor.is_vector() {
            Kind::Vector(tensor.k())
        } else {
            let layout = options.recipe.layout(name, tensor);
            Kind::Matrix(layout.map_err(|error| error.in_tensor(&checkpoint.name, name))?)
        };
        plan.push((name.to_owned(), kind));
        tensors.push(tensor);
    }
    let total = plan.iter().map(|(_, kind)| kind.bytes()).sum();
    let mut done = 0;
    let fingerprint = fingerprint(&checkpoint, options);
    let target = Target { path: to, shard_bytes: options.shard_bytes, fingerprint };
    let mut writer = Writer::start(&target, &metadata, &plan)?;
    let mut report = Report::default();
    let complete = writer.complete();
    for (((name, kind), tensor), complete) in plan.iter().zip(tensors).zip(complete) {
        if complete {
            report.found += 1;
            done += kind.bytes();
            progress(done, total);
            continue;
        }
        match write(runtime, &mut writer, kind, tensor, |written| progress(done + written, total)) {
            Ok(Some(deviation)) => {
                let line = report.lines.entry((tensor.encoding(), kind.name())).or_default();
                line.matrices += 1;
                line.weights += tensor.n() * tensor.k();
                line.deviation.add(&deviation);
            }
            Ok(None) => {}
            Err(error @ Error::Io { .. }) => return Err(error),
            // The source is at fault, and would be again.
            Err(error) => {
                writer.discard();
                return Err(error.in_tensor(&checkpoint.name, name));
            }
        }
        tensor.release();
        done += kind.bytes();
    }
    report.files = writer.finish()?;
    Ok(report)
}

/// Writes one tensor; the deviation of a matrix.
fn write(
    runtime: &Runtime,
    writer: &mut Writer,
    kind: &Kind,
    tensor: &Tensor,
    mut progress: impl FnMut(usize),
) -> Result<Option<Deviation>> {
    match kind {
        Kind::Order(_) => {
            let order = tensor.order().into_iter().flat_map(|order| order.iter());
            let bytes: Vec<u8> = order.flat_map(|column| column.to_le_bytes()).collect();
            writer.append(&bytes)?;
            Ok(None)
        }
        Kind::Vector(_) => {
            let bytes: Vec<u8> = tensor.vector()?.iter().flat_map(|x| x.to_le_bytes()).collect();
            writer.append(&bytes)?;
            Ok(None)
        }
        Kind::Matrix(layout) => {
            let mut written = 0;
            let append = |bytes: &[u8]| {
                written += bytes.len();
                progress(written);
                writer.append(bytes)
            };
            pack(runtime, tensor, layout, append).map(Some)
        }
    }
}

/// Identifies source and recipe: file lengths, times and samples of their bytes.
fn fingerprint(checkpoint: &Checkpoint, options: &Options) -> u64 {
    sources_hash(checkpoint, &format!("{options:?}")).digest().max(1)
}

/// A hash of the source's files and of what is to be made of them.
pub(super) fn sources_hash(checkpoint: &Checkpoint, options: &str) -> Xxh64 {
    let mut hash = Xxh64::new(0);
    hash.update(format!("{VERSION} {} {options}", env!("CARGO_PKG_VERSION")).as_bytes());
    for file in &checkpoint.files {
        let (bytes, sample) = (file.bytes(), 64 * 1024);
        hash.update(&(bytes.len() as u64).to_le_bytes());
        let time = std::fs::metadata(file.name()).and_then(|metadata| metadata.modified());
        hash.update(format!("{time:?}").as_bytes());
        for at in (0..bytes.len()).step_by((bytes.len() / 64).max(sample)) {
            hash.update(&bytes[at..bytes.len().min(at + sample)]);
        }
        hash.update(&bytes[bytes.len().saturating_sub(sample)..]);
    }
    hash
}

/// Packs a matrix, some panels at a time: enough for every thread.
fn pack(
    runtime: &Runtime,
    tensor: &Tensor,
    layout: &Layout,
    mut append: impl FnMut(&[u8]) -> Result<()>,
) -> Result<Deviation> {
    let panels = runtime.pool().threads() * 4;
    let mut buffer = Aligned::<u8>::zeroed("panels", panels * layout.panel_bytes())?;
    let outcome = Mutex::new(Ok(Deviation::default()));
    for first in (0..layout.panels()).step_by(panels) {
        let count = panels.min(layout.panels() - first);
        let bytes = &mut buffer[..count * layout.panel_bytes()];
        runtime.pool().chunks_mut(bytes, layout.panel_bytes(), &|index, panel| {
            let packed = tensor.pack(layout, first + index, panel);
            let Ok(mut outcome) = outcome.lock() else { return };
            match (&mut *outcome, packed) {
                (Ok(all), Ok(part)) => all.add(&part),
                (Ok(_), Err(error)) => *outcome = Err(error),
                (Err(_), _) => {}
            }
        });
        if outcome.lock().is_ok_and(|outcome| outcome.is_err()) {
            break;
        }
        append(bytes)?;
    }
    outcome.into_inner().map_err(|_| Error::Internal("packing panicked".into()))?
}

/// The metadata of the packed file.
pub(super) fn metadata(checkpoint: &Checkpoint) -> Result<Metadata> {
    let vocab = checkpoint.tensors.get("token_embd.weight").map_or(0, Tensor::n);
    let mut metadata = checkpoint.metadata.clone();
    if let Some(tokenizer) = vocabulary::tokenizer(&metadata, vocab)? {
        vocabulary::store(&tokenizer, &mut metadata)?;
    }
    // These describe the source's own encoding.
    for prefix in ["general.alignment", "general.file_type", "general.quantization_version"] {
        metadata.remove_prefix(prefix);
    }
    metadata.remove_prefix("tokenizer.ggml.");
    Ok(metadata)
}

/// The tensors in the order in which a forward pass reads them: embedding, layers, head.
pub(super) fn in_order(checkpoint: &Checkpoint) -> Vec<(&str, &Tensor)> {
    const PARTS: [&str; 9] = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ];
    let place = |name: &str| {
        let in_layer = name.strip_prefix("blk.").and_then(|rest| {
            let (layer, part) = rest.split_once('.')?;
            Some((layer.parse::<usize>().ok()?, part.split('.').next()?))
        });
        match in_layer {
            Some((layer, part)) => {
                let part = PARTS.iter().position(|known| *known == part);
                (1, layer, part.unwrap_or(PARTS.len()))
            }
            None if name.starts_with("token_embd") => (0, 0, 0),
            None => (2, 0, usize::from(name.starts_with("output."))),
        }
    };
    let mut names: Vec<_> =
        checkpoint.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    names.sort_by_key(|(name, _)| place(name));
    names
}
