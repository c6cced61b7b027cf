//! Bytes as the files of a Hugging Face folder: opened, and run if they can be.
//! `cargo +nightly fuzz run folder`.
//!
//! A line `=== NAME` begins a file. `=== header` begins the header of `model.safetensors` alone, which then
//! gets its length in front and as many weights behind as fit 64 KiB: a mutation of text stays a file.
#![no_main]

mod support;

use nybl::engine::load::Model;
use nybl::file::huggingface;
use nybl::file::source::Source;
use std::collections::BTreeMap;

const MARK: &[u8] = b"\n=== ";

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut files = BTreeMap::new();
    let mut rest = bytes;
    while let Some(at) = rest.windows(MARK.len()).position(|window| window == MARK) {
        let file = &rest[at + MARK.len()..];
        let end = file.windows(MARK.len()).position(|window| window == MARK).unwrap_or(file.len());
        rest = &file[end..];
        let Some(line) = file[..end].iter().position(|byte| *byte == b'\n') else { continue };
        let Ok(name) = std::str::from_utf8(&file[..line]) else { continue };
        let contents = &file[line + 1..end];
        let (name, contents) = match name {
            "header" => ("model.safetensors", with_weights(contents)),
            name => (name, contents.to_vec()),
        };
        if !contents.is_empty() {
            files.insert(name.to_owned(), Source::from_vec(name, contents));
        }
    }
    match huggingface::from_files("folder", &files) {
        Ok(checkpoint) => {
            if let Ok(model) = Model::from_checkpoint(support::runtime(), checkpoint) {
                support::run(model);
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

fn with_weights(header: &[u8]) -> Vec<u8> {
    let header = header.trim_ascii();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    // The header must account for every byte: its largest end is where the file ends.
    let text = String::from_utf8_lossy(header);
    let ends = text.split("\"data_offsets\"").skip(1).filter_map(|entry| {
        let list = entry.split_once('[')?.1.split_once(']')?.0;
        list.rsplit(',').next()?.trim().parse::<usize>().ok()
    });
    let end = ends.max().unwrap_or(0).min(64 << 10);
    // Small floats, whichever type they are taken for.
    file.extend((0..end).map(|i| if i % 2 == 1 { 0x2c + (i / 2 % 3) as u8 } else { i as u8 }));
    file
}
