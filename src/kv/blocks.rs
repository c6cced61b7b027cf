//! Block tables: which block of the store holds which positions of a sequence. Integers only.
//!
//! Blocks are taken when the first token needs them and given back on truncation, so a context of
//! 32k tokens costs what is used. A reservation takes all it needs or nothing.
#![forbid(unsafe_code)]

use super::BLOCK_TOKENS;

/// The free and used blocks of one store.
#[derive(Debug, Default)]
pub struct BlockPool {
    free: Vec<u32>,
    /// Blocks that have ever been handed out.
    made: usize,
    /// Blocks that may exist at once.
    limit: usize,
}

impl BlockPool {
    /// A pool of at most `limit` blocks.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { free: Vec::new(), made: 0, limit }
    }

    /// Blocks that a new reservation could still take.
    #[must_use]
    pub fn available(&self) -> usize {
        self.free.len() + (self.limit - self.made)
    }

    /// Blocks that the store must have room for.
    #[must_use]
    pub fn made(&self) -> usize {
        self.made
    }

    fn take(&mut self) -> Option<u32> {
        // Low numbers first and in order: neighbours in a table are then neighbours in memory.
        self.free.pop().or_else(|| {
            let next = u32::try_from(self.made).ok().filter(|_| self.made < self.limit)?;
            self.made += 1;
            Some(next)
        })
    }
}

/// The blocks of one sequence, in order of position, and how many tokens they hold.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
    len: usize,
}

impl BlockTable {
    /// Tokens held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The block numbers in order of position.
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Makes room for `count` tokens more without holding them yet; `false`, and nothing changed,
    /// when the pool has too few blocks.
    #[must_use]
    pub fn reserve(&mut self, pool: &mut BlockPool, count: usize) -> bool {
        let wanted = (self.len + count).div_ceil(BLOCK_TOKENS);
        let missing = wanted.saturating_sub(self.blocks.len());
        if missing > pool.available() || self.blocks.try_reserve(missing).is_err() {
            return false;
        }
        self.blocks.extend(std::iter::from_fn(|| pool.take()).take(missing));
        true
    }

    /// Holds the `count` tokens that were reserved and written.
    ///
    /// # Panics
    /// When more are committed than were reserved: a bug of the caller.
    pub fn commit(&mut self, count: usize) {
        assert!((self.len + count).div_ceil(BLOCK_TOKENS) <= self.blocks.len(), "not reserved");
        self.len += count;
    }

    /// Keeps the first `len` tokens and gives the blocks behind them back; also the way to drop a
    /// reservation.
    pub fn truncate(&mut self, pool: &mut BlockPool, len: usize) {
        self.len = self.len.min(len);
        let keep = self.len.div_ceil(BLOCK_TOKENS);
        pool.free.extend(self.blocks.drain(keep..).rev());
    }

    /// The block and the place in it of a reserved position.
    #[must_use]
    pub fn locate(&self, position: usize) -> (u32, usize) {
        (self.blocks[position / BLOCK_TOKENS], position % BLOCK_TOKENS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_when_needed_and_go_when_truncated() {
        let mut pool = BlockPool::new(4);
        let mut table = BlockTable::default();
        assert!(table.reserve(&mut pool, 65));
        assert_eq!((table.blocks(), pool.available()), (&[0, 1][..], 2));
        table.commit(65);
        assert_eq!(table.locate(64), (1, 0));
        table.truncate(&mut pool, 64);
        assert_eq!((table.len(), table.blocks(), pool.available()), (64, &[0][..], 3));
        assert!(table.reserve(&mut pool, 100));
        assert_eq!(table.blocks(), [0, 1, 2]);
    }

    #[test]
    fn a_reservation_takes_all_or_nothing() {
        let mut pool = BlockPool::new(2);
        let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
        assert!(a.reserve(&mut pool, 1));
        assert!(!b.reserve(&mut pool, 65));
        assert_eq!((b.blocks().len(), pool.available()), (0, 1));
        assert!(b.reserve(&mut pool, 64));
        a.truncate(&mut pool, 0);
        assert_eq!(pool.available(), 1);
    }
}
