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
            // Another token answers to the text of an alias.
            Kind::User if !name.starts_with(ALIAS) => {
                Some((id, AddedToken::from(name, false).normalized(false)))
            }
            _ => None,
        });

        let mut eos = Vec::from_iter(v.eos);
        eos.extend((0..).zip(&v.tokens).zip(&kinds).filter_map(|((id, text), kind)| {
            let ends_turn = *kind == Kind::Control && END_OF_TURN.contains(&text.as_str());
            (ends_turn && v.eos != Some(id)).then_some(id)
        }));
        Self::assemble(parts, added.collect(), v.bos, eos, v.add_bos)
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
        Self::assemble(parts, added, bos, eos, add_bos)
    }

    fn assemble(
        parts: Parts,
        added: Vec<(u32, AddedToken)>,
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
        let unk = model.unk_token.as_ref().and_then(|name| model.token_to_id(name));
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
        for (id, token) in &added {
            if inner.token_to_id(&token.content) != Some(*id) {
                return Err(corrupt(
                    "added_tokens",
                    format!("{:?} cannot have id {id} in this vocabulary", token.content),
                ));
            }
        }

        let pieces = Pieces::new(&inner, decoding)?;
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
        let why = format!("the vocabulary has no token for a character after or in {start:?}");
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
    fn new(inner: &tokenizers::Tokenizer, decoding: Decoding) -> Result<Self> {
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
        cut: sequence(steps),
        decoder: json!({"type": "Sequence", "decoders": decoders}),
    })
}

/// SentencePiece has no list of merges: two neighbours merge if together they are a token, and the
/// best score goes first, the leftmost pair among equals. So every way to cut a token into two
/// tokens is a merge, ranked by the token's score.
///
/// A merge here has a rank of its own, so equal scores need an order that has the same effect.
/// Tokens of equal score are, in real vocabularies, runs of one character, which leftmost-first
/// grows from the left, one at a time: longer tokens go first. Two cuts of one token compete where
/// it is both the `a b` and the `b c` of `a b c`: the one that can only be `b c` goes last, and
/// in a run, where each can be either, the longer left half goes first.
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
                let only_second = token.ends_with(left) && !token.starts_with(right);
                let order = (Reverse(token.len()), id, only_second, Reverse(at));
                merges.push((v.scores[id as usize], order, left, right));
            }
        }
    }
    merges.sort_by(|(a_score, a_order, ..), (b_score, b_order, ..)| {
        let by_score = b_score.partial_cmp(a_score).unwrap_or(Ordering::Equal);
        by_score.then_with(|| a_order.cmp(b_order))
    });
    Ok(merges.into_iter().map(|(.., left, right)| (left.into(), right.into())).collect())
}

/// A `gpt2` vocabulary: text is cut into words, words into bytes, and bytes merged as the list says.
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
    Ok(Parts { model, normalizer: Value::Null, cut: sequence(steps), decoder: bytes })
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

fn sequence(steps: Vec<Value>) -> Value {
    match steps.len() {
        0 => Value::Null,
        _ => json!({"type": "Sequence", "pretokenizers": steps}),
    }
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
