//! `nybl inspect`: what a model file holds, read from its head.

use crate::Failure;
use nybl::file::checkpoint::Checkpoint;
use nybl::file::metadata::{Metadata, Value};
use nybl::file::nybl::{Kind, Nybl};
use nybl::file::source::Source;
use nybl::file::tensor::Tensor;
use nybl::model::config::Config;
use nybl::text::vocabulary;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

/// Arguments of `nybl inspect`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A .nybl or GGUF file, or a Hugging Face folder.
    file: PathBuf,
    /// Compare every tensor with its checksum (.nybl only; reads the whole file).
    #[arg(long)]
    verify: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// One tensor of either format.
struct Entry {
    name: String,
    shape: (usize, usize),
    kind: String,
    bytes: usize,
}

/// Runs the command.
pub(crate) fn inspect(args: &Args) -> Result<(), Failure> {
    let (format, file_bytes, metadata, entries);
    if !args.file.is_dir() && Nybl::recognises(Source::open(&args.file)?.bytes()) {
        let nybl = Nybl::open_path(&args.file)?;
        if args.verify {
            nybl.verify()?;
        }
        let entry = |tensor: &nybl::file::nybl::Tensor| {
            let shape = match tensor.kind {
                Kind::Vector(len) | Kind::Order(len) => (1, len),
                Kind::Matrix(layout) => (layout.n(), layout.k()),
            };
            let (kind, bytes) = (tensor.kind.name(), tensor.range.len());
            Entry { name: tensor.name.clone(), shape, kind, bytes }
        };
        entries = nybl.tensors().iter().map(entry).collect::<Vec<_>>();
        format = match nybl.files().len() {
            1 => "nybl, version 1".to_owned(),
            shards => format!("nybl, version 1, in {shards} shards"),
        };
        file_bytes = nybl.files().iter().map(|file| file.bytes().len()).sum();
        metadata = nybl.metadata().clone();
    } else {
        let checkpoint = Checkpoint::open(&args.file)?;
        if args.verify {
            let why = "--verify: only .nybl files hold checksums; convert it to one";
            return Err(nybl::Error::InvalidArgument(why.into()).into());
        }
        let entry = |(name, tensor): (&String, &Tensor)| Entry {
            name: name.clone(),
            shape: (tensor.n(), tensor.k()),
            kind: tensor.encoding(),
            bytes: tensor.bytes(),
        };
        entries = checkpoint.tensors.iter().map(entry).collect();
        file_bytes = checkpoint.files.iter().map(|file| file.bytes().len()).sum();
        format = checkpoint.format;
        metadata = checkpoint.metadata;
    }
    let report = Report { format, file_bytes, metadata, entries, verified: args.verify };
    if args.json { report.print_json() } else { report.print() }
}

struct Report {
    format: String,
    file_bytes: usize,
    metadata: Metadata,
    entries: Vec<Entry>,
    verified: bool,
}

impl Report {
    fn weights(&self) -> usize {
        self.entries.iter().map(|entry| entry.shape.0 * entry.shape.1).sum()
    }

    /// Bytes by tensor type.
    fn by_kind(&self) -> BTreeMap<&str, usize> {
        let mut kinds = BTreeMap::new();
        for entry in &self.entries {
            *kinds.entry(entry.kind.as_str()).or_default() += entry.bytes;
        }
        kinds
    }

    /// Tensors with the same role, shape and type in several layers as one line.
    fn by_role(&self) -> Vec<(String, usize, &Entry)> {
        let mut roles: Vec<(String, usize, &Entry)> = Vec::new();
        for entry in &self.entries {
            let role = match entry.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
                Some((_, part)) => format!("blk.*.{part}"),
                None => entry.name.clone(),
            };
            let same = |(name, _, first): &&mut (String, usize, &Entry)| {
                *name == role && first.shape == entry.shape && first.kind == entry.kind
            };
            match roles.iter_mut().find(same) {
                Some((_, count, _)) => *count += 1,
                None => roles.push((role, 1, entry)),
            }
        }
        roles
    }

    fn tokenizer(&self) -> String {
        let vocab = self.entries.iter().find(|entry| entry.name == "token_embd.weight");
        match vocabulary::tokenizer(&self.metadata, vocab.map_or(usize::MAX, |e| e.shape.0)) {
            Ok(Some(tokenizer)) => {
                let bos = tokenizer.bos().map_or("none".into(), |id| id.to_string());
                let kind = match self.metadata.get("tokenizer.ggml.model") {
                    Some(Value::Text(kind)) => format!("{kind} vocabulary"),
                    _ => "tokenizer.json".into(),
                };
                let (size, eos) = (tokenizer.vocab_size(), tokenizer.eos());
                format!("{kind}, {size} tokens, begin {bos}, end {eos:?}")
            }
            Ok(None) => "none".into(),
            Err(error) => format!("unusable: {error}"),
        }
    }

    fn print(&self) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "format        {}", self.format)?;
        match Config::read(&self.metadata) {
            Ok(c) => {
                writeln!(out, "model         {} ({})", c.name, c.architecture)?;
                writeln!(
                    out,
                    "shape         {} layers, width {}, {} heads and {} KV heads of {}, feed-forward {}, context {}",
                    c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ff, c.context
                )?;
                let kv = c.kv_shape().token_bytes(nybl::kernel::KvFormat::F32);
                writeln!(out, "KV cache      {kv} bytes a token")?;
            }
            Err(error) => writeln!(out, "model         cannot be run: {error}")?,
        }
        let bits = self.entries.iter().map(|entry| entry.bytes * 8).sum::<usize>() as f64
            / self.weights() as f64;
        writeln!(out, "parameters    {} in {} tensors", self.weights(), self.entries.len())?;
        writeln!(out, "file          {} bytes, {bits:.2} bits a weight", self.file_bytes)?;
        for (kind, bytes) in self.by_kind() {
            writeln!(out, "  {kind:<11} {bytes} bytes")?;
        }
        writeln!(out, "tokenizer     {}", self.tokenizer())?;
        if self.verified {
            writeln!(out, "checksums     all match")?;
        }
        writeln!(out, "tensors")?;
        for (role, count, entry) in self.by_role() {
            let (n, k) = entry.shape;
            let shape = format!("{n} x {k}");
            writeln!(out, "  {role:<26} {count:>3} of {shape:<14} {}", entry.kind)?;
        }
        Ok(())
    }

    fn print_json(&self) -> Result<(), Failure> {
        let config = Config::read(&self.metadata);
        let tensors: Vec<_> = self
            .entries
            .iter()
            .map(|entry| {
                serde_json::json!({
                    "name": entry.name,
                    "shape": [entry.shape.0, entry.shape.1],
                    "type": entry.kind,
                    "bytes": entry.bytes,
                })
            })
            .collect();
        let object = serde_json::json!({
            "format": self.format,
            "architecture": self.metadata.text("general.architecture").ok().flatten(),
            "name": config.as_ref().ok().map(|c| &c.name),
            "error": config.as_ref().err().map(ToString::to_string),
            "layers": config.as_ref().ok().map(|c| c.n_layers),
            "context": config.as_ref().ok().map(|c| c.context),
            "parameters": self.weights(),
            "file_bytes": self.file_bytes,
            "tokenizer": self.tokenizer(),
            "verified": self.verified,
            "tensors": tensors,
        });
        writeln!(std::io::stdout(), "{object}")?;
        Ok(())
    }
}
