//! What `config.json` and module names of each family of Hugging Face models mean in the keys and names of
//! GGUF.
//!
//! A family is a row of [`FAMILIES`]. A setting that no row and no list here knows is refused by name when it
//! is on: it would make the model another one.
#![forbid(unsafe_code)]

use super::huggingface::Config;
use super::metadata::{Metadata, Value};
use crate::error::{Error, Result};
use serde_json::Value as Json;
use std::path::Path;

/// A module's tensors under the names of GGUF; several where the module holds the rows of several.
type Module = (&'static [&'static str], &'static str);

/// How one architecture of Hugging Face is written in GGUF.
pub(super) struct Family {
    /// `model_type` in `config.json`.
    pub(super) model_type: &'static str,
    /// `general.architecture`.
    pub(super) architecture: &'static str,
    /// Whether GGUF rotates neighbouring pairs, so that rows of queries and keys change places.
    pub(super) pairs: bool,
    /// What GGUF adds to the weights of norms.
    pub(super) norm_plus: f32,
    /// The key of the feed-forward network's function, and its value.
    activation: (&'static str, &'static str),
    /// Settings besides [`COMMON`] that the family has.
    settings: &'static [&'static str],
    /// Modules outside the layers.
    pub(super) ends: &'static [Module],
    /// Modules of a layer.
    pub(super) layer: &'static [Module],
}

const ENDS: &[Module] = &[
    (&["token_embd"], "model.embed_tokens"),
    (&["output_norm"], "model.norm"),
    (&["output"], "lm_head"),
];

/// The modules of a layer of most families, before those of one.
macro_rules! layer {
    ($($own:expr),* $(,)?) => {
        &[
            (&["attn_norm"], "input_layernorm"),
            (&["attn_output"], "self_attn.o_proj"),
            (&["ffn_down"], "mlp.down_proj"),
            $($own),*
        ]
    };
    (apart $($own:expr),* $(,)?) => {
        layer![
            (&["attn_q"], "self_attn.q_proj"),
            (&["attn_k"], "self_attn.k_proj"),
            (&["attn_v"], "self_attn.v_proj"),
            (&["ffn_gate"], "mlp.gate_proj"),
            (&["ffn_up"], "mlp.up_proj"),
            $($own),*
        ]
    };
}

const FFN_NORM: Module = (&["ffn_norm"], "post_attention_layernorm");
const Q_NORM: Module = (&["attn_q_norm"], "self_attn.q_norm");
const K_NORM: Module = (&["attn_k_norm"], "self_attn.k_norm");
const POST_ATTENTION: Module = (&["post_attention_norm"], "post_attention_layernorm");
const PRE_FFN: Module = (&["ffn_norm"], "pre_feedforward_layernorm");
const POST_FFN: Module = (&["post_ffw_norm"], "post_feedforward_layernorm");

const LLAMA: Family = Family {
    model_type: "llama",
    architecture: "llama",
    pairs: true,
    norm_plus: 0.0,
    activation: ("hidden_act", "silu"),
    settings: &[],
    ends: ENDS,
    layer: layer![apart FFN_NORM],
};

const QWEN_2: Family = Family {
    model_type: "qwen2",
    architecture: "qwen2",
    pairs: false,
    settings: &["sliding_window", "use_sliding_window", "max_window_layers", "layer_types"],
    ..LLAMA
};

const GEMMA_2: Family = Family {
    model_type: "gemma2",
    architecture: "gemma2",
    pairs: false,
    norm_plus: 1.0,
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    settings: &[
        "hidden_act",
        "sliding_window",
        "layer_types",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
    ],
    layer: layer![apart POST_ATTENTION, PRE_FFN, POST_FFN],
    ..LLAMA
};

pub(super) static FAMILIES: &[Family] = &[
    LLAMA,
    Family { model_type: "mistral", settings: &["sliding_window"], ..LLAMA },
    QWEN_2,
    Family {
        model_type: "qwen3",
        architecture: "qwen3",
        layer: layer![apart FFN_NORM, Q_NORM, K_NORM],
        ..QWEN_2
    },
    GEMMA_2,
    Family {
        model_type: "gemma3_text",
        architecture: "gemma3",
        settings: &[
            "hidden_act",
            "sliding_window",
            "sliding_window_pattern",
            "_sliding_window_pattern",
            "layer_types",
            "final_logit_softcapping",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
        ],
        layer: layer![apart POST_ATTENTION, PRE_FFN, POST_FFN, Q_NORM, K_NORM],
        ..GEMMA_2
    },
    Family {
        model_type: "phi3",
        architecture: "phi3",
        pairs: false,
        settings: &["sliding_window", "partial_rotary_factor", "original_max_position_embeddings"],
        layer: layer![
            FFN_NORM,
            (&["attn_q", "attn_k", "attn_v"], "self_attn.qkv_proj"),
            (&["ffn_gate", "ffn_up"], "mlp.gate_up_proj"),
        ],
        ..LLAMA
    },
    Family {
        model_type: "smollm3",
        architecture: "smollm3",
        settings: &[
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "layer_types",
            "no_rope_layers",
            "no_rope_layer_interval",
        ],
        ..LLAMA
    },
];

/// Settings of every family.
const COMMON: &[&str] = &[
    "model_type",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "vocab_size",
    "quantization_config",
    "compression_config",
];

/// Settings of training, of other programs, or of sampling, which change nothing in a forward pass.
const OTHERS: &[&str] = &[
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "transformers.js_config",
    "auto_map",
    "initializer_range",
    "use_cache",
    "cache_implementation",
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "pad_token_id",
    "pretraining_tp",
    "is_llama_config",
    "model_max_length",
    "max_length",
    "tokenizer_class",
    "id2label",
    "label2id",
    "_attn_implementation",
    "attn_implementation",
    "_attn_implementation_autoset",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
];

/// The row for a folder's `config.json`.
pub(super) fn family(folder: &str, config: &Config) -> Result<&'static Family> {
    let model_type = config.required("model_type", config.text("model_type")?)?;
    let Some(family) = FAMILIES.iter().find(|family| family.model_type == model_type) else {
        let known: Vec<_> = FAMILIES.iter().map(|family| family.model_type).collect();
        return Err(Error::Unsupported(format!(
            "{folder}: the model_type {model_type}; supported are {}",
            known.join(", ")
        )));
    };
    for (key, value) in config.entries() {
        let is_known = [COMMON, OTHERS, family.settings, &[family.activation.0]]
            .iter()
            .any(|keys| keys.contains(&key.as_str()));
        let is_off = match value {
            Json::Null | Json::Bool(false) => true,
            Json::Array(list) => list.is_empty(),
            Json::Object(object) => object.is_empty(),
            _ => false,
        };
        if !is_known && !is_off {
            return Err(Error::Unsupported(format!(
                "{folder}: the setting {key} = {value}, which no {model_type} model that this build knows has"
            )));
        }
    }
    for key in [family.activation.0, "hidden_act"] {
        let want = family.activation.1;
        if let Some(function) = config.text(key)?.filter(|function| *function != want) {
            return Err(Error::Unsupported(format!(
                "{folder}: the {key} {function}; {model_type} models have {want}"
            )));
        }
    }
    Ok(family)
}

/// The keys that GGUF has for what `config.json` says, and `rope.*` keys of our own where it has none.
#[expect(clippy::cast_possible_truncation, reason = "a part of the floats of a head")]
pub(super) fn metadata(folder: &str, family: &Family, config: &Config) -> Result<Metadata> {
    let mut metadata = Metadata::new(folder);
    let name = Path::new(folder).file_name().map(|name| name.to_string_lossy().into_owned());
    let name = config.text("_name_or_path")?.filter(|name| !name.is_empty()).map_or(name, |path| {
        Path::new(path).file_name().map(|name| name.to_string_lossy().into_owned())
    });
    metadata.set("general.architecture", Value::Text(family.architecture.into()));
    if let Some(name) = name {
        metadata.set("general.name", Value::Text(name));
    }
    let mut keys = Keys { architecture: family.architecture, metadata };
    let (heads, kv_heads) = config.heads()?;
    let head_dim = config.head_dim()?;
    let layers = config.size("num_hidden_layers")?;
    let rotated = match config.number("partial_rotary_factor")? {
        Some(share) if family.settings.contains(&"partial_rotary_factor") => {
            (head_dim as f64 * share) as usize
        }
        _ => head_dim,
    };
    for (suffix, size) in [
        ("context_length", config.size("max_position_embeddings")?),
        ("embedding_length", config.size("hidden_size")?),
        ("block_count", layers),
        ("feed_forward_length", config.size("intermediate_size")?),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        ("rope.dimension_count", rotated),
    ] {
        keys.set(suffix, Value::Unsigned(size as u64));
    }
    let eps = config.required("rms_norm_eps", config.number("rms_norm_eps")?)?;
    keys.set("attention.layer_norm_rms_epsilon", Value::Float(eps));
    for suffix in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = config.number(suffix)? {
            keys.set(suffix, Value::Float(cap));
        }
    }
    if let Some(scalar) = config.number("query_pre_attn_scalar")? {
        keys.set("attention.scale", Value::Float(1.0 / scalar.sqrt()));
    }
    if let Some(rotates) = truths(config, "no_rope_layers", layers)? {
        keys.set("rope.layers", Value::Integers(rotates));
    } else if let Some(step) = config.integer("no_rope_layer_interval")?.filter(|step| *step > 0) {
        let rotates = (1..=layers as u64).map(|layer| i64::from(!layer.is_multiple_of(step)));
        keys.set("rope.layers", Value::Integers(rotates.collect()));
    }
    windows(config, &mut keys, layers)?;
    rope(folder, family, config, &mut keys)?;
    Ok(keys.metadata)
}

/// Metadata under one architecture's name.
struct Keys {
    architecture: &'static str,
    metadata: Metadata,
}

impl Keys {
    fn set(&mut self, suffix: &str, value: Value) {
        self.metadata.set(&format!("{}.{suffix}", self.architecture), value);
    }

    /// Sets a number, if there is one.
    fn number(&mut self, suffix: &str, number: Option<f64>) {
        if let Some(number) = number {
            self.set(suffix, Value::Float(number));
        }
    }
}

/// A list of one 0 or 1 for each layer.
fn truths(config: &Config, key: &str, layers: usize) -> Result<Option<Vec<i64>>> {
    let Some(list) = config.get(key) else { return Ok(None) };
    let truth = |value: &Json| value.as_i64().or(value.as_bool().map(i64::from));
    let truths: Option<Vec<_>> = list.as_array().and_then(|list| list.iter().map(truth).collect());
    match truths {
        Some(truths) if truths.len() == layers => Ok(Some(truths)),
        _ => Err(config.error(key, &format!("is no list of {layers} truths"))),
    }
}

/// The sliding window and the layers that have it.
fn windows(config: &Config, keys: &mut Keys, layers: usize) -> Result<()> {
    let Some(window) = config.integer("sliding_window")? else { return Ok(()) };
    if config.bool("use_sliding_window")? == Some(false) {
        return Ok(());
    }
    // A switch that is left out is off in the families that have one.
    let has_switch = keys.architecture.starts_with("qwen") || keys.architecture == "smollm3";
    if has_switch && config.bool("use_sliding_window")?.is_none() {
        return Ok(());
    }
    keys.set("attention.sliding_window", Value::Unsigned(window));
    let pattern = match config.get("layer_types") {
        Some(types) => {
            let known = |kind: &Json| match kind.as_str() {
                Some("sliding_attention") => Some(1),
                Some("full_attention") => Some(0),
                _ => None,
            };
            let list = types.as_array().map(|types| types.iter().map(known).collect());
            let list: Option<Vec<i64>> = list.unwrap_or(None);
            match list {
                Some(list) if list.len() == layers => Some(Value::Integers(list)),
                _ => {
                    let why = format!("is no list of {layers} times full or sliding_attention");
                    return Err(config.error("layer_types", &why));
                }
            }
        }
        None => {
            let step = config.integer("sliding_window_pattern")?;
            let step = step.or(config.integer("_sliding_window_pattern")?);
            let first = config.integer("max_window_layers")?;
            match (step, first) {
                (Some(step), _) => Some(Value::Unsigned(step)),
                (None, Some(first)) if keys.architecture.starts_with("qwen") => {
                    let list = (0..layers as u64).map(|layer| i64::from(layer >= first));
                    Some(Value::Integers(list.collect()))
                }
                _ => None,
            }
        }
    };
    if let Some(pattern) = pattern {
        keys.set("attention.sliding_window_pattern", pattern);
    }
    Ok(())
}

/// The rotary embedding: `rope_theta` and `rope_scaling`, or both in `rope_parameters`, which may be one for
/// each kind of layer.
fn rope(folder: &str, family: &Family, config: &Config, keys: &mut Keys) -> Result<()> {
    let parameters = config.object("rope_parameters")?;
    let of_kind = |kind: &str| parameters.as_ref().map(|all| all.object(kind)).transpose();
    let full = of_kind("full_attention")?.flatten();
    let sliding = of_kind("sliding_attention")?.flatten();
    let scaling = config.object("rope_scaling")?.or(full).or(match &sliding {
        Some(_) => None,
        None => parameters,
    });
    let theta = scaling.as_ref().map(|scaling| scaling.number("rope_theta")).transpose()?;
    keys.number("rope.freq_base", config.number("rope_theta")?.or(theta.flatten()));
    let local = match &sliding {
        Some(sliding) => {
            if let Some(kind) = sliding.text("rope_type")?.filter(|kind| *kind != "default") {
                let what = format!("{folder}: layers with a window whose rope_type is {kind}");
                return Err(Error::Unsupported(what));
            }
            sliding.number("rope_theta")?
        }
        None => config.number("rope_local_base_freq")?,
    };
    keys.number("rope.freq_base_swa", local);
    let Some(scaling) = scaling else { return Ok(()) };
    let kind = scaling.text("rope_type")?.or(scaling.text("type")?).unwrap_or("default");
    let kind = match kind {
        "default" => return Ok(()),
        // Earlier names of the same way.
        "su" => "longrope",
        "yarn" if family.architecture == "phi3" => "longrope",
        kind => kind,
    };
    let used: &[&str] = match kind {
        "linear" => &["factor"],
        "llama3" => {
            &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        }
        "yarn" => &[
            "factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "original_max_position_embeddings",
        ],
        "longrope" => &[
            "short_factor",
            "long_factor",
            "attention_factor",
            "original_max_position_embeddings",
            // The ratio of the two contexts stands for it.
            "factor",
        ],
        // Refused by name where the metadata is read.
        _ => &[],
    };
    let general = ["rope_type", "type", "rope_theta"];
    for (key, value) in scaling.entries() {
        let is_known = used.contains(&key.as_str()) || general.contains(&key.as_str());
        let is_default = value.is_null() || key == "truncate" && *value == true;
        if !used.is_empty() && !is_known && !is_default {
            return Err(Error::Unsupported(format!(
                "{folder}: the setting {key} = {value} of a rope_scaling of the type {kind}"
            )));
        }
    }
    let original = scaling.integer("original_max_position_embeddings")?;
    let original = original.or(config.integer("original_max_position_embeddings")?);
    keys.set("rope.scaling.type", Value::Text(kind.into()));
    if let Some(original) = original {
        keys.set("rope.scaling.original_context_length", Value::Unsigned(original));
    }
    let factor = scaling.number("factor")?;
    let attention = scaling.number("attention_factor")?;
    match kind {
        "longrope" => {
            for (key, suffix) in [
                ("short_factor", "rope.scaling.divisors"),
                ("long_factor", "rope.scaling.long_divisors"),
            ] {
                keys.set(suffix, Value::Floats(scaling.floats(key)?));
            }
            keys.number("rope.scaling.attn_factor", attention);
        }
        _ => {
            keys.number("rope.scaling.factor", factor);
            keys.number("rope.scaling.yarn_beta_fast", scaling.number("beta_fast")?);
            keys.number("rope.scaling.yarn_beta_slow", scaling.number("beta_slow")?);
            keys.number("rope.scaling.low_freq_factor", scaling.number("low_freq_factor")?);
            keys.number("rope.scaling.high_freq_factor", scaling.number("high_freq_factor")?);
            // GGUF multiplies this onto what follows from the factor.
            let implied = factor.filter(|factor| *factor > 1.0).map_or(1.0, |f| 0.1 * f.ln() + 1.0);
            keys.number("rope.scaling.attn_factor", attention.map(|all| all / implied));
        }
    }
    Ok(())
}
