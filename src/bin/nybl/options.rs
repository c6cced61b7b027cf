//! What `run` and `chat` have in common: a model, how its tokens are chosen, and what drafts them.

use crate::default_model;
use nybl::engine::draft::ModelDrafter;
use nybl::engine::load::Model;
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use nybl::engine::session::{Session, SessionConfig};
use nybl::engine::speculate::Speculator;
use nybl::kernel::KvFormat;
use nybl::kv::sight::Streaming;
use nybl::spec::control::{Controller, Metrics};
use nybl::spec::draft::{Drafter, Ngram};
use nybl::text::sample::SamplerConfig;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The options.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A .nybl or GGUF file [default: the embedded model].
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
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
    /// Threads [default and most: one on each core].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    threads: usize,
    /// The strongest instruction set to use: scalar, portable, avx2, avx512, neon, dotprod, ...
    #[arg(long, value_name = "NAME")]
    isa: Option<String>,
    /// Tokens the session can hold [default: the model's].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    context: usize,
    /// What drafts tokens for the model to check several at a time, which changes the speed and never the
    /// text: auto (the embedded model's own draft model, or else n-grams of the text, when they pay), ngram
    /// (always), off, or the file of a smaller model with the same vocabulary (when it pays).
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
}

/// A session as the options want it.
pub(crate) struct Opened {
    pub(crate) model: Arc<Model>,
    pub(crate) session: Speculator,
    pub(crate) seed: u64,
}

impl Options {
    /// What drafts, as it was asked for.
    pub(crate) fn draft(&self) -> &str {
        &self.draft
    }

    /// Opens the model, and a session on it.
    pub(crate) fn open(&self) -> nybl::Result<Opened> {
        let config =
            RuntimeConfig { threads: self.threads, isa: self.isa.clone(), ..Default::default() };
        let runtime = Arc::new(Runtime::new(&config)?);
        let model = match &self.model {
            Some(path) => Model::open_path(Arc::clone(&runtime), path)?,
            None => Model::open(Arc::clone(&runtime), default_model::target())?,
        };
        let seed = self.seed.unwrap_or_else(clock_seed);
        let sampler = SamplerConfig {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed,
            ..SamplerConfig::default()
        };
        let named = KvFormat::ALL.into_iter().find(|format| format.name() == self.kv);
        let config = SessionConfig {
            context: self.context,
            sampler,
            kv_format: named.unwrap_or_default(),
            streaming: self.window.map(|window| Streaming { sinks: 4, window }),
            ..SessionConfig::default()
        };
        let session = Session::new(Arc::clone(&model), &config)?;
        let session = self.speculate(session, runtime)?;
        Ok(Opened { model, session, seed })
    }

    /// The session with what `--draft` asks for.
    fn speculate(&self, session: Session, runtime: Arc<Runtime>) -> nybl::Result<Speculator> {
        let drafter: Box<dyn Drafter> = match (self.draft.as_str(), &self.model) {
            ("off", _) => return Ok(Speculator::plain(session)),
            ("auto", None) => {
                let model = Model::open(runtime, default_model::draft())?;
                Box::new(ModelDrafter::new(model, session.model())?)
            }
            ("auto" | "ngram", _) => Box::new(Ngram::new()),
            (path, _) => {
                let model = Model::open_path(runtime, Path::new(path))?;
                Box::new(ModelDrafter::new(model, session.model())?)
            }
        };
        let controller =
            if self.draft == "ngram" { Controller::always() } else { Controller::new() };
        Speculator::new(session, drafter, controller)
    }
}

/// What became of the drafts, for `--json`.
pub(crate) fn speculation(draft: &str, metrics: &Metrics) -> serde_json::Value {
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

/// Tokens a second.
pub(crate) fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

/// A seed that differs from run to run.
fn clock_seed() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::from(since.subsec_nanos()) ^ since.as_secs())
}
