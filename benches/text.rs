//! Tokenizers: bytes a second of encoding, and the time to open a packed vocabulary.
//!
//! On the vocabularies and texts of `../shared`; what is not there is left out by name.

use divan::{Bencher, black_box, counter::BytesCount};
use nybl::file::gguf::Gguf;
use nybl::file::metadata::Metadata;
use nybl::file::source::Source;
use nybl::text::tokenizer::Tokenizer;
use nybl::text::vocabulary;
use std::fmt;
use std::path::{Path, PathBuf};

fn main() {
    divan::main();
}

fn shared(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name)
}

/// A vocabulary: a GGUF file or a `tokenizer.json`.
#[derive(Clone, Copy)]
struct Vocabulary(&'static str);

impl fmt::Display for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Vocabulary {
    fn open(self) -> Tokenizer {
        let source = Source::open(&shared(self.0)).expect("it is there");
        if Gguf::recognises(source.bytes()) {
            let gguf = Gguf::open(source).expect("a GGUF file");
            return vocabulary::tokenizer(gguf.metadata(), usize::MAX)
                .expect("known")
                .expect("one");
        }
        Tokenizer::from_json(source.bytes(), None, vec![], false).expect("known")
    }
}

fn vocabularies() -> impl Iterator<Item = Vocabulary> {
    let names = [
        "tokenizers/ggml-vocab-llama-spm.gguf",
        "tokenizers/ggml-vocab-gpt-2.gguf",
        "tokenizers/gpt2/tokenizer.json",
        "tokenizers/smollm2/tokenizer.json",
    ];
    names
        .into_iter()
        .filter(|name| {
            let here = shared(name).exists();
            if !here {
                eprintln!("left out: ../shared/{name} is not here");
            }
            here
        })
        .map(Vocabulary)
}

fn encode(bencher: Bencher, vocabulary: Vocabulary, text: &str) {
    let text = std::fs::read_to_string(shared(text)).expect("a text");
    let tokenizer = vocabulary.open();
    bencher
        .counter(BytesCount::new(text.len()))
        .bench_local(|| tokenizer.encode(black_box(&text), false, false).expect("ids"));
}

#[divan::bench(args = vocabularies(), sample_count = 10, sample_size = 1)]
fn plays(bencher: Bencher, vocabulary: &Vocabulary) {
    encode(bencher, *vocabulary, "text/tinyshakespeare.txt");
}

#[divan::bench(args = vocabularies(), sample_count = 10, sample_size = 1)]
fn encyclopedia(bencher: Bencher, vocabulary: &Vocabulary) {
    encode(bencher, *vocabulary, "text/wikitext2_wiki.test.raw");
}

#[divan::bench(args = vocabularies(), sample_count = 10, sample_size = 1)]
fn open_packed(bencher: Bencher, vocabulary: &Vocabulary) {
    let mut metadata = Metadata::new("bench");
    vocabulary::store(&vocabulary.open(), &mut metadata).expect("stored");
    bencher.bench_local(|| vocabulary::tokenizer(black_box(&metadata), usize::MAX).expect("read"));
}
