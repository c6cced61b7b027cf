//! Choosing a token: the time from logits to an id, for vocabularies of Llama 2, Llama 3 and Qwen 2.5.

use divan::{Bencher, black_box};
use nybl::isa::Isa;
use nybl::kernel::Kernels;
use nybl::kernel::scores::{Scores, maxima};
use nybl::spec::distribution::{Distribution, History, SamplerConfig};
use nybl::spec::random::Random;
use std::fmt;

fn main() {
    divan::main();
}

#[derive(Clone, Copy)]
struct Case {
    vocab: usize,
    name: &'static str,
    config: SamplerConfig,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.vocab, self.name)
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let nucleus = SamplerConfig { top_k: 0, min_p: 0.0, ..SamplerConfig::default() };
    let configs = [
        ("greedy", SamplerConfig::greedy()),
        ("default", SamplerConfig::default()),
        ("top-p alone", nucleus),
    ];
    [32_000, 128_256, 151_936]
        .into_iter()
        .flat_map(move |vocab| configs.map(|(name, config)| Case { vocab, name, config }))
}

#[divan::bench(args = cases())]
fn choose(bencher: Bencher, case: &Case) {
    bench(bencher, case, |logits, _| logits.into());
}

/// With the largest of every block known, as after a forward pass.
#[divan::bench(args = cases())]
fn choose_known(bencher: Bencher, case: &Case) {
    bench(bencher, case, |logits, maxima| Scores { logits, maxima: Some(maxima) });
}

fn bench(
    bencher: Bencher,
    case: &Case,
    scores: for<'a> fn(logits: &'a [f32], maxima: &'a [f32]) -> Scores<'a>,
) {
    let kernels = Kernels::new(Isa::detect()).expect("this CPU's own rows");
    let mut random = Random(1);
    // A sum of twelve is as good as normal.
    let mut logit = || (0..12).map(|_| random.unit() - 0.5).sum::<f32>() * 3.0;
    let logits: Vec<f32> = (0..case.vocab).map(|_| logit()).collect();
    let maxima: Vec<f32> = maxima(&logits).collect();
    let mut distribution = Distribution::default();
    bencher.bench_local(|| {
        let (scores, before) = (black_box(scores(&logits, &maxima)), History::default());
        let token = distribution.choose(&kernels, &case.config, scores, before, &mut random);
        assert!(token.is_some_and(|token| (token as usize) < case.vocab), "no token of these");
    });
}
