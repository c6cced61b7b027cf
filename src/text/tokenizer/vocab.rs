//! A GGUF vocabulary, checked and made into a tokenizer.

use super::cuts::{CUTS, Cut, sequence, split};
use super::pieces::byte_named;
use super::{Parts, corrupt};
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::cmp::{Ordering, Reverse};
use std::collections::HashSet;
use tokenizers::models::bpe::{self, BPE};
/// What SentencePiece writes for a space.
pub(super) const SPACE: char = '\u{2581}';

/// First character of the name given to a token whose text an earlier token already has.
pub(super) const ALIAS: char = '\u{FDD0}';

/// A vocabulary as the metadata of a GGUF file holds it.
#[derive(Debug, Clone, Default)]
pub struct Vocab {
    /// `tokenizer.ggml.model`: `llama` (SentencePiece BPE) or `gpt2` (byte-level BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: how byte-level text is cut before merging; empty if absent.
    pub pre: String,
    /// `tokenizer.ggml.tokens`: the text of each token.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`: one for each token, or empty. `llama` needs them.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    /// 6 byte; one for each token, or empty.
    pub types: Vec<i32>,
    /// `tokenizer.ggml.merges`: `left right`, best first. `gpt2` needs them.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; for its absence see [`Vocab::adds_bos_by_default`].
    pub add_bos: bool,
    /// `tokenizer.ggml.add_eos_token`. Not obeyed: a prompt that is closed cannot be continued.
    pub add_eos: bool,
    /// `tokenizer.ggml.add_space_prefix`; a file without it means true for `llama`.
    pub add_space_prefix: bool,
}

impl Vocab {
    /// What a file that says nothing about `add_bos_token` means by that.
    #[must_use]
    pub fn adds_bos_by_default(model: &str, pre: &str) -> bool {
        match model {
            "llama" => true,
            "gpt2" => Cut::named(pre).is_some_and(|cut| cut.begins_with_bos),
            _ => false,
        }
    }
}

/// What may become of a token's text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Merging may produce it.
    Text,
    /// Stands for one byte of a character that the vocabulary lacks.
    Byte,
    /// Stands for what the vocabulary lacks.
    Unknown,
    /// Comes from templates and models, never from plain text.
    Control,
    /// Found in the text before anything else happens to it.
    User,
}

/// Checks what each list of the vocabulary says about the others, and says what each token is.
pub(super) fn kinds(v: &Vocab) -> Result<Vec<Kind>> {
    let count = v.tokens.len();
    if count == 0 {
        return Err(corrupt("tokenizer.ggml.tokens", "no tokens"));
    }
    if u32::try_from(count).is_err() {
        return Err(corrupt("tokenizer.ggml.tokens", format!("{count} tokens")));
    }
    if let Some(id) = v.tokens.iter().position(String::is_empty) {
        return Err(corrupt("tokenizer.ggml.tokens", format!("token {id} is empty")));
    }
    for (key, length) in
        [("tokenizer.ggml.scores", v.scores.len()), ("tokenizer.ggml.token_type", v.types.len())]
    {
        if length != 0 && length != count {
            return Err(corrupt(key, format!("{length} entries for {count} tokens")));
        }
    }
    for (key, id) in [
        ("tokenizer.ggml.bos_token_id", v.bos),
        ("tokenizer.ggml.eos_token_id", v.eos),
        ("tokenizer.ggml.unknown_token_id", v.unk),
    ] {
        if let Some(id) = id.filter(|id| *id as usize >= count) {
            return Err(corrupt(key, format!("id {id} in a vocabulary of {count}")));
        }
    }
    if v.add_bos && v.bos.is_none() {
        let reason = "add_bos_token is true, but there is no such token";
        return Err(corrupt("tokenizer.ggml.bos_token_id", reason));
    }

    let mut kinds = if v.types.is_empty() {
        let kind = |text: &String| if byte_named(text).is_some() { Kind::Byte } else { Kind::Text };
        v.tokens.iter().map(kind).collect()
    } else {
        v.types.iter().zip(0..).map(|(code, id)| kind_of(*code, id)).collect::<Result<Vec<_>>>()?
    };
    // A list of types may forget these three. But one that is a lone character is an id gone wrong
    // rather than a special token, and texts need the character.
    let named = [(v.bos, Kind::Control), (v.eos, Kind::Control), (v.unk, Kind::Unknown)];
    for (id, kind) in named.into_iter().filter_map(|(id, kind)| Some((id? as usize, kind))) {
        if kinds[id] == Kind::Text && v.tokens[id].chars().nth(1).is_some() {
            kinds[id] = kind;
        }
    }
    Ok(kinds)
}

pub(super) fn kind_of(code: i32, id: u32) -> Result<Kind> {
    match code {
        // Undefined, normal, unused.
        0 | 1 | 5 => Ok(Kind::Text),
        2 => Ok(Kind::Unknown),
        3 => Ok(Kind::Control),
        4 => Ok(Kind::User),
        6 => Ok(Kind::Byte),
        _ => Err(corrupt("tokenizer.ggml.token_type", format!("token {id} has type {code}"))),
    }
}

/// The names of the tokens in the tokenizer, where no two can be the same.
pub(super) fn names<'a>(v: &'a Vocab) -> Vec<String> {
    let mut taken = HashSet::with_capacity(v.tokens.len());
    let mut name = |text: &'a String, id: u32| {
        if taken.insert(text.as_str()) && !text.starts_with(ALIAS) {
            text.clone()
        } else {
            format!("{ALIAS}{id}:{text}")
        }
    };
    v.tokens.iter().zip(0..).map(|(text, id)| name(text, id)).collect()
}

/// The text of the token with this name.
pub(super) fn text_of(name: &str) -> &str {
    let alias = name.strip_prefix(ALIAS).and_then(|rest| rest.split_once(':'));
    alias.map_or(name, |(_, text)| text)
}

/// A `llama` vocabulary: characters are merged as the scores say, spaces are a character like any
/// other, and characters that the vocabulary lacks fall back to bytes.
pub(super) fn sentencepiece(
    v: &Vocab,
    kinds: &[Kind],
    names: &[String],
    ids: bpe::Vocab,
) -> Result<Parts> {
    if v.scores.is_empty() {
        return Err(corrupt("tokenizer.ggml.scores", "missing; a llama vocabulary needs them"));
    }
    if let Some(id) = v.scores.iter().position(|score| score.is_nan()) {
        return Err(corrupt("tokenizer.ggml.scores", format!("token {id} has no number")));
    }
    let is_text = |name: &str| {
        let kind = ids.get(name).map(|id| kinds[*id as usize]);
        kind == Some(Kind::Text) && !name.starts_with(ALIAS)
    };
    let text = || (0_u32..).zip(names).filter(|(_, name)| is_text(name));
    let merges = merges_by_score(v, text(), is_text)?;

    // A merge across the start of a word would have to make a token with a space inside. If there
    // is none, words can be merged one by one: the same ids from shorter lists.
    let mut steps = vec![];
    let space = SPACE.to_string();
    let mut has_space_inside = text().map(|(_, name)| has_space_inside(name));
    if is_text(&space) && !has_space_inside.any(|inside| inside) {
        steps.push(split(&word_pattern()));
    }

    let mut normalizers = vec![];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": space}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if v.add_space_prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": space}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": space}));

    let unk = v.unk.map(|id| names[id as usize].clone());
    Ok(Parts {
        builder: BPE::builder().byte_fallback(true).fuse_unk(true),
        ids,
        merges,
        prefix: String::new(),
        unk,
        field: "tokenizer.ggml.tokens",
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        cut: sequence(&steps),
        decoder: json!({"type": "Sequence", "decoders": decoders}),
    })
}

/// A word of a SentencePiece text, with the spaces in front.
pub(super) fn word_pattern() -> String {
    format!("{SPACE}+[^{SPACE}]*")
}

/// Whether a token reaches from one word into the next.
pub(super) fn has_space_inside(token: &str) -> bool {
    token.trim_start_matches(SPACE).contains(SPACE)
}

/// SentencePiece has no list of merges: two neighbours merge if together they are a token, and the
/// best score goes first, the leftmost pair among equals. So every way to cut a token into two
/// tokens is a merge, ranked by the token's score.
///
/// A merge here has a rank of its own, so equal scores need an order that has the same effect. The
/// tokens of equal score that can meet are, in real vocabularies, runs of spaces. Leftmost-first
/// grows a run from the left, one space at a time, and so does longer tokens first.
pub(super) fn merges_by_score<'a>(
    v: &Vocab,
    text: impl Iterator<Item = (u32, &'a String)>,
    is_text: impl Fn(&str) -> bool,
) -> Result<bpe::Merges> {
    // Real pieces are short. One long piece has as many halves as bytes, each to be hashed and
    // perhaps kept, so that a small file could ask for any amount of time and memory.
    let mut budget = (1 << 20) + 64 * v.tokens.iter().map(String::len).sum::<usize>();

    let mut merges = Vec::new();
    for (id, token) in text {
        for (at, _) in token.char_indices().skip(1) {
            budget = budget.checked_sub(token.len()).ok_or_else(|| {
                let reason = format!("too long to merge, like {id} of {} bytes", token.len());
                corrupt("tokenizer.ggml.tokens", reason)
            })?;
            let (left, right) = token.split_at(at);
            if is_text(left) && is_text(right) {
                merges.push((id, left, right));
            }
        }
    }
    let score = |id: u32| v.scores[id as usize];
    let length = |id: u32| Reverse(v.tokens[id as usize].len());
    merges.sort_by(|(a, ..), (b, ..)| {
        let by_score = score(*b).partial_cmp(&score(*a)).unwrap_or(Ordering::Equal);
        by_score.then_with(|| (length(*a), a).cmp(&(length(*b), b)))
    });
    Ok(merges.into_iter().map(|(_, left, right)| (left.into(), right.into())).collect())
}

/// A `gpt2` vocabulary: text is cut into words, words into bytes, and bytes are merged as listed.
pub(super) fn byte_level(v: &Vocab, kinds: &[Kind], ids: bpe::Vocab) -> Result<Parts> {
    let cut = Cut::named(&v.pre).ok_or_else(|| {
        let known: Vec<_> = CUTS.iter().flat_map(|cut| cut.names).copied().collect();
        Error::Unsupported(format!(
            "tokenizer.ggml.pre {:?}; known are {}",
            v.pre,
            known.join(", ")
        ))
    })?;
    let merges = listed_merges(v, kinds, &ids)?;
    let mut steps: Vec<_> = cut.patterns.iter().map(|pattern| split(pattern)).collect();
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false
    });
    steps.push(bytes.clone());
    Ok(Parts {
        builder: BPE::builder().ignore_merges(cut.whole_words),
        ids,
        merges,
        prefix: String::new(),
        unk: None,
        field: "tokenizer.ggml.merges",
        normalizer: Value::Null,
        cut: sequence(&steps),
        decoder: bytes,
    })
}

pub(super) fn listed_merges(v: &Vocab, kinds: &[Kind], ids: &bpe::Vocab) -> Result<bpe::Merges> {
    let field = "tokenizer.ggml.merges";
    let longer =
        |(text, kind): (&String, &Kind)| *kind == Kind::Text && text.chars().nth(1).is_some();
    if v.merges.is_empty() && v.tokens.iter().zip(kinds).any(longer) {
        return Err(corrupt(field, "missing; a gpt2 vocabulary needs them"));
    }
    let mut seen = HashSet::with_capacity(v.merges.len());
    let mut merges = bpe::Merges::new();
    for (line, rank) in v.merges.iter().zip(0_usize..) {
        let Some((left, right)) = line.split_once(' ') else {
            return Err(corrupt(field, format!("merge {rank} is not two tokens: {line:?}")));
        };
        let id = |name: &str| {
            let reason = || format!("merge {rank} names {name:?}, which is no token");
            ids.get(name).copied().ok_or_else(|| corrupt(field, reason()))
        };
        let pair = (id(left)?, id(right)?);
        let merged = id(&format!("{left}{right}"))?;
        // For the crate the last of two equal merges would win.
        if seen.insert(pair) && kinds[merged as usize] == Kind::Text {
            merges.push((left.into(), right.into()));
        }
    }
    Ok(merges)
}
