//! The residual streams of the model as it was and as it is becoming, over all calibration sequences.
#![forbid(unsafe_code)]

use super::Calibration;
use super::layer::Floats;
use super::method::Method;
use crate::error::Result;
use crate::memory::zeroed;
use crate::model::config::Config;
use crate::model::steps::Steps;
use crate::model::weights::{Layer, Matrix};
use crate::quant::dense::Machine;
use crate::quant::format::unpack_row;
use crate::quant::stats::{Inputs, Stats};

/// The layer before quantisation, and as far as it is quantised.
#[derive(Clone, Copy)]
pub(super) struct Both<'a> {
    pub(super) index: usize,
    pub(super) was: &'a Layer,
    pub(super) is: &'a Layer,
}

pub(super) struct Streams<'a> {
    config: &'a Config,
    machine: Machine<'a>,
    tokens: usize,
    steps: Steps<'a>,
    /// Residual streams, sequence after sequence: before quantisation, and now.
    was: Vec<f32>,
    is: Vec<f32>,
    attended_was: Vec<f32>,
    attended_is: Vec<f32>,
}

impl<'a> Streams<'a> {
    /// Looks up the tokens in the embedding before quantisation and in the packed one.
    pub(super) fn new(
        machine: Machine<'a>,
        floats: &Floats<'a>,
        embedding: &Matrix,
        calibration: &Calibration,
    ) -> Result<Self> {
        let Calibration { tokens, sequence, begin } = calibration;
        let config = floats.config;
        let tokens: Vec<u32> = tokens
            .chunks_exact(*sequence)
            .flat_map(|chunk| {
                let first = begin.unwrap_or(chunk[0]);
                std::iter::once(first).chain(chunk[1..].iter().copied())
            })
            .collect();
        let d = config.d_model;
        let mut was = Vec::new();
        for token in &tokens {
            was.extend(floats.table_rows("token_embd.weight", *token as usize, 1)?);
        }
        let mut is = zeroed("a residual stream", tokens.len() * d)?;
        let packed = embedding.packed();
        for (row, token) in is.chunks_exact_mut(d).zip(&tokens) {
            unpack_row(&packed, *token as usize, row);
        }
        if config.embedding_scale != 1.0 {
            was.iter_mut().chain(&mut is).for_each(|x| *x *= config.embedding_scale);
        }
        let attended = || zeroed("attention outputs", tokens.len() * config.q_dim());
        Ok(Self {
            config,
            machine,
            tokens: *sequence,
            steps: Steps::new(machine, config, *sequence)?,
            was,
            is,
            attended_was: attended()?,
            attended_is: attended()?,
        })
    }

    /// Runs a whole layer.
    pub(super) fn run(&mut self, index: usize, was: &Layer, is: &Layer) {
        let layers = Both { index, was, is };
        self.attend(layers);
        self.add_attention(layers);
        self.add_ffn(layers);
    }

    /// The squared distance of the streams in parts of the square of the original.
    pub(super) fn error(&self) -> f64 {
        let (mut error, mut energy) = (0.0, 0.0);
        for (was, is) in self.was.iter().zip(&self.is) {
            let (was, off) = (f64::from(*was), f64::from(is - was));
            energy += was * was;
            error += off * off;
        }
        error / f64::max(energy, f64::MIN_POSITIVE)
    }

    fn starts(&self) -> impl Iterator<Item = usize> + use<> {
        let (tokens, all) = (self.tokens, self.was.len() / self.config.d_model);
        (0..all).step_by(tokens)
    }

    /// Statistics of the inputs of queries, keys and values.
    pub(super) fn attention_stats(&mut self, layers: Both<'_>, method: Method) -> Result<Stats> {
        self.collect(
            method,
            self.config.d_model,
            |steps, layer, x| steps.attention_input(layer, x).to_vec(),
            layers,
        )
    }

    /// Statistics of the inputs of gate and its factor.
    pub(super) fn ffn_stats(&mut self, layers: Both<'_>, method: Method) -> Result<Stats> {
        self.collect(
            method,
            self.config.d_model,
            |steps, layer, x| steps.ffn_input(layer, x).to_vec(),
            layers,
        )
    }

    /// Statistics of the inputs of the output of the feed-forward network.
    pub(super) fn down_stats(&mut self, layers: Both<'_>, method: Method) -> Result<Stats> {
        let residual = self.config.post_norms.then_some(()).is_none();
        let mut stats = Stats::new(self.config.d_ff)?;
        let d = self.config.d_model;
        for start in self.starts() {
            let range = start * d..(start + self.tokens) * d;
            let (x_was, x_is) = (&self.was[range.clone()], &self.is[range]);
            let was = self.steps.down_input(layers.was, x_was).to_vec();
            let inputs = match method {
                Method::Awq => Inputs { x: &was, original: None, residual: None },
                _ => Inputs {
                    x: self.steps.down_input(layers.is, x_is),
                    original: (method == Method::Best).then_some(&*was),
                    residual: (method == Method::Best && residual).then_some([x_was, x_is]),
                },
            };
            stats.add(self.machine, inputs)?;
        }
        stats.finish();
        Ok(stats)
    }

    /// Attends, and gives the statistics of the inputs of the output of attention.
    pub(super) fn output_stats(&mut self, layers: Both<'_>, method: Method) -> Result<Stats> {
        self.attend(layers);
        let residual = method == Method::Best && !self.config.post_norms;
        let (d, q) = (self.config.d_model, self.config.q_dim());
        let mut stats = Stats::new(q)?;
        for start in self.starts() {
            let end = start + self.tokens;
            let was = &self.attended_was[start * q..end * q];
            let is = &self.attended_is[start * q..end * q];
            let streams = [&self.was[start * d..end * d], &self.is[start * d..end * d]];
            let inputs = Inputs {
                x: if method == Method::Awq { was } else { is },
                original: (method == Method::Best).then_some(was),
                residual: residual.then_some(streams),
            };
            stats.add(self.machine, inputs)?;
        }
        stats.finish();
        Ok(stats)
    }

    fn collect(
        &mut self,
        method: Method,
        k: usize,
        input: impl Fn(&mut Steps<'a>, &Layer, &[f32]) -> Vec<f32>,
        layers: Both<'_>,
    ) -> Result<Stats> {
        let mut stats = Stats::new(k)?;
        let d = self.config.d_model;
        for start in self.starts() {
            let range = start * d..(start + self.tokens) * d;
            let was = input(&mut self.steps, layers.was, &self.was[range.clone()]);
            let is = input(&mut self.steps, layers.is, &self.is[range]);
            let inputs = Inputs {
                x: if method == Method::Awq { &was } else { &is },
                original: (method == Method::Best).then_some(&*was),
                residual: None,
            };
            stats.add(self.machine, inputs)?;
        }
        stats.finish();
        Ok(stats)
    }

    fn attend(&mut self, layers: Both<'_>) {
        let Both { index, was, is } = layers;
        let (d, q) = (self.config.d_model, self.config.q_dim());
        for start in self.starts() {
            let end = start + self.tokens;
            let streams =
                [(was, &self.was, &mut self.attended_was), (is, &self.is, &mut self.attended_is)];
            for (layer, x, out) in streams {
                let out = &mut out[start * q..end * q];
                self.steps.attended(index, layer, &x[start * d..end * d], out);
            }
        }
    }

    /// Divides the columns of what attention has put out: as if values had been divided before.
    pub(super) fn divide_attended(&mut self, columns: &[f32]) {
        for row in self.attended_is.chunks_exact_mut(columns.len()) {
            row.iter_mut().zip(columns).for_each(|(x, column)| *x *= column);
        }
    }

    pub(super) fn add_attention(&mut self, layers: Both<'_>) {
        let (d, q) = (self.config.d_model, self.config.q_dim());
        for start in self.starts() {
            let end = start + self.tokens;
            let streams = [
                (layers.was, &mut self.was, &self.attended_was),
                (layers.is, &mut self.is, &self.attended_is),
            ];
            for (layer, x, attended) in streams {
                let attended = &attended[start * q..end * q];
                self.steps.add_attention(layer, attended, &mut x[start * d..end * d]);
            }
        }
    }

    pub(super) fn add_ffn(&mut self, layers: Both<'_>) {
        let d = self.config.d_model;
        for start in self.starts() {
            let range = start * d..(start + self.tokens) * d;
            self.steps.add_ffn(layers.was, &mut self.was[range.clone()]);
            self.steps.add_ffn(layers.is, &mut self.is[range]);
        }
    }

    /// How far one layer in the place of another moves the original stream: the squared distance in parts
    /// of the square, over the first `tokens` tokens; the stream stays.
    pub(super) fn trial(&mut self, index: usize, layer: &Layer, behind: &[f32]) -> f64 {
        let (mut error, mut energy) = (0.0, 0.0);
        for (off, want) in self.behind(index, layer, behind.len()).iter().zip(behind) {
            let (want, off) = (f64::from(*want), f64::from(off - want));
            energy += want * want;
            error += off * off;
        }
        error / f64::max(energy, f64::MIN_POSITIVE)
    }

    /// The first floats of the original stream behind a layer.
    pub(super) fn behind(&mut self, index: usize, layer: &Layer, floats: usize) -> Vec<f32> {
        let (d, q) = (self.config.d_model, self.config.q_dim());
        let mut out = self.was[..floats].to_vec();
        let mut attended = vec![0.0; self.tokens * q];
        for x in out.chunks_exact_mut(self.tokens * d) {
            self.steps.attended(index, layer, x, &mut attended);
            self.steps.add_attention(layer, &attended, x);
            self.steps.add_ffn(layer, x);
        }
        out
    }

    /// The mean squares of the inputs of each matrix, in the order of the layer's matrices.
    pub(super) fn importance(&mut self, index: usize, layer: &Layer) -> Result<[Vec<f32>; 7]> {
        let (d, q) = (self.config.d_model, self.config.q_dim());
        let mut sums = [vec![0.0; d], vec![0.0; q], vec![0.0; d], vec![0.0; self.config.d_ff]];
        let mut attended = vec![0.0; self.tokens * q];
        for start in self.starts() {
            let mut x = self.was[start * d..(start + self.tokens) * d].to_vec();
            add_squares(&mut sums[0], self.steps.attention_input(layer, &x));
            self.steps.attended(index, layer, &x, &mut attended);
            add_squares(&mut sums[1], &attended);
            self.steps.add_attention(layer, &attended, &mut x);
            add_squares(&mut sums[2], self.steps.ffn_input(layer, &x));
            add_squares(&mut sums[3], self.steps.down_input(layer, &x));
        }
        let [input, attended, ffn, down] = sums;
        Ok([input.clone(), input.clone(), input, attended, ffn.clone(), ffn, down])
    }

    /// Floats in so many sequences, or in all where there are fewer.
    pub(super) fn floats(&self, sequences: usize) -> usize {
        self.was.len().min(sequences * self.tokens * self.config.d_model)
    }
}

fn add_squares(sums: &mut [f32], x: &[f32]) {
    for row in x.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
    }
}
