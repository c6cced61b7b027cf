//! What several test programs need: files, runtimes, numpy arrays.
#![allow(dead_code, reason = "each program uses a part of it")]

use nybl::engine::load::Model;
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) mod injected;

/// A file of this project's own test data.
pub(crate) fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("ffi-tests/data").join(name)
}

/// A file beside the project, which may be absent.
pub(crate) fn shared(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name)
}

pub(crate) fn runtime(threads: usize, isa: Option<&str>) -> Arc<Runtime> {
    let config = RuntimeConfig { threads, isa: isa.map(String::from), ..Default::default() };
    Arc::new(Runtime::new(&config).unwrap())
}

pub(crate) fn open(path: &Path) -> Arc<Model> {
    Model::open_path(runtime(2, None), path).unwrap()
}

/// The bytes of a model file with a chat template among its metadata. A pair whose length is a multiple of the
/// alignment leaves everything behind it where it belongs.
pub(crate) fn templated(template: &str) -> Vec<u8> {
    let gguf = std::fs::read(data("nursery.F16.gguf")).unwrap();
    let key = "tokenizer.chat_template";
    let length = |text: &str| (text.len() as u64).to_le_bytes();
    let empty = 8 + key.len() + 4 + 8;
    let padding = (32 - (empty + 4 + template.len()) % 32) % 32;
    let template = format!("{{#{}#}}{template}", " ".repeat(padding));
    let pair = [&length(key)[..], key.as_bytes(), &8_u32.to_le_bytes(), &length(&template)];
    let pair = [&pair.concat(), template.as_bytes()].concat();
    let count = u64::from_le_bytes(gguf[16..24].try_into().unwrap()) + 1;
    [&gguf[..16], &count.to_le_bytes(), &pair, &gguf[24..]].concat()
}

/// Shape and values of an `.npy` file of little-endian f32 in C order.
pub(crate) fn read_npy(path: &Path) -> (Vec<usize>, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..6], b"\x93NUMPY");
    let end = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..end]).unwrap();
    assert!(header.contains("'<f4'") && header.contains("False"), "{header}");
    let shape = header.split_once('(').unwrap().1.split_once(')').unwrap().0;
    let shape = shape.split(',').filter_map(|n| n.trim().parse().ok()).collect();
    let values = bytes[end..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    (shape, values.collect())
}

/// Minus the logarithm of the probability that `logits` give to `token`.
pub(crate) fn loss(logits: &[f32], token: u32) -> f64 {
    let top = logits.iter().fold(f32::NEG_INFINITY, |top, x| top.max(*x));
    let sum: f64 = logits.iter().map(|x| f64::from(x - top).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - top)
}
