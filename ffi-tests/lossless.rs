//! The verifier changes no distribution: chi-square and total variation against exactly known joints,
//! and the same statistic must catch verifiers with the known bugs planted in them.
//!
//! A joint is one token longer than the drafts, so that the bonus token is in it; its cells come from
//! an f64 restatement of the sampling settings that shares nothing with the library.

use nybl::isa::Isa;
use nybl::kernel::Kernels;
use nybl::spec::distribution::{Distribution, History, Penalties, SamplerConfig};
use nybl::spec::random::Random;
use nybl::spec::tree::Drafts;
use nybl::spec::verify::{Round, Verdict, Verifier};

/// Tokens of the toy vocabulary.
const V: usize = 4;
const START: u32 = 0;
const DRAWS: usize = 30_000;

/// Logits after each token, of the target and of a drafter that half agrees with it.
const TARGET: [[f32; V]; V] =
    [[0.0, 1.2, 0.3, -1.1], [1.0, -0.5, 0.2, 0.9], [-0.3, 0.4, 1.5, 0.0], [0.7, 0.6, -2.0, 0.1]];
const DRAFT: [[f32; V]; V] =
    [[0.8, 0.1, 0.9, -0.4], [0.1, 0.6, -0.9, 1.1], [0.9, 0.9, 0.2, -0.7], [-0.5, 1.0, 0.3, 0.4]];

fn plain() -> SamplerConfig {
    SamplerConfig {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        penalties: Penalties::default(),
        seed: 0,
    }
}

/// Settings that cut in every way, with penalties and without.
fn settings() -> Vec<SamplerConfig> {
    let penalties = Penalties { repeat: 1.3, frequency: 0.2, presence: 0.4, window: 3 };
    vec![
        plain(),
        SamplerConfig { temperature: 0.7, top_k: 3, ..plain() },
        SamplerConfig { temperature: 1.4, top_p: 0.8, min_p: 0.15, ..plain() },
        SamplerConfig { penalties, top_k: 3, ..plain() },
    ]
}

/// What `config` makes of `logits`, restated in f64.
fn exact(config: &SamplerConfig, logits: &[f32], history: &[u32]) -> [f64; V] {
    let mut logits: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
    let Penalties { repeat, frequency, presence, window } = config.penalties;
    let window = if window == 0 { history.len() } else { window.min(history.len()) };
    for (id, x) in logits.iter_mut().enumerate() {
        let recent = &history[history.len() - window..];
        let uses = recent.iter().filter(|token| **token as usize == id).count();
        if uses > 0 {
            *x = if *x > 0.0 { *x / f64::from(repeat) } else { *x * f64::from(repeat) };
            *x -= uses as f64 * f64::from(frequency) + f64::from(presence);
        }
    }
    let mut order: Vec<usize> = (0..V).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    order.truncate(if config.top_k == 0 { V } else { config.top_k });
    let softmax = |kept: &[usize], temperature: f64| {
        let mut p = [0.0; V];
        for id in kept {
            p[*id] = (logits[*id] / temperature).exp();
        }
        let sum: f64 = p.iter().sum();
        p.map(|p| p / sum)
    };
    let p = softmax(&order, 1.0);
    let (mut total, mut keep) = (0.0, 0);
    for id in &order {
        let small = p[*id] < f64::from(config.min_p) * p[order[0]];
        if keep > 0 && (total >= f64::from(config.top_p) || small) {
            break;
        }
        total += p[*id];
        keep += 1;
    }
    softmax(&order[..keep], f64::from(config.temperature))
}

/// The probability of every sequence of `length` tokens, the first one the most significant digit.
fn joint(config: &SamplerConfig, length: usize) -> Vec<f64> {
    (0..V.pow(length as u32))
        .map(|cell| {
            let mut history = vec![START];
            let mut probability = 1.0;
            for digit in (0..length as u32).rev() {
                let token = cell / V.pow(digit) % V;
                let last = history[history.len() - 1] as usize;
                probability *= exact(config, &TARGET[last], &history)[token];
                history.push(token as u32);
            }
            probability
        })
        .collect()
}

/// What is known of the counts in the cells of a joint.
#[derive(Debug)]
struct Fit {
    /// Standard deviations of chi-square above what it should be (Wilson and Hilferty 1931).
    z: f64,
    /// Total variation from the expected distribution, and what draws from it stay below.
    distance: f64,
    bound: f64,
}

impl Fit {
    fn of(counts: &[usize], expected: &[f64]) -> Self {
        let draws: usize = counts.iter().sum();
        let n = draws as f64;
        let (mut square, mut cells) = (0.0, 0_usize);
        let (mut rest, mut rest_expected) = (0.0, 0.0);
        for (count, p) in counts.iter().zip(expected) {
            let (count, want) = (*count as f64, p * n);
            if want == 0.0 && count > 0.0 {
                // A token that the settings rule out.
                square = f64::INFINITY;
            } else if want < 5.0 {
                rest += count;
                rest_expected += want;
            } else {
                square += (count - want).powi(2) / want;
                cells += 1;
            }
        }
        if rest_expected >= 5.0 {
            square += (rest - rest_expected).powi(2) / rest_expected;
            cells += 1;
        } else if rest > 40.0 {
            // Too many for a Poisson of 5.
            square = f64::INFINITY;
        }
        let freedom = (cells - 1) as f64;
        let spread = 2.0 / (9.0 * freedom);
        let z = ((square / freedom).cbrt() - (1.0 - spread)) / spread.sqrt();
        let cells = counts.iter().zip(expected);
        let distance = cells.map(|(count, p)| (*count as f64 / n - p).abs()).sum::<f64>() / 2.0;
        // The mean is below half the sum of the standard deviations; the rest is McDiarmid's bound at
        // one in a million.
        let mean: f64 = expected.iter().map(|p| (p * (1.0 - p) / n).sqrt()).sum::<f64>() / 2.0;
        Self { z, distance, bound: mean + 2.63 / n.sqrt() }
    }

    /// Whether chance explains it: p > 1e-6 for chi-square, and the bound on the distance.
    fn holds(&self) -> bool {
        self.z < 4.75 && self.distance < self.bound
    }
}

/// How drafts are made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Drafting {
    /// A chain or tree of the drafter's likeliest tokens.
    Likeliest,
    /// Drawn from the drafter's distribution; siblings without replacement.
    Drawn,
}

/// One draft for each depth, or a tree in which every row of the spine has `width` children.
#[derive(Clone, Copy, Debug)]
struct Shape {
    depth: usize,
    width: usize,
}

/// A verifier under test.
type Verify<'a> = dyn FnMut(&Round<'_>, &SamplerConfig, &mut Random) -> Verdict + 'a;

/// What the drafter offers after `history`, with the distributions it drew from.
fn draft(
    kernels: &Kernels,
    config: &SamplerConfig,
    shape: Shape,
    drafting: Drafting,
    history: &[u32],
    random: &mut Random,
) -> (Vec<u32>, Vec<u32>, Vec<f32>) {
    let count = shape.depth * shape.width;
    let (mut tokens, mut parents, mut q) = (Vec::new(), Vec::new(), vec![0.0; count * V]);
    let mut distribution = Distribution::default();
    let (mut row, mut path) = (0, Vec::new());
    for _ in 0..shape.depth {
        let seen = [history, &path].concat();
        let logits = DRAFT[seen[seen.len() - 1] as usize];
        let past = History { settled: history, drafted: &path };
        distribution.fill(kernels, config, logits[..].into(), past);
        let mut left = [0.0; V];
        distribution.entries().for_each(|(id, p)| left[id as usize] = p);
        q[row * V..][..V].copy_from_slice(&left);
        let first = tokens.len();
        for _ in 0..shape.width {
            let total: f32 = left.iter().sum();
            if total <= 0.0 {
                break;
            }
            let token = match drafting {
                Drafting::Likeliest => (0..V).max_by(|a, b| left[*a].total_cmp(&left[*b])).unwrap(),
                Drafting::Drawn => {
                    let mut unit = random.unit() * total;
                    let drawn = (0..V).find(|id| {
                        unit -= left[*id];
                        unit < 0.0
                    });
                    drawn.unwrap_or_else(|| (0..V).rfind(|id| left[*id] > 0.0).unwrap())
                }
            };
            left[token] = 0.0;
            tokens.push(token as u32);
            parents.push(row as u32);
        }
        path.push(tokens[first]);
        row = first + 1;
    }
    q.truncate(tokens.len() * V);
    (tokens, parents, q)
}

/// Counts sequences of `depth + 1` tokens that come out of rounds of drafting and verifying.
fn counts(
    config: &SamplerConfig,
    shape: Shape,
    drafting: Drafting,
    seed: u64,
    draws: usize,
    verify: &mut Verify<'_>,
) -> Vec<usize> {
    let kernels = Kernels::new(Isa::detect()).unwrap();
    let (mut drafter, mut random) = (Random(seed ^ 0xabcdef), Random(seed));
    let length = shape.depth + 1;
    let mut counts = vec![0; V.pow(length as u32)];
    for _ in 0..draws {
        let mut sequence = vec![START];
        while sequence.len() <= length {
            let (tokens, parents, q) =
                draft(&kernels, config, shape, drafting, &sequence, &mut drafter);
            let last = &sequence[sequence.len() - 1];
            let rows = std::iter::once(last).chain(&tokens);
            let logits: Vec<f32> = rows.flat_map(|token| TARGET[*token as usize]).collect();
            let drafts = match shape.width {
                1 => Drafts::chain(&tokens),
                _ => Drafts::tree(&tokens, &parents).unwrap(),
            };
            let round = Round {
                scores: logits[..].into(),
                vocab: V,
                drafts,
                probabilities: (drafting == Drafting::Drawn).then_some(&q[..]),
                history: &sequence,
            };
            let verdict = verify(&round, config, &mut random);
            sequence.extend(verdict.path.iter().map(|row| tokens[*row as usize - 1]));
            sequence.push(verdict.next);
        }
        let cell = sequence[1..=length].iter().fold(0, |cell, token| cell * V + *token as usize);
        counts[cell] += 1;
    }
    counts
}

fn fit(
    config: &SamplerConfig,
    shape: Shape,
    drafting: Drafting,
    seed: u64,
    verify: &mut Verify<'_>,
) -> Fit {
    let counts = counts(config, shape, drafting, seed, DRAWS, verify);
    Fit::of(&counts, &joint(config, shape.depth + 1))
}

/// The library's verifier.
fn ours() -> impl FnMut(&Round<'_>, &SamplerConfig, &mut Random) -> Verdict {
    let (kernels, mut verifier) = (Kernels::new(Isa::detect()).unwrap(), Verifier::default());
    move |round, config, random| verifier.verify(&kernels, config, round, random).unwrap()
}

fn check(drafting: Drafting, width: usize) {
    for depth in [1, 2, 4] {
        for (index, config) in settings().iter().enumerate() {
            let shape = Shape { depth, width };
            let fit = fit(config, shape, drafting, 100 + index as u64, &mut ours());
            assert!(fit.holds(), "{drafting:?} {shape:?}, settings {index}: {fit:?}");
        }
    }
}

#[test]
fn drawn_chains() {
    check(Drafting::Drawn, 1);
}

#[test]
fn deterministic_chains() {
    check(Drafting::Likeliest, 1);
}

#[test]
fn drawn_trees() {
    check(Drafting::Drawn, 2);
    check(Drafting::Drawn, 3);
}

#[test]
fn deterministic_trees() {
    check(Drafting::Likeliest, 2);
}

#[test]
fn deterministic_drafts_give_the_tokens_of_plain_sampling_seed_for_seed() {
    let kernels = Kernels::new(Isa::detect()).unwrap();
    for config in settings() {
        for seed in 0..100 {
            let (mut want, mut random) = (vec![START], Random(seed));
            let mut distribution = Distribution::default();
            while want.len() < 30 {
                let logits = TARGET[want[want.len() - 1] as usize];
                let past = History { settled: &want, drafted: &[] };
                let token =
                    distribution.choose(&kernels, &config, logits[..].into(), past, &mut random);
                want.push(token.unwrap());
            }
            for shape in [Shape { depth: 3, width: 1 }, Shape { depth: 2, width: 2 }] {
                let (mut got, mut random, mut verify) = (vec![START], Random(seed), ours());
                while got.len() < 30 {
                    let kind = Drafting::Likeliest;
                    let (tokens, parents, _) =
                        draft(&kernels, &config, shape, kind, &got, &mut Random(0));
                    let rows = std::iter::once(&got[got.len() - 1]).chain(&tokens);
                    let logits: Vec<_> = rows.flat_map(|token| TARGET[*token as usize]).collect();
                    let drafts = Drafts::tree(&tokens, &parents).unwrap();
                    let round = Round {
                        scores: logits[..].into(),
                        vocab: V,
                        drafts,
                        probabilities: None,
                        history: &got,
                    };
                    let verdict = verify(&round, &config, &mut random);
                    got.extend(verdict.path.iter().map(|row| tokens[*row as usize - 1]));
                    got.push(verdict.next);
                }
                assert_eq!(got[..30], want[..30], "{shape:?}, seed {seed}");
            }
        }
    }
}

/// Mistakes that verifiers have been shipped with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    None,
    /// A rejected draft is replaced by a token of the target's own distribution.
    NoResidual,
    /// The token after the last accepted draft comes from the drafter.
    BonusFromDraft,
    /// No bonus: the last draft's row is used again.
    BonusFromTheRowBefore,
    /// Acceptance by p / q with q too small.
    ScaledRatio,
    /// Acceptance with probability p, as if the draft had been certain.
    NoRatio,
    /// The target's settings are left out.
    RawTarget,
    /// Siblings are checked against the distribution of the first one.
    StaleSiblings,
    /// A rejected sibling leaves the target's distribution as it was.
    StaleTarget,
}

/// A plain restatement of the verifier for drawn drafts in f64, with a bug or none.
fn restated(bug: Bug) -> impl FnMut(&Round<'_>, &SamplerConfig, &mut Random) -> Verdict {
    move |round, config, random| {
        let config = if bug == Bug::RawTarget { &plain() } else { config };
        let (tokens, all) = (round.drafts.tokens(), round.probabilities.unwrap());
        let (mut row, mut path, mut history) = (0, Vec::new(), round.history.to_vec());
        let draw = |p: [f64; V], random: &mut Random| {
            let mut left = f64::from(random.unit()) * p.iter().sum::<f64>();
            let drawn = (0..V).find(|id| {
                left -= p[*id];
                left < 0.0
            });
            drawn.unwrap_or(V - 1) as u32
        };
        loop {
            let mut p = exact(config, &round.scores.logits[row * V..][..V], &history);
            let children: Vec<_> = round.drafts.children(row).collect();
            if children.is_empty() {
                let logits = match bug {
                    Bug::BonusFromDraft => DRAFT[history[history.len() - 1] as usize].to_vec(),
                    Bug::BonusFromTheRowBefore => {
                        round.scores.logits[round.drafts.parent(row) * V..][..V].to_vec()
                    }
                    _ => round.scores.logits[row * V..][..V].to_vec(),
                };
                let next = draw(exact(config, &logits, &history), random);
                return Verdict { path, next };
            }
            let target = p;
            let mut q: [f64; V] = std::array::from_fn(|id| f64::from(all[row * V + id]));
            let mut accepted = None;
            for (child, token) in children {
                let t = token as usize;
                let ratio = match bug {
                    Bug::ScaledRatio => q[t] * 0.8,
                    Bug::NoRatio => 1.0,
                    _ => q[t],
                };
                if f64::from(random.unit()) * ratio < p[t] {
                    accepted = Some(child);
                    break;
                }
                let residual: [f64; V] = std::array::from_fn(|id| (p[id] - q[id]).max(0.0));
                let sum: f64 = residual.iter().sum();
                if bug != Bug::StaleTarget && sum > 1e-12 {
                    p = residual.map(|r| r / sum);
                }
                if bug != Bug::StaleSiblings {
                    q[t] = 0.0;
                    let sum: f64 = q.iter().sum();
                    q = q.map(|q| q / sum);
                }
            }
            match accepted {
                Some(child) => {
                    path.push(child as u32);
                    history.push(tokens[child - 1]);
                    row = child;
                }
                None => {
                    let p = if bug == Bug::NoResidual { target } else { p };
                    return Verdict { path, next: draw(p, random) };
                }
            }
        }
    }
}

#[test]
fn the_statistic_passes_a_correct_verifier_and_catches_every_planted_bug() {
    let chain = |depth| Shape { depth, width: 1 };
    let tree = Shape { depth: 2, width: 2 };
    let hot = SamplerConfig { temperature: 0.7, top_k: 3, ..plain() };
    for (bug, shape) in [
        (Bug::None, chain(1)),
        (Bug::None, chain(4)),
        (Bug::None, tree),
        (Bug::NoResidual, chain(1)),
        (Bug::NoResidual, chain(4)),
        (Bug::NoResidual, tree),
        (Bug::BonusFromDraft, chain(1)),
        (Bug::BonusFromDraft, chain(2)),
        (Bug::BonusFromDraft, chain(4)),
        (Bug::BonusFromTheRowBefore, chain(1)),
        (Bug::BonusFromTheRowBefore, chain(4)),
        (Bug::ScaledRatio, chain(1)),
        (Bug::ScaledRatio, chain(4)),
        (Bug::NoRatio, chain(1)),
        (Bug::RawTarget, chain(1)),
        (Bug::StaleSiblings, tree),
        (Bug::StaleTarget, tree),
    ] {
        let fit = fit(&hot, shape, Drafting::Drawn, 7, &mut restated(bug));
        assert_eq!(fit.holds(), bug == Bug::None, "{bug:?} {shape:?}: {fit:?}");
    }
}

#[test]
fn a_greedy_draft_that_claims_to_be_drawn_is_caught() {
    let (kernels, mut verify) = (Kernels::new(Isa::detect()).unwrap(), ours());
    let shape = Shape { depth: 2, width: 1 };
    let mut lie = |round: &Round<'_>, config: &SamplerConfig, random: &mut Random| {
        let mut q = Vec::new();
        let mut distribution = Distribution::default();
        for last in round.history[round.history.len() - 1..].iter().chain(round.drafts.tokens()) {
            let logits = DRAFT[*last as usize];
            distribution.fill(&kernels, config, logits[..].into(), History::default());
            let at = q.len();
            q.resize(at + V, 0.0);
            distribution.entries().for_each(|(id, p)| q[at + id as usize] = p);
        }
        q.truncate(round.drafts.tokens().len() * V);
        verify(&Round { probabilities: Some(&q), ..*round }, config, random)
    };
    assert!(!fit(&plain(), shape, Drafting::Likeliest, 3, &mut lie).holds());
}
