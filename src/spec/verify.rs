//! The verifier: which drafts stand, and which token comes after them.
//!
//! What comes out is distributed exactly as if the target model had been sampled alone, with the same
//! settings. Drafts come in two kinds.
//!
//! **Deterministic** (greedy, looked up, from a callback): the target's token is drawn as plain sampling
//! would and the drafts are followed for as long as they foretold it. A draft `d` is then accepted with
//! probability `p(d)`, as rejection sampling with all of the draft's weight on `d` would, and beyond
//! that the random numbers are those of plain sampling: the same seed gives the same tokens with any
//! drafts or none. Greedy targets go this way whatever the drafts are.
//!
//! **Drawn** from probabilities `q`: rejection sampling (Leviathan et al. 2211.17192, Chen et al.
//! 2302.01318). A draft is accepted with probability `min(1, p/q)`; in its place comes a token of the
//! residual distribution `max(p - q, 0)`. Alternatives in a tree are drawn without replacement and
//! tried in order, with `q` and `p` brought up to date after each (SpecInfer 2305.09781, Sequoia
//! 2402.12374).
//!
//! Past the last accepted draft the target's own distribution gives one more token.
#![forbid(unsafe_code)]

use super::distribution::{Distribution, History, Hook, SamplerConfig};
use super::random::Random;
use super::tree::Drafts;
use crate::error::{Error, Result};
use crate::kernel::Kernels;
use crate::kernel::scores::{BLOCK, Scores};

/// What the target and the drafter have said.
#[derive(Clone, Copy, Debug)]
pub struct Round<'a> {
    /// The target's logits, `[rows][vocab]`: row 0 after the last settled token, row `i + 1` after
    /// draft `i` and its ancestors.
    pub scores: Scores<'a>,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// What was drafted.
    pub drafts: Drafts<'a>,
    /// The distributions that the drafts were drawn from, `[drafts][vocab]`: row `r` is what the
    /// children of row `r` were drawn from, after all of the drafter's own processing, before any
    /// child was taken out; rows without children are not read. None for deterministic drafts.
    pub probabilities: Option<&'a [f32]>,
    /// The settled tokens, for penalties; may be empty when there are none.
    pub history: &'a [u32],
}

/// What a verification came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Rows of the accepted drafts, each the parent of the one after it.
    pub path: Vec<u32>,
    /// The token after them, of which the target has not seen anything yet.
    pub next: u32,
}

/// The verifier and its buffers.
#[derive(Debug, Default)]
pub struct Verifier {
    distribution: Distribution,
    accepted: Vec<u32>,
}

impl Verifier {
    /// The target's logits go through `hook` first from now on, with the accepted drafts in the history,
    /// or through none.
    pub fn set_hook(&mut self, hook: Option<Hook>) {
        self.distribution.set_hook(hook);
    }

    /// Decides over one round.
    ///
    /// Takes from `random`: nothing when greedy; for deterministic drafts one number for every token
    /// that comes out, accepted or new, as plain sampling does; for drawn drafts one for every draft
    /// that is tried and one for the new token. A NaN logit is a token that cannot be chosen. `seed` of
    /// `config` is not used.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], and `random` is as before, when lengths do not fit, a draft is
    /// outside the vocabulary, a setting is out of range, logits that are needed hold no number above
    /// minus infinity, or probabilities are needed that are no distribution or could not have given
    /// their draft.
    pub fn verify(
        &mut self,
        kernels: &Kernels,
        config: &SamplerConfig,
        round: &Round<'_>,
        random: &mut Random,
    ) -> Result<Verdict> {
        config.check()?;
        round.check()?;
        let mut numbers = *random;
        let probabilities = round.probabilities.filter(|_| !config.is_greedy());
        self.accepted.clear();
        let mut path = Vec::new();
        let mut row = 0;
        let next = loop {
            let scores = round.scores.row(row, round.vocab);
            let history = History { settled: round.history, drafted: &self.accepted };
            let step = match probabilities {
                None => {
                    let distribution = &mut self.distribution;
                    let token = distribution
                        .choose(kernels, config, scores, history, &mut numbers)
                        .ok_or_else(|| empty(row))?;
                    let child = round.drafts.children(row).find(|child| child.1 == token);
                    child.ok_or(token)
                }
                Some(q) => {
                    self.distribution.fill(kernels, config, scores, history);
                    self.reject(round, row, q, &mut numbers)?
                }
            };
            match step {
                Ok((child, token)) => {
                    path.push(child as u32);
                    self.accepted.push(token);
                    row = child;
                }
                Err(token) => break token,
            }
        };
        *random = numbers;
        Ok(Verdict { path, next })
    }

    /// Rejection sampling among the children of `row`, whose target distribution has been filled in: an
    /// accepted child, or else the new token.
    fn reject(
        &mut self,
        round: &Round<'_>,
        row: usize,
        q: &[f32],
        random: &mut Random,
    ) -> Result<std::result::Result<(usize, u32), u32>> {
        let mut pool: Option<Pool<'_>> = None;
        for (child, token) in round.drafts.children(row) {
            let pool = match &mut pool {
                Some(pool) => pool,
                None => pool.insert(Pool::new(row, &q[row * round.vocab..][..round.vocab])?),
            };
            let drafted = pool.probability(token);
            if drafted <= 0.0 {
                return Err(Error::InvalidArgument(format!(
                    "draft {} is token {token}, which its probabilities cannot have given",
                    child - 1
                )));
            }
            let unit = f64::from(random.unit());
            // Strictly less: what the target rules out is never accepted.
            if unit * drafted < f64::from(self.distribution.probability(token)) {
                return Ok(Ok((child, token)));
            }
            self.distribution.subtract(|token| pool.probability(token));
            pool.remove(token);
        }
        self.distribution.draw(random.unit()).map(Err).ok_or_else(|| empty(row))
    }
}

/// The draft's distribution as children are taken out of it.
struct Pool<'a> {
    q: &'a [f32],
    gone: Vec<u32>,
    left: f64,
}

impl<'a> Pool<'a> {
    fn new(row: usize, q: &'a [f32]) -> Result<Self> {
        let total: f64 = q.iter().map(|q| f64::from(*q)).sum();
        if q.iter().any(|q| q.is_nan() || *q < 0.0) || (total - 1.0).abs() > 1e-3 {
            return Err(Error::InvalidArgument(format!(
                "the probabilities of row {row} are no distribution: their sum is {total}"
            )));
        }
        Ok(Self { q, gone: Vec::new(), left: total })
    }

    fn probability(&self, token: u32) -> f64 {
        if self.gone.contains(&token) || self.left <= 0.0 {
            return 0.0;
        }
        f64::from(self.q[token as usize]) / self.left
    }

    fn remove(&mut self, token: u32) {
        self.gone.push(token);
        // Added up anew: subtracting from a total near one would leave only rounding.
        let all = self.q.iter().enumerate();
        let left = all.filter(|(id, _)| !self.gone.contains(&(*id as u32)));
        self.left = left.map(|(_, q)| f64::from(*q)).sum();
    }
}

impl Round<'_> {
    fn check(&self) -> Result<()> {
        let (rows, drafts) = (self.drafts.rows(), self.drafts.tokens());
        let wrong = |why: String| Err(Error::InvalidArgument(why));
        if self.vocab == 0 || u32::try_from(self.vocab).is_err() {
            return wrong(format!("a vocabulary of {} tokens", self.vocab));
        }
        let Scores { logits, maxima } = self.scores;
        if Some(logits.len()) != rows.checked_mul(self.vocab) {
            return wrong(format!("{} logits for {rows} rows of {}", logits.len(), self.vocab));
        }
        let blocks = rows * self.vocab.div_ceil(BLOCK);
        if let Some(maxima) = maxima.filter(|maxima| maxima.len() != blocks) {
            return wrong(format!("{} maxima for {blocks} blocks of logits", maxima.len()));
        }
        if let Some(q) = self.probabilities
            && Some(q.len()) != drafts.len().checked_mul(self.vocab)
        {
            return wrong(format!(
                "{} draft probabilities for {} rows of {}",
                q.len(),
                drafts.len(),
                self.vocab
            ));
        }
        match drafts.iter().position(|token| *token as usize >= self.vocab) {
            Some(at) => wrong(format!(
                "draft {at} is token {} of a vocabulary of {}",
                drafts[at], self.vocab
            )),
            None => Ok(()),
        }
    }
}

fn empty(row: usize) -> Error {
    Error::InvalidArgument(format!("the logits of row {row} hold no number above minus infinity"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    const NONE: f32 = f32::NEG_INFINITY;

    fn open() -> SamplerConfig {
        SamplerConfig { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..Default::default() }
    }

    fn round<'a>(logits: &'a [f32], drafts: Drafts<'a>, q: Option<&'a [f32]>) -> Round<'a> {
        let vocab = logits.len() / drafts.rows();
        Round { scores: logits.into(), vocab, drafts, probabilities: q, history: &[] }
    }

    fn verify(config: &SamplerConfig, round: &Round<'_>, random: &mut Random) -> Result<Verdict> {
        let kernels = Kernels::new(Isa::detect()).unwrap();
        Verifier::default().verify(&kernels, config, round, random)
    }

    fn greedily(round: &Round<'_>) -> (Vec<u32>, u32) {
        let mut random = Random(5);
        let verdict = verify(&SamplerConfig::greedy(), round, &mut random).unwrap();
        assert_eq!(random, Random(5), "greedy takes no random numbers");
        (verdict.path, verdict.next)
    }

    #[test]
    fn a_greedy_chain_stands_up_to_its_first_wrong_draft() {
        let logits = [0., 9., 0., 0., 0., 9., 9., 0., 0.];
        let check = |drafts: &[u32]| {
            let rows = 3 * (drafts.len() + 1);
            greedily(&round(&logits[..rows], Drafts::chain(drafts), None))
        };
        assert_eq!(check(&[]), (vec![], 1));
        assert_eq!(check(&[1, 2]), (vec![1, 2], 0));
        assert_eq!(check(&[1, 0]), (vec![1], 2));
        assert_eq!(check(&[2, 2]), (vec![], 1));
        let q = [0.5, 0., 0.5, 0., 0., 1.];
        assert_eq!(greedily(&round(&logits, Drafts::chain(&[2, 2]), Some(&q))), (vec![], 1));
    }

    #[test]
    fn ties_go_to_the_lowest_id_and_a_nan_to_nobody() {
        let logits = [f32::NAN, 7., 7., NONE, 0., f32::NAN];
        assert_eq!(greedily(&round(&logits, Drafts::chain(&[2]), None)), (vec![], 1));
        assert_eq!(greedily(&round(&logits, Drafts::chain(&[1]), None)), (vec![1], 1));
        let infinite = [0., f32::INFINITY, f32::INFINITY, 0., 0., 0.];
        let drafts = round(&infinite, Drafts::chain(&[1]), None);
        assert_eq!(verify(&open(), &drafts, &mut Random(1)).unwrap().path, [1]);
    }

    #[test]
    fn a_greedy_tree_follows_the_branch_that_was_right() {
        // 0 - 1 (token 0)
        //   \ 2 (token 2) - 3 (token 1), 4 (token 0)
        let rows = [[0., 0., 9.], [9., 0., 0.], [9., 0., 0.], [0., 9., 0.], [0., 0., 9.]];
        let (tokens, parents) = ([0, 2, 1, 0], [0, 0, 2, 2]);
        let drafts = Drafts::tree(&tokens, &parents).unwrap();
        assert_eq!(greedily(&round(rows.as_flattened(), drafts, None)), (vec![2, 4], 2));
    }

    #[test]
    fn what_cannot_be_is_a_status_and_takes_no_random_numbers() {
        let flat = [0.0; 6];
        let refused = |config: &SamplerConfig, round: &Round<'_>, word: &str| {
            let mut random = Random(9);
            let error = verify(config, round, &mut random).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
            assert_eq!(random, Random(9));
        };
        let chain = Drafts::chain(&[1]);
        let (good, hot) = (round(&flat, chain, None), open());
        refused(&hot, &Round { vocab: 0, ..good }, "vocabulary of 0");
        refused(&hot, &Round { vocab: 2, ..good }, "6 logits for 2 rows of 2");
        let scores = Scores { maxima: Some(&flat[..1]), ..good.scores };
        refused(&hot, &Round { scores, ..good }, "1 maxima for 2 blocks");
        refused(&hot, &round(&flat, Drafts::chain(&[3]), None), "draft 0 is token 3");
        refused(&SamplerConfig { top_p: 2.0, ..hot }, &good, "top_p");
        for config in [hot, SamplerConfig::greedy()] {
            refused(&config, &round(&[NONE, f32::NAN, NONE, 0., 0., 0.], chain, None), "row 0");
            refused(&config, &round(&[NONE, 1., NONE, NONE, NONE, NONE], chain, None), "row 1");
        }
        for (q, word) in [
            (&[0.5, 0.5][..], "2 draft probabilities"),
            (&[0.5, 0.5, 0.5], "sum is 1.5"),
            (&[-0.5, 1.5, 0.0], "no distribution"),
            (&[f32::NAN, 1.0, 0.0], "no distribution"),
            (&[0.5, 0.0, 0.5], "cannot have given"),
        ] {
            refused(&hot, &round(&flat, chain, Some(q)), word);
        }
        let (tokens, parents) = ([1, 1], [0, 0]);
        let twice = Drafts::tree(&tokens, &parents).unwrap();
        let logits = [9., NONE, 9., 0., 0., 0., 0., 0., 0.];
        let q = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0];
        refused(&hot, &round(&logits, twice, Some(&q)), "draft 1 is token 1");
    }

    #[test]
    fn an_overconfident_draft_is_never_accepted_where_the_target_rules_it_out() {
        let logits = [0., NONE, 0., 0., 0., 0.];
        let q = [0.0, 1.0, 0.0];
        for seed in 0..if cfg!(miri) { 5 } else { 200 } {
            let verdict =
                verify(&open(), &round(&logits, Drafts::chain(&[1]), Some(&q)), &mut Random(seed));
            let verdict = verdict.unwrap();
            assert!(verdict.path.is_empty() && verdict.next != 1);
        }
    }

    #[test]
    fn penalties_count_the_accepted_drafts() {
        let mut config = SamplerConfig::greedy();
        config.penalties.presence = 2.0;
        let logits = [5., 4., 0., 5., 4., 0., 5., 4., 0.];
        let drafts = round(&logits, Drafts::chain(&[0, 1]), None);
        let verdict = verify(&config, &drafts, &mut Random(0)).unwrap();
        assert_eq!(verdict, Verdict { path: vec![1, 2], next: 0 });
        let drafts = Round { history: &[0], ..drafts };
        assert_eq!(verify(&config, &drafts, &mut Random(0)).unwrap().next, 1);
    }
}
