//! A session: one sequence of tokens, its cache, and the loop that makes more of them.
//!
//! `next` is the primitive; everything that streams is a loop over it. A call that fails has either
//! changed nothing or, when it broke off inside the model, poisoned the session until it is reset.
#![forbid(unsafe_code)]

use super::load::Model;
use crate::error::{Error, Result};
use crate::kv::blocks::BlockTable;
use crate::kv::store::KvStore;
use crate::memory::Aligned;
use crate::model::forward::{Logits, Parts, Scratch};
use crate::text::sample::{Sampler, SamplerConfig};
use std::sync::Arc;

/// Settings of a [`Session`].
#[derive(Clone, Debug, Default)]
pub struct SessionConfig {
    /// Tokens it can hold; 0 for as many as the model was trained for.
    pub context: usize,
    /// Tokens that go through the layers together in a prompt; 0 for 128. Does not change a result.
    pub prefill_chunk: usize,
    /// How tokens are chosen.
    pub sampler: SamplerConfig,
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
    store: KvStore,
    table: BlockTable,
    scratch: Scratch,
    tokens: Vec<u32>,
    logits: Aligned<f32>,
    fresh: bool,
    sampler: Sampler,
    context: usize,
    poisoned: bool,
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
        let chunk = chunk.min(context);
        let scratch = Scratch::new(model.config(), model.weights(), chunk, 1)?;
        let mut tokens = Vec::new();
        tokens
            .try_reserve_exact(context)
            .map_err(|_| Error::OutOfMemory { what: "tokens", bytes: context * 4 })?;
        Ok(Self {
            store: KvStore::new(model.config().kv_shape(), context),
            table: BlockTable::default(),
            scratch,
            tokens,
            logits: Aligned::zeroed("logits", model.vocab())?,
            fresh: false,
            sampler: Sampler::new(config.sampler)?,
            context,
            poisoned: false,
            model,
        })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
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

    /// Bytes of KV blocks, and of all other buffers.
    #[must_use]
    pub fn bytes(&self) -> (usize, usize) {
        let other = self.scratch.bytes() + self.logits.bytes() + 4 * self.tokens.capacity();
        (self.store.bytes(), other)
    }

    /// Adds tokens to the sequence and runs them through the model.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a token outside the vocabulary, [`Error::ContextFull`] when they do
    /// not fit, [`Error::OutOfMemory`]: nothing has changed then. [`Error::Poisoned`] after a failure
    /// inside the model.
    pub fn append(&mut self, tokens: &[u32]) -> Result<()> {
        self.check(tokens)?;
        if tokens.is_empty() {
            return Ok(());
        }
        self.reserve(tokens.len())?;
        self.tokens.extend_from_slice(tokens);
        self.catch_up();
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
        // As in `catch_up`.
        self.poisoned = true;
        let model = Arc::clone(&self.model);
        let parts = Parts {
            config: model.config(),
            weights: model.weights(),
            kernels: model.runtime().kernels(),
            pool: model.runtime().pool(),
        };
        let logits = scratch.forward(parts, &rows, &mut self.store, &self.table, Logits::All);
        self.poisoned = false;
        Ok(logits)
    }

    /// Ends what [`Session::look_ahead`] began: the `accepted` drafts belong to the sequence, and `next`
    /// was chosen from `logits`, which came after the last of them. The rows of other drafts stay in
    /// the cache as rubbish that the next pass overwrites.
    pub(super) fn settle(&mut self, accepted: &[u32], next: u32, logits: &[f32]) -> Next {
        self.table.commit(1 + accepted.len());
        self.tokens.extend_from_slice(accepted);
        self.logits.copy_from_slice(logits);
        self.fresh = true;
        self.take(next)
    }

    /// How tokens are chosen, and from which random numbers.
    pub(super) fn sampler(&mut self) -> &mut Sampler {
        &mut self.sampler
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
            self.store.truncate(&mut self.table, keep);
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

    /// Makes room in the cache for all tokens of the sequence and `count` more.
    fn reserve(&mut self, count: usize) -> Result<()> {
        let missing = self.tokens.len() + count - self.table.len();
        self.store.reserve(&mut self.table, missing)
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
            self.catch_up();
        }
        Ok(())
    }

    fn catch_up(&mut self) {
        // Should the model panic, the cache may hold half a step: poisoned until the end is reached.
        self.poisoned = true;
        let model = Arc::clone(&self.model);
        let parts = Parts {
            config: model.config(),
            weights: model.weights(),
            kernels: model.runtime().kernels(),
            pool: model.runtime().pool(),
        };
        while self.table.len() < self.tokens.len() {
            let left = &self.tokens[self.table.len()..];
            let chunk = &left[..left.len().min(self.scratch.most())];
            let want = if chunk.len() == left.len() { Logits::Last } else { Logits::None };
            let logits = self.scratch.forward(parts, chunk, &mut self.store, &self.table, want);
            if want == Logits::Last {
                self.logits.copy_from_slice(logits);
            }
            self.table.commit(chunk.len());
        }
        self.fresh = true;
        self.poisoned = false;
    }
}
