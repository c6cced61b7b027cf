//! Speculation: a session whose tokens come several at a time where drafts foretell them.
//!
//! The tokens, and what ends them, are exactly those of [`Session::next`] alone, greedy or with a seed:
//! rows of one pass have the bits of single passes, and deterministic drafts take the random numbers of
//! plain sampling. Drafts therefore change the time a text takes and nothing else; the controller
//! sees to it that it is not more.
#![forbid(unsafe_code)]

use super::draft::ModelDrafter;
use super::load::Model;
use super::pass::Canceller;
use super::session::batch::Batch;
use super::session::{Next, Session};
use crate::error::{Error, Result};
use crate::model::forward::Scratch;
use crate::spec::control::{Controller, MOST_DRAFTS};
use crate::spec::draft::{Draft, Drafter, Request};
use crate::spec::tree::Drafts;
use crate::spec::verify::{Round, Verifier};
use crate::text::logprobs::Logprobs;
use crate::text::sample::{Hook, SamplerConfig};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A session that may have a drafter.
pub struct Speculator {
    session: Session,
    source: Option<Source>,
    /// Outcomes of the last round that have not been asked for yet; the session is ahead by them.
    queue: VecDeque<Outcome>,
    /// How many of the likeliest tokens to report; none when logarithms were not asked for.
    logprobs: Option<usize>,
    /// The last token and what the model thought of it.
    last: Option<(u32, Logprobs)>,
    metrics: Metrics,
    /// What goes on where it is too hot for the model.
    small: Option<Small>,
    /// When the text began that the next token answers.
    turn: Option<Instant>,
}

/// A smaller model that stands in for the session's own under heat.
struct Small {
    drafter: Box<dyn Drafter>,
    draft: Draft,
    /// Tokens that it has made.
    tokens: u64,
}

/// What a call of [`Speculator::next`] is going to say.
struct Outcome {
    next: Next,
    logprobs: Option<(u32, Logprobs)>,
}

/// What a session has done since it began, and how long it took. Times are those that a caller waits, rests
/// of the governor and waiting for weights included.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Tokens appended.
    pub prompt_tokens: u64,
    /// Of these, and of tokens that were run again, those found in the cache.
    pub reused_tokens: u64,
    /// Time in [`Speculator::append`].
    pub prompt_time: Duration,
    /// From the beginning of the last append to the token after it; none before the first one.
    pub first_token: Option<Duration>,
    /// Tokens made, but for those that came right after an append and took no pass.
    pub decoded_tokens: u64,
    /// The time for these.
    pub decode_time: Duration,
}

impl Metrics {
    /// Appended tokens a second; 0 before any.
    #[must_use]
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_time)
    }

    /// Generated tokens a second; 0 before any.
    #[must_use]
    pub fn decode_rate(&self) -> f64 {
        rate(self.decoded_tokens, self.decode_time)
    }
}

fn rate(tokens: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
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
        Self {
            session,
            source: None,
            queue: VecDeque::new(),
            logprobs: None,
            last: None,
            metrics: Metrics::default(),
            small: None,
            turn: None,
        }
    }

    /// Drafts with `drafter` from now on, instead of the one before if there was one.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what the drafter says to the tokens of the session. The session goes on
    /// as before then.
    pub fn attach(&mut self, mut drafter: Box<dyn Drafter>, controller: Controller) -> Result<()> {
        let (model, rows) = (self.session.model(), MOST_DRAFTS + 1);
        let chunk = (rows, self.session.context());
        let scratch = Scratch::new(model.config(), &model.weights().needs(), chunk, rows)?;
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

    /// As [`Session::canceller`].
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.session.canceller()
    }

    /// The tokens of the sequence so far: those that [`Speculator::next`] has given out.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        let tokens = self.session.tokens();
        &tokens[..tokens.len() - self.unseen()]
    }

    /// Tokens it can hold.
    #[must_use]
    pub fn context(&self) -> usize {
        self.session.context()
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
        let start = Instant::now();
        self.session.append(tokens)?;
        self.metrics.prompt_tokens += tokens.len() as u64;
        self.metrics.prompt_time += start.elapsed();
        self.turn.get_or_insert(start);
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
        let start = Instant::now();
        let Outcome { next, logprobs } = self.outcome()?;
        self.last = logprobs;
        if let Some(turn) = self.turn.take() {
            self.metrics.first_token = Some(turn.elapsed());
        } else if matches!(next, Next::Token(_)) {
            self.metrics.decoded_tokens += 1;
            self.metrics.decode_time += start.elapsed();
        }
        Ok(next)
    }

    /// As [`Batch::new`].
    ///
    /// # Errors
    /// As [`Batch::new`].
    pub fn batch(&self, most: usize) -> Result<Batch> {
        Batch::new(&self.session, most)
    }

    /// As [`Batch::decode`]: each next call of [`Speculator::next`] then chooses without a pass of its own, and so
    /// without drafts. A session whose next token is drawn already, or is the smaller model's, computes nothing.
    ///
    /// # Errors
    /// As [`Batch::decode`].
    pub fn decode_batch(batch: &mut Batch, sessions: &mut [&mut Self]) -> Result<usize> {
        let start = Instant::now();
        let mut joining: Vec<_> = sessions
            .iter_mut()
            .filter(|session| session.queue.is_empty() && !session.is_small_models_turn())
            .collect();
        let behind: Vec<_> = joining.iter().map(|it| it.session.is_one_ahead()).collect();
        let mut inner: Vec<_> = joining.iter_mut().map(|it| &mut it.session).collect();
        let computed = batch.decode(&mut inner)?;
        for (session, behind) in joining.into_iter().zip(behind) {
            if behind && !session.session.is_one_ahead() {
                session.metrics.decode_time += start.elapsed();
            }
        }
        Ok(computed)
    }

    /// Whether heat has the smaller model go on.
    fn is_small_models_turn(&self) -> bool {
        self.small.is_some() && self.session.model().runtime().governor().small_model()
    }

    fn outcome(&mut self) -> Result<Outcome> {
        if let Some(outcome) = self.queue.pop_front() {
            return Ok(outcome);
        }
        if self.is_small_models_turn()
            && let Some(small) = &mut self.small
            && let Some(next) = small.next(&mut self.session)?
        {
            return Ok(Outcome { next, logprobs: None });
        }
        match &mut self.source {
            // Only then does a pass go over the last token, and its time is that of one row.
            Some(source) if self.session.is_one_ahead() => {
                source.round(&mut self.session, &mut self.queue, self.logprobs)
            }
            _ => plain(&mut self.session, self.logprobs),
        }
    }

    /// Names a model that goes on in place of the session's own while it is so hot that the governor asks for
    /// it, or none. Its tokens are its own and not those of the session's model, which sees them as if they
    /// had been appended when it is cool again; without a small model heat slows a session down and
    /// changes no token. Where [`Speculator::attach`] has the same model as a drafter, this is drafting
    /// without verifying.
    ///
    /// # Errors
    /// As [`ModelDrafter::new`].
    pub fn set_small_model(&mut self, model: Option<Arc<Model>>) -> Result<()> {
        let drafter = match model {
            None => None,
            Some(model) => Some(ModelDrafter::new(model, self.session.model())?),
        };
        self.take_back();
        self.small = drafter.map(|drafter| Small {
            drafter: Box::new(drafter),
            draft: Draft::default(),
            tokens: 0,
        });
        if self.small.is_some() {
            self.session.model().runtime().governor().set_small_model(true);
        }
        Ok(())
    }

    /// Tokens that the smaller model has made.
    #[must_use]
    pub fn small_model_tokens(&self) -> u64 {
        self.small.as_ref().map_or(0, |small| small.tokens)
    }

    /// From the next token on, [`Speculator::logprobs`] tells how probable it was and which `most` tokens were
    /// the likeliest; with `None` it does not.
    pub fn report_logprobs(&mut self, most: Option<usize>) {
        self.take_back();
        self.logprobs = most;
        self.last = None;
    }

    /// The token of the last outcome and what the model itself thought of it. None when that was not asked for,
    /// where the context was full, and for tokens of the smaller model.
    #[must_use]
    pub fn logprobs(&self) -> Option<(u32, &Logprobs)> {
        self.last.as_ref().map(|(token, logprobs)| (*token, logprobs))
    }

    /// As [`Session::set_logits_hook`], from the next token on.
    pub fn set_logits_hook(&mut self, hook: Option<Hook>) {
        self.take_back();
        self.session.set_logits_hook(hook);
    }

    /// As [`Session::set_logit_bias`], from the next token on.
    ///
    /// # Errors
    /// As [`Session::set_logit_bias`].
    pub fn set_logit_bias(&mut self, entries: &[(u32, f32)]) -> Result<()> {
        self.take_back();
        self.session.set_logit_bias(entries)
    }

    /// A session with the same tokens and settings, without the drafter and the smaller model.
    ///
    /// # Errors
    /// As [`Session::fork`].
    pub fn fork(&mut self) -> Result<Self> {
        let fork = self.settled().fork()?;
        Ok(Self { logprobs: self.logprobs, ..Self::plain(fork) })
    }

    /// As [`Session::set_sampler`], from the next token on.
    ///
    /// # Errors
    /// As [`Session::set_sampler`].
    pub fn set_sampler(&mut self, config: SamplerConfig) -> Result<()> {
        config.check()?;
        // Under the settings that they were drawn with.
        self.take_back();
        self.session.set_sampler(config)
    }

    /// What the session has done so far.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        Metrics { reused_tokens: self.session.reused(), ..self.metrics }
    }

    /// Tokens that the session holds and nobody has been given.
    fn unseen(&self) -> usize {
        self.queue.iter().filter(|outcome| matches!(outcome.next, Next::Token(_))).count()
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

impl Small {
    /// A token of the smaller model, which the session takes for its own; none when it has nothing to say.
    fn next(&mut self, session: &mut Session) -> Result<Option<Next>> {
        session.check(&[])?;
        // Tells an empty or a full session what it is told without a smaller model.
        if session.tokens().is_empty() || session.tokens().len() == session.context() {
            return Ok(None);
        }
        session.canceller().check()?;
        self.draft.clear();
        let (random, sampler) = (*session.sampler().random(), *session.sampler().config());
        let hook = session.sampler().hook().cloned();
        let request = Request {
            context: session.tokens(),
            most: 1,
            sampler: &sampler,
            hook: hook.as_ref(),
            random,
            go_on: &|_| false,
        };
        self.drafter.draft(&request, &mut self.draft)?;
        let vocab = session.model().vocab();
        let made = self.draft.tokens.first().filter(|token| (**token as usize) < vocab);
        let Some(token) = made.copied() else { return Ok(None) };
        if !sampler.is_greedy() {
            // As every token takes one.
            session.sampler().random().unit();
        }
        self.tokens += 1;
        Ok(Some(session.take(token)))
    }
}

impl Source {
    /// Drafts, verifies and queues what comes out but for the first outcome, which it returns.
    fn round(
        &mut self,
        session: &mut Session,
        queue: &mut VecDeque<Outcome>,
        logprobs: Option<usize>,
    ) -> Result<Outcome> {
        self.propose(session)?;
        let mut drafts = self.controller.choose(&self.draft.confidence);
        self.draft.truncate(drafts);
        let mut start = Instant::now();
        let verified = match drafts {
            0 => None,
            _ => match self.verify(session, queue, logprobs) {
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
                (plain(session, logprobs)?, 0)
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
        queue: &mut VecDeque<Outcome>,
        logprobs: Option<usize>,
    ) -> Result<(Outcome, usize)> {
        let drafts = &self.draft.tokens[..];
        let scores = session.look_ahead(&mut self.scratch, drafts)?;
        let model = Arc::clone(session.model());
        let vocab = model.vocab();
        let (config, mut random) = (*session.sampler().config(), *session.sampler().random());
        self.verifier.set_hook(session.sampler().hook().cloned());
        let round = Round {
            scores,
            vocab,
            drafts: Drafts::chain(drafts),
            probabilities: None,
            history: session.tokens(),
        };
        let kernels = model.runtime().kernels();
        let verdict = self.verifier.verify(kernels, &config, &round, &mut random);
        // All else has been checked: only logits can be at fault.
        let verdict = verdict.map_err(|_| session.no_choice())?;
        *session.sampler().random() = random;
        let accepted = verdict.path.len();
        let rows = scores.logits.chunks_exact(vocab);
        for (token, row) in drafts[..accepted].iter().zip(rows) {
            let of = |most| (*token, Logprobs::of(kernels, row, *token, most));
            let logprobs = logprobs.map(of);
            queue.push_back(Outcome { next: Next::Token(*token), logprobs });
        }
        let row = scores.row(accepted, vocab);
        let last = session.settle(&drafts[..accepted], verdict.next, row);
        let last = with_logprobs(session, last, logprobs);
        // The first one is given out now.
        queue.push_back(last);
        let first = queue.pop_front();
        first.map(|first| (first, accepted)).ok_or_else(|| Error::Internal("an empty queue".into()))
    }
}

/// A token without drafts.
fn plain(session: &mut Session, logprobs: Option<usize>) -> Result<Outcome> {
    let next = session.next()?;
    Ok(with_logprobs(session, next, logprobs))
}

/// What was last chosen in `session`, with its logarithms if they are asked for.
fn with_logprobs(session: &Session, next: Next, most: Option<usize>) -> Outcome {
    let token = match next {
        Next::Token(token) | Next::End(token) => Some(token),
        Next::ContextFull => None,
    };
    let kernels = session.model().runtime().kernels();
    let logprobs = token.zip(most);
    let of = |(token, most)| (token, Logprobs::of(kernels, session.chosen_from(), token, most));
    Outcome { next, logprobs: logprobs.map(of) }
}
