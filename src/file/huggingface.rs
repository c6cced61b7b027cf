//! Hugging Face folders: `config.json`, safetensors and tokenizer files, as GGUF would have them.
//!
//! `super::families` says which module becomes which tensor, and what must be done to it on the way.
#![forbid(unsafe_code)]

use super::blocks::Type;
use super::checkpoint::{Checkpoint, part_name};
use super::families::{Family, family, metadata};
use super::metadata::{Metadata, Value};
use super::safetensors::{self, Dtype, Stored};
use super::sentencepiece;
use super::source::Source;
use super::tensor::{RowOrder, Tensor};
use super::words::{Convention, Parts, Scheme, Words};
use crate::error::{Error, Result};
use crate::kernel::layout::MAX_DIMENSION;
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::Path;

/// Largest JSON file beside the tokenizer: parsed, it takes many times its size.
const MAX_JSON: usize = 1 << 20;

/// Opens the folder at `path`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Corrupt`] or [`Error::Unsupported`] naming file and field.
pub fn open(path: &Path) -> Result<Checkpoint> {
    let name = path.display().to_string();
    let io = |reason: &std::io::Error| Error::io(&name, reason);
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(path).map_err(|reason| io(&reason))? {
        let entry = entry.map_err(|reason| io(&reason))?;
        let Ok(file) = entry.file_name().into_string() else { continue };
        let read = [".json", ".jinja", ".safetensors", "tokenizer.model"];
        let read = read.iter().any(|end| file.ends_with(end));
        let length = std::fs::metadata(entry.path()).map_err(|reason| io(&reason))?.len();
        if read && length > 0 {
            files.insert(file, Source::open(&entry.path())?);
        }
    }
    from_files(&name, &files)
}

/// Reads a folder whose files are there already.
///
/// # Errors
/// As [`open`].
pub fn from_files(folder: &str, files: &BTreeMap<String, Source>) -> Result<Checkpoint> {
    let config = Config::read(folder, files, "config.json")?
        .ok_or_else(|| Error::corrupt(folder, "config.json", "is missing"))?;
    let family = family(folder, &config)?;
    let mut metadata = metadata(folder, family, &config)?;
    tokenizer(folder, files, &config, &mut metadata)?;
    let shards = shards(folder, files)?;
    let scheme = scheme(folder, files, &config)?;
    let modules = Modules { folder, stored: safetensors::read(&shards)?, scheme };
    let tensors = tensors(family, &config, modules)?;
    let format =
        format!("Hugging Face {}, safetensors in {} files", family.model_type, shards.len());
    Ok(Checkpoint { name: folder.into(), format, metadata, tensors, files: shards })
}

/// The model's safetensors files: one, or those numbered `-0000x-of-0000y`, or whatever there is.
fn shards(folder: &str, files: &BTreeMap<String, Source>) -> Result<Vec<Source>> {
    if let Some(whole) = files.get("model.safetensors") {
        return Ok(vec![whole.clone()]);
    }
    let names = || files.keys().filter(|name| name.ends_with(".safetensors"));
    let numbered = names().find_map(|name| part_name(name));
    let Some((stem, count, extension)) = numbered else {
        let all: Vec<_> = names().map(|name| files[name].clone()).collect();
        return match all.len() {
            0 => Err(Error::corrupt(folder, "model.safetensors", "is missing")),
            _ => Ok(all),
        };
    };
    (1..=count)
        .map(|number| {
            let name = format!("{stem}-{number:05}-of-{count:05}{extension}");
            let file = files.get(&name).cloned();
            file.ok_or_else(|| Error::corrupt(folder, name, "is missing"))
        })
        .collect()
}

/// A JSON object of the folder, whose errors name file and field.
pub(super) struct Config {
    file: String,
    object: Json,
}

impl Config {
    fn read(folder: &str, files: &BTreeMap<String, Source>, name: &str) -> Result<Option<Self>> {
        let Some(source) = files.get(name) else { return Ok(None) };
        let file = format!("{folder}/{name}");
        let wrong = |reason: String| Error::corrupt(&file, "JSON", reason);
        if source.bytes().len() > MAX_JSON {
            return Err(wrong(format!("{} bytes are too many", source.bytes().len())));
        }
        let object: Json = serde_json::from_slice(source.bytes())
            .map_err(|reason| wrong(format!("cannot be parsed: {reason}")))?;
        if !object.is_object() {
            return Err(wrong("is not an object".into()));
        }
        Ok(Some(Self { file, object }))
    }

    pub(super) fn error(&self, key: &str, reason: &str) -> Error {
        Error::corrupt(&self.file, key, reason)
    }

    pub(super) fn required<T>(&self, key: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| self.error(key, "is missing"))
    }

    /// The value of `key`, if it is there and not null.
    pub(super) fn get(&self, key: &str) -> Option<&Json> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        let wrong = || self.error(key, "is not text");
        self.get(key).map(|value| value.as_str().ok_or_else(wrong)).transpose()
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<u64>> {
        let wrong = || self.error(key, "is not a whole number of zero or more");
        self.get(key).map(|value| value.as_u64().ok_or_else(wrong)).transpose()
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        let wrong = || self.error(key, "is not a number");
        self.get(key).map(|value| value.as_f64().ok_or_else(wrong)).transpose()
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>> {
        let wrong = || self.error(key, "is not true or false");
        self.get(key).map(|value| value.as_bool().ok_or_else(wrong)).transpose()
    }

    /// An object inside this one.
    pub(super) fn object(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(object @ Json::Object(_)) => {
                Ok(Some(Self { file: format!("{}: {key}", self.file), object: object.clone() }))
            }
            Some(_) => Err(self.error(key, "is not an object")),
        }
    }

    /// Everything in it.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&String, &Json)> {
        self.object.as_object().into_iter().flatten()
    }

    /// A list of numbers, which must be there.
    #[expect(clippy::cast_possible_truncation, reason = "kept as f32")]
    pub(super) fn floats(&self, key: &str) -> Result<Vec<f32>> {
        let list = self.required(key, self.get(key))?.as_array();
        let numbers =
            list.and_then(|list| list.iter().map(Json::as_f64).collect::<Option<Vec<_>>>());
        let numbers = numbers.ok_or_else(|| self.error(key, "is not a list of numbers"))?;
        Ok(numbers.into_iter().map(|number| number as f32).collect())
    }

    /// A size that a matrix can have.
    pub(super) fn size(&self, key: &str) -> Result<usize> {
        let size = self.required(key, self.integer(key)?)?;
        match usize::try_from(size) {
            Ok(size) if (1..=MAX_DIMENSION).contains(&size) => Ok(size),
            _ => Err(self.error(key, &format!("{size} is not between 1 and {MAX_DIMENSION}"))),
        }
    }

    pub(super) fn heads(&self) -> Result<(usize, usize)> {
        let heads = self.size("num_attention_heads")?;
        let kv = self.integer("num_key_value_heads")?.is_some();
        Ok((heads, if kv { self.size("num_key_value_heads")? } else { heads }))
    }

    pub(super) fn head_dim(&self) -> Result<usize> {
        match self.integer("head_dim")? {
            Some(_) => self.size("head_dim"),
            None => Ok((self.size("hidden_size")? / self.heads()?.0).max(1)),
        }
    }
}

/// How the matrices are quantised, if they are.
fn scheme(
    folder: &str,
    files: &BTreeMap<String, Source>,
    config: &Config,
) -> Result<Option<Scheme>> {
    let mut nested = ["quantization_config", "compression_config"].into_iter();
    let nested = nested.find_map(|key| config.get(key).map(|object| (key, object.clone())));
    let said = match nested {
        Some((key, object)) => Config { file: format!("{}: {key}", config.file), object },
        None => match Config::read(folder, files, "quantize_config.json")? {
            Some(said) => said,
            None => return Ok(None),
        },
    };
    let method = said.text("quant_method")?.unwrap_or("gptq");
    let unsupported = |what: String| Err(Error::Unsupported(format!("{}: {what}", said.file)));
    let bits = |config: &Config, key: &str| -> Result<u32> {
        let bits = config.required(key, config.integer(key)?)?;
        let wrong = || config.error(key, &format!("{bits} is not between 2 and 8"));
        u32::try_from(bits).ok().filter(|bits| (2..=8).contains(bits)).ok_or_else(wrong)
    };
    let group = |config: &Config, key: &str| -> Result<usize> {
        match config.get(key).map(Json::as_i64) {
            None => Ok(0),
            Some(Some(-1)) => Ok(0),
            Some(size) => {
                let size = size.and_then(|size| usize::try_from(size).ok());
                let size = size.filter(|size| (1..=MAX_DIMENSION).contains(size));
                size.ok_or_else(|| config.error(key, "is neither -1 nor a number of columns"))
            }
        }
    };
    let (convention, bits, groups) = match method {
        "gptq" => {
            let format = said.text("checkpoint_format")?.unwrap_or("gptq");
            let (less_one, planar) = match format {
                "gptq" => (true, false),
                "gptq_v2" => (false, false),
                "gptq_p" => (false, true),
                other => return unsupported(format!("the checkpoint_format {other}")),
            };
            let convention = Convention::Gptq { less_one, planar };
            (convention, vec![bits(&said, "bits")?], vec![group(&said, "group_size")?])
        }
        "awq" => {
            let key = |first: &'static str, second| {
                if said.get(first).is_some() { first } else { second }
            };
            let convention = match said.text("version")?.unwrap_or("gemm").to_lowercase().as_str() {
                "gemm" => Convention::AwqGemm,
                "gemv" => Convention::AwqGemv,
                "gemv_fast" => Convention::AwqGemvFast,
                other => {
                    let known = "gemm, gemv and gemv_fast";
                    return unsupported(format!("the AWQ version {other}; read are {known}"));
                }
            };
            let bits = bits(&said, key("bits", "w_bit"))?;
            if bits != 4 {
                return unsupported(format!("AWQ with {bits} bits; only 4 exist"));
            }
            (convention, vec![bits], vec![group(&said, key("group_size", "q_group_size"))?])
        }
        "compressed-tensors" => {
            let format = said.text("format")?.unwrap_or("pack-quantized");
            if format != "pack-quantized" {
                return unsupported(format!("the format {format}; read is pack-quantized"));
            }
            let groups = said.required("config_groups", said.get("config_groups"))?;
            let groups = groups
                .as_object()
                .ok_or_else(|| said.error("config_groups", "is not an object"))?;
            let (mut all, mut sizes) = (Vec::new(), Vec::new());
            for (name, object) in groups {
                let file = format!("{}: config_groups: {name}: weights", said.file);
                let object = object.get("weights").cloned().unwrap_or(Json::Null);
                let weights = Config { file, object };
                all.push(bits(&weights, "num_bits")?);
                sizes.push(group(&weights, "group_size")?);
            }
            (Convention::PackQuantized, all, sizes)
        }
        other => {
            return unsupported(format!(
                "the quantisation method {other}; read are gptq, awq and compressed-tensors"
            ));
        }
    };
    Ok(Some(Scheme { convention, bits, groups }))
}

/// The tokenizer as it is, with what other files say about it beside.
fn tokenizer(
    folder: &str,
    files: &BTreeMap<String, Source>,
    config: &Config,
    metadata: &mut Metadata,
) -> Result<()> {
    let text = |name: &str| -> Result<Option<String>> {
        let Some(source) = files.get(name) else { return Ok(None) };
        let wrong = |_| Error::corrupt(format!("{folder}/{name}"), "text", "is not UTF-8");
        String::from_utf8(source.bytes().to_vec()).map(Some).map_err(wrong)
    };
    let options = Config::read(folder, files, "tokenizer_config.json")?;
    if let Some(json) = text("tokenizer.json")? {
        metadata.set("tokenizer.huggingface.json", Value::Text(json));
    } else if let Some(model) = files.get("tokenizer.model") {
        let file = format!("{folder}/tokenizer.model");
        sentencepiece::read(&file, model.bytes(), metadata)?;
        added_tokens(folder, files, options.as_ref(), metadata)?;
    }
    let generation = Config::read(folder, files, "generation_config.json")?;
    if let Some(bos) = config.integer("bos_token_id")? {
        metadata.set("tokenizer.nybl.bos_id", Value::Unsigned(bos));
        if metadata.get("tokenizer.ggml.model").is_some() {
            metadata.set("tokenizer.ggml.bos_token_id", Value::Unsigned(bos));
        }
    }
    // Generation ends at more tokens than training marked with.
    let ends = |config: &Config| match config.get("eos_token_id") {
        Some(Json::Array(ids)) => ids.iter().filter_map(Json::as_i64).collect(),
        Some(id) => id.as_i64().into_iter().collect(),
        None => Vec::new(),
    };
    let mut eos: Vec<i64> = generation.as_ref().map(ends).unwrap_or_default();
    for id in ends(config) {
        if !eos.contains(&id) {
            eos.push(id);
        }
    }
    if let (Some(_), Some(Ok(id))) =
        (metadata.get("tokenizer.ggml.model"), eos.first().map(|id| u64::try_from(*id)))
    {
        metadata.set("tokenizer.ggml.eos_token_id", Value::Unsigned(id));
    }
    if !eos.is_empty() {
        metadata.set("tokenizer.nybl.eos_ids", Value::Integers(eos));
    }
    if let Some(options) = &options {
        if let Some(add) = options.bool("add_bos_token")? {
            metadata.set("tokenizer.nybl.add_bos", Value::Bool(add));
            if metadata.get("tokenizer.ggml.model").is_some() {
                metadata.set("tokenizer.ggml.add_bos_token", Value::Bool(add));
            }
        }
        // One template, or several by name.
        let template = match options.get("chat_template") {
            Some(Json::String(template)) => Some(template.as_str()),
            Some(Json::Array(named)) => named
                .iter()
                .find(|named| named.get("name").and_then(Json::as_str) == Some("default"))
                .and_then(|named| named.get("template")?.as_str()),
            _ => None,
        };
        if let Some(template) = template {
            metadata.set("tokenizer.chat_template", Value::Text(template.into()));
        }
    }
    if let Some(template) = text("chat_template.jinja")? {
        metadata.set("tokenizer.chat_template", Value::Text(template));
    }
    Ok(())
}

/// The tokens that a folder adds to a `tokenizer.model`: from `added_tokens_decoder` of
/// `tokenizer_config.json`, or else from `added_tokens.json`.
fn added_tokens(
    folder: &str,
    files: &BTreeMap<String, Source>,
    options: Option<&Config>,
    metadata: &mut Metadata,
) -> Result<()> {
    let mut added: BTreeMap<u64, (String, bool)> = BTreeMap::new();
    let wrong = |file: &str, key: &str| {
        Error::corrupt(format!("{folder}/{file}"), key, "is not a token with its id")
    };
    if let Some(list) =
        options.map(|options| options.object("added_tokens_decoder")).transpose()?.flatten()
    {
        for (id, token) in list.entries() {
            let text = token.get("content").and_then(Json::as_str);
            let special = token.get("special").and_then(Json::as_bool).unwrap_or(false);
            let (Ok(id), Some(text)) = (id.parse(), text) else {
                return Err(wrong("tokenizer_config.json", id));
            };
            added.insert(id, (text.into(), special));
        }
    } else if let Some(list) = Config::read(folder, files, "added_tokens.json")? {
        for (text, id) in list.entries() {
            let id = id.as_u64().ok_or_else(|| wrong("added_tokens.json", text))?;
            added.insert(id, (text.clone(), true));
        }
    }
    let mut list = |key: &str| metadata.take(&format!("tokenizer.ggml.{key}"));
    let (
        Some(Value::Texts(mut tokens)),
        Some(Value::Floats(mut scores)),
        Some(Value::Integers(mut types)),
    ) = (list("tokens"), list("scores"), list("token_type"))
    else {
        return Err(Error::Internal("a vocabulary without its lists".into()));
    };
    for (id, (text, special)) in added {
        let kind = if special { 3 } else { 4 };
        let known = usize::try_from(id).ok().and_then(|id| tokens.get(id));
        match known {
            // Also in the model, which says what it is.
            Some(known) if *known == text => {}
            Some(known) => {
                let reason = format!("is {text:?}, and {known:?} in tokenizer.model");
                return Err(Error::corrupt(folder, format!("token {id}"), reason));
            }
            None if id == tokens.len() as u64 => {
                tokens.push(text);
                scores.push(0.0);
                types.push(kind);
            }
            None => {
                let reason = format!("comes after a gap: there are {} before it", tokens.len());
                return Err(Error::corrupt(folder, format!("token {id}"), reason));
            }
        }
    }
    metadata.set("tokenizer.ggml.tokens", Value::Texts(tokens));
    metadata.set("tokenizer.ggml.scores", Value::Floats(scores));
    metadata.set("tokenizer.ggml.token_type", Value::Integers(types));
    Ok(())
}

/// The tensors of a folder by module, taken out as they are used.
struct Modules<'a> {
    folder: &'a str,
    stored: BTreeMap<String, Stored>,
    scheme: Option<Scheme>,
}

impl Modules<'_> {
    fn error(&self, name: &str, reason: impl Into<String>) -> Error {
        Error::corrupt(self.folder, name, reason)
    }

    fn holds(&self, module: &str) -> bool {
        let holds = |part: &str| self.stored.contains_key(&format!("{module}.{part}"));
        ["weight", "qweight", "weight_packed"].into_iter().any(holds)
    }

    /// The weight of a module, in whichever of the encodings it is stored.
    fn weight(&mut self, module: &str) -> Result<Tensor> {
        let name = format!("{module}.weight");
        if let Some(stored) = self.stored.remove(&name) {
            return self.floats(&name, stored);
        }
        let mut take = |name: &str| self.stored.remove(&format!("{module}.{name}"));
        let parts = match take("weight_packed") {
            None => Parts {
                codes: take("qweight"),
                scales: take("scales"),
                zeros: take("qzeros"),
                groups: take("g_idx"),
                shape: None,
            },
            packed => Parts {
                codes: packed,
                scales: take("weight_scale"),
                zeros: take("weight_zero_point"),
                groups: take("weight_g_idx"),
                shape: take("weight_shape"),
            },
        };
        let Some(scheme) = &self.scheme else {
            let reason = match parts.codes {
                None => "is missing",
                Some(_) => "is quantised, and no quantization_config says how",
            };
            return Err(self.error(&name, reason));
        };
        if parts.codes.is_none() {
            return Err(self.error(&name, "is missing"));
        }
        let words = Words::new(scheme, parts);
        Ok(Tensor::words(words.map_err(|error| error.in_tensor(self.folder, module))?))
    }

    /// The bias of a module, if it has one.
    fn bias(&mut self, module: &str) -> Result<Option<Tensor>> {
        let name = format!("{module}.bias");
        self.stored.remove(&name).map(|stored| self.floats(&name, stored)).transpose()
    }

    /// A tensor of floats.
    fn floats(&self, name: &str, stored: Stored) -> Result<Tensor> {
        let kind = match stored.dtype {
            Dtype::F32 => Type::F32,
            Dtype::F16 => Type::F16,
            Dtype::BF16 => Type::Bf16,
            other => {
                return Err(Error::Unsupported(format!(
                    "{}: tensor {name} has the type {other:?}; read are F32, F16 and BF16",
                    self.folder
                )));
            }
        };
        let (shape, is_vector) = match stored.shape[..] {
            [k] => ((1, k), true),
            [n, k] => ((n, k), false),
            _ => {
                let reason = format!("has {} dimensions; 1 or 2 are possible", stored.shape.len());
                return Err(self.error(name, reason));
            }
        };
        if [shape.0, shape.1].iter().any(|size| *size == 0 || *size > MAX_DIMENSION) {
            let reason = format!("has the shape {:?}, which is none", stored.shape);
            return Err(self.error(name, reason));
        }
        Ok(Tensor::blocks(kind, stored.source, stored.range, shape, is_vector))
    }
}

/// Every tensor under the name GGUF gives it; one that the family does not have is refused.
fn tensors(
    family: &Family,
    config: &Config,
    mut modules: Modules<'_>,
) -> Result<BTreeMap<String, Tensor>> {
    let head_dim = config.head_dim()?;
    let tied = config.bool("tie_word_embeddings")?;
    let layers = config.size("num_hidden_layers")?;
    if layers > 4096 {
        return Err(config.error("num_hidden_layers", &format!("{layers} is absurd")));
    }
    let ends = family.ends.iter().map(|(roles, from)| (*roles, String::new(), (*from).to_owned()));
    let layers = (0..layers).flat_map(|layer| {
        family.layer.iter().map(move |(roles, from)| {
            (*roles, format!("blk.{layer}."), format!("model.layers.{layer}.{from}"))
        })
    });
    let mut tensors = BTreeMap::new();
    for (roles, place, from) in ends.chain(layers) {
        if roles == ["output"] && (tied == Some(true) || tied.is_none() && !modules.holds(&from)) {
            modules.stored.remove(&format!("{from}.weight"));
            continue;
        }
        let weight = modules.weight(&from)?;
        // AutoGPTQ writes a bias of zeros for modules that have none.
        let has_bias = family.architecture == "qwen2" && roles[0] != "attn_output";
        let bias = modules.bias(&from)?.filter(|bias| {
            let is_zero = || bias.vector().is_ok_and(|bias| bias.iter().all(|x| *x == 0.0));
            has_bias || weight.is_float() || !is_zero()
        });
        let parts = [("weight", Some(weight)), ("bias", bias)];
        let wrong = |error: Error| Error::corrupt(modules.folder, &from, error.to_string());
        for (suffix, whole) in parts {
            let Some(whole) = whole else { continue };
            let mut first = 0;
            for role in roles {
                let rows = match (roles.len(), *role) {
                    (1, _) => None,
                    (_, "attn_q") => Some(config.heads()?.0 * head_dim),
                    (_, "attn_k" | "attn_v") => Some(config.heads()?.1 * head_dim),
                    _ => Some(config.size("intermediate_size")?),
                };
                let mut part = whole.clone();
                if let Some(rows) = rows {
                    part = whole.slice(first, rows).map_err(wrong)?;
                    first += rows;
                }
                if matches!(*role, "attn_q" | "attn_k") && family.pairs {
                    let order = RowOrder::Pairs { head: head_dim, rotated: head_dim };
                    part = part.with_rows(order).map_err(wrong)?;
                }
                if role.ends_with("norm") && suffix == "weight" {
                    part = part.plus(family.norm_plus);
                }
                tensors.insert(format!("{place}{role}.{suffix}"), part);
            }
            let all = if whole.is_vector() { whole.k() } else { whole.n() };
            if roles.len() > 1 && first != all {
                let reason = format!("has {all} rows where config.json asks for {first}");
                return Err(Error::corrupt(modules.folder, &from, reason));
            }
        }
    }
    fold_orders(&mut tensors)?;
    modules.stored.retain(|name, _| !name.ends_with("rotary_emb.inv_freq"));
    if let Some(extra) = modules.stored.keys().next() {
        return Err(Error::Unsupported(format!(
            "{}: the tensor {extra}, which is no part of the {} models this build knows",
            modules.folder, family.model_type
        )));
    }
    Ok(tensors)
}

/// Where a matrix multiplies what the rows of other matrices make, its order of columns becomes their order
/// of rows: `ffn_down` after `ffn_gate` and `ffn_up`. The others have to order their activations as they run.
fn fold_orders(tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
    let downs: Vec<_> = tensors
        .iter()
        .filter(|(name, tensor)| name.ends_with(".ffn_down.weight") && tensor.order().is_some())
        .map(|(name, _)| name.clone())
        .collect();
    for down in downs {
        let name = |part: &str| down.replace("ffn_down", part);
        let (Some(tensor), Some(gate), Some(up)) = (
            tensors.get(&down).cloned(),
            tensors.get(&name("ffn_gate")).cloned(),
            tensors.get(&name("ffn_up")).cloned(),
        ) else {
            continue;
        };
        let biased = |part: &str| tensors.contains_key(&name(part).replace(".weight", ".bias"));
        let (Some(order), false) =
            (tensor.order().cloned(), biased("ffn_gate") || biased("ffn_up"))
        else {
            continue;
        };
        let rows = RowOrder::Listed(order);
        tensors.insert(name("ffn_gate"), gate.with_rows(rows.clone())?);
        tensors.insert(name("ffn_up"), up.with_rows(rows)?);
        tensors.insert(down, tensor.in_order());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    /// A safetensors file of f32 matrices whose weights are numbered through.
    fn safetensors(tensors: &[(&str, &[usize])]) -> Vec<u8> {
        safetensors_of("F32", tensors)
    }

    fn safetensors_of(dtype: &str, tensors: &[(&str, &[usize])]) -> Vec<u8> {
        let (mut header, mut data) = (String::from("{"), Vec::new());
        for (name, shape) in tensors {
            let start = data.len();
            let count: usize = shape.iter().product();
            data.extend((0..count).flat_map(|i| (i as f32).to_le_bytes()));
            let comma = if start == 0 { "" } else { "," };
            let offsets = [start, data.len()];
            write!(
                header,
                r#"{comma}"{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{offsets:?}}}"#
            )
            .unwrap();
        }
        header.push('}');
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend(data);
        file
    }

    type Shapes = Vec<(&'static str, &'static [usize])>;

    type Files = BTreeMap<String, Source>;

    fn folder(change: impl FnOnce(&mut Json, &mut Shapes)) -> Result<Checkpoint> {
        from_files("folder", &files(change))
    }

    fn put(files: &mut Files, name: &str, bytes: impl Into<Vec<u8>>) {
        files.insert(name.into(), Source::from_vec(name, bytes.into()));
    }

    fn files(change: impl FnOnce(&mut Json, &mut Shapes)) -> Files {
        let mut config = serde_json::json!({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
            "rms_norm_eps": 1e-5, "eos_token_id": [2, 3], "bos_token_id": 1,
        });
        let mut tensors: Shapes = vec![
            ("model.embed_tokens.weight", &[5, 8]),
            ("model.layers.0.input_layernorm.weight", &[8]),
            ("model.layers.0.self_attn.q_proj.weight", &[8, 8]),
            ("model.layers.0.self_attn.k_proj.weight", &[4, 8]),
            ("model.layers.0.self_attn.v_proj.weight", &[4, 8]),
            ("model.layers.0.self_attn.o_proj.weight", &[8, 8]),
            ("model.layers.0.post_attention_layernorm.weight", &[8]),
            ("model.layers.0.mlp.gate_proj.weight", &[12, 8]),
            ("model.layers.0.mlp.up_proj.weight", &[12, 8]),
            ("model.layers.0.mlp.down_proj.weight", &[8, 12]),
            ("model.norm.weight", &[8]),
        ];
        change(&mut config, &mut tensors);
        let files = [
            ("config.json", config.to_string().into_bytes()),
            ("model.safetensors", safetensors(&tensors)),
        ];
        files.map(|(name, bytes)| (name.into(), Source::from_vec(name, bytes))).into()
    }

    /// What `of` with these files besides says of the tokenizer, or why it is refused.
    fn beside(extra: &[(&str, &[u8])]) -> Result<Metadata> {
        let mut all = files(|_, _| {});
        extra.iter().for_each(|(name, bytes)| put(&mut all, name, *bytes));
        from_files("folder", &all).map(|checkpoint| checkpoint.metadata)
    }

    #[test]
    fn weights_in_parts_are_found_and_missed() {
        let mut all = files(|_, tensors| tensors.truncate(10));
        let first = all.remove("model.safetensors").unwrap();
        let refused =
            |all: &Files| from_files("folder", all).err().expect("it is refused").to_string();
        assert!(refused(&all).contains("model.safetensors: is missing"));
        all.insert("model-00001-of-00002.safetensors".into(), first.clone());
        assert!(refused(&all).contains("model-00002-of-00002.safetensors: is missing"));
        let last = safetensors(&[("model.norm.weight", &[8])]);
        put(&mut all, "model-00002-of-00002.safetensors", last.clone());
        let checkpoint = from_files("folder", &all).unwrap();
        assert_eq!((checkpoint.tensors.len(), checkpoint.files.len()), (11, 2));
        // Names that nobody numbered.
        all.retain(|name, _| name == "config.json");
        all.insert("a.safetensors".into(), first);
        put(&mut all, "b.safetensors", last);
        assert_eq!(from_files("folder", &all).unwrap().tensors.len(), 11);
    }

    #[test]
    fn a_tensor_in_two_files_is_refused() {
        let mut all = files(|_, _| {});
        put(&mut all, "more.safetensors", safetensors(&[("model.norm.weight", &[8])]));
        let whole = all.remove("model.safetensors").unwrap();
        all.insert("all.safetensors".into(), whole);
        let error = from_files("folder", &all).err().expect("it is refused").to_string();
        assert!(error.contains("model.norm.weight: is in two files"), "{error}");
    }

    #[test]
    fn a_config_that_is_none_is_refused() {
        let spaces = [b"{}".as_slice(), &[b' '; MAX_JSON]].concat();
        for (bytes, word) in
            [(b"[]".as_slice(), "not an object"), (b"{", "parsed"), (&spaces, "too many")]
        {
            let mut all = files(|_, _| {});
            put(&mut all, "config.json", bytes);
            let error = from_files("folder", &all).err().expect("it is refused").to_string();
            assert!(error.contains("config.json") && error.contains(word), "{error}");
        }
    }

    #[test]
    fn schemes_that_are_not_read_are_named() {
        let open = |said: &Json| folder(|config, _| config["quantization_config"] = said.clone());
        for (said, word) in [
            (r#"{"quant_method": "bitsandbytes"}"#, "method bitsandbytes"),
            (r#"{"bits": 4, "checkpoint_format": "marlin"}"#, "checkpoint_format marlin"),
            (r#"{"bits": 9}"#, "bits: 9 is not between 2 and 8"),
            (r#"{"bits": 4, "group_size": 0}"#, "group_size: is neither -1"),
            (r#"{"quant_method": "awq", "version": "exllama"}"#, "AWQ version exllama"),
            (r#"{"quant_method": "awq", "w_bit": 3}"#, "AWQ with 3 bits"),
            (r#"{"quant_method": "compressed-tensors", "format": "dense"}"#, "the format dense"),
            (r#"{"quant_method": "compressed-tensors"}"#, "config_groups: is missing"),
            (r#"{"quant_method": "compressed-tensors", "config_groups": 1}"#, "not an object"),
            (r#"{"quant_method": "compressed-tensors", "config_groups": {"a": 1}}"#, "num_bits"),
        ] {
            let error = open(&said.parse().unwrap()).err().expect("it is refused").to_string();
            assert!(error.contains("quantization_config") && error.contains(word), "{error}");
        }
        // Matrices of floats may be there whatever is said of others.
        for said in [
            r#"{"quant_method": "awq", "version": "GEMV", "w_bit": 4, "q_group_size": -1}"#,
            r#"{"quant_method": "awq", "version": "gemv_fast", "bits": 4, "group_size": 64}"#,
            r#"{"quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 32}}}}"#,
        ] {
            assert_eq!(open(&said.parse().unwrap()).unwrap().tensors.len(), 11);
        }
    }

    #[test]
    fn weights_that_are_no_matrices_of_floats_are_refused() {
        let error = |all: Files| from_files("folder", &all).err().unwrap().to_string();
        let text = error(files(|_, tensors| tensors[3].1 = &[0, 8]));
        assert!(text.contains("k_proj.weight: has the shape [0, 8], which is none"), "{text}");
        let named = "model.layers.0.self_attn.k_proj.qweight";
        let text = error(files(|_, tensors| tensors[3].0 = named));
        assert!(text.contains("no quantization_config says how"), "{text}");
        let mut all = files(|_, _| {});
        let integers = safetensors_of("I32", &[("model.embed_tokens.weight", &[5, 8])]);
        put(&mut all, "model.safetensors", integers);
        let text = error(all);
        assert!(text.contains("has the type I32"), "{text}");
    }

    #[test]
    fn what_a_folder_says_of_its_tokenizer() {
        let named = br#"{"add_bos_token": true, "chat_template": [
            {"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}"#;
        let metadata = beside(&[
            ("tokenizer.json", b"{}"),
            ("tokenizer_config.json", named),
            ("generation_config.json", br#"{"eos_token_id": [7, 2]}"#),
        ])
        .unwrap();
        let text = |metadata: &Metadata, key: &str| metadata.get(key).cloned();
        assert_eq!(text(&metadata, "tokenizer.huggingface.json"), Some(Value::Text("{}".into())));
        assert_eq!(text(&metadata, "tokenizer.chat_template"), Some(Value::Text("yes".into())));
        assert_eq!(text(&metadata, "tokenizer.nybl.add_bos"), Some(Value::Bool(true)));
        let eos = text(&metadata, "tokenizer.nybl.eos_ids");
        assert_eq!(eos, Some(Value::Integers(vec![7, 2, 3])));
        // A file of its own is newer than the same in the settings.
        let one: (&str, &[u8]) = ("tokenizer_config.json", br#"{"chat_template": "old"}"#);
        let metadata = beside(&[one]).unwrap();
        assert_eq!(text(&metadata, "tokenizer.chat_template"), Some(Value::Text("old".into())));
        let metadata = beside(&[one, ("chat_template.jinja", b"new")]).unwrap();
        assert_eq!(text(&metadata, "tokenizer.chat_template"), Some(Value::Text("new".into())));
        let error = beside(&[("tokenizer.json", b"\xff")]).expect_err("no text").to_string();
        assert!(error.contains("tokenizer.json") && error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn tokens_added_to_a_sentencepiece_model_come_behind_it() {
        const MODEL: &[u8] =
            include_bytes!("../../ffi-tests/fixtures/sentencepiece/tokenizer.model");
        let with = |name: &str, json: String| {
            beside(&[("tokenizer.model", MODEL), (name, json.as_bytes())])
        };
        let texts = |metadata: &Metadata| match metadata.get("tokenizer.ggml.tokens") {
            Some(Value::Texts(texts)) => texts.clone(),
            other => panic!("{other:?}"),
        };
        let plain = texts(&with("ignored.json", String::new()).unwrap());
        let end = plain.len();
        let decoder = |id: usize, text: &str| {
            format!(
                r#"{{"add_bos_token": false, "added_tokens_decoder":
                {{"{id}": {{"content": "{text}", "special": true}}}}}}"#
            )
        };
        for (name, json) in [
            ("tokenizer_config.json", decoder(end, "<|x|>")),
            ("added_tokens.json", format!(r#"{{"<|x|>": {end}}}"#)),
        ] {
            let metadata = with(name, json).unwrap();
            assert_eq!(texts(&metadata)[end..], ["<|x|>"]);
            assert_eq!(metadata.get("tokenizer.ggml.eos_token_id"), Some(&Value::Unsigned(2)));
        }
        // One that is there already, one in another's place, one after a gap, and what is none.
        let known = with("tokenizer_config.json", decoder(5, &plain[5])).unwrap();
        assert_eq!(texts(&known), plain);
        for (name, json, why) in [
            ("tokenizer_config.json", decoder(5, "other"), "in tokenizer.model"),
            ("tokenizer_config.json", decoder(end + 1, "<|x|>"), "after a gap"),
            (
                "tokenizer_config.json",
                r#"{"added_tokens_decoder": {"x": {}}}"#.into(),
                "not a token",
            ),
            ("added_tokens.json", r#"{"<|x|>": "y"}"#.into(), "not a token"),
        ] {
            let error = with(name, json).expect_err("it is refused").to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn names_keys_and_rows_are_those_of_gguf() {
        let checkpoint = folder(|_, _| {}).unwrap();
        let metadata = &checkpoint.metadata;
        assert_eq!(metadata.integer("llama.rope.dimension_count", 99), Ok(Some(4)));
        let eos = metadata.get("tokenizer.nybl.eos_ids");
        assert_eq!(eos, Some(&Value::Integers(vec![2, 3])));
        assert_eq!(checkpoint.tensors.len(), 11);
        // Two heads of four rows: the second half of each goes between the rows of the first.
        let mut rows = Vec::new();
        checkpoint.tensors["blk.0.attn_q.weight"].rows(0, 8, &mut rows).unwrap();
        let firsts: Vec<_> = rows.chunks(8).map(|row| row[0] / 8.0).collect();
        assert_eq!(firsts, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        let mut rows = Vec::new();
        checkpoint.tensors["blk.0.attn_v.weight"].rows(1, 2, &mut rows).unwrap();
        assert_eq!((rows[0], rows[8]), (8.0, 16.0));
    }

    #[test]
    fn what_is_missing_unknown_or_wrong_is_named() {
        let error = |change: &dyn Fn(&mut Json, &mut Shapes)| {
            folder(change).err().expect("the folder is refused").to_string()
        };
        let text = error(&|_, tensors| {
            tensors.remove(3);
        });
        assert!(text.contains("layers.0.self_attn.k_proj.weight: is missing"), "{text}");
        let text = error(&|_, tensors| tensors.push(("model.layers.0.what.weight", &[1])));
        assert!(text.contains("model.layers.0.what.weight"), "{text}");
        let text = error(&|_, tensors| tensors[3].1 = &[2, 2, 8]);
        assert!(text.contains("3 dimensions"), "{text}");
        for (key, value, word) in [
            ("model_type", Json::from("mamba"), "mamba"),
            ("hidden_size", Json::from(0), "between"),
            ("hidden_size", Json::from("8"), "whole number"),
            ("num_hidden_layers", Json::from(1 << 20), "absurd"),
            ("rms_norm_eps", Json::Null, "missing"),
        ] {
            let text = error(&|config, _| config[key] = value.clone());
            assert!(text.contains("folder") && text.contains(word), "{key}: {text}");
        }
    }
}
