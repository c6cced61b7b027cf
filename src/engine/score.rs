//! The logits after every token of a text: what perplexity and comparisons between models need.
#![forbid(unsafe_code)]

use super::load::Model;
use super::pass::Canceller;
use crate::error::{Error, Result};
use crate::kernel::KvFormat;
use crate::kernel::scores::Scores;
use crate::kv::BLOCK_TOKENS;
use crate::kv::blocks::BlockTable;
use crate::kv::store::{KvConfig, KvStore};
use crate::model::forward::{Logits, Scratch};

/// Runs `tokens` from an empty cache, `chunk` at a time, and hands each index with the logits after
/// that token to `each`, as in a session whose context they fill. The chunk size does not change a bit of
/// them.
///
/// # Errors
/// [`Error::InvalidArgument`] for a token outside the vocabulary or a chunk of zero;
/// [`Error::ContextFull`] for more tokens than the model was trained for; [`Error::OutOfMemory`].
pub fn score(
    model: &Model,
    tokens: &[u32],
    chunk: usize,
    each: impl FnMut(usize, &[f32]),
) -> Result<()> {
    score_in(model, KvFormat::F32, tokens, chunk, each)
}

/// [`score`] with keys and values kept in `format`.
///
/// # Errors
/// As [`score`].
pub fn score_in(
    model: &Model,
    format: KvFormat,
    tokens: &[u32],
    chunk: usize,
    mut each: impl FnMut(usize, &[f32]),
) -> Result<()> {
    let mut scorer = Scorer::new(model, format, tokens.len(), chunk.min(tokens.len().max(1)))?;
    let vocab = model.vocab();
    for (at, tokens) in tokens.chunks(scorer.chunk()).enumerate() {
        let first = at * scorer.chunk();
        let logits = scorer.push(tokens, Logits::All)?.logits;
        for (row, logits) in logits.chunks_exact(vocab).enumerate() {
            each(first + row, logits);
        }
    }
    Ok(())
}

/// The buffers of one sequence after the other, with logits after every token.
pub struct Scorer<'a> {
    model: &'a Model,
    chunk: usize,
    scratch: Scratch,
    store: KvStore,
    table: BlockTable,
}

impl<'a> Scorer<'a> {
    /// Room for sequences of `context` tokens that come in chunks of at most `chunk`, whose keys and values
    /// are kept in `format`.
    ///
    /// # Errors
    /// As [`score`].
    pub fn new(model: &'a Model, format: KvFormat, context: usize, chunk: usize) -> Result<Self> {
        let limit = model.config().context;
        if context > limit {
            return Err(Error::ContextFull { limit });
        }
        if chunk == 0 {
            return Err(Error::InvalidArgument("chunks of no tokens".into()));
        }
        let shape = model.config().kv_shape();
        // A block more, because those at the start of a sequence may be larger.
        let budget = (context + 2 * BLOCK_TOKENS) * shape.token_bytes(KvFormat::F32);
        let block_tokens = BLOCK_TOKENS;
        let config = KvConfig { shape, format, block_tokens, budget, fingerprint: 0 };
        Ok(Self {
            model,
            chunk,
            scratch: Scratch::new(
                model.config(),
                &model.weights().needs(),
                (chunk, context),
                chunk,
            )?,
            store: KvStore::with(&config)?,
            table: BlockTable::default(),
        })
    }

    /// Most tokens that go through the layers together.
    #[must_use]
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// Begins another sequence.
    pub fn restart(&mut self) {
        self.store.truncate(&mut self.table, 0);
    }

    /// Appends `tokens` and gives the logits after each, or those that `want` asks for.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for more tokens than a chunk has, or one outside the vocabulary;
    /// [`Error::OutOfMemory`].
    pub fn push(&mut self, tokens: &[u32], want: Logits) -> Result<Scores<'_>> {
        let vocab = self.model.vocab();
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
            return Err(Error::InvalidArgument(format!(
                "token {token} of a vocabulary of {vocab}"
            )));
        }
        if tokens.len() > self.chunk {
            let what = format!("{} tokens in a chunk of {}", tokens.len(), self.chunk);
            return Err(Error::InvalidArgument(what));
        }
        self.store.reserve(&mut self.table, tokens.len())?;
        let canceller = Canceller::default();
        let door = self.model.door(&canceller);
        let parts = self.model.parts(&door);
        let scores = self.scratch.forward(parts, tokens, &mut self.store, &self.table, want)?;
        self.table.commit(tokens.len());
        Ok(scores)
    }
}
