//! A session: one sequence of tokens, its cache, and the loop that makes more of them.
//!
//! `next` is the primitive; everything that streams is a loop over it. A call that fails has either
//! changed nothing or, when it broke off inside the model, poisoned the session until it is reset.
#![forbid(unsafe_code)]

use super::load::Model;
use super::pass::Canceller;
use crate::error::{Error, Result};
use crate::kernel::KvFormat;
use crate::kv::BLOCK_TOKENS;
use crate::kv::blocks::BlockTable;
use crate::kv::snapshot;
use crate::kv::store::{KvConfig, KvStore};
use crate::memory::Aligned;
use crate::model::forward::{Logits, Scratch};
use crate::text::sample::{Hook, Sampler, SamplerConfig};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Settings of a [`Session`].
#[derive(Clone, Debug, Default)]
pub struct SessionConfig {
    /// Tokens it can hold; 0 for as many as the model was trained for.
    pub context: usize,
    /// Tokens that go through the layers together in a prompt; 0 for 128. Does not change a result.
    pub prefill_chunk: usize,
    /// How tokens are chosen.
    pub sampler: SamplerConfig,
    /// How keys and values are kept. f16 takes half the memory and rounds them.
    pub kv_format: KvFormat,
}

/// What a call of [`Session::next`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// A token, which now belongs to the sequence.
    Token(u32),
    /// The model ended its text with this token, which does not belong to the sequence.
    End(u32),
    /// The context is full.
    ContextFull,
}

/// One sequence on a model.
pub struct Session {
    model: Arc<Model>,
    /// Shared with the forks of this session.
    store: Arc<Mutex<KvStore>>,
    table: BlockTable,
    scratch: Scratch,
    tokens: Vec<u32>,
    logits: Aligned<f32>,
    fresh: bool,
    sampler: Sampler,
    context: usize,
    chunk: usize,
    poisoned: bool,
    canceller: Canceller,
    /// The share of the usual draft length that the governor last allowed.
    drafts: f32,
}

impl Session {
    /// An empty session. All its memory but the KV blocks is allocated here.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for settings out of range, [`Error::OutOfMemory`].
    pub fn new(model: Arc<Model>, config: &SessionConfig) -> Result<Self> {
        let trained = model.config().context;
        let context = if config.context == 0 { trained } else { config.context };
        if context > trained {
            return Err(Error::InvalidArgument(format!(
                "a context of {context} tokens: the model was trained for {trained}"
            )));
        }
        let chunk = if config.prefill_chunk == 0 { 128 } else { config.prefill_chunk };
        let (shape, format) = (model.config().kv_shape(), config.kv_format);
        let budget = context.next_multiple_of(BLOCK_TOKENS) * shape.token_bytes(format);
        let block_tokens = BLOCK_TOKENS;
        let store = KvConfig { shape, format, block_tokens, budget, fingerprint: 0 };
        let store = KvStore::with(&store)?;
        let chunk = chunk.min(context);
        let sampler = Sampler::new(config.sampler)?;
        Self::on(
            model,
            Arc::new(Mutex::new(store)),
            BlockTable::default(),
            sampler,
            (context, chunk),
        )
    }

    /// A session over `table` in `store`; on failure the table is dropped as it is.
    fn on(
        model: Arc<Model>,
        store: Arc<Mutex<KvStore>>,
        table: BlockTable,
        sampler: Sampler,
        (context, chunk): (usize, usize),
    ) -> Result<Self> {
        let mut tokens = Vec::new();
        tokens
            .try_reserve_exact(context)
            .map_err(|_| Error::OutOfMemory { what: "tokens", bytes: context * 4 })?;
        Ok(Self {
            store,
            table,
            scratch: Scratch::new(model.config(), model.weights(), (chunk, context), 1)?,
            tokens,
            logits: Aligned::zeroed("logits", model.vocab())?,
            fresh: false,
            sampler,
            context,
            chunk,
            poisoned: false,
            canceller: Canceller::default(),
            drafts: 1.0,
            model,
        })
    }

    /// A second session with the same tokens and the same state of the sampler. The two share all KV
    /// blocks until one of them writes into one, and compute one after the other, on the same threads.
    ///
    /// # Errors
    /// [`Error::Poisoned`], [`Error::OutOfMemory`].
    pub fn fork(&mut self) -> Result<Self> {
        self.check(&[])?;
        let (model, store) = (Arc::clone(&self.model), Arc::clone(&self.store));
        let shape = (self.context, self.chunk);
        // Everything that can fail comes before blocks are shared.
        let mut fork = Self::on(model, store, BlockTable::default(), self.sampler.clone(), shape)?;
        fork.tokens.extend_from_slice(&self.tokens);
        fork.logits.copy_from_slice(&self.logits);
        fork.fresh = self.fresh;
        let mut store = lock(&self.store);
        fit(&mut store, self.context, Arc::strong_count(&self.store));
        fork.table = store.fork(&mut self.table)?;
        drop(store);
        Ok(fork)
    }

    /// Writes tokens, keys and values to the file at `path`, replacing it whole or not at all. The state
    /// of the sampler is no part of it.
    ///
    /// # Errors
    /// [`Error::Io`]; as [`Session::logits`].
    pub fn save(&mut self, path: &Path) -> Result<()> {
        self.refresh()?;
        let identity = self.model.kv_identity(self.context);
        let store = lock(&self.store);
        snapshot::save_file(&store, &self.table, &self.tokens, &identity, path)
    }

    /// Replaces the sequence by the one in the file at `path`, which [`Session::save`] wrote, in this
    /// process or another one. On failure nothing has changed.
    ///
    /// # Errors
    /// [`Error::Corrupt`] or [`Error::Unsupported`] with the reason why the file cannot be used,
    /// [`Error::ContextFull`] when it holds more tokens than fit, [`Error::Io`], [`Error::OutOfMemory`].
    pub fn restore(&mut self, path: &Path) -> Result<()> {
        let (context, sessions) = (self.context, Arc::strong_count(&self.store));
        let mut store = lock(&self.store);
        // Both sequences exist for a moment.
        fit(&mut store, context, sessions + 1);
        let mut table = BlockTable::default();
        let identity = self.model.kv_identity(context);
        let found = snapshot::restore_file(&mut store, &mut table, &identity, path);
        let vocab = self.model.vocab();
        let full = Error::ContextFull { limit: context };
        let found = found.map_err(|error| match error {
            Error::KvExhausted { .. } => full.clone(),
            error => error,
        });
        let found = found.and_then(|tokens| match tokens.iter().find(|t| **t as usize >= vocab) {
            _ if tokens.len() > context => Err(full),
            Some(token) => {
                let reason = format!("holds token {token} of a vocabulary of {vocab}");
                Err(Error::corrupt(path.display().to_string(), "tokens", reason))
            }
            None => Ok(tokens),
        });
        if found.is_ok() {
            std::mem::swap(&mut table, &mut self.table);
        }
        store.truncate(&mut table, 0);
        fit(&mut store, context, sessions);
        let found = found?;
        store.publish(&mut self.table, &found);
        // The logits are not in the file: the step of the last token is repeated, to the same bits.
        let keep = found.len().saturating_sub(1);
        store.rewind(&mut self.table, keep, self.model.config().first_seen(keep));
        self.tokens.clear();
        self.tokens.extend_from_slice(&found);
        self.fresh = false;
        self.poisoned = false;
        Ok(())
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// What cancels calls on this session, from any thread.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// The tokens of the sequence so far.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens it can hold.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }

    /// Bytes of KV blocks, those of forks included, and of all other buffers.
    #[must_use]
    pub fn bytes(&self) -> (usize, usize) {
        let other = self.scratch.bytes() + self.logits.bytes() + 4 * self.tokens.capacity();
        (lock(&self.store).bytes(), other)
    }

    /// Logits go through `hook` before a token is chosen from them, or through none. Forks keep it.
    pub fn set_logits_hook(&mut self, hook: Option<Hook>) {
        self.sampler.set_hook(hook);
    }

    /// Adds tokens to the sequence and runs them through the model.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a token outside the vocabulary, [`Error::ContextFull`] when they do
    /// not fit, [`Error::OutOfMemory`], [`Error::Cancelled`], [`Error::ThermalPause`]: nothing has changed
    /// then. [`Error::Poisoned`] after a failure inside the model.
    pub fn append(&mut self, tokens: &[u32]) -> Result<()> {
        self.check(tokens)?;
        if tokens.is_empty() {
            return Ok(());
        }
        let before = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        if let Err(error) = self.reserve(0) {
            self.tokens.truncate(before);
            let keep = self.table.len().min(before);
            let first_seen = self.model.config().first_seen(keep);
            lock(&self.store).rewind(&mut self.table, keep, first_seen);
            return Err(error);
        }
        if let Err(error) = self.catch_up() {
            // What has been computed is found again when the same tokens are appended once more.
            lock(&self.store).publish(&mut self.table, &self.tokens);
            self.truncate(before);
            return Err(error);
        }
        Ok(())
    }

    /// The logits after the last token, one for each token of the vocabulary.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty session; as [`Session::append`].
    pub fn logits(&mut self) -> Result<&[f32]> {
        self.refresh()?;
        Ok(&self.logits)
    }

    /// Chooses the next token.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty session; [`Error::Corrupt`] when the model gives no usable
    /// logits; as [`Session::append`].
    #[expect(clippy::should_implement_trait, reason = "fallible, and named so in the C interface")]
    pub fn next(&mut self) -> Result<Next> {
        self.refresh()?;
        let kernels = self.model.runtime().kernels();
        let Some(token) = self.sampler.sample(kernels, &self.logits, &self.tokens) else {
            return Err(self.damaged());
        };
        Ok(self.take(token))
    }

    /// What became of a chosen token.
    fn take(&mut self, token: u32) -> Next {
        if self.model.eos().contains(&token) {
            return Next::End(token);
        }
        if self.tokens.len() == self.context {
            return Next::ContextFull;
        }
        self.tokens.push(token);
        self.fresh = false;
        Next::Token(token)
    }

    /// Adds a token that the caller has chosen; it goes through the model when logits are asked for.
    ///
    /// # Errors
    /// As [`Session::append`].
    pub(super) fn push(&mut self, token: u32) -> Result<()> {
        self.check(&[token])?;
        self.tokens.push(token);
        self.fresh = false;
        Ok(())
    }

    /// Whether all tokens but the last one are in the cache, as they are between two calls of `next`.
    pub(super) fn is_one_ahead(&self) -> bool {
        self.table.len() + 1 == self.tokens.len()
    }

    /// Runs the last token and `drafts` after it in one pass, for a session that is one ahead: the logits
    /// after each of them, one row after the other. Nothing is kept until [`Session::settle`].
    pub(super) fn look_ahead<'a>(
        &mut self,
        scratch: &'a mut Scratch,
        drafts: &[u32],
    ) -> Result<&'a [f32]> {
        self.check(drafts)?;
        self.reserve(drafts.len())?;
        let rows = [&self.tokens[self.table.len()..], drafts].concat();
        let model = Arc::clone(&self.model);
        let step = model.runtime().step()?;
        self.drafts = step.drafts;
        let (start, door) = (Instant::now(), model.door(&self.canceller));
        let mut store = lock(&self.store);
        // As in `run_chunk`.
        self.poisoned = true;
        let logits =
            scratch.forward(model.parts(&door), &rows, &mut store, &self.table, Logits::All);
        self.poisoned = false;
        drop(store);
        let logits = logits?;
        self.canceller.sleep(step.rest(start.elapsed()))?;
        Ok(logits)
    }

    /// Ends what [`Session::look_ahead`] began: the `accepted` drafts belong to the sequence, and `next`
    /// was chosen from `logits`, which came after the last of them. The rows of other drafts stay in
    /// the cache as rubbish that the next pass overwrites.
    pub(super) fn settle(&mut self, accepted: &[u32], next: u32, logits: &[f32]) -> Next {
        self.table.commit(1 + accepted.len());
        self.shed();
        self.tokens.extend_from_slice(accepted);
        self.logits.copy_from_slice(logits);
        self.fresh = true;
        self.take(next)
    }

    /// How tokens are chosen, and from which random numbers.
    pub(super) fn sampler(&mut self) -> &mut Sampler {
        &mut self.sampler
    }

    /// The share of the usual draft length that the governor allows.
    pub(super) fn governed_drafts(&self) -> f32 {
        self.drafts
    }

    pub(super) fn damaged(&self) -> Error {
        let reason = "hold no number: the weights are damaged";
        Error::corrupt(self.model.file(), "logits", reason)
    }

    /// Keeps the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        if len < self.tokens.len() {
            self.tokens.truncate(len);
            // The logits after the last token kept are gone: its step is repeated when they are asked
            // for, which gives the same bits.
            let keep = self.table.len().min(len.saturating_sub(1));
            let first_seen = self.model.config().first_seen(keep);
            lock(&self.store).rewind(&mut self.table, keep, first_seen);
            self.fresh = false;
        }
    }

    /// Forgets all tokens and heals a poisoned session. The sampler goes on where it was.
    pub fn reset(&mut self) {
        self.truncate(0);
        self.fresh = false;
        self.poisoned = false;
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        if self.poisoned {
            return Err(Error::Poisoned);
        }
        if tokens.len() > self.context - self.tokens.len() {
            return Err(Error::ContextFull { limit: self.context });
        }
        let vocab = self.model.vocab();
        match tokens.iter().find(|token| **token as usize >= vocab) {
            Some(token) => {
                Err(Error::InvalidArgument(format!("token {token} of a vocabulary of {vocab}")))
            }
            None => Ok(()),
        }
    }

    /// Makes room in the cache for all tokens of the sequence and `ahead` more, taking over what is
    /// cached of them.
    fn reserve(&mut self, ahead: usize) -> Result<()> {
        let mut store = lock(&self.store);
        store.reuse(&mut self.table, &self.tokens);
        let missing = self.tokens.len() + ahead - self.table.len();
        store.reserve(&mut self.table, missing)
    }

    /// Runs what is not yet in the cache, so that `logits` belong to the last token.
    fn refresh(&mut self) -> Result<()> {
        self.check(&[])?;
        if self.tokens.is_empty() {
            return Err(Error::InvalidArgument(
                "the session is empty: append a token first".into(),
            ));
        }
        if !self.fresh {
            self.reserve(0)?;
            self.catch_up()?;
        }
        Ok(())
    }

    /// Gives back what the windows of all layers have passed.
    fn shed(&mut self) {
        // One position less, because the step of the last token may be repeated.
        let next = self.table.len().saturating_sub(1);
        let first_seen = self.model.config().first_seen(next);
        lock(&self.store).drop_before(&mut self.table, 0, first_seen);
    }

    /// Runs all tokens that are not yet in the cache. On failure those of whole chunks are.
    fn catch_up(&mut self) -> Result<()> {
        let model = Arc::clone(&self.model);
        while self.table.len() < self.tokens.len() {
            let step = model.runtime().step()?;
            self.drafts = step.drafts;
            let start = Instant::now();
            self.run_chunk(&model)?;
            self.fresh = self.table.len() == self.tokens.len();
            self.canceller.sleep(step.rest(start.elapsed()))?;
        }
        lock(&self.store).publish(&mut self.table, &self.tokens);
        self.shed();
        Ok(())
    }

    fn run_chunk(&mut self, model: &Model) -> Result<()> {
        let left = &self.tokens[self.table.len()..];
        let chunk = &left[..left.len().min(self.scratch.most())];
        let want = if chunk.len() == left.len() { Logits::Last } else { Logits::None };
        let door = model.door(&self.canceller);
        let mut store = lock(&self.store);
        // Should the model panic, the cache may hold half a step.
        self.poisoned = true;
        let logits = self.scratch.forward(model.parts(&door), chunk, &mut store, &self.table, want);
        self.poisoned = false;
        let logits = logits?;
        if want == Logits::Last {
            self.logits.copy_from_slice(logits);
        }
        self.table.commit(chunk.len());
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut store = lock(&self.store);
        store.truncate(&mut self.table, 0);
        fit(&mut store, self.context, Arc::strong_count(&self.store) - 1);
    }
}

/// The store, also after a panic inside the model: that session is poisoned, and it can only have
/// written where no other one reads.
fn lock(store: &Mutex<KvStore>) -> MutexGuard<'_, KvStore> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the store room for so many sessions of `context` tokens, so that none can take another's.
fn fit(store: &mut KvStore, context: usize, sessions: usize) {
    let blocks = context.div_ceil(store.pool().block_tokens());
    store.set_budget(sessions * blocks * store.block_bytes());
}
