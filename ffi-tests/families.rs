//! Every family of models against Hugging Face transformers: tiny random models, logits in f32.
//!
//! `data/families.py` made them and says with which versions. Windows end and rotary limits pass inside the
//! texts. The same models then give the same bits on every instruction set, thread count and chunk.

#[path = "support/mod.rs"]
mod support;

use libtest_mimic::{Arguments, Failed, Trial};
use nybl::engine::convert::{Options, Recipe, convert};
use nybl::engine::load::Model;
use nybl::engine::score::score;
use nybl::isa::Isa;
use std::path::{Path, PathBuf};
use support::{data, open, read_npy, runtime};

const CASES: [&str; 13] = [
    "llama2",
    "llama3",
    "llama-linear",
    "smollm2",
    "mistral",
    "qwen2",
    "qwen2-yarn",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3-longrope",
    "smollm3",
];

/// Cases that exist as GGUF as well.
const IN_GGUF: [&str; 7] =
    ["llama3", "qwen2-yarn", "qwen3", "gemma2", "gemma3", "phi3-longrope", "smollm3"];

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for case in CASES {
        trials.push(Trial::test(format!("{case}-logits"), move || logits(case, &folder(case))));
        trials.push(Trial::test(format!("{case}-packed"), move || packed(case)));
        trials.push(Trial::test(format!("{case}-exact"), move || exact(case)));
    }
    for case in IN_GGUF {
        let gguf = folder(case).join("model.gguf");
        trials.push(Trial::test(format!("{case}-gguf"), move || logits(case, &gguf)));
    }
    trials.push(Trial::test("what-would-be-another-model-is-refused", refusals));
    libtest_mimic::run(&arguments, trials).exit();
}

fn folder(case: &str) -> PathBuf {
    data("families").join(case)
}

fn ids() -> Vec<u32> {
    let text = std::fs::read_to_string(data("families/ids.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The largest difference of a logit, in parts of the largest logit, over all texts of the case.
fn logits(case: &str, path: &Path) -> Result<(), Failed> {
    let model = open(path);
    let mut texts = vec![folder(case).join("logits.npy")];
    texts.extend(case.ends_with("longrope").then(|| folder(case).join("logits-48.npy")));
    for text in texts {
        let (shape, want) = read_npy(&text);
        assert_eq!(shape[1], model.vocab());
        let top = want.iter().fold(0.0, |top: f32, x| top.max(x.abs()));
        let (mut worst, mut seen, mut far) = (0.0_f32, 0, 0);
        score(&model, &ids()[..shape[0]], 7, |index, logits| {
            let want = &want[index * logits.len()..(index + 1) * logits.len()];
            for (a, b) in logits.iter().zip(want) {
                let is_near = (a - b).abs() <= 1e-4 * top;
                far += usize::from(!is_near);
                worst = worst.max((a - b).abs());
            }
            seen += 1;
        })
        .unwrap();
        assert_eq!(seen, shape[0]);
        eprintln!("{case}, {seen} tokens: off by {:.1e} of {top}", worst / top);
        if far > 0 {
            let what = format!("{far} logits are off, by up to {worst} of {top}");
            return Err(format!("{}: {what}", text.display()).into());
        }
    }
    Ok(())
}

/// Settings that the forward pass would have to obey, and weights that contradict the settings.
fn refusals() -> Result<(), Failed> {
    use serde_json::{Value, json};
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("refused-family");
    let refusal = |case: &str, key: &str, value: Value| -> Result<String, Failed> {
        std::fs::create_dir_all(&place)?;
        std::fs::copy(folder(case).join("model.safetensors"), place.join("model.safetensors"))?;
        let text = std::fs::read_to_string(folder(case).join("config.json"))?;
        let mut config: Value = serde_json::from_str(&text)?;
        config[key] = value.clone();
        std::fs::write(place.join("config.json"), config.to_string())?;
        match Model::open_path(runtime(1, None), &place) {
            Ok(_) => Err(format!("{case} opens with {key} = {value}").into()),
            Err(error) => Ok(error.to_string()),
        }
    };
    for (case, key, value, word) in [
        ("llama2", "attention_bias", json!(true), "attention_bias"),
        ("llama2", "sliding_window", json!(7), "sliding_window"),
        ("llama2", "logit_scale", json!(0.5), "logit_scale"),
        ("llama2", "hidden_act", json!("relu"), "relu"),
        ("llama2", "rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        ("llama-linear", "rope_scaling", json!({"rope_type": "linear"}), "factor"),
        (
            "qwen2-yarn",
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 2, "mscale": 1}),
            "mscale",
        ),
        ("phi3-longrope", "original_max_position_embeddings", Value::Null, "original_context"),
        ("gemma2", "use_bidirectional_attention", json!(true), "bidirectional"),
        ("gemma3", "attn_logit_softcapping", json!(50.0), "attn_logit_softcapping"),
        ("gemma3", "layer_types", json!(["full_attention"]), "layer_types"),
        ("smollm3", "no_rope_layers", json!([1]), "no_rope_layers"),
        ("llama2", "model_type", json!("qwen2"), "bias"),
        ("qwen2-yarn", "model_type", json!("llama"), "layer_types"),
        ("qwen3", "model_type", json!("mistral"), "layer_types"),
        ("mistral", "model_type", json!("qwen3"), "_norm"),
        ("llama2", "num_key_value_heads", json!(1), "attn_k"),
        ("smollm2", "tie_word_embeddings", json!(false), "lm_head"),
    ] {
        let error = refusal(case, key, value)?;
        if !error.contains(word) {
            return Err(format!("{case} with another {key}: {error}").into());
        }
    }
    Ok(())
}

fn converted(case: &str, name: &str, recipe: Recipe) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{case}-{name}.nybl"));
    let options = Options::from(recipe);
    convert(&runtime(1, None), &folder(case), &path, &options, |_, _| {}).unwrap();
    path
}

/// A packed file holds all that the configuration needs.
fn packed(case: &str) -> Result<(), Failed> {
    logits(case, &converted(case, "kept", Recipe::Keep))
}

/// The bits of all logits.
fn bits(path: &Path, isa: &str, threads: usize, chunk: usize) -> Vec<u32> {
    let model = Model::open_path(runtime(threads, Some(isa)), path).unwrap();
    let mut out = Vec::new();
    score(&model, &ids(), chunk, |_, logits| out.extend(logits.iter().map(|x| x.to_bits())))
        .unwrap();
    out
}

fn exact(case: &str) -> Result<(), Failed> {
    let have = Isa::detect();
    let features = Isa::FEATURES.iter().filter(|(_, feature)| have.has(*feature));
    let row_sets: Vec<_> =
        std::iter::once("scalar").chain(features.map(|(name, _)| *name)).collect();
    let four = Recipe::Bits { bits: 4, group: 32, zero_points: false };
    for path in [folder(case), converted(case, "q4", four)] {
        let want = bits(&path, "scalar", 1, 72);
        for isa in &row_sets {
            for (threads, chunk) in [(1, 1), (2, 7), (3, 64), (2, 72)] {
                if bits(&path, isa, threads, chunk) != want {
                    let what = format!("{isa}, {threads} threads, chunks of {chunk}: other bits");
                    return Err(what.into());
                }
            }
        }
    }
    Ok(())
}
