//! A `tokenizer.json`, section by section.
//!
//! The large sections, tokens and merges, go straight into the tables that the model is built of: a tree of
//! JSON values in between would cost more than everything else that opening a model does.

use super::{Parts, corrupt};
use crate::error::{self, Error};
use serde::Deserialize;
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use std::fmt;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{self, BPE};

#[derive(Deserialize)]
struct File<'a> {
    #[serde(borrow, default)]
    model: Option<&'a RawValue>,
    #[serde(borrow, default)]
    normalizer: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pre_tokenizer: Option<&'a RawValue>,
    #[serde(borrow, default)]
    decoder: Option<&'a RawValue>,
    #[serde(borrow, default)]
    added_tokens: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(default, rename = "type")]
    kind: Option<Value>,
}

#[derive(Deserialize)]
struct Model {
    vocab: Tokens,
    merges: Vec<Merge>,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: Option<bool>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
}

/// Names and ids.
struct Tokens(bpe::Vocab);

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Tokens;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tokens and their ids")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tokens, A::Error> {
                let mut tokens = bpe::Vocab::default();
                while let Some((name, id)) = map.next_entry()? {
                    tokens.insert(name, id);
                }
                Ok(Tokens(tokens))
            }
        }
        from.deserialize_map(Map)
    }
}

/// Two neighbours that become one: a list of two, in older files a text with a space between.
struct Merge(String, String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a merge of two tokens")
            }
            fn visit_str<E: serde::de::Error>(self, line: &str) -> Result<Merge, E> {
                match line.split_once(' ') {
                    Some((left, right)) if !right.contains(' ') => {
                        Ok(Merge(left.into(), right.into()))
                    }
                    _ => Err(E::custom(format!("a merge that is not two tokens: {line:?}"))),
                }
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Merge, A::Error> {
                let missing = || A::Error::custom("a merge of fewer than two tokens");
                let left = list.next_element()?.ok_or_else(missing)?;
                let right = list.next_element()?.ok_or_else(missing)?;
                Ok(Merge(left, right))
            }
        }
        from.deserialize_any(Pair)
    }
}

/// What the file says, and its added tokens.
pub(super) fn read(json: &[u8]) -> error::Result<(Parts, Vec<(u32, AddedToken)>)> {
    // A struct may also be read from a list of its fields.
    if !json.trim_ascii_start().starts_with(b"{") {
        return Err(corrupt("json", "not an object"));
    }
    let file: File<'_> =
        serde_json::from_slice(json).map_err(|reason| corrupt("json", reason.to_string()))?;
    let section = |name: &str, text: Option<&RawValue>| {
        let value = text.map(|text| serde_json::from_str(text.get())).transpose();
        Ok(value.map_err(|reason| corrupt(name, reason.to_string()))?.unwrap_or(Value::Null))
    };
    let added = match section("added_tokens", file.added_tokens)? {
        Value::Null => Vec::new(),
        Value::Array(entries) => {
            entries.into_iter().map(added_token).collect::<error::Result<_>>()?
        }
        _ => return Err(corrupt("added_tokens", "not a list")),
    };

    let wrong = |reason: serde_json::Error| corrupt("model", reason.to_string());
    let text = file.model.ok_or_else(|| corrupt("model", "missing"))?.get();
    let Kind { kind } = serde_json::from_str(text).map_err(wrong)?;
    if let Some(kind) = kind.filter(|kind| *kind != "BPE") {
        return Err(Error::Unsupported(format!("a tokenizer of type {kind}; only BPE is known")));
    }
    let model: Model = serde_json::from_str(text).map_err(wrong)?;
    let mut builder = BPE::builder()
        .fuse_unk(model.fuse_unk.unwrap_or(false))
        .byte_fallback(model.byte_fallback.unwrap_or(false))
        .ignore_merges(model.ignore_merges.unwrap_or(false));
    if let Some(prefix) = model.continuing_subword_prefix {
        builder = builder.continuing_subword_prefix(prefix);
    }
    if let Some(suffix) = model.end_of_word_suffix {
        builder = builder.end_of_word_suffix(suffix);
    }
    let parts = Parts {
        builder,
        ids: model.vocab.0,
        merges: model.merges.into_iter().map(|Merge(left, right)| (left, right)).collect(),
        unk: model.unk_token,
        field: "model",
        normalizer: section("normalizer", file.normalizer)?,
        cut: section("pre_tokenizer", file.pre_tokenizer)?,
        decoder: section("decoder", file.decoder)?,
    };
    Ok((parts, added))
}

/// An entry of `added_tokens`.
fn added_token(entry: Value) -> error::Result<(u32, AddedToken)> {
    let id = entry["id"].as_u64().and_then(|id| u32::try_from(id).ok());
    let id = id.ok_or_else(|| corrupt("added_tokens", format!("no id in {entry}")))?;
    let token =
        serde_json::from_value(entry).map_err(|e| corrupt("added_tokens", e.to_string()))?;
    Ok((id, token))
}
