//! From logits to the distribution that the next token is drawn from.
//!
//! Plain sampling and the verifier both go through here: a verifier that processed logits in its own
//! way would check drafts against another distribution than the one it promises. Every step is in a
//! fixed order and in the library's own arithmetic, so a seed gives the same tokens on every device.
#![forbid(unsafe_code)]

pub use super::likeliest::greedy;
use super::likeliest::{Candidate, Search};
use super::random::Random;
use crate::error::{Error, Result};
use crate::kernel::Kernels;
use crate::kernel::scores::Scores;
use std::fmt;
use std::sync::Arc;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerConfig {
    /// Divides the logits before they become probabilities; 0 takes the largest logit.
    pub temperature: f32,
    /// Keep the `top_k` largest; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020); 1 keeps
    /// all.
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as probable as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// What tokens pay for having been used already; applied before everything else, also when greedy.
    pub penalties: Penalties,
    /// Where the random numbers start.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            penalties: Penalties::default(),
            seed: 0,
        }
    }
}

/// What tokens pay for having been used already.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalties {
    /// Divides a used token's logit when positive and multiplies it otherwise (Keskar et al. 2019);
    /// 1 does nothing.
    pub repeat: f32,
    /// Taken from a used token's logit for every use.
    pub frequency: f32,
    /// Taken from a used token's logit once.
    pub presence: f32,
    /// How many of the last tokens count as used; 0 for all of them.
    pub window: usize,
}

impl Default for Penalties {
    fn default() -> Self {
        Self { repeat: 1.0, frequency: 0.0, presence: 0.0, window: 0 }
    }
}

impl Penalties {
    fn are_off(&self) -> bool {
        self.repeat == 1.0 && self.frequency == 0.0 && self.presence == 0.0
    }
}

impl SamplerConfig {
    /// Always the likeliest token, the lowest id on ties.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether no random number is needed.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether every setting is in its range.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the setting.
    pub fn check(&self) -> Result<()> {
        let settings = [
            ("temperature", self.temperature, 0.0, 1e6),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("penalties.repeat", self.penalties.repeat, 1e-3, 1e3),
            ("penalties.frequency", self.penalties.frequency, -1e3, 1e3),
            ("penalties.presence", self.penalties.presence, -1e3, 1e3),
        ];
        for (name, value, low, high) in settings {
            if !(value >= low && value <= high) {
                return Err(Error::InvalidArgument(format!(
                    "{name} is {value}: must be {low} to {high}"
                )));
            }
        }
        Ok(())
    }
}

/// The tokens before the one to be chosen, oldest first, in two parts: those that are settled, and
/// drafts that are taken for settled.
#[derive(Clone, Copy, Debug, Default)]
pub struct History<'a> {
    /// The sequence.
    pub settled: &'a [u32],
    /// Drafts that follow it.
    pub drafted: &'a [u32],
}

/// A host's own change to logits, made before all settings: a bias, the mask of a grammar, a token that
/// must come. Every distribution that stands for the same text needs the same hook: a verifier's, plain
/// sampling's and, so that it drafts what can be accepted, a drafter's.
///
/// What it does may depend on the tokens before and on nothing else. It is asked about futures that
/// do not come to pass, and about the same one more than once.
#[derive(Clone)]
pub struct Hook(Arc<Change>);

type Change = dyn Fn(History<'_>, &mut [f32]) + Send + Sync;

impl Hook {
    /// A hook that calls `change` with the tokens before and the logits of the next one.
    pub fn new(change: impl Fn(History<'_>, &mut [f32]) + Send + Sync + 'static) -> Self {
        Self(Arc::new(change))
    }

    /// A hook that adds to the logits of these tokens.
    #[must_use]
    pub fn bias(entries: Vec<(u32, f32)>) -> Self {
        Self::new(move |_, logits| {
            for (token, bias) in &entries {
                if let Some(logit) = logits.get_mut(*token as usize) {
                    *logit += bias;
                }
            }
        })
    }

    /// This change, and then that of `next`.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        Self::new(move |history, logits| {
            self.0(history, logits);
            next.0(history, logits);
        })
    }
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}

/// A distribution over the tokens that the settings leave, likeliest first, and its buffers.
#[derive(Clone, Debug, Default)]
pub struct Distribution {
    hook: Option<Hook>,
    candidates: Vec<Candidate>,
    weights: Vec<f32>,
    search: Search,
    changed: Vec<f32>,
    used: Vec<u32>,
}

impl Distribution {
    /// The most bytes that the buffers of a distribution over `vocab` tokens come to.
    #[must_use]
    pub const fn most_bytes(vocab: usize) -> usize {
        vocab * (size_of::<Candidate>() + 2 * size_of::<f32>()) + Search::most_bytes(vocab)
    }

    /// Logits go through `hook` first from now on, or through none.
    pub fn set_hook(&mut self, hook: Option<Hook>) {
        self.hook = hook;
    }

    /// The hook, if there is one.
    #[must_use]
    pub fn hook(&self) -> Option<&Hook> {
        self.hook.as_ref()
    }

    /// One step of plain sampling: the token after `history`, whose logits are `scores`; nothing when no
    /// logit is above minus infinity. A NaN is never chosen. Takes one random number, whatever is
    /// decided, so that seeds stay comparable, and none when greedy.
    pub fn choose(
        &mut self,
        kernels: &Kernels,
        config: &SamplerConfig,
        scores: Scores<'_>,
        history: History<'_>,
        random: &mut Random,
    ) -> Option<u32> {
        let unit = if config.is_greedy() { 0.0 } else { random.unit() };
        self.fill(kernels, config, scores, history);
        self.draw(unit)
    }

    /// Becomes what `config` makes of `scores`, one row, after `history`: all weight on one token when greedy or
    /// when a logit is plus infinity; empty when no logit is above minus infinity.
    pub fn fill(
        &mut self,
        kernels: &Kernels,
        config: &SamplerConfig,
        scores: Scores<'_>,
        history: History<'_>,
    ) {
        if config.penalties.are_off() && self.hook.is_none() {
            self.process(kernels, config, scores);
        } else {
            let mut changed = std::mem::take(&mut self.changed);
            changed.clear();
            changed.extend_from_slice(scores.logits);
            if let Some(Hook(change)) = &self.hook {
                change(history, &mut changed);
            }
            if !config.penalties.are_off() {
                self.punish(&config.penalties, history, &mut changed);
            }
            self.process(kernels, config, changed[..].into());
            self.changed = changed;
        }
    }

    /// The probability of a token, linear in the number of candidates.
    #[must_use]
    pub fn probability(&self, token: u32) -> f32 {
        self.entries().find(|entry| entry.0 == token).map_or(0.0, |entry| entry.1)
    }

    /// Tokens and their probabilities.
    pub fn entries(&self) -> impl Iterator<Item = (u32, f32)> {
        self.candidates.iter().zip(&self.weights).map(|((_, id), weight)| (*id, *weight))
    }

    /// The token at `unit`, from 0 to 1, of the distribution; nothing when it is empty.
    #[must_use]
    pub fn draw(&self, unit: f32) -> Option<u32> {
        let mut left = unit;
        for (id, weight) in self.entries() {
            left -= weight;
            if left < 0.0 {
                return Some(id);
            }
        }
        // The weights add up to a little less than one.
        self.entries().filter(|(_, weight)| *weight > 0.0).last().map(|(id, _)| id)
    }

    /// Takes `draft(token)` from every probability, keeps what is positive and scales it to one: the
    /// residual distribution. Unchanged when nothing is left, which only rounding can bring about.
    pub(super) fn subtract(&mut self, draft: impl Fn(u32) -> f64) {
        let residual = |id: u32, weight: f32| (f64::from(weight) - draft(id)).max(0.0);
        let total: f64 = self.entries().map(|(id, weight)| residual(id, weight)).sum();
        if total > 1e-12 {
            for ((_, id), weight) in self.candidates.iter().zip(&mut self.weights) {
                *weight = (residual(*id, *weight) / total) as f32;
            }
        }
    }

    fn process(&mut self, kernels: &Kernels, config: &SamplerConfig, scores: Scores<'_>) {
        if config.is_greedy() {
            self.candidates.clear();
            self.candidates.extend(greedy(scores).map(|id| (scores.logits[id as usize], id)));
        } else {
            self.search.likeliest(scores, config.top_k, &mut self.candidates);
        }
        let infinite = self.candidates.first().is_some_and(|best| best.0 == f32::INFINITY);
        if infinite || config.is_greedy() {
            self.candidates.truncate(1);
            self.weights.clear();
            self.weights.resize(self.candidates.len(), 1.0);
        } else {
            self.cut_by_probability(kernels, config);
            self.weigh(kernels, config.temperature);
        }
    }

    fn punish(&mut self, penalties: &Penalties, history: History<'_>, logits: &mut [f32]) {
        let window = if penalties.window == 0 { usize::MAX } else { penalties.window };
        let latest_first = history.drafted.iter().rev().chain(history.settled.iter().rev());
        self.used.clear();
        self.used.extend(latest_first.take(window));
        self.used.sort_unstable();
        for uses in self.used.chunk_by(|a, b| a == b) {
            let Some(logit) = logits.get_mut(uses[0] as usize) else { continue };
            let repeat = if *logit > 0.0 { 1.0 / penalties.repeat } else { penalties.repeat };
            *logit =
                *logit * repeat - (uses.len() as f32 * penalties.frequency + penalties.presence);
        }
    }

    /// Applies top-p, then min-p, both to the probabilities at temperature one.
    fn cut_by_probability(&mut self, kernels: &Kernels, config: &SamplerConfig) {
        if config.top_p >= 1.0 && config.min_p <= 0.0 {
            return;
        }
        self.weigh(kernels, 1.0);
        let mut total = 0.0;
        let floor = self.weights.first().map_or(0.0, |best| best * config.min_p);
        let mut keep = 0;
        for weight in &self.weights {
            if keep > 0 && (total >= config.top_p || *weight < floor) {
                break;
            }
            total += weight;
            keep += 1;
        }
        self.candidates.truncate(keep);
    }

    /// Sets `weights` to the probabilities of the candidates.
    fn weigh(&mut self, kernels: &Kernels, temperature: f32) {
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(|(logit, _)| logit / temperature));
        kernels.softmax(&mut self.weights);
    }
}
