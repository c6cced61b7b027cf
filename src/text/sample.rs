//! From logits to a token: greedy, or drawn after top-k, top-p and min-p with a seed.
//!
//! Every step is in a fixed order and in the library's own arithmetic, so a seed gives the same tokens on
//! every device.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::kernel::Kernels;

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
    /// Where the random numbers start.
    pub seed: u64,
}

impl Default for SamplerConfig {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, seed: 0 }
    }
}

impl SamplerConfig {
    /// Always the likeliest token, the lowest id on ties.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
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

/// A sampler and its random state.
#[derive(Clone)]
pub struct Sampler {
    config: SamplerConfig,
    random: Random,
    candidates: Vec<(f32, u32)>,
    weights: Vec<f32>,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming a setting that is out of range.
    pub fn new(config: SamplerConfig) -> Result<Self> {
        config.check()?;
        let random = Random(config.seed);
        Ok(Self { config, random, candidates: Vec::new(), weights: Vec::new() })
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// The next token; nothing when no logit is above minus infinity. A NaN is never chosen.
    pub fn sample(&mut self, kernels: &Kernels, logits: &[f32]) -> Option<u32> {
        if self.config.temperature == 0.0 {
            return greedy(logits);
        }
        // One number a token whatever is decided, so that seeds stay comparable.
        let draw = self.random.unit();
        self.keep_likeliest(logits);
        self.cut_by_probability(kernels);
        let best = self.candidates.first()?.0;
        if best == f32::INFINITY {
            return self.candidates.first().map(|(_, id)| *id);
        }
        self.weigh(kernels, self.config.temperature);
        let mut left = draw;
        for (weight, (_, id)) in self.weights.iter().zip(&self.candidates) {
            left -= weight;
            if left < 0.0 {
                return Some(*id);
            }
        }
        // The weights add up to a little less than one.
        self.candidates.last().map(|(_, id)| *id)
    }

    /// The candidates, likeliest first, at most `top_k` of them.
    fn keep_likeliest(&mut self, logits: &[f32]) {
        let usable = |(id, logit): (usize, &f32)| {
            (*logit > f32::NEG_INFINITY).then_some((*logit, id as u32))
        };
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().filter_map(usable));
        let order =
            |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1));
        let k = self.config.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, order);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(order);
    }

    /// Applies top-p, then min-p, both to the probabilities at temperature one.
    fn cut_by_probability(&mut self, kernels: &Kernels) {
        if self.config.top_p >= 1.0 && self.config.min_p <= 0.0 {
            return;
        }
        self.weigh(kernels, 1.0);
        let mut total = 0.0;
        let floor = self.weights.first().map_or(0.0, |best| best * self.config.min_p);
        let mut keep = 0;
        for weight in &self.weights {
            if keep > 0 && (total >= self.config.top_p || *weight < floor) {
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

/// The id of the largest logit, the lowest on ties.
#[must_use]
pub fn greedy(logits: &[f32]) -> Option<u32> {
    let mut best = (f32::NEG_INFINITY, None);
    for (id, logit) in logits.iter().enumerate() {
        if *logit > best.0 {
            best = (*logit, Some(id as u32));
        }
    }
    best.1
}

/// `SplitMix64` (Steele, Lea and Flood 2014).
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 up to, but not including, 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 24) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    fn kernels() -> Kernels {
        Kernels::new(Isa::detect()).unwrap()
    }

    fn open() -> SamplerConfig {
        SamplerConfig { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1 }
    }

    fn seen(config: SamplerConfig, logits: &[f32], draws: usize) -> Vec<usize> {
        let (kernels, mut sampler) = (kernels(), Sampler::new(config).unwrap());
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(&kernels, logits).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_id_on_ties_and_no_nan() {
        assert_eq!(greedy(&[1.0, 3.0, f32::NAN, 3.0]), Some(1));
        assert_eq!(greedy(&[f32::NEG_INFINITY, f32::NAN]), None);
        assert_eq!(greedy(&[]), None);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, 2_f32.ln(), 5_f32.ln(), f32::NEG_INFINITY, f32::NAN];
        let counts = seen(open(), &logits, 16_000);
        for (count, share) in counts.iter().zip([0.125, 0.25, 0.625, 0.0, 0.0]) {
            let want = share * 16_000.0;
            // Five standard deviations of a binomial.
            let slack = 5.0 * (want * (1.0_f64 - share)).sqrt();
            assert!((*count as f64 - want).abs() <= slack, "{counts:?}");
        }
    }

    #[test]
    fn each_cut_removes_exactly_its_tail() {
        let logits: Vec<f32> = [0.4_f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let kept = |config| seen(config, &logits, 2_000).iter().filter(|c| **c > 0).count();
        assert_eq!(kept(open()), 4);
        assert_eq!(kept(SamplerConfig { top_k: 2, ..open() }), 2);
        assert_eq!(kept(SamplerConfig { top_p: 0.65, ..open() }), 2);
        assert_eq!(kept(SamplerConfig { min_p: 0.45, ..open() }), 3);
        assert_eq!(kept(SamplerConfig { top_p: 0.0, ..open() }), 1);
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32).collect();
        let draw = |seed| {
            let (kernels, config) = (kernels(), SamplerConfig { seed, ..SamplerConfig::default() });
            let mut sampler = Sampler::new(config).unwrap();
            (0..20).map(|_| sampler.sample(&kernels, &logits)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn settings_out_of_range_are_named() {
        for (config, name) in [
            (SamplerConfig { temperature: -1.0, ..open() }, "temperature"),
            (SamplerConfig { top_p: 1.5, ..open() }, "top_p"),
            (SamplerConfig { min_p: f32::NAN, ..open() }, "min_p"),
        ] {
            let error = Sampler::new(config).err().unwrap().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
