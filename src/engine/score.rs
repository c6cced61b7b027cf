//! The logits after every token of a text: what perplexity and comparisons between models need.
#![forbid(unsafe_code)]

use super::load::Model;
use super::pass::Canceller;
use crate::error::{Error, Result};
use crate::kernel::KvFormat;
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
    let (context, vocab) = (model.config().context, model.vocab());
    if tokens.len() > context {
        return Err(Error::ContextFull { limit: context });
    }
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
        return Err(Error::InvalidArgument(format!("token {token} of a vocabulary of {vocab}")));
    }
    if chunk == 0 {
        return Err(Error::InvalidArgument("chunks of no tokens".into()));
    }
    let chunk = chunk.min(tokens.len().max(1));
    let mut scratch = Scratch::new(model.config(), model.weights(), (chunk, tokens.len()), chunk)?;
    let shape = model.config().kv_shape();
    // A block more, because those at the start of a sequence may be larger.
    let budget = (context + 2 * BLOCK_TOKENS) * shape.token_bytes(KvFormat::F32);
    let block_tokens = BLOCK_TOKENS;
    let config = KvConfig { shape, format, block_tokens, budget, fingerprint: 0 };
    let mut store = KvStore::with(&config)?;
    let mut table = BlockTable::default();
    store.reserve(&mut table, tokens.len())?;
    let canceller = Canceller::default();
    let door = model.door(&canceller);
    for tokens in tokens.chunks(chunk) {
        let logits =
            scratch.forward(model.parts(&door), tokens, &mut store, &table, Logits::All)?;
        for (row, logits) in logits.chunks_exact(vocab).enumerate() {
            each(table.len() + row, logits);
        }
        table.commit(tokens.len());
    }
    Ok(())
}
