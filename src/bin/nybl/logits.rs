//! `nybl logits`: the logits after every token of a sequence, as a numpy array.

use crate::Failure;
use crate::tokenize::ids_of;
use nybl::Error;
use nybl::engine::load::Model;
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use nybl::engine::score::score;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Arguments of `nybl logits`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  nybl logits model.nybl --ids 1,5,7 --out x.npy
  nybl logits checkpoint-folder --ids \"$(nybl tokenize model.gguf < text.txt)\" --out x.npy --json")]
pub(crate) struct Args {
    /// A .nybl or GGUF file, or a Hugging Face folder; it needs no tokenizer.
    model: PathBuf,
    /// Token ids, from the beginning of the sequence.
    #[arg(long, value_name = "IDS")]
    ids: String,
    /// The .npy file to write: f32, [positions, vocabulary].
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tokens that go through the layers together; changes no bit of the result.
    #[arg(long, default_value_t = 128, value_name = "N")]
    chunk: usize,
    /// Threads [default and most: one on each core].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    threads: usize,
    /// The strongest instruction set to use: scalar, portable, avx2, avx512, neon, dotprod, ...
    #[arg(long, value_name = "NAME")]
    isa: Option<String>,
    /// Print one JSON object instead of a line.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn logits(args: &Args) -> Result<(), Failure> {
    let ids = ids_of(&args.ids)?;
    if ids.is_empty() {
        return Err(Error::InvalidArgument("--ids: names no token".into()).into());
    }
    let runtime = Runtime::new(&RuntimeConfig {
        threads: args.threads,
        isa: args.isa.clone(),
        ..RuntimeConfig::default()
    })?;
    let model = Model::open_path(Arc::new(runtime), &args.model)?;
    let shape = [ids.len(), model.vocab()];
    let mut file = NewFile::create(&args.out)?;
    file.write(&header(shape))?;
    let mut outcome = Ok(());
    let mut likeliest = 0;
    score(&model, &ids, args.chunk, |_, logits| {
        if outcome.is_ok() {
            let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
            outcome = file.write(&bytes);
        }
        let top = |best: usize, (id, x): (usize, &f32)| if *x > logits[best] { id } else { best };
        likeliest = logits.iter().enumerate().fold(0, top);
    })?;
    outcome?;
    file.finish()?;
    let mut out = std::io::stdout().lock();
    let name = args.out.display().to_string();
    if args.json {
        let object = serde_json::json!({
            "out": name,
            "positions": shape[0],
            "vocabulary": shape[1],
            "likeliest_next": likeliest,
        });
        writeln!(out, "{object}")?;
    } else {
        writeln!(out, "{name}: f32 [{}, {}], likeliest next {likeliest}", shape[0], shape[1])?;
    }
    Ok(())
}

/// The header of an `.npy` file, version 1.0, padded so that the data begin at a multiple of 64.
fn header([rows, columns]: [usize; 2]) -> Vec<u8> {
    let mut text =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    let start = (10 + text.len() + 1).next_multiple_of(64);
    text.extend(std::iter::repeat_n(' ', start - 11 - text.len()));
    text.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

/// A file that appears under its name when it is complete.
struct NewFile<'a> {
    path: &'a Path,
    temporary: PathBuf,
    out: Option<BufWriter<File>>,
}

impl<'a> NewFile<'a> {
    fn create(path: &'a Path) -> Result<Self, Error> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}.partial", std::process::id()));
        let mut new = Self { path, temporary: temporary.into(), out: None };
        let file = File::create(&new.temporary);
        new.out = Some(BufWriter::new(new.io(file)?));
        Ok(new)
    }

    fn io<T>(&self, outcome: std::io::Result<T>) -> Result<T, Error> {
        let path = self.path.display().to_string();
        outcome.map_err(|reason| Error::Io { path, reason: reason.to_string() })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let written = self.out.as_mut().map_or(Ok(()), |out| out.write_all(bytes));
        self.io(written)
    }

    fn finish(mut self) -> Result<(), Error> {
        let flushed = self.out.take().map_or(Ok(()), |mut out| out.flush());
        let renamed = flushed.and_then(|()| std::fs::rename(&self.temporary, self.path));
        self.io(renamed)
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        // After a rename there is nothing under this name.
        let _ = std::fs::remove_file(&self.temporary);
    }
}
