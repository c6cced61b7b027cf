//! Operations on a KV cache, chosen by the fuzzer, against a model of plain lists: the property test of
//! `src/kv/property.rs` with other choices. `cargo +nightly fuzz run kv_ops`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| nybl::kv::property::run(bytes));
