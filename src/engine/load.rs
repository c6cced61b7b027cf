//! Opening a model from any file that can be read.
#![forbid(unsafe_code)]

use super::cache::Caches;
use super::log::Level;
use super::pass::{Canceller, Door};
use super::pressure::{Freed, Pressure};
use super::runtime::Runtime;
use super::warm::{Progress, Warming};
#[cfg(feature = "text")]
use crate::error::Error;
use crate::error::Result;
use crate::file::checkpoint::Checkpoint;
use crate::file::metadata::Metadata;
use crate::file::model_file::ModelFile;
use crate::file::nybl::Nybl;
use crate::file::source::Source;
use crate::kv::hash::{START, mix_bytes};
use crate::kv::snapshot::Identity;
use crate::model::config::Config;
use crate::model::forward::{Gate, Parts};
use crate::model::weights::{Matrix, Weights};
#[cfg(feature = "chat")]
use crate::text::template::ChatTemplate;
#[cfg(feature = "text")]
use crate::text::{tokenizer::Tokenizer, vocabulary};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// An opened model: immutable, shared by its sessions.
pub struct Model {
    runtime: Arc<Runtime>,
    file: String,
    format: String,
    metadata: Metadata,
    config: Config,
    weights: Weights,
    caches: Caches,
    #[cfg(feature = "text")]
    tokenizer: Option<Tokenizer>,
    #[cfg(feature = "chat")]
    chat: OnceLock<ChatTemplate>,
    warming: OnceLock<Warming>,
}

impl Model {
    /// Opens the file at `path`: a packed file, or any checkpoint that [`Checkpoint::open`] reads.
    ///
    /// # Errors
    /// As [`Model::open`], and [`Error::Io`].
    pub fn open_path(runtime: Arc<Runtime>, path: &Path) -> Result<Arc<Self>> {
        Self::from_file(runtime, ModelFile::open_path(path)?)
    }

    /// Opens a `.nybl` or GGUF file. The weights of the former stay in the mapping; those of the latter
    /// are packed into memory.
    ///
    /// # Errors
    /// [`Error::Corrupt`] or [`Error::Unsupported`] naming the field; [`Error::OutOfMemory`].
    pub fn open(runtime: Arc<Runtime>, source: Source) -> Result<Arc<Self>> {
        Self::open_all(runtime, vec![source])
    }

    /// As [`Model::open`], from all parts of a file that was split, in order.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_all(runtime: Arc<Runtime>, sources: Vec<Source>) -> Result<Arc<Self>> {
        Self::from_file(runtime, ModelFile::open(sources)?)
    }

    /// Loads a file of which the head has been read.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_file(runtime: Arc<Runtime>, file: ModelFile) -> Result<Arc<Self>> {
        match file {
            ModelFile::Packed(file) => Self::from_nybl(runtime, &file),
            ModelFile::Checkpoint(checkpoint) => Self::from_checkpoint(runtime, checkpoint),
        }
    }

    /// Maps the weights of a packed file, or of all shards of one.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_nybl(runtime: Arc<Runtime>, packed: &Nybl) -> Result<Arc<Self>> {
        let config = Config::read(packed.metadata())?;
        let weights = Weights::from_nybl(packed, &config, runtime.pool())?;
        let name = packed.name().to_owned();
        Self::of(runtime, name, "nybl".into(), packed.metadata(), config, weights)
    }

    /// Packs the weights of a checkpoint into memory.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_checkpoint(runtime: Arc<Runtime>, checkpoint: Checkpoint) -> Result<Arc<Self>> {
        let config = Config::read(&checkpoint.metadata)?;
        let weights = Weights::from_checkpoint(&checkpoint, &config, runtime.pool())?;
        let Checkpoint { name, format, metadata, .. } = checkpoint;
        Self::of(runtime, name, format, &metadata, config, weights)
    }

    fn of(
        runtime: Arc<Runtime>,
        file: String,
        format: String,
        metadata: &Metadata,
        config: Config,
        weights: Weights,
    ) -> Result<Arc<Self>> {
        let model = Arc::new(Self {
            #[cfg(feature = "text")]
            tokenizer: vocabulary::tokenizer(metadata, weights.vocab())?,
            runtime,
            file,
            format,
            // Without the large parts of a vocabulary, which the tokenizer holds.
            #[cfg(feature = "text")]
            metadata: metadata.only(|key| !vocabulary::is_large(key)),
            #[cfg(not(feature = "text"))]
            metadata: metadata.clone(),
            config,
            weights,
            caches: Caches::default(),
            #[cfg(feature = "chat")]
            chat: OnceLock::new(),
            warming: OnceLock::new(),
        });
        model.runtime.register(&model);
        model.runtime.log().say(Level::Info, || {
            let (private, mapped) = model.weight_bytes();
            let Self { file, format, .. } = &*model;
            format!(
                "{file}: {format}, {mapped} bytes of weights mapped, {private} in private memory"
            )
        });
        Ok(model)
    }

    /// Reads the weights into memory in the background, in the order of the layers, and tells `progress`.
    /// Sessions may work meanwhile: a pass waits only for the layer that it has come to. Does nothing the
    /// second time.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses a thread.
    pub fn prefetch(&self, progress: Option<Progress>) -> Result<()> {
        if self.warming.get().is_none() {
            // Two threads at once: one of the readers is dropped, which stops it.
            let _ = self.warming.set(Warming::start(self.weights.mapped_parts(), progress)?);
        }
        Ok(())
    }

    /// The background reading, when there is or was one.
    #[must_use]
    pub fn warming(&self) -> Option<&Warming> {
        self.warming.get()
    }

    /// Gives the pages of all weights back to the system, which reads them again when they are used.
    /// Bytes given back, at most: those of pages that were there.
    pub fn release_pages(&self) -> usize {
        let parts = self.weights.mapped_parts();
        parts.into_iter().flatten().map(|(source, range)| source.release(range)).sum()
    }

    /// Keeps all pages of the weights in memory until the model is closed.
    ///
    /// # Errors
    /// [`Error::Io`] with the system's reason.
    pub fn lock_pages(&self) -> Result<()> {
        let mut sources: Vec<Source> = Vec::new();
        for (source, _) in self.weights.mapped_parts().into_iter().flatten() {
            if sources.iter().all(|other| other.name() != source.name()) {
                source.lock()?;
                sources.push(source);
            }
        }
        Ok(())
    }

    /// The runtime it was opened with.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }
    /// The file's name.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }
    /// The kind of file it came from.
    #[must_use]
    pub fn format(&self) -> &str {
        &self.format
    }
    /// The metadata, without the vocabulary, which lives in the tokenizer.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
    /// The shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }
    /// The weights.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }
    /// Tokens that end a generation: none without a tokenizer, which is where a file names them.
    #[must_use]
    pub fn eos(&self) -> &[u32] {
        #[cfg(feature = "text")]
        return self.tokenizer.as_ref().map_or(&[], Tokenizer::eos);
        #[cfg(not(feature = "text"))]
        &[]
    }
    /// What a session goes through on its way.
    pub(super) fn door<'a>(&'a self, canceller: &'a Canceller) -> Door<'a> {
        Door { canceller, warming: self.warming.get() }
    }

    /// What a forward pass works with.
    pub(super) fn parts<'a>(&'a self, gate: &'a dyn Gate) -> Parts<'a> {
        Parts {
            config: &self.config,
            weights: &self.weights,
            kernels: self.runtime.kernels(),
            pool: self.runtime.pool(),
            gate: Some(gate),
        }
    }

    /// The KV caches of its sessions.
    pub(super) fn caches(&self) -> &Caches {
        &self.caches
    }

    /// Gives memory back, as much as `pressure` asks for: see [`Runtime::relieve`].
    pub(super) fn relieve(&self, pressure: Pressure) -> Freed {
        let mut freed = self.caches.relieve(pressure);
        if pressure >= Pressure::Critical {
            freed.pages = self.release_pages();
        }
        freed
    }

    /// Gives the KV memory that no session holds back to the system, and with it the prompts that could
    /// have been found there. Returns the bytes.
    pub fn trim(&self) -> usize {
        self.caches.trim()
    }

    /// Tokens in the vocabulary.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.weights.vocab()
    }

    /// The tokenizer, if the file has one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it has none: the model then works on token ids only.
    #[cfg(feature = "text")]
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::Unsupported(format!("{}: holds no tokenizer; work on token ids", self.file))
        })
    }

    /// The chat template, if the file has one; compiled when it is first asked for.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it has none or no tokenizer; as [`ChatTemplate::new`].
    #[cfg(feature = "chat")]
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        if let Some(template) = self.chat.get() {
            return Ok(template);
        }
        let Some(source) = self.metadata.text("tokenizer.chat_template")? else {
            let reason = "holds no chat template: write the prompt in the model's own form";
            return Err(Error::Unsupported(format!("{}: {reason}", self.file)));
        };
        let template = ChatTemplate::new(source, self.tokenizer()?)?;
        Ok(self.chat.get_or_init(|| template))
    }

    /// What keys and values computed with this model in a sequence that may come to `context` tokens are
    /// worth: equal identities, equal bits. The weights
    /// are sampled, 4 KiB at both ends of each matrix, because reading gigabytes would cost more than
    /// what a snapshot saves.
    #[must_use]
    pub fn kv_identity(&self, context: usize) -> Identity {
        let config = format!("{:?}", self.config);
        let mut model = mix_bytes(START, config.as_bytes());
        for matrix in self.weights.matrices() {
            let (packed, end) = (matrix.packed(), 4096);
            let bytes = packed.bytes();
            model = mix_bytes(model, format!("{:?}", packed.layout()).as_bytes());
            model = mix_bytes(model, &bytes[..bytes.len().min(end)]);
            model = mix_bytes(model, &bytes[bytes.len().saturating_sub(end)..]);
            if let Some(order) = matrix.order() {
                model = mix_bytes(model, bytemuck::cast_slice(order));
            }
        }
        let rope = &self.config.rope;
        if rope.is_long(context) {
            model = mix_bytes(model, b"long");
        }
        Identity { model, rope_theta: rope.theta, rope_dim: rope.dim }
    }

    /// Bytes of weights in private memory, and bytes in the mapping.
    #[must_use]
    pub fn weight_bytes(&self) -> (usize, usize) {
        let owned = self.weights.matrices().map(Matrix::owned_bytes);
        let all = self.weights.matrices().map(|matrix| matrix.layout().bytes());
        let (owned, all): (usize, usize) = (owned.sum(), all.sum());
        (owned, all - owned)
    }
}
