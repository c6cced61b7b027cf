//! The forms that some architectures have in GGUF files and no other: rows of several matrices in one tensor,
//! and rotary divisors among the weights. They are taken apart as a file is opened, so that everything
//! behind knows one form.
#![forbid(unsafe_code)]

use super::checkpoint::Checkpoint;
use super::metadata::Value;
use super::reader::size;
use crate::error::{Error, Result};
use crate::kernel::layout::MAX_DIMENSION;

/// Tensors of divisors, and the keys that hold them here.
const DIVISORS: [(&str, &str); 3] = [
    ("rope_freqs.weight", "rope.scaling.divisors"),
    ("rope_factors_short.weight", "rope.scaling.divisors"),
    ("rope_factors_long.weight", "rope.scaling.long_divisors"),
];

/// Takes apart what `checkpoint` holds together.
///
/// # Errors
/// [`Error::Corrupt`] for a tensor that is not what its name says.
pub(super) fn unfuse(checkpoint: &mut Checkpoint) -> Result<()> {
    let architecture = match checkpoint.metadata.text("general.architecture")? {
        Some(architecture) => architecture.to_owned(),
        None => return Ok(()),
    };
    let key = |suffix: &str| format!("{architecture}.{suffix}");
    for (name, suffix) in DIVISORS {
        let Some(tensor) = checkpoint.tensors.remove(name) else { continue };
        let divisors = tensor.vector().map_err(|error| error.in_tensor(&checkpoint.name, name))?;
        if checkpoint.metadata.get(&key(suffix)).is_some() {
            let reason = "is one of two lists of the same divisors";
            return Err(Error::corrupt(&checkpoint.name, name, reason));
        }
        checkpoint.metadata.set(&key(suffix), Value::Floats(divisors));
    }

    let metadata = &checkpoint.metadata;
    let number = |suffix: &str| {
        let number = metadata.integer(&key(suffix), MAX_DIMENSION as u64);
        Ok::<_, Error>(number?.map(size))
    };
    let (Some(width), Some(heads)) = (number("embedding_length")?, number("attention.head_count")?)
    else {
        return Ok(());
    };
    let kv_heads = number("attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = number("attention.key_length")?.or(width.checked_div(heads)).unwrap_or(0);
    let ff = number("feed_forward_length")?.unwrap_or(0);
    let qkv = [("attn_q", heads), ("attn_k", kv_heads), ("attn_v", kv_heads)];
    let qkv = qkv.map(|(name, heads)| (name, heads.saturating_mul(head_dim)));
    let ffn = [("ffn_gate", ff), ("ffn_up", ff)];

    let names = checkpoint.tensors.keys().cloned().collect::<Vec<_>>();
    for name in names {
        let Some((place, "weight")) = name.rsplit_once('.') else { continue };
        let (place, parts) = if let Some(place) = place.strip_suffix("attn_qkv") {
            (place, &qkv[..])
        } else if let Some(place) = place.strip_suffix("ffn_up")
            && !checkpoint.tensors.contains_key(&format!("{place}ffn_gate.weight"))
        {
            (place, &ffn[..])
        } else {
            continue;
        };
        let Some(whole) = checkpoint.tensors.get(&name).cloned() else { continue };
        let rows: usize = parts.iter().map(|(_, rows)| rows).sum();
        if whole.is_vector() || whole.n() != rows {
            let reason = format!("has {} rows where the metadata asks for {rows}", whole.n());
            return Err(Error::corrupt(&checkpoint.name, name, reason));
        }
        checkpoint.tensors.remove(&name);
        let mut first = 0;
        for (part, rows) in parts {
            let slice = whole.slice(first, *rows);
            let slice = slice.map_err(|error| error.in_tensor(&checkpoint.name, &name))?;
            checkpoint.tensors.insert(format!("{place}{part}.weight"), slice);
            first += rows;
        }
    }
    Ok(())
}
