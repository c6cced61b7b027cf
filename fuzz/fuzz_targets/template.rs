//! A chat template, a zero byte, and messages for it in JSON. `cargo +nightly fuzz run template`.
#![no_main]

use nybl::text::template::{ChatTemplate, Conversation};
use nybl::text::tokenizer::{Tokenizer, Vocab};
use std::sync::OnceLock;

const MESSAGES: &str = r#"[{"role":"system","content":"Be brief."},
    {"role":"user","content":"Hi <|im_end|>","tool_calls":[{"name":"f","arguments":{"a":[1,2.5,null]}}]},
    {"role":"assistant","content":null}]"#;

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
        let special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"].map(String::from);
        let tokens: Vec<_> = special.into_iter().chain(bytes).collect();
        let types = (0..tokens.len()).map(|id| if id < 5 { 3 } else { 6 }).collect();
        let vocab = Vocab {
            model: "llama".into(),
            scores: vec![0.0; tokens.len()],
            types,
            tokens,
            bos: Some(1),
            eos: Some(2),
            ..Vocab::default()
        };
        Tokenizer::from_vocab(&vocab).expect("bytes are a vocabulary")
    })
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let source = String::from_utf8_lossy(&bytes[..end]);
    let rest = String::from_utf8_lossy(bytes.get(end + 1..).unwrap_or_default());
    let messages = if rest.trim().is_empty() { MESSAGES } else { &rest };
    let Ok(template) = ChatTemplate::new(&source, tokenizer()) else { return };
    let conversation =
        Conversation { messages, add_generation_prompt: true, ..Conversation::default() };
    if let Ok(text) = template.render(&conversation) {
        assert!(text.len() <= 64 << 20);
    }
});
