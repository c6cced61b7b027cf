//! What speculation is worth on a model of real size, against plain decoding of the same tokens in the same run.
//!
//! The target has the shape of `TinyLlama` 1.1B, the drafting model about 100M parameters; both have random
//! four-bit weights (embedding and head eight-bit, as `nybl convert --bits 4` makes them) and are written once
//! to the target folder. Random weights say nothing of use, so what is generated is given: a hook on the
//! logits of the target makes it choose the next token of a text. Every pass is computed in full. The drafting
//! model is run in full, too, and what it drafts is then replaced: by the text, wrong with a given
//! chance. N-grams draft by themselves.
//!
//! `cargo bench --bench speculation`, with words to choose scenarios by their names; `--tokens N` and `--runs N`
//! change the lengths, `--threads N` the threads; `--test` runs small models once and checks the tokens.

use half::f16;
use nybl::engine::draft::ModelDrafter;
use nybl::engine::load::Model;
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::engine::speculate::Speculator;
use nybl::file::metadata::{Metadata, Value};
use nybl::file::nybl::{Kind, Writer};
use nybl::kernel::{Format, Layout};
use nybl::spec::control::{Controller, Metrics};
use nybl::spec::distribution::{History, Hook, SamplerConfig};
use nybl::spec::draft::{Draft, Drafter, Ngram, Request};
use nybl::spec::random::Random;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// The shape of a model.
struct Shape {
    name: &'static str,
    layers: usize,
    width: usize,
    heads: usize,
    kv_heads: usize,
    ff: usize,
    vocab: usize,
    tied: bool,
}

const TARGET: Shape = Shape {
    name: "tinyllama-shape",
    layers: 22,
    width: 2048,
    heads: 32,
    kv_heads: 4,
    ff: 5632,
    vocab: 32000,
    tied: false,
};
const DRAFT: Shape = Shape {
    name: "draft-100m-shape",
    layers: 12,
    width: 768,
    heads: 12,
    kv_heads: 4,
    ff: 2048,
    vocab: 32000,
    tied: true,
};
const SMALL: Shape = Shape {
    name: "small-shape",
    layers: 2,
    width: 128,
    heads: 4,
    kv_heads: 2,
    ff: 256,
    vocab: 2048,
    tied: true,
};

/// Names and kinds of a model's tensors.
fn plan(shape: &Shape) -> Vec<(String, Kind)> {
    let matrix = |name: String, format, n, k| {
        (name, Kind::Matrix(Layout::new(format, 32, n, k).expect("a valid shape")))
    };
    let (width, kv) = (shape.width, shape.width / shape.heads * shape.kv_heads);
    let mut plan = vec![matrix("token_embd.weight".into(), Format::Q8, shape.vocab, width)];
    for layer in 0..shape.layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        plan.push((name("attn_norm"), Kind::Vector(width)));
        plan.push((name("ffn_norm"), Kind::Vector(width)));
        for (part, n, k) in [
            ("attn_q", width, width),
            ("attn_k", kv, width),
            ("attn_v", kv, width),
            ("attn_output", width, width),
            ("ffn_gate", shape.ff, width),
            ("ffn_up", shape.ff, width),
            ("ffn_down", width, shape.ff),
        ] {
            plan.push(matrix(name(part), Format::Q4, n, k));
        }
    }
    plan.push(("output_norm.weight".into(), Kind::Vector(width)));
    if !shape.tied {
        plan.push(matrix("output.weight".into(), Format::Q8, shape.vocab, width));
    }
    plan
}

/// A matrix of random codes, scaled so that a row has a length of about one.
fn random_matrix(layout: &Layout, random: &mut Random) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        (0..layout.bytes().div_ceil(8)).flat_map(|_| random.bits().to_le_bytes()).collect();
    bytes.truncate(layout.bytes());
    let spread = if layout.format() == Format::Q8 { 74.0 } else { 4.6 };
    let scale = f16::from_f32(1.0 / (spread * (layout.k() as f32).sqrt())).to_le_bytes();
    for group in bytes.chunks_mut(layout.group_bytes()) {
        group[layout.code_bytes()..].chunks_mut(2).for_each(|x| x.copy_from_slice(&scale));
    }
    bytes
}

/// The file of a model with random weights, written unless it is there.
fn model_file(shape: &Shape) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.nybl", shape.name));
    if path.exists() {
        return path;
    }
    let mut metadata = Metadata::new(shape.name);
    metadata.set("general.architecture", Value::Text("llama".into()));
    metadata.set("general.name", Value::Text(shape.name.into()));
    for (key, value) in [
        ("context_length", 2048),
        ("embedding_length", shape.width),
        ("block_count", shape.layers),
        ("feed_forward_length", shape.ff),
        ("attention.head_count", shape.heads),
        ("attention.head_count_kv", shape.kv_heads),
    ] {
        metadata.set(&format!("llama.{key}"), Value::Unsigned(value as u64));
    }
    metadata.set("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5));
    let plan = plan(shape);
    let mut random = Random(1);
    let mut writer = Writer::create(&path, &metadata, &plan).expect("room for a model");
    for (_, kind) in &plan {
        let bytes = match kind {
            Kind::Vector(len) => 1.0_f32.to_le_bytes().repeat(*len),
            Kind::Matrix(layout) => random_matrix(layout, &mut random),
            other => unreachable!("{other:?} is not in the plan"),
        };
        writer.append(&bytes).expect("room for a model");
    }
    writer.finish().expect("room for a model");
    path
}

/// A prompt and what is to be generated after it.
#[derive(Clone)]
struct Text {
    tokens: Arc<Vec<u32>>,
    prompt: usize,
}

impl Text {
    fn new(prompt: &[u32], output: &[u32]) -> Self {
        Self { tokens: Arc::new([prompt, output].concat()), prompt: prompt.len() }
    }

    /// Makes the next token of the text the only one that can be chosen.
    fn hook(&self) -> Hook {
        let tokens = Arc::clone(&self.tokens);
        Hook::new(move |history: History<'_>, logits: &mut [f32]| {
            let next = history.settled.len() + history.drafted.len();
            logits[tokens[next % tokens.len()] as usize] = f32::INFINITY;
        })
    }
}

/// A tokenizer's ids of `text`.
fn ids(text: &str) -> Vec<u32> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nursery.nybl");
    let runtime = Arc::new(Runtime::new(&RuntimeConfig::default()).expect("a runtime"));
    let model = Model::open_path(runtime, &path).expect("the model of this project");
    model.tokenizer().expect("its tokenizer").encode(text, false, false).expect("ids")
}

/// Random tokens out of so many.
fn noise(count: usize, different: usize, seed: u64) -> Vec<u32> {
    let mut random = Random(seed);
    (0..count).map(|_| (random.bits() % different as u64) as u32).collect()
}

/// A source file, and the same with a name changed throughout.
fn edit() -> (String, String) {
    let file = &include_str!("../src/spec/tree.rs")[..1200];
    (file.into(), file.replace("parent", "ancestor").replace("row", "line"))
}

/// A page, and the first sentence of each of its paragraphs.
fn summary() -> (String, String) {
    let page = &include_str!("../src/docs/numerics.md")[..1900];
    let first = |paragraph: &str| {
        let end = paragraph.find(". ").map_or(paragraph.len(), |end| end + 1);
        paragraph[..end].to_owned()
    };
    let sentences: Vec<String> = page.split("\n\n").map(first).collect();
    (page.into(), sentences.join("\n\n"))
}

/// Spends what `model` costs and drafts the text, each token right with the chance `acceptance`.
struct Replay {
    model: ModelDrafter,
    text: Text,
    acceptance: f32,
    vocab: u32,
    random: Random,
}

impl Drafter for Replay {
    fn draft(&mut self, request: &Request<'_>, draft: &mut Draft) -> nybl::Result<()> {
        // As sure as it is right.
        let sure = self.acceptance.max(0.5);
        let go_on = |drafted: &[f32]| (request.go_on)(&vec![sure; drafted.len()]);
        self.model.draft(&Request { go_on: &go_on, ..*request }, draft)?;
        for (place, token) in draft.tokens.iter_mut().enumerate() {
            let next = (request.context.len() + place) % self.text.tokens.len();
            let right = self.random.unit() < self.acceptance;
            *token = (self.text.tokens[next] + u32::from(!right)) % self.vocab;
        }
        draft.confidence.fill(sure);
        Ok(())
    }

    fn prepare(&mut self, context: &[u32], whole: bool) -> nybl::Result<()> {
        self.model.prepare(context, whole)
    }

    fn rewind(&mut self, len: usize) {
        self.model.rewind(len);
    }
}

/// What drafts.
#[derive(Clone, Copy)]
enum Source {
    Replay(f32),
    Ngram,
}

struct Scenario {
    name: &'static str,
    text: Text,
    source: Source,
    /// So many drafts every time, or as the controller decides.
    fixed: Option<usize>,
}

struct Options {
    tokens: usize,
    runs: usize,
    threads: usize,
    test: bool,
    filters: Vec<String>,
}

fn options() -> Options {
    let mut options = Options { tokens: 96, runs: 3, threads: 0, test: false, filters: Vec::new() };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|x| x.parse().ok()).expect("a number");
        match argument.as_str() {
            "--tokens" => options.tokens = number(),
            "--runs" => options.runs = number(),
            "--threads" => options.threads = number(),
            "--test" => options.test = true,
            "--bench" => {}
            word => options.filters.push(word.into()),
        }
    }
    if options.test {
        (options.tokens, options.runs) = (options.tokens.min(40), 1);
    }
    options
}

fn scenarios(tokens: usize) -> Vec<Scenario> {
    let of_ids = |(prompt, output): (String, String)| {
        let (prompt, output) = (ids(&prompt), ids(&output));
        Text::new(&prompt, &output)
    };
    let random = Text::new(&noise(64, 2000, 2), &noise(tokens + 8, 2000, 3));
    // Few different tokens: something is always found, and always wrong.
    let misleading = Text::new(&noise(256, 40, 4), &noise(tokens + 8, 40, 5));
    let scenario =
        |name, text: &Text, source, fixed| Scenario { name, text: text.clone(), source, fixed };
    vec![
        scenario("model acceptance 0.8 k=4", &random, Source::Replay(0.8), Some(4)),
        scenario("model acceptance 0.8 auto", &random, Source::Replay(0.8), None),
        scenario("model acceptance 0.6 auto", &random, Source::Replay(0.6), None),
        scenario("model useless auto", &random, Source::Replay(0.0), None),
        scenario("n-gram edit auto", &of_ids(edit()), Source::Ngram, None),
        scenario("n-gram summary auto", &of_ids(summary()), Source::Ngram, None),
        scenario("n-gram useless auto", &misleading, Source::Ngram, None),
    ]
}

/// Seconds of generating `tokens` tokens of the text, which must come out.
fn generate(
    text: &Text,
    tokens: usize,
    warm: usize,
    mut next: impl FnMut() -> nybl::Result<Next>,
) -> f64 {
    let mut start = Instant::now();
    let want = &text.tokens[text.prompt..];
    for (place, want) in want.iter().take(warm + tokens).enumerate() {
        if place == warm {
            start = Instant::now();
        }
        assert_eq!(next().expect("a token"), Next::Token(*want), "token {place}");
    }
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(name: &str, ratios: Vec<f64>, plain: f64, metrics: &Metrics) {
    let places = metrics.accepted_at.iter().zip(metrics.tried_at);
    let acceptance: Vec<String> = places
        .filter(|(_, tried)| *tried > 0)
        .map(|(accepted, tried)| format!("{:.2}", *accepted as f64 / tried as f64))
        .collect();
    let passes = metrics.passes.max(1) as f64;
    let tokens = (metrics.accepted + metrics.passes) as f64 / passes;
    let first = metrics.pass_seconds[0].unwrap_or(plain);
    let cost: Vec<String> = metrics
        .pass_seconds
        .iter()
        .map(|seconds| seconds.map_or("-".into(), |seconds| format!("{:.2}", seconds / first)))
        .collect();
    let (low, high) = (
        ratios.iter().copied().fold(f64::INFINITY, f64::min),
        ratios.iter().copied().fold(0.0, f64::max),
    );
    println!(
        "{name:26} {:.2}x plain ({low:.2} to {high:.2}); plain {:.1} ms a token; {tokens:.2} tokens a pass; \
         accepted by place {}; T(M)/T(1) {}; draft {:.1} ms a token; rounds of 0, 1, ... drafts {:?}",
        median(ratios),
        plain * 1e3,
        acceptance.join(" "),
        cost.join(" "),
        metrics.draft_seconds * 1e3,
        metrics.rounds,
    );
}

fn main() {
    let options = options();
    let config = RuntimeConfig { threads: options.threads, ..RuntimeConfig::default() };
    let runtime = Arc::new(Runtime::new(&config).expect("a runtime"));
    let shapes = if options.test { [&SMALL, &SMALL] } else { [&TARGET, &DRAFT] };
    let [target, draft] = shapes.map(|shape| {
        let path = model_file(shape);
        Model::open_path(Arc::clone(&runtime), &path).expect("a model of our own writing")
    });
    println!(
        "{} and {}, {} threads, {}, {} tokens a run",
        target.config().name,
        draft.config().name,
        runtime.pool().threads(),
        runtime.kernels().isa(),
        options.tokens
    );
    for scenario in scenarios(options.tokens) {
        let chosen = |word: &String| scenario.name.contains(word.as_str());
        if !options.filters.is_empty() && !options.filters.iter().any(chosen) {
            continue;
        }
        let text = &scenario.text;
        let prompted = || {
            let context = text.tokens.len() + 8;
            let sampler = SamplerConfig::greedy();
            let config = SessionConfig { context, sampler, ..SessionConfig::default() };
            let mut session = Session::new(Arc::clone(&target), &config).expect("a session");
            session.set_logits_hook(Some(text.hook()));
            session.append(&text.tokens[..text.prompt]).expect("a prompt");
            session
        };
        let mut plain = prompted();
        let mut ours = Speculator::plain(plain.fork().expect("a fork"));
        let tokens = options.tokens.min(text.tokens.len() - text.prompt - 1);
        let (mut ratios, mut seconds, mut metrics) = (Vec::new(), Vec::new(), Metrics::default());
        for run in 0..options.runs as u64 {
            let drafter: Box<dyn Drafter> = match scenario.source {
                Source::Ngram => Box::new(Ngram::new()),
                Source::Replay(acceptance) => {
                    let model = ModelDrafter::new(Arc::clone(&draft), &target).expect("a drafter");
                    let vocab = target.vocab() as u32;
                    let random = Random(run);
                    Box::new(Replay { model, text: text.clone(), acceptance, vocab, random })
                }
            };
            let mut controller = Controller::new();
            if let Some(drafts) = scenario.fixed {
                controller = Controller::always();
                controller.set_limit(drafts);
            }
            plain.truncate(text.prompt);
            ours.truncate(text.prompt);
            ours.attach(drafter, controller).expect("room for drafts");
            let mut plainly = || generate(text, tokens, 0, || plain.next());
            let mut drafted = || generate(text, tokens, 0, || ours.next());
            // Which of the two comes first alternates.
            let (a, b) = if run % 2 == 0 {
                let a = plainly();
                (a, drafted())
            } else {
                let b = drafted();
                (plainly(), b)
            };
            ratios.push(a / b);
            seconds.push(a / tokens as f64);
            metrics = ours.controller().expect("a drafter").metrics().clone();
        }
        report(scenario.name, ratios, median(seconds), &metrics);
    }
}
