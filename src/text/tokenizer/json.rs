//! A `tokenizer.json`, section by section.
//!
//! The large sections, tokens and merges, go straight into the tables that the model is built of: a tree of
//! JSON values in between would cost more than everything else that opening a model does.

use super::{Parts, Split, corrupt};
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
    if let Some(prefix) = &model.continuing_subword_prefix {
        builder = builder.continuing_subword_prefix(prefix.clone());
    }
    if let Some(suffix) = model.end_of_word_suffix {
        builder = builder.end_of_word_suffix(suffix);
    }
    let parts = Parts {
        builder,
        ids: model.vocab.0,
        merges: model.merges.into_iter().map(|Merge(left, right)| (left, right)).collect(),
        prefix: model.continuing_subword_prefix.unwrap_or_default(),
        unk: model.unk_token,
        field: "model",
        normalizer: section("normalizer", file.normalizer)?,
        cut: section("pre_tokenizer", file.pre_tokenizer)?,
        decoder: section("decoder", file.decoder)?,
    };
    Ok((parts, added))
}

/// Tokens by id and merges as pairs of ids, apart from the JSON of everything else: what a packed file
/// holds. Nothing for ids that leave gaps, which only JSON can say.
pub(super) fn split(json: &str) -> error::Result<Option<Split<'static>>> {
    let wrong = |reason: serde_json::Error| corrupt("json", reason.to_string());
    let mut file: Value = serde_json::from_str(json).map_err(wrong)?;
    let mut large = |key: &str, empty: Value| std::mem::replace(&mut file["model"][key], empty);
    let ids = large("vocab", Value::Object(Default::default()));
    let merges = large("merges", Value::Array(Vec::new()));
    let Tokens(ids) = serde_json::from_value(ids).map_err(wrong)?;
    let merges: Vec<Merge> = serde_json::from_value(merges).map_err(wrong)?;
    let mut tokens = vec![None; ids.len()];
    for (name, id) in &ids {
        if let Some(place) = tokens.get_mut(*id as usize) {
            *place = Some(name.clone());
        }
    }
    let tokens: Option<Vec<String>> = tokens.into_iter().collect();
    let of = |name: &str| ids.get(name).map(|id| i64::from(*id));
    let merges = merges.iter().flat_map(|Merge(left, right)| [of(left), of(right)]);
    let merges: Option<Vec<i64>> = merges.collect();
    let (Some(tokens), Some(merges)) = (tokens, merges) else { return Ok(None) };
    let rest = serde_json::to_string(&file).map_err(wrong)?;
    Ok(Some(Split { rest: rest.into(), tokens: tokens.into(), merges: merges.into() }))
}

/// The reverse of [`split`].
pub(super) fn join(
    rest: &[u8],
    tokens: &[String],
    merges: &[i64],
) -> error::Result<(Parts, Vec<(u32, AddedToken)>)> {
    let (mut parts, added) = read(rest)?;
    if !parts.ids.is_empty() || !parts.merges.is_empty() {
        return Err(corrupt("model", "has tokens in its JSON and beside it"));
    }
    parts.ids.reserve(tokens.len());
    for (token, id) in tokens.iter().zip(0..) {
        if parts.ids.insert(token.clone(), id).is_some() {
            return Err(corrupt("tokens", format!("{token:?} is the name of two tokens")));
        }
    }
    // A long token takes eight bytes of the file every time a merge names it: merges may not be
    // longer in all than those of any real vocabulary.
    let mut budget = (1 << 20) + 64 * tokens.iter().map(String::len).sum::<usize>();
    let (pairs, odd) = merges.as_chunks::<2>();
    if !odd.is_empty() {
        return Err(corrupt("merges", "are not pairs of tokens"));
    }
    parts.merges.reserve_exact(pairs.len());
    for (pair, rank) in pairs.iter().zip(0_usize..) {
        let token = |id: i64| usize::try_from(id).ok().and_then(|id| tokens.get(id));
        let (Some(left), Some(right)) = (token(pair[0]), token(pair[1])) else {
            let reason = format!("merge {rank} is {pair:?} in a vocabulary of {}", tokens.len());
            return Err(corrupt("merges", reason));
        };
        budget = budget
            .checked_sub(left.len() + right.len())
            .ok_or_else(|| corrupt("merges", format!("are too long, like merge {rank}")))?;
        parts.merges.push((left.clone(), right.clone()));
    }
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
