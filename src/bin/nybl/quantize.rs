//! `nybl quantize`: a float model into a packed file of few bits.

use crate::Failure;
use crate::perplexity::read_text;
use crate::tokenize::tokenizer;
use indicatif::{ProgressBar, ProgressStyle};
use nybl::Error;
use nybl::engine::quantize::{Calibration, Method, Options, Report, quantize as run};
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use nybl::file::checkpoint::Checkpoint;
use nybl::model::config::Config;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Arguments of `nybl quantize`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  nybl quantize Llama-3.2-1B/ model.nybl --calib calibration.txt
  nybl quantize model.F16.gguf model.nybl --bits 3 --group 64 --calib calibration.txt
  nybl quantize model.F16.gguf model.nybl --mixed 3.5 --calib calibration.txt")]
pub(crate) struct Args {
    /// A Hugging Face folder or a GGUF file with float weights.
    model: PathBuf,
    /// The file to write.
    out: PathBuf,
    /// Bits of a weight.
    #[arg(long, default_value = "4", value_parser = ["3", "4"])]
    bits: String,
    /// Weights that share a scale: 32, 64 or 128.
    #[arg(long, default_value_t = 128)]
    group: usize,
    /// How codes are chosen: rtn (round to nearest), awq, gptq, best.
    #[arg(long, default_value = "best", value_parser = ["rtn", "awq", "gptq", "best"])]
    method: String,
    /// Text like that which the model will meet, for all methods but rtn; never the text that it will be
    /// judged by.
    #[arg(long, value_name = "TEXT")]
    calib: Option<PathBuf>,
    /// Most tokens of it, evenly taken.
    #[arg(long, default_value_t = 65536, value_name = "N")]
    tokens: usize,
    /// Tokens in a calibration sequence [default: 512, or the model's context where that is less].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// With an integer zero point for each group.
    #[arg(long)]
    asym: bool,
    /// Spend so many bits per weight of the layers, scales included, where they help most: 3, 4 or 8 bits for
    /// each matrix.
    #[arg(long, value_name = "BITS", num_args = 0..=1, default_missing_value = "3.5", conflicts_with = "bits")]
    mixed: Option<f64>,
    /// Rotate the residual stream by Hadamard matrices, fused into the weights.
    #[arg(long)]
    rotate: bool,
    /// Bits of the embedding and of the output head: 8, or 4 in groups of the same size, for a smaller file.
    #[arg(long, default_value = "8", value_name = "BITS", value_parser = ["4", "8"])]
    table_bits: String,
    /// Threads [default and most: one on each core].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    threads: usize,
    /// Print the table as one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn quantize(args: &Args) -> Result<(), Failure> {
    let method = Method::ALL.into_iter().find(|method| method.name() == args.method);
    let options = Options {
        bits: if args.bits == "3" { 3 } else { 4 },
        group: args.group,
        method: method.unwrap_or(Method::Best),
        zero_points: args.asym,
        mixed: args.mixed,
        rotate: args.rotate,
        table_bits: if args.table_bits == "4" { 4 } else { 8 },
    };
    let calibration = args.calib.as_deref().map(|text| calibration(args, text)).transpose()?;
    let runtime = Runtime::new(&RuntimeConfig { threads: args.threads, ..Default::default() })?;
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos} of {len} steps, {eta}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    let progress = |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let outcome = run(&runtime, &args.model, &args.out, &options, calibration.as_ref(), progress);
    bar.finish_and_clear();
    let report = outcome?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", json(&report))?;
    } else {
        print(&mut out, &report)?;
        writeln!(out, "{}: {} bytes", args.out.display(), report.bytes)?;
    }
    Ok(())
}

/// Sequences of the text, evenly taken from the whole of it.
fn calibration(args: &Args, text: &Path) -> Result<Calibration, Failure> {
    let tokenizer = tokenizer(&args.model)?;
    let all = tokenizer.encode(&read_text(text)?, true, false)?;
    let trained = Config::read(&Checkpoint::open(&args.model)?.metadata)?.context;
    let sequence = args.context.unwrap_or(512.min(trained));
    if sequence == 0 || all.len() < sequence {
        let what = format!(
            "{}: {} tokens do not fill one sequence of {sequence}: take a longer text or a shorter \
             --context",
            text.display(),
            all.len()
        );
        return Err(Error::InvalidArgument(what).into());
    }
    let sequences: Vec<&[u32]> = all.chunks_exact(sequence).collect();
    let wanted = (args.tokens / sequence).clamp(1, sequences.len());
    let tokens = (0..wanted).flat_map(|i| sequences[i * sequences.len() / wanted].to_vec());
    let begin = tokenizer.bos().filter(|_| tokenizer.add_bos());
    Ok(Calibration { tokens: tokens.collect(), sequence, begin })
}

fn print(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    writeln!(out, "error: squared, in parts of the square, of each matrix's outputs and of the")?;
    writeln!(
        out,
        "residual stream behind the layer, on the calibration text (without one: of weights)"
    )?;
    writeln!(out)?;
    let names = ["q", "k", "v", "o", "gate", "up", "down"];
    write!(out, "{:>5}", "layer")?;
    names.iter().try_for_each(|name| write!(out, " {name:>12}"))?;
    writeln!(out, " {:>9}", "stream")?;
    let number = |error: Option<f64>| error.map_or("found".into(), |error| format!("{error:.5}"));
    for (index, layer) in report.layers.iter().enumerate() {
        write!(out, "{index:>5}")?;
        for matrix in &layer.matrices {
            let format = matrix.layout.format().name();
            write!(out, " {:>12}", format!("{format} {}", number(matrix.error)))?;
        }
        let stream = layer.error.map_or("-".into(), |error| format!("{error:.5}"));
        writeln!(out, " {stream:>9}")?;
    }
    writeln!(out)?;
    writeln!(
        out,
        "{:.3} bits per weight in the layers, {:.3} with embedding and output head",
        report.layer_bits_per_weight, report.bits_per_weight
    )
}

fn json(report: &Report) -> serde_json::Value {
    let layer = |layer: &nybl::engine::quantize::LayerReport| {
        let matrices = layer.matrices.iter().map(|matrix| {
            serde_json::json!({
                "name": matrix.name,
                "format": matrix.layout.format().name(),
                "group": matrix.layout.group(),
                "error": matrix.error,
            })
        });
        let matrices: Vec<_> = matrices.collect();
        serde_json::json!({"stream_error": layer.error, "matrices": matrices})
    };
    serde_json::json!({
        "layers": report.layers.iter().map(layer).collect::<Vec<_>>(),
        "bits_per_weight": report.bits_per_weight,
        "layer_bits_per_weight": report.layer_bits_per_weight,
        "bytes": report.bytes,
    })
}
