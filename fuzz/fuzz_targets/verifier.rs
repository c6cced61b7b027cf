//! The verifier on logits, trees and probabilities of any bits. `cargo +nightly fuzz run verifier`.
//!
//! Deterministic drafts must give the tokens of plain sampling with the same random numbers; drawn ones a
//! path of the tree; an error must leave the random numbers as they were.
#![no_main]

use arbitrary::Arbitrary;
use nybl::isa::Isa;
use nybl::kernel::Kernels;
use nybl::kernel::scores::{Scores, maxima};
use nybl::spec::distribution::{Penalties, SamplerConfig};
use nybl::spec::random::Random;
use nybl::spec::tree::Drafts;
use nybl::spec::verify::{Round, Verifier};

#[derive(Arbitrary, Debug)]
struct Input {
    vocab: u8,
    drafts: Vec<(u8, u8)>,
    chain: bool,
    greedy: bool,
    settings: [f32; 6],
    tame: bool,
    top_k: u8,
    window: u8,
    seed: u64,
    history: Vec<u8>,
    logits: Vec<f32>,
    probabilities: Option<Vec<u8>>,
}

/// A setting of any bits, or one in its range.
fn setting(x: f32, tame: bool, low: f32, high: f32) -> f32 {
    if !tame {
        return x;
    }
    let unit = if x.is_finite() { x.abs().fract() } else { 0.5 };
    low + (high - low) * unit
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    // Vocabularies of one block of scores or of several, whose maxima the round knows or not.
    let wide = if input.vocab & 64 != 0 { 16 } else { 1 };
    let vocab = wide * (1 + usize::from(input.vocab & 63) % 12);
    let drafts = &input.drafts[..input.drafts.len().min(7)];
    // One token too many now and then: outside the vocabulary is an error.
    let tokens: Vec<u32> = drafts.iter().map(|(t, _)| u32::from(*t) % (vocab as u32 + 1)).collect();
    let parents: Vec<u32> =
        drafts.iter().enumerate().map(|(i, (_, p))| u32::from(*p) % (i as u32 + 1)).collect();
    let tree = if input.chain {
        Drafts::chain(&tokens)
    } else {
        Drafts::tree(&tokens, &parents).expect("parents are lower rows")
    };
    let rows = tree.rows();
    let at = |values: &[f32], i: usize| {
        if values.is_empty() { i as f32 } else { values[i % values.len()] }
    };
    let logits: Vec<f32> = (0..rows * vocab).map(|i| at(&input.logits, i)).collect();
    let probabilities = input.probabilities.as_ref().map(|bytes| {
        let mut q = Vec::new();
        for row in 0..tokens.len() {
            let weight = |i: usize| {
                f32::from(bytes.get((row * vocab + i) % bytes.len().max(1)).copied().unwrap_or(1))
            };
            let total: f32 = (0..vocab).map(weight).sum();
            q.extend((0..vocab).map(|i| if total > 0.0 { weight(i) / total } else { f32::NAN }));
        }
        q
    });
    let [t, p, m, r, f, s] = input.settings;
    let tame = input.tame;
    let config = SamplerConfig {
        temperature: if input.greedy { 0.0 } else { setting(t, tame, 0.1, 2.0) },
        top_k: usize::from(input.top_k % 16),
        top_p: setting(p, tame, 0.0, 1.0),
        min_p: setting(m, tame, 0.0, 0.5),
        penalties: Penalties {
            repeat: setting(r, tame, 0.5, 2.0),
            frequency: setting(f, tame, -1.0, 1.0),
            presence: setting(s, tame, -1.0, 1.0),
            window: usize::from(input.window % 8),
        },
        seed: input.seed,
    };
    let history: Vec<u32> = input.history.iter().map(|t| u32::from(*t) % vocab as u32).collect();
    let largest: Vec<f32> = logits.chunks(vocab).flat_map(maxima).collect();
    let known = input.vocab & 128 != 0;
    let round = Round {
        scores: Scores { logits: &logits, maxima: known.then_some(&largest) },
        vocab,
        drafts: tree,
        probabilities: probabilities.as_deref(),
        history: &history,
    };
    let kernels = Kernels::new(Isa::detect()).expect("the CPU's own kernels");
    let mut random = Random(input.seed);
    let outcome = Verifier::default().verify(&kernels, &config, &round, &mut random);
    let Ok(verdict) = outcome else {
        assert_eq!(random, Random(input.seed), "an error takes no random numbers");
        return;
    };
    let mut row = 0;
    for child in &verdict.path {
        let child = *child as usize;
        assert!(child < rows && tree.parent(child) == row, "{verdict:?} is no path");
        row = child;
    }
    let last = logits[row * vocab..][verdict.next as usize];
    assert!((verdict.next as usize) < vocab && !last.is_nan(), "{verdict:?} cannot be chosen");
    if probabilities.is_some() && !config.is_greedy() {
        return;
    }

    // Token by token, without drafts.
    let mut plain = Random(input.seed);
    let mut settled = history.clone();
    let mut row = 0;
    let mut path = Vec::new();
    let next = loop {
        let alone = Round {
            scores: logits[row * vocab..][..vocab].into(),
            vocab,
            drafts: Drafts::chain(&[]),
            probabilities: None,
            history: &settled,
        };
        let verdict = Verifier::default()
            .verify(&kernels, &config, &alone, &mut plain)
            .expect("the rows before have been enough");
        match tree.children(row).find(|(_, token)| *token == verdict.next) {
            Some((child, token)) => {
                path.push(child as u32);
                settled.push(token);
                row = child;
            }
            None => break verdict.next,
        }
    };
    assert_eq!((verdict.path, verdict.next, random), (path, next, plain));
});
