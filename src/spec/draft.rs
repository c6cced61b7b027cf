//! Where drafts come from when no second model is at hand: n-grams of the text itself, and the trait
//! that every other source implements.
//!
//! These drafts are deterministic, so the verifier turns them into the tokens of plain sampling, seed
//! for seed, however good or bad they are.
#![forbid(unsafe_code)]

use super::distribution::{Hook, SamplerConfig};
use super::random::Random;
use crate::error::Result;
use std::collections::HashMap;

/// Drafted tokens and how much their source trusts them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Draft {
    /// The tokens, a chain.
    pub tokens: Vec<u32>,
    /// For each token, from 0 to 1, how sure the source is of it; only comparable within one source. A
    /// missing one counts as 0.
    pub confidence: Vec<f32>,
}

impl Draft {
    /// Adds a token.
    pub fn push(&mut self, token: u32, confidence: f32) {
        self.tokens.push(token);
        self.confidence.push(confidence);
    }

    /// Keeps the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.confidence.truncate(len);
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.truncate(0);
    }
}

/// What a drafter is asked for.
pub struct Request<'a> {
    /// All tokens of the sequence. Contexts of one sequence grow; after [`Drafter::rewind`] they may go
    /// on differently.
    pub context: &'a [u32],
    /// The most tokens that are of use.
    pub most: usize,
    /// How the target will choose. A drafter that applies the same settings, penalties included, foretells
    /// more.
    pub sampler: &'a SamplerConfig,
    /// What the target's logits go through first.
    pub hook: Option<&'a Hook>,
    /// The numbers that the target will choose with, one for each token. A drafter that draws with the
    /// same ones agrees with the target more often than one that always takes its likeliest token (the
    /// coupling of Daliri et al. 2408.07978), and what it drafts is still deterministic: the target's
    /// tokens are as without it.
    pub random: Random,
    /// Whether one more token pays after tokens with these confidences.
    pub go_on: &'a dyn Fn(&[f32]) -> bool,
}

/// A source of drafts.
pub trait Drafter: Send {
    /// Proposes at most `request.most` tokens to follow the context and adds them to `draft`, which is
    /// empty; none when it has nothing to say.
    ///
    /// # Errors
    /// Whatever stops the source; the caller's generation stops with it.
    fn draft(&mut self, request: &Request<'_>, draft: &mut Draft) -> Result<()>;

    /// The sequence begins with `context`: after a prompt, when all of it is worth knowing (`whole`), and
    /// before a draft, when the source should make good no more than it needs.
    ///
    /// # Errors
    /// As [`Drafter::draft`].
    fn prepare(&mut self, context: &[u32], whole: bool) -> Result<()>;

    /// The sequence has been cut to `len` tokens.
    fn rewind(&mut self, len: usize);
}

/// A host's function as a drafter: gets the context and the most tokens that are of use.
pub struct Callback<F>(pub F);

impl<F: FnMut(&[u32], usize) -> Vec<u32> + Send> Drafter for Callback<F> {
    fn draft(&mut self, request: &Request<'_>, draft: &mut Draft) -> Result<()> {
        draft.tokens = (self.0)(request.context, request.most);
        draft.truncate(request.most);
        Ok(())
    }

    fn prepare(&mut self, _context: &[u32], _whole: bool) -> Result<()> {
        Ok(())
    }

    fn rewind(&mut self, _len: usize) {}
}

/// The longest n-gram that is looked up.
const LONGEST: usize = 4;
/// No token: fills n-grams that are shorter than the longest.
const NONE: u32 = u32::MAX;

/// Prompt lookup (Saxena 2023): what followed the last tokens when they were last seen. The latest
/// occurrence of the longest suffix of at most four tokens wins.
///
/// An n-gram enters the index once a token follows it, so the suffix never finds itself. Indexing and
/// looking up cost the same for every token, however long the text is.
#[derive(Debug, Default)]
pub struct Ngram {
    after: HashMap<[u32; LONGEST], usize>,
    indexed: usize,
}

impl Ngram {
    /// An empty index.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Where the text went on after the last time it ended in the last `n` tokens. What another
    /// sequence left in the index is not believed.
    fn find(&self, context: &[u32], n: usize) -> Option<usize> {
        let suffix = &context[context.len() - n..];
        let next = *self.after.get(&gram(suffix))?;
        (next < context.len() && context[next - n..next] == *suffix).then_some(next)
    }

    /// Indexes what has been added to the sequence.
    fn catch_up(&mut self, context: &[u32]) {
        self.rewind(context.len());
        for next in self.indexed.max(1)..context.len() {
            for n in 1..=LONGEST.min(next) {
                self.after.insert(gram(&context[next - n..next]), next);
            }
        }
        self.indexed = context.len();
    }
}

fn gram(tokens: &[u32]) -> [u32; LONGEST] {
    let mut gram = [NONE; LONGEST];
    gram[..tokens.len()].copy_from_slice(tokens);
    gram
}

impl Drafter for Ngram {
    fn draft(&mut self, request: &Request<'_>, draft: &mut Draft) -> Result<()> {
        let context = request.context;
        self.catch_up(context);
        let mut lengths = (1..=LONGEST.min(context.len())).rev();
        let found = lengths.find_map(|n| Some((n, self.find(context, n)?)));
        let Some((n, next)) = found else { return Ok(()) };
        let confidence = n as f32 / LONGEST as f32;
        for at in next..next + request.most {
            // A text that repeats itself goes on into its own drafts.
            let beyond = at.checked_sub(context.len()).map(|at| draft.tokens[at]);
            let token = beyond.unwrap_or_else(|| context[at]);
            draft.push(token, confidence);
        }
        Ok(())
    }

    fn prepare(&mut self, context: &[u32], _whole: bool) -> Result<()> {
        self.catch_up(context);
        Ok(())
    }

    fn rewind(&mut self, len: usize) {
        if len < self.indexed {
            // The places after `len` are no longer there; the next draft indexes the rest anew.
            self.after.clear();
            self.indexed = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drafted(drafter: &mut impl Drafter, context: &[u32], most: usize) -> Vec<u32> {
        let mut draft = Draft::default();
        let request = Request {
            context,
            most,
            sampler: &SamplerConfig::greedy(),
            hook: None,
            random: Random(0),
            go_on: &|_| true,
        };
        drafter.draft(&request, &mut draft).unwrap();
        assert!(draft.tokens.len() <= most);
        draft.tokens
    }

    #[test]
    fn the_longest_suffix_wins_then_the_latest() {
        let text = [1, 2, 3, 9, 2, 3, 8, 7, 3, 6, 1, 2, 3];
        assert_eq!(drafted(&mut Ngram::new(), &text, 3), [9, 2, 3]);
        assert_eq!(drafted(&mut Ngram::new(), &[5, 1, 5, 2, 5], 2), [2, 5]);
    }

    #[test]
    fn nothing_is_found_where_nothing_was_before() {
        assert!(drafted(&mut Ngram::new(), &[], 4).is_empty());
        assert!(drafted(&mut Ngram::new(), &[1], 4).is_empty());
        assert!(drafted(&mut Ngram::new(), &[1, 2, 3, 4], 4).is_empty());
    }

    #[test]
    fn a_repeating_text_is_drafted_past_its_end() {
        assert_eq!(drafted(&mut Ngram::new(), &[1, 2, 1, 2], 5), [1, 2, 1, 2, 1]);
        assert_eq!(drafted(&mut Ngram::new(), &[4, 4], 3), [4, 4, 4]);
    }

    /// What the index must find, by looking at every place.
    fn searched(text: &[u32], most: usize) -> Vec<u32> {
        for n in (1..=LONGEST.min(text.len())).rev() {
            let suffix = &text[text.len() - n..];
            if let Some(at) = (n..text.len()).rev().find(|at| text[at - n..*at] == *suffix) {
                let mut long = text.to_vec();
                (at..at + most).for_each(|at| long.push(long[at]));
                return long[text.len()..].to_vec();
            }
        }
        Vec::new()
    }

    #[test]
    fn the_index_finds_what_a_search_finds_also_after_rewinding() {
        let (mut ngram, mut random, mut text) = (Ngram::new(), Random(3), Vec::new());
        for _ in 0..if cfg!(miri) { 60 } else { 600 } {
            match random.bits() % 16 {
                0 => {
                    text.truncate(random.bits() as usize % (text.len() + 1));
                    ngram.rewind(text.len());
                }
                _ => text.push((random.bits() % 5) as u32),
            }
            assert_eq!(drafted(&mut ngram, &text, 4), searched(&text, 4));
        }
    }

    #[test]
    fn another_sequence_without_notice_is_no_disaster() {
        let mut ngram = Ngram::new();
        assert_eq!(drafted(&mut ngram, &[1, 2, 3, 4, 1, 2], 2), [3, 4]);
        assert_eq!(drafted(&mut ngram, &[1, 9, 1], 1), [9]);
        let mut ngram = Ngram::new();
        assert_eq!(drafted(&mut ngram, &[1, 2, 1], 1), [2]);
        assert_eq!(drafted(&mut ngram, &[5, 6, 7, 8, 1], 1), [0; 0]);
    }

    #[test]
    fn a_callback_cannot_draft_more_than_asked_for() {
        let mut callback = Callback(|context: &[u32], _| vec![context.len() as u32; 9]);
        assert_eq!(drafted(&mut callback, &[1, 2, 3], 2), [3, 3]);
    }
}
