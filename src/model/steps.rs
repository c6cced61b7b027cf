//! One layer over whole sequences in steps, with the inputs of its matrices between them: what calibration
//! looks at, and the same bits as the forward pass.
#![forbid(unsafe_code)]

use super::config::{Activation, Config};
use super::rope::RopeTable;
use super::weights::{Layer, Matrix};
use crate::error::Result;
use crate::kernel::{Activations, Epilogue, Input, KvFormat, MatmulJob};
use crate::kv::BLOCK_TOKENS;
use crate::kv::attend::{AttendScratch, Keys, attend};
use crate::kv::blocks::BlockTable;
use crate::kv::sight::Rows;
use crate::kv::store::{KvConfig, KvShape, KvStore};
use crate::memory::Aligned;
use crate::quant::dense::Machine;

/// Buffers for sequences of one length.
pub struct Steps<'a> {
    config: &'a Config,
    machine: Machine<'a>,
    norm: Aligned<f32>,
    raw: Aligned<f32>,
    q: Aligned<f32>,
    k: Aligned<f32>,
    v: Aligned<f32>,
    gate: Aligned<f32>,
    up: Aligned<f32>,
    quantised: Activations,
    attend: AttendScratch,
    rope: RopeTable,
    windowed_rope: Option<RopeTable>,
    store: KvStore,
    table: BlockTable,
}

impl<'a> Steps<'a> {
    /// Room for sequences of `tokens` tokens.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(machine: Machine<'a>, config: &'a Config, tokens: usize) -> Result<Self> {
        let floats = |width: usize| Aligned::zeroed("activations", tokens * width);
        let shape = KvShape { n_layers: 1, ..config.kv_shape() };
        let budget = (tokens + 2 * BLOCK_TOKENS) * shape.token_bytes(KvFormat::F32);
        let mut store = KvStore::with(&KvConfig {
            shape,
            format: KvFormat::F32,
            block_tokens: BLOCK_TOKENS,
            budget,
            fingerprint: 0,
        })?;
        let mut table = BlockTable::default();
        store.reserve(&mut table, tokens)?;
        let mut rope = RopeTable::new(&config.rope, tokens, tokens)?;
        rope.fill(0..tokens);
        let windowed = config.windowed_rope.as_ref();
        let mut windowed_rope =
            windowed.map(|rope| RopeTable::new(rope, tokens, tokens)).transpose()?;
        if let Some(rope) = &mut windowed_rope {
            rope.fill(0..tokens);
        }
        let widest = config.d_model.max(config.d_ff).max(config.q_dim());
        Ok(Self {
            config,
            machine,
            norm: floats(config.d_model)?,
            raw: floats(config.d_model.max(config.q_dim()))?,
            q: floats(config.q_dim())?,
            k: floats(config.kv_dim())?,
            v: floats(config.kv_dim())?,
            gate: floats(config.d_ff)?,
            up: floats(config.d_ff)?,
            quantised: Activations::new(tokens, widest)?,
            attend: AttendScratch::new(tokens, config.n_heads, shape)?,
            rope,
            windowed_rope,
            store,
            table,
        })
    }

    /// What queries, keys and values are made of.
    pub fn attention_input(&mut self, layer: &Layer, x: &[f32]) -> &[f32] {
        self.normalise(x, &layer.attn_norm);
        &self.norm
    }

    /// What the output of attention is made of, for layer number `index`.
    pub fn attended(&mut self, index: usize, layer: &Layer, x: &[f32], out: &mut [f32]) {
        let (config, machine) = (self.config, self.machine);
        self.normalise(x, &layer.attn_norm);
        let Self { norm, quantised, q, k, v, raw, .. } = self;
        for (matrix, y) in [(&layer.q, &mut *q), (&layer.k, &mut *k), (&layer.v, &mut *v)] {
            multiply(machine, quantised, norm, matrix, y);
        }
        if let Some([q_bias, k_bias, v_bias]) = &layer.qkv_bias {
            for (rows, bias) in [(&mut *q, q_bias), (&mut *k, k_bias), (&mut *v, v_bias)] {
                rows.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
            }
        }
        if let Some(norms) = &layer.qk_norm {
            for (rows, weight) in [&mut *q, &mut *k].into_iter().zip(norms) {
                renorm(config, machine, raw, rows, weight);
            }
        }
        let shape = &config.layers[index];
        if shape.rotates {
            let windowed = self.windowed_rope.as_ref().filter(|_| shape.window.is_some());
            let rope = windowed.unwrap_or(&self.rope);
            rope.rotate(machine.pool, config.head_dim, config.q_dim(), q);
            rope.rotate(machine.pool, config.head_dim, config.kv_dim(), k);
        }
        let rows = k.chunks_exact(config.kv_dim()).zip(v.chunks_exact(config.kv_dim()));
        for (row, (key, value)) in rows.enumerate() {
            self.store.write(&self.table, 0, row, key, value);
        }
        let keys = Keys { store: &self.store, table: &self.table, layer: 0 };
        let (sight, rows) = (config.sight(index), Rows::chain(0));
        let Machine { kernels, pool } = machine;
        attend(kernels, pool, keys, rows, &sight, &mut self.attend, (q, out));
    }

    /// Adds the output of attention to the residual stream.
    pub fn add_attention(&mut self, layer: &Layer, attended: &[f32], x: &mut [f32]) {
        multiply(self.machine, &mut self.quantised, attended, &layer.o, &mut self.norm);
        self.join(layer.post_norms.as_ref().map(|norms| &norms[0]), x);
    }

    /// What the gate and its factor are made of.
    pub fn ffn_input(&mut self, layer: &Layer, x: &[f32]) -> &[f32] {
        self.normalise(x, &layer.ffn_norm);
        &self.norm
    }

    /// What the output of the feed-forward network is made of.
    pub fn down_input(&mut self, layer: &Layer, x: &[f32]) -> &[f32] {
        self.normalise(x, &layer.ffn_norm);
        let Self { norm, quantised, gate, up, .. } = self;
        multiply(self.machine, quantised, norm, &layer.gate, gate);
        multiply(self.machine, quantised, norm, &layer.up, up);
        let Machine { kernels, pool } = self.machine;
        match self.config.activation {
            Activation::Silu => kernels.swiglu(pool, gate, up),
            Activation::Gelu => kernels.geglu(pool, gate, up),
        }
        &self.gate
    }

    /// Adds the output of the feed-forward network to the residual stream.
    pub fn add_ffn(&mut self, layer: &Layer, x: &mut [f32]) {
        self.down_input(layer, x);
        multiply(self.machine, &mut self.quantised, &self.gate, &layer.down, &mut self.norm);
        self.join(layer.post_norms.as_ref().map(|norms| &norms[1]), x);
    }

    fn normalise(&mut self, x: &[f32], weight: &[f32]) {
        let Machine { kernels, pool } = self.machine;
        kernels.rmsnorm(pool, x, weight, self.config.norm_eps, &mut self.norm);
    }

    /// Adds what `norm` holds to the residual stream, normalised where the model does that.
    fn join(&mut self, post_norm: Option<&Vec<f32>>, x: &mut [f32]) {
        if let Some(weight) = post_norm {
            renorm(self.config, self.machine, &mut self.raw, &mut self.norm, weight);
        }
        add(x, &self.norm);
    }
}

fn renorm(config: &Config, machine: Machine<'_>, raw: &mut [f32], x: &mut [f32], weight: &[f32]) {
    let raw = &mut raw[..x.len()];
    raw.copy_from_slice(x);
    machine.kernels.rmsnorm(machine.pool, raw, weight, config.norm_eps, x);
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn multiply(
    machine: Machine<'_>,
    quantised: &mut Activations,
    x: &[f32],
    matrix: &Matrix,
    y: &mut [f32],
) {
    let (Machine { kernels, pool }, layout) = (machine, matrix.layout());
    let x = if layout.format().is_quantised() {
        kernels.quantize(pool, x, layout.k(), layout.group(), quantised);
        Input::Quantised(quantised)
    } else {
        Input::Float(x)
    };
    let job = MatmulJob { w: matrix.packed(), x, y, epilogue: Epilogue::NONE };
    kernels.matmul(pool, &mut [job]);
}
