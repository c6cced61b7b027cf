//! `nybl perplexity`: how well a model predicts a text, and how far it is from another.

use crate::Failure;
use indicatif::{ProgressBar, ProgressStyle};
use nybl::Error;
use nybl::engine::load::Model;
use nybl::engine::perplexity::{Options, Report, perplexity as measure};
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use nybl::kernel::KvFormat;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Arguments of `nybl perplexity`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  nybl perplexity model.nybl wiki.test.raw
  nybl perplexity model.nybl book.txt --context 1024 --reference model.F16.gguf --json")]
pub(crate) struct Args {
    /// A .nybl or GGUF file, or a Hugging Face folder.
    model: PathBuf,
    /// The text.
    text: PathBuf,
    /// Tokens in a window [default: 512, or the model's context where that is less].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Let windows overlap: one every N tokens, of which the last N count [default: they follow one
    /// another, and the second half of each counts].
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Stop after so many windows.
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// A model to compare with: Kullback-Leibler divergence from it, and how often both find the same token
    /// likeliest.
    #[arg(long, value_name = "MODEL")]
    reference: Option<PathBuf>,
    /// How keys and values are kept: f32, f16, i8 or i4.
    #[arg(long, default_value = "f32", value_name = "FORMAT")]
    kv: String,
    /// Tokens that go through the layers together; changes no bit of the result.
    #[arg(long, default_value_t = 128, value_name = "N")]
    chunk: usize,
    /// Threads [default and most: one on each core].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    threads: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn perplexity(args: &Args) -> Result<(), Failure> {
    let config = RuntimeConfig { threads: args.threads, ..RuntimeConfig::default() };
    let runtime = Arc::new(Runtime::new(&config)?);
    let model = Model::open_path(Arc::clone(&runtime), &args.model)?;
    let reference = args.reference.as_deref();
    let reference = reference.map(|path| Model::open_path(runtime, path)).transpose()?;
    let tokenizer = model.tokenizer()?;
    let tokens = tokenizer.encode(&read_text(&args.text)?, true, false)?;
    if let Some(reference) = &reference
        && reference.tokenizer()?.encode(&read_text(&args.text)?, true, false)? != tokens
    {
        let what = format!("{}: its tokenizer makes other tokens of the text", reference.file());
        return Err(Error::InvalidArgument(what).into());
    }
    let trained = [Some(&model), reference.as_ref()].into_iter().flatten();
    let trained = trained.map(|model| model.config().context).min().unwrap_or(512);
    let options = Options {
        context: args.context.unwrap_or(512.min(trained)),
        stride: args.stride,
        windows: args.windows,
        chunk: args.chunk.max(1),
        begin: tokenizer.bos().filter(|_| tokenizer.add_bos()),
        kv_format: kv_format(&args.kv)?,
    };
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} windows, {eta}  {msg}");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    let progress = |report: &Report, windows: usize| {
        bar.set_length(windows as u64);
        bar.set_position(report.windows as u64);
        bar.set_message(format!("perplexity {:.4}", report.perplexity));
    };
    let report = measure(&model, reference.as_deref(), &tokens, &options, progress)?;
    bar.finish_and_clear();
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", json(&report, &options))?;
    } else {
        print(&mut out, &report)?;
    }
    Ok(())
}

/// A file of text.
pub(crate) fn read_text(path: &Path) -> Result<String, Error> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|reason| Error::io(&name, &reason))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::InvalidArgument(format!("{name}: byte {at} is not UTF-8"))
    })
}

fn kv_format(name: &str) -> Result<KvFormat, Error> {
    let known = KvFormat::ALL.into_iter().find(|format| format.name() == name);
    known.ok_or_else(|| Error::InvalidArgument(format!("--kv {name}: f32, f16, i8 or i4")))
}

fn json(report: &Report, options: &Options) -> serde_json::Value {
    let mut object = serde_json::json!({
        "perplexity": report.perplexity,
        "perplexity_error": report.perplexity_error,
        "tokens": report.tokens,
        "windows": report.windows,
        "context": options.context,
        "stride": options.stride,
    });
    if let Some(against) = &report.against {
        for (key, value) in [
            ("reference_perplexity", against.perplexity),
            ("kl_divergence", against.kl_divergence),
            ("kl_divergence_error", against.kl_error),
            ("kl_divergence_median", against.kl_median),
            ("kl_divergence_99", against.kl_99),
            ("kl_divergence_max", against.kl_max),
            ("top1_agreement", against.top1_agreement),
            ("rms_delta_p", against.rms_delta_p),
        ] {
            object[key] = value.into();
        }
    }
    object
}

fn print(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    writeln!(out, "perplexity          {:.4} ± {:.4}", report.perplexity, report.perplexity_error)?;
    if let Some(against) = &report.against {
        let ratio = 100.0 * (report.perplexity / against.perplexity - 1.0);
        writeln!(out, "of the reference    {:.4} ({ratio:+.2}%)", against.perplexity)?;
        let kl = [against.kl_divergence, against.kl_error];
        writeln!(out, "KL divergence       {:.6} ± {:.6} nats", kl[0], kl[1])?;
        let spread = [against.kl_median, against.kl_99, against.kl_max];
        let [median, most, max] = spread;
        writeln!(out, "  median, 99%, max  {median:.6}, {most:.6}, {max:.6}")?;
        writeln!(out, "top-1 agreement     {:.2}%", 100.0 * against.top1_agreement)?;
        writeln!(out, "RMS change of p     {:.3}%", 100.0 * against.rms_delta_p)?;
    }
    writeln!(out, "tokens              {} in {} windows", report.tokens, report.windows)
}
