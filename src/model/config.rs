//! The shape of a model, read from metadata and checked once.
//!
//! What would make the forward pass compute something else than the model's authors meant is refused by
//! name here, never ignored.
#![forbid(unsafe_code)]

use super::family::Family;
use super::rope::{self, Rope, positive};
use crate::error::{Error, Result};
use crate::file::metadata::{Metadata, Value};
use crate::kernel::layout::MAX_DIMENSION;
use crate::kv::sight::Sight;
use crate::kv::store::KvShape;

pub use super::family::Activation;

/// Configuration of a decoder.
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
    /// The rotary embedding.
    pub rope: Rope,
    /// That of layers with a window, where it is another one.
    pub windowed_rope: Option<Rope>,
    /// What distinguishes the layers, one after the other.
    pub layers: Vec<LayerConfig>,
    /// Multiplied onto embeddings.
    pub embedding_scale: f32,
    /// Multiplied onto attention scores.
    pub attention_scale: f32,
    /// Scores are bent to lie within this of zero; 0 leaves them alone.
    pub attention_softcap: f32,
    /// Logits are bent to lie within this of zero; 0 leaves them alone.
    pub logit_softcap: f32,
    /// The function of the feed-forward network's gate.
    pub activation: Activation,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether each head of queries and keys is normalised.
    pub qk_norm: bool,
    /// Whether the outputs of attention and of the feed-forward network are normalised before they join
    /// the residual stream.
    pub post_norms: bool,
}

/// What distinguishes a layer from its neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerConfig {
    /// Positions that a token sees, its own included; none for all of them.
    pub window: Option<usize>,
    /// Whether queries and keys are rotated.
    pub rotates: bool,
}

/// Longest context that is accepted from a file.
const MAX_CONTEXT: u64 = 1 << 24;

/// The keys that are read here, below the architecture's name.
const KEYS: &[&str] = &[
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    WINDOWED,
    "attention.causal",
    "rope.freq_base_swa",
    ROTATED,
    "expert_count",
    "expert_used_count",
    // The embedding's rows say so.
    "vocab_size",
    // How the file's author ordered the rows of queries and keys; GGUF prescribes it.
    "tensor_data_layout",
];

/// Which layers have the window: a list of truths, or one number for all but every so many-th.
const WINDOWED: &str = "attention.sliding_window_pattern";
/// Which layers rotate: a list of truths.
const ROTATED: &str = "rope.layers";

impl Config {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the key that is missing or out of range; [`Error::Unsupported`] for another
    /// architecture and for features the forward pass does not have.
    pub fn read(metadata: &Metadata) -> Result<Self> {
        let key = "general.architecture";
        let architecture = metadata.required(key, metadata.text(key)?)?.to_owned();
        let Some(family) = Family::named(&architecture) else {
            return Err(Error::Unsupported(format!(
                "the architecture {architecture}; supported are {}",
                Family::names()
            )));
        };
        refuse_unknown(metadata, family)?;
        let key = |suffix: &str| format!("{architecture}.{suffix}");
        let optional = |suffix: &str, limit: u64| metadata.integer(&key(suffix), limit);
        let size = |suffix: &str| -> Result<usize> {
            let found = optional(suffix, MAX_DIMENSION as u64)?;
            match metadata.required(&key(suffix), found)? {
                0 => Err(metadata.error(&key(suffix), "is zero")),
                size => Ok(size as usize),
            }
        };
        let positive = |suffix: &str| positive(metadata, &key(suffix));

        for suffix in ["expert_count", "expert_used_count"] {
            if optional(suffix, u64::MAX)?.is_some_and(|count| count > 0) {
                return Err(Error::Unsupported(format!("models with {}", key(suffix))));
            }
        }
        if metadata.bool(&key("attention.causal"))? == Some(false) {
            return Err(Error::Unsupported(format!(
                "models without {}: a token would see those after it",
                key("attention.causal")
            )));
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
        if let Some(length) = optional("attention.value_length", MAX_DIMENSION as u64)?
            && length != head_dim as u64
        {
            let what = format!("heads with values of {length} floats and keys of {head_dim}");
            return Err(Error::Unsupported(what));
        }
        if n_heads.checked_mul(head_dim).is_none_or(|width| width > MAX_DIMENSION) {
            let reason = format!("{n_heads} heads of {head_dim} floats are too many");
            return Err(metadata.error(&key("attention.head_count"), reason));
        }
        let context = optional("context_length", MAX_CONTEXT)?;
        let context = metadata.required(&key("context_length"), context)? as usize;
        if context == 0 {
            return Err(metadata.error(&key("context_length"), "is zero"));
        }
        let n_layers = size("block_count")?;
        if n_layers > 4096 {
            return Err(metadata.error(&key("block_count"), format!("{n_layers} is absurd")));
        }
        let norm_eps = positive("attention.layer_norm_rms_epsilon")?;
        let norm_eps = metadata.required(&key("attention.layer_norm_rms_epsilon"), norm_eps)?;

        let rope = Rope::read(metadata, &architecture, family.pairing, head_dim, context)?;
        let layers = read_layers(metadata, family, n_layers)?;
        let windowed_rope = match positive("rope.freq_base_swa")?.or(family.windowed_theta) {
            Some(theta) if layers.iter().any(|layer| layer.window.is_some()) => {
                Some(rope.plain(theta)).filter(|plain| *plain != rope)
            }
            _ => None,
        };
        let scored_width =
            if n_layers == family.scaled_by_width { d_model / n_heads } else { head_dim };
        let attention_scale = match positive("attention.scale")? {
            Some(scale) => scale as f32,
            None => 1.0 / (scored_width as f32).sqrt(),
        };
        let cap = |suffix: &str| Ok::<_, Error>(positive(suffix)?.unwrap_or(0.0) as f32);
        Ok(Self {
            name: metadata.text("general.name")?.unwrap_or(&architecture).to_owned(),
            n_layers,
            d_model,
            n_heads,
            n_kv_heads,
            head_dim,
            d_ff: size("feed_forward_length")?,
            context,
            norm_eps: norm_eps as f32,
            rope,
            windowed_rope,
            layers,
            embedding_scale: if family.scales_embedding { (d_model as f32).sqrt() } else { 1.0 },
            attention_scale,
            attention_softcap: cap("attn_logit_softcapping")?,
            logit_softcap: cap("final_logit_softcapping")?,
            activation: family.activation,
            qkv_bias: family.qkv_bias,
            qk_norm: family.qk_norm,
            post_norms: family.post_norms,
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
    pub fn sight(&self, layer: usize) -> Sight<'static> {
        Sight {
            softcap: self.attention_softcap,
            window: self.layers[layer].window.unwrap_or(usize::MAX),
            ..Sight::causal(self.attention_scale)
        }
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

/// A key of the architecture that nothing reads is a feature that nothing computes.
fn refuse_unknown(metadata: &Metadata, family: &Family) -> Result<()> {
    for (key, _) in metadata.iter() {
        let suffix = key.strip_prefix(family.name).and_then(|rest| rest.strip_prefix('.'));
        let is_known = |suffix: &str| {
            [KEYS, rope::KEYS, family.caps].iter().any(|keys| keys.contains(&suffix))
        };
        if suffix.is_some_and(|suffix| !is_known(suffix)) {
            return Err(Error::Unsupported(format!(
                "{key}, which no {} model that this build knows has",
                family.name
            )));
        }
    }
    Ok(())
}

fn read_layers(metadata: &Metadata, family: &Family, n_layers: usize) -> Result<Vec<LayerConfig>> {
    let key = |suffix: &str| format!("{}.{suffix}", family.name);
    let truths = |suffix: &str| match metadata.get(&key(suffix)) {
        Some(Value::Integers(truths)) if truths.len() == n_layers => {
            Ok(Some(truths.iter().map(|truth| *truth != 0).collect::<Vec<_>>()))
        }
        None | Some(Value::Unsigned(_) | Value::Signed(_)) => Ok(None),
        Some(_) => Err(metadata.error(&key(suffix), format!("is no list of {n_layers} truths"))),
    };
    // No window and a window of no positions are both ways to say that there is none.
    let window = metadata.integer(&key("attention.sliding_window"), MAX_CONTEXT)?;
    let window = window.filter(|window| *window > 0).map(|window| window as usize);
    let windowed = match truths(WINDOWED)? {
        Some(truths) => truths,
        None => match metadata.integer(&key(WINDOWED), MAX_CONTEXT)? {
            Some(0) => vec![false; n_layers],
            Some(step) => (0..n_layers).map(|i| !(i + 1).is_multiple_of(step as usize)).collect(),
            None => (0..n_layers).map(|i| window.is_some() && family.has_window(i)).collect(),
        },
    };
    if window.is_none() && windowed.contains(&true) {
        let reason = "is missing, although layers with a window are listed";
        return Err(metadata.error(&key("attention.sliding_window"), reason));
    }
    let rotated = truths(ROTATED)?;
    let rotates = |layer: usize| match &rotated {
        Some(truths) => truths[layer],
        None => family.rotates(layer),
    };
    let layers = windowed.iter().enumerate();
    Ok(layers
        .map(|(layer, windowed)| LayerConfig {
            window: window.filter(|_| *windowed),
            rotates: rotates(layer),
        })
        .collect())
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
        assert_eq!((config.head_dim, config.rope.dim, config.kv_dim()), (32, 32, 64));
        assert_eq!((config.rope.theta, config.name.as_str()), (10_000.0, "llama"));
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

    /// The nursery's shape under another architecture.
    fn of(architecture: &str, more: &[(&str, Value)]) -> Config {
        let mut metadata = Metadata::new("test.gguf");
        metadata.set("general.architecture", Value::Text(architecture.into()));
        for (key, value) in nursery().iter().filter(|(key, _)| key.starts_with("llama.")) {
            metadata.set(&key.replace("llama", architecture), value.clone());
        }
        for (key, value) in more {
            metadata.set(&format!("{architecture}.{key}"), value.clone());
        }
        Config::read(&metadata).unwrap()
    }

    fn windows(config: &Config) -> Vec<Option<usize>> {
        config.layers.iter().map(|layer| layer.window).collect()
    }

    #[test]
    fn windows_and_rotation_go_by_layer() {
        let window = ("attention.sliding_window", Value::Unsigned(9));
        let (all, none) = (Some(9), None);
        assert_eq!(windows(&of("llama", &[])), [none; 4]);
        assert_eq!(windows(&of("llama", std::slice::from_ref(&window))), [all; 4]);
        let gemma2 = of("gemma2", std::slice::from_ref(&window));
        assert_eq!(windows(&gemma2), [all, none, all, none]);
        assert!(gemma2.windowed_rope.is_none());
        let listed = ("attention.sliding_window_pattern", Value::Integers(vec![0, 0, 1, 1]));
        let gemma3 = of("gemma3", &[window, listed, ("rope.freq_base", Value::Float(1e6))]);
        assert_eq!(windows(&gemma3), [none, none, all, all]);
        assert_eq!(gemma3.windowed_rope.unwrap().theta, 10_000.0);
        let rotates = |config: Config| config.layers.iter().map(|l| l.rotates).collect::<Vec<_>>();
        assert_eq!(rotates(of("smollm3", &[])), [true, true, true, false]);
        let listed = ("rope.layers", Value::Integers(vec![0, 1, 1, 1]));
        assert_eq!(rotates(of("smollm3", &[listed])), [false, true, true, true]);
    }

    #[test]
    fn scores_are_scaled_as_the_family_or_the_file_says() {
        let scale = |name, more: &[_]| of(name, more).attention_scale;
        assert_eq!(scale("gemma2", &[]), 1.0 / 32_f32.sqrt());
        let head = ("attention.key_length", Value::Unsigned(64));
        assert_eq!(scale("gemma2", std::slice::from_ref(&head)), 0.125);
        let layers = ("block_count", Value::Unsigned(46));
        assert_eq!(scale("gemma2", &[head, layers]), 1.0 / 32_f32.sqrt());
        assert_eq!(scale("gemma2", &[("attention.scale", Value::Float(0.25))]), 0.25);
    }

    #[test]
    fn what_would_be_computed_wrongly_is_refused() {
        for (key, value) in [
            ("general.architecture", Value::Text("mamba".into())),
            ("llama.expert_count", Value::Unsigned(8)),
            ("llama.attention.sliding_window_pattern", Value::Unsigned(2)),
            ("llama.attention.value_length", Value::Unsigned(16)),
            ("llama.attention.causal", Value::Bool(false)),
            ("llama.final_logit_softcapping", Value::Float(30.0)),
            ("llama.logit_scale", Value::Float(0.5)),
            ("llama.rope.layers", Value::Integers(vec![1, 0])),
            ("llama.rope.scaling.type", Value::Text("dynamic".into())),
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
