//! Plain sampling: the token after a sequence, drawn with a seed.
//!
//! How logits become probabilities is in [`crate::spec::distribution`], because the verifier of drafts
//! must do exactly the same.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::kernel::Kernels;
use crate::kernel::scores::Scores;
use crate::spec::distribution::{Distribution, History};
use crate::spec::random::Random;

pub use crate::spec::distribution::{Hook, Penalties, SamplerConfig, greedy};

/// A sampler and its random state.
#[derive(Clone)]
pub struct Sampler {
    config: SamplerConfig,
    random: Random,
    distribution: Distribution,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    ///
    /// # Errors
    /// [`crate::Error::InvalidArgument`] naming a setting that is out of range.
    pub fn new(config: SamplerConfig) -> Result<Self> {
        config.check()?;
        Ok(Self { config, random: Random(config.seed), distribution: Distribution::default() })
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// Changes the settings, and neither the hook nor the random state.
    ///
    /// # Errors
    /// [`crate::Error::InvalidArgument`] naming a setting that is out of range; nothing has changed then.
    pub fn set_config(&mut self, config: SamplerConfig) -> Result<()> {
        config.check()?;
        self.config = config;
        Ok(())
    }

    /// Logits go through `hook` first from now on, or through none.
    pub fn set_hook(&mut self, hook: Option<Hook>) {
        self.distribution.set_hook(hook);
    }

    /// The hook, if there is one.
    #[must_use]
    pub fn hook(&self) -> Option<&Hook> {
        self.distribution.hook()
    }

    /// The random state, which a verifier carries on.
    pub fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    /// The token after `history`; nothing when no logit is above minus infinity. A NaN is never chosen.
    pub fn sample(
        &mut self,
        kernels: &Kernels,
        scores: Scores<'_>,
        history: &[u32],
    ) -> Option<u32> {
        let history = History { settled: history, drafted: &[] };
        self.distribution.choose(kernels, &self.config, scores, history, &mut self.random)
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
        SamplerConfig {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 1,
            ..SamplerConfig::default()
        }
    }

    fn seen(config: SamplerConfig, logits: &[f32], draws: usize) -> Vec<usize> {
        let (kernels, mut sampler) = (kernels(), Sampler::new(config).unwrap());
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(&kernels, logits.into(), &[]).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_id_on_ties_and_no_nan() {
        assert_eq!(greedy([1.0, 3.0, f32::NAN, 3.0][..].into()), Some(1));
        assert_eq!(greedy([f32::NEG_INFINITY, f32::NAN][..].into()), None);
        assert_eq!(greedy([][..].into()), None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many draws for it")]
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
        let draws = if cfg!(miri) { 40 } else { 2_000 };
        let kept = |config| seen(config, &logits, draws).iter().filter(|c| **c > 0).count();
        assert_eq!(kept(open()), 4);
        assert_eq!(kept(SamplerConfig { top_k: 2, ..open() }), 2);
        assert_eq!(kept(SamplerConfig { top_p: 0.65, ..open() }), 2);
        assert_eq!(kept(SamplerConfig { min_p: 0.45, ..open() }), 3);
        assert_eq!(kept(SamplerConfig { top_p: 0.0, ..open() }), 1);
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32).collect();
        let draws = if cfg!(miri) { 5 } else { 20 };
        let draw = |seed| {
            let (kernels, config) = (kernels(), SamplerConfig { seed, ..SamplerConfig::default() });
            let mut sampler = Sampler::new(config).unwrap();
            (0..draws).map(|_| sampler.sample(&kernels, logits[..].into(), &[])).collect::<Vec<_>>()
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
