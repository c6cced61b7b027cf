//! A `tokenizer.json`, a zero byte, and a text for it. `cargo +nightly fuzz run tokenizer`.
#![no_main]

mod support;

use nybl::text::tokenizer::Tokenizer;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(bytes.get(end + 1..).unwrap_or_default());
    let Ok(tokenizer) = Tokenizer::from_json(&bytes[..end], Some(0), vec![1], true) else {
        return;
    };
    support::try_text(&tokenizer, &text);
    // Its own JSON is the same tokenizer.
    let json = tokenizer.to_json().expect("a tokenizer can be written");
    let again = Tokenizer::from_json(json.as_bytes(), Some(0), vec![1], true)
        .expect("what was written can be read");
    assert_eq!(again.encode(&text, true, false).ok(), tokenizer.encode(&text, true, false).ok());
});
