//! Tokens of a target in the vocabulary of its drafter, and back.
//!
//! Drafts are only guesses, so a translation can cost acceptance but no correctness. Tokens with the same
//! text are each other's translation. A token of the context that the drafter does not have is
//! spelled in the longest of its tokens that fit; a token that the target does not have ends the draft.
#![forbid(unsafe_code)]

use super::load::Model;
use crate::error::{Error, Result};
#[cfg(feature = "text")]
use crate::text::tokenizer::{Name, Tokenizer};
#[cfg(feature = "text")]
use std::collections::HashMap;

/// The share of the drafter's tokens that the target must have.
#[cfg(feature = "text")]
const LEAST_COMMON: f64 = 0.5;

/// A translation and the context that it was last asked for.
#[derive(Debug)]
pub(super) struct Translation {
    /// None when both have the same vocabulary, but for its length.
    maps: Option<Maps>,
    /// Tokens of the smaller vocabulary.
    common: usize,
    context: Vec<u32>,
    ours: Vec<u32>,
    /// Where the translation of each token of the context ends.
    ends: Vec<usize>,
}

/// For every token of one vocabulary what it is in the other.
#[derive(Debug)]
struct Maps {
    spelled: Vec<Vec<u32>>,
    back: Vec<Option<u32>>,
}

impl Translation {
    pub(super) fn new(target: &Model, drafter: &Model) -> Result<Self> {
        let refused = |why: String| {
            let text = format!("{} cannot draft for {}: {why}", drafter.file(), target.file());
            Error::InvalidArgument(text)
        };
        let maps = Self::maps(target, drafter).map_err(refused)?;
        let common = target.vocab().min(drafter.vocab());
        Ok(Self { maps, common, context: Vec::new(), ours: Vec::new(), ends: Vec::new() })
    }

    #[cfg(feature = "text")]
    fn maps(target: &Model, drafter: &Model) -> std::result::Result<Option<Maps>, String> {
        match (target.tokenizer(), drafter.tokenizer()) {
            (Ok(target), Ok(drafter)) => compare(target, drafter),
            (Err(_), Err(_)) => Self::unnamed(target, drafter),
            _ => {
                Err("only one of them holds a tokenizer, so their tokens cannot be compared".into())
            }
        }
    }

    #[cfg(not(feature = "text"))]
    fn maps(target: &Model, drafter: &Model) -> std::result::Result<Option<Maps>, String> {
        Self::unnamed(target, drafter)
    }

    /// Two vocabularies of which only the length is known.
    fn unnamed(target: &Model, drafter: &Model) -> std::result::Result<Option<Maps>, String> {
        let (target, drafter) = (target.vocab(), drafter.vocab());
        if target == drafter {
            return Ok(None);
        }
        Err(format!(
            "a vocabulary of {drafter} tokens for one of {target}, and no texts to compare"
        ))
    }

    /// Whether tokens are the same on both sides.
    pub(super) fn is_identity(&self) -> bool {
        self.maps.is_none()
    }

    /// Translates `context`, of which the part that it shares with the last one is known.
    pub(super) fn follow(&mut self, context: &[u32]) {
        let shared = self.context.iter().zip(context).take_while(|(a, b)| a == b).count();
        self.context.truncate(shared);
        self.ends.truncate(shared);
        self.ours.truncate(self.ends.last().copied().unwrap_or(0));
        for token in &context[shared..] {
            match &self.maps {
                Some(maps) => self.ours.extend(&maps.spelled[*token as usize]),
                // What pads the longer vocabulary says nothing to the shorter one.
                None => self.ours.extend(((*token as usize) < self.common).then_some(token)),
            }
            self.context.push(*token);
            self.ends.push(self.ours.len());
        }
    }

    /// The context in the drafter's tokens.
    pub(super) fn translated(&self) -> &[u32] {
        &self.ours
    }

    /// A token of the drafter in the target's vocabulary.
    pub(super) fn to_target(&self, token: u32) -> Option<u32> {
        match &self.maps {
            Some(maps) => maps.back.get(token as usize).copied().flatten(),
            None => ((token as usize) < self.common).then_some(token),
        }
    }
}

/// The maps between two vocabularies, none when they agree as far as the shorter one goes.
#[cfg(feature = "text")]
fn compare(target: &Tokenizer, drafter: &Tokenizer) -> std::result::Result<Option<Maps>, String> {
    let (theirs, ours) = (target.names(), drafter.names());
    if theirs.iter().zip(&ours).all(|(a, b)| a == b) {
        return Ok(None);
    }
    let index = |names: &[Name]| -> HashMap<Name, u32> {
        // Of several tokens with one text the last one counts: bytes that stand in for characters
        // without a token come before the characters.
        let named = names.iter().cloned().zip(0..);
        named.filter(|(name, _)| *name != Name::Text(Box::default())).collect()
    };
    let (by_theirs, by_ours) = (index(&theirs), index(&ours));
    let back: Vec<_> = ours.iter().map(|name| by_theirs.get(name).copied()).collect();
    let shared = back.iter().flatten().count();
    if (shared as f64) < LEAST_COMMON * ours.len() as f64 {
        return Err(format!(
            "only {shared} of its {} tokens have a text that the target has a token for",
            ours.len()
        ));
    }
    let spelled = theirs.iter().map(|name| spell(name, &by_ours)).collect();
    Ok(Some(Maps { spelled, back }))
}

/// The token with this name, or else the longest tokens that its text is made of. What cannot be spelled
/// is left out.
#[cfg(feature = "text")]
fn spell(name: &Name, tokens: &HashMap<Name, u32>) -> Vec<u32> {
    if let Some(token) = tokens.get(name) {
        return vec![*token];
    }
    let Name::Text(bytes) = name else { return Vec::new() };
    let (mut spelled, mut rest) = (Vec::new(), &bytes[..]);
    while !rest.is_empty() {
        let longest = (1..=rest.len()).rev().find_map(|len| {
            let token = tokens.get(&Name::Text(rest[..len].into()))?;
            Some((len, *token))
        });
        let (len, token) = longest.map_or((1, None), |(len, token)| (len, Some(token)));
        spelled.extend(token);
        rest = &rest[len..];
    }
    spelled
}

#[cfg(all(test, feature = "text"))]
mod tests {
    use super::*;

    fn text(text: &str) -> Name {
        Name::Text(text.as_bytes().into())
    }

    #[test]
    fn what_has_no_token_is_spelled_in_the_longest_ones() {
        let names = ["a", "b", "ab", "abc", " a"];
        let tokens = names.iter().map(|name| text(name)).zip(0..).collect();
        assert_eq!(spell(&text("ab"), &tokens), [2]);
        assert_eq!(spell(&text("abab"), &tokens), [2, 2]);
        assert_eq!(spell(&text("aabcb a"), &tokens), [0, 3, 1, 4]);
        assert_eq!(spell(&text("axb"), &tokens), [0, 1], "x is left out");
        assert!(spell(&Name::Special("<s>".into()), &tokens).is_empty());
    }
}
