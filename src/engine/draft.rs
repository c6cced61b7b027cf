//! A smaller model as a drafter, with a session of its own that follows the target's.
//!
//! It drafts greedily whatever the target's sampler is: deterministic drafts leave the target's tokens
//! as they are, seed for seed.
#![forbid(unsafe_code)]

use super::load::Model;
use super::session::{Next, Session, SessionConfig};
use crate::error::{Error, Result};
use crate::spec::distribution::SamplerConfig;
use crate::spec::draft::{Draft, Drafter};
use std::sync::Arc;

/// A model that drafts.
pub struct ModelDrafter {
    session: Session,
}

impl ModelDrafter {
    /// A drafter for a target with a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the model has another vocabulary; as [`Session::new`].
    pub fn new(model: Arc<Model>, vocab: usize) -> Result<Self> {
        if model.vocab() != vocab {
            return Err(Error::InvalidArgument(format!(
                "{}: drafts from a vocabulary of {} for one of {vocab}",
                model.file(),
                model.vocab()
            )));
        }
        let config = SessionConfig { sampler: SamplerConfig::greedy(), ..Default::default() };
        Ok(Self { session: Session::new(model, &config)? })
    }

    /// Makes the session hold `context`; `false` when it is too long for this model.
    fn follow(&mut self, context: &[u32]) -> Result<bool> {
        if context.len() > self.session.context() {
            return Ok(false);
        }
        let pairs = self.session.tokens().iter().zip(context);
        let shared = pairs.take_while(|(ours, theirs)| ours == theirs).count();
        self.session.truncate(shared);
        self.session.append(&context[shared..])?;
        Ok(true)
    }
}

impl Drafter for ModelDrafter {
    fn draft(&mut self, context: &[u32], most: usize, draft: &mut Draft) -> Result<()> {
        if context.is_empty() || !self.follow(context)? {
            return Ok(());
        }
        while draft.tokens.len() < most {
            let confidence = certainty(self.session.logits()?);
            let Next::Token(token) = self.session.next()? else { break };
            draft.push(token, confidence);
        }
        Ok(())
    }

    fn prepare(&mut self, context: &[u32]) -> Result<()> {
        self.follow(context).map(|_| ())
    }

    fn rewind(&mut self, len: usize) {
        self.session.truncate(len);
    }
}

/// The probability of the likeliest token. Only weighs whether to draft, so any `exp` will do.
fn certainty(logits: &[f32]) -> f32 {
    let top = logits.iter().fold(f32::NEG_INFINITY, |top, x| top.max(*x));
    1.0 / logits.iter().map(|x| (x - top).exp()).sum::<f32>()
}
