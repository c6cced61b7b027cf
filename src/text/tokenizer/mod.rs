//! Text to token ids and back.
//!
//! There is one implementation of tokenizing, the `tokenizers` crate, and one form to keep it in:
//! that crate's JSON, with tokens and merges as arrays beside it ([`Split`]), because parsing them takes
//! longer than all else that opening a model does. A GGUF vocabulary is only strings with scores or merges,
//! so it is turned into such a tokenizer once, and a packed file stores the result.
//!
//! Three things do not come from that crate. A control token never comes out of plain text,
//! whatever the vocabulary claims. Text that the vocabulary cannot represent is an error, not a
//! silent gap. And decoding is a table of bytes for each token, so that a stream of pieces is by
//! construction the same text as all of it at once.

#![forbid(unsafe_code)]

mod cuts;
mod json;
mod pieces;
#[cfg(test)]
mod tests;
mod vocab;
mod words;

pub use vocab::Vocab;

use pieces::{Decoding, Pieces};
use vocab::{Kind, SPACE, byte_level, has_space_inside, kinds, names, sentencepiece};
use words::Words;

use std::borrow::Cow;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::Value;
use tokenizers::models::bpe::{self, BpeBuilder};
use tokenizers::{
    AddedToken, AddedVocabulary, DecoderWrapper, Model, NormalizerWrapper, OffsetReferential,
    OffsetType, PreTokenizer, PreTokenizerWrapper, Token,
};

use crate::error::{Error, Result};
/// Control tokens that end a turn. A chat model stops with one of these, while the one
/// end-of-sequence id of its file is often still that of the base model.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
];

/// Encodes and decodes text for one model. Share it behind an `Arc`: nothing in it changes.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The added tokens of `inner`, blind to the special ones.
    plain: AddedVocabulary,
    /// The quick way, where there is one.
    words: Option<Words>,
    /// Whether added tokens can occur in plain text, and in text whose special tokens count.
    may_hold_added: [bool; 2],
    pieces: Pieces,
    /// The one special token that plain text may produce.
    unk: Option<u32>,
    bos: Option<u32>,
    eos: Vec<u32>,
    add_bos: bool,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("add_bos", &self.add_bos)
            .finish_non_exhaustive()
    }
}

/// A tokenizer whose large parts lie beside its JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split<'a> {
    /// A `tokenizer.json` without tokens and merges.
    pub rest: Cow<'a, str>,
    /// The model's tokens by id.
    pub tokens: Cow<'a, [String]>,
    /// Pairs of ids that become one, best first: left, right, left, right.
    pub merges: Cow<'a, [i64]>,
}

/// What a token stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Name {
    /// The token that begins a text.
    Begin,
    /// The one that ends it.
    End,
    /// Another one that is not text, by its name.
    Special(String),
    /// These bytes.
    Text(Box<[u8]>),
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file.
    ///
    /// A token whose text an earlier token has keeps its id and decodes to that text; encoding
    /// uses the earlier one. Besides `v.eos`, control tokens with a well-known name for the end of
    /// a turn count as end of sequence.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model or pre-tokenizer this build does not know, with the names
    /// it does; [`Error::Corrupt`] with the metadata key for a vocabulary that contradicts itself.
    pub fn from_vocab(v: &Vocab) -> Result<Self> {
        let kinds = kinds(v)?;
        let names = names(v);
        let ids = names.iter().zip(0..).map(|(name, id)| (name.clone(), id)).collect();
        let parts = match v.model.as_str() {
            "llama" => sentencepiece(v, &kinds, &names, ids)?,
            "gpt2" => byte_level(v, &kinds, ids)?,
            other => {
                return Err(Error::Unsupported(format!(
                    "tokenizer.ggml.model {other:?}; known are \"llama\" and \"gpt2\""
                )));
            }
        };

        let added = names.iter().zip(&kinds).zip(0..).filter_map(|((name, kind), id)| match kind {
            Kind::Control | Kind::Unknown => Some((id, AddedToken::from(name, true))),
            Kind::User => Some((id, AddedToken::from(name, false).normalized(false))),
            Kind::Text | Kind::Byte => None,
        });

        let mut eos = Vec::from_iter(v.eos);
        eos.extend((0..).zip(&v.tokens).zip(&kinds).filter_map(|((id, text), kind)| {
            let ends_turn = *kind == Kind::Control && END_OF_TURN.contains(&text.as_str());
            (ends_turn && v.eos != Some(id)).then_some(id)
        }));
        Self::assemble(parts, &added.collect::<Vec<_>>(), v.bos, eos, v.add_bos)
    }

    /// Reads a `tokenizer.json`, or what [`Tokenizer::to_json`] wrote.
    ///
    /// The file's own idea of special tokens around a text (`post_processor`) and its truncation
    /// and padding are ignored: `bos`, `eos` and `add_bos` say what the model wants.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model that is not BPE or a decoder that cannot stream,
    /// [`Error::Corrupt`] with the section for anything else that is wrong.
    pub fn from_json(json: &[u8], bos: Option<u32>, eos: Vec<u32>, add_bos: bool) -> Result<Self> {
        let (parts, added) = json::read(json)?;
        Self::assemble(parts, &added, bos, eos, add_bos)
    }

    /// Reads what [`Tokenizer::to_split`] wrote.
    ///
    /// # Errors
    /// As [`Tokenizer::from_json`].
    pub fn from_split(
        split: &Split<'_>,
        bos: Option<u32>,
        eos: Vec<u32>,
        add_bos: bool,
    ) -> Result<Self> {
        let (parts, added) = json::join(split.rest.as_bytes(), &split.tokens, &split.merges)?;
        Self::assemble(parts, &added, bos, eos, add_bos)
    }

    fn assemble(
        parts: Parts,
        added: &[(u32, AddedToken)],
        bos: Option<u32>,
        eos: Vec<u32>,
        add_bos: bool,
    ) -> Result<Self> {
        check_merges(&parts)?;
        let Parts { builder, ids, merges, prefix: _, unk, field, normalizer, cut, decoder } = parts;
        // Where one token is all three, unknown text would end the text.
        let unk = unk.and_then(|name| Some((*ids.get(&name)?, name)));
        let unk = unk.filter(|(id, _)| bos != Some(*id) && !eos.contains(id));
        let decoding = Decoding::read(&decoder)?;
        let pieces = Pieces::new(&ids, added, &decoding)?;
        // Added tokens that are looked for in what the normalizer wrote need the normalizer.
        let words = if normalizer.is_null() || added.iter().all(|(_, token)| !token.normalized) {
            Words::of(&normalizer, &cut, || merges_within_words(&ids, added))
        } else {
            None
        };
        let may_hold_added = [added.iter().any(|(_, token)| !token.special), !added.is_empty()];

        // No dropout: it would make the ids of a text a matter of chance. No cache: the crate's lives in a
        // thread-local map that is never emptied, so every tokenizer ever opened on a long-lived
        // thread would stay in memory there.
        let builder = match &unk {
            Some((_, name)) => builder.unk_token(name.clone()),
            None => builder,
        };
        let builder = builder.cache_capacity(0).vocab_and_merges(ids, merges);
        let model = guarded(|why| corrupt(field, why), || builder.build())?;
        let unk = unk.map(|(id, _)| id);
        let mut inner = tokenizers::Tokenizer::new(model);
        guarded(
            |why| corrupt("normalizer", why),
            || {
                let normalizer: Option<NormalizerWrapper> = serde_json::from_value(normalizer)?;
                inner.with_normalizer(normalizer).map(|_| ())
            },
        )?;
        guarded(
            |why| corrupt("pre_tokenizer", why),
            || {
                let cut: Option<PreTokenizerWrapper> = serde_json::from_value(cut)?;
                inner.with_pre_tokenizer(cut);
                Ok(())
            },
        )?;
        guarded(
            |why| corrupt("decoder", why),
            || {
                let decoder: Option<DecoderWrapper> = serde_json::from_value(decoder)?;
                inner.with_decoder(decoder);
                Ok(())
            },
        )?;
        guarded(
            |why| corrupt("added_tokens", why),
            || inner.add_tokens(added.iter().map(|(_, token)| token.clone())),
        )?;
        // The crate numbers added tokens itself and only logs that the file says otherwise.
        for (id, token) in added {
            if inner.token_to_id(&token.content) != Some(*id) {
                return Err(corrupt(
                    "added_tokens",
                    format!("{:?} cannot have id {id} in this vocabulary", token.content),
                ));
            }
        }

        let special_ids = bos.iter().map(|id| ("bos", id)).chain(eos.iter().map(|id| ("eos", id)));
        for (field, id) in special_ids {
            if *id as usize >= pieces.len() {
                let reason = format!("id {id} in a vocabulary of {}", pieces.len());
                return Err(corrupt(field, reason));
            }
        }
        if add_bos && bos.is_none() {
            return Err(corrupt("bos", "texts are to begin with it, but it has no id"));
        }

        let mut plain = inner.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        Ok(Self { inner, plain, words, may_hold_added, pieces, unk, bos, eos, add_bos })
    }

    /// The tokenizer as JSON, compact. With the same `bos`, `eos` and `add_bos`,
    /// [`Tokenizer::from_json`] makes one of it that behaves identically.
    ///
    /// # Errors
    /// [`Error::Internal`] if the JSON cannot be written.
    pub fn to_json(&self) -> Result<String> {
        guarded(Error::Internal, || Ok(serde_json::to_string(&self.inner)?))
    }

    /// The tokenizer in parts that are read quickly; nothing where its ids leave gaps, which only
    /// [`Tokenizer::to_json`] can say.
    ///
    /// # Errors
    /// As [`Tokenizer::to_json`].
    pub fn to_split(&self) -> Result<Option<Split<'static>>> {
        json::split(&self.to_json()?)
    }

    /// The number of ids: one more than the highest.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// What every token stands for, by id: what tokens of two vocabularies are compared by.
    #[must_use]
    pub fn names(&self) -> Vec<Name> {
        let name = |id: u32| match self.pieces.get(id) {
            _ if self.bos == Some(id) => Name::Begin,
            _ if self.eos.first() == Some(&id) => Name::End,
            Ok(text) if !self.is_control(id) => Name::Text(text.into()),
            _ => Name::Special(self.inner.id_to_token(id).unwrap_or_default()),
        };
        (0..self.vocab_size() as u32).map(name).collect()
    }

    /// The beginning-of-sequence id.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The ids that end a text, the one that the file declares first.
    #[must_use]
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The spelling of a token, as the vocabulary has it.
    #[must_use]
    pub fn name(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The spellings of all control tokens.
    #[must_use]
    pub fn control_names(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder();
        added.into_values().filter(|token| token.special).map(|token| token.content).collect()
    }

    /// Whether the model wants its texts to begin with [`Tokenizer::bos`].
    #[must_use]
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// The ids of `text`.
    ///
    /// `add_special` puts the beginning-of-sequence id in front if the model wants it.
    /// `parse_special` says whether the text of a special token becomes that token: true for
    /// a chat template's own words, false for whatever a user typed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `text` has a character that the vocabulary cannot represent,
    /// or one that, for this vocabulary, is a control token.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        if add_special && self.add_bos {
            ids.extend(self.bos);
        }
        ids.extend(guarded(Error::Internal, || self.ids_of(text, parse_special))?);
        Ok(ids)
    }

    fn ids_of(&self, text: &str, parse_special: bool) -> tokenizers::Result<Vec<u32>> {
        let added = if parse_special { self.inner.get_added_vocabulary() } else { &self.plain };
        if let Some(words) = &self.words {
            return self.quick_ids_of(words, added, text, parse_special);
        }
        let mut words = added.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(cut) = self.inner.get_pre_tokenizer() {
            cut.pre_tokenize(&mut words)?;
        }
        words.tokenize(|word| self.tokens_of(word.get(), parse_special))?;
        Ok(words.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
    }

    /// The same ids as by all steps of the crate.
    fn quick_ids_of(
        &self,
        words: &Words,
        added: &AddedVocabulary,
        text: &str,
        parse_special: bool,
    ) -> tokenizers::Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 4);
        let model = |word: &str, ids: &mut Vec<u32>| -> tokenizers::Result<()> {
            ids.extend(self.tokens_of(word, parse_special)?.iter().map(|token| token.id));
            Ok(())
        };
        if !self.may_hold_added[usize::from(parse_special)] {
            words.encode(text, parse_special, &mut ids, model)?;
            return Ok(ids);
        }
        let parts = added.extract_and_normalize(None::<&NormalizerWrapper>, text);
        for (part, _, tokens) in parts.get_splits(OffsetReferential::Original, OffsetType::None) {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => words.encode(part, parse_special, &mut ids, model)?,
            }
        }
        Ok(ids)
    }

    fn tokens_of(&self, word: &str, parse_special: bool) -> tokenizers::Result<Vec<Token>> {
        let tokens = self.merged(word)?;
        if parse_special || !tokens.iter().any(|token| self.is_control(token.id)) {
            return Ok(tokens);
        }
        // The name of a control token is also a word that merging arrives at. One character at
        // a time there is nothing to merge.
        let mut single = [0; 4];
        let mut apart = Vec::new();
        for c in word.chars() {
            let tokens = self.merged(c.encode_utf8(&mut single))?;
            if tokens.iter().any(|token| self.is_control(token.id)) {
                let why = format!("{c:?} is a control token of this vocabulary, so not text");
                return Err(Error::InvalidArgument(why).into());
            }
            apart.extend(tokens);
        }
        Ok(apart)
    }

    /// What the model makes of a word, provided that it is all of the word: without an unknown
    /// token the crate leaves out what it does not know.
    fn merged(&self, word: &str) -> tokenizers::Result<Vec<Token>> {
        let tokens = self.inner.get_model().tokenize(word)?;
        if tokens.last().map_or(0, |token| token.offsets.1) == word.len() {
            return Ok(tokens);
        }
        let start: String = word.chars().take(20).collect();
        let why = format!("the vocabulary lacks a character of the word that begins {start:?}");
        Err(Error::InvalidArgument(why).into())
    }

    fn is_control(&self, id: u32) -> bool {
        self.pieces.special.get(id as usize) == Some(&true) && self.unk != Some(id)
    }

    /// The text of `ids`, special tokens left out. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an id that is not below [`Tokenizer::vocab_size`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut stream = self.stream();
        let mut text = String::new();
        for id in ids {
            stream.feed(self.pieces.get(*id)?, &mut text);
        }
        stream.flush(&mut text);
        Ok(text)
    }

    /// Starts decoding token by token, at the beginning of a text.
    ///
    /// Where a vocabulary begins every text with a space, the first piece loses it again. To go on
    /// from a prompt, push the prompt's ids first and drop what they return.
    #[must_use]
    pub fn stream(&self) -> Detokenizer {
        Detokenizer { strip_space: self.pieces.strip_space, partial: Vec::new() }
    }

    /// A stream that goes on after `ids`: their text is not repeated, and the first piece keeps its
    /// leading space.
    ///
    /// # Errors
    /// As [`Detokenizer::push`].
    pub fn stream_after(&self, ids: &[u32]) -> Result<Detokenizer> {
        let mut stream = self.stream();
        for id in ids {
            stream.push(self, *id)?;
        }
        Ok(stream)
    }
}

/// Decodes token by token; [`Tokenizer::stream`] makes one. All that it returns, put together, is
/// what [`Tokenizer::decode`] returns for all the ids at once.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    strip_space: bool,
    /// The beginning of a character whose last byte has not arrived: three bytes at most.
    partial: Vec<u8>,
}

impl Detokenizer {
    /// The text that became certain with this token: never half a character, and empty while one is
    /// incomplete. `tokenizer` is the one that made this stream.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an id that is not below [`Tokenizer::vocab_size`]; the stream
    /// is as it was.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        let piece = tokenizer.pieces.get(id)?;
        let mut text = String::new();
        self.feed(piece, &mut text);
        Ok(text)
    }

    /// What is still held back when no more tokens come: U+FFFD for an incomplete character.
    /// The stream is then at the beginning of a new text.
    ///
    /// # Errors
    /// None at present.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let mut text = String::new();
        self.flush(&mut text);
        *self = tokenizer.stream();
        Ok(text)
    }

    fn feed(&mut self, mut piece: &[u8], text: &mut String) {
        if self.strip_space && !piece.is_empty() {
            self.strip_space = false;
            piece = piece.strip_prefix(b" ").unwrap_or(piece);
        }
        self.partial.extend_from_slice(piece);
        let mut done = 0;
        for chunk in self.partial.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let rest = &self.partial[done..];
            if is_incomplete(rest) {
                break;
            }
            if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                done += chunk.invalid().len();
            }
        }
        self.partial.drain(..done);
    }

    fn flush(&mut self, text: &mut String) {
        if !self.partial.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.partial.clear();
        }
    }
}

/// Whether more bytes could still make a character of these.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
}

/// What a tokenizer is put together from; the last three as in its JSON.
struct Parts {
    /// The model but for what follows.
    builder: BpeBuilder,
    ids: bpe::Vocab,
    merges: bpe::Merges,
    /// What the second part of a merge begins with, and its result is without.
    prefix: String,
    unk: Option<String>,
    /// Where a fault of the model is, for messages.
    field: &'static str,
    normalizer: Value,
    cut: Value,
    decoder: Value,
}

/// The crate writes what a merge makes into a buffer of the longest token's length, and takes it for UTF-8, before it
/// looks whether that is a token.
fn check_merges(Parts { ids, merges, prefix, field, .. }: &Parts) -> Result<()> {
    let longest = ids.keys().map(String::len).max().unwrap_or(0);
    for ((left, right), rank) in merges.iter().zip(0_usize..) {
        let Some(rest) = right.strip_prefix(prefix.as_str()) else {
            let reason = format!("merge {rank}: {right:?} does not begin with {prefix:?}");
            return Err(corrupt(field, reason));
        };
        if left.len() + rest.len() > longest {
            let reason = format!("merge {rank}: {left:?} and {rest:?} make no token");
            return Err(corrupt(field, reason));
        }
    }
    Ok(())
}

/// Whether words of a SentencePiece text can be merged one by one.
fn merges_within_words(ids: &bpe::Vocab, added: &[(u32, AddedToken)]) -> bool {
    let is_added = |name: &str| added.iter().any(|(_, token)| token.content == name);
    let space = SPACE.to_string();
    ids.contains_key(&space)
        && !is_added(&space)
        && !ids.keys().any(|name| has_space_inside(name) && !is_added(name))
}

/// Runs code of the `tokenizers` crate: its errors, and its panics, which untrusted JSON can
/// provoke, become ours. An [`Error`] that passes through stays what it is.
fn guarded<T>(
    error: impl Fn(String) -> Error,
    work: impl FnOnce() -> tokenizers::Result<T>,
) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(made)) => Ok(made),
        Ok(Err(e)) => Err(e.downcast::<Error>().map_or_else(|e| error(e.to_string()), |e| *e)),
        Err(_) => Err(error("the tokenizers crate panicked".into())),
    }
}

fn corrupt(field: &str, reason: impl Into<String>) -> Error {
    Error::corrupt("tokenizer", field, reason)
}
