//! Speculation changes no token: any drafter, good, bad or hostile, any settings, seed, instruction set
//! and number of threads. `NYBL_SPEC_PROMPTS` sets the number of prompts.

#[path = "support/mod.rs"]
mod support;

use nybl::engine::draft::ModelDrafter;
use nybl::engine::load::Model;
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::engine::speculate::Speculator;
use nybl::isa::Isa;
use nybl::spec::control::{Controller, MOST_DRAFTS};
use nybl::spec::distribution::{Penalties, SamplerConfig};
use nybl::spec::draft::{Callback, Draft, Drafter, Ngram};
use nybl::spec::random::Random;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use support::{data, runtime};

fn packed() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/nursery.nybl")
}

/// Prompts of 1 to 40 tokens from a text.
fn prompts() -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(data("ids256.json")).unwrap();
    let ids: Vec<u32> = serde_json::from_str(&text).unwrap();
    let count = std::env::var("NYBL_SPEC_PROMPTS").map_or(12, |count| count.parse().unwrap());
    let prompt = |i: usize| {
        let start = i * 37 % 200;
        ids[start..start + 1 + i * 7 % 40].to_vec()
    };
    (0..count).map(prompt).collect()
}

/// Instruction sets of this CPU.
fn row_sets() -> Vec<&'static str> {
    let have = Isa::detect();
    let features = Isa::FEATURES.iter().filter(|(_, feature)| have.has(*feature));
    std::iter::once("scalar").chain(features.map(|(name, _)| *name)).collect()
}

fn session(model: &Arc<Model>, sampler: SamplerConfig, context: usize) -> Session {
    let config = SessionConfig { context, sampler, ..SessionConfig::default() };
    Session::new(Arc::clone(model), &config).unwrap()
}

const LENGTH: usize = 60;

/// What `next` comes to until it ends or `LENGTH` is reached.
fn outcomes(mut next: impl FnMut() -> Next) -> Vec<Next> {
    let mut out = Vec::new();
    while out.len() < LENGTH {
        let outcome = next();
        out.push(outcome);
        if !matches!(outcome, Next::Token(_)) {
            break;
        }
    }
    out
}

fn plainly(
    model: &Arc<Model>,
    sampler: SamplerConfig,
    context: usize,
    prompt: &[u32],
) -> Vec<Next> {
    let mut session = session(model, sampler, context);
    session.append(prompt).unwrap();
    outcomes(|| session.next().unwrap())
}

fn tokens(outcomes: &[Next]) -> Vec<u32> {
    let token = |next: &Next| if let Next::Token(id) = next { Some(*id) } else { None };
    outcomes.iter().filter_map(token).collect()
}

/// A drafter that knows the future, and lies about every `lie`-th token of it.
fn prophet(sequence: Vec<u32>, lie: usize) -> Box<dyn Drafter> {
    Box::new(Callback(move |context: &[u32], most| {
        let future = sequence.iter().enumerate().skip(context.len()).take(most);
        future.map(|(i, id)| if i % lie == lie - 1 { (id + 1) % 2048 } else { *id }).collect()
    }))
}

/// Every kind of drafter, for a prompt whose continuation is known.
fn drafters(
    model: &Model,
    other: Arc<Model>,
    known: &[u32],
    seed: u64,
) -> Vec<(&'static str, Box<dyn Drafter>)> {
    let mut random = Random(seed);
    let mut noise = move |_: &[u32], most: usize| -> Vec<u32> {
        (0..most).map(|_| (random.bits() % 2048) as u32).collect()
    };
    let eos = model.eos()[0];
    vec![
        ("prophet", prophet(known.to_vec(), usize::MAX)),
        ("liar", prophet(known.to_vec(), 3)),
        ("always wrong", prophet(known.to_vec(), 1)),
        ("noise", Box::new(Callback(move |context: &[u32], most| noise(context, most)))),
        ("no tokens", Box::new(Callback(|_: &[u32], most| vec![u32::MAX; most]))),
        ("ends", Box::new(Callback(move |_: &[u32], most| vec![eos; most]))),
        ("too many", Box::new(Callback(|context: &[u32], _| context.repeat(3)))),
        ("n-grams", Box::new(Ngram::new())),
        ("another model", Box::new(ModelDrafter::new(other, 2048).unwrap())),
    ]
}

fn samplers() -> [SamplerConfig; 3] {
    let penalties = Penalties { repeat: 1.2, frequency: 0.1, presence: 0.1, window: 20 };
    [
        SamplerConfig::greedy(),
        SamplerConfig { seed: 11, ..SamplerConfig::default() },
        SamplerConfig { temperature: 0.4, top_k: 0, penalties, ..SamplerConfig::default() },
    ]
}

#[test]
fn any_drafter_leaves_every_token_as_it_is() {
    let isas = row_sets();
    for (i, prompt) in prompts().iter().enumerate() {
        let runtime = runtime(1 + i % 3, Some(isas[i % isas.len()]));
        let path = if i % 4 == 3 { data("nursery.F16.gguf") } else { packed() };
        let model = Model::open_path(Arc::clone(&runtime), &path).unwrap();
        let other = Model::open_path(runtime, &data("nursery.F16.gguf")).unwrap();
        // Some contexts end before the text does.
        let context = if i % 5 == 4 { prompt.len() + 20 } else { 0 };
        let sampler = samplers()[i % 3];
        let want = plainly(&model, sampler, context, prompt);
        let known = [prompt.clone(), tokens(&want)].concat();
        for (name, drafter) in drafters(&model, Arc::clone(&other), &known, i as u64) {
            let controller = if i % 2 == 0 { Controller::always() } else { Controller::new() };
            let session = session(&model, sampler, context);
            let mut speculator = Speculator::new(session, drafter, controller).unwrap();
            speculator.append(prompt).unwrap();
            let got = outcomes(|| speculator.next().unwrap());
            assert_eq!(got, want, "prompt {i}, {name}");
            assert_eq!(speculator.tokens(), known, "prompt {i}, {name}");
        }
    }
}

#[test]
fn a_session_goes_on_as_if_nothing_had_been_drafted() {
    let model = Model::open_path(runtime(2, None), &packed()).unwrap();
    for sampler in samplers() {
        for stop in [1, 3, 4, 9] {
            let mut plain = session(&model, sampler, 0);
            plain.append(&[1, 5, 9]).unwrap();
            (0..stop).for_each(|_| assert!(matches!(plain.next().unwrap(), Next::Token(_))));
            let known = plain.tokens().to_vec();
            let ahead = plainly(&model, sampler, 0, &[1, 5, 9]);
            let ahead = [vec![1, 5, 9], tokens(&ahead)].concat();

            let fresh = session(&model, sampler, 0);
            let drafter = prophet(ahead, usize::MAX);
            let mut ours = Speculator::new(fresh, drafter, Controller::always()).unwrap();
            ours.append(&[1, 5, 9]).unwrap();
            (0..stop).for_each(|_| assert!(matches!(ours.next().unwrap(), Next::Token(_))));
            assert_eq!(ours.tokens(), known);
            for session_tokens in [&[7, 8][..], &[30]] {
                plain.append(session_tokens).unwrap();
                ours.append(session_tokens).unwrap();
                for _ in 0..5 {
                    assert_eq!(ours.next().unwrap(), plain.next().unwrap());
                }
            }
            plain.truncate(4);
            ours.truncate(4);
            for _ in 0..20 {
                assert_eq!(ours.next().unwrap(), plain.next().unwrap());
            }
            assert_eq!(ours.tokens(), plain.tokens());
        }
    }
}

#[test]
fn foretold_tokens_come_several_at_a_pass() {
    let model = Model::open_path(runtime(2, None), &packed()).unwrap();
    let want = plainly(&model, SamplerConfig::greedy(), 0, &[1, 5, 9]);
    let known = [vec![1, 5, 9], tokens(&want)].concat();
    let fresh = session(&model, SamplerConfig::greedy(), 0);
    let drafter = prophet(known, usize::MAX);
    let mut ours = Speculator::new(fresh, drafter, Controller::always()).unwrap();
    ours.append(&[1, 5, 9]).unwrap();
    assert_eq!(outcomes(|| ours.next().unwrap()), want);
    let metrics = ours.controller().metrics().clone();
    assert_eq!(metrics.accepted, metrics.drafted);
    let fewest = tokens(&want).len().div_ceil(MOST_DRAFTS + 1) as u64;
    assert!(metrics.passes <= fewest + 2, "{metrics:?}");
}

#[test]
fn a_model_drafts_what_it_would_say_itself() {
    let model = Model::open_path(runtime(1, None), &packed()).unwrap();
    let want = tokens(&plainly(&model, SamplerConfig::greedy(), 0, &[1, 5, 9]));
    let mut drafter = ModelDrafter::new(Arc::clone(&model), model.vocab()).unwrap();
    let mut draft = Draft::default();
    drafter.draft(&[1, 5, 9], 6, &mut draft).unwrap();
    assert_eq!(draft.tokens, want[..6]);
    assert!(draft.confidence.iter().all(|c| *c > 0.0 && *c <= 1.0));
    // The sequence went another way than the drafts.
    let mut context = vec![1, 5, 9];
    context.extend(&want[..2]);
    for _ in 0..2 {
        draft.clear();
        drafter.draft(&context, 3, &mut draft).unwrap();
        assert_eq!(draft.tokens, want[2..5]);
        draft.clear();
        drafter.draft(&[1, 5, 300, 2], 3, &mut draft).unwrap();
        drafter.rewind(1);
    }
    draft.clear();
    drafter.draft(&vec![5; model.config().context + 1], 3, &mut draft).unwrap();
    assert!(draft.tokens.is_empty(), "longer than the drafter's context");
    assert!(ModelDrafter::new(model, 2047).is_err());
}

#[test]
fn the_command_line_prints_the_same_text_and_says_what_was_drafted() {
    let run = |draft: &str, rest: &[&str]| -> serde_json::Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nybl"));
        command.args(["run", "-p", "Once upon a time", "-n", "80", "--json", "--draft", draft]);
        let output = command.args(rest).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    for rest in [&["--temp", "0"][..], &["--seed", "3"]] {
        let want = run("off", rest);
        assert_eq!(want["speculation"]["drafted"], 0);
        let file = data("nursery.F16.gguf");
        for draft in ["auto", "ngram", file.to_str().unwrap()] {
            let got = run(draft, rest);
            assert_eq!(got["text"], want["text"], "{draft}");
            assert_eq!(got["finish"], want["finish"], "{draft}");
            let figures = &got["speculation"];
            let count = |name: &str| figures[name].as_u64().unwrap();
            assert!(count("accepted") <= count("drafted"));
            assert!(count("target_passes") > 0 && count("target_passes") <= 80);
            assert_eq!(figures["acceptance_at"].as_array().unwrap().len(), MOST_DRAFTS);
        }
    }
}
