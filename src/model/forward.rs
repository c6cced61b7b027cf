//! The forward pass: tokens in, logits out, keys and values into the cache.
//!
//! A chunk of `m` tokens goes through the layers together, or chunks of several sequences, which meet in every
//! matrix and part for attention. Every row is computed by the same operations in the same order whatever goes with
//! it, so a prompt in one chunk, in many, token by token or beside others gives the same bits. Five joins a layer:
//! q/k/v, attention, its output, gate/up, down; more sequences have an attention each. What a family of models does
//! otherwise is a value or an option of [`Config`] or of [`super::weights::Layer`], not a pass of its own.
#![forbid(unsafe_code)]

use super::config::{Activation, Config};
use super::rope::RopeTable;
use super::weights::{Matrix, Needs, Weights};
use crate::error::Result;
use crate::kernel::scores::{BLOCK, Scores};
use crate::kernel::{Activations, Epilogue, Input, Kernels, MatmulJob};
use crate::kv::attend::{AttendScratch, Keys, attend};
use crate::kv::blocks::BlockTable;
use crate::kv::sight::{Rows, Sight, Streaming};
use crate::kv::store::KvStore;
use crate::memory::{Aligned, Memory};
use crate::quant::format::unpack_row;
use crate::threads::Pool;

/// Tokens in a pass from which on its buffers are worth large pages.
const MANY: usize = 32;

/// The buffers of a forward pass, allocated once for the largest chunk.
pub struct Scratch {
    most: usize,
    memory: Memory,
    x: Aligned<f32>,
    norm: Aligned<f32>,
    /// What a norm that follows a matrix reads; empty where the model has none.
    raw: Aligned<f32>,
    q: Aligned<f32>,
    k: Aligned<f32>,
    v: Aligned<f32>,
    attended: Aligned<f32>,
    gate: Aligned<f32>,
    up: Aligned<f32>,
    inputs: Inputs,
    attend: AttendScratch,
    rope: RopeTable,
    windowed_rope: Option<RopeTable>,
    stream: Option<Stream>,
    logits: Aligned<f32>,
    /// The largest logit of every block; empty where the model bends its logits afterwards.
    maxima: Aligned<f32>,
}

/// Activations as matrices want them.
struct Inputs {
    /// Quantised, for each group size that the weights use.
    quantised: Vec<(usize, Activations)>,
    /// In the order of columns that a matrix has; empty when none has its own.
    ordered: Aligned<f32>,
}

/// What an endless sequence needs besides: queries as if they stood at the end of the window, to look at
/// the sinks with.
struct Stream {
    streaming: Streaming,
    rope: RopeTable,
    q: Aligned<f32>,
}

/// Which rows of a chunk get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None: the chunk only fills the cache.
    None,
    /// The last row of a sequence.
    Last,
    /// Every row.
    All,
}

/// The tokens of one sequence in a pass, at the positions after those of `table`, for which room has been
/// reserved.
#[derive(Clone, Copy)]
pub struct Chunk<'a> {
    /// At least one.
    pub tokens: &'a [u32],
    /// As [`Rows::parents`].
    pub parents: Option<&'a [u32]>,
    /// The sequence so far.
    pub table: &'a BlockTable,
}

impl<'a> Chunk<'a> {
    fn rows(&self) -> Rows<'a> {
        Rows { first: self.table.len(), parents: self.parents }
    }

    fn positions(self) -> impl Iterator<Item = usize> {
        (0..self.tokens.len()).map(move |row| self.rows().position(row))
    }
}

/// What a forward pass works with beside its own buffers.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    /// The model's shape.
    pub config: &'a Config,
    /// Its weights.
    pub weights: &'a Weights,
    /// The chosen kernels.
    pub kernels: &'a Kernels,
    /// The threads.
    pub pool: &'a Pool,
    /// Asked on the way; nothing to ask where every weight is there and nobody can cancel.
    pub gate: Option<&'a dyn Gate>,
}

/// Asked before each step of a layer.
pub trait Gate {
    /// Waits until the weights of `layer` are there. An error ends the pass.
    ///
    /// # Errors
    /// Whatever is to end the pass, such as [`crate::Error::Cancelled`].
    fn pass(&self, layer: usize) -> Result<()>;
}

impl Scratch {
    /// Buffers for chunks of at most `most` tokens, with room for the logits of `logit_rows` of them, of
    /// sequences that may come to `context` tokens: some models rotate the long ones otherwise.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(
        config: &Config,
        needs: &Needs,
        (most, context): (usize, usize),
        logit_rows: usize,
    ) -> Result<Self> {
        let memory = Memory::side_by_side();
        let entered = memory.enter();
        let floats = |width: usize| Aligned::zeroed("activations", most * width);
        let raw = [(config.qk_norm, config.q_dim()), (config.post_norms, config.d_model)];
        let raw = raw.into_iter().filter_map(|(used, width)| used.then_some(width)).max();
        let windowed = config.windowed_rope.as_ref();
        let widest = config.d_model.max(config.d_ff).max(config.q_dim());
        let blocks = if config.logit_softcap > 0.0 { 0 } else { needs.vocab.div_ceil(BLOCK) };
        let quantised: Result<Vec<_>> = (needs.groups.iter())
            .map(|group| Ok((*group, Activations::new(most, widest)?)))
            .collect();
        let made = Self {
            most,
            memory: memory.clone(),
            x: floats(config.d_model)?,
            norm: floats(config.d_model)?,
            raw: floats(raw.unwrap_or(0))?,
            q: floats(config.q_dim())?,
            k: floats(config.kv_dim())?,
            v: floats(config.kv_dim())?,
            attended: floats(config.q_dim())?,
            gate: floats(config.d_ff)?,
            up: floats(config.d_ff)?,
            inputs: Inputs {
                quantised: quantised?,
                ordered: floats(if needs.has_orders { widest } else { 0 })?,
            },
            attend: AttendScratch::new(most, config.n_heads, config.kv_shape())?,
            rope: RopeTable::new(&config.rope, most, context)?,
            windowed_rope: windowed.map(|rope| RopeTable::new(rope, most, context)).transpose()?,
            stream: None,
            logits: Aligned::zeroed("logits", logit_rows * needs.vocab)?,
            maxima: Aligned::zeroed("the largest logits", logit_rows * blocks)?,
        };
        drop(entered);
        Ok(made)
    }

    /// Most tokens in a chunk.
    #[must_use]
    pub fn most(&self) -> usize {
        self.most
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let floats = [
            &self.x,
            &self.norm,
            &self.raw,
            &self.q,
            &self.k,
            &self.v,
            &self.attended,
            &self.gate,
            &self.up,
            &self.logits,
            &self.maxima,
            &self.inputs.ordered,
        ];
        floats.into_iter().map(Aligned::bytes).sum::<usize>()
            + self.inputs.quantised.iter().map(|(_, x)| x.bytes()).sum::<usize>()
            + self.attend.bytes()
            + self.rope.bytes()
            + self.windowed_rope.as_ref().map_or(0, RopeTable::bytes)
            + self.stream.as_ref().map_or(0, |stream| stream.rope.bytes() + stream.q.bytes())
    }

    /// Lets every row look at the sinks and the window of `streaming` alone from now on, or at all that its
    /// layers look at with `None`. `context` is that of [`Scratch::new`].
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a model whose layers have windows of their own,
    /// [`crate::Error::OutOfMemory`].
    pub fn stream(
        &mut self,
        config: &Config,
        context: usize,
        streaming: Option<Streaming>,
    ) -> Result<()> {
        if self.stream.as_ref().map(|stream| stream.streaming) == streaming {
            return Ok(());
        }
        let Some(streaming) = streaming else {
            self.stream = None;
            return Ok(());
        };
        if config.layers.iter().any(|layer| layer.window.is_some()) {
            let text = "an endless sequence on a model whose layers have windows";
            return Err(crate::Error::Unsupported(text.into()));
        }
        self.stream = Some(Stream {
            streaming,
            rope: RopeTable::new(&config.rope, self.most, context)?,
            q: Aligned::zeroed("queries for sinks", self.most * config.q_dim())?,
        });
        Ok(())
    }

    /// Runs `tokens` at the positions after those of `table`, for which room has been reserved, and
    /// returns the logits asked for, one row of the vocabulary's length after the other. The caller
    /// commits the tokens to the table; without that, a pass has changed nothing that counts.
    ///
    /// # Errors
    /// What the gate of `parts` says.
    ///
    /// # Panics
    /// When the chunk is longer than the buffers, a token is outside the vocabulary, or the room was
    /// not reserved: bugs of the caller.
    pub fn forward(
        &mut self,
        parts: Parts<'_>,
        tokens: &[u32],
        store: &mut KvStore,
        table: &BlockTable,
        want: Logits,
    ) -> Result<Scores<'_>> {
        self.run(parts, &[Chunk { tokens, parents: None, table }], store, want)
    }

    /// [`Scratch::forward`] for several sequences of one cache, each with the bits that it has alone: the logits
    /// after the last token of each. The weights are read once for all of them.
    ///
    /// # Errors
    /// As [`Scratch::forward`].
    ///
    /// # Panics
    /// As [`Scratch::forward`], and when there are more sequences than rows of logits.
    pub fn forward_batch(
        &mut self,
        parts: Parts<'_>,
        chunks: &[Chunk<'_>],
        store: &mut KvStore,
    ) -> Result<Scores<'_>> {
        self.run(parts, chunks, store, Logits::Last)
    }

    /// [`Scratch::forward`] for a tree of tokens: the first is the root, and token `i + 1` follows token
    /// `parents[i]`, at most `i`. A row has the bits that its path has in a chain. The caller keeps one
    /// path ([`KvStore::keep_path`]).
    ///
    /// # Errors
    /// As [`Scratch::forward`].
    ///
    /// # Panics
    /// As [`Scratch::forward`], when a parent comes after its child, and where
    /// [`KvStore::takes_trees`] says no.
    pub fn forward_tree(
        &mut self,
        parts: Parts<'_>,
        (tokens, parents): (&[u32], &[u32]),
        store: &mut KvStore,
        table: &BlockTable,
    ) -> Result<Scores<'_>> {
        self.run(parts, &[Chunk { tokens, parents: Some(parents), table }], store, Logits::All)
    }

    fn run(
        &mut self,
        parts: Parts<'_>,
        chunks: &[Chunk<'_>],
        store: &mut KvStore,
        want: Logits,
    ) -> Result<Scores<'_>> {
        let Parts { config, weights, kernels, pool, gate: door } = parts;
        let pass = |layer| door.map_or(Ok(()), |door| door.pass(layer));
        let m = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        assert!(m <= self.most, "a chunk of {m} tokens");
        if m >= MANY {
            self.memory.ask_for_large_pages();
        }
        let (d, q_dim, kv_dim) = (config.d_model, config.q_dim(), config.kv_dim());
        let x = &mut self.x[..m * d];
        let norm = &mut self.norm[..m * d];
        let (q, k) = (&mut self.q[..m * q_dim], &mut self.k[..m * kv_dim]);
        let (v, attended) = (&mut self.v[..m * kv_dim], &mut self.attended[..m * q_dim]);
        let (gate, up) = (&mut self.gate[..m * config.d_ff], &mut self.up[..m * config.d_ff]);
        let inputs = &mut self.inputs;

        let embedding = weights.embedding.packed();
        let tokens = chunks.iter().flat_map(|chunk| chunk.tokens);
        for (row, token) in x.chunks_exact_mut(d).zip(tokens) {
            unpack_row(&embedding, *token as usize, row);
        }
        if config.embedding_scale != 1.0 {
            x.iter_mut().for_each(|x| *x *= config.embedding_scale);
        }
        let positions = || chunks.iter().flat_map(|chunk| chunk.positions());
        self.rope.fill(positions());
        if let Some(rope) = &mut self.windowed_rope {
            rope.fill(positions());
        }
        if let Some(stream) = &mut self.stream {
            let Streaming { sinks, window } = stream.streaming;
            stream.rope.fill((0..m).map(|_| sinks + window - 1));
        }
        let raw = &mut self.raw;
        let mut renorm = |x: &mut [f32], weight: &[f32]| {
            let raw = &mut raw[..x.len()];
            raw.copy_from_slice(x);
            kernels.rmsnorm(pool, raw, weight, config.norm_eps, x);
        };
        for (index, (layer, shape)) in weights.layers.iter().zip(&config.layers).enumerate() {
            pass(index)?;
            kernels.rmsnorm(pool, x, &layer.attn_norm, config.norm_eps, norm);
            let targets = [(&layer.q, &mut *q), (&layer.k, &mut *k), (&layer.v, &mut *v)];
            inputs.multiply(kernels, pool, norm, targets);
            if let Some([q_bias, k_bias, v_bias]) = &layer.qkv_bias {
                add_to_rows(q, q_bias);
                add_to_rows(k, k_bias);
                add_to_rows(v, v_bias);
            }
            if let Some([q_norm, k_norm]) = &layer.qk_norm {
                renorm(q, q_norm);
                renorm(k, k_norm);
            }
            if let Some(stream) = &mut self.stream {
                stream.q[..m * q_dim].copy_from_slice(q);
                if shape.rotates {
                    stream.rope.rotate(pool, config.head_dim, q_dim, &mut stream.q[..m * q_dim]);
                }
            }
            if shape.rotates {
                let windowed = self.windowed_rope.as_ref().filter(|_| shape.window.is_some());
                let rope = windowed.unwrap_or(&self.rope);
                rope.rotate(pool, config.head_dim, q_dim, q);
                rope.rotate(pool, config.head_dim, kv_dim, k);
            }
            let mut rows = k.chunks_exact(kv_dim).zip(v.chunks_exact(kv_dim));
            for Chunk { tokens, table, .. } in chunks {
                for (row, (key, value)) in rows.by_ref().take(tokens.len()).enumerate() {
                    store.write(table, index, table.len() + row, key, value);
                }
            }
            pass(index)?;
            let mut end = 0;
            for chunk in chunks {
                let rows = end..end + chunk.tokens.len() * q_dim;
                end = rows.end;
                let keys = Keys { store, table: chunk.table, layer: index };
                let sight = match &self.stream {
                    None => config.sight(index),
                    Some(Stream { streaming: Streaming { sinks, window }, q, .. }) => Sight {
                        sinks: *sinks,
                        window: *window,
                        sink_q: Some(&q[rows.clone()]),
                        ..config.sight(index)
                    },
                };
                let rows = (&q[rows.clone()], &mut attended[rows]);
                attend(kernels, pool, keys, chunk.rows(), &sight, &mut self.attend, rows);
            }
            inputs.multiply(kernels, pool, attended, [(&layer.o, &mut *norm)]);
            if let Some([after_attention, _]) = &layer.post_norms {
                renorm(norm, after_attention);
            }
            add(x, norm);

            pass(index)?;
            kernels.rmsnorm(pool, x, &layer.ffn_norm, config.norm_eps, norm);
            let targets = [(&layer.gate, &mut *gate), (&layer.up, &mut *up)];
            inputs.multiply(kernels, pool, norm, targets);
            pass(index)?;
            match config.activation {
                Activation::Silu => kernels.swiglu(pool, gate, up),
                Activation::Gelu => kernels.geglu(pool, gate, up),
            }
            inputs.multiply(kernels, pool, gate, [(&layer.down, &mut *norm)]);
            if let Some([_, after_ffn]) = &layer.post_norms {
                renorm(norm, after_ffn);
            }
            add(x, norm);
        }

        pass(config.n_layers)?;
        let rows = match want {
            Logits::None => return Ok(Scores::from(&[][..])),
            Logits::Last => {
                let mut end = 0;
                for (row, chunk) in chunks.iter().enumerate() {
                    end += chunk.tokens.len();
                    x.copy_within((end - 1) * d..end * d, row * d);
                }
                chunks.len()
            }
            Logits::All => m,
        };
        let (x, norm) = (&x[..rows * d], &mut norm[..rows * d]);
        let logits = &mut self.logits[..rows * weights.vocab()];
        kernels.rmsnorm(pool, x, &weights.output_norm, config.norm_eps, norm);
        if config.logit_softcap > 0.0 {
            inputs.multiply(kernels, pool, norm, [(weights.head(), &mut *logits)]);
            kernels.softcap(pool, logits, config.logit_softcap);
            return Ok(Scores::from(&*logits));
        }
        let maxima = &mut self.maxima[..rows * weights.vocab().div_ceil(BLOCK)];
        let [head] = inputs.jobs(kernels, pool, norm, [(weights.head(), &mut *logits)]);
        kernels.score(pool, head, maxima);
        Ok(Scores { logits, maxima: Some(maxima) })
    }
}

fn add_to_rows(rows: &mut [f32], y: &[f32]) {
    rows.chunks_exact_mut(y.len()).for_each(|row| add(row, y));
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

impl Inputs {
    /// `y = x * w^T` for every pair. One join, and the activations are quantised once for each group size
    /// among the weights; matrices whose orders of columns differ take a join each.
    fn multiply<const N: usize>(
        &mut self,
        kernels: &Kernels,
        pool: &Pool,
        x: &[f32],
        targets: [(&Matrix, &mut [f32]); N],
    ) {
        let order = targets[0].0.order();
        if targets.iter().all(|(matrix, _)| matrix.order() == order) {
            kernels.matmul(pool, &mut self.jobs(kernels, pool, x, targets));
        } else {
            for target in targets {
                kernels.matmul(pool, &mut self.jobs(kernels, pool, x, [target]));
            }
        }
    }

    /// The matmuls of [`Inputs::multiply`] for matrices of one order of columns, their activations prepared.
    fn jobs<'a, const N: usize>(
        &'a mut self,
        kernels: &Kernels,
        pool: &Pool,
        x: &'a [f32],
        targets: [(&'a Matrix, &'a mut [f32]); N],
    ) -> [MatmulJob<'a>; N] {
        let (order, k) = (targets[0].0.order(), targets[0].0.layout().k());
        let x = match order {
            None => x,
            Some(order) => {
                let ordered = &mut self.ordered[..x.len()];
                for (ordered, x) in ordered.chunks_exact_mut(k).zip(x.chunks_exact(k)) {
                    for (to, from) in ordered.iter_mut().zip(order.iter()) {
                        *to = x[*from as usize];
                    }
                }
                ordered
            }
        };
        for (group, activations) in &mut self.quantised {
            let wants = |matrix: &Matrix| {
                let layout = matrix.layout();
                layout.format().is_quantised() && layout.group() == *group
            };
            if targets.iter().any(|(matrix, _)| wants(matrix)) {
                kernels.quantize(pool, x, k, *group, activations);
            }
        }
        targets.map(|(matrix, y)| {
            let layout = matrix.layout();
            let quantised = self.quantised.iter().find(|(group, _)| *group == layout.group());
            let input = match quantised {
                Some((_, activations)) if layout.format().is_quantised() => {
                    Input::Quantised(activations)
                }
                _ => Input::Float(x),
            };
            MatmulJob { w: matrix.packed(), x: input, y, epilogue: Epilogue::NONE }
        })
    }
}
