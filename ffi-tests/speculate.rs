//! Speculation changes no token: any drafter, good, bad or hostile, any settings, seed, instruction set
//! and number of threads. `NYBL_SPEC_PROMPTS` sets the number of prompts.

#[path = "support/mod.rs"]
mod support;

use nybl::engine::draft::ModelDrafter;
use nybl::engine::load::Model;
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::engine::speculate::Speculator;
use nybl::error::Error;
use nybl::isa::Isa;
use nybl::spec::control::{Controller, MOST_DRAFTS};
use nybl::spec::distribution::{History, Hook, Penalties, SamplerConfig};
use nybl::spec::draft::{Callback, Draft, Drafter, Ngram, Request};
use nybl::spec::random::Random;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use support::{data, runtime, shared};

fn packed() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/nursery.nybl")
}

/// Prompts of 1 to 40 tokens: pieces of a text, every other one with some tokens that come from nowhere.
fn prompts() -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(data("ids256.json")).unwrap();
    let ids: Vec<u32> = serde_json::from_str(&text).unwrap();
    let count = std::env::var("NYBL_SPEC_PROMPTS").map_or(12, |count| count.parse().unwrap());
    let mut random = Random(17);
    let mut below = move |most: usize| (random.bits() % most as u64) as usize;
    let mut prompt = |i: usize| {
        let (start, length) = (below(ids.len() - 40), 1 + below(40));
        let mut prompt = ids[start..start + length].to_vec();
        for _ in 0..i % 2 * 3 {
            let place = below(length);
            prompt[place] = below(2048) as u32;
        }
        prompt
    };
    (0..count).map(&mut prompt).collect()
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

/// Greedy drafts, as many as asked for.
fn request(context: &[u32], most: usize) -> Request<'_> {
    const GREEDY: SamplerConfig = SamplerConfig {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        penalties: Penalties { repeat: 1.0, frequency: 0.0, presence: 0.0, window: 0 },
        seed: 0,
    };
    let (sampler, hook, random) = (&GREEDY, None, Random(0));
    Request { context, most, sampler, hook, random, go_on: &|_| true }
}

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
        ("another model", Box::new(ModelDrafter::new(other, model).unwrap())),
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
    let metrics = ours.controller().unwrap().metrics().clone();
    assert_eq!(metrics.accepted, metrics.drafted);
    let fewest = tokens(&want).len().div_ceil(MOST_DRAFTS + 1) as u64;
    assert!(metrics.passes <= fewest + 2, "{metrics:?}");
}

#[test]
fn a_model_drafts_what_it_would_say_itself() {
    let model = Model::open_path(runtime(1, None), &packed()).unwrap();
    let want = tokens(&plainly(&model, SamplerConfig::greedy(), 0, &[1, 5, 9]));
    let mut drafter = ModelDrafter::new(Arc::clone(&model), &model).unwrap();
    let mut draft = Draft::default();
    let mut drafted = |drafter: &mut ModelDrafter, context: &[u32], most: usize| {
        draft.clear();
        drafter.draft(&request(context, most), &mut draft).unwrap();
        assert!(draft.confidence.iter().all(|c| *c > 0.0 && *c <= 1.0));
        draft.tokens.clone()
    };
    assert_eq!(drafted(&mut drafter, &[1, 5, 9], 6), want[..6]);
    // The sequence went another way than the drafts.
    let mut context = vec![1, 5, 9];
    context.extend(&want[..2]);
    for _ in 0..2 {
        assert_eq!(drafted(&mut drafter, &context, 3), want[2..5]);
        drafted(&mut drafter, &[1, 5, 300, 2], 3);
        drafter.rewind(1);
    }
    // What a drafter that has fallen behind has not seen, and what it cannot hold.
    let long: Vec<u32> = (0..200).map(|i| i * 7 % 2048).collect();
    drafter.prepare(&long[..100], true).unwrap();
    let want = plainly(&model, SamplerConfig::greedy(), 0, &long);
    assert_eq!(drafted(&mut drafter, &long, 4).len(), 4, "from the end of the context");
    drafter.prepare(&long, true).unwrap();
    assert_eq!(drafted(&mut drafter, &long, 4), tokens(&want)[..4], "from all of it");
    for length in [250, 256, 257, 1000] {
        let beyond: Vec<u32> = long.iter().cycle().take(length).copied().collect();
        assert_eq!(drafted(&mut drafter, &beyond, 4).len(), 4, "a context of {length}");
    }
    assert!(drafted(&mut drafter, &[], 4).is_empty());
}

#[test]
fn a_model_draws_with_the_random_numbers_of_the_target() {
    let model = Model::open_path(runtime(1, None), &packed()).unwrap();
    for sampler in samplers() {
        let want = tokens(&plainly(&model, sampler, 0, &[1, 5, 9]));
        let mut drafter = ModelDrafter::new(Arc::clone(&model), &model).unwrap();
        let mut draft = Draft::default();
        let context = [1, 5, 9];
        let random = Random(sampler.seed);
        let request = Request { sampler: &sampler, random, ..request(&context, 7) };
        drafter.draft(&request, &mut draft).unwrap();
        assert_eq!(draft.tokens, want[..7], "the same model foretells itself");
    }
}

#[test]
fn a_model_stops_drafting_when_it_is_told_to() {
    let model = Model::open_path(runtime(1, None), &packed()).unwrap();
    let mut drafter = ModelDrafter::new(Arc::clone(&model), &model).unwrap();
    let mut draft = Draft::default();
    let context = [1, 5, 9];
    let request = Request { go_on: &|drafted| drafted.len() < 2, ..request(&context, 7) };
    drafter.draft(&request, &mut draft).unwrap();
    assert_eq!(draft.tokens.len(), 2);
}

#[test]
fn a_drafter_with_another_vocabulary_translates() {
    let path = shared("models/stories260K/stories260K.F16.gguf");
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return;
    }
    let runtime = runtime(2, None);
    let model = Model::open_path(Arc::clone(&runtime), &packed()).unwrap();
    let other = Model::open_path(runtime, &path).unwrap();
    let prompt = model.tokenizer().unwrap().encode("Once upon a time", true, false).unwrap();
    for sampler in samplers() {
        let want = plainly(&model, sampler, 0, &prompt);
        let drafter = ModelDrafter::new(Arc::clone(&other), &model).unwrap();
        let session = session(&model, sampler, 0);
        let mut ours = Speculator::new(session, Box::new(drafter), Controller::always()).unwrap();
        ours.append(&prompt).unwrap();
        assert_eq!(outcomes(|| ours.next().unwrap()), want);
        let metrics = ours.controller().unwrap().metrics();
        assert!(metrics.accepted > 5, "{metrics:?}");
    }
}

#[test]
fn a_vocabulary_that_cannot_be_compared_is_refused() {
    let runtime = runtime(1, None);
    let paths = [data("families/llama3/model.gguf"), packed()];
    let [llama, packed] = paths.map(|path| Model::open_path(Arc::clone(&runtime), &path).unwrap());
    // Where neither says what its tokens are, the same number of them is taken for the same ones.
    assert!(ModelDrafter::new(Arc::clone(&llama), &llama).is_ok());
    let refused = ModelDrafter::new(Arc::clone(&llama), &packed).map(|_| ()).unwrap_err();
    let Error::InvalidArgument(text) = refused else { panic!("{refused}") };
    assert!(text.contains("cannot draft for") && text.contains("only one of them"), "{text}");
}

#[test]
fn a_hook_steers_target_and_drafter_alike() {
    let model = Model::open_path(runtime(2, None), &packed()).unwrap();
    // Tokens after an even one must be odd, and the other way round.
    let hook = Hook::new(|history: History<'_>, logits: &mut [f32]| {
        let last = history.drafted.last().or(history.settled.last()).unwrap();
        let wrong = logits.iter_mut().skip((last % 2) as usize).step_by(2);
        wrong.for_each(|logit| *logit = f32::NEG_INFINITY);
    });
    for sampler in samplers() {
        let hooked = || {
            let mut session = session(&model, sampler, 0);
            session.set_logits_hook(Some(hook.clone()));
            session.append(&[1, 5, 9]).unwrap();
            session
        };
        let mut plain = hooked();
        let want = outcomes(|| plain.next().unwrap());
        assert!(tokens(&want).windows(2).all(|pair| pair[0] % 2 != pair[1] % 2));
        for length in [7, 1] {
            let drafter = ModelDrafter::new(Arc::clone(&model), &model).unwrap();
            let mut controller = Controller::always();
            controller.set_limit(length);
            let mut ours = Speculator::new(hooked(), Box::new(drafter), controller).unwrap();
            assert_eq!(outcomes(|| ours.next().unwrap()), want);
            let metrics = ours.controller().unwrap().metrics();
            assert_eq!(metrics.accepted, metrics.drafted, "the drafter is under the same hook");
        }
    }
}

#[test]
fn drafters_come_and_go_and_the_text_stays() {
    let model = Model::open_path(runtime(2, None), &packed()).unwrap();
    for sampler in samplers() {
        let mut plain = session(&model, sampler, 0);
        let mut ours = Speculator::plain(session(&model, sampler, 0));
        plain.append(&[1, 5, 9]).unwrap();
        ours.append(&[1, 5, 9]).unwrap();
        for step in 0..40 {
            match step % 8 {
                0 => {
                    let drafter = ModelDrafter::new(Arc::clone(&model), &model).unwrap();
                    ours.attach(Box::new(drafter), Controller::always()).unwrap();
                }
                3 => assert_eq!(ours.logits().unwrap(), plain.logits().unwrap()),
                5 => ours.detach(),
                6 => {
                    let mut fork = ours.settled().fork().unwrap();
                    let mut theirs = plain.fork().unwrap();
                    assert_eq!(fork.tokens(), theirs.tokens());
                    assert_eq!(fork.next().unwrap(), theirs.next().unwrap());
                }
                7 => ours.attach(Box::new(Ngram::new()), Controller::new()).unwrap(),
                _ => {}
            }
            assert_eq!(ours.next().unwrap(), plain.next().unwrap());
            assert_eq!(ours.tokens(), plain.tokens());
        }
        ours.reset();
        plain.reset();
        ours.append(&[4]).unwrap();
        plain.append(&[4]).unwrap();
        assert_eq!(ours.next().unwrap(), plain.next().unwrap());
    }
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
        assert!(want["speculation"].is_null());
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
