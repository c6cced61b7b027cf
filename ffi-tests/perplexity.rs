//! Perplexity as the program prints it, against the definition written out on the model's logits.

#[path = "support/mod.rs"]
mod support;

use nybl::engine::load::Model;
use nybl::engine::score::score;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::open;

/// A text that is part of the project.
fn text() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")
}

fn nursery() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nursery.nybl")
}

fn run(args: &[&str]) -> serde_json::Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nybl"));
    command.arg("perplexity").arg(nursery()).arg(text()).args(["--json"]).args(args);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// `-ln p` of the tokens `counted` of each window of 64, which start every `step` tokens.
fn losses(model: &Model, windows: usize, step: usize, counted: std::ops::Range<usize>) -> Vec<f64> {
    let text = std::fs::read_to_string(text()).unwrap();
    let tokens = model.tokenizer().unwrap().encode(&text, true, false).unwrap();
    let bos = model.tokenizer().unwrap().bos().unwrap();
    let mut losses = Vec::new();
    for window in 0..windows {
        let window = &tokens[window * step..][..64];
        let mut input = window.to_vec();
        input[0] = bos;
        score(model, &input, 64, |at, logits| {
            if counted.contains(&(at + 1)) {
                losses.push(loss(logits, window[at + 1]));
            }
        })
        .unwrap();
    }
    losses
}

/// Minus the logarithm of a probability, in f64 throughout.
fn loss(logits: &[f32], token: u32) -> f64 {
    let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
    sum.ln() - f64::from(logits[token as usize])
}

fn near(value: &serde_json::Value, losses: &[f64]) {
    let want = (losses.iter().sum::<f64>() / losses.len() as f64).exp();
    let got = value["perplexity"].as_f64().unwrap();
    assert!((got / want - 1.0).abs() < 1e-9, "{got} where the definition gives {want}");
    assert_eq!(value["tokens"].as_u64().unwrap() as usize, losses.len());
}

#[test]
fn the_printed_figure_is_that_of_the_definition() {
    let model = open(&nursery());
    // The second half of each window, without the first token of it: 33 to 63.
    near(&run(&["--context", "64", "--windows", "5"]), &losses(&model, 5, 64, 33..64));
    let strided = ["--context", "64", "--windows", "7", "--stride", "20", "--chunk", "11"];
    near(&run(&strided), &losses(&model, 7, 20, 44..64));
}

#[test]
fn a_model_is_no_way_from_itself_and_some_way_from_another() {
    let nursery = nursery();
    let reference = ["--reference", nursery.to_str().unwrap()];
    let same = run(&[&["--context", "64", "--windows", "4"], &reference[..]].concat());
    assert_eq!(same["kl_divergence"], 0.0);
    assert_eq!(same["top1_agreement"], 1.0);
    assert_eq!(same["perplexity"], same["reference_perplexity"]);
    // Keys and values of four bits are the same model, a little worse.
    let rounded = run(&["--context", "64", "--windows", "4", "--kv", "i4"]);
    assert_ne!(rounded["perplexity"], same["perplexity"]);
}

#[test]
fn nonsense_is_refused_with_words() {
    for (args, word) in [
        (vec!["--context", "2"], "at least 4"),
        (vec!["--context", "64", "--stride", "64"], "stride"),
        (vec!["--context", "100000"], "context"),
        (vec!["--kv", "f64"], "f32, f16"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nybl"));
        let output =
            command.arg("perplexity").arg(nursery()).arg(text()).args(&args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && error.contains(word), "{args:?}: {error}");
    }
}
