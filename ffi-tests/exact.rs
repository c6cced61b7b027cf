//! Logits are the same bits for every row set, thread count, prefill chunk and batch size.

#[path = "support/mod.rs"]
mod support;

use nybl::engine::convert::{Recipe, convert};
use nybl::engine::load::Model;
use nybl::engine::score::score;
use nybl::isa::Isa;
use std::path::{Path, PathBuf};
use support::{data, runtime};

/// A text of 70 tokens, which crosses a KV block.
fn tokens() -> Vec<u32> {
    let text = std::fs::read_to_string(data("ids256.json")).unwrap();
    let ids: Vec<u32> = serde_json::from_str(&text).unwrap();
    ids[..70].to_vec()
}

/// The bits of all logits.
fn bits(path: &Path, isa: &str, threads: usize, chunk: usize) -> Vec<u32> {
    let model = Model::open_path(runtime(threads, Some(isa)), path).unwrap();
    let mut out = Vec::new();
    score(&model, &tokens(), chunk, |_, logits| out.extend(logits.iter().map(|x| x.to_bits())))
        .unwrap();
    out
}

/// Row sets this CPU has, weakest first.
fn row_sets() -> Vec<&'static str> {
    let have = Isa::detect();
    let features = Isa::FEATURES.iter().filter(|(_, feature)| have.has(*feature));
    std::iter::once("scalar").chain(features.map(|(name, _)| *name)).collect()
}

/// The nursery model in another format.
fn converted(name: &str, recipe: Recipe) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("exact-{name}.nybl"));
    convert(&runtime(1, None), &data("nursery.F16.gguf"), &path, &recipe.into(), |_, _| {})
        .unwrap();
    path
}

fn check(path: &Path) {
    let want = bits(path, "scalar", 1, 70);
    for isa in row_sets() {
        for (threads, chunk) in [(1, 1), (2, 7), (3, 64), (2, 70), (1, 70)] {
            let got = bits(path, isa, threads, chunk);
            assert!(got == want, "{isa}, {threads} threads, chunks of {chunk}: other bits");
        }
    }
}

#[test]
fn f16_weights() {
    check(&data("nursery.F16.gguf"));
}

#[test]
fn bytes_in_groups_of_64() {
    check(&converted("q8", Recipe::Bytes { group: 64 }));
}

#[test]
fn four_bits_in_groups_of_32() {
    check(&converted("q4", Recipe::Bits { bits: 4, group: 32, zero_points: false }));
}

#[test]
fn four_bits_with_zero_points_in_groups_of_128() {
    check(&converted("q4z", Recipe::Bits { bits: 4, group: 128, zero_points: true }));
}

#[test]
fn two_and_three_bits() {
    check(&converted("q3", Recipe::Bits { bits: 3, group: 64, zero_points: false }));
    check(&converted("q2z", Recipe::Bits { bits: 2, group: 32, zero_points: true }));
    let runtime = runtime(1, None);
    let recipe = Recipe::Bits { bits: 5, group: 32, zero_points: false };
    let to = Path::new(env!("CARGO_TARGET_TMPDIR")).join("exact-q5.nybl");
    let outcome = convert(&runtime, &data("nursery.F16.gguf"), &to, &recipe.into(), |_, _| {});
    assert!(outcome.unwrap_err().to_string().contains("5 bits"));
}

#[test]
fn a_packed_file_computes_what_its_source_does() {
    let kept = converted("kept", Recipe::Keep);
    let isa = *row_sets().last().unwrap();
    assert!(bits(&kept, isa, 2, 70) == bits(&data("nursery.F16.gguf"), isa, 2, 70));
}
