//! Several sessions in one pass, which reads the weights once for all of them: decoding is bound by that reading,
//! so four sequences take hardly longer than one.
//!
//! A batch computes and does not choose. What [`Session::next`] then finds has the bits that it would have computed
//! itself, so which sessions went together, or that they did, changes no token.

use super::{Extent, Session};
use crate::engine::cache::Cache;
use crate::engine::load::Model;
use crate::engine::pass::Door;
use crate::error::{Error, Result};
use crate::model::forward::{Chunk, Gate, Scratch};
use std::sync::Arc;
use std::time::Instant;

/// Most sessions in a pass.
const MOST_SESSIONS: usize = 256;

/// The buffers of passes over several sessions.
pub struct Batch {
    model: Arc<Model>,
    /// All its sessions have their keys and values here.
    cache: Arc<Cache>,
    scratch: Scratch,
}

impl Batch {
    /// For up to `most` sessions in a pass that agree with `like` in the model and in how keys and values are kept.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when `most` is 0 or above 256, [`Error::OutOfMemory`].
    pub fn new(like: &Session, most: usize) -> Result<Self> {
        if !(1..=MOST_SESSIONS).contains(&most) {
            let text = format!("a batch of {most} sessions: 1 to {MOST_SESSIONS} go together");
            return Err(Error::InvalidArgument(text));
        }
        let (model, cache) = (Arc::clone(&like.model), Arc::clone(&like.cache));
        let Extent { streaming, .. } = like.extent;
        let (config, reach) = (model.config(), like.extent.reach());
        let mut scratch = Scratch::new(config, &model.weights().needs(), (most, reach), most)?;
        scratch.stream(config, reach, streaming)?;
        Ok(Self { model, cache, scratch })
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.scratch.bytes()
    }

    /// Computes the logits after the last token of each of `sessions`, for [`Session::next`] to choose from. More
    /// than the batch has room for go in several passes. A session that has nothing to compute, lacks more than its
    /// last token, or cannot go on is left as it is: its own call does what there is to do, or says why not.
    /// Returns how many were computed.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a session that does not agree with that of [`Batch::new`];
    /// [`Error::Cancelled`] when one of them was cancelled, [`Error::ThermalPause`], [`Error::OutOfMemory`],
    /// [`Error::Io`] and [`Error::Corrupt`] from the spill file. Nothing has changed then but that some may have
    /// been computed.
    pub fn decode(&mut self, sessions: &mut [&mut Session]) -> Result<usize> {
        let differs = |session: &&mut Session| !Arc::ptr_eq(&session.cache, &self.cache);
        if let Some(index) = sessions.iter().position(differs) {
            let text = "is of another model, or keeps its keys and values otherwise than the batch";
            return Err(Error::InvalidArgument(format!("session {index} {text}")));
        }
        let mut joining = Vec::new();
        for session in sessions {
            if session.joins()? {
                joining.push(&mut **session);
            }
        }
        let mut computed = 0;
        for together in joining.chunks_mut(self.scratch.most()) {
            computed += self.pass(together)?;
        }
        Ok(computed)
    }

    fn pass(&mut self, sessions: &mut [&mut Session]) -> Result<usize> {
        let (model, cache) = (Arc::clone(&self.model), Arc::clone(&self.cache));
        // Somebody waits for all of them when somebody waits for one.
        let foreground = sessions.iter().find(|session| !session.extent.background);
        let Some(leader) = foreground.or(sessions.first()) else { return Ok(0) };
        let canceller = leader.canceller();
        let step = model.runtime().step(leader.extent.background)?;
        let _turn = leader.turn(&cache)?;
        let start = Instant::now();
        let mut shared = cache.lock();
        model.runtime().limit_threads(&step);
        let store = &mut shared.store;
        let mut together = Vec::new();
        for session in sessions {
            // As in `Session::run_chunk`.
            let reserved = match session.table.reserved() > session.table.len() {
                true => Ok(()),
                false => store.reserve(&mut session.table, 1),
            };
            if has_room(reserved.and_then(|()| store.load(&session.table)))? {
                together.push(session);
            }
        }
        let mut sessions = together;
        // Where the budget is short, the last ones have spilled the first.
        sessions.retain(|session| store.is_loaded(&session.table));
        if sessions.is_empty() {
            return Ok(0);
        }
        for session in &mut sessions {
            // Should the model panic, the cache may hold half a step.
            session.poisoned = true;
        }
        let doors = Doors(sessions.iter().map(|s| model.door(&s.canceller)).collect());
        let chunks: Vec<_> = (sessions.iter())
            .map(|Session { tokens, table, .. }| Chunk {
                tokens: &tokens[table.len()..],
                parents: None,
                table,
            })
            .collect();
        let scores = self.scratch.forward_batch(model.parts(&doors), &chunks, store);
        drop((chunks, doors));
        for session in &mut sessions {
            session.poisoned = false;
        }
        let scores = scores?;
        for (row, session) in sessions.iter_mut().enumerate() {
            session.kept.copy(scores.row(row, model.vocab()));
            session.table.commit(1);
            store.publish(&mut session.table, &session.tokens);
            session.drafts = step.drafts;
            session.fresh = true;
        }
        cache.relieve(&mut shared);
        drop(shared);
        for session in &mut sessions {
            session.shed();
        }
        canceller.sleep(step.rest(start.elapsed()))?;
        Ok(sessions.len())
    }
}

impl Session {
    /// Whether its last token is all that is not in the cache, and there is room for it.
    fn joins(&mut self) -> Result<bool> {
        let goes_on = !self.fresh && !self.tokens.is_empty() && self.check(&[]).is_ok();
        Ok(goes_on && has_room(self.reserve(0))? && self.is_one_ahead())
    }
}

/// Whether a sequence fits into the budget; what else there was is an error.
fn has_room(outcome: Result<()>) -> Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(Error::KvExhausted { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The gate of a pass for several.
struct Doors<'a>(Vec<Door<'a>>);

impl Gate for Doors<'_> {
    fn pass(&self, layer: usize) -> Result<()> {
        self.0.iter().try_for_each(|door| door.pass(layer))
    }
}
