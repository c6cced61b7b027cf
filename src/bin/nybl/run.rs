//! `nybl run`: a prompt in, its continuation out, streamed.

use crate::Failure;
use crate::options::{Opened, Options, rate, speculation};
use nybl::engine::session::Next;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

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
    /// Most tokens to generate [default: until the model ends or its context is full].
    #[arg(short = 'n', long = "tokens", value_name = "N")]
    count: Option<usize>,
    #[command(flatten)]
    options: Options,
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
    let Opened { model, mut session, seed } = args.options.open()?;
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
            "speculation": session.controller().map(|c| speculation(args.options.draft(), c.metrics())),
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
