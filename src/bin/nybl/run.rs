//! `nybl run`: a prompt in, its continuation out, streamed.

use crate::{Failure, default_model};
use nybl::engine::draft::ModelDrafter;
use nybl::engine::load::Model;
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::engine::speculate::Speculator;
use nybl::kernel::KvFormat;
use nybl::kv::attend::Streaming;
use nybl::spec::control::{Controller, Metrics};
use nybl::spec::draft::{Drafter, Ngram};
use nybl::text::sample::SamplerConfig;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Arguments of `nybl run`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  nybl run \"Once upon a time\"
  nybl run -m model.nybl -p \"The sea\" -n 100 --temp 0
  nybl run -m model.gguf -p \"The sea\" --seed 7 --threads 2 --isa avx2 --json
  nybl run -m model.nybl --draft small.nybl -p \"The sea\"")]
pub(crate) struct Args {
    /// The text to continue.
    #[arg(value_name = "PROMPT", conflicts_with = "prompt")]
    text: Option<String>,
    /// The same, as an option.
    #[arg(short, long)]
    prompt: Option<String>,
    /// A .nybl or GGUF file [default: the embedded model].
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Most tokens to generate [default: until the model ends or its context is full].
    #[arg(short = 'n', long = "tokens", value_name = "N")]
    count: Option<usize>,
    /// Temperature; 0 always takes the likeliest token.
    #[arg(long = "temp", default_value_t = 0.8, value_name = "T")]
    temperature: f32,
    /// Keep the K likeliest tokens; 0 keeps all.
    #[arg(long, default_value_t = 40, value_name = "K")]
    top_k: usize,
    /// Keep the likeliest tokens that together reach this probability.
    #[arg(long, default_value_t = 0.95, value_name = "P")]
    top_p: f32,
    /// Keep tokens at least this much as probable as the likeliest.
    #[arg(long, default_value_t = 0.05, value_name = "P")]
    min_p: f32,
    /// Start of the random numbers [default: from the clock; it is printed].
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Threads [default: one on each core].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    threads: usize,
    /// The strongest instruction set to use: scalar, portable, avx2, avx512, neon, dotprod, ...
    #[arg(long, value_name = "NAME")]
    isa: Option<String>,
    /// Tokens the session can hold [default: the model's].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    context: usize,
    /// What drafts tokens for the model to check several at a time, which changes the speed and never the
    /// text: auto (n-grams of the text, when they pay), ngram (always), off, or the file of a smaller
    /// model with the same vocabulary (when it pays).
    #[arg(long, default_value = "auto", value_name = "FILE|auto|ngram|off")]
    draft: String,
    /// How keys and values are kept: f32 as they are, f16 and i8 in a half and a quarter of the memory, i4
    /// with values of four bits.
    #[arg(long, default_value = "f32", value_parser = ["f32", "f16", "i8", "i4"], value_name = "FORMAT")]
    kv: String,
    /// Look at the first 4 and the last N tokens alone, so that the text need not end where the context
    /// does; with --context for the most tokens.
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Print one JSON object with text, ids and figures instead of the stream.
    #[arg(long)]
    json: bool,
}

/// How a generation ended.
#[derive(Clone, Copy)]
enum Finish {
    End,
    Length,
    ContextFull,
}

impl Finish {
    fn name(self) -> &'static str {
        match self {
            Self::End => "end",
            Self::Length => "length",
            Self::ContextFull => "context_full",
        }
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let start = Instant::now();
    let config =
        RuntimeConfig { threads: args.threads, isa: args.isa.clone(), ..Default::default() };
    let runtime = Arc::new(Runtime::new(&config)?);
    let model = match &args.model {
        Some(path) => Model::open_path(Arc::clone(&runtime), path)?,
        None => Model::open(Arc::clone(&runtime), default_model::source())?,
    };
    let seed = args.seed.unwrap_or_else(clock_seed);
    let sampler = SamplerConfig {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed,
        ..SamplerConfig::default()
    };
    let named = KvFormat::ALL.into_iter().find(|format| format.name() == args.kv);
    let config = SessionConfig {
        context: args.context,
        sampler,
        kv_format: named.unwrap_or_default(),
        streaming: args.window.map(|window| Streaming { sinks: 4, window }),
        ..SessionConfig::default()
    };
    let session = Session::new(Arc::clone(&model), &config)?;
    let mut session = speculate(&args.draft, session, runtime)?;
    let opened = start.elapsed();

    let prompt = args.prompt.as_deref().or(args.text.as_deref()).unwrap_or_default();
    let tokenizer = model.tokenizer()?;
    let prompt_ids = tokenizer.encode(prompt, true, false)?;
    if prompt_ids.is_empty() {
        let why = "an empty prompt, and the model has no token to begin with: give it a text";
        return Err(nybl::Error::InvalidArgument(why.into()).into());
    }
    let prompt_start = Instant::now();
    session.append(&prompt_ids)?;
    let prefill = prompt_start.elapsed();

    let mut out = std::io::stdout().lock();
    if !args.json {
        write!(out, "{prompt}")?;
        out.flush()?;
    }
    let mut stream = tokenizer.stream_after(&prompt_ids)?;
    let mut text = String::new();
    let (mut first, mut ids) = (None, Vec::new());
    let finish = loop {
        if args.count.is_some_and(|count| ids.len() >= count) {
            break Finish::Length;
        }
        let id = match session.next()? {
            Next::Token(id) => id,
            Next::End(_) => break Finish::End,
            Next::ContextFull => break Finish::ContextFull,
        };
        first.get_or_insert_with(|| prompt_start.elapsed());
        ids.push(id);
        let piece = stream.push(tokenizer, id)?;
        if args.json {
            text.push_str(&piece);
        } else {
            write!(out, "{piece}")?;
            out.flush()?;
        }
    };
    let total = prompt_start.elapsed();
    let rest = stream.finish(tokenizer)?;
    if args.json {
        text.push_str(&rest);
    } else {
        writeln!(out, "{rest}")?;
    }

    let figures = Figures { opened, prefill, first: first.unwrap_or(total), total };
    if args.json {
        let (owned, mapped) = model.weight_bytes();
        let (kv, scratch) = session.bytes();
        let object = serde_json::json!({
            "model": model.config().name,
            "isa": model.runtime().kernels().isa().to_string(),
            "threads": model.runtime().pool().threads(),
            "seed": seed,
            "prompt": prompt,
            "prompt_ids": prompt_ids,
            "text": text,
            "ids": ids,
            "finish": finish.name(),
            "speculation": session.controller().map(|c| speculation(&args.draft, c.metrics())),
            "tokens_per_second": figures.decode_rate(ids.len()),
            "prefill_tokens_per_second": rate(prompt_ids.len(), prefill),
            "time_to_first_token_s": figures.first.as_secs_f64(),
            "open_s": opened.as_secs_f64(),
            "bytes": {
                "weights_private": owned,
                "weights_mapped": mapped,
                "kv": kv,
                "scratch": scratch,
            },
        });
        writeln!(out, "{object}")?;
    } else {
        if std::io::stdout().is_terminal() {
            eprintln!();
        }
        eprintln!("{}", figures.summary(prompt_ids.len(), ids.len(), finish, seed));
    }
    Ok(())
}

/// The session with what `--draft` asks for.
fn speculate(draft: &str, session: Session, runtime: Arc<Runtime>) -> nybl::Result<Speculator> {
    let controller = if draft == "ngram" { Controller::always() } else { Controller::new() };
    let drafter: Box<dyn Drafter> = match draft {
        "auto" | "ngram" => Box::new(Ngram::new()),
        "off" => return Ok(Speculator::plain(session)),
        path => {
            let model = Model::open_path(runtime, Path::new(path))?;
            Box::new(ModelDrafter::new(model, session.model())?)
        }
    };
    Speculator::new(session, drafter, controller)
}

/// What became of the drafts.
fn speculation(draft: &str, metrics: &Metrics) -> serde_json::Value {
    let places = metrics.accepted_at.iter().zip(metrics.tried_at);
    let share =
        |(accepted, tried): (&u64, u64)| (tried > 0).then(|| *accepted as f64 / tried as f64);
    let undrafted = metrics.undrafted;
    serde_json::json!({
        "draft": draft,
        "drafted": metrics.drafted,
        "accepted": metrics.accepted,
        "target_passes": metrics.passes,
        "acceptance_at": places.map(share).collect::<Vec<_>>(),
        "rounds_of_drafts": metrics.rounds,
        "undrafted": {
            "measuring": undrafted.measuring,
            "limited": undrafted.limited,
            "not_worth": undrafted.not_worth,
            "overdrawn": undrafted.overdrawn,
            "not_found": undrafted.not_found,
        },
        "k": metrics.current,
        "limit": metrics.limit,
        "probes": metrics.probes,
        "early_stops": metrics.early_stops,
        "pass_seconds": metrics.pass_seconds,
        "draft_seconds": metrics.draft_seconds,
        "catch_up_seconds": metrics.catch_up_seconds,
        "saved_seconds": metrics.saved_seconds,
    })
}

struct Figures {
    opened: Duration,
    prefill: Duration,
    first: Duration,
    total: Duration,
}

impl Figures {
    /// Tokens a second after the first one.
    fn decode_rate(&self, tokens: usize) -> f64 {
        rate(tokens.saturating_sub(1), self.total.saturating_sub(self.first))
    }

    fn summary(&self, prompt: usize, tokens: usize, finish: Finish, seed: u64) -> String {
        format!(
            "{tokens} tokens, {:.0} tokens/s; first token after {:.1} ms (open {:.1} ms, prompt of {prompt} tokens {:.1} ms); {}; seed {seed}",
            self.decode_rate(tokens),
            self.first.as_secs_f64() * 1e3,
            self.opened.as_secs_f64() * 1e3,
            self.prefill.as_secs_f64() * 1e3,
            match finish {
                Finish::End => "the model ended its text",
                Finish::Length => "as many as asked for",
                Finish::ContextFull => "the context is full",
            }
        )
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

/// A seed that differs from run to run.
fn clock_seed() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::from(since.subsec_nanos()) ^ since.as_secs())
}
