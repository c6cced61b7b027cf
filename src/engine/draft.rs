//! A smaller model as a drafter, with a session of its own that follows the target's.
//!
//! It chooses as the target will: with the same settings, penalties, hook and random numbers, from its
//! own logits. Its drafts are deterministic nevertheless, so they leave the target's tokens as they are,
//! seed for seed.
#![forbid(unsafe_code)]

use super::load::Model;
use super::session::{Session, SessionConfig};
use super::translate::Translation;
use crate::error::Result;
use crate::spec::control::MOST_DRAFTS;
use crate::spec::distribution::{Distribution, History, SamplerConfig};
use crate::spec::draft::{Draft, Drafter, Request};
use std::sync::Arc;

/// Tokens that a drafter which has fallen behind makes good before a draft. A whole context would cost
/// more than looking whether drafts pay again is worth; the last tokens foretell nearly as much.
const GLANCE: usize = 32;

/// Tokens that it is behind in the ordinary course of things.
const ROUTINE: usize = 2;

/// A model that drafts.
pub struct ModelDrafter {
    session: Session,
    translation: Translation,
    distribution: Distribution,
    odds: Vec<f32>,
    /// How many tokens of the context, but for the first, the session has left out.
    skipped: usize,
}

impl ModelDrafter {
    /// A drafter for `target`. Its vocabulary is that of the target, or one with many tokens in common:
    /// these are drafted, and the others of the context are spelled in the drafter's tokens.
    ///
    /// # Errors
    /// [`crate::Error::InvalidArgument`] when the vocabularies cannot be compared or have too little in common; as
    /// [`Session::new`].
    pub fn new(model: Arc<Model>, target: &Model) -> Result<Self> {
        let translation = Translation::new(target, &model)?;
        let config = SessionConfig { sampler: SamplerConfig::greedy(), ..Default::default() };
        Ok(Self {
            session: Session::new(model, &config)?,
            translation,
            distribution: Distribution::default(),
            odds: Vec::new(),
            skipped: 0,
        })
    }

    /// Makes the session hold `context`, or so much of its end as it can and `whole` asks for.
    fn follow(&mut self, context: &[u32], whole: bool) -> Result<()> {
        self.translation.follow(context);
        let goal = self.translation.translated();
        let limit = self.session.context();
        let room = MOST_DRAFTS.min(limit / 2);
        let fits = |skipped: usize| goal.len() - skipped + room <= limit;
        // The first token stays: models lean on it (Xiao et al. 2023).
        let wanted = |skipped: usize| {
            let first = goal[..goal.len().min(1)].iter();
            first.chain(goal.iter().skip(skipped + 1))
        };
        let held = |session: &Session, skipped: usize| {
            let pairs = session.tokens().iter().zip(wanted(skipped));
            pairs.take_while(|(ours, theirs)| ours == theirs).count()
        };
        let behind = |session: &Session, skipped: usize| {
            (goal.len() - skipped).saturating_sub(held(session, skipped))
        };
        let mut skipped = self.skipped.min(goal.len().saturating_sub(1));
        let seen = self.session.tokens().len();
        if skipped > 0 && fits(0) && (whole || seen >= skipped + GLANCE) {
            // As much has been drafted from a part of the context as the whole of it costs.
            skipped = 0;
        } else if !whole && behind(&self.session, skipped) > GLANCE {
            skipped = goal.len().saturating_sub(GLANCE);
        }
        if !fits(skipped) {
            skipped = goal.len() - limit / 2;
        }
        let shared = held(&self.session, skipped);
        let missing: Vec<u32> = wanted(skipped).skip(shared).copied().collect();
        self.session.truncate(shared);
        self.skipped = skipped;
        self.session.append(&missing)
    }

    /// The probability of the likeliest token.
    fn certainty(&mut self) -> Result<f32> {
        self.odds.clear();
        self.odds.extend_from_slice(self.session.logits()?);
        self.session.model().runtime().kernels().softmax(&mut self.odds);
        Ok(self.odds.iter().fold(0.0, |top, p| top.max(*p)))
    }
}

impl Drafter for ModelDrafter {
    fn draft(&mut self, request: &Request<'_>, draft: &mut Draft) -> Result<()> {
        self.follow(request.context, false)?;
        let mut random = request.random;
        // In other tokens the settings of the target mean something else.
        let same = self.translation.is_identity();
        let sampler = if same { *request.sampler } else { SamplerConfig::greedy() };
        self.distribution.set_hook(request.hook.filter(|_| same).cloned());
        while draft.tokens.len() < request.most {
            if self.session.tokens().is_empty()
                || self.session.tokens().len() == self.session.context()
            {
                break;
            }
            let model = Arc::clone(self.session.model());
            let kernels = model.runtime().kernels();
            let sure = if sampler.is_greedy() { Some(self.certainty()?) } else { None };
            let history = History { settled: request.context, drafted: &draft.tokens };
            let (scores, distribution) = (self.session.scores()?, &mut self.distribution);
            let chosen = distribution.choose(kernels, &sampler, scores, history, &mut random);
            let Some(ours) = chosen else { break };
            let Some(token) = self.translation.to_target(ours) else { break };
            draft.push(token, sure.unwrap_or_else(|| self.distribution.probability(ours)));
            if !(request.go_on)(&draft.confidence) {
                break;
            }
            self.session.push(ours)?;
        }
        Ok(())
    }

    fn prepare(&mut self, context: &[u32], whole: bool) -> Result<()> {
        let held = self.session.tokens().len() + self.skipped;
        if !whole && held + ROUTINE >= context.len() {
            // Better in one pass with the tokens that come next.
            return Ok(());
        }
        self.follow(context, whole)
    }

    fn rewind(&mut self, _len: usize) {
        // The next context tells.
    }
}
