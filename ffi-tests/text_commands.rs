//! `nybl tokenize`, `logits`, `bench`, `convert`, `completions` and `man`, as a user calls them.

#[path = "support/mod.rs"]
mod support;

use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use support::{data, read_npy, shared};

fn nybl(args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_nybl"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that fails at its arguments does not read.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn succeeds(args: &[&str], input: &[u8]) -> String {
    let output = nybl(args, input);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn fails(args: &[&str], input: &[u8]) -> String {
    let output = nybl(args, input);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    assert!(output.stdout.is_empty(), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn text_of(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn text_to_ids_and_back() {
    let model = data("nursery.F16.gguf");
    let golden = std::fs::read_to_string(data("golden_greedy.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    for case in golden.as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        let ids = succeeds(&["tokenize", text_of(&model), "--bos"], prompt.as_bytes());
        let want: Vec<_> =
            case["prompt_ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(ids, want.join(" ") + "\n");
    }
    for text in ["", "Once upon a time\n\nthere was \u{1F999}.\n"] {
        let ids = succeeds(&["tokenize", text_of(&model)], text.as_bytes());
        let back = succeeds(&["tokenize", text_of(&model), "--decode"], ids.as_bytes());
        assert_eq!(back, text);
    }
    let json = succeeds(&["tokenize", text_of(&model), "--json"], b"Tom ran");
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["text"], "Tom ran");
    let pieces = json["pieces"].as_array().unwrap();
    assert_eq!(json["count"], pieces.len());
    assert_eq!(pieces.iter().map(|piece| piece.as_str().unwrap()).collect::<String>(), "Tom ran");
}

#[test]
fn control_tokens_are_parsed_only_when_asked() {
    let path = temporary("tokenizer.json");
    let json = r#"{"model": {"type": "BPE", "vocab": {"<": 0, "s": 1, ">": 2, "<s>": 3}, "merges": []},
        "added_tokens": [{"id": 3, "content": "<s>", "special": true, "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false}], "decoder": {"type": "Fuse"}}"#;
    std::fs::write(&path, json).unwrap();
    assert_eq!(succeeds(&["tokenize", text_of(&path)], b"<s>"), "0 1 2\n");
    assert_eq!(succeeds(&["tokenize", text_of(&path), "--special"], b"<s>"), "3\n");
}

#[test]
fn a_vocabulary_alone_is_enough() {
    let vocabulary = shared("tokenizers/ggml-vocab-llama-spm.gguf");
    if !vocabulary.exists() {
        eprintln!("skipped: ../shared/tokenizers is not here");
        return;
    }
    let ids = succeeds(&["tokenize", text_of(&vocabulary)], b"Hello world");
    assert_eq!(ids, "15043 3186\n");
    let ids = succeeds(&["tokenize", text_of(&vocabulary), "--bos"], b"Hello world");
    assert_eq!(ids, "1 15043 3186\n");
    let text = succeeds(&["tokenize", text_of(&vocabulary), "--decode"], b"15043, 3186");
    assert_eq!(text, "Hello world");
}

#[test]
fn what_cannot_be_tokenized_is_said() {
    let model = data("nursery.F16.gguf");
    let error = fails(&["tokenize", text_of(&model)], b"good \xff bad");
    assert!(error.contains("byte 5 is not UTF-8"), "{error}");
    for ids in ["1 99999", "1 x", "-1", "99999999999"] {
        let error = fails(&["tokenize", text_of(&model), "--decode"], ids.as_bytes());
        assert!(error.contains("token"), "{error}");
    }
    let error = fails(&["tokenize", "nowhere.gguf"], b"");
    assert!(error.contains("nowhere.gguf"), "{error}");
    let error = fails(&["tokenize", text_of(&data("families/llama2"))], b"");
    assert!(error.contains("holds no tokenizer"), "{error}");
}

#[test]
fn logits_of_a_checkpoint_without_a_tokenizer() {
    let out = temporary("logits.npy");
    let (model, ids) = (data("families/gemma3"), data("families/ids.json"));
    let ids = std::fs::read_to_string(ids).unwrap();
    let args = ["logits", text_of(&model), "--ids", &ids, "--out", text_of(&out), "--json"];
    let json: Value = serde_json::from_str(&succeeds(&args, b"")).unwrap();
    let (shape, got) = read_npy(&out);
    assert_eq!(json["positions"], shape[0]);
    assert_eq!(json["vocabulary"], shape[1]);
    let (want_shape, want) = read_npy(&data("families/gemma3/logits.npy"));
    assert_eq!(shape, want_shape);
    let top = want.iter().fold(0.0, |top: f32, x| top.max(x.abs()));
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-4 * top));
    // The data begin where numpy can map them.
    let bytes = std::fs::read(&out).unwrap();
    assert_eq!((bytes.len() - 4 * got.len()) % 64, 0);
}

#[test]
fn logits_that_cannot_be_had_leave_no_file() {
    let out = temporary("never.npy");
    let _ = std::fs::remove_file(&out);
    let model = data("families/llama2");
    for (ids, word) in [("", "names no token"), ("1,40", "token 40"), ("1,x", "no token id")] {
        let args = ["logits", text_of(&model), "--ids", ids, "--out", text_of(&out)];
        let error = fails(&args, b"");
        assert!(error.contains(word), "{error}");
    }
    let many = vec!["1"; 97].join(",");
    let error = fails(&["logits", text_of(&model), "--ids", &many, "--out", text_of(&out)], b"");
    assert!(error.contains("96"), "{error}");
    let folder = temporary("no such folder").join("x.npy");
    let error = fails(&["logits", text_of(&model), "--ids", "1", "--out", text_of(&folder)], b"");
    assert!(error.contains("x.npy"), "{error}");
    assert!(!out.exists());
    let left = std::fs::read_dir(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let left = left.filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    assert_eq!(left.filter(|name| name.starts_with("never.npy")).count(), 0);
}

#[test]
fn a_benchmark_says_what_it_measured() {
    let model = text_of(&data("nursery.F16.gguf")).to_owned();
    let run = |more: &[&str]| {
        let args = [&["bench", "-m", &model, "--runs", "1", "--threads", "2"], more].concat();
        serde_json::from_str::<Value>(&succeeds(&args, b"")).unwrap()
    };
    let all = ["--decode", "3", "--prefill", "9", "--cost", "3", "--load", "--depth", "70", "--kv"];
    let found =
        run(&[&all[..], &["i8", "--sequences", "2", "--isa", "portable", "--json"]].concat());
    for (what, key) in [
        ("decode", "tokens_per_second"),
        ("decode", "gb_per_second"),
        ("decode", "fraction_of_read_bandwidth"),
        ("prefill", "tokens_per_second"),
        ("load", "warm_first_token_s"),
    ] {
        let number = found[what][key].as_f64().unwrap();
        assert!(number > 0.0 && number.is_finite(), "{what}.{key}: {number}");
    }
    assert_eq!(found["cost"]["milliseconds"].as_array().unwrap().len(), 3);
    assert_eq!((&found["depth"], &found["kv"]), (&70.into(), &"i8".into()));
    assert_eq!((&found["threads"], &found["isa"]), (&2.into(), &"portable".into()));

    let reason = fails(&["bench", "-m", &model, "--decode", "1", "--depth", "100000"], b"");
    assert!(reason.contains("context"), "{reason}");
    assert_eq!(nybl(&["bench", "-m", &model], b"").status.code(), Some(2));
}

#[test]
fn figures_are_drawn() {
    let svg = temporary("figures.svg");
    let args = ["bench", "--cost", "2", "--speculate", "8", "--runs", "1", "--svg", text_of(&svg)];
    succeeds(&args, b"");
    let picture = std::fs::read_to_string(&svg).unwrap();
    std::fs::remove_file(&svg).unwrap();
    for text in ["A pass over M tokens", "tokens M", "Drafts: ", "place of the draft"] {
        assert!(picture.contains(text), "{text}");
    }
}

#[test]
fn a_conversion_tells_what_became_of_the_matrices() {
    let (model, out) = (data("nursery.F16.gguf"), temporary("told.nybl"));
    let args = ["convert", text_of(&model), text_of(&out), "--bits", "4", "--json"];
    let told: Value = serde_json::from_str(&succeeds(&args, b"")).unwrap();
    assert_eq!(told["files"][0]["bytes"], std::fs::metadata(&out).unwrap().len());
    let matrices = told["matrices"].as_array().unwrap();
    let rounded = matrices.iter().find(|line| line["to"] == "q4 g32").unwrap();
    assert_eq!((&rounded["matrices"], &rounded["exact"]), (&28.into(), &false.into()));
    std::fs::remove_file(&out).unwrap();
}

#[test]
fn what_a_package_installs_names_every_command() {
    let commands = ["run", "chat", "plan", "convert", "quantize", "bench", "perplexity"];
    for shell in ["bash", "zsh", "fish"] {
        let script = succeeds(&["completions", shell], b"");
        assert!(commands.iter().all(|command| script.contains(command)), "{shell}");
    }
    let page = succeeds(&["man"], b"");
    assert!(
        page.contains(".TH nybl 1") && commands.iter().all(|name| page.contains(name)),
        "{page}"
    );
    let folder = temporary("man1");
    std::fs::create_dir_all(&folder).unwrap();
    succeeds(&["man", "--dir", text_of(&folder)], b"");
    assert!(commands.iter().all(|name| folder.join(format!("nybl-{name}.1")).exists()));
    let reason = fails(&["man", "--dir", "/no/such/folder"], b"");
    assert!(reason.contains("/no/such/folder"), "{reason}");
}
