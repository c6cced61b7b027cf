//! What the targets that open models share.
#![allow(dead_code, reason = "each target uses a part of it")]

use nybl::engine::load::Model;
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use nybl::engine::session::{Session, SessionConfig};
use nybl::text::tokenizer::Tokenizer;
use std::sync::{Arc, OnceLock};

/// One runtime of one thread for all inputs.
pub(crate) fn runtime() -> Arc<Runtime> {
    static RUNTIME: OnceLock<Arc<Runtime>> = OnceLock::new();
    let made = RUNTIME.get_or_init(|| {
        let config = RuntimeConfig { threads: 1, ..RuntimeConfig::default() };
        Arc::new(Runtime::new(&config).expect("a runtime of one thread"))
    });
    Arc::clone(made)
}

/// A model that opened has to run: some tokens and its tokenizer. Statuses are fine.
pub(crate) fn run(model: Arc<Model>) {
    if let Ok(tokenizer) = model.tokenizer() {
        try_text(tokenizer, "Once upon a <s>\u{2581}time\u{e9}\u{1f980}</s>");
    }
    let config = SessionConfig { context: 16, prefill_chunk: 4, ..SessionConfig::default() };
    let Ok(mut session) = Session::new(Arc::clone(&model), &config) else { return };
    let last = model.vocab() as u32 - 1;
    if session.append(&[0, last, 0, last, 0]).is_ok() {
        for _ in 0..3 {
            let _ = session.next();
        }
    }
}

/// Ids are tokens, and decoding them in pieces is decoding them at once; no control token comes out of
/// plain text.
pub(crate) fn try_text(tokenizer: &Tokenizer, text: &str) {
    let control = tokenizer.control_names();
    for parse_special in [false, true] {
        let Ok(ids) = tokenizer.encode(text, parse_special, parse_special) else { continue };
        let whole = tokenizer.decode(&ids).expect("what was encoded can be decoded");
        let mut stream = tokenizer.stream();
        let mut pieces = String::new();
        for id in &ids {
            let name = tokenizer.name(*id);
            let is_control = name.is_some_and(|name| control.contains(&name));
            // The one exception is the token for what the vocabulary lacks.
            let exempt =
                parse_special || tokenizer.decode(&[*id]).is_ok_and(|text| text.is_empty());
            assert!(!is_control || exempt, "control token {id} out of plain text");
            pieces.push_str(&stream.push(tokenizer, *id).expect("it is a token"));
        }
        pieces.push_str(&stream.finish(tokenizer).expect("the end of a text"));
        assert_eq!(pieces, whole);
    }
}
