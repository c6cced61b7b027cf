//! A session: one sequence of tokens, its cache, and the loop that makes more of them.
//!
//! `next` is the primitive; everything that streams is a loop over it. A call that fails has either
//! changed nothing or, when it broke off inside the model, poisoned the session until it is reset.
#![forbid(unsafe_code)]

pub mod batch;

use super::cache::{Cache, Kind, KvLimit, Turn};
use super::governor::Step;
use super::load::Model;
use super::pass::Canceller;
use crate::error::{Error, Result};
use crate::kernel::KvFormat;
use crate::kernel::scores::{Kept, Scores};
use crate::kv::BLOCK_TOKENS;
use crate::kv::blocks::BlockTable;
use crate::kv::hash::{START, mix};
use crate::kv::sight::Streaming;
use crate::kv::snapshot::{self, Identity};
use crate::model::config::Config;
use crate::model::forward::{Logits, Scratch};
use crate::model::weights::Needs;
use crate::text::sample::{Hook, Sampler, SamplerConfig};
use std::path::Path;
use std::sync::Arc;
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
    /// Added to the logits of tokens before anything else; minus infinity forbids one.
    pub logit_bias: Vec<(u32, f32)>,
    /// How keys and values are kept. All but f32 take less memory and round them.
    pub kv_format: KvFormat,
    /// Looks at the first and the last tokens alone, and keeps only those, so that the sequence need not
    /// end: `context` may then be longer than what the model was trained for.
    pub streaming: Option<Streaming>,
    /// Bounds the KV memory of all sessions of this model that agree in the two settings before.
    pub kv_limit: Option<KvLimit>,
    /// Nobody waits for this session: it uses a quarter of the threads and half the time, and between its
    /// chunks, of 16 tokens unless `prefill_chunk` says otherwise, it lets sessions of the same cache go
    /// first that somebody waits for.
    pub background: bool,
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
    /// Shared with all sessions of the model whose keys and values are alike.
    cache: Arc<Cache>,
    extent: Extent,
    table: BlockTable,
    scratch: Scratch,
    tokens: Vec<u32>,
    /// The scores after the last token, where `fresh`.
    kept: Kept,
    fresh: bool,
    sampler: Sampler,
    /// What is added to logits, and then what the host does to them; the sampler has both in one.
    bias: Option<Hook>,
    hook: Option<Hook>,
    /// Tokens that were found in the cache instead of being computed.
    reused: u64,
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
        let extent = Extent::of(model.config(), config)?;
        let long = model.config().rope.is_long(extent.reach());
        let kind = Kind { format: config.kv_format, long, streaming: extent.streaming };
        let cache = model.caches().open(kind, model.config().kv_shape())?;
        if let Some(limit) = &config.kv_limit {
            cache.lock().limit(limit)?;
        }
        let bias = bias(&config.logit_bias, model.vocab())?;
        let sampler = Sampler::new(config.sampler)?;
        let mut session = Self::on(model, cache, sampler, extent)?;
        session.change_logits(bias, None);
        Ok(session)
    }

    /// An empty session in `cache`.
    fn on(model: Arc<Model>, cache: Arc<Cache>, sampler: Sampler, extent: Extent) -> Result<Self> {
        let mut tokens = Vec::new();
        tokens
            .try_reserve_exact(extent.context)
            .map_err(|_| Error::OutOfMemory { what: "tokens", bytes: extent.context * 4 })?;
        let scratch = extent.scratch(model.config(), &model.weights().needs())?;
        let kept = Kept::zeroed(model.vocab())?;
        // Last, because what fails before it has nothing to give back.
        cache.lock().join(extent.room());
        Ok(Self {
            cache,
            extent,
            table: BlockTable::default(),
            scratch,
            tokens,
            kept,
            fresh: false,
            sampler,
            bias: None,
            hook: None,
            reused: 0,
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
        let (model, cache) = (Arc::clone(&self.model), Arc::clone(&self.cache));
        // Everything that can fail comes before blocks are shared.
        let mut fork = Self::on(model, cache, self.sampler.clone(), self.extent)?;
        (fork.bias, fork.hook) = (self.bias.clone(), self.hook.clone());
        fork.tokens.extend_from_slice(&self.tokens);
        fork.kept.copy(self.kept.scores());
        fork.fresh = self.fresh;
        fork.table = self.cache.lock().store.fork(&mut self.table)?;
        Ok(fork)
    }

    /// Writes tokens, keys and values to the file at `path`, replacing it whole or not at all. The state
    /// of the sampler is no part of it.
    ///
    /// # Errors
    /// [`Error::Io`]; as [`Session::logits`].
    pub fn save(&mut self, path: &Path) -> Result<()> {
        self.refresh()?;
        let (identity, store) = (self.identity(), &mut self.cache.lock().store);
        snapshot::save_file(store, &self.table, &self.tokens, &identity, path)
    }

    /// Replaces the sequence by the one in the file at `path`, which [`Session::save`] wrote, in this
    /// process or another one. On failure nothing has changed.
    ///
    /// # Errors
    /// [`Error::Corrupt`] or [`Error::Unsupported`] with the reason why the file cannot be used,
    /// [`Error::ContextFull`] when it holds more tokens than fit, [`Error::Io`], [`Error::OutOfMemory`].
    pub fn restore(&mut self, path: &Path) -> Result<()> {
        let (context, identity) = (self.extent.context, self.identity());
        let mut shared = self.cache.lock();
        // Both sequences exist for a moment.
        shared.join(self.extent.room());
        let mut table = BlockTable::default();
        let found = snapshot::restore_file(&mut shared.store, &mut table, &identity, path);
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
        shared.store.truncate(&mut table, 0);
        shared.leave(self.extent.room());
        let found = found?;
        let store = &mut shared.store;
        store.publish(&mut self.table, &found);
        // The logits are not in the file: the step of the last token is repeated, to the same bits.
        let keep = found.len().saturating_sub(1);
        let (_, first_seen) = seen(&self.model, self.extent.streaming, keep);
        store.rewind(&mut self.table, keep, first_seen);
        drop(shared);
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
        self.extent.context
    }

    /// Tokens that were found in the cache instead of being computed, since the session began.
    #[must_use]
    pub fn reused(&self) -> u64 {
        self.reused
    }

    /// Bytes of KV blocks, those of all sessions that share the cache, and of all other buffers.
    #[must_use]
    pub fn bytes(&self) -> (usize, usize) {
        let other = self.scratch.bytes() + self.kept.bytes() + 4 * self.tokens.capacity();
        (self.cache.lock().store.bytes(), other)
    }

    /// Logits go through `hook` before a token is chosen from them, or through none: the place for the mask of
    /// a grammar. It sees them with the bias. Forks keep it.
    pub fn set_logits_hook(&mut self, hook: Option<Hook>) {
        self.change_logits(self.bias.clone(), hook);
    }

    /// As [`SessionConfig::logit_bias`], instead of the one before.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a token outside the vocabulary or a bias that is no number; nothing has
    /// changed then.
    pub fn set_logit_bias(&mut self, entries: &[(u32, f32)]) -> Result<()> {
        let bias = bias(entries, self.model.vocab())?;
        self.change_logits(bias, self.hook.clone());
        Ok(())
    }

    fn change_logits(&mut self, bias: Option<Hook>, hook: Option<Hook>) {
        (self.bias, self.hook) = (bias.clone(), hook.clone());
        self.sampler.set_hook(match (bias, hook) {
            (Some(bias), Some(hook)) => Some(bias.then(hook)),
            (bias, hook) => bias.or(hook),
        });
    }

    /// Changes how tokens are chosen. The random numbers go on where they were.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming a setting that is out of range; nothing has changed then.
    pub fn set_sampler(&mut self, config: SamplerConfig) -> Result<()> {
        self.sampler.set_config(config)
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
            self.rewind(self.table.len().min(before));
            self.fresh = false;
            return Err(error);
        }
        if let Err(error) = self.catch_up() {
            // What has been computed is found again when the same tokens are appended once more.
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
        Ok(self.scores()?.logits)
    }

    /// [`Session::logits`], and what is known of them.
    pub(super) fn scores(&mut self) -> Result<Scores<'_>> {
        self.refresh()?;
        Ok(self.kept.scores())
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
        let Some(token) = self.sampler.sample(kernels, self.kept.scores(), &self.tokens) else {
            return Err(self.no_choice());
        };
        Ok(self.take(token))
    }

    /// The logits that the last token was chosen from, as the model made them.
    pub(super) fn chosen_from(&self) -> &[f32] {
        self.kept.scores().logits
    }

    /// What becomes of a chosen token.
    pub(super) fn take(&mut self, token: u32) -> Next {
        if self.model.eos().contains(&token) {
            return Next::End(token);
        }
        if self.tokens.len() == self.extent.context {
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
    ) -> Result<Scores<'a>> {
        self.check(drafts)?;
        self.reserve(drafts.len())?;
        scratch.stream(self.model.config(), self.extent.reach(), self.extent.streaming)?;
        let rows = [&self.tokens[self.table.len()..], drafts].concat();
        let model = Arc::clone(&self.model);
        let step = model.runtime().step(self.extent.background)?;
        self.drafts = step.drafts;
        let cache = Arc::clone(&self.cache);
        let _turn = self.turn(&cache)?;
        let (start, door) = (Instant::now(), model.door(&self.canceller));
        let mut shared = cache.lock();
        model.runtime().limit_threads(&step);
        let store = &mut shared.store;
        store.load(&self.table)?;
        // As in `run_chunk`.
        self.poisoned = true;
        let watch = self.canceller.watch();
        let scores = scratch.forward(model.parts(&door), &rows, store, &self.table, Logits::All);
        drop(watch);
        self.poisoned = false;
        cache.relieve(&mut shared);
        drop(shared);
        let scores = scores?;
        self.canceller.sleep(step.rest(start.elapsed()))?;
        Ok(scores)
    }

    /// Ends what [`Session::look_ahead`] began: the `accepted` drafts belong to the sequence, and `next`
    /// was chosen from `scores`, which came after the last of them. The rows of other drafts stay in
    /// the cache as rubbish that the next pass overwrites.
    pub(super) fn settle(&mut self, accepted: &[u32], next: u32, scores: Scores<'_>) -> Next {
        self.table.commit(1 + accepted.len());
        self.shed();
        self.tokens.extend_from_slice(accepted);
        self.kept.copy(scores);
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

    /// Why no token could be chosen.
    pub(super) fn no_choice(&self) -> Error {
        if self.sampler.hook().is_some()
            && self.chosen_from().iter().any(|x| *x > f32::NEG_INFINITY)
        {
            let text = "the bias or the hook on the logits leaves no token to choose";
            return Error::InvalidArgument(text.into());
        }
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
            self.rewind(keep);
            self.fresh = false;
        }
    }

    /// Forgets all tokens and heals a poisoned session. The sampler goes on where it was.
    pub fn reset(&mut self) {
        self.truncate(0);
        self.fresh = false;
        self.poisoned = false;
    }

    /// Whether tokens could be added.
    pub(super) fn check(&self, tokens: &[u32]) -> Result<()> {
        if self.poisoned {
            return Err(Error::Poisoned);
        }
        if tokens.len() > self.extent.context - self.tokens.len() {
            return Err(Error::ContextFull { limit: self.extent.context });
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
    /// cached of them. An endless sequence makes room as it goes.
    fn reserve(&mut self, ahead: usize) -> Result<()> {
        let store = &mut self.cache.lock().store;
        self.reused += store.reuse(&mut self.table, &self.tokens) as u64;
        let missing = self.tokens.len() + ahead - self.table.len();
        let most =
            if self.extent.streaming.is_some() { self.scratch.most() + ahead } else { usize::MAX };
        store.reserve(&mut self.table, missing.min(most))
    }

    /// What keys and values of this session are worth to another one.
    fn identity(&self) -> Identity {
        let identity = self.model.kv_identity(self.extent.reach());
        let Some(Streaming { sinks, window }) = self.extent.streaming else { return identity };
        let model = mix(mix(mix(START, identity.model), sinks as u64), window as u64);
        Identity { model, ..identity }
    }

    /// Keeps the cache of the first `len` tokens, or of fewer where a window has dropped what comes next.
    fn rewind(&mut self, len: usize) {
        let (_, first_seen) = seen(&self.model, self.extent.streaming, len);
        self.cache.lock().store.rewind(&mut self.table, len, first_seen);
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
        let (sinks, first_seen) = seen(&self.model, self.extent.streaming, next);
        self.cache.lock().store.drop_before(&mut self.table, sinks, first_seen);
    }

    /// Runs all tokens that are not yet in the cache. Other sessions get their turn between chunks. On
    /// failure those of whole chunks are in the cache.
    fn catch_up(&mut self) -> Result<()> {
        let (model, cache) = (Arc::clone(&self.model), Arc::clone(&self.cache));
        while self.table.len() < self.tokens.len() {
            let step = model.runtime().step(self.extent.background)?;
            self.drafts = step.drafts;
            let start = Instant::now();
            let turn = self.turn(&cache)?;
            self.run_chunk(&model, &step)?;
            drop(turn);
            self.shed();
            self.fresh = self.table.len() == self.tokens.len();
            self.canceller.sleep(step.rest(start.elapsed()))?;
        }
        Ok(())
    }

    /// Waits until it is this session's turn, as far as that is decided by who waits for whom.
    fn turn<'a>(&self, cache: &'a Cache) -> Result<Option<Turn<'a>>> {
        if !self.extent.background {
            return Ok(Some(cache.turn()));
        }
        cache.give_way(|time| self.canceller.sleep(time))?;
        Ok(None)
    }

    fn run_chunk(&mut self, model: &Model, step: &Step) -> Result<()> {
        let left = &self.tokens[self.table.len()..];
        let chunk = &left[..left.len().min(self.scratch.most())];
        let want = if chunk.len() == left.len() { Logits::Last } else { Logits::None };
        let door = model.door(&self.canceller);
        let cache = Arc::clone(&self.cache);
        let mut shared = cache.lock();
        // Only now: who had the lock before worked with threads of its own number.
        model.runtime().limit_threads(step);
        let store = &mut shared.store;
        // Has been reserved, except in an endless sequence, or when another session has spilled it since.
        if self.table.reserved() < self.table.len() + chunk.len() {
            store.reserve(&mut self.table, chunk.len())?;
        }
        store.load(&self.table)?;
        // Should the model panic, the cache may hold half a step.
        self.poisoned = true;
        let watch = self.canceller.watch();
        let scores = self.scratch.forward(model.parts(&door), chunk, store, &self.table, want);
        drop(watch);
        self.poisoned = false;
        let scores = scores?;
        // Its last step may have been left half done.
        self.canceller.check()?;
        if want == Logits::Last {
            self.kept.copy(scores);
        }
        self.table.commit(chunk.len());
        store.publish(&mut self.table, &self.tokens);
        cache.relieve(&mut shared);
        Ok(())
    }
}

/// The sizes that a session's settings come to on a model: what it and a plan for it are made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Tokens that it can hold.
    pub(super) context: usize,
    /// Tokens that go through the layers together.
    chunk: usize,
    streaming: Option<Streaming>,
    background: bool,
}

impl Extent {
    /// # Errors
    /// [`Error::InvalidArgument`] for settings out of range.
    pub(super) fn of(model: &Config, settings: &SessionConfig) -> Result<Self> {
        let trained = model.context;
        let context = if settings.context == 0 { trained } else { settings.context };
        let streaming = settings.streaming;
        let reach =
            streaming.map_or(context, |Streaming { sinks, window }| sinks.saturating_add(window));
        if reach > trained {
            return Err(Error::InvalidArgument(format!(
                "a context of {reach} tokens: the model was trained for {trained}"
            )));
        }
        if context > MOST_TOKENS || streaming.is_some_and(|streaming| streaming.window == 0) {
            let text = format!("a sequence of {context} tokens, or a window of none");
            return Err(Error::InvalidArgument(text));
        }
        let chunk = match settings.prefill_chunk {
            // What a session in the foreground has to wait for at most.
            0 if settings.background => BACKGROUND_CHUNK,
            0 => PREFILL_CHUNK,
            chunk => chunk,
        };
        let background = settings.background;
        Ok(Self { context, chunk: chunk.min(context), streaming, background })
    }

    /// The longest distance between tokens that look at each other.
    fn reach(&self) -> usize {
        self.streaming.map_or(self.context, |Streaming { sinks, window }| sinks + window)
    }

    /// Tokens that there is room for in the cache.
    pub(super) fn room(&self) -> usize {
        // Sinks, window and chunk begin and end anywhere in a block.
        self.context.min(self.reach().saturating_add(self.chunk + 4 * BLOCK_TOKENS))
    }

    /// The buffers of its passes.
    pub(super) fn scratch(&self, model: &Config, needs: &Needs) -> Result<Scratch> {
        let mut scratch = Scratch::new(model, needs, (self.chunk, self.reach()), 1)?;
        scratch.stream(model, self.reach(), self.streaming)?;
        Ok(scratch)
    }
}

/// A hook that adds a bias; none for no entries.
fn bias(entries: &[(u32, f32)], vocab: usize) -> Result<Option<Hook>> {
    let is_wrong = |(token, bias): &&(u32, f32)| *token as usize >= vocab || bias.is_nan();
    if let Some((token, bias)) = entries.iter().find(is_wrong) {
        let text = format!("a logit bias of {bias} for token {token} of a vocabulary of {vocab}");
        return Err(Error::InvalidArgument(text));
    }
    Ok((!entries.is_empty()).then(|| Hook::bias(entries.to_vec())))
}

/// Tokens of a prompt that go through the layers together unless the settings say otherwise.
pub(super) const PREFILL_CHUNK: usize = 128;
/// And in the background.
const BACKGROUND_CHUNK: usize = 16;

/// Longest sequence, endless ones included: positions are numbers of 32 bits in places.
const MOST_TOKENS: usize = 1 << 24;

/// How many tokens at the start of a sequence are kept, and the first position that is looked at besides
/// them from position `next` on.
fn seen(model: &Model, streaming: Option<Streaming>, next: usize) -> (usize, usize) {
    match streaming {
        None => (0, model.config().first_seen(next)),
        Some(Streaming { sinks, window }) => {
            let start = (next + 1).saturating_sub(window);
            (sinks, if start <= sinks { 0 } else { start })
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut shared = self.cache.lock();
        shared.store.truncate(&mut self.table, 0);
        shared.leave(self.extent.room());
    }
}
