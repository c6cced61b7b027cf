//! `nybl convert`: a checkpoint into one packed file.

use crate::Failure;
use indicatif::{ProgressBar, ProgressStyle};
use nybl::engine::convert::{Options, Recipe, Report};
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use std::io::Write;
use std::path::PathBuf;

/// Arguments of `nybl convert`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  nybl convert model.Q4_0.gguf model.nybl
  nybl convert model.F16.gguf model.nybl --bits 4 --group 64 --zero-points")]
pub(crate) struct Args {
    /// A GGUF file (the first of a split one), or a Hugging Face folder.
    from: PathBuf,
    /// The file to write.
    to: PathBuf,
    /// Round float matrices to 2, 3, 4 or 8 bits [default: keep the source's weights as they are].
    #[arg(long, value_parser = ["2", "3", "4", "8"])]
    bits: Option<String>,
    /// Weights that share a scale: 32, 64 or 128.
    #[arg(long, default_value_t = 32, requires = "bits")]
    group: usize,
    /// With an integer zero point for each group (not with 8 bits).
    #[arg(long, requires = "bits")]
    zero_points: bool,
    /// Several files `TO-0000x-of-0000y.nybl`, each with at most so many bytes of tensors: 500M, 2G.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    shard_size: Option<u64>,
    /// Threads [default and most: one on each core].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    threads: usize,
    /// Print one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn convert(args: &Args) -> Result<(), Failure> {
    let (group, zero_points) = (args.group, args.zero_points);
    let recipe = match args.bits.as_deref() {
        None => Recipe::Keep,
        Some("2") => Recipe::Bits { bits: 2, group, zero_points },
        Some("3") => Recipe::Bits { bits: 3, group, zero_points },
        Some("4") => Recipe::Bits { bits: 4, group, zero_points },
        Some(_) if zero_points => {
            let why = "--zero-points: not with --bits 8";
            return Err(nybl::Error::InvalidArgument(why.into()).into());
        }
        Some(_) => Recipe::Bytes { group },
    };
    let runtime = Runtime::new(&RuntimeConfig { threads: args.threads, ..Default::default() })?;
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {eta}") {
        bar.set_style(style);
    }
    let options = Options { recipe, shard_bytes: args.shard_size };
    let progress = |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let report =
        nybl::engine::convert::convert(&runtime, &args.from, &args.to, &options, progress)?;
    bar.finish_and_clear();
    if args.json {
        writeln!(std::io::stdout(), "{}", object(&report)?)?;
        return Ok(());
    }
    print(&report);
    for file in &report.files {
        eprintln!("{}: {} bytes", file.display(), std::fs::metadata(file)?.len());
    }
    Ok(())
}

/// One line for every way that weights went.
fn print(report: &Report) {
    if report.found > 0 {
        eprintln!("{} tensors were there from an earlier run", report.found);
    }
    for ((from, to), line) in &report.lines {
        let matrices = if line.matrices == 1 { "matrix" } else { "matrices" };
        let deviation = if line.deviation.is_exact() {
            "exact".into()
        } else {
            format!(
                "largest error {:.2e} of the largest weight, RMS error {:.2e} of the RMS weight",
                line.deviation.worst_relative(),
                line.deviation.rms_relative()
            )
        };
        eprintln!("{from} as {to}: {} {matrices}, {deviation}", line.matrices);
    }
}

/// The same for `--json`.
fn object(report: &Report) -> std::io::Result<serde_json::Value> {
    let matrices = report.lines.iter().map(|((from, to), line)| {
        serde_json::json!({
            "from": from,
            "to": to,
            "matrices": line.matrices,
            "weights": line.weights,
            "exact": line.deviation.is_exact(),
            "largest_error": line.deviation.worst_relative(),
            "rms_error": line.deviation.rms_relative(),
        })
    });
    let files = report.files.iter().map(|file| {
        let bytes = std::fs::metadata(file)?.len();
        Ok(serde_json::json!({ "file": file.display().to_string(), "bytes": bytes }))
    });
    Ok(serde_json::json!({
        "found": report.found,
        "matrices": matrices.collect::<Vec<_>>(),
        "files": files.collect::<std::io::Result<Vec<_>>>()?,
    }))
}

/// A number of bytes, with K, M or G for powers of 1000.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.chars().last().map(|unit| unit.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 1000),
        Some('M') => (&text[..text.len() - 1], 1_000_000),
        Some('G') => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    number.filter(|bytes| *bytes > 0).ok_or_else(|| format!("{text} is no number of bytes"))
}
