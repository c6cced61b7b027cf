//! `nybl tokenize`: text in, token ids out, and back.

use crate::Failure;
use nybl::Error;
use nybl::file::checkpoint::Checkpoint;
use nybl::file::nybl::{Kind, Nybl};
use nybl::file::source::Source;
use nybl::text::tokenizer::Tokenizer;
use nybl::text::vocabulary;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Arguments of `nybl tokenize`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  echo -n 'The sea' | nybl tokenize model.nybl
  nybl tokenize vocabulary.gguf --bos < book.txt | nybl tokenize vocabulary.gguf --decode")]
pub(crate) struct Args {
    /// A .nybl or GGUF file (a vocabulary alone is enough), a Hugging Face folder, or a tokenizer.json.
    file: PathBuf,
    /// Read ids, separated by anything that is no digit, and write their text.
    #[arg(long)]
    decode: bool,
    /// Begin with the beginning-of-sequence id, if the model wants it.
    #[arg(long, conflicts_with = "decode")]
    bos: bool,
    /// Take the names of control tokens in the text for those tokens.
    #[arg(long, conflicts_with = "decode")]
    special: bool,
    /// Print one JSON object: ids, the text of each, and their number.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn tokenize(args: &Args) -> Result<(), Failure> {
    let tokenizer = tokenizer(&args.file)?;
    let mut input = Vec::new();
    std::io::stdin().lock().read_to_end(&mut input).map_err(|reason| Error::Io {
        path: "standard input".into(),
        reason: reason.to_string(),
    })?;
    let input = String::from_utf8(input).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::InvalidArgument(format!("standard input: byte {at} is not UTF-8"))
    })?;
    let ids = if args.decode {
        ids_of(&input)?
    } else {
        tokenizer.encode(&input, args.bos, args.special)?
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut stream = tokenizer.stream();
        let mut pieces = Vec::with_capacity(ids.len());
        for id in &ids {
            pieces.push(stream.push(&tokenizer, *id)?);
        }
        let object = serde_json::json!({
            "ids": ids,
            "pieces": pieces,
            "text": tokenizer.decode(&ids)?,
            "count": ids.len(),
        });
        writeln!(out, "{object}")?;
    } else if args.decode {
        out.write_all(tokenizer.decode(&ids)?.as_bytes())?;
    } else {
        let mut separator = "";
        for id in &ids {
            write!(out, "{separator}{id}")?;
            separator = " ";
        }
        writeln!(out)?;
    }
    out.flush()?;
    Ok(())
}

/// The tokenizer of any file that has one.
pub(crate) fn tokenizer(path: &Path) -> Result<Tokenizer, Error> {
    let name = path.display();
    let is_folder = path.is_dir();
    if !is_folder && path.extension().is_some_and(|end| end == "json") {
        return Tokenizer::from_json(Source::open(path)?.bytes(), None, Vec::new(), false);
    }
    let (metadata, rows);
    if !is_folder && Nybl::recognises(Source::open(path)?.bytes()) {
        let packed = Nybl::open(Source::open(path)?)?;
        rows = packed.tensor("token_embd.weight").and_then(|tensor| match tensor.kind {
            Kind::Matrix(layout) => Some(layout.n()),
            _ => None,
        });
        metadata = packed.metadata().clone();
    } else {
        let checkpoint = Checkpoint::open(path)?;
        rows = checkpoint.tensors.get("token_embd.weight").map(|tensor| tensor.n());
        metadata = checkpoint.metadata;
    }
    vocabulary::tokenizer(&metadata, rows.unwrap_or(usize::MAX))?
        .ok_or_else(|| Error::Unsupported(format!("{name}: holds no tokenizer")))
}

/// Every run of digits as an id.
pub(crate) fn ids_of(text: &str) -> Result<Vec<u32>, Error> {
    let words = text.split(|c: char| !c.is_ascii_digit() && c != '-' && !c.is_alphabetic());
    words
        .filter(|word| !word.is_empty())
        .map(|word| {
            let why = || Error::InvalidArgument(format!("{word:?} is no token id"));
            word.parse().map_err(|_| why())
        })
        .collect()
}
