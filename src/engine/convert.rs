//! A checkpoint into one packed file.
//!
//! Panels are packed and written one after the other, so memory stays at a few panels however large the
//! model is. What the source quantised stays as it is; floats may be rounded to nearest on the way.
#![forbid(unsafe_code)]

use super::runtime::Runtime;
use crate::error::{Error, Result};
use crate::file::gguf::{Gguf, Tensor};
use crate::file::nybl::{Kind, Writer};
use crate::file::source::Source;
use crate::kernel::{Format, Layout};
use crate::memory::Aligned;
use crate::model::config::Config;
use crate::model::weights::Weights;
use crate::text::vocabulary;
use std::path::Path;
use std::sync::Mutex;

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
    /// Four bits in groups; embedding and output head become bytes in groups of 32, because every token
    /// passes through single rows of them.
    FourBits {
        /// Weights that share a scale.
        group: usize,
        /// With a zero point for each group.
        zero_points: bool,
    },
}

impl Recipe {
    fn layout(self, name: &str, tensor: &Tensor) -> Result<Layout> {
        if tensor.kind().packed().is_quantised() {
            return tensor.exact_layout();
        }
        let is_table = matches!(name, "token_embd.weight" | "output.weight");
        let (format, group) = match self {
            Self::Keep => return tensor.exact_layout(),
            Self::Bytes { group } => (Format::Q8, group),
            Self::FourBits { .. } if is_table => (Format::Q8, 32),
            Self::FourBits { group, zero_points: false } => (Format::Q4, group),
            Self::FourBits { group, zero_points: true } => (Format::Q4Z, group),
        };
        Layout::new(format, group, tensor.n(), tensor.k())
    }
}

/// Packs the GGUF file `from` into `to`, calling `progress(done, total)` with bytes of packed weights.
///
/// # Errors
/// [`Error::Corrupt`] or [`Error::Unsupported`] for a source that could not be run; [`Error::Io`] when
/// writing fails. `to` is whole or untouched.
pub fn gguf_to_nybl(
    runtime: &Runtime,
    from: &Path,
    to: &Path,
    recipe: Recipe,
    mut progress: impl FnMut(usize, usize),
) -> Result<()> {
    let gguf = Gguf::open(Source::open(from)?)?;
    let config = Config::read(gguf.metadata())?;
    Weights::check_gguf(&gguf, &config)?;
    let vocab = gguf.tensors().get("token_embd.weight").map_or(0, Tensor::n);
    let mut metadata = gguf.metadata().clone();
    if let Some(tokenizer) = vocabulary::tokenizer(&metadata, vocab)? {
        vocabulary::store(&tokenizer, &mut metadata)?;
    }
    // These describe the source's own encoding.
    for prefix in ["general.alignment", "general.file_type", "general.quantization_version"] {
        metadata.remove_prefix(prefix);
    }
    metadata.remove_prefix("tokenizer.ggml.");

    let mut plan = Vec::new();
    for name in in_order(&gguf, config.n_layers) {
        let tensor = &gguf.tensors()[&name];
        let kind = if tensor.is_vector() {
            Kind::Vector(tensor.k())
        } else {
            Kind::Matrix(recipe.layout(&name, tensor)?)
        };
        plan.push((name, kind));
    }
    let total = plan.iter().map(|(_, kind)| kind.bytes()).sum();
    let mut done = 0;
    let mut writer = Writer::create(to, &metadata, &plan)?;
    for (name, kind) in &plan {
        let tensor = &gguf.tensors()[name];
        let layout = match kind {
            Kind::Vector(_) => {
                let vector = gguf.vector(name, tensor)?;
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                writer.append(&bytes)?;
                done += bytes.len();
                continue;
            }
            Kind::Matrix(layout) => layout,
        };
        // Some panels at a time: enough for every thread.
        let panels = runtime.pool().threads() * 4;
        let mut buffer = Aligned::<u8>::zeroed("panels", panels * layout.panel_bytes())?;
        for first in (0..layout.panels()).step_by(panels) {
            let count = panels.min(layout.panels() - first);
            let bytes = &mut buffer[..count * layout.panel_bytes()];
            let failed = Mutex::new(None);
            runtime.pool().chunks_mut(bytes, layout.panel_bytes(), &|index, panel| {
                if let Err(error) = gguf.pack(tensor, layout, first + index, panel)
                    && let Ok(mut slot) = failed.lock()
                {
                    slot.get_or_insert(error);
                }
            });
            if let Ok(Some(error)) = failed.into_inner() {
                return Err(Error::corrupt(gguf.name(), name, error.to_string()));
            }
            writer.append(bytes)?;
            done += bytes.len();
            progress(done, total);
        }
    }
    writer.finish()
}

/// The names in the order in which a forward pass reads the tensors.
fn in_order(gguf: &Gguf, layers: usize) -> Vec<String> {
    let layer_parts = [
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
    let layers =
        (0..layers).flat_map(|layer| layer_parts.map(|part| format!("blk.{layer}.{part}.weight")));
    let ends = ["output_norm.weight", "output.weight"].map(String::from);
    std::iter::once("token_embd.weight".to_owned())
        .chain(layers)
        .chain(ends)
        .filter(|name| gguf.tensors().contains_key(name))
        .collect()
}
