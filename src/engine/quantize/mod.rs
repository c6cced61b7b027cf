//! Quantises the float matrices of a model, layer by layer, with what its inputs are on a calibration text.
//!
//! Two copies of the residual stream run through the layers: that of the model as it was, and that of the
//! model as it is becoming, in the packed formats and with the kernels that will run it. So each matrix is
//! fitted to the inputs it will really see, and a layer can make up for what those before it have lost. One
//! layer and the Hessians of one input are in memory at a time, besides the streams.
//!
//! A run that was stopped goes on behind its last complete layer: the layers that are there are read back
//! and only run. The same source, options and text give the same bytes, whatever the instruction set and
//! the number of threads.
#![forbid(unsafe_code)]

mod layer;
mod method;
mod mixed;
mod rotate;
mod streams;

pub use method::Method;

use super::convert::{in_order, metadata, sources_hash};
use super::runtime::Runtime;
use crate::error::{Error, Result};
use crate::file::checkpoint::Checkpoint;
use crate::file::metadata::{Metadata, Value};
use crate::file::nybl::{Kind, Target, Writer};
use crate::kernel::{Format, Layout};
use crate::memory::Aligned;
use crate::model::config::Config;
use crate::model::weights::{Layer, Matrix, Weights};
use crate::quant::dense::Machine;
use crate::quant::rtn;
use layer::{Floats, LINEARS, Ready};
use rotate::Rotation;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use streams::Streams;

/// How to quantise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Bits of a weight: 3 or 4.
    pub bits: usize,
    /// Weights that share a scale: 32, 64 or 128.
    pub group: usize,
    /// How codes are chosen.
    pub method: Method,
    /// With an integer zero point for each group.
    pub zero_points: bool,
    /// Spends so many bits per weight of the layers, scales included, where they help most: some matrices
    /// get 3 bits, some 4, some 8.
    pub mixed: Option<f64>,
    /// Rotates the residual stream and the heads of values by Hadamard matrices, fused into the weights.
    pub rotate: bool,
    /// Bits of the embedding and of the output head: 8, in groups of 32, or 4, in groups as the layers'.
    pub table_bits: usize,
}

/// Text to calibrate with.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// Tokens; what does not fill a sequence is left out.
    pub tokens: Vec<u32>,
    /// Tokens in a sequence.
    pub sequence: usize,
    /// Replaces the first token of each sequence.
    pub begin: Option<u32>,
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// The layers.
    pub layers: Vec<LayerReport>,
    /// Bits per weight of all matrices, scales and padding included.
    pub bits_per_weight: f64,
    /// Bits per weight of the matrices of the layers.
    pub layer_bits_per_weight: f64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// What became of a layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerReport {
    /// Squared error of the residual stream behind it, in parts of its square; none without a calibration.
    pub error: Option<f64>,
    /// Its matrices.
    pub matrices: Vec<MatrixReport>,
}

/// What became of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct MatrixReport {
    /// Its name in the layer.
    pub name: &'static str,
    /// Format and group.
    pub layout: Layout,
    /// Squared error of its outputs on its inputs, in parts of their square; of the weights without a
    /// calibration; none where it was there from an earlier run.
    pub error: Option<f64>,
}

/// Quantises the checkpoint `from` into the packed file `to`; `progress(done, total)` counts steps of equal
/// kind.
///
/// # Errors
/// [`Error::Corrupt`] or [`Error::Unsupported`] for a source that could not be run or that is quantised
/// already; [`Error::InvalidArgument`] for options that make no sense; [`Error::Io`]; [`Error::OutOfMemory`].
/// `to` is whole or untouched.
pub fn quantize(
    runtime: &Runtime,
    from: &Path,
    to: &Path,
    options: &Options,
    calibration: Option<&Calibration>,
    mut progress: impl FnMut(usize, usize),
) -> Result<Report> {
    let checkpoint = Checkpoint::open(from)?;
    let config = Config::read(&checkpoint.metadata)?;
    Weights::check(&checkpoint, &config)?;
    let machine = Machine { kernels: runtime.kernels(), pool: runtime.pool() };
    check(&checkpoint, &config, options, calibration)?;
    let rotation = options.rotate.then(|| Rotation::new(&config)).transpose()?;
    let floats = Floats { checkpoint: &checkpoint, config: &config, rotation };
    let steps = config.n_layers + 1 + if options.mixed.is_some() { config.n_layers } else { 0 };
    let mut done = 0;
    let mut advance = || {
        done += 1;
        progress(done, steps);
    };
    let formats = match options.mixed {
        Some(budget) => {
            mixed::assign(machine, &floats, options, calibration, budget, &mut advance)?
        }
        None => BTreeMap::new(),
    };
    let layout = |name: &str, n: usize, k: usize| {
        let (format, group) = match name {
            "token_embd.weight" | "output.weight" => tables_of(options)?,
            _ => (formats.get(name).copied().unwrap_or(format_of(options)?), options.group),
        };
        Layout::new(format, group, n, k)
    };
    let mut plan = Vec::new();
    for (name, tensor) in in_order(&checkpoint) {
        let kind = match tensor.is_vector() {
            true => Kind::Vector(tensor.k()),
            false => Kind::Matrix(layout(name, tensor.n(), tensor.k())?),
        };
        plan.push((name.to_owned(), kind));
    }
    if options.rotate && !checkpoint.tensors.contains_key("output.weight") {
        let table = &checkpoint.tensors["token_embd.weight"];
        let kind = Kind::Matrix(layout("output.weight", table.n(), table.k())?);
        plan.push(("output.weight".into(), kind));
    }
    let mut hash = sources_hash(&checkpoint, &format!("{options:?} {plan:?}"));
    if let Some(Calibration { tokens, sequence, begin }) = calibration {
        hash.update(format!("{sequence} {begin:?}").as_bytes());
        hash.update(bytemuck::cast_slice(tokens));
    }
    let target = Target { path: to, shard_bytes: None, fingerprint: hash.digest().max(1) };
    let described = describe(metadata(&checkpoint)?, options);
    let mut file = Progressing { writer: Writer::start(&target, &described, &plan)?, plan: &plan };

    let embedding = table(machine, &floats, "token_embd.weight", &plan)?;
    let mut streams = calibration
        .map(|calibration| Streams::new(machine, &floats, &embedding, calibration))
        .transpose()?;
    file.write("token_embd.weight", &Ready::Matrix(embedding))?;
    let mut report = Report::default();
    for index in 0..config.n_layers {
        let original = floats.layer(machine, index)?;
        let stem = format!("blk.{index}.");
        let names: Vec<String> =
            plan.iter().map(|(name, _)| name.clone()).filter(|n| n.starts_with(&stem)).collect();
        let layer = match file.read_layer(index, &names, &original.layer)? {
            Some(layer) => {
                streams.iter_mut().try_for_each(|streams| {
                    streams.run(index, &original.layer, &layer);
                    Ok::<_, Error>(())
                })?;
                report.layers.push(found(&layer));
                layer
            }
            None => {
                let layouts = LINEARS.map(|part| {
                    let name = format!("blk.{index}.{part}.weight");
                    match plan.iter().find(|(planned, _)| *planned == name) {
                        Some((_, Kind::Matrix(layout))) => *layout,
                        _ => unreachable!("checked against the configuration"),
                    }
                });
                let job = layer::Job { machine, config: &config, index, method: options.method };
                let (layer, reports) = job.quantise(&original, &layouts, streams.as_mut())?;
                report.layers.push(LayerReport { error: None, matrices: reports });
                layer
            }
        };
        for name in &names {
            file.write(name, &layer::part(&layer, &stem, name)?)?;
        }
        if let (Some(streams), Some(last)) = (&streams, report.layers.last_mut()) {
            last.error = Some(streams.error());
        }
        for name in &names {
            checkpoint.tensors[name].release();
        }
        advance();
    }
    file.write("output_norm.weight", &Ready::Vector(floats.vector("output_norm.weight")?))?;
    if plan.iter().any(|(name, _)| name == "output.weight") {
        let head = table(machine, &floats, "output.weight", &plan)?;
        file.write("output.weight", &Ready::Matrix(head))?;
    }
    let files = file.writer.finish()?;
    advance();
    let bits = |of: &dyn Fn(&str) -> bool| {
        let matrices = plan.iter().filter_map(|(name, kind)| match kind {
            Kind::Matrix(layout) if of(name) => Some(layout),
            _ => None,
        });
        let (bytes, weights) = matrices.fold((0, 0), |(bytes, weights), layout| {
            (bytes + layout.bytes(), weights + layout.n() * layout.k())
        });
        bytes as f64 * 8.0 / weights as f64
    };
    report.bits_per_weight = bits(&|_| true);
    report.layer_bits_per_weight = bits(&|name| name.starts_with("blk."));
    for file in &files {
        let size =
            std::fs::metadata(file).map_err(|why| Error::io(file.to_string_lossy(), &why))?;
        report.bytes += size.len();
    }
    Ok(report)
}

/// The format of matrices that `mixed` says nothing about.
fn format_of(options: &Options) -> Result<Format> {
    match (options.bits, options.zero_points) {
        (3, false) => Ok(Format::Q3),
        (3, true) => Ok(Format::Q3Z),
        (4, false) => Ok(Format::Q4),
        (4, true) => Ok(Format::Q4Z),
        (bits, _) => Err(Error::InvalidArgument(format!("{bits} bits: only 3 or 4"))),
    }
}

/// Format and group of embedding and output head.
fn tables_of(options: &Options) -> Result<(Format, usize)> {
    match options.table_bits {
        8 => Ok((Format::Q8, 32)),
        4 => Ok((Format::Q4, options.group)),
        bits => Err(Error::InvalidArgument(format!(
            "{bits} bits for embedding and output head: only 4 or 8"
        ))),
    }
}

fn check(
    checkpoint: &Checkpoint,
    config: &Config,
    options: &Options,
    calibration: Option<&Calibration>,
) -> Result<()> {
    let wrong = |what: String| Err(Error::InvalidArgument(what));
    format_of(options)?;
    tables_of(options)?;
    if !matches!(options.group, 32 | 64 | 128) {
        return wrong(format!("groups of {}: 32, 64 or 128", options.group));
    }
    for (name, tensor) in &checkpoint.tensors {
        if !tensor.is_vector() && !tensor.is_float() {
            return Err(Error::Unsupported(format!(
                "{}: {name} is quantised already ({}): take the float model, or keep its codes with \
                 `nybl convert`",
                checkpoint.name,
                tensor.encoding()
            )));
        }
    }
    let Some(Calibration { tokens, sequence, .. }) = calibration else {
        return match options.method {
            Method::Rtn if options.mixed.is_none() => Ok(()),
            _ => wrong("a calibration text is needed for anything but plain rtn".into()),
        };
    };
    if *sequence == 0 || *sequence > config.context {
        return wrong(format!(
            "calibration sequences of {sequence} tokens, where the model was trained for {}",
            config.context
        ));
    }
    if tokens.len() < *sequence {
        return wrong(format!(
            "a calibration text of {} tokens does not fill one sequence of {sequence}",
            tokens.len()
        ));
    }
    let vocab = checkpoint.tensors.get("token_embd.weight").map_or(0, |table| table.n());
    match tokens.iter().find(|token| **token as usize >= vocab) {
        Some(token) => wrong(format!("token {token} of a vocabulary of {vocab}")),
        None => Ok(()),
    }
}

/// Says in the file how it was made.
fn describe(mut metadata: Metadata, options: &Options) -> Metadata {
    let Options { bits, group, method, zero_points, mixed, rotate, table_bits } = options;
    let mut text = match mixed {
        Some(budget) => format!("{}, {budget} bits per weight, groups of {group}", method.name()),
        None => format!("{}, {bits} bits, groups of {group}", method.name()),
    };
    for (set, what) in [(zero_points, ", zero points"), (rotate, ", rotated")] {
        if *set {
            text += what;
        }
    }
    if *table_bits != 8 {
        text += &format!(", embedding and output head in {table_bits} bits");
    }
    metadata.set("nybl.quantization", Value::Text(text));
    metadata
}

/// The report of a layer that was there.
fn found(layer: &Layer) -> LayerReport {
    let matrices = [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down];
    let matrices = LINEARS.into_iter().zip(matrices);
    let matrices = matrices
        .map(|(name, matrix)| MatrixReport { name, layout: matrix.layout(), error: None })
        .collect();
    LayerReport { error: None, matrices }
}

/// Packs an embedding or output head by rounding to nearest.
fn table(
    machine: Machine<'_>,
    floats: &Floats<'_>,
    name: &str,
    plan: &[(String, Kind)],
) -> Result<Matrix> {
    let layout = match plan.iter().find(|(planned, _)| planned == name) {
        Some((_, Kind::Matrix(layout))) => *layout,
        _ => return Err(Error::Internal(format!("{name} is not planned"))),
    };
    let mut bytes = Aligned::zeroed("packed weights", layout.bytes())?;
    let failed = Mutex::new(Ok(()));
    machine.pool.chunks_mut(&mut bytes, layout.panel_bytes(), &|index, panel| {
        let first = index * layout.panel_rows();
        let count = layout.panel_rows().min(layout.n() - first);
        let packed = floats
            .table_rows(name, first, count)
            .and_then(|rows| rtn::pack_panel(&layout, count, &rows, panel));
        if let (Err(error), Ok(mut failed)) = (packed, failed.lock()) {
            *failed = Err(error);
        }
    });
    let outcome = failed.into_inner().map_err(|_| Error::Internal("packing panicked".into()))?;
    outcome.map_err(|error| error.in_tensor(&floats.checkpoint.name, name))?;
    Matrix::owned(layout, bytes)
}

/// The file as far as it is there.
struct Progressing<'a> {
    writer: Writer,
    plan: &'a [(String, Kind)],
}

impl Progressing<'_> {
    fn place(&self, name: &str) -> Result<usize> {
        let place = self.plan.iter().position(|(planned, _)| planned == name);
        place.ok_or_else(|| Error::Internal(format!("{name} is not planned")))
    }

    /// Appends a tensor that is not there yet.
    fn write(&mut self, name: &str, ready: &Ready) -> Result<()> {
        let place = self.place(name)?;
        if self.writer.complete()[place] {
            return Ok(());
        }
        match ready {
            Ready::Vector(x) => {
                let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
                self.writer.append(&bytes)
            }
            Ready::Matrix(matrix) => self.writer.append(matrix.packed().bytes()),
        }
    }

    /// A layer of which every tensor is there; what the file does not hold comes from `original`.
    fn read_layer(
        &mut self,
        index: usize,
        names: &[String],
        original: &Layer,
    ) -> Result<Option<Layer>> {
        let mut layer = layer::copy(original);
        let complete = self.writer.complete();
        for name in names {
            let place = self.place(name)?;
            if !complete[place] {
                return Ok(None);
            }
            let bytes = self.writer.read(place)?;
            let ready = match self.plan[place].1 {
                Kind::Matrix(layout) => Ready::Matrix(Matrix::owned(layout, bytes)?),
                _ => {
                    let (floats, _) = bytes.as_chunks::<4>();
                    Ready::Vector(floats.iter().map(|x| f32::from_le_bytes(*x)).collect())
                }
            };
            layer::set(&mut layer, &format!("blk.{index}."), name, ready)?;
        }
        Ok(Some(layer))
    }
}
