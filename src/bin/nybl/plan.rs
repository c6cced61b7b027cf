//! `nybl plan`: what a model will take, read from its head.

use crate::{Failure, convert::bytes};
use nybl::engine::plan::{Plan, PlanConfig, Remedy, plan as make};
use nybl::engine::session::SessionConfig;
use nybl::file::model_file::ModelFile;
use nybl::kernel::KvFormat;
use nybl::kv::sight::Streaming;
use std::io::Write;
use std::path::PathBuf;

/// Arguments of `nybl plan`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  nybl plan model.nybl
  nybl plan model.nybl --context 4096 --kv f16 --budget 300M
  nybl plan model.gguf --budget 1G --json")]
pub(crate) struct Args {
    /// A .nybl or GGUF file, or a Hugging Face folder.
    file: PathBuf,
    /// Tokens that a session can hold [default: the model's].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    context: usize,
    /// Bytes that may be dirty, with K, M or G for powers of 1000.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    budget: Option<u64>,
    /// How keys and values are kept.
    #[arg(long, default_value = "f32", value_parser = ["f32", "f16", "i8", "i4"], value_name = "FORMAT")]
    kv: String,
    /// Look at the first 4 and the last N tokens alone.
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Sessions at a time.
    #[arg(long, default_value_t = 1, value_name = "N")]
    sessions: usize,
    /// Tokens of a prompt that go through the layers together [default: 128].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    chunk: usize,
    /// Plan for sessions that do not speculate.
    #[arg(long)]
    no_drafts: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn plan(args: &Args) -> Result<(), Failure> {
    let named = KvFormat::ALL.into_iter().find(|format| format.name() == args.kv);
    let session = SessionConfig {
        context: args.context,
        prefill_chunk: args.chunk,
        kv_format: named.unwrap_or_default(),
        streaming: args.window.map(|window| Streaming { sinks: 4, window }),
        ..SessionConfig::default()
    };
    let config = PlanConfig {
        session,
        sessions: args.sessions,
        speculates: !args.no_drafts,
        budget: args.budget.map(|budget| usize::try_from(budget).unwrap_or(usize::MAX)),
    };
    let file = ModelFile::open_path(&args.file)?;
    let plan = make(&file, &config)?;
    if args.json { print_json(&plan) } else { print(&plan, args) }
}

fn print(plan: &Plan, args: &Args) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let mut line = |what: &str, bytes: usize, note: &str| {
        writeln!(out, "{what:<24}{:>10}  {note}", size(bytes))
    };
    line("weights, mapped", plan.mapped, "clean: taken back by the system at will")?;
    line("weights, in memory", plan.private, "")?;
    line("tokenizer", plan.tokenizer, "an estimate")?;
    let tokens = format!("{} x {} tokens, {}", args.sessions, plan.context, args.kv);
    line("KV cache, when full", plan.kv, &tokens)?;
    line("  a thousand tokens", plan.kv_1k, "")?;
    line("buffers", plan.scratch, "")?;
    line("dirty in all", plan.dirty(), "")?;
    let Some(budget) = plan.budget else { return Ok(()) };
    line("budget", budget, if plan.fits() { "fits" } else { "does not fit" })?;
    for remedy in &plan.remedies {
        writeln!(out, "  fits with {}: {} dirty", words(remedy), size(remedy.dirty))?;
    }
    if !plan.fits() && plan.remedies.is_empty() {
        let least = size(plan.least);
        writeln!(out, "  nothing makes it fit: {least} are needed at least; take a smaller model")?;
    }
    Ok(())
}

fn print_json(plan: &Plan) -> Result<(), Failure> {
    let remedy = |remedy: &Remedy| {
        serde_json::json!({
            "convert": remedy.convert,
            "prefill_chunk": remedy.prefill_chunk,
            "kv": remedy.kv_format.map(KvFormat::name),
            "context": remedy.context,
            "dirty": remedy.dirty,
        })
    };
    let object = serde_json::json!({
        "mapped": plan.mapped,
        "private": plan.private,
        "tokenizer": plan.tokenizer,
        "kv": plan.kv,
        "kv_1k": plan.kv_1k,
        "scratch": plan.scratch,
        "dirty": plan.dirty(),
        "context": plan.context,
        "budget": plan.budget,
        "fits": plan.fits(),
        "remedies": plan.remedies.iter().map(remedy).collect::<Vec<_>>(),
        "least": plan.least,
    });
    writeln!(std::io::stdout(), "{object}")?;
    Ok(())
}

/// A change in the words of the command line.
fn words(remedy: &Remedy) -> String {
    let mut words = Vec::new();
    if remedy.convert {
        words.push("the file converted to .nybl".to_owned());
    }
    if let Some(chunk) = remedy.prefill_chunk {
        words.push(format!("--chunk {chunk}"));
    }
    if let Some(format) = remedy.kv_format {
        words.push(format!("--kv {}", format.name()));
    }
    if let Some(context) = remedy.context {
        words.push(format!("--context {context}"));
    }
    words.join(" and ")
}

/// Bytes for people.
fn size(bytes: usize) -> String {
    let bytes = bytes as f64;
    match bytes {
        _ if bytes >= 1e9 => format!("{:.2} GB", bytes / 1e9),
        _ if bytes >= 1e6 => format!("{:.1} MB", bytes / 1e6),
        _ => format!("{:.1} kB", bytes / 1e3),
    }
}
