//! The shape of a model, read from metadata and checked once.
//!
//! What would make the forward pass compute something else than the model's authors meant is refused by
//! name here, never ignored.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::file::metadata::Metadata;
use crate::kernel::layout::MAX_DIMENSION;
use crate::kv::attend::Sight;
use crate::kv::store::KvShape;

/// Configuration of a Llama-family decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `general.architecture`.
    pub architecture: String,
    /// `general.name`, or the architecture where that is absent.
    pub name: String,
    /// Transformer blocks.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Heads of keys and values; query heads share them in equal groups.
    pub n_kv_heads: usize,
    /// Floats in a head.
    pub head_dim: usize,
    /// Width of the feed-forward network.
    pub d_ff: usize,
    /// Tokens the model was trained to see.
    pub context: usize,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f32,
    /// Base of the rotary embedding's wavelengths.
    pub rope_theta: f64,
    /// Leading floats of a head that are rotated.
    pub rope_dim: usize,
}

/// Longest context that is accepted from a file.
const MAX_CONTEXT: u64 = 1 << 24;

impl Config {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the key that is missing or out of range; [`Error::Unsupported`] for another
    /// architecture and for features the forward pass does not have.
    pub fn read(metadata: &Metadata) -> Result<Self> {
        let key = "general.architecture";
        let architecture = metadata.required(key, metadata.text(key)?)?.to_owned();
        if architecture != "llama" {
            return Err(Error::Unsupported(format!(
                "the architecture {architecture}; supported is llama"
            )));
        }
        let key = |suffix: &str| format!("{architecture}.{suffix}");
        let optional = |suffix: &str, limit: u64| metadata.integer(&key(suffix), limit);
        let size = |suffix: &str| -> Result<usize> {
            let found = optional(suffix, MAX_DIMENSION as u64)?;
            match metadata.required(&key(suffix), found)? {
                0 => Err(metadata.error(&key(suffix), "is zero")),
                size => Ok(size as usize),
            }
        };

        for suffix in ["expert_count", "attention.sliding_window"] {
            if optional(suffix, u64::MAX)?.is_some_and(|count| count > 0) {
                return Err(Error::Unsupported(format!("models with {}", key(suffix))));
            }
        }
        let scaling = metadata.text(&key("rope.scaling.type"))?.unwrap_or("none");
        if scaling != "none" {
            return Err(Error::Unsupported(format!("rotary scaling of the type {scaling}")));
        }

        let (d_model, n_heads) = (size("embedding_length")?, size("attention.head_count")?);
        let n_kv_heads = optional("attention.head_count_kv", MAX_DIMENSION as u64)?;
        let n_kv_heads = n_kv_heads.map_or(n_heads, |count| count as usize);
        if n_kv_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
            let reason =
                format!("{n_kv_heads} KV heads cannot share {n_heads} query heads equally");
            return Err(metadata.error(&key("attention.head_count_kv"), reason));
        }
        let head_dim = match optional("attention.key_length", MAX_DIMENSION as u64)? {
            Some(length) => length as usize,
            None if d_model.is_multiple_of(n_heads) => d_model / n_heads,
            None => {
                let reason = format!("{n_heads} heads do not divide a width of {d_model}");
                return Err(metadata.error(&key("attention.head_count"), reason));
            }
        };
        let rope_dim = optional("rope.dimension_count", MAX_DIMENSION as u64)?;
        let rope_dim = rope_dim.map_or(head_dim, |count| count as usize);
        if rope_dim == 0 || rope_dim > head_dim || !rope_dim.is_multiple_of(2) {
            let reason = format!("{rope_dim} of the {head_dim} floats of a head cannot be rotated");
            return Err(metadata.error(&key("rope.dimension_count"), reason));
        }
        if n_heads.checked_mul(head_dim).is_none_or(|width| width > MAX_DIMENSION) {
            let reason = format!("{n_heads} heads of {head_dim} floats are too many");
            return Err(metadata.error(&key("attention.head_count"), reason));
        }
        let positive = |suffix: &str, default: Option<f64>| -> Result<f64> {
            let found = metadata.number(&key(suffix))?.or(default);
            match metadata.required(&key(suffix), found)? {
                number if number > 0.0 => Ok(number),
                _ => Err(metadata.error(&key(suffix), "is not above zero")),
            }
        };
        let context = optional("context_length", MAX_CONTEXT)?;
        let context = metadata.required(&key("context_length"), context)?;
        if context == 0 {
            return Err(metadata.error(&key("context_length"), "is zero"));
        }
        let n_layers = size("block_count")?;
        if n_layers > 4096 {
            return Err(metadata.error(&key("block_count"), format!("{n_layers} is absurd")));
        }
        Ok(Self {
            name: metadata.text("general.name")?.unwrap_or(&architecture).to_owned(),
            n_layers,
            d_model,
            n_heads,
            n_kv_heads,
            head_dim,
            d_ff: size("feed_forward_length")?,
            context: context as usize,
            norm_eps: positive("attention.layer_norm_rms_epsilon", None)? as f32,
            rope_theta: positive("rope.freq_base", Some(10_000.0))?,
            rope_dim,
            architecture,
        })
    }

    /// What a token occupies in the KV cache.
    #[must_use]
    pub fn kv_shape(&self) -> KvShape {
        KvShape { n_layers: self.n_layers, n_kv_heads: self.n_kv_heads, head_dim: self.head_dim }
    }

    /// What the queries of a layer look at and how they score it: the layer's window, soft cap and scale.
    #[must_use]
    pub fn sight(&self, _layer: usize) -> Sight<'static> {
        Sight::causal(1.0 / (self.head_dim as f32).sqrt())
    }

    /// The first position that a layer still looks at from position `next` on. What lies before it can be
    /// dropped from the cache: 0 as soon as one layer has no window.
    #[must_use]
    pub fn first_seen(&self, next: usize) -> usize {
        (0..self.n_layers).map(|layer| self.sight(layer).start(next)).min().unwrap_or(0)
    }

    /// Floats in a row of queries.
    #[must_use]
    pub fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Floats in a row of keys or of values.
    #[must_use]
    pub fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::metadata::Value;

    fn nursery() -> Metadata {
        let mut metadata = Metadata::new("test.gguf");
        metadata.set("general.architecture", Value::Text("llama".into()));
        for (key, value) in [
            ("context_length", 256),
            ("embedding_length", 128),
            ("block_count", 4),
            ("feed_forward_length", 384),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
        ] {
            metadata.set(&format!("llama.{key}"), Value::Unsigned(value));
        }
        metadata.set("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5));
        metadata
    }

    #[test]
    fn defaults_follow_the_format() {
        let config = Config::read(&nursery()).unwrap();
        assert_eq!((config.head_dim, config.rope_dim, config.kv_dim()), (32, 32, 64));
        assert_eq!((config.rope_theta, config.name.as_str()), (10_000.0, "llama"));
    }

    #[test]
    fn every_required_key_is_named_when_it_is_missing_or_zero() {
        for key in ["context_length", "embedding_length", "block_count", "feed_forward_length"] {
            let key = format!("llama.{key}");
            let mut missing = nursery();
            missing.remove_prefix(&key);
            let mut zero = nursery();
            zero.set(&key, Value::Unsigned(0));
            for bad in [missing, zero] {
                let error = Config::read(&bad).unwrap_err().to_string();
                assert!(error.starts_with(&format!("test.gguf: {key}: ")), "{error}");
            }
        }
    }

    #[test]
    fn what_would_be_computed_wrongly_is_refused() {
        for (key, value) in [
            ("general.architecture", Value::Text("mamba".into())),
            ("llama.expert_count", Value::Unsigned(8)),
            ("llama.attention.sliding_window", Value::Unsigned(4096)),
            ("llama.rope.scaling.type", Value::Text("yarn".into())),
            ("llama.attention.head_count_kv", Value::Unsigned(3)),
            ("llama.rope.dimension_count", Value::Unsigned(33)),
            ("llama.attention.layer_norm_rms_epsilon", Value::Float(0.0)),
        ] {
            let mut metadata = nursery();
            metadata.set(key, value);
            assert!(Config::read(&metadata).is_err(), "{key}");
        }
    }
}
