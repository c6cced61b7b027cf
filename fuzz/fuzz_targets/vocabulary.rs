//! A vocabulary as GGUF metadata holds it, and a text for it. `cargo +nightly fuzz run vocabulary`.
#![no_main]

mod support;

use arbitrary::Arbitrary;
use nybl::text::tokenizer::{Tokenizer, Vocab};

#[derive(Arbitrary, Debug)]
struct Input {
    byte_level: bool,
    pre: u8,
    tokens: Vec<(Piece, f32, u8)>,
    merges: Vec<(u8, u8)>,
    bos: Option<u8>,
    eos: Option<u8>,
    unk: Option<u8>,
    flags: [bool; 3],
    text: Vec<Piece>,
}

/// A part of a token or a text: few different ones, so that they meet.
#[derive(Arbitrary, Debug)]
enum Piece {
    Letter(u8),
    Pair(u8, u8),
    Space,
    Mark,
    Byte(u8),
    Special(u8),
    Any(String),
}

impl Piece {
    fn write(&self, out: &mut String) {
        let letter = |n: u8| char::from(b'a' + n % 4);
        match self {
            Self::Letter(n) => out.push(letter(*n)),
            Self::Pair(a, b) => out.extend([letter(*a), letter(*b)]),
            Self::Space => out.push(' '),
            Self::Mark => out.push('\u{2581}'),
            Self::Byte(byte) => out.push_str(&format!("<0x{byte:02X}>")),
            Self::Special(n) => {
                out.push_str(["<s>", "</s>", "<unk>", "<|im_end|>"][*n as usize % 4])
            }
            Self::Any(text) => out.push_str(text),
        }
    }
}

const PRE: [&str; 8] =
    ["", "default", "gpt-2", "llama-bpe", "qwen2", "gpt-4o", "deepseek-v3", "tekken"];

libfuzzer_sys::fuzz_target!(|input: Input| {
    let name = |piece: &Piece| {
        let mut text = String::new();
        piece.write(&mut text);
        text
    };
    let tokens: Vec<String> = input.tokens.iter().map(|(piece, ..)| name(piece)).collect();
    let token = |n: &u8| tokens.get(*n as usize).cloned().unwrap_or_default();
    let vocab = Vocab {
        model: if input.byte_level { "gpt2" } else { "llama" }.into(),
        pre: PRE[input.pre as usize % PRE.len()].into(),
        scores: input.tokens.iter().map(|(_, score, _)| *score).collect(),
        types: input.tokens.iter().map(|(.., kind)| i32::from(kind % 8)).collect(),
        merges: input.merges.iter().map(|(a, b)| format!("{} {}", token(a), token(b))).collect(),
        bos: input.bos.map(u32::from),
        eos: input.eos.map(u32::from),
        unk: input.unk.map(u32::from),
        add_bos: input.flags[0],
        add_eos: input.flags[1],
        add_space_prefix: input.flags[2],
        tokens,
    };
    let Ok(tokenizer) = Tokenizer::from_vocab(&vocab) else { return };
    let mut text = String::new();
    input.text.iter().for_each(|piece| piece.write(&mut text));
    support::try_text(&tokenizer, &text);
    let json = tokenizer.to_json().expect("a tokenizer can be written");
    let (bos, eos) = (tokenizer.bos(), tokenizer.eos().to_vec());
    let again = Tokenizer::from_json(json.as_bytes(), bos, eos, tokenizer.add_bos())
        .expect("what was written can be read");
    assert_eq!(again.encode(&text, true, true).ok(), tokenizer.encode(&text, true, true).ok());
});
