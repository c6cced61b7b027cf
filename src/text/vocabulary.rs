//! The tokenizer of a model file, from whichever keys the file has.
//!
//! GGUF holds a vocabulary; a packed file holds the finished tokenizer as JSON, with its tokens and merges and
//! the ids that the JSON does not name beside it. Files of version 1 have tokens and merges in the JSON, as
//! folders of Hugging Face do.
#![forbid(unsafe_code)]

use super::tokenizer::{Split, Tokenizer, Vocab};
use crate::error::Result;
use crate::file::metadata::{Metadata, Value};

const JSON: &str = "tokenizer.huggingface.json";
const TOKENS: &str = "tokenizer.nybl.tokens";
const MERGES: &str = "tokenizer.nybl.merges";
const BOS: &str = "tokenizer.nybl.bos_id";
const EOS: &str = "tokenizer.nybl.eos_ids";
const ADD_BOS: &str = "tokenizer.nybl.add_bos";

/// The tokenizer that `metadata` describes, or nothing when it describes none.
///
/// # Errors
/// [`crate::Error::Corrupt`] naming the key that is wrong, or when the vocabulary has another size than the
/// embedding's `vocab` rows; [`crate::Error::Unsupported`] for a kind of tokenizer that is not known.
pub fn tokenizer(metadata: &Metadata, vocab: usize) -> Result<Option<Tokenizer>> {
    let tokenizer = if let Some(json) = metadata.text(JSON)? {
        let bos = token(metadata, BOS)?;
        let add_bos = metadata.bool(ADD_BOS)?.unwrap_or(false);
        let eos = ids(metadata, EOS)?;
        match (metadata.get(TOKENS), metadata.get(MERGES)) {
            (None, None) => Tokenizer::from_json(json.as_bytes(), bos, eos, add_bos)?,
            (Some(Value::Texts(tokens)), Some(Value::Integers(merges))) => {
                let (tokens, merges) = (tokens.as_slice().into(), merges.as_slice().into());
                let split = Split { rest: json.into(), tokens, merges };
                Tokenizer::from_split(&split, bos, eos, add_bos)?
            }
            _ => {
                let reason = "are not a list of texts and a list of integers";
                return Err(metadata.error(&format!("{TOKENS} and {MERGES}"), reason));
            }
        }
    } else if let Some(model) = metadata.text("tokenizer.ggml.model")?.filter(|x| *x != "no_vocab")
    {
        Tokenizer::from_vocab(&read_vocab(metadata, model)?)?
    } else {
        return Ok(None);
    };
    // An embedding may be padded beyond its vocabulary, but a token without a row cannot be run.
    if tokenizer.vocab_size() > vocab {
        let reason =
            format!("has {} tokens, but the embedding has {vocab} rows", tokenizer.vocab_size());
        return Err(metadata.error("tokenizer", reason));
    }
    Ok(Some(tokenizer))
}

/// Writes `tokenizer` into the metadata of a packed file.
///
/// # Errors
/// [`crate::Error::Internal`] when it cannot be written as JSON.
pub fn store(tokenizer: &Tokenizer, metadata: &mut Metadata) -> Result<()> {
    match tokenizer.to_split()? {
        Some(split) => {
            metadata.set(JSON, Value::Text(split.rest.into_owned()));
            metadata.set(TOKENS, Value::Texts(split.tokens.into_owned()));
            metadata.set(MERGES, Value::Integers(split.merges.into_owned()));
        }
        None => metadata.set(JSON, Value::Text(tokenizer.to_json()?)),
    }
    metadata.set(ADD_BOS, Value::Bool(tokenizer.add_bos()));
    let eos = tokenizer.eos().iter().map(|id| i64::from(*id)).collect();
    metadata.set(EOS, Value::Integers(eos));
    if let Some(bos) = tokenizer.bos() {
        metadata.set(BOS, Value::Unsigned(bos.into()));
    }
    Ok(())
}

/// Whether `key` is a large part of a vocabulary: megabytes that the tokenizer holds already.
#[must_use]
pub fn is_large(key: &str) -> bool {
    let ggml = |key: &str| matches!(key, "tokens" | "scores" | "token_type" | "merges");
    [JSON, TOKENS, MERGES].contains(&key) || key.strip_prefix("tokenizer.ggml.").is_some_and(ggml)
}

fn read_vocab(metadata: &Metadata, model: &str) -> Result<Vocab> {
    let key = |suffix: &str| format!("tokenizer.ggml.{suffix}");
    let bool = |suffix: &str| metadata.bool(&key(suffix));
    let texts = |suffix: &str| match metadata.get(&key(suffix)) {
        None => Ok(Vec::new()),
        Some(Value::Texts(texts)) => Ok(texts.clone()),
        Some(_) => Err(metadata.error(&key(suffix), "is not an array of strings")),
    };
    let scores = match metadata.get(&key("scores")) {
        None => Vec::new(),
        Some(Value::Floats(scores)) => scores.clone(),
        Some(_) => return Err(metadata.error(&key("scores"), "is not an array of floats")),
    };
    let types = match metadata.get(&key("token_type")) {
        None => Vec::new(),
        Some(Value::Integers(types)) => {
            types.iter().map(|kind| i32::try_from(*kind).unwrap_or(-1)).collect()
        }
        Some(_) => return Err(metadata.error(&key("token_type"), "is not an array of integers")),
    };
    let pre = metadata.text(&key("pre"))?.unwrap_or_default().to_owned();
    let add_bos = bool("add_bos_token")?;
    Ok(Vocab {
        model: model.to_owned(),
        tokens: texts("tokens")?,
        merges: texts("merges")?,
        scores,
        types,
        bos: token(metadata, &key("bos_token_id"))?,
        eos: token(metadata, &key("eos_token_id"))?,
        unk: token(metadata, &key("unknown_token_id"))?,
        add_bos: add_bos.unwrap_or_else(|| Vocab::adds_bos_by_default(model, &pre)),
        add_eos: bool("add_eos_token")?.unwrap_or(false),
        add_space_prefix: bool("add_space_prefix")?.unwrap_or(true),
        pre,
    })
}

fn token(metadata: &Metadata, key: &str) -> Result<Option<u32>> {
    Ok(metadata.integer(key, u64::from(u32::MAX))?.map(|id| id as u32))
}

fn ids(metadata: &Metadata, key: &str) -> Result<Vec<u32>> {
    let wrong = || metadata.error(key, "is not a list of token ids");
    match metadata.get(key) {
        None => Ok(Vec::new()),
        Some(Value::Integers(ids)) => {
            ids.iter().map(|id| u32::try_from(*id).map_err(|_| wrong())).collect()
        }
        Some(_) => Err(wrong()),
    }
}
