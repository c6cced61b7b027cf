//! The bytes of each token, from the decoder that the tokenizer's JSON names.
//!
//! Decoding by table makes a stream of pieces the same text as all of it at once, by construction.

use super::corrupt;
use super::vocab::text_of;
use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::HashMap;
use tokenizers::AddedToken;
use tokenizers::models::bpe;
/// The bytes of every token, end to end.
pub(super) struct Pieces {
    pub(super) bytes: Vec<u8>,
    pub(super) ends: Vec<usize>,
    pub(super) special: Vec<bool>,
    /// Whether the first byte of a text is the space that the normalizer put there.
    pub(super) strip_space: bool,
}

impl Pieces {
    /// The bytes of the tokens `ids` and of the `added` ones, which may be among them.
    pub(super) fn new(
        ids: &bpe::Vocab,
        added: &[(u32, AddedToken)],
        decoding: &Decoding,
    ) -> Result<Self> {
        let names = ids.iter().map(|(name, id)| (name.as_str(), *id));
        let more = added.iter().map(|(id, token)| (token.content.as_str(), *id));
        let more = more.filter(|(name, _)| !ids.contains_key(*name));
        let Some(last) = names.clone().chain(more.clone()).map(|(_, id)| id as usize).max() else {
            return Err(corrupt("model", "no tokens"));
        };
        let count = ids.len() + added.len();
        // The tables below have a place for every id: one far-fetched id would make them huge.
        if last / 16 > count {
            let reason = format!("{count} tokens with ids up to {last}");
            return Err(corrupt("model", reason));
        }
        let size = last + 1;
        let mut by_id = vec![None; size];
        for (name, id) in names.chain(more) {
            if by_id[id as usize].replace(name).is_some_and(|other| other != name) {
                return Err(corrupt("model", format!("two tokens have id {id}")));
            }
        }

        let added: HashMap<_, _> = added.iter().map(|(id, token)| (*id, token)).collect();
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

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn get(&self, id: u32) -> Result<&[u8]> {
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
pub(super) struct Decoding {
    byte_of: Option<Box<[Option<u8>; 512]>>,
    byte_fallback: bool,
    replaced: Vec<(String, String)>,
    fused: bool,
    pub(super) strip_space: bool,
}

impl Decoding {
    pub(super) fn read(decoder: &Value) -> Result<Self> {
        let mut decoding = Self::default();
        match decoder.get("decoders").and_then(Value::as_array) {
            Some(steps) => steps.iter().try_for_each(|step| decoding.add(step))?,
            None => decoding.add(decoder)?,
        }
        Ok(decoding)
    }

    pub(super) fn add(&mut self, step: &Value) -> Result<()> {
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

    pub(super) fn append(&self, name: &str, added: bool, bytes: &mut Vec<u8>) {
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
pub(super) fn byte_of() -> Box<[Option<u8>; 512]> {
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
pub(super) fn byte_named(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    u8::from_str_radix(digits, 16).ok().filter(|_| hex)
}
