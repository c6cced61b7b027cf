//! Speculation: a session whose tokens come several at a time where drafts foretell them.
//!
//! The tokens, and what ends them, are exactly those of [`Session::next`] alone, greedy or with a seed:
//! rows of one pass have the bits of single passes, and deterministic drafts take the random numbers of
//! plain sampling. Drafts therefore change the time a text takes and nothing else; the controller
//! sees to it that it is not more.
#![forbid(unsafe_code)]

use super::session::{Next, Session};
use crate::error::Result;
use crate::model::forward::Scratch;
use crate::spec::control::{Controller, MOST_DRAFTS};
use crate::spec::draft::{Draft, Drafter};
use crate::spec::tree::Drafts;
use crate::spec::verify::{Round, Verifier};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// A session with a drafter.
pub struct Speculator {
    session: Session,
    drafter: Box<dyn Drafter>,
    controller: Controller,
    verifier: Verifier,
    scratch: Scratch,
    draft: Draft,
    /// Outcomes of the last round that have not been asked for yet; the session is ahead by them.
    queue: VecDeque<Next>,
}

impl Speculator {
    /// Speculates on `session`, which may already hold tokens.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; what the drafter says to the tokens of the session.
    pub fn new(
        session: Session,
        mut drafter: Box<dyn Drafter>,
        controller: Controller,
    ) -> Result<Self> {
        let (model, rows) = (session.model(), MOST_DRAFTS + 1);
        let chunk = (rows, session.context());
        let scratch = Scratch::new(model.config(), model.weights(), chunk, rows)?;
        drafter.prepare(session.tokens())?;
        Ok(Self {
            session,
            drafter,
            controller,
            verifier: Verifier::default(),
            scratch,
            draft: Draft::default(),
            queue: VecDeque::new(),
        })
    }

    /// The tokens of the sequence so far: those that [`Speculator::next`] has given out.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        let tokens = self.session.tokens();
        &tokens[..tokens.len() - self.unseen()]
    }

    /// The controller, for its figures and its limit.
    pub fn controller(&mut self) -> &mut Controller {
        &mut self.controller
    }

    /// Bytes of KV blocks, and of all other buffers; without the drafter's.
    #[must_use]
    pub fn bytes(&self) -> (usize, usize) {
        let (blocks, other) = self.session.bytes();
        (blocks, other + self.scratch.bytes())
    }

    /// As [`Session::append`].
    ///
    /// # Errors
    /// As [`Session::append`]; what the drafter says to it.
    pub fn append(&mut self, tokens: &[u32]) -> Result<()> {
        self.take_back();
        self.session.append(tokens)?;
        self.drafter.prepare(self.session.tokens())
    }

    /// As [`Session::truncate`].
    pub fn truncate(&mut self, len: usize) {
        self.take_back();
        self.session.truncate(len);
        self.drafter.rewind(len);
    }

    /// As [`Session::next`]: the same tokens, each of them once.
    ///
    /// # Errors
    /// As [`Session::next`]; what stops the drafter.
    #[expect(clippy::should_implement_trait, reason = "as Session::next")]
    pub fn next(&mut self) -> Result<Next> {
        if let Some(next) = self.queue.pop_front() {
            return Ok(next);
        }
        // Only then does a pass go over the last token, and its time is that of one row.
        let measured = self.session.is_one_ahead();
        if measured {
            self.propose()?;
        }
        let confidence = &self.draft.confidence;
        let drafts = if measured { self.controller.choose(confidence) } else { 0 };
        self.draft.truncate(drafts);
        let start = Instant::now();
        let (next, accepted) = if drafts == 0 { (self.session.next()?, 0) } else { self.verify()? };
        if measured {
            self.controller.pass_took(drafts + 1, start.elapsed().as_secs_f64());
            self.controller.record(&self.draft.confidence, accepted);
        }
        Ok(next)
    }

    /// Drafts as much as may be of use: no more than fits in the context, no token that ends the text
    /// and none that the target does not have.
    fn propose(&mut self) -> Result<()> {
        let session = &self.session;
        let room = (session.context() - session.tokens().len()).saturating_sub(1);
        let most = self.controller.ask().min(room);
        let draft = &mut self.draft;
        draft.clear();
        if most == 0 {
            return Ok(());
        }
        let tokens = session.tokens();
        // What it has to make good after a time without drafts is not the cost of these.
        self.drafter.prepare(&tokens[..tokens.len() - 1])?;
        let start = Instant::now();
        self.drafter.draft(tokens, most, draft)?;
        let model = session.model();
        let of_no_use =
            |token: &u32| *token as usize >= model.vocab() || model.eos().contains(token);
        let end = draft.tokens.iter().position(of_no_use).unwrap_or(draft.tokens.len());
        draft.truncate(end.min(most));
        draft.confidence.resize(draft.tokens.len(), 0.0);
        self.controller.draft_took(draft.tokens.len(), start.elapsed().as_secs_f64());
        Ok(())
    }

    /// Runs the drafts through the target and queues what comes out: its first outcome, and how many
    /// drafts were accepted.
    fn verify(&mut self) -> Result<(Next, usize)> {
        let (session, drafts) = (&mut self.session, &self.draft.tokens[..]);
        let logits = session.look_ahead(&mut self.scratch, drafts)?;
        let model = Arc::clone(session.model());
        let vocab = model.vocab();
        let (config, mut random) = (*session.sampler().config(), *session.sampler().random());
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
        self.queue.extend(drafts[..accepted].iter().map(|token| Next::Token(*token)));
        self.queue.push_back(last);
        let first = self.queue.pop_front().unwrap_or(last);
        Ok((first, accepted))
    }

    /// Tokens that the session holds and nobody has been given.
    fn unseen(&self) -> usize {
        self.queue.iter().filter(|next| matches!(next, Next::Token(_))).count()
    }

    /// Undoes what has not been given out, as if it had never been chosen.
    fn take_back(&mut self) {
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
