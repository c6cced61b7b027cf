//! Real models against outside references.
//!
//! The nursery model is this project's own: its ids and logits were made by Hugging Face transformers
//! in f32. The other models are other people's and lie beside the project, not in it; without them
//! their tests are listed as ignored, by name.

#[path = "support/mod.rs"]
mod support;

use libtest_mimic::{Arguments, Failed, Trial};
use nybl::engine::load::Model;
use nybl::engine::score::score;
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::file::gguf::Gguf;
use nybl::file::source::Source;
use nybl::text::sample::SamplerConfig;
use nybl::text::vocabulary::tokenizer;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use support::{data, open, read_npy, shared};

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = vec![
        Trial::test("nursery-f16-greedy", || nursery_greedy(&data("nursery.F16.gguf"), 1.0)),
        Trial::test("nursery-f16-logits", nursery_logits),
        Trial::test("nursery-tokenizer", nursery_tokenizer),
        Trial::test("embedded-model-is-fresh", embedded_model_is_fresh),
    ];
    for name in ["stories260K", "babyllama105"] {
        let file = move |kind: &str| shared(&format!("models/{name}/{name}.{kind}.gguf"));
        let here = file("F32").exists();
        let trial = |what: &str, test: fn(&str) -> Result<(), Failed>| {
            let reason = if here { "" } else { " (needs ../shared/models)" };
            let name = name.to_owned();
            let full = format!("{name}-{what}{reason}");
            Trial::test(full, move || test(&name)).with_ignored_flag(!here)
        };
        trials.push(trial("f32-greedy", others_greedy));
        trials.push(trial("f32-logits", others_logits));
        trials.push(trial("perplexity", perplexity));
        trials.push(trial("padded-rows", padded_rows));
    }
    for name in ["gpt-2", "llama-spm", "phi-3"] {
        let here = shared(&format!("tokenizers/ggml-vocab-{name}.gguf")).exists();
        let reason = if here { "" } else { " (needs ../shared/tokenizers)" };
        let full = format!("vocabulary-{name}{reason}");
        trials.push(Trial::test(full, move || vocabulary(name)).with_ignored_flag(!here));
    }
    let here = shared("text").exists() && shared("tokenizers").exists();
    let reason = if here { "" } else { " (needs ../shared)" };
    let trial = Trial::test(format!("texts-come-back{reason}"), texts_come_back);
    trials.push(trial.with_ignored_flag(!here));
    libtest_mimic::run(&arguments, trials).exit();
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Greedy continuation of `prompt`, past any end token, because the references do not stop there.
fn greedy(model: &Arc<Model>, prompt: &[u32], count: usize) -> Vec<u32> {
    let config = SessionConfig { sampler: SamplerConfig::greedy(), ..SessionConfig::default() };
    let mut session = Session::new(Arc::clone(model), &config).unwrap();
    session.append(prompt).unwrap();
    let mut out = Vec::new();
    while out.len() < count {
        match session.next().unwrap() {
            Next::Token(id) => out.push(id),
            Next::End(id) => {
                out.push(id);
                session.append(&[id]).unwrap();
            }
            Next::ContextFull => break,
        }
    }
    out
}

/// Every golden continuation; at least `share` of all tokens must come before a first difference.
fn nursery_greedy(path: &Path, share: f64) -> Result<(), Failed> {
    let model = open(path);
    let text = std::fs::read_to_string(data("golden_greedy.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let (mut same, mut all) = (0, 0);
    for case in golden.as_array().unwrap() {
        let want = ids(&case["greedy_ids"]);
        let got = greedy(&model, &ids(&case["prompt_ids"]), want.len());
        same += got.iter().zip(&want).take_while(|(a, b)| a == b).count();
        all += want.len();
    }
    if (same as f64) < share * all as f64 {
        return Err(format!("{same} of {all} tokens before the first difference").into());
    }
    Ok(())
}

fn nursery_logits() -> Result<(), Failed> {
    let model = open(&data("nursery.F16.gguf"));
    let text = std::fs::read_to_string(data("ids256.json")).unwrap();
    let tokens = ids(&serde_json::from_str(&text).unwrap());
    let (shape, want) = read_npy(&data("logits_at_0_63_127_255.npy"));
    assert_eq!(shape, [4, model.vocab()]);
    let places = [0, 63, 127, 255];
    let mut worst = 0.0_f32;
    score(&model, &tokens, 64, |index, logits| {
        if let Some(row) = places.iter().position(|place| *place == index) {
            let want = &want[row * logits.len()..(row + 1) * logits.len()];
            worst = logits.iter().zip(want).fold(worst, |worst, (a, b)| worst.max((a - b).abs()));
        }
    })
    .unwrap();
    within(worst, 1e-4)
}

fn within(worst: f32, limit: f32) -> Result<(), Failed> {
    if worst > limit {
        return Err(format!("a logit is off by {worst}, more than {limit}").into());
    }
    Ok(())
}

fn nursery_tokenizer() -> Result<(), Failed> {
    let text = std::fs::read_to_string(data("golden_greedy.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let model = open(&data("nursery.F16.gguf"));
    for case in golden.as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        let got = model.tokenizer().unwrap().encode(prompt, true, false).unwrap();
        assert_eq!(got, ids(&case["prompt_ids"]), "{prompt}");
    }
    Ok(())
}

/// The ids that llama.cpp gives to its own test texts, from vocabularies in GGUF files.
fn vocabulary(name: &str) -> Result<(), Failed> {
    let file = |ending: &str| shared(&format!("tokenizers/ggml-vocab-{name}.gguf{ending}"));
    let gguf = Gguf::open(Source::open(&file("")).unwrap()).unwrap();
    let tokenizer = tokenizer(gguf.metadata(), usize::MAX).unwrap().unwrap();
    let texts = std::fs::read_to_string(file(".inp")).unwrap();
    let golden = std::fs::read_to_string(file(".out")).unwrap();
    let mut count = 0;
    for (text, want) in texts.split("\n__ggml_vocab_test__\n").zip(golden.lines()) {
        let want: Vec<u32> = want.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(tokenizer.encode(text, false, false).unwrap(), want, "{text:?}");
        count += 1;
    }
    assert!(count > 40, "{count} texts");
    Ok(())
}

/// Every text is what its ids are decoded to, in one piece and token by token.
fn texts_come_back() -> Result<(), Failed> {
    for name in ["ggml-vocab-gpt-2.gguf", "ggml-vocab-llama-spm.gguf", "ggml-vocab-phi-3.gguf"] {
        let gguf = Gguf::open(Source::open(&shared(&format!("tokenizers/{name}")))?)?;
        let Some(tokenizer) = tokenizer(gguf.metadata(), usize::MAX)? else {
            return Err(format!("{name}: no vocabulary").into());
        };
        let mut count = 0;
        for entry in std::fs::read_dir(shared("text"))? {
            let Ok(text) = std::fs::read_to_string(entry?.path()) else { continue };
            let text: String = text.chars().take(200_000).collect();
            let ids = tokenizer.encode(&text, false, false)?;
            let mut stream = tokenizer.stream();
            let mut streamed = String::new();
            for id in &ids {
                streamed += &stream.push(&tokenizer, *id)?;
            }
            streamed += &stream.finish(&tokenizer)?;
            if tokenizer.decode(&ids)? != text || streamed != text {
                return Err(format!("{name}: a text comes back changed").into());
            }
            count += 1;
        }
        assert!(count >= 5, "{count} texts");
    }
    Ok(())
}

/// The model inside the program is what `nybl convert` makes of the checkpoint, byte for byte, and close
/// enough to the float model to begin its texts the same way.
fn embedded_model_is_fresh() -> Result<(), Failed> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nursery.nybl");
    let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nursery.nybl");
    let recipe = nybl::engine::convert::Recipe::Bits { bits: 4, group: 32, zero_points: false };
    let from = data("nursery.F16.gguf");
    nybl::engine::convert::convert(
        &support::runtime(2, None),
        &from,
        &made,
        &recipe.into(),
        |_, _| {},
    )
    .unwrap();
    if std::fs::read(&made).unwrap() != std::fs::read(&committed).unwrap() {
        let how = "nybl convert ffi-tests/data/nursery.F16.gguf models/nursery.nybl --bits 4";
        return Err(format!("models/nursery.nybl is stale: {how}").into());
    }
    nursery_greedy(&committed, 0.02)
}

fn golden(name: &str) -> (Vec<u32>, Vec<u32>) {
    let path = shared(&format!("models/{name}/golden_greedy200.json"));
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let (prompt, all) = (ids(&golden["prompt"]), ids(&golden["greedy_ids"]));
    let rest = all.strip_prefix(prompt.as_slice()).unwrap_or(&all).to_vec();
    (prompt, rest)
}

fn others_greedy(name: &str) -> Result<(), Failed> {
    let model = open(&shared(&format!("models/{name}/{name}.F32.gguf")));
    let (prompt, want) = golden(name);
    assert!(want.len() >= 190, "{} golden tokens", want.len());
    assert_eq!(greedy(&model, &prompt, want.len()), want);
    Ok(())
}

fn others_logits(name: &str) -> Result<(), Failed> {
    let model = open(&shared(&format!("models/{name}/{name}.F32.gguf")));
    let (shape, want) = read_npy(&shared(&format!("models/{name}/numpy_ref_logits_first64.npy")));
    assert_eq!(shape, [64, model.vocab()]);
    let (mut tokens, rest) = golden(name);
    tokens.extend(rest);
    let mut worst = 0.0_f32;
    score(&model, &tokens[..64], 7, |index, logits| {
        let want = &want[index * logits.len()..(index + 1) * logits.len()];
        worst = logits.iter().zip(want).fold(worst, |worst, (a, b)| worst.max((a - b).abs()));
    })
    .unwrap();
    within(worst, 1e-4)
}

/// Bytes in groups of 128 from floats: stories260K has rows of 64 and of 172, which are padded; the
/// model stays what it is.
fn padded_rows(name: &str) -> Result<(), Failed> {
    let from = shared(&format!("models/{name}/{name}.F32.gguf"));
    let to = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-q8-g128.nybl"));
    let recipe = nybl::engine::convert::Recipe::Bytes { group: 128 };
    nybl::engine::convert::convert(
        &support::runtime(2, None),
        &from,
        &to,
        &recipe.into(),
        |_, _| {},
    )
    .unwrap();
    let (float, packed) =
        (text_perplexity(&open(&from), 2_000), text_perplexity(&open(&to), 2_000));
    if (packed / float - 1.0).abs() > 0.01 {
        return Err(format!("perplexity {packed:.4}, of the floats {float:.4}").into());
    }
    Ok(())
}

/// Perplexity over at least `least` tokens of stories, each from its beginning and as long as the context.
fn text_perplexity(model: &Model, least: u32) -> f64 {
    let text = std::fs::read_to_string(shared("text/tinystories_slice_decoded.txt")).unwrap();
    let (mut loss, mut count) = (0.0, 0);
    for story in text.split("<|endoftext|>").map(str::trim).filter(|s| !s.is_empty()) {
        let mut tokens = model.tokenizer().unwrap().encode(story, true, false).unwrap();
        tokens.truncate(model.config().context);
        score(model, &tokens, 128, |index, logits| {
            if let Some(next) = tokens.get(index + 1) {
                loss += support::loss(logits, *next);
                count += 1;
            }
        })
        .unwrap();
        if count >= least {
            break;
        }
    }
    (loss / f64::from(count)).exp()
}

/// Perplexity of the quantised files on about 10k tokens of stories, next to the figures that were
/// measured with dequantised weights and float activations.
fn perplexity(name: &str) -> Result<(), Failed> {
    let figures = match name {
        "stories260K" => [("F32", 4.7030), ("Q8_0", 4.7052), ("Q4_0", 5.1707)],
        _ => [("F32", 2.1795), ("Q8_0", 2.1791), ("Q4_0", 2.3710)],
    };
    for (kind, want) in figures {
        let got =
            text_perplexity(&open(&shared(&format!("models/{name}/{name}.{kind}.gguf"))), 10_000);
        eprintln!("{name} {kind}: perplexity {got:.4}, weight-only {want}");
        if (got / want - 1.0).abs() > 0.01 {
            return Err(format!("{kind}: perplexity {got:.4}, more than 1% from {want}").into());
        }
    }
    Ok(())
}
