//! The likeliest tokens of a vocabulary, without looking at each more than once.
//!
//! What decides the time is how often all logits are gone through. Here they are once, for the largest of every block
//! ([`crate::kernel::scores`]), and not at all where those are known; then only blocks that can have one of the k
//! likeliest are looked at. The order is total, the lowest id first on ties, whatever the way to it.
#![forbid(unsafe_code)]

use crate::kernel::scores::{BLOCK, Scores, maxima};

/// Candidates from which on they are sorted by digits.
const MANY: usize = 4096;

/// Bits of a digit: three are a float.
const DIGIT: u32 = 11;

/// A logit and its token.
pub(super) type Candidate = (f32, u32);

/// Buffers of a search.
#[derive(Clone, Debug, Default)]
pub(super) struct Search {
    maxima: Vec<f32>,
    order: Vec<f32>,
    spare: Vec<Candidate>,
}

impl Search {
    /// The most bytes that the buffers for `vocab` tokens come to.
    pub(super) const fn most_bytes(vocab: usize) -> usize {
        2 * vocab.div_ceil(BLOCK) * size_of::<f32>() + vocab * size_of::<Candidate>()
    }

    /// Fills `found` with the `k` largest logits, all where `k` is 0, the largest first. A NaN and minus infinity are
    /// never among them.
    pub(super) fn likeliest(&mut self, scores: Scores<'_>, k: usize, found: &mut Vec<Candidate>) {
        let logits = scores.logits;
        let k = if k == 0 { logits.len() } else { k };
        let maxima = scores.maxima.unwrap_or_else(|| {
            self.maxima.clear();
            self.maxima.extend(maxima(logits));
            &self.maxima
        });
        let mut floor = f32::NEG_INFINITY;
        if k < maxima.len() {
            self.order.clear();
            self.order.extend_from_slice(maxima);
            floor = *self.order.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1;
        }
        found.clear();
        for (block, (logits, max)) in logits.chunks(BLOCK).zip(maxima).enumerate() {
            if *max >= floor {
                let usable = |logit: f32| logit >= floor && logit > f32::NEG_INFINITY;
                let entries = logits.iter().copied().zip((block * BLOCK) as u32..);
                found.extend(entries.filter(|(logit, _)| usable(*logit)));
            }
        }
        if k < found.len() {
            found.select_nth_unstable_by_key(k - 1, place);
            found.truncate(k);
            found.sort_unstable_by_key(place);
        } else {
            self.sort(found);
        }
    }

    /// Sorts candidates, which come in the order of their ids, by [`place`]. Many are sorted by one digit of their logits
    /// after the other, the lowest first (radix sort, Knuth 5.2.5): for a vocabulary a quarter of the time of comparing.
    fn sort(&mut self, candidates: &mut Vec<Candidate>) {
        if candidates.len() < MANY {
            candidates.sort_unstable_by_key(place);
            return;
        }
        self.spare.clear();
        self.spare.resize(candidates.len(), (0.0, 0));
        for shift in [0, DIGIT, 2 * DIGIT] {
            let digit = |candidate| (place(candidate) >> (32 + shift)) as usize % (1 << DIGIT);
            let mut at = [0; 1 << DIGIT];
            for candidate in &*candidates {
                at[digit(candidate)] += 1;
            }
            let mut before = 0;
            for count in &mut at {
                before += std::mem::replace(count, before);
            }
            for candidate in &*candidates {
                let at = &mut at[digit(candidate)];
                self.spare[*at] = *candidate;
                *at += 1;
            }
            std::mem::swap(candidates, &mut self.spare);
        }
    }
}

/// Where a candidate stands among others: the larger logit first, the lower id first on ties.
fn place((logit, id): &Candidate) -> u64 {
    let bits = logit.to_bits();
    // Read as integers, negative floats descend and lie above the positive ones.
    let ascending = if logit.is_sign_negative() { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | u64::from(*id)
}

/// The id of the largest logit, the lowest on ties; nothing where none is above minus infinity.
#[must_use]
pub fn greedy(scores: Scores<'_>) -> Option<u32> {
    let Scores { logits, maxima: known } = scores;
    let first_of = |best: (f32, usize), (block, max): (usize, f32)| {
        if max > best.0 { (max, block) } else { best }
    };
    let none = (f32::NEG_INFINITY, 0);
    let (max, block) = match known {
        Some(known) => known.iter().copied().enumerate().fold(none, first_of),
        None => maxima(logits).enumerate().fold(none, first_of),
    };
    let first = block * BLOCK;
    let in_block = logits.get(first..)?.iter().position(|logit| *logit == max)?;
    (max > f32::NEG_INFINITY).then_some((first + in_block) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::random::Random;

    /// What the search is, said plainly.
    fn sorted(logits: &[f32], k: usize) -> Vec<(u32, u32)> {
        let usable = |(id, logit): (usize, &f32)| {
            (*logit > f32::NEG_INFINITY).then_some((*logit, id as u32))
        };
        let mut all: Vec<_> = logits.iter().enumerate().filter_map(usable).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        all.truncate(if k == 0 { usize::MAX } else { k });
        bits(&all)
    }

    fn bits(candidates: &[Candidate]) -> Vec<(u32, u32)> {
        candidates.iter().map(|(logit, id)| (logit.to_bits(), *id)).collect()
    }

    #[test]
    fn the_search_finds_what_sorting_finds() {
        let sizes: &[usize] =
            if cfg!(miri) { &[70] } else { &[1, 15, 63, 64, 65, 1000, MANY, 20_000] };
        let mut random = Random(7);
        let mut search = Search::default();
        let mut found = Vec::new();
        // Ordinary ones, many ties, zeros of both signs, and what is no logit.
        let kinds: [fn(&mut Random) -> f32; 4] = [
            |random| (random.unit() - 0.5) * 40.0,
            |random| (random.unit() * 8.0).floor() - 4.0,
            |random| [0.0, -0.0, 1e-40, -1e-40, f32::MIN_POSITIVE][random.bits() as usize % 5],
            |random| {
                let odd = [f32::NAN, -f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -3e38, 0.5];
                odd[random.bits() as usize % 6]
            },
        ];
        for (kind, size) in
            kinds.iter().flat_map(|kind| sizes.iter().map(move |size| (kind, *size)))
        {
            let logits: Vec<f32> = (0..size).map(|_| kind(&mut random)).collect();
            let largest: Vec<f32> = maxima(&logits).collect();
            let known = Scores { logits: &logits, maxima: Some(&largest) };
            for k in [0, 1, 2, 7, 40, 64, 65, size / 2, size, size + 1] {
                for scores in [logits[..].into(), known] {
                    search.likeliest(scores, k, &mut found);
                    assert_eq!(bits(&found), sorted(&logits, k), "{k} of {size}");
                }
            }
            let first = logits
                .iter()
                .filter(|logit| **logit > f32::NEG_INFINITY)
                .fold(None, |a, b| if a.is_some_and(|a| a >= *b) { a } else { Some(*b) });
            let first = first.and_then(|max| logits.iter().position(|logit| *logit == max));
            for scores in [logits[..].into(), known] {
                assert_eq!(greedy(scores), first.map(|id| id as u32), "of {size}");
            }
        }
    }

    #[test]
    fn nothing_is_likely_where_nothing_can_be() {
        for logits in [&[][..], &[f32::NAN; 70], &[f32::NEG_INFINITY; 70]] {
            assert_eq!(greedy(logits.into()), None);
            let mut found = vec![(1.0, 1)];
            Search::default().likeliest(logits.into(), 1, &mut found);
            assert!(found.is_empty());
        }
    }
}
