//! `nybl chat`: a conversation that keeps what it has computed.
//!
//! Every turn renders the whole conversation by the model's own chat template and runs only what the session
//! does not hold yet, so that any template works and nothing is computed twice. A model without a template
//! writes along instead: the user's paragraph, then the model's, and so on.

use crate::Failure;
use crate::options::{Opened, Options, rate, speculation};
use nybl::Error;
use nybl::engine::pass::Canceller;
use nybl::engine::session::Next;
use nybl::engine::speculate::Speculator;
use nybl::text::template::{ChatTemplate, Conversation};
use nybl::text::tokenizer::Tokenizer;
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Arguments of `nybl chat`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  nybl chat
  nybl chat -m model.nybl --system \"Answer in one sentence.\" --temp 0.6
  printf 'Hello\\nAnd then?\\n' | nybl chat -m model.nybl --json

/help lists what can be typed besides text. Ctrl-C stops an answer; between answers it ends the program.")]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of one answer [default: until the model ends it or the context is full].
    #[arg(short = 'n', long = "tokens", value_name = "N")]
    count: Option<usize>,
    /// Print one JSON object for each answer.
    #[arg(long)]
    json: bool,
}

const HELP: &str = "\
/save FILE     keep the conversation: words in FILE, keys and values in FILE.kv
/load FILE     go on with it
/system TEXT   tell the model something before the conversation, from the next turn on
/undo          forget the last turn
/reset         forget all turns
/stats         tokens, memory and speed so far
/quit          end, as the end of input does
//TEXT         say TEXT with one slash in front";

/// Runs the command.
pub(crate) fn chat(args: &Args) -> Result<(), Failure> {
    let Opened { model, session, seed } = args.options.open()?;
    let tokenizer = model.tokenizer()?;
    let template = match model.chat_template() {
        Ok(template) => Some(template),
        Err(Error::Unsupported(_)) => None,
        Err(error) => return Err(error.into()),
    };
    if template.is_none() && args.system.is_some() {
        return Err(no_template());
    }
    let answering = Arc::new(AtomicBool::new(false));
    stop_answers(Arc::clone(&answering), session.canceller())?;
    let mut chat = Chat {
        tokenizer,
        template,
        session,
        system: args.system.clone(),
        turns: Vec::new(),
        answering,
        most: args.count.unwrap_or(usize::MAX),
        stats: Stats::default(),
    };

    let (input, mut out) = (std::io::stdin().lock(), std::io::stdout().lock());
    let talking = input.is_terminal() && !args.json;
    if talking {
        let name = model.config().name.as_str();
        let how = if template.is_some() {
            ""
        } else {
            "; it has no chat template, so you write a text in turns"
        };
        eprintln!("{name}, seed {seed}{how}. /help lists commands.");
    }
    let mut lines = input.lines();
    loop {
        if talking {
            write!(out, "> ")?;
            out.flush()?;
        }
        let Some(line) = lines.next() else { break };
        let line = line.map_err(|error| Error::io("standard input", &error))?;
        let line = line.trim();
        let said = match line.strip_prefix('/') {
            _ if line.is_empty() => continue,
            Some(rest) if !rest.starts_with('/') => {
                match chat.command(rest, args, &mut out) {
                    Ok(true) => continue,
                    Ok(false) => break,
                    // The conversation goes on as it was.
                    Err(Failure::Model(error)) => eprintln!("{error}"),
                    Err(failure) => return Err(failure),
                }
                continue;
            }
            Some(rest) => rest,
            None => line,
        };
        match chat.turn(said, !args.json, &mut out) {
            Ok(answer) if args.json => writeln!(out, "{}", chat.object(&answer, args))?,
            Ok(answer) if answer.finish == "cancelled" => writeln!(out, " [stopped]")?,
            Ok(answer) if answer.finish == "context_full" => {
                writeln!(out, " [the context is full]")?
            }
            Ok(_) => writeln!(out)?,
            Err(Failure::Model(error)) => eprintln!("{error}"),
            Err(failure) => return Err(failure),
        }
    }
    if talking {
        writeln!(out)?;
    }
    Ok(())
}

fn no_template() -> Failure {
    let why = "the model has no chat template, so there is nobody to tell a system text: leave it out, or \
               begin the text with it";
    Error::Unsupported(why.into()).into()
}

/// Ctrl-C stops an answer, and the program between answers.
fn stop_answers(answering: Arc<AtomicBool>, canceller: Canceller) -> Result<(), Failure> {
    let handler = move || {
        if answering.load(Ordering::Relaxed) {
            canceller.cancel();
        } else {
            // As a shell reports a program that SIGINT ended.
            std::process::exit(130);
        }
    };
    ctrlc::set_handler(handler)
        .map_err(|error| Error::Unsupported(format!("Ctrl-C cannot be handled: {error}")).into())
}

/// What one side said and the other answered.
struct Turn {
    user: String,
    answer: String,
    /// Tokens in the session before it.
    before: usize,
}

/// An answer, and what it took.
struct Answer {
    text: String,
    finish: &'static str,
    prompt: usize,
    reused: usize,
    tokens: usize,
    first: Duration,
    total: Duration,
}

/// Sums over all answers.
#[derive(Default)]
struct Stats {
    answers: usize,
    prompt: usize,
    reused: usize,
    tokens: usize,
    decoding: Duration,
    prefill: Duration,
}

struct Chat<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    session: Speculator,
    system: Option<String>,
    turns: Vec<Turn>,
    answering: Arc<AtomicBool>,
    most: usize,
    stats: Stats,
}

impl Chat<'_> {
    /// What the user said, and the model's answer to it. After an error the conversation is as before.
    fn turn(&mut self, said: &str, show: bool, out: &mut impl Write) -> Result<Answer, Failure> {
        let before = self.session.tokens().len();
        self.turns.push(Turn { user: said.into(), answer: String::new(), before });
        self.answering.store(true, Ordering::Relaxed);
        let answer = self.answer(said, show, out);
        self.answering.store(false, Ordering::Relaxed);
        match answer {
            Ok(answer) => {
                if let Some(turn) = self.turns.last_mut() {
                    turn.answer.clone_from(&answer.text);
                }
                self.stats.answers += 1;
                self.stats.prompt += answer.prompt;
                self.stats.reused += answer.reused;
                self.stats.tokens += answer.tokens;
                self.stats.prefill += answer.first;
                self.stats.decoding += answer.total - answer.first;
                Ok(answer)
            }
            Err(failure) => {
                self.turns.pop();
                self.session.truncate(before);
                Err(failure)
            }
        }
    }

    fn answer(&mut self, said: &str, show: bool, out: &mut impl Write) -> Result<Answer, Failure> {
        let start = Instant::now();
        let (ids, reused) = loop {
            let ids = self.conversation(said)?;
            let held = self.session.tokens();
            let reused = held.iter().zip(&ids).take_while(|(held, id)| held == id).count();
            // A token at least must go through the model: its logits are where the answer begins.
            let reused = reused.min(ids.len().saturating_sub(1));
            self.session.truncate(reused);
            match self.session.append(&ids[reused..]) {
                Ok(()) => break (ids, reused),
                // What was said first is forgotten first, as long as something is left to forget.
                Err(Error::ContextFull { .. })
                    if self.template.is_some() && self.turns.len() > 1 =>
                {
                    self.turns.remove(0);
                    eprintln!("[the context is full: the first turn is forgotten]");
                }
                Err(error) => return Err(error.into()),
            }
        };

        let mut stream = self.tokenizer.stream_after(&ids)?;
        let (mut text, mut tokens, mut first) = (String::new(), 0, None);
        let finish = loop {
            if tokens >= self.most {
                break "length";
            }
            let id = match self.session.next() {
                Ok(Next::Token(id)) => id,
                Ok(Next::End(_)) => break "end",
                Ok(Next::ContextFull) => break "context_full",
                Err(Error::Cancelled) => break "cancelled",
                Err(error) => return Err(error.into()),
            };
            first.get_or_insert_with(|| start.elapsed());
            tokens += 1;
            let piece = stream.push(self.tokenizer, id)?;
            if self.template.is_none()
                && let Some(rest) = end_of_paragraph(&text, &piece)
            {
                // The blank line belongs to the next turn.
                let before = self.session.tokens().len() - 1;
                self.session.truncate(before);
                if !rest.is_empty() {
                    self.session.append(&self.tokenizer.encode(rest, false, false)?)?;
                }
                show_piece(out, show, rest)?;
                text.push_str(rest);
                break "end";
            }
            // Blank lines before the first word are no part of the answer.
            let shown = if text.is_empty() { piece.trim_start() } else { &piece };
            show_piece(out, show, shown)?;
            text.push_str(shown);
        };
        if finish != "end" {
            let rest = stream.finish(self.tokenizer)?;
            show_piece(out, show, &rest)?;
            text.push_str(&rest);
        }
        let total = start.elapsed();
        let first = first.unwrap_or(total);
        let prompt = ids.len() - reused;
        Ok(Answer { text: text.trim().into(), finish, prompt, reused, tokens, first, total })
    }

    /// The tokens of everything said so far, up to where the model goes on.
    fn conversation(&self, said: &str) -> nybl::Result<Vec<u32>> {
        let Some(template) = self.template else {
            let held = self.session.tokens();
            let text = if held.is_empty() { said.to_owned() } else { format!("\n\n{said}") };
            let more = self.tokenizer.encode(&text, held.is_empty(), false)?;
            return Ok([held, &more].concat());
        };
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(json!({ "role": "system", "content": system }));
        }
        for (at, turn) in self.turns.iter().enumerate() {
            messages.push(json!({ "role": "user", "content": turn.user }));
            if at + 1 < self.turns.len() {
                messages.push(json!({ "role": "assistant", "content": turn.answer }));
            }
        }
        let messages = Value::Array(messages).to_string();
        let conversation = Conversation {
            messages: &messages,
            add_generation_prompt: true,
            ..Conversation::default()
        };
        template.encode(&conversation, self.tokenizer)
    }

    /// Does what a line that begins with a slash asks for; false ends the program.
    fn command(&mut self, line: &str, args: &Args, out: &mut impl Write) -> Result<bool, Failure> {
        let (name, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let argument = argument.trim();
        match (name, argument) {
            ("quit" | "exit", "") => return Ok(false),
            ("help", "") => writeln!(out, "{HELP}")?,
            ("stats", "") if args.json => writeln!(out, "{}", self.stats_object())?,
            ("stats", "") => self.print_stats(out)?,
            ("reset", "") => {
                self.session.reset();
                self.turns.clear();
            }
            ("undo", "") => {
                if let Some(turn) = self.turns.pop() {
                    self.session.truncate(turn.before);
                }
            }
            ("system", text) => {
                if self.template.is_none() {
                    return Err(no_template());
                }
                self.system = (!text.is_empty()).then(|| text.to_owned());
            }
            ("save", file) if !file.is_empty() => self.save(Path::new(file))?,
            ("load", file) if !file.is_empty() => self.load(Path::new(file))?,
            ("save" | "load", _) => {
                return Err(Error::InvalidArgument(format!("/{name} needs a file name")).into());
            }
            _ => {
                let why = format!("/{line} is no command: /help lists them, //{line} says it");
                return Err(Error::InvalidArgument(why).into());
            }
        }
        Ok(true)
    }

    fn save(&mut self, path: &Path) -> Result<(), Failure> {
        let turns = self.turns.iter();
        let turns: Vec<_> = turns
            .map(|turn| json!({ "user": turn.user, "answer": turn.answer, "before": turn.before }))
            .collect();
        let words = json!({ "system": self.system, "turns": turns });
        if !self.turns.is_empty() {
            self.session.settled().save(&beside(path))?;
        }
        let text = format!("{words:#}\n");
        std::fs::write(path, text)
            .map_err(|error| Error::io(path.display().to_string(), &error))?;
        Ok(())
    }

    fn load(&mut self, path: &Path) -> Result<(), Failure> {
        let name = || path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(name(), &error))?;
        let wrong = |what: &str| Error::corrupt(name(), "conversation", what.to_owned());
        let words: Value =
            serde_json::from_str(&text).map_err(|error| wrong(&error.to_string()))?;
        let system = words["system"].as_str().map(str::to_owned);
        let turns = words["turns"].as_array().ok_or_else(|| wrong("has no turns"))?;
        let turns = turns.iter().map(|turn| {
            let field = |key: &str| turn[key].as_str().map(str::to_owned);
            let before = turn["before"].as_u64().and_then(|n| usize::try_from(n).ok());
            Some(Turn { user: field("user")?, answer: field("answer")?, before: before? })
        });
        let turns: Vec<Turn> =
            turns.collect::<Option<_>>().ok_or_else(|| wrong("has a turn that is none"))?;
        if system.is_some() && self.template.is_none() {
            return Err(no_template());
        }
        if turns.is_empty() {
            self.session.reset();
        } else {
            self.session.settled().restore(&beside(path))?;
        }
        (self.system, self.turns) = (system, turns);
        Ok(())
    }

    fn object(&mut self, answer: &Answer, args: &Args) -> Value {
        let drafts =
            self.session.controller().map(|c| speculation(args.options.draft(), c.metrics()));
        json!({
            "text": answer.text,
            "finish": answer.finish,
            "prompt_tokens": answer.prompt,
            "reused_tokens": answer.reused,
            "tokens": answer.tokens,
            "time_to_first_token_s": answer.first.as_secs_f64(),
            "tokens_per_second": rate(answer.tokens.saturating_sub(1), answer.total - answer.first),
            "context_tokens": self.session.tokens().len(),
            "speculation": drafts,
        })
    }

    fn stats_object(&mut self) -> Value {
        let (kv, scratch) = self.session.bytes();
        let stats = &self.stats;
        json!({
            "answers": stats.answers,
            "context_tokens": self.session.tokens().len(),
            "context": self.session.context(),
            "prompt_tokens": stats.prompt,
            "reused_tokens": stats.reused,
            "tokens": stats.tokens,
            "tokens_per_second": rate(stats.tokens.saturating_sub(stats.answers), stats.decoding),
            "prefill_tokens_per_second": rate(stats.prompt, stats.prefill),
            "kv_bytes": kv,
            "scratch_bytes": scratch,
        })
    }

    fn print_stats(&mut self, out: &mut impl Write) -> std::io::Result<()> {
        let (kv, scratch) = self.session.bytes();
        let stats = &self.stats;
        let (held, context) = (self.session.tokens().len(), self.session.context());
        writeln!(out, "context: {held} of {context} tokens")?;
        writeln!(
            out,
            "read: {} tokens at {:.0} a second, {} more were there already",
            stats.prompt,
            rate(stats.prompt, stats.prefill),
            stats.reused
        )?;
        writeln!(
            out,
            "written: {} tokens at {:.0} a second in {} answers",
            stats.tokens,
            rate(stats.tokens.saturating_sub(stats.answers), stats.decoding),
            stats.answers
        )?;
        if let Some(controller) = self.session.controller() {
            let metrics = controller.metrics();
            let (accepted, drafted) = (metrics.accepted, metrics.drafted);
            writeln!(out, "drafts: {accepted} of {drafted} tokens accepted")?;
        }
        writeln!(
            out,
            "memory: {:.1} MB keys and values, {:.1} MB buffers",
            megabytes(kv),
            megabytes(scratch)
        )
    }
}

fn megabytes(bytes: usize) -> f64 {
    bytes as f64 * 1e-6
}

fn show_piece(out: &mut impl Write, show: bool, piece: &str) -> std::io::Result<()> {
    if show && !piece.is_empty() {
        write!(out, "{piece}")?;
        out.flush()?;
    }
    Ok(())
}

/// Where keys and values of a saved conversation lie.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".kv");
    name.into()
}

/// What comes before the blank line that `piece` ends a paragraph with, if it does.
fn end_of_paragraph<'a>(text: &str, piece: &'a str) -> Option<&'a str> {
    if text.trim().is_empty() && piece.trim().is_empty() {
        return None;
    }
    if let Some(at) = piece.find("\n\n") {
        // Blank lines before the first word end nothing.
        return (!text.trim().is_empty() || !piece[..at].trim().is_empty()).then_some(&piece[..at]);
    }
    (text.ends_with('\n') && piece.starts_with('\n')).then_some("")
}

#[cfg(test)]
mod tests {
    use super::end_of_paragraph;

    #[test]
    fn a_blank_line_ends_a_paragraph_wherever_tokens_cut_it() {
        assert_eq!(end_of_paragraph("A word", ".\n\n"), Some("."));
        assert_eq!(end_of_paragraph("A word.\n", "\nNext"), Some(""));
        assert_eq!(end_of_paragraph("A word", "\n"), None);
        assert_eq!(end_of_paragraph("", "\n\n"), None);
        assert_eq!(end_of_paragraph("\n", "\n"), None);
        assert_eq!(end_of_paragraph("", "\n\nA"), None);
    }
}
