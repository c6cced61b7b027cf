//! Bytes as a GGUF file: opened, and run if they can be. `cargo +nightly fuzz run gguf`.
#![no_main]

mod support;

use nybl::engine::load::Model;
use nybl::file::source::Source;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut file = bytes.to_vec();
    // The magic is not worth finding.
    if let Some(magic) = file.get_mut(..4) {
        magic.copy_from_slice(b"GGUF");
    }
    match Model::open(support::runtime(), Source::from_vec("a.gguf", file)) {
        Ok(model) => support::run(model),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
