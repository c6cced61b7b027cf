//! Which block holds which prefix, so that a new sequence need not compute what another one has.
//!
//! Only full blocks of verified tokens are entered, under a hash chained over the whole prefix (the
//! scheme of vLLM's automatic prefix caching). A hash only finds a candidate: a hit must hold the same
//! tokens behind the same parent, so a collision costs a comparison, never a wrong answer.
#![forbid(unsafe_code)]

use super::hash::{START, mix};
use std::collections::HashMap;

/// The end of a prefix: its hash, which is stable across processes, and the serial number of its entry,
/// which is not, but is never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    hash: u64,
    serial: u64,
}

impl Link {
    /// The hash of all tokens of the prefix and of the model they were computed with.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hash
    }
}

/// What a cached block holds.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    link: Link,
    parent: u64,
    tokens: Vec<u32>,
}

/// The cached blocks of one pool.
#[derive(Debug)]
pub(super) struct PrefixIndex {
    root: Link,
    next_serial: u64,
    by_hash: HashMap<u64, u32>,
    by_block: HashMap<u32, Entry>,
}

impl PrefixIndex {
    /// An empty index for one model and adapter, named by `fingerprint`.
    pub(super) fn new(fingerprint: u64) -> Self {
        Self {
            root: Link { hash: mix(START, fingerprint), serial: 0 },
            next_serial: 1,
            by_hash: HashMap::new(),
            by_block: HashMap::new(),
        }
    }

    /// The empty prefix.
    pub(super) fn root(&self) -> Link {
        self.root
    }

    /// Blocks entered.
    pub(super) fn len(&self) -> usize {
        self.by_block.len()
    }

    pub(super) fn contains(&self, block: u32) -> bool {
        self.by_block.contains_key(&block)
    }

    /// The block that holds `tokens` behind `parent`.
    pub(super) fn find(&self, parent: Link, tokens: &[u32]) -> Option<(u32, Link)> {
        let block = *self.by_hash.get(&chain(parent, tokens))?;
        let entry = self.by_block.get(&block)?;
        (entry.parent == parent.serial && entry.tokens == tokens).then_some((block, entry.link))
    }

    /// Enters `block`, or does nothing when memory is short or another prefix has the hash.
    pub(super) fn insert(&mut self, block: u32, parent: Link, tokens: &[u32]) -> Option<Link> {
        let hash = chain(parent, tokens);
        let mut copy = Vec::new();
        copy.try_reserve_exact(tokens.len()).ok()?;
        self.by_hash.try_reserve(1).ok()?;
        self.by_block.try_reserve(1).ok()?;
        if self.by_hash.contains_key(&hash) {
            return None;
        }
        copy.extend_from_slice(tokens);
        let link = Link { hash, serial: self.next_serial };
        self.next_serial += 1;
        self.by_hash.insert(hash, block);
        self.by_block.insert(block, Entry { link, parent: parent.serial, tokens: copy });
        Some(link)
    }

    /// Forgets a block that is about to hold something else.
    pub(super) fn remove(&mut self, block: u32) {
        if let Some(entry) = self.by_block.remove(&block) {
            self.by_hash.remove(&entry.link.hash);
        }
    }

    /// Every cached block with its tokens, for tests.
    #[cfg(any(test, fuzzing))]
    pub(super) fn entries(&self) -> impl Iterator<Item = (u32, &[u32])> {
        self.by_block.iter().map(|(block, entry)| (*block, &entry.tokens[..]))
    }

    /// Whether both directions name the same blocks, for tests.
    #[cfg(any(test, fuzzing))]
    pub(super) fn is_consistent(&self) -> bool {
        self.by_hash.len() == self.by_block.len()
            && self.by_block.iter().all(|(b, e)| self.by_hash.get(&e.link.hash) == Some(b))
    }
}

fn chain(parent: Link, tokens: &[u32]) -> u64 {
    tokens.iter().fold(parent.hash, |hash, token| mix(hash, u64::from(*token)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hit_needs_the_tokens_the_parent_and_the_model() {
        let mut index = PrefixIndex::new(7);
        let root = index.root();
        let first = index.insert(3, root, &[1, 2]).unwrap();
        let second = index.insert(4, first, &[1, 2]).unwrap();
        assert_eq!(index.find(root, &[1, 2]), Some((3, first)));
        assert_eq!(index.find(first, &[1, 2]), Some((4, second)));
        assert_eq!(index.find(first, &[2, 1]), None);
        assert_eq!(index.find(second, &[1, 2]), None);
        assert_eq!(PrefixIndex::new(8).find(root, &[1, 2]), None);
        assert_ne!(PrefixIndex::new(8).root().hash(), root.hash());
    }

    #[test]
    fn a_colliding_hash_is_no_hit() {
        let mut index = PrefixIndex::new(7);
        let link = index.insert(3, index.root(), &[1, 2]).unwrap();
        // Another parent with the same hash: found by the hash, refused by the serial number.
        let forged = Link { serial: 99, ..index.root() };
        assert_eq!(index.find(forged, &[1, 2]), None);
        assert_eq!(index.insert(5, forged, &[1, 2]), None);
        index.remove(3);
        assert_eq!((index.find(index.root(), &[1, 2]), index.len()), (None, 0));
        assert!(index.insert(5, forged, &[1, 2]).unwrap().serial > link.serial);
    }
}
