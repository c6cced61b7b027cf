//! Text to token ids and back.
//!
//! There is one implementation of tokenizing, the `tokenizers` crate, and one form to keep it in:
//! that crate's JSON. A GGUF vocabulary is only strings with scores or merges, so it is turned into
//! such a tokenizer once, and a packed file stores the JSON text of the result.
//!
//! Three things do not come from that crate. A control token never comes out of plain text,
//! whatever the vocabulary claims. Text that the vocabulary cannot represent is an error, not a
//! silent gap. And decoding is a table of bytes for each token, so that a stream of pieces is by
//! construction the same text as all of it at once.

#![forbid(unsafe_code)]

use std::cmp::{Ordering, Reverse};
use std::collections::HashSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::{Value, json};
use tokenizers::models::bpe::{self, BPE};
use tokenizers::{
    AddedToken, AddedVocabulary, DecoderWrapper, Model, NormalizerWrapper, OffsetType,
    PreTokenizer, PreTokenizerWrapper, Token,
};

use crate::error::{Error, Result};

/// What SentencePiece writes for a space.
const SPACE: char = '\u{2581}';

/// First character of the name given to a token whose text an earlier token already has.
const ALIAS: char = '\u{FDD0}';

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

/// Encodes and decodes text for one model. Share it behind an `Arc`: nothing in it changes.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The added tokens of `inner`, blind to the special ones.
    plain: AddedVocabulary,
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
        let mut file: Value =
            serde_json::from_slice(json).map_err(|e| corrupt("json", e.to_string()))?;
        if !file.is_object() {
            return Err(corrupt("json", "not an object"));
        }
        let mut section = |name: &str| file.get_mut(name).map_or(Value::Null, Value::take);

        let Value::Object(mut model) = section("model") else {
            return Err(corrupt("model", "not an object"));
        };
        let kind = model.remove("type").unwrap_or_else(|| "BPE".into());
        if kind != "BPE" {
            return Err(Error::Unsupported(format!(
                "a tokenizer of type {kind}; only BPE is known"
            )));
        }
        let model = guarded(
            |why| corrupt("model", why),
            || Ok(serde_json::from_value::<BPE>(Value::Object(model))?),
        )?;

        let added = match section("added_tokens") {
            Value::Null => Vec::new(),
            Value::Array(entries) => entries.into_iter().map(added_token).collect::<Result<_>>()?,
            _ => return Err(corrupt("added_tokens", "not a list")),
        };
        let parts = Parts {
            model,
            normalizer: section("normalizer"),
            cut: section("pre_tokenizer"),
            decoder: section("decoder"),
        };
        Self::assemble(parts, &added, bos, eos, add_bos)
    }

    fn assemble(
        parts: Parts,
        added: &[(u32, AddedToken)],
        bos: Option<u32>,
        eos: Vec<u32>,
        add_bos: bool,
    ) -> Result<Self> {
        let Parts { mut model, normalizer, cut, decoder } = parts;
        // Dropout would make the ids of a text a matter of chance. The cache lives in a
        // thread-local map that the crate never empties, so every tokenizer ever opened on a
        // long-lived thread would stay in memory there.
        model.dropout = None;
        model.resize_cache(0);
        // Where one token is all three, unknown text would end the text.
        let unk = model.unk_token.as_ref().and_then(|name| model.token_to_id(name));
        let unk = unk.filter(|id| bos != Some(*id) && !eos.contains(id));
        if unk.is_none() {
            model.unk_token = None;
        }
        let decoding = Decoding::read(&decoder)?;

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

        let pieces = Pieces::new(&inner, &decoding)?;
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
        Ok(Self { inner, plain, pieces, unk, bos, eos, add_bos })
    }

    /// The tokenizer as JSON, compact. With the same `bos`, `eos` and `add_bos`,
    /// [`Tokenizer::from_json`] makes one of it that behaves identically.
    ///
    /// # Errors
    /// [`Error::Internal`] if the JSON cannot be written.
    pub fn to_json(&self) -> Result<String> {
        guarded(Error::Internal, || Ok(serde_json::to_string(&self.inner)?))
    }

    /// The number of ids: one more than the highest.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
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
        let mut words = added.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(cut) = self.inner.get_pre_tokenizer() {
            cut.pre_tokenize(&mut words)?;
        }
        words.tokenize(|word| self.tokens_of(word.get(), parse_special))?;
        Ok(words.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
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

/// The bytes of every token, end to end.
struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    special: Vec<bool>,
    /// Whether the first byte of a text is the space that the normalizer put there.
    strip_space: bool,
}

impl Pieces {
    fn new(inner: &tokenizers::Tokenizer, decoding: &Decoding) -> Result<Self> {
        let names = inner.get_vocab(true);
        let Some(last) = names.values().max().map(|id| *id as usize) else {
            return Err(corrupt("model", "no tokens"));
        };
        // The tables below have a place for every id: one far-fetched id would make them huge.
        if last / 16 > names.len() {
            let reason = format!("{} tokens with ids up to {last}", names.len());
            return Err(corrupt("model", reason));
        }
        let size = last + 1;
        let mut by_id = vec![None; size];
        for (name, id) in &names {
            if by_id[*id as usize].replace(name.as_str()).is_some() {
                return Err(corrupt("model", format!("two tokens have id {id}")));
            }
        }

        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let mut pieces = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(size),
            special: Vec::with_capacity(size),
            strip_space: decoding.strip_space,
        };
        for (name, id) in by_id.into_iter().zip(0..) {
            let added = added.get(&id);
            let special = added.is_some_and(|token| token.special);
            if let Some(name) = name.filter(|_| !special) {
                decoding.append(text_of(name), added.is_some(), &mut pieces.bytes);
            }
            pieces.special.push(special);
            pieces.ends.push(pieces.bytes.len());
        }
        Ok(pieces)
    }

    fn len(&self) -> usize {
        self.ends.len()
    }

    fn get(&self, id: u32) -> Result<&[u8]> {
        let id = id as usize;
        let Some(end) = self.ends.get(id) else {
            let why = format!("token {id} in a vocabulary of {}", self.len());
            return Err(Error::InvalidArgument(why));
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        Ok(&self.bytes[start..*end])
    }
}

/// How the names of tokens become bytes: the `decoder` section, as far as each token can be decoded
/// without its neighbours.
#[derive(Default)]
struct Decoding {
    byte_of: Option<Box<[Option<u8>; 512]>>,
    byte_fallback: bool,
    replaced: Vec<(String, String)>,
    fused: bool,
    strip_space: bool,
}

impl Decoding {
    fn read(decoder: &Value) -> Result<Self> {
        let mut decoding = Self::default();
        match decoder.get("decoders").and_then(Value::as_array) {
            Some(steps) => steps.iter().try_for_each(|step| decoding.add(step))?,
            None => decoding.add(decoder)?,
        }
        Ok(decoding)
    }

    fn add(&mut self, step: &Value) -> Result<()> {
        let unsupported = || Error::Unsupported(format!("a tokenizer with the decoder {step}"));
        match step["type"].as_str().ok_or_else(unsupported)? {
            "ByteLevel" => self.byte_of = Some(byte_of()),
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => self.fused = true,
            "Replace" => {
                let pattern = step["pattern"]["String"].as_str().ok_or_else(unsupported)?;
                let content = step["content"].as_str().ok_or_else(unsupported)?;
                self.replaced.push((pattern.into(), content.into()));
            }
            "Metaspace" => {
                let mark = step["replacement"].as_str().ok_or_else(unsupported)?;
                self.replaced.push((mark.into(), " ".into()));
                self.strip_space = step["prepend_scheme"] != "never";
            }
            "Strip" if self.fused && step["content"] == " " && step["stop"] == 0 => {
                match step["start"].as_u64() {
                    Some(0) => {}
                    Some(1) => self.strip_space = true,
                    _ => return Err(unsupported()),
                }
            }
            _ => return Err(unsupported()),
        }
        Ok(())
    }

    fn append(&self, name: &str, added: bool, bytes: &mut Vec<u8>) {
        if let Some(byte) = byte_named(name).filter(|_| self.byte_fallback) {
            bytes.push(byte);
            return;
        }
        if let Some(byte_of) = &self.byte_of {
            let start = bytes.len();
            let in_alphabet = |c: char| byte_of.get(c as usize).copied().flatten();
            bytes.extend(name.chars().map_while(in_alphabet));
            // An added token is matched in the text itself, so its name is no byte code.
            if added || bytes.len() - start < name.chars().count() {
                bytes.truncate(start);
                bytes.extend_from_slice(name.as_bytes());
            }
            return;
        }
        let mut text = name.to_owned();
        for (pattern, content) in &self.replaced {
            text = text.replace(pattern, content);
        }
        bytes.extend_from_slice(text.as_bytes());
    }
}

/// The code of byte-level BPE, which writes bytes as printable characters: those that are printable
/// Latin-1 as themselves, the others in order from U+0100.
fn byte_of() -> Box<[Option<u8>; 512]> {
    let mut table = Box::new([None; 512]);
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if printable { usize::from(byte) } else { next };
        next += usize::from(!printable);
        table[code] = Some(byte);
    }
    table
}

/// The byte that a SentencePiece byte token stands for: `<0x0A>`.
fn byte_named(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    u8::from_str_radix(digits, 16).ok().filter(|_| hex)
}

/// What a tokenizer is put together from; the last three as in its JSON.
struct Parts {
    model: BPE,
    normalizer: Value,
    cut: Value,
    decoder: Value,
}

/// An entry of `added_tokens`.
fn added_token(entry: Value) -> Result<(u32, AddedToken)> {
    let id = entry["id"].as_u64().and_then(|id| u32::try_from(id).ok());
    let id = id.ok_or_else(|| corrupt("added_tokens", format!("no id in {entry}")))?;
    let token =
        serde_json::from_value(entry).map_err(|e| corrupt("added_tokens", e.to_string()))?;
    Ok((id, token))
}

/// What may become of a token's text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
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
fn kinds(v: &Vocab) -> Result<Vec<Kind>> {
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

fn kind_of(code: i32, id: u32) -> Result<Kind> {
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
fn names<'a>(v: &'a Vocab) -> Vec<String> {
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
fn text_of(name: &str) -> &str {
    let alias = name.strip_prefix(ALIAS).and_then(|rest| rest.split_once(':'));
    alias.map_or(name, |(_, text)| text)
}

/// A `llama` vocabulary: characters are merged as the scores say, spaces are a character like any
/// other, and characters that the vocabulary lacks fall back to bytes.
fn sentencepiece(v: &Vocab, kinds: &[Kind], names: &[String], ids: bpe::Vocab) -> Result<Parts> {
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
    let inside = |name: &str| name.trim_start_matches(SPACE).contains(SPACE);
    if is_text(&space) && !text().any(|(_, name)| inside(name)) {
        steps.push(split(&format!("{SPACE}+[^{SPACE}]*")));
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
    let mut model = BPE::builder().byte_fallback(true).fuse_unk(true);
    if let Some(unk) = unk {
        model = model.unk_token(unk);
    }
    let field = "tokenizer.ggml.tokens";
    let model = guarded(|why| corrupt(field, why), || model.vocab_and_merges(ids, merges).build())?;
    Ok(Parts {
        model,
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        cut: sequence(&steps),
        decoder: json!({"type": "Sequence", "decoders": decoders}),
    })
}

/// SentencePiece has no list of merges: two neighbours merge if together they are a token, and the
/// best score goes first, the leftmost pair among equals. So every way to cut a token into two
/// tokens is a merge, ranked by the token's score.
///
/// A merge here has a rank of its own, so equal scores need an order that has the same effect. The
/// tokens of equal score that can meet are, in real vocabularies, runs of spaces. Leftmost-first
/// grows a run from the left, one space at a time, and so does longer tokens first.
fn merges_by_score<'a>(
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
fn byte_level(v: &Vocab, kinds: &[Kind], ids: bpe::Vocab) -> Result<Parts> {
    let cut = Cut::named(&v.pre).ok_or_else(|| {
        let known: Vec<_> = CUTS.iter().flat_map(|cut| cut.names).copied().collect();
        Error::Unsupported(format!(
            "tokenizer.ggml.pre {:?}; known are {}",
            v.pre,
            known.join(", ")
        ))
    })?;
    let merges = listed_merges(v, kinds, &ids)?;
    let field = "tokenizer.ggml.merges";
    let model = BPE::builder().ignore_merges(cut.whole_words);
    let model = guarded(|why| corrupt(field, why), || model.vocab_and_merges(ids, merges).build())?;

    let mut steps: Vec<_> = cut.patterns.iter().map(|pattern| split(pattern)).collect();
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false
    });
    steps.push(bytes.clone());
    Ok(Parts { model, normalizer: Value::Null, cut: sequence(&steps), decoder: bytes })
}

fn listed_merges(v: &Vocab, kinds: &[Kind], ids: &bpe::Vocab) -> Result<bpe::Merges> {
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

/// How one family of models cuts text into words before it merges bytes.
struct Cut {
    names: &'static [&'static str],
    /// Applied one after the other, each to what the one before made.
    patterns: &'static [&'static str],
    /// Whether a word that is a token needs no merges to become it.
    whole_words: bool,
    begins_with_bos: bool,
}

impl Cut {
    fn named(name: &str) -> Option<&'static Self> {
        CUTS.iter().find(|cut| cut.names.contains(&name))
    }
}

const fn cut(names: &'static [&'static str], patterns: &'static [&'static str]) -> Cut {
    Cut { names, patterns, whole_words: false, begins_with_bos: false }
}

const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const MINICPM_5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const DEEPSEEK_3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// The pre-tokenizers of llama.cpp for models of the Llama kind, by the names that GGUF files use.
/// Where llama.cpp rewrote a pattern for its own regex engine, this is the model's original.
#[rustfmt::skip]
const CUTS: &[Cut] = &[
    cut(&["default", ""], &[r"[\p{P}$+<=>^~|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    cut(
        &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat",
          "a.x-4.0", "mellum", "exaone4"],
        &[GPT_2],
    ),
    cut(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
          "mellum2"],
        &[r"\p{N}", GPT_2],
    ),
    cut(&["falcon"], &[r"[\p{P}$+<=>^~|`]+", GPT_2, "[0-9][0-9][0-9]"]),
    Cut {
        whole_words: true,
        begins_with_bos: true,
        ..cut(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
              "lfm2"],
            &[LLAMA_3],
        )
    },
    cut(&["dbrx", "smaug-bpe", "chatglm-bpe", "glm4"], &[LLAMA_3]),
    cut(
        &["qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo", "solar-open",
          "grok-2"],
        &[QWEN_2],
    ),
    cut(&["qwen35"], &[QWEN_35]),
    cut(&["gpt-4o", "llama4", "kanana2", "minimax-m2"], &[GPT_4O]),
    Cut { whole_words: true, begins_with_bos: true, ..cut(&["tekken"], &[TEKKEN]) },
    Cut { whole_words: true, ..cut(&["minicpm5"], &[r"\p{N}{1,3}", MINICPM_5]) },
    cut(&["seed-coder"], &[SEED]),
    cut(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    cut(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        &[r"\p{N}{1,3}", r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+", DEEPSEEK_3],
    ),
    cut(
        &["deepseek-coder"],
        &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
          r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+", r"\p{N}"],
    ),
];

/// A pre-tokenizer that makes every match, and everything between two matches, a word.
fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn sequence(steps: &[Value]) -> Value {
    if steps.is_empty() {
        return Value::Null;
    }
    json!({"type": "Sequence", "pretokenizers": steps})
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::path::Path;
    use std::sync::Arc;

    /// A SentencePiece vocabulary: the specials 0 to 2, the bytes 3 to 258, then `pieces`.
    fn spm(pieces: &[(&str, f32)]) -> Vocab {
        let mut v = Vocab {
            model: "llama".into(),
            bos: Some(1),
            eos: Some(2),
            unk: Some(0),
            add_bos: true,
            add_space_prefix: true,
            ..Vocab::default()
        };
        let specials = [("<unk>", 2), ("<s>", 3), ("</s>", 3)];
        let bytes = (0..=u8::MAX).map(|byte| (format!("<0x{byte:02X}>"), 6));
        for (text, kind) in
            specials.map(|(text, kind)| (text.into(), kind)).into_iter().chain(bytes)
        {
            push(&mut v, &text, 0.0, kind);
        }
        for (text, score) in pieces {
            push(&mut v, text, *score, 1);
        }
        v
    }

    fn push(v: &mut Vocab, text: &str, score: f32, kind: i32) -> u32 {
        v.tokens.push(text.into());
        v.scores.push(score);
        v.types.push(kind);
        v.tokens.len() as u32 - 1
    }

    /// A byte-level vocabulary: `<|s|>`, the 256 bytes as 1 to 256, then what `merges` make.
    fn bpe(pre: &str, merges: &[&str]) -> Vocab {
        let table = byte_of();
        let mut v = Vocab {
            model: "gpt2".into(),
            pre: pre.into(),
            tokens: vec!["<|s|>".into()],
            types: vec![3],
            bos: Some(0),
            eos: Some(0),
            merges: merges.iter().map(|&merge| merge.into()).collect(),
            ..Vocab::default()
        };
        let bytes = (0..512).filter(|code| table[*code as usize].is_some());
        v.tokens.extend(bytes.map(|code| char::from_u32(code).unwrap().to_string()));
        v.tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
        v.types.resize(v.tokens.len(), 1);
        v
    }

    fn id(v: &Vocab, text: &str) -> u32 {
        v.tokens.iter().position(|token| token == text).unwrap() as u32
    }

    fn plain(t: &Tokenizer, text: &str) -> Vec<u32> {
        t.encode(text, false, false).unwrap()
    }

    fn texts<'a>(v: &'a Vocab, ids: &[u32]) -> Vec<&'a str> {
        ids.iter().map(|id| v.tokens[*id as usize].as_str()).collect()
    }

    fn streamed(t: &Tokenizer, ids: &[u32]) -> String {
        let mut stream = t.stream();
        let mut text: String = ids.iter().map(|id| stream.push(t, *id).unwrap()).collect();
        text += &stream.finish(t).unwrap();
        text
    }

    /// What SentencePiece's merging makes of a text, written down as plainly as possible.
    fn merged_by_hand(v: &Vocab, text: &str) -> Vec<u32> {
        let ids: HashMap<_, _> = v.tokens.iter().map(String::as_str).zip(0..).collect();
        let text = format!(" {text}").replace(' ', "▁");
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let score =
                |pair: &[String]| Some(v.scores[*ids.get(pair.concat().as_str())? as usize]);
            let best =
                parts.windows(2).enumerate().filter_map(|(at, pair)| Some((score(pair)?, at)));
            let best = best.reduce(|a, b| if b.0 > a.0 { b } else { a });
            let Some((_, at)) = best else { break };
            let right = parts.remove(at + 1);
            parts[at] += &right;
        }
        let bytes = |part: &String| part.bytes().map(|b| 3 + u32::from(b)).collect();
        parts
            .iter()
            .flat_map(|p| ids.get(p.as_str()).map_or_else(|| bytes(p), |id| vec![*id]))
            .collect()
    }

    struct Random(u64);

    impl Random {
        fn below(&mut self, end: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) as usize % end
        }

        fn text(&mut self, words: &[&str], most: usize) -> String {
            (0..=self.below(most)).map(|_| words[self.below(words.len())]).collect()
        }
    }

    #[test]
    fn the_best_score_merges_first_and_the_leftmost_of_equals() {
        let mut pieces = vec![];
        // Runs in an order of ids that says nothing, all of one score, as Llama 2 has them.
        let runs: Vec<String> = [5, 2, 8, 3, 7, 4, 6].map(|n| "▁".repeat(n)).into();
        pieces.extend(runs.iter().map(|run| (run.as_str(), -1e9)));
        let ranked = [
            "ab", "▁a", "ba", "aba", "bb", "ababa", "▁ab", "aa", "aaa", "aaaa", "bab", "a", "b",
            "▁",
        ];
        pieces.extend(ranked.iter().zip(0..).map(|(text, rank)| (*text, -(rank as f32))));
        let v = spm(&pieces);
        let t = Tokenizer::from_vocab(&v).unwrap();
        let mut random = Random(0x9E37_79B9_7F4A_7C15);
        for _ in 0..2000 {
            let text = random.text(&["a", "b", " ", "   ", "ab", "é", "ababa"], 20);
            let ids = plain(&t, &text);
            assert_eq!(texts(&v, &ids), texts(&v, &merged_by_hand(&v, &text)), "{text:?}");
            assert_eq!(t.decode(&ids).unwrap(), text);
            assert_eq!(streamed(&t, &ids), text);
        }
    }

    #[test]
    fn words_are_merged_apart_only_if_no_token_has_a_space_inside() {
        let pieces = [("▁", -1.0), ("a", -2.0), ("b", -3.0), ("▁b", -4.0), ("▁a", -5.0)];
        let mut v = spm(&pieces);
        // The second token with one text has a longer name, but no other text.
        push(&mut v, "▁b", -4.0, 1);
        let t = Tokenizer::from_vocab(&v).unwrap();
        assert!(t.to_json().unwrap().contains("Isolated"));
        assert_eq!(texts(&v, &plain(&t, "a b")), ["▁a", "▁b"]);

        let across = push(&mut v, "a▁b", -0.5, 1);
        let t = Tokenizer::from_vocab(&v).unwrap();
        assert!(!t.to_json().unwrap().contains("Isolated"));
        assert_eq!(plain(&t, "a b"), [id(&v, "▁"), across]);
    }

    #[test]
    fn a_character_the_vocabulary_lacks_is_its_bytes_and_streams_whole() {
        let v = spm(&[("▁", -1.0), ("a", -2.0)]);
        let t = Tokenizer::from_vocab(&v).unwrap();
        let ids = plain(&t, "a🦙a");
        assert_eq!(texts(&v, &ids), ["▁", "a", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>", "a"]);
        let mut stream = t.stream();
        let pieces: Vec<_> = ids.iter().map(|id| stream.push(&t, *id).unwrap()).collect();
        assert_eq!(pieces, ["", "a", "", "", "", "🦙", "a"]);
        assert_eq!(stream.finish(&t).unwrap(), "");
        // Cut off, and broken off: what can no longer become a character is one U+FFFD.
        assert_eq!(streamed(&t, &ids[..5]), "a\u{FFFD}");
        let broken = [ids[1], ids[2], ids[3], ids[1], ids[5], ids[1]];
        assert_eq!(streamed(&t, &broken), "a\u{FFFD}a\u{FFFD}a");
    }

    #[test]
    fn streaming_is_decoding_whatever_the_ids() {
        let mut random = Random(7);
        let spaced = spm(&[("▁", -1.0), ("▁a", -2.0), ("é", -3.0)]);
        let unspaced = Vocab { add_space_prefix: false, ..spaced.clone() };
        for v in [spaced, unspaced, bpe("gpt-2", &["a b", "Ã ©"])] {
            let t = Tokenizer::from_vocab(&v).unwrap();
            for _ in 0..300 {
                let ids: Vec<_> = (0..20).map(|_| random.below(t.vocab_size()) as u32).collect();
                let whole = t.decode(&ids).unwrap();
                assert_eq!(streamed(&t, &ids), whole);
                let bytes = ids.iter().flat_map(|id| t.pieces.get(*id).unwrap()).copied();
                let bytes: Vec<u8> = bytes.collect();
                let strip = usize::from(v.add_space_prefix && bytes.starts_with(b" "));
                assert_eq!(whole, String::from_utf8_lossy(&bytes[strip..]));
            }
        }
    }

    #[test]
    fn the_space_in_front_is_there_once_and_goes_again() {
        let mut v = spm(&[("▁", -1.0), ("a", -2.0), ("▁a", -3.0)]);
        let t = Tokenizer::from_vocab(&v).unwrap();
        assert_eq!(texts(&v, &plain(&t, "a a")), ["▁a", "▁a"]);
        assert_eq!(texts(&v, &plain(&t, " a")), ["▁", "▁a"]);
        assert_eq!(t.decode(&plain(&t, " a")).unwrap(), " a");
        assert!(plain(&t, "").is_empty());
        let a = id(&v, "▁a");
        assert_eq!(t.decode(&[1, a, a]).unwrap(), "a a", "a special token is no text");
        let mut stream = t.stream();
        assert_eq!(stream.push(&t, a).unwrap() + &stream.push(&t, a).unwrap(), "a a");
        stream.finish(&t).unwrap();
        assert_eq!(stream.push(&t, a).unwrap(), "a", "a new text");

        v.add_space_prefix = false;
        let t = Tokenizer::from_vocab(&v).unwrap();
        assert_eq!(texts(&v, &plain(&t, "a a")), ["a", "▁a"]);
        assert_eq!(t.decode(&[a]).unwrap(), " a");
    }

    #[test]
    fn plain_text_never_becomes_a_control_token() {
        // Every step from characters to "<s>" is a token, and the last has the best score of all.
        let mut v =
            spm(&[("▁", -1.0), ("<", -2.0), ("s", -3.0), (">", -4.0), ("<s", -5.0), ("s>", -6.0)]);
        let single = push(&mut v, "§", 0.0, 3);
        let t = Tokenizer::from_vocab(&v).unwrap();
        assert_eq!(texts(&v, &plain(&t, "<s>")), ["▁", "<s", ">"]);
        assert_eq!(t.encode("<s>s", true, true).unwrap(), [1, 1, id(&v, "▁"), id(&v, "s")]);
        assert_eq!(t.encode("s§", false, true).unwrap().last(), Some(&single));
        assert!(matches!(t.encode("s§", false, false), Err(Error::InvalidArgument(_))));
        assert_eq!(t.decode(&[1, single, 2, 0]).unwrap(), "");
        // Written out, a byte token is six characters.
        assert!(!plain(&t, "<0x41>").contains(&(3 + 0x41)));

        // Whole words that are tokens, and merges that make one.
        let mut v = bpe("llama-bpe", &["s t", "st op"]);
        v.tokens.push("op".into());
        v.types.push(1);
        v.merges.insert(0, "o p".into());
        let stop = id(&v, "stop");
        v.types[stop as usize] = 3;
        let t = Tokenizer::from_vocab(&v).unwrap();
        assert!(!plain(&t, "stop").contains(&stop));
        assert_eq!(t.decode(&plain(&t, "stop")).unwrap(), "stop");
        assert_eq!(t.encode("stop", false, true).unwrap(), [stop]);

        v.pre = "gpt-2".into();
        assert_eq!(texts(&v, &plain(&Tokenizer::from_vocab(&v).unwrap(), "stop")), ["st", "op"]);

        // The same vocabulary as someone else's JSON, where the merge is still in the list.
        let json = t.to_json().unwrap().replace(r#"["s","t"]"#, r#"["s","t"],["st","op"]"#);
        let t = Tokenizer::from_json(json.as_bytes(), None, vec![], false).unwrap();
        assert_eq!(t.encode("stop", false, true).unwrap(), [stop]);
        assert!(!plain(&t, "stop").contains(&stop));
        assert_eq!(t.decode(&plain(&t, "stop")).unwrap(), "stop");
    }

    #[test]
    fn special_ids_are_special_even_if_the_types_forget_them() {
        let pieces = [("▁", -1.0), ("<", -2.0), ("s", -3.0), (">", -4.0), ("<s", -5.0)];
        for types in [vec![1; 264], vec![]] {
            let v = Vocab { types, ..spm(&pieces) };
            let t = Tokenizer::from_vocab(&v).unwrap();
            assert_eq!(texts(&v, &plain(&t, "<s>é")), ["▁", "<s", ">", "<0xC3>", "<0xA9>"]);
            assert_eq!(t.decode(&[1, 2, 3 + 0x41]).unwrap(), "A");
            let lone = Vocab { eos: Some(id(&v, "s")), ..v.clone() };
            let t = Tokenizer::from_vocab(&lone).unwrap();
            assert_eq!(t.decode(&plain(&t, "ss")).unwrap(), "ss");
        }
    }

    #[test]
    fn user_defined_tokens_are_found_in_any_text_the_longest_first() {
        let mut v = spm(&[("▁", -1.0), ("a", -2.0), ("<", -3.0)]);
        let short = push(&mut v, "<a", 0.0, 4);
        let long = push(&mut v, "<a b>", 0.0, 4);
        let t = Tokenizer::from_vocab(&v).unwrap();
        for special in [false, true] {
            let ids = t.encode("a<a b><a", false, special).unwrap();
            assert_eq!(ids, [id(&v, "▁"), id(&v, "a"), long, short]);
            assert_eq!(t.decode(&ids).unwrap(), "a<a b><a");
        }
        // In a byte-level vocabulary their names are text, not byte code.
        let mut v = bpe("gpt-2", &[]);
        v.tokens.push("éé".into());
        v.types.push(4);
        let t = Tokenizer::from_vocab(&v).unwrap();
        assert_eq!(plain(&t, "aééb"), [id(&v, "a"), 257, id(&v, "b")]);
        assert_eq!(t.decode(&[257]).unwrap(), "éé");
    }

    #[test]
    fn of_tokens_with_the_same_text_the_first_encodes_and_all_decode() {
        let mut v = spm(&[("▁", -1.0), ("a", -2.0), ("b", -3.0), ("ab", -4.0)]);
        let first = id(&v, "ab");
        let again = push(&mut v, "ab", 9.0, 1);
        let control = push(&mut v, "ab", 0.0, 3);
        let user = push(&mut v, "ab", 0.0, 4);
        let odd = push(&mut v, "\u{FDD0}x:y", 0.0, 1);
        let t = Tokenizer::from_vocab(&v).unwrap();
        let json = t.to_json().unwrap();
        let same = Tokenizer::from_json(json.as_bytes(), Some(1), vec![2], true).unwrap();
        for t in [t, same] {
            assert_eq!(t.vocab_size(), v.tokens.len());
            for special in [false, true] {
                let ids = t.encode("ab", false, special).unwrap();
                assert_eq!(ids, [id(&v, "▁"), first]);
            }
            assert_eq!(t.decode(&[first, again, user]).unwrap(), "ababab");
            assert_eq!(t.decode(&[control]).unwrap(), "");
            assert_eq!(t.decode(&[odd]).unwrap(), "\u{FDD0}x:y");
        }
    }

    #[test]
    fn bytes_merge_as_listed_and_characters_stream_whole() {
        let v = bpe("gpt-2", &["h e", "l l", "he ll", "Ġ w", "ð Ł", "h e"]);
        let t = Tokenizer::from_vocab(&v).unwrap();
        let ids = plain(&t, "hello w🦙");
        assert_eq!(texts(&v, &ids), ["hell", "o", "Ġw", "ðŁ", "¦", "Ļ"]);
        let mut stream = t.stream();
        let pieces: Vec<_> = ids.iter().map(|id| stream.push(&t, *id).unwrap()).collect();
        assert_eq!(pieces, ["hell", "o", " w", "", "", "🦙"]);
        assert_eq!(t.decode(&ids).unwrap(), "hello w🦙");
        assert_eq!(t.encode("<|s|>", false, true).unwrap(), [0]);
        assert_eq!(t.decode(&plain(&t, "<|s|>")).unwrap(), "<|s|>");
        assert_eq!(t.encode("o", true, false).unwrap(), [id(&v, "o")], "no BOS unless wanted");

        let v = bpe("gpt-2", &["a b", "b c"]);
        let twice = Vocab { merges: ["a b", "b c", "a b"].map(String::from).into(), ..v.clone() };
        assert_eq!(texts(&v, &plain(&Tokenizer::from_vocab(&twice).unwrap(), "abc")), ["ab", "c"]);
    }

    #[test]
    fn what_the_vocabulary_cannot_say_is_an_error_or_unknown() {
        let mut v = bpe("gpt-2", &[]);
        let at = id(&v, "z") as usize;
        v.tokens.remove(at);
        v.types.remove(at);
        let t = Tokenizer::from_vocab(&v).unwrap();
        for text in ["z", "az", "za", "a b z"] {
            assert!(
                matches!(t.encode(text, false, false), Err(Error::InvalidArgument(_))),
                "{text}"
            );
        }
        assert_eq!(plain(&t, "ay").len(), 2);

        let v = Vocab {
            model: "llama".into(),
            tokens: ["<unk>", "▁", "a"].map(String::from).into(),
            scores: vec![0.0, -1.0, -2.0],
            unk: Some(0),
            ..Vocab::default()
        };
        let t = Tokenizer::from_vocab(&v).unwrap();
        assert_eq!(plain(&t, "xya"), [0, 2], "one token for what is unknown in a row");
        for v in [Vocab { unk: None, ..v.clone() }, Vocab { eos: Some(0), ..v }] {
            let t = Tokenizer::from_vocab(&v).unwrap();
            assert!(matches!(t.encode("xya", false, false), Err(Error::InvalidArgument(_))));
        }
    }

    #[test]
    fn every_named_cut_loses_nothing() {
        let text =
            "I'll 'VE  12345\t\r\n\n  x=\"ÀéÇ\" 漢字かな 한국어 🦙👨‍👩‍👧 e\u{301} <|s|> \u{A0}...\n ";
        for name in CUTS.iter().flat_map(|cut| cut.names) {
            let t = Tokenizer::from_vocab(&bpe(name, &["a b"])).unwrap();
            assert_eq!(t.decode(&plain(&t, text)).unwrap(), text, "{name}");
        }
        let words = |pre: &str, text: &str| {
            // A merge for every pair of neighbours, so that a word is one token.
            let v = bpe(pre, &["1 2", "12 3", "123 4", "Ġ a", "! !", "!! Ċ", "a b", "Ġ Ġ"]);
            let ids = plain(&Tokenizer::from_vocab(&v).unwrap(), text);
            texts(&v, &ids).join("|")
        };
        assert_eq!(words("gpt-2", "1234 a!!\n"), "1234|Ġa|!!|Ċ");
        assert_eq!(words("smollm", "1234 a!!\n"), "1|2|3|4|Ġa|!!|Ċ");
        assert_eq!(words("llama-bpe", "1234 a!!\n"), "123|4|Ġa|!!Ċ");
        assert_eq!(words("qwen2", "1234 a!!\n"), "1|2|3|4|Ġa|!!Ċ");
        assert_eq!(words("default", "1234 a!!\n"), "123|4|Ġa|!!|Ċ");
        assert_eq!(words("", "1234   a"), words("default", "1234   a"));
        assert_eq!(words("gpt-2", "   a"), "ĠĠ|Ġa");
        // Without a merge that makes it, a word that is a token counts only for some models.
        for (pre, whole) in [("llama-bpe", 1), ("qwen2", 2)] {
            let mut v = bpe(pre, &["a b"]);
            v.tokens.push("xy".into());
            v.types.push(1);
            assert_eq!(plain(&Tokenizer::from_vocab(&v).unwrap(), "xy").len(), whole);
        }
    }

    #[test]
    fn names_nobody_knows_are_unsupported_and_the_known_ones_listed() {
        let error = |v: Vocab| match Tokenizer::from_vocab(&v) {
            Err(Error::Unsupported(why)) => why,
            other => panic!("{other:?}"),
        };
        let why = error(bpe("klingon", &[]));
        assert!(
            why.contains("klingon") && why.contains("llama-bpe") && why.contains("qwen2"),
            "{why}"
        );
        let why = error(Vocab { model: "bert".into(), ..bpe("", &[]) });
        assert!(why.contains("bert") && why.contains("llama") && why.contains("gpt2"), "{why}");
        assert!(Vocab::adds_bos_by_default("llama", "default"));
        assert!(Vocab::adds_bos_by_default("gpt2", "llama-bpe"));
        assert!(!Vocab::adds_bos_by_default("gpt2", "qwen2"));
    }

    #[test]
    fn a_vocabulary_that_contradicts_itself_is_refused_by_key() {
        let good = spm(&[("▁", -1.0), ("a", -2.0)]);
        let list = bpe("gpt-2", &["a b"]);
        let refused = |key: &str, v: &Vocab, edit: &dyn Fn(&mut Vocab)| {
            let mut v = v.clone();
            edit(&mut v);
            match Tokenizer::from_vocab(&v) {
                Err(Error::Corrupt { path, field, reason }) => {
                    assert_eq!(
                        (path.as_str(), field),
                        ("tokenizer", format!("tokenizer.ggml.{key}"))
                    );
                    assert!(!reason.is_empty());
                }
                other => panic!("{key}: {other:?}"),
            }
        };
        refused("tokens", &good, &|v| *v = Vocab { model: "llama".into(), ..Vocab::default() });
        refused("tokens", &good, &|v| v.tokens[5].clear());
        refused("tokens", &good, &|v| v.tokens[260] = "a".repeat(100_000));
        refused("scores", &good, &|v| v.scores.clear());
        refused("scores", &good, &|v| v.scores.truncate(9));
        refused("scores", &good, &|v| v.scores[4] = f32::NAN);
        refused("token_type", &good, &|v| v.types.push(1));
        refused("token_type", &good, &|v| v.types[0] = 7);
        refused("token_type", &good, &|v| v.types[0] = -1);
        refused("bos_token_id", &good, &|v| v.bos = Some(261));
        refused("bos_token_id", &good, &|v| v.bos = None);
        refused("eos_token_id", &good, &|v| v.eos = Some(u32::MAX));
        refused("unknown_token_id", &good, &|v| v.unk = Some(261));
        refused("merges", &list, &|v| v.merges.clear());
        for merge in ["", "a", "ab", " ", "a b c", "a nix", "nix b", "b a", " b", "a "] {
            refused("merges", &list, &|v| v.merges.push(merge.into()));
        }
    }

    #[test]
    fn pieces_that_all_divide_into_each_other_cannot_fill_the_memory() {
        let runs: Vec<String> = (1..600).map(|n| "a".repeat(n)).collect();
        let pieces: Vec<_> = runs.iter().map(|run| (run.as_str(), -(run.len() as f32))).collect();
        assert!(matches!(Tokenizer::from_vocab(&spm(&pieces)), Err(Error::Corrupt { .. })));
        let t = Tokenizer::from_vocab(&spm(&pieces[..64])).unwrap();
        assert_eq!(plain(&t, &"a".repeat(64 * 100)).len(), "▁".len() + 100);
    }

    #[test]
    fn control_tokens_that_end_a_turn_end_the_text() {
        let mut v = spm(&[("▁", -1.0)]);
        let turn = push(&mut v, "<|im_end|>", 0.0, 3);
        push(&mut v, "<|eot_id|>", 0.0, 1);
        assert_eq!(Tokenizer::from_vocab(&v).unwrap().eos(), [2, turn]);
        v.eos = Some(turn);
        assert_eq!(Tokenizer::from_vocab(&v).unwrap().eos(), [turn]);
        v.eos = None;
        assert_eq!(Tokenizer::from_vocab(&v).unwrap().eos(), [turn]);
    }

    #[test]
    fn ids_that_name_no_token_are_refused_and_leave_a_stream_as_it_was() {
        let t = Arc::new(Tokenizer::from_vocab(&bpe("gpt-2", &[])).unwrap());
        let refused = |r: Result<String>| assert!(matches!(r, Err(Error::InvalidArgument(_))));
        refused(t.decode(&[0, 257]));
        let mut stream = t.stream();
        let bytes = plain(&t, "é");
        assert_eq!(stream.push(&t, bytes[0]).unwrap(), "");
        refused(stream.push(&t, u32::MAX));
        assert_eq!(stream.push(&t, bytes[1]).unwrap(), "é");
        let other = Arc::clone(&t);
        let ids = std::thread::spawn(move || plain(&other, "é")).join().unwrap();
        assert_eq!(ids, bytes);
    }

    #[test]
    fn json_is_the_same_tokenizer_again() {
        let mut v = spm(&[("▁", -1.0), ("a", -2.0), ("b", -3.0), ("ab", -4.0), ("▁a", -5.0)]);
        push(&mut v, "<u>", 0.0, 4);
        let text = "a ab <s> é<u>  <|s|>";
        for v in [v, bpe("llama-bpe", &["a b", "Ġ a"]), bpe("default", &["a b"])] {
            let t = Tokenizer::from_vocab(&v).unwrap();
            let json = t.to_json().unwrap();
            let again = Tokenizer::from_json(json.as_bytes(), t.bos(), t.eos().into(), t.add_bos())
                .unwrap();
            assert_eq!(again.to_json().unwrap(), json);
            assert_eq!(format!("{again:?}"), format!("{t:?}"));
            for special in [false, true] {
                let ids = t.encode(text, special, special).unwrap();
                assert_eq!(again.encode(text, special, special).unwrap(), ids);
                assert_eq!(again.decode(&ids).unwrap(), t.decode(&ids).unwrap());
            }
        }
    }

    #[test]
    fn json_that_is_wrong_is_refused_by_section() {
        let json = Tokenizer::from_vocab(&bpe("gpt-2", &["a b"])).unwrap().to_json().unwrap();
        let read = |json: &str| Tokenizer::from_json(json.as_bytes(), None, vec![], false);
        assert!(read(&json).is_ok());
        let refused = |field: &str, json: &str| match read(json) {
            Err(Error::Corrupt { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        };
        refused("json", "");
        refused("json", "[1]");
        refused("json", &json[..json.len() - 1]);
        refused("json", &"[".repeat(100_000));
        refused("model", "{}");
        let edited = |from: &str, to: &str| {
            assert!(json.contains(from), "{from}");
            json.replace(from, to)
        };
        refused("model", &edited(r#"["a","b"]"#, r#"["a","nix"]"#));
        refused("model", &edited(r#""ab":257"#, r#""ab":4294967295"#));
        refused("model", &edited(r#""ab":257"#, r#""ab":256"#));
        // Here the crate computes a negative length and panics.
        refused("model", &edited(r#"subword_prefix":null"#, r#"subword_prefix":"long prefix""#));
        refused("added_tokens", &edited(r#"[{"id":0"#, r#"[{"id":9"#));
        refused("added_tokens", &edited(r#"[{"id":0"#, r#"[{"no":0"#));
        refused("pre_tokenizer", &edited(r#"\\p{L}+"#, r#"\\p{L+"#));
        let chance = read(&edited(r#""dropout":null"#, r#""dropout":1.0"#)).unwrap();
        assert_eq!(plain(&chance, "ab"), [257], "no merge is left to chance");
        let other = edited(r#""type":"BPE""#, r#""type":"Unigram""#);
        assert!(matches!(read(&other), Err(Error::Unsupported(_))));
        let mut other: Value = serde_json::from_str(&json).unwrap();
        other["decoder"] = json!({"type": "CTC"});
        assert!(matches!(read(&other.to_string()), Err(Error::Unsupported(_))));

        let with = |bos, eos| Tokenizer::from_json(json.as_bytes(), bos, eos, bos.is_none());
        assert!(matches!(with(Some(258), vec![]), Err(Error::Corrupt { .. })));
        assert!(matches!(with(Some(0), vec![258]), Err(Error::Corrupt { .. })));
        assert!(matches!(with(None, vec![]), Err(Error::Corrupt { .. })), "a BOS to add, but none");
    }

    #[test]
    fn long_texts_without_a_boundary_take_no_longer_than_others() {
        let a = spm(&[("▁", -1.0), ("a", -2.0), ("aa", -3.0), ("▁▁", -4.0), ("aaaa", -5.0)]);
        for v in [a, bpe("llama-bpe", &["a a", "aa aa", "Ġ Ġ"])] {
            let t = Tokenizer::from_vocab(&v).unwrap();
            for unit in ["a", " ", "🦙", "\n", " a"] {
                let text = unit.repeat(50_000 / unit.len());
                assert_eq!(t.decode(&plain(&t, &text)).unwrap(), text);
            }
        }
    }

    /// A file of the folder with test data next to the checkout, if there is such a folder.
    fn shared(path: &str) -> Option<Vec<u8>> {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared"));
        folder.is_dir().then(|| std::fs::read(folder.join(path)).unwrap())
    }

    fn shared_text(path: &str) -> Option<String> {
        shared(path).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn qwen2_has_the_ids_of_llama_cpp() {
        let Some(vocab) = shared("tokenizers/qwen2.5/vocab.json") else { return };
        let merges = shared_text("tokenizers/qwen2.5/merges.txt").unwrap();
        let vocab: HashMap<String, usize> = serde_json::from_slice(&vocab).unwrap();
        let mut v = Vocab { model: "gpt2".into(), pre: "qwen2".into(), ..Vocab::default() };
        v.tokens.resize(vocab.len(), String::new());
        for (text, id) in vocab {
            v.tokens[id] = text;
        }
        v.merges = merges.lines().map(String::from).collect();
        let t = Tokenizer::from_vocab(&v).unwrap();
        let texts = shared_text("tokenizers/ggml-vocab-qwen2.gguf.inp").unwrap();
        let golden = shared_text("tokenizers/ggml-vocab-qwen2.gguf.out").unwrap();
        for (text, ids) in texts.split("\n__ggml_vocab_test__\n").zip(golden.lines()) {
            let ids: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert_eq!(plain(&t, text), ids, "{text:?}");
            assert_eq!(t.decode(&ids).unwrap(), text);
            assert_eq!(streamed(&t, &ids), text);
        }
    }

    #[test]
    fn gpt2_from_hugging_face_has_the_ids_of_another_program() {
        let Some(json) = shared("tokenizers/gpt2/tokenizer.json") else { return };
        let t = Tokenizer::from_json(&json, None, vec![50256], false).unwrap();
        let text = shared_text("tokenizers/gpt2/monty-python-credits.txt").unwrap();
        let golden = shared("tokenizers/gpt2/monty-python-credits-gpt2.json").unwrap();
        let golden: Value = serde_json::from_slice(&golden).unwrap();
        let ids = plain(&t, &text);
        assert_eq!(json!(ids), golden["token_ids"]);
        assert_eq!(t.decode(&ids).unwrap(), text);
    }

    #[test]
    fn a_hugging_face_file_and_its_vocabulary_alone_are_the_same_tokenizer() {
        for (path, text, pre) in [
            ("tokenizers/smollm2/tokenizer.json", "text/calibration_datav3.txt", "smollm"),
            ("models/nursery/tokenizer.json", "text/nursery_val.txt", "gpt-2"),
        ] {
            let Some(json) = shared(path) else { return };
            let t = Tokenizer::from_json(&json, None, vec![1], false).unwrap();
            let file: Value = serde_json::from_slice(&json).unwrap();
            let mut v = Vocab { model: "gpt2".into(), pre: pre.into(), ..Vocab::default() };
            v.tokens.resize(t.vocab_size(), String::new());
            v.types.resize(t.vocab_size(), 1);
            for (text, id) in file["model"]["vocab"].as_object().unwrap() {
                v.tokens[id.as_u64().unwrap() as usize] = text.clone();
            }
            for token in file["added_tokens"].as_array().unwrap() {
                v.types[token["id"].as_u64().unwrap() as usize] = 3;
            }
            v.merges = file["model"]["merges"]
                .as_array()
                .unwrap()
                .iter()
                .map(|merge| match merge {
                    Value::String(line) => line.clone(),
                    pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
                })
                .collect();
            let from_vocab = Tokenizer::from_vocab(&v).unwrap();
            let mut text = shared_text(text).unwrap();
            text.insert_str(0, &v.tokens[1]);
            let ids = plain(&t, &text);
            assert!(ids == plain(&from_vocab, &text), "{path}");
            assert!(t.decode(&ids).unwrap() == text, "{path}");
            assert_eq!(t.encode(&text, false, true).unwrap()[0], 1);
        }
    }
}
