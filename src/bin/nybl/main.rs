//! The `nybl` program: one file for each subcommand.
#![forbid(unsafe_code)]

mod bench;
mod chat;
mod convert;
mod default_model;
mod inspect;
mod logits;
mod manual;
mod options;
mod perplexity;
mod picture;
mod plan;
mod plot;
mod quantize;
mod rows;
mod run;
mod tokenize;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Run language models offline, from one packed file.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed (the reason is on standard error), 2 wrong usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt, token by token, on standard output.
    Run(run::Args),
    /// Talk with a model; the conversation keeps what it has computed.
    Chat(chat::Args),
    /// Print what a model file holds.
    Inspect(inspect::Args),
    /// Tell what memory a model will take, and what would make it fit.
    Plan(plan::Args),
    /// Pack a GGUF file into one .nybl file that the kernels multiply from.
    Convert(convert::Args),
    /// Turn text into token ids, or ids into text.
    Tokenize(tokenize::Args),
    /// Write the logits after every token of a sequence.
    Logits(logits::Args),
    /// Time decoding, prompts, checking drafts and loading, beside what the machine could do.
    Bench(bench::Args),
    /// Measure how well a model predicts a text, and how far it is from another.
    Perplexity(perplexity::Args),
    /// Quantise a float model to 3 or 4 bits, with what its inputs are on a text.
    Quantize(quantize::Args),
    /// Draw perplexity against bits.
    Plot(plot::Args),
    /// Print what a shell needs to complete these commands.
    Completions(manual::Completions),
    /// Print the manual page, or write one for each command.
    Man(manual::Man),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::chat(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Plan(args) => plan::plan(&args),
        Command::Convert(args) => convert::convert(&args),
        Command::Tokenize(args) => tokenize::tokenize(&args),
        Command::Logits(args) => logits::logits(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Perplexity(args) => perplexity::perplexity(&args),
        Command::Quantize(args) => quantize::quantize(&args),
        Command::Plot(args) => plot::plot(&args),
        Command::Completions(args) => manual::completions(&args),
        Command::Man(args) => manual::man(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            // The reader has had enough, as with `| head`.
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("nybl: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Why a command failed.
enum Failure {
    /// The library's reason.
    Model(nybl::Error),
    /// Standard output could not be written.
    Output(std::io::Error),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Model(error) => error.fmt(f),
            Self::Output(error) => write!(f, "standard output: {error}"),
        }
    }
}

impl From<nybl::Error> for Failure {
    fn from(error: nybl::Error) -> Self {
        Self::Model(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Output(error)
    }
}
