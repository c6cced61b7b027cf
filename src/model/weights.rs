//! The weights of a model, by role, wherever their bytes lie.
//!
//! From a packed file a matrix is a range of the mapping; from a checkpoint it is packed once into memory. Names
//! and shapes are checked here against the configuration, and a tensor that nothing would use is an
//! error: a model with parts we do not know would otherwise run and be wrong.
#![forbid(unsafe_code)]

use super::config::Config;
use crate::error::{Error, Result};
use crate::file::checkpoint::Checkpoint;
use crate::file::nybl::{Kind, Nybl};
use crate::file::source::Source;
use crate::file::tensor::Order;
use crate::kernel::{Layout, Packed};
use crate::memory::Aligned;
use crate::threads::Pool;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A packed matrix that keeps its bytes alive.
#[derive(Clone)]
pub struct Matrix {
    layout: Layout,
    bytes: Bytes,
    order: Option<Order>,
}

#[derive(Clone)]
enum Bytes {
    Mapped(Source, Range<usize>),
    Owned(Arc<Aligned<u8>>),
}

impl Matrix {
    fn new(layout: Layout, bytes: Bytes, order: Option<Order>) -> Result<Self> {
        let matrix = Self { layout, bytes, order };
        Packed::new(layout, matrix.bytes())?;
        Ok(matrix)
    }

    /// A matrix in private memory, its columns in the order of the activations.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the bytes are not as many as the layout has.
    pub fn owned(layout: Layout, bytes: Aligned<u8>) -> Result<Self> {
        Self::new(layout, Bytes::Owned(Arc::new(bytes)), None)
    }

    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(source, range) => &source.bytes()[range.clone()],
            Bytes::Owned(bytes) => bytes,
        }
    }

    /// Format and shape.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Which activation each column is multiplied by, where that is not the one at the same place.
    #[must_use]
    pub fn order(&self) -> Option<&Order> {
        self.order.as_ref()
    }

    /// The matrix as kernels take it.
    #[must_use]
    pub fn packed(&self) -> Packed<'_> {
        match Packed::new(self.layout, self.bytes()) {
            Ok(packed) => packed,
            Err(_) => unreachable!("checked when the matrix was made"),
        }
    }

    fn mapped_part(&self) -> Option<(Source, Range<usize>)> {
        match &self.bytes {
            Bytes::Mapped(source, range) => Some((source.clone(), range.clone())),
            Bytes::Owned(_) => None,
        }
    }

    /// Bytes that are private memory rather than part of a mapping.
    #[must_use]
    pub fn owned_bytes(&self) -> usize {
        match &self.bytes {
            Bytes::Mapped(..) => 0,
            Bytes::Owned(bytes) => bytes.len(),
        }
    }
}

/// One transformer block.
pub struct Layer {
    /// RMSNorm before attention.
    pub attn_norm: Vec<f32>,
    /// Queries.
    pub q: Matrix,
    /// Keys.
    pub k: Matrix,
    /// Values.
    pub v: Matrix,
    /// Biases of queries, keys and values.
    pub qkv_bias: Option<[Vec<f32>; 3]>,
    /// RMSNorm of each head of queries and of keys.
    pub qk_norm: Option<[Vec<f32>; 2]>,
    /// Attention output.
    pub o: Matrix,
    /// RMSNorm of the outputs of attention and of the feed-forward network.
    pub post_norms: Option<[Vec<f32>; 2]>,
    /// RMSNorm before the feed-forward network.
    pub ffn_norm: Vec<f32>,
    /// Gate of the feed-forward network.
    pub gate: Matrix,
    /// The factor that the gate multiplies.
    pub up: Matrix,
    /// Back to the residual stream.
    pub down: Matrix,
}

/// All weights.
pub struct Weights {
    /// Token embedding; also the output head when `output` is none.
    pub embedding: Matrix,
    /// The blocks.
    pub layers: Vec<Layer>,
    /// RMSNorm before the output head.
    pub output_norm: Vec<f32>,
    /// The output head when it is not tied to the embedding.
    pub output: Option<Matrix>,
}

impl Weights {
    /// The parts of files that each layer is made of, in the order of a pass; the last entry is what comes
    /// after the layers. An embedding that is only looked up is read row by row and is not among them.
    #[must_use]
    pub fn mapped_parts(&self) -> Vec<Vec<(Source, Range<usize>)>> {
        let parts = |matrices: &[&Matrix]| {
            matrices.iter().filter_map(|matrix| matrix.mapped_part()).collect::<Vec<_>>()
        };
        let layers = self.layers.iter().map(|layer| {
            parts(&[&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down])
        });
        layers.chain([parts(&[self.head()])]).collect()
    }
}

/// What the buffers of a pass depend on besides the configuration: known before any weight is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Group sizes of the quantised matrices, each once.
    pub groups: Vec<usize>,
    /// Whether any matrix has an order of columns of its own.
    pub has_orders: bool,
}

impl Needs {
    /// What matrices of these layouts need.
    #[must_use]
    pub fn new(vocab: usize, layouts: impl Iterator<Item = Layout>, has_orders: bool) -> Self {
        let quantised = layouts.filter(|layout| layout.format().is_quantised());
        let groups: BTreeSet<_> = quantised.map(|layout| layout.group()).collect();
        Self { vocab, groups: groups.into_iter().collect(), has_orders }
    }
}

/// A file that holds tensors by name.
trait Tensors {
    fn file(&self) -> &str;
    fn names(&self) -> Vec<&str>;
    /// Rows and row length, or nothing for a name that is not there.
    fn shape(&self, name: &str) -> Option<(usize, usize)>;
    fn matrix(&self, name: &str, pool: &Pool) -> Result<Matrix>;
    fn vector(&self, name: &str) -> Result<Vec<f32>>;
}

impl Tensors for Nybl {
    fn file(&self) -> &str {
        self.name()
    }

    fn names(&self) -> Vec<&str> {
        // An order is a part of its matrix.
        let own = |name: &str| match name.strip_suffix(".order") {
            Some(stem) => self.tensor(&format!("{stem}.weight")).is_none(),
            None => true,
        };
        let names = self.tensors().iter().map(|tensor| tensor.name.as_str());
        names.filter(|name| own(name)).collect()
    }

    fn shape(&self, name: &str) -> Option<(usize, usize)> {
        self.tensor(name).map(|tensor| match tensor.kind {
            Kind::Vector(len) | Kind::Order(len) => (1, len),
            Kind::Matrix(layout) => (layout.n(), layout.k()),
        })
    }

    fn matrix(&self, name: &str, _: &Pool) -> Result<Matrix> {
        match self.tensor(name).map(|tensor| (tensor.kind, tensor)) {
            Some((Kind::Matrix(layout), tensor)) => {
                let order = self.order(name, layout.k())?;
                let bytes = Bytes::Mapped(self.file_of(tensor).clone(), tensor.range.clone());
                Matrix::new(layout, bytes, order)
            }
            _ => Err(Error::corrupt(self.file(), name, "is not a matrix")),
        }
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        match self.tensor(name) {
            Some(tensor) => Nybl::vector(self, tensor),
            None => Err(Error::corrupt(self.file(), name, "is missing")),
        }
    }
}

impl Tensors for Checkpoint {
    fn file(&self) -> &str {
        &self.name
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<(usize, usize)> {
        self.tensors.get(name).map(|tensor| (tensor.n(), tensor.k()))
    }

    fn matrix(&self, name: &str, pool: &Pool) -> Result<Matrix> {
        let missing = || Error::corrupt(self.file(), name, "is not a matrix");
        let wrong = |error: Error| error.in_tensor(self.file(), name);
        let tensor = self.tensors.get(name).filter(|t| !t.is_vector()).ok_or_else(missing)?;
        let layout = tensor.layout().map_err(wrong)?;
        let mut bytes = Aligned::zeroed("packed weights", layout.bytes())?;
        let failed = Mutex::new(None);
        pool.chunks_mut(&mut bytes, layout.panel_bytes(), &|index, panel| {
            if let Err(error) = tensor.pack(&layout, index, panel)
                && let Ok(mut slot) = failed.lock()
            {
                slot.get_or_insert(error);
            }
        });
        match failed.into_inner() {
            Ok(None) => Matrix::new(layout, Bytes::Owned(Arc::new(bytes)), tensor.order().cloned()),
            Ok(Some(error)) => Err(wrong(error)),
            Err(_) => Err(Error::Internal("packing panicked".into())),
        }
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        match self.tensors.get(name) {
            Some(tensor) => tensor.vector().map_err(|error| error.in_tensor(self.file(), name)),
            None => Err(Error::corrupt(self.file(), name, "is missing")),
        }
    }
}

impl Weights {
    /// Maps the weights of a packed file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming a tensor that is missing or has another shape than the configuration
    /// says; [`Error::Unsupported`] naming tensors that the model has beyond those.
    pub fn from_nybl(file: &Nybl, config: &Config, pool: &Pool) -> Result<Self> {
        load(file, config, pool)
    }

    /// Packs the weights of a checkpoint into memory.
    ///
    /// # Errors
    /// As [`Weights::from_nybl`], and [`Error::OutOfMemory`].
    pub fn from_checkpoint(file: &Checkpoint, config: &Config, pool: &Pool) -> Result<Self> {
        load(file, config, pool)
    }

    /// Whether a checkpoint has exactly the tensors that the configuration asks for, without packing them.
    ///
    /// # Errors
    /// As [`Weights::from_checkpoint`].
    pub fn check(file: &Checkpoint, config: &Config) -> Result<()> {
        check_all(file, config).map(|_| ())
    }

    /// The output head.
    #[must_use]
    pub fn head(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Tokens in the vocabulary.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.embedding.layout().n()
    }

    /// What the buffers of a pass need to know of them.
    #[must_use]
    pub fn needs(&self) -> Needs {
        let has_orders = self.matrices().any(|matrix| matrix.order().is_some());
        Needs::new(self.vocab(), self.matrices().map(Matrix::layout), has_orders)
    }

    /// Every matrix.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let layers = self.layers.iter();
        let layers = layers.flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
        layers.chain([&self.embedding]).chain(&self.output)
    }
}

/// Biases of queries, keys and values.
const QKV_BIAS: [&str; 3] = ["attn_q.bias", "attn_k.bias", "attn_v.bias"];
/// Norms of the heads of queries and keys.
const QK_NORM: [&str; 2] = ["attn_q_norm.weight", "attn_k_norm.weight"];
/// Norms of the outputs of attention and feed-forward network.
const POST_NORMS: [&str; 2] = ["post_attention_norm.weight", "post_ffw_norm.weight"];

/// Compares names and shapes with the configuration; the number of tokens in the vocabulary.
fn check_all(file: &impl Tensors, c: &Config) -> Result<usize> {
    let Some((vocab, _)) = file.shape("token_embd.weight") else {
        return Err(Error::corrupt(file.file(), "token_embd.weight", "is missing"));
    };
    let mut used = BTreeSet::new();
    let mut check = |name: String, n: usize, k: usize| {
        let error = |reason| Err(Error::corrupt(file.file(), &name, reason));
        match file.shape(&name) {
            Some(shape) if shape == (n, k) => {
                used.insert(name);
                Ok(())
            }
            Some((rows, row)) => {
                error(format!("is {rows} x {row} where the metadata asks for {n} x {k}"))
            }
            None => error("is missing".into()),
        }
    };
    check("token_embd.weight".into(), vocab, c.d_model)?;
    if file.shape("output.weight").is_some() {
        check("output.weight".into(), vocab, c.d_model)?;
    }
    check("output_norm.weight".into(), 1, c.d_model)?;
    let (d, q, kv, head) = (c.d_model, c.q_dim(), c.kv_dim(), c.head_dim);
    let mut parts = vec![
        ("attn_norm.weight", 1, d),
        ("attn_q.weight", q, d),
        ("attn_k.weight", kv, d),
        ("attn_v.weight", kv, d),
        ("attn_output.weight", d, q),
        ("ffn_norm.weight", 1, d),
        ("ffn_gate.weight", c.d_ff, d),
        ("ffn_up.weight", c.d_ff, d),
        ("ffn_down.weight", d, c.d_ff),
    ];
    if c.qkv_bias {
        parts.extend(QKV_BIAS.into_iter().zip([q, kv, kv]).map(|(name, width)| (name, 1, width)));
    }
    if c.qk_norm {
        parts.extend(QK_NORM.map(|name| (name, 1, head)));
    }
    if c.post_norms {
        parts.extend(POST_NORMS.map(|name| (name, 1, d)));
    }
    for layer in 0..c.n_layers {
        for (part, n, k) in &parts {
            check(format!("blk.{layer}.{part}"), *n, *k)?;
        }
    }
    if let Some(extra) = file.names().into_iter().find(|name| !used.contains(*name)) {
        return Err(Error::Unsupported(format!(
            "{}: the tensor {extra}, which is no part of the {} models this build knows",
            file.file(),
            c.architecture
        )));
    }
    Ok(vocab)
}

fn load(file: &impl Tensors, config: &Config, pool: &Pool) -> Result<Weights> {
    check_all(file, config)?;
    let matrix = |name: &str| file.matrix(name, pool);
    let layer = |index: usize| {
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        let vector = |part: &str| file.vector(&format!("blk.{index}.{part}"));
        let qkv_bias = config.qkv_bias.then(|| vectors(QKV_BIAS, vector)).transpose()?;
        let qk_norm = config.qk_norm.then(|| vectors(QK_NORM, vector)).transpose()?;
        let post_norms = config.post_norms.then(|| vectors(POST_NORMS, vector)).transpose()?;
        let mut layer = Layer {
            qkv_bias,
            qk_norm,
            post_norms,
            attn_norm: file.vector(&name("attn_norm"))?,
            q: matrix(&name("attn_q"))?,
            k: matrix(&name("attn_k"))?,
            v: matrix(&name("attn_v"))?,
            o: matrix(&name("attn_output"))?,
            ffn_norm: file.vector(&name("ffn_norm"))?,
            gate: matrix(&name("ffn_gate"))?,
            up: matrix(&name("ffn_up"))?,
            down: matrix(&name("ffn_down"))?,
        };
        // Matrices that multiply the same activations usually have the same order.
        let Layer { q, k, v, gate, up, .. } = &mut layer;
        for (first, others) in [(&*q, vec![k, v]), (&*gate, vec![up])] {
            for other in others {
                if other.order == first.order {
                    other.order.clone_from(&first.order);
                }
            }
        }
        Ok(layer)
    };
    Ok(Weights {
        embedding: matrix("token_embd.weight")?,
        layers: (0..config.n_layers).map(layer).collect::<Result<_>>()?,
        output_norm: file.vector("output_norm.weight")?,
        output: match file.shape("output.weight") {
            Some(_) => Some(matrix("output.weight")?),
            None => None,
        },
    })
}

fn vectors<const N: usize>(
    names: [&str; N],
    vector: impl Fn(&str) -> Result<Vec<f32>>,
) -> Result<[Vec<f32>; N]> {
    let mut vectors = [const { Vec::new() }; N];
    for (slot, name) in vectors.iter_mut().zip(names) {
        *slot = vector(name)?;
    }
    Ok(vectors)
}
