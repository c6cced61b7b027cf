//! One layer: its floats, and its way into packed matrices in the order in which their inputs come about.
#![forbid(unsafe_code)]

use super::MatrixReport;
use super::method::{Chosen, Linear, Method, Outcome, Scaling, choose};
use super::rotate::Rotation;
use super::streams::{Both, Streams};
use crate::error::{Error, Result};
use crate::file::checkpoint::Checkpoint;
use crate::kernel::{Format, Layout};
use crate::memory::Aligned;
use crate::model::config::Config;
use crate::model::weights::{Layer, Matrix};
use crate::quant::dense::Machine;
use crate::quant::grid::{Row, pack_rows};
use crate::quant::pack::{Rows, pack_panel};
use std::sync::Mutex;

/// The matrices of a layer, in the order of a pass.
pub(super) const LINEARS: [&str; 7] =
    ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// A tensor of the file.
pub(super) enum Ready {
    Vector(Vec<f32>),
    Matrix(Matrix),
}

/// The model's floats, rotated if that is asked for.
pub(super) struct Floats<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) config: &'a Config,
    pub(super) rotation: Option<Rotation>,
}

/// A layer in floats: as a pass takes it, and the rows of its matrices in the order of [`LINEARS`].
pub(super) struct Original {
    pub(super) layer: Layer,
    pub(super) floats: [Vec<f32>; 7],
}

impl Floats<'_> {
    fn stored(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = &self.checkpoint.tensors[name];
        let mut rows = Vec::new();
        if tensor.is_vector() {
            rows = tensor.vector().map_err(|why| why.in_tensor(&self.checkpoint.name, name))?;
        } else {
            tensor.rows(0, tensor.n(), &mut rows)?;
        }
        Ok(rows)
    }

    /// A vector: the norms of a rotated model are in its matrices.
    pub(super) fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let mut vector = self.stored(name)?;
        if self.rotation.is_some() && is_outer_norm(name) {
            vector.fill(1.0);
        }
        if let (Some(rotation), true) = (&self.rotation, name.ends_with("attn_v.bias")) {
            rotation.heads(&mut vector);
        }
        Ok(vector)
    }

    /// Rows of the embedding or of the output head.
    pub(super) fn table_rows(&self, name: &str, first: usize, count: usize) -> Result<Vec<f32>> {
        let tied = !self.checkpoint.tensors.contains_key(name);
        let stored = if tied { "token_embd.weight" } else { name };
        let mut rows = Vec::new();
        self.checkpoint.tensors[stored].rows(first, count, &mut rows)?;
        if let Some(rotation) = &self.rotation {
            if name == "output.weight" {
                multiply_columns(&mut rows, &self.stored("output_norm.weight")?);
            }
            rows.chunks_exact_mut(self.config.d_model).for_each(|row| rotation.stream(row));
        }
        Ok(rows)
    }

    /// A layer.
    pub(super) fn layer(&self, machine: Machine<'_>, index: usize) -> Result<Original> {
        let c = self.config;
        let name = |part: &str| format!("blk.{index}.{part}");
        let mut floats: [Vec<f32>; 7] = Default::default();
        for (floats, part) in floats.iter_mut().zip(LINEARS) {
            *floats = self.stored(&name(&format!("{part}.weight")))?;
            if let Some(rotation) = &self.rotation {
                let norm = match part {
                    "attn_q" | "attn_k" | "attn_v" => Some("attn_norm.weight"),
                    "ffn_gate" | "ffn_up" => Some("ffn_norm.weight"),
                    _ => None,
                };
                match norm {
                    Some(norm) => {
                        multiply_columns(floats, &self.stored(&name(norm))?);
                        floats.chunks_exact_mut(c.d_model).for_each(|row| rotation.stream(row));
                    }
                    None => rotation.stream_columns(floats, c.d_model),
                }
                match part {
                    "attn_v" => rotation.head_columns(floats, c.kv_dim()),
                    "attn_output" => {
                        floats.chunks_exact_mut(c.q_dim()).for_each(|row| rotation.heads(row));
                    }
                    _ => {}
                }
            }
        }
        let widths = [c.d_model, c.d_model, c.d_model, c.q_dim(), c.d_model, c.d_model, c.d_ff];
        let dense = |at: usize| pack_floats(machine, &floats[at], widths[at]);
        let vector = |part: &str| self.vector(&name(part));
        let biases = ["attn_q.bias", "attn_k.bias", "attn_v.bias"];
        let post_norms = ["post_attention_norm.weight", "post_ffw_norm.weight"];
        let layer = Layer {
            attn_norm: vector("attn_norm.weight")?,
            q: dense(0)?,
            k: dense(1)?,
            v: dense(2)?,
            qkv_bias: match c.qkv_bias {
                true => Some([vector(biases[0])?, vector(biases[1])?, vector(biases[2])?]),
                false => None,
            },
            qk_norm: match c.qk_norm {
                true => Some([vector("attn_q_norm.weight")?, vector("attn_k_norm.weight")?]),
                false => None,
            },
            o: dense(3)?,
            post_norms: match c.post_norms {
                true => Some([vector(post_norms[0])?, vector(post_norms[1])?]),
                false => None,
            },
            ffn_norm: vector("ffn_norm.weight")?,
            gate: dense(4)?,
            up: dense(5)?,
            down: dense(6)?,
        };
        Ok(Original { layer, floats })
    }
}

/// Whether a norm reads the residual stream: then what follows it can take up its weights.
fn is_outer_norm(name: &str) -> bool {
    name == "output_norm.weight"
        || name.ends_with(".attn_norm.weight")
        || name.ends_with(".ffn_norm.weight")
}

fn multiply_columns(rows: &mut [f32], factors: &[f32]) {
    for row in rows.chunks_exact_mut(factors.len()) {
        row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
    }
}

/// A matrix of floats as the kernels multiply it.
pub(super) fn pack_floats(machine: Machine<'_>, x: &[f32], k: usize) -> Result<Matrix> {
    let layout = Layout::new(Format::F32, 0, x.len() / k, k)?;
    packed(machine, layout, |index, panel| {
        let rows = layout.panel_rows();
        let x = x.chunks(rows * k).nth(index).unwrap_or_default();
        pack_panel(&layout, x.len() / k, Rows::F32(x), panel)
    })
}

/// A matrix of codes.
pub(super) fn pack_codes(machine: Machine<'_>, layout: Layout, rows: &[Row]) -> Result<Matrix> {
    packed(machine, layout, |index, panel| pack_rows(&layout, rows, index, panel))
}

fn packed(
    machine: Machine<'_>,
    layout: Layout,
    pack: impl Fn(usize, &mut [u8]) -> Result<()> + Sync,
) -> Result<Matrix> {
    let mut bytes = Aligned::zeroed("packed weights", layout.bytes())?;
    let failed = Mutex::new(Ok(()));
    machine.pool.chunks_mut(&mut bytes, layout.panel_bytes(), &|index, panel| {
        if let (Err(error), Ok(mut failed)) = (pack(index, panel), failed.lock()) {
            *failed = Err(error);
        }
    });
    failed.into_inner().map_err(|_| Error::Internal("packing panicked".into()))??;
    Matrix::owned(layout, bytes)
}

/// The same layer; matrices are shared.
pub(super) fn copy(layer: &Layer) -> Layer {
    Layer {
        attn_norm: layer.attn_norm.clone(),
        q: layer.q.clone(),
        k: layer.k.clone(),
        v: layer.v.clone(),
        qkv_bias: layer.qkv_bias.clone(),
        qk_norm: layer.qk_norm.clone(),
        o: layer.o.clone(),
        post_norms: layer.post_norms.clone(),
        ffn_norm: layer.ffn_norm.clone(),
        gate: layer.gate.clone(),
        up: layer.up.clone(),
        down: layer.down.clone(),
    }
}

/// Where a tensor is kept in a layer.
enum Slot<'a> {
    Vector(&'a mut Vec<f32>),
    Matrix(&'a mut Matrix),
}

fn slot<'a>(layer: &'a mut Layer, stem: &str, name: &str) -> Option<Slot<'a>> {
    let part = name.strip_prefix(stem)?;
    Some(match part {
        "attn_norm.weight" => Slot::Vector(&mut layer.attn_norm),
        "ffn_norm.weight" => Slot::Vector(&mut layer.ffn_norm),
        "attn_q.bias" => Slot::Vector(&mut layer.qkv_bias.as_mut()?[0]),
        "attn_k.bias" => Slot::Vector(&mut layer.qkv_bias.as_mut()?[1]),
        "attn_v.bias" => Slot::Vector(&mut layer.qkv_bias.as_mut()?[2]),
        "attn_q_norm.weight" => Slot::Vector(&mut layer.qk_norm.as_mut()?[0]),
        "attn_k_norm.weight" => Slot::Vector(&mut layer.qk_norm.as_mut()?[1]),
        "post_attention_norm.weight" => Slot::Vector(&mut layer.post_norms.as_mut()?[0]),
        "post_ffw_norm.weight" => Slot::Vector(&mut layer.post_norms.as_mut()?[1]),
        _ => Slot::Matrix(matrix(layer, part.strip_suffix(".weight")?)?),
    })
}

/// One of [`LINEARS`].
pub(super) fn matrix<'a>(layer: &'a mut Layer, name: &str) -> Option<&'a mut Matrix> {
    Some(match name {
        "attn_q" => &mut layer.q,
        "attn_k" => &mut layer.k,
        "attn_v" => &mut layer.v,
        "attn_output" => &mut layer.o,
        "ffn_gate" => &mut layer.gate,
        "ffn_up" => &mut layer.up,
        "ffn_down" => &mut layer.down,
        _ => return None,
    })
}

/// Puts a tensor of the file into its place.
pub(super) fn set(layer: &mut Layer, stem: &str, name: &str, ready: Ready) -> Result<()> {
    match (slot(layer, stem, name), ready) {
        (Some(Slot::Vector(slot)), Ready::Vector(vector)) => *slot = vector,
        (Some(Slot::Matrix(slot)), Ready::Matrix(matrix)) => *slot = matrix,
        _ => return Err(Error::Internal(format!("{name} has no place in a layer"))),
    }
    Ok(())
}

/// A tensor as the file gets it.
pub(super) fn part(layer: &Layer, stem: &str, name: &str) -> Result<Ready> {
    match slot(&mut copy(layer), stem, name) {
        Some(Slot::Vector(vector)) => Ok(Ready::Vector(std::mem::take(vector))),
        Some(Slot::Matrix(matrix)) => Ok(Ready::Matrix(matrix.clone())),
        None => Err(Error::Internal(format!("{name} has no place in a layer"))),
    }
}

/// A layer to quantise.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) machine: Machine<'a>,
    pub(super) config: &'a Config,
    pub(super) index: usize,
    pub(super) method: Method,
}

impl Job<'_> {
    /// Quantises the layer to `layouts`, and runs the streams through it. First queries, keys and values;
    /// then, on the inputs that those make, the output of attention; then gate and its factor; then what
    /// comes down from them.
    pub(super) fn quantise(
        &self,
        original: &Original,
        layouts: &[Layout; 7],
        mut streams: Option<&mut Streams<'_>>,
    ) -> Result<(Layer, Vec<MatrixReport>)> {
        let Self { machine, config, index, method } = *self;
        let mut is = copy(&original.layer);
        let was = &original.layer;
        let mut reports = Vec::new();
        let linears = |which: std::ops::Range<usize>| -> Vec<Linear<'_>> {
            which
                .map(|at| Linear {
                    w: &original.floats[at],
                    format: layouts[at].format(),
                    group: layouts[at].group(),
                })
                .collect()
        };
        let mut report = |at: usize, chosen: &Chosen| {
            let error = Some(chosen.error / chosen.energy.max(f64::MIN_POSITIVE));
            reports.push(MatrixReport { name: LINEARS[at], layout: layouts[at], error });
        };

        let stats = streams
            .as_deref_mut()
            .map(|streams| streams.attention_stats(Both { index, was, is: &is }, method));
        let k = config.d_model;
        let inputs = linears(0..3);
        let Outcome { scales, matrices } =
            choose(machine, method, &inputs, k, stats.transpose()?.as_ref(), Scaling::Free)?;
        divide(&mut is.attn_norm, scales.as_deref());
        for (at, chosen) in matrices.iter().enumerate() {
            report(at, chosen);
            let packed = pack_codes(machine, layouts[at], &chosen.rows)?;
            *[&mut is.q, &mut is.k, &mut is.v][at] = packed;
        }
        let [_, _, mut v_rows] = take(matrices)?;

        let stats = streams
            .as_deref_mut()
            .map(|streams| streams.output_stats(Both { index, was, is: &is }, method));
        let sharing = config.n_heads / config.n_kv_heads;
        let producers: Vec<u32> = (0..config.q_dim())
            .map(|column| {
                let (head, place) = (column / config.head_dim, column % config.head_dim);
                (head / sharing * config.head_dim + place) as u32
            })
            .collect();
        let (stats, inputs) = (stats.transpose()?, linears(3..4));
        let pinned: Vec<bool> = v_rows.iter().map(is_pinned).collect();
        let scaling = Scaling::PowersOfTwo { producers: &producers, pinned: &pinned };
        let k = config.q_dim();
        let Outcome { scales, matrices } =
            choose(machine, method, &inputs, k, stats.as_ref(), scaling)?;
        if let Some(scales) = &scales {
            divide_rows(&mut v_rows, scales);
            is.v = pack_codes(machine, layouts[2], &v_rows)?;
            if let Some([_, _, bias]) = &mut is.qkv_bias {
                divide(bias, Some(scales));
            }
            if let Some(streams) = streams.as_deref_mut() {
                let column = |producer: &u32| 1.0 / scales[*producer as usize];
                let columns: Vec<f32> = producers.iter().map(column).collect();
                streams.divide_attended(&columns);
            }
        }
        report(3, &matrices[0]);
        is.o = pack_codes(machine, layouts[3], &matrices[0].rows)?;
        if let Some(streams) = streams.as_deref_mut() {
            streams.add_attention(Both { index, was, is: &is });
        }

        let stats = streams
            .as_deref_mut()
            .map(|streams| streams.ffn_stats(Both { index, was, is: &is }, method));
        let k = config.d_model;
        let inputs = linears(4..6);
        let Outcome { scales, matrices } =
            choose(machine, method, &inputs, k, stats.transpose()?.as_ref(), Scaling::Free)?;
        divide(&mut is.ffn_norm, scales.as_deref());
        for (at, chosen) in matrices.iter().enumerate() {
            report(4 + at, chosen);
            let packed = pack_codes(machine, layouts[4 + at], &chosen.rows)?;
            *[&mut is.gate, &mut is.up][at] = packed;
        }
        let [_, mut up_rows] = take(matrices)?;

        let stats = streams
            .as_deref_mut()
            .map(|streams| streams.down_stats(Both { index, was, is: &is }, method));
        let (stats, inputs) = (stats.transpose()?, linears(6..7));
        let producers: Vec<u32> = (0..config.d_ff as u32).collect();
        let pinned: Vec<bool> = up_rows.iter().map(is_pinned).collect();
        let scaling = Scaling::PowersOfTwo { producers: &producers, pinned: &pinned };
        let Outcome { scales, matrices } =
            choose(machine, method, &inputs, config.d_ff, stats.as_ref(), scaling)?;
        if let Some(scales) = &scales {
            divide_rows(&mut up_rows, scales);
            is.up = pack_codes(machine, layouts[5], &up_rows)?;
        }
        report(6, &matrices[0]);
        is.down = pack_codes(machine, layouts[6], &matrices[0].rows)?;
        if let Some(streams) = streams {
            streams.add_ffn(Both { index, was, is: &is });
        }
        Ok((is, reports))
    }
}

/// The rows of each matrix.
fn take<const N: usize>(matrices: Vec<Chosen>) -> Result<[Vec<Row>; N]> {
    let rows: Vec<_> = matrices.into_iter().map(|chosen| chosen.rows).collect();
    rows.try_into().map_err(|_| Error::Internal("a matrix is missing".into()))
}

fn divide(x: &mut [f32], scales: Option<&[f32]>) {
    if let Some(scales) = scales {
        x.iter_mut().zip(scales).for_each(|(x, scale)| *x /= scale);
    }
}

/// The largest power of two that a row may be multiplied or divided by.
pub(super) const MOST: f32 = 16.0;

/// Whether the scales of a row cannot take up every power of two that may come.
fn is_pinned(row: &Row) -> bool {
    !row.divides(MOST) || !row.divides(1.0 / MOST)
}

/// Divides rows by powers of two, exactly.
fn divide_rows(rows: &mut [Row], scales: &[f32]) {
    for (row, by) in rows.iter_mut().zip(scales) {
        row.scales.iter_mut().for_each(|scale| *scale /= by);
    }
}
