//! Speculation: a session whose tokens come several at a time where drafts foretell them.
//!
//! The tokens, and what ends them, are exactly those of [`Session::next`] alone, greedy or with a seed:
//! rows of one pass have the bits of single passes, and deterministic drafts take the random numbers of
//! plain sampling. Drafts therefore change the time a text takes and nothing else; the controller
//! sees to it that it is not more.
#![forbid(unsafe_code)]

use super::load::Model;
use super::session::{Next, Session};
use crate::error::{Error, Result};
use crate::model::forward::Scratch;
use crate::spec::control::{Controller, MOST_DRAFTS};
use crate::spec::draft::{Draft, Drafter, Request};
use crate::spec::tree::Drafts;
use crate::spec::verify::{Round, Verifier};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// A session that may have a drafter.
pub struct Speculator {
    session: Session,
    source: Option<Source>,
    /// Outcomes of the last round that have not been asked for yet; the session is ahead by them.
    queue: VecDeque<Next>,
}

/// A drafter and what verifying its drafts takes.
struct Source {
    drafter: Box<dyn Drafter>,
    controller: Controller,
    verifier: Verifier,
    scratch: Scratch,
    draft: Draft,
}

impl Speculator {
    /// Speculates on `session`, which may already hold tokens.
    ///
    /// # Errors
    /// As [`Speculator::attach`].
    pub fn new(
        session: Session,
        drafter: Box<dyn Drafter>,
        controller: Controller,
    ) -> Result<Self> {
        let mut speculator = Self::plain(session);
        speculator.attach(drafter, controller)?;
        Ok(speculator)
    }

    /// `session` without a drafter.
    #[must_use]
    pub fn plain(session: Session) -> Self {
        Self { session, source: None, queue: VecDeque::new() }
    }

    /// Drafts with `drafter` from now on, instead of the one before if there was one.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what the drafter says to the tokens of the session. The session goes on
    /// as before then.
    pub fn attach(&mut self, mut drafter: Box<dyn Drafter>, controller: Controller) -> Result<()> {
        let (model, rows) = (self.session.model(), MOST_DRAFTS + 1);
        let chunk = (rows, self.session.context());
        let scratch = Scratch::new(model.config(), model.weights(), chunk, rows)?;
        drafter.prepare(self.tokens(), true)?;
        let (verifier, draft) = (Verifier::default(), Draft::default());
        self.source = Some(Source { drafter, controller, verifier, scratch, draft });
        Ok(())
    }

    /// Goes on without a drafter.
    pub fn detach(&mut self) {
        self.source = None;
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        self.session.model()
    }

    /// The tokens of the sequence so far: those that [`Speculator::next`] has given out.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        let tokens = self.session.tokens();
        &tokens[..tokens.len() - self.unseen()]
    }

    /// The session, holding what has been given out and nothing beyond: to fork, save or restore it.
    pub fn settled(&mut self) -> &mut Session {
        self.take_back();
        if let Some(source) = &mut self.source {
            // Whatever the caller makes of it.
            source.drafter.rewind(0);
        }
        &mut self.session
    }

    /// The controller of the drafter, for its figures and its limit.
    pub fn controller(&mut self) -> Option<&mut Controller> {
        self.source.as_mut().map(|source| &mut source.controller)
    }

    /// Bytes of KV blocks, and of all other buffers; without the drafter's.
    #[must_use]
    pub fn bytes(&self) -> (usize, usize) {
        let (blocks, other) = self.session.bytes();
        (blocks, other + self.source.as_ref().map_or(0, |source| source.scratch.bytes()))
    }

    /// As [`Session::append`].
    ///
    /// # Errors
    /// As [`Session::append`]; what the drafter says to it.
    pub fn append(&mut self, tokens: &[u32]) -> Result<()> {
        self.take_back();
        self.session.append(tokens)?;
        match &mut self.source {
            Some(source) if source.controller.metrics().limit > 0 => {
                source.drafter.prepare(self.session.tokens(), true)
            }
            _ => Ok(()),
        }
    }

    /// As [`Session::truncate`].
    pub fn truncate(&mut self, len: usize) {
        self.take_back();
        self.session.truncate(len);
        if let Some(source) = &mut self.source {
            source.drafter.rewind(self.session.tokens().len());
        }
    }

    /// As [`Session::reset`].
    pub fn reset(&mut self) {
        self.truncate(0);
        self.session.reset();
    }

    /// As [`Session::logits`].
    ///
    /// # Errors
    /// As [`Session::logits`].
    pub fn logits(&mut self) -> Result<&[f32]> {
        self.take_back();
        self.session.logits()
    }

    /// As [`Session::next`]: the same tokens, each of them once.
    ///
    /// # Errors
    /// As [`Session::next`]; what stops the drafter. Nothing has changed then.
    #[expect(clippy::should_implement_trait, reason = "as Session::next")]
    pub fn next(&mut self) -> Result<Next> {
        if let Some(next) = self.queue.pop_front() {
            return Ok(next);
        }
        match &mut self.source {
            // Only then does a pass go over the last token, and its time is that of one row.
            Some(source) if self.session.is_one_ahead() => {
                source.round(&mut self.session, &mut self.queue)
            }
            _ => self.session.next(),
        }
    }

    /// Tokens that the session holds and nobody has been given.
    fn unseen(&self) -> usize {
        self.queue.iter().filter(|next| matches!(next, Next::Token(_))).count()
    }

    /// Undoes what has not been given out, as if it had never been chosen.
    fn take_back(&mut self) {
        if self.queue.is_empty() {
            return;
        }
        let len = self.tokens().len();
        self.session.truncate(len);
        let sampler = self.session.sampler();
        if !sampler.config().is_greedy() {
            // Every outcome took one number.
            sampler.random().rewind(self.queue.len());
        }
        self.queue.clear();
    }
}

impl Source {
    /// Drafts, verifies and queues what comes out but for the first outcome, which it returns.
    fn round(&mut self, session: &mut Session, queue: &mut VecDeque<Next>) -> Result<Next> {
        self.propose(session)?;
        let mut drafts = self.controller.choose(&self.draft.confidence);
        self.draft.truncate(drafts);
        let mut start = Instant::now();
        let verified = match drafts {
            0 => None,
            _ => match self.verify(session, queue) {
                // Room for the drafts is not needed to go on.
                Err(Error::OutOfMemory { .. } | Error::KvExhausted { .. }) => None,
                verified => Some(verified?),
            },
        };
        let (next, accepted) = match verified {
            Some(verified) => verified,
            None => {
                (drafts, start) = (0, Instant::now());
                self.draft.clear();
                (session.next()?, 0)
            }
        };
        self.controller.pass_took(drafts + 1, start.elapsed().as_secs_f64());
        self.controller.record(&self.draft.confidence, accepted);
        Ok(next)
    }

    /// Drafts as much as may be of use: no more than fits in the context, no token that ends the text
    /// and none that the target does not have.
    fn propose(&mut self, session: &mut Session) -> Result<()> {
        let Self { drafter, controller, draft, .. } = self;
        draft.clear();
        let room = (session.context() - session.tokens().len()).saturating_sub(1);
        let governed = (session.governed_drafts() * MOST_DRAFTS as f32).round() as usize;
        let most = controller.ask().min(room).min(governed);
        if most == 0 {
            return Ok(());
        }
        let random = *session.sampler().random();
        let sampler = *session.sampler().config();
        let hook = session.sampler().hook().cloned();
        let (context, start) = (session.tokens(), Instant::now());
        // What it has to make good after a time without drafts is not the cost of these.
        drafter.prepare(&context[..context.len() - 1], false)?;
        let prepared = start.elapsed();
        let request = Request {
            context,
            most,
            sampler: &sampler,
            hook: hook.as_ref(),
            random,
            go_on: &|confidence| controller.go_on(confidence),
        };
        drafter.draft(&request, draft)?;
        let drafted = start.elapsed() - prepared;
        controller.catch_up_took(prepared.as_secs_f64());
        controller.draft_took(draft.tokens.len(), drafted.as_secs_f64());
        draft.confidence.resize(draft.tokens.len(), 0.0);
        if (1..most).contains(&draft.tokens.len()) && !controller.go_on(&draft.confidence) {
            controller.stopped_early();
        }
        let model = session.model();
        let of_no_use =
            |token: &u32| *token as usize >= model.vocab() || model.eos().contains(token);
        let end = draft.tokens.iter().position(of_no_use).unwrap_or(draft.tokens.len());
        draft.truncate(end.min(most));
        Ok(())
    }

    /// Runs the drafts through the target and queues what comes out: its first outcome, and how many
    /// drafts were accepted.
    fn verify(
        &mut self,
        session: &mut Session,
        queue: &mut VecDeque<Next>,
    ) -> Result<(Next, usize)> {
        let drafts = &self.draft.tokens[..];
        let logits = session.look_ahead(&mut self.scratch, drafts)?;
        let model = Arc::clone(session.model());
        let vocab = model.vocab();
        let (config, mut random) = (*session.sampler().config(), *session.sampler().random());
        self.verifier.set_hook(session.sampler().hook().cloned());
        let round = Round {
            logits,
            vocab,
            drafts: Drafts::chain(drafts),
            probabilities: None,
            history: session.tokens(),
        };
        let verdict = self.verifier.verify(model.runtime().kernels(), &config, &round, &mut random);
        // All else has been checked: only logits can be at fault.
        let verdict = verdict.map_err(|_| session.damaged())?;
        *session.sampler().random() = random;
        let accepted = verdict.path.len();
        let row = &logits[accepted * vocab..][..vocab];
        let last = session.settle(&drafts[..accepted], verdict.next, row);
        queue.extend(drafts[..accepted].iter().map(|token| Next::Token(*token)));
        queue.push_back(last);
        let first = queue.pop_front().unwrap_or(last);
        Ok((first, accepted))
    }
}
