//! Block tables: which block of the store holds which positions of a sequence. Integers only.
//!
//! Blocks are counted by reference, so a fork shares all of them and a shared block is copied when one
//! of its sequences is about to write into it. A block that nobody holds stays in the free list with
//! what it has cached, oldest first, until it is taken (the manager of vLLM, Kwon et al. 2023). Changes
//! go through a plan, which is made from reading alone: a reservation takes all it needs or nothing.
#![forbid(unsafe_code)]

use super::prefix::{Link, PrefixIndex};
use std::ops::Range;

/// Stands in a table for a block whose positions a window has left behind. It has no bytes.
pub const NULL_BLOCK: u32 = u32::MAX;

/// No neighbour in the free list.
const END: u32 = u32::MAX;

/// One block: how many tables hold it, or where it stands in the free list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    refs: u32,
    prev: u32,
    next: u32,
}

/// The free and used blocks of one store, and what the free ones still hold.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// The list of blocks that no table holds: first those with nothing in them, then cached ones in
    /// the order in which they are evicted.
    head: u32,
    tail: u32,
    free: usize,
    /// Blocks that may exist at once.
    limit: usize,
    tokens: usize,
    prefix: PrefixIndex,
}

/// What a reservation is going to take. Made by [`BlockTable::plan`], carried out by
/// [`BlockTable::reserve`]; between the two the store finds memory for the blocks.
#[derive(Debug)]
pub struct Plan {
    blocks: Vec<u32>,
    /// The shared tail that the first of the blocks is to become a copy of.
    copy: Option<u32>,
    reserved: usize,
}

impl Plan {
    /// The blocks that will be taken.
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// The block to copy and the block to copy it to, before anything is written.
    #[must_use]
    pub fn copy(&self) -> Option<(u32, u32)> {
        self.copy.zip(self.blocks.first().copied())
    }
}

/// Blocks that were asked for, and those that could be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted {
    /// Blocks that the call needed.
    pub needed: usize,
    /// Blocks that no table holds.
    pub available: usize,
}

impl BlockPool {
    /// A pool of at most `limit` blocks of `tokens` tokens. `fingerprint` names the model and adapter
    /// whose prefixes it caches.
    #[must_use]
    pub fn new(tokens: usize, limit: usize, fingerprint: u64) -> Self {
        Self {
            blocks: Vec::new(),
            head: END,
            tail: END,
            free: 0,
            limit: limit.min(NULL_BLOCK as usize),
            tokens,
            prefix: PrefixIndex::new(fingerprint),
        }
    }

    /// Tokens in a block.
    #[must_use]
    pub fn block_tokens(&self) -> usize {
        self.tokens
    }

    /// Blocks that may exist at once.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Lets `limit` blocks exist at once from now on, but never fewer than have been made.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit.clamp(self.blocks.len(), NULL_BLOCK as usize);
    }

    /// Blocks that a new reservation could still take, cached ones included.
    #[must_use]
    pub fn available(&self) -> usize {
        self.free + (self.limit - self.blocks.len())
    }

    /// Blocks that have ever been handed out: their numbers are below this.
    #[must_use]
    pub fn made(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that hold a prefix others can find, whether a table holds them or not.
    #[must_use]
    pub fn cached(&self) -> usize {
        self.prefix.len()
    }

    /// Whether no table holds the block.
    #[must_use]
    pub fn is_free(&self, block: u32) -> bool {
        self.blocks[block as usize].refs == 0
    }

    /// Whether one table alone holds the block and nobody can find it as a prefix.
    #[must_use]
    pub fn is_writable(&self, block: u32) -> bool {
        block != NULL_BLOCK && self.blocks[block as usize].refs == 1 && !self.prefix.contains(block)
    }

    /// Whether others can find the block as part of a prefix.
    #[must_use]
    pub fn is_cached(&self, block: u32) -> bool {
        self.prefix.contains(block)
    }

    /// Forgets the prefix in a block that no table holds: it is empty now, and among the first to be taken.
    pub fn forget(&mut self, block: u32) {
        if self.prefix.contains(block) {
            self.prefix.remove(block);
            self.hold(block);
            self.release(block);
        }
    }

    /// Forgets the prefixes of all blocks that no table holds, so that their bytes can go.
    pub fn forget_free(&mut self) {
        let mut block = self.head;
        while block != END {
            self.prefix.remove(block);
            block = self.blocks[block as usize].next;
        }
    }

    /// The numbers that the next reservations take, in order: empty blocks, then new ones, then cached
    /// ones from the one least lately used.
    fn upcoming(&self) -> impl Iterator<Item = u32> {
        let new = self.blocks.len()..self.limit;
        self.listed()
            .take_while(|block| !self.prefix.contains(*block))
            .chain(new.map(|block| block as u32))
            .chain(self.listed().skip_while(|block| !self.prefix.contains(*block)))
    }

    /// The free list from its head.
    fn listed(&self) -> impl Iterator<Item = u32> {
        let exists = |block| (block != END).then_some(block);
        std::iter::successors(exists(self.head), move |block| {
            exists(self.blocks[*block as usize].next)
        })
    }

    /// Takes a block that [`BlockPool::upcoming`] named.
    fn take(&mut self, block: u32) {
        if block as usize == self.blocks.len() {
            self.blocks.push(Block { refs: 1, prev: END, next: END });
        } else {
            self.prefix.remove(block);
            self.hold(block);
        }
    }

    /// One more table holds the block.
    fn hold(&mut self, block: u32) {
        if block == NULL_BLOCK {
            return;
        }
        let Block { refs, prev, next } = self.blocks[block as usize];
        self.blocks[block as usize].refs += 1;
        if refs == 0 {
            match prev {
                END => self.head = next,
                prev => self.blocks[prev as usize].next = next,
            }
            match next {
                END => self.tail = prev,
                next => self.blocks[next as usize].prev = prev,
            }
            self.free -= 1;
        }
    }

    /// One table fewer holds the block. With nothing cached it is the next to be taken, otherwise the
    /// last.
    fn release(&mut self, block: u32) {
        if block == NULL_BLOCK {
            return;
        }
        self.blocks[block as usize].refs -= 1;
        if self.blocks[block as usize].refs > 0 {
            return;
        }
        let cached = self.prefix.contains(block);
        let (prev, next) = if cached { (self.tail, END) } else { (END, self.head) };
        self.blocks[block as usize] = Block { refs: 0, prev, next };
        match prev {
            END => self.head = block,
            prev => self.blocks[prev as usize].next = block,
        }
        match next {
            END => self.tail = block,
            next => self.blocks[next as usize].prev = block,
        }
        self.free += 1;
    }
}

/// The blocks of one sequence, in order of position, and how many tokens they hold.
///
/// A table belongs to the pool that filled it and must be emptied into it ([`BlockTable::truncate`] to
/// zero) before it is dropped, or its blocks stay taken.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
    len: usize,
    /// Positions below this may be written.
    reserved: usize,
    /// The prefixes that end with each of the first blocks, as far as they are known to the index.
    chain: Vec<Link>,
    /// Blocks that a window has left behind.
    dropped: Range<usize>,
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

    /// The end of the positions that may be written.
    #[must_use]
    pub fn reserved(&self) -> usize {
        self.reserved
    }

    /// The block numbers in order of position; [`NULL_BLOCK`] where a window has dropped them.
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// The positions that a window has dropped.
    #[must_use]
    pub fn dropped(&self, pool: &BlockPool) -> Range<usize> {
        self.dropped.start * pool.tokens..self.dropped.end * pool.tokens
    }

    /// What room for `count` more tokens takes: new blocks, and a copy of the tail if it is shared.
    ///
    /// # Errors
    /// [`Exhausted`] when the pool has too few blocks or memory for the plan itself is short.
    pub fn plan(&self, pool: &BlockPool, count: usize) -> Result<Plan, Exhausted> {
        let available = pool.available();
        let Some(end) = self.len.checked_add(count) else {
            return Err(Exhausted { needed: usize::MAX, available });
        };
        let reserved = self.reserved.max(end);
        let tail = self.blocks.get(self.len / pool.tokens).copied();
        let copy = tail.filter(|tail| count > 0 && pool.blocks[*tail as usize].refs > 1);
        let grow = reserved.div_ceil(pool.tokens).saturating_sub(self.blocks.len());
        let needed = grow + usize::from(copy.is_some());
        let mut blocks = Vec::new();
        if needed > available || blocks.try_reserve_exact(needed).is_err() {
            return Err(Exhausted { needed, available });
        }
        blocks.extend(pool.upcoming().take(needed));
        Ok(Plan { blocks, copy, reserved })
    }

    /// Carries a plan out, which must have been the last thing that happened to the pool; `false`, and
    /// nothing changed, when the system has no memory for the lists. The store makes the plan's copy.
    #[must_use]
    pub fn reserve(&mut self, pool: &mut BlockPool, plan: &Plan) -> bool {
        let count = plan.blocks.len();
        if self.blocks.try_reserve(count).is_err() || pool.blocks.try_reserve(count).is_err() {
            return false;
        }
        let mut fresh = plan.blocks.iter().copied();
        for block in plan.blocks() {
            pool.take(*block);
        }
        if let Some(shared) = plan.copy
            && let Some(own) = fresh.next()
        {
            self.blocks[self.len / pool.tokens] = own;
            pool.release(shared);
        }
        // A tail that others could find is about to change.
        if plan.reserved > self.len
            && let Some(tail) = self.blocks.get(self.len / pool.tokens)
        {
            pool.prefix.remove(*tail);
        }
        self.blocks.extend(fresh);
        self.reserved = plan.reserved;
        true
    }

    /// Holds the `count` tokens that were reserved and written.
    ///
    /// # Panics
    /// When more are committed than were reserved: a bug of the caller.
    pub fn commit(&mut self, count: usize) {
        assert!(self.len + count <= self.reserved, "not reserved");
        self.len += count;
    }

    /// Keeps the first `len` tokens and gives the blocks behind them back; with its own length, the way
    /// to drop a reservation. Works within shared blocks: the next reservation copies. A length inside
    /// what a window has dropped becomes the length before it.
    pub fn truncate(&mut self, pool: &mut BlockPool, len: usize) {
        let dropped = self.dropped(pool);
        self.len = self.len.min(if dropped.contains(&len) { dropped.start } else { len });
        self.reserved = self.len;
        self.chain.truncate(self.len / pool.tokens);
        let keep = self.len.div_ceil(pool.tokens);
        // From the back: the end of a prefix is of less use than its start, so it is evicted first.
        while self.blocks.len() > keep {
            if let Some(block) = self.blocks.pop() {
                pool.release(block);
            }
        }
        if keep <= self.dropped.start {
            self.dropped = 0..0;
        }
    }

    /// A second sequence with the same tokens. Its cost is this table; blocks are copied when one of
    /// the two writes. A reservation of `self` is dropped. `None` when memory is short.
    pub fn fork(&mut self, pool: &mut BlockPool) -> Option<Self> {
        self.truncate(pool, self.len);
        let mut fork = Self { len: self.len, reserved: self.len, ..Self::default() };
        fork.blocks.try_reserve_exact(self.blocks.len()).ok()?;
        fork.chain.try_reserve_exact(self.chain.len()).ok()?;
        fork.blocks.extend_from_slice(&self.blocks);
        fork.chain.extend_from_slice(&self.chain);
        fork.dropped = self.dropped.clone();
        for block in &fork.blocks {
            pool.hold(*block);
        }
        Some(fork)
    }

    /// Takes over the blocks that hold the beginning of `tokens`, the whole sequence as it is going to
    /// be, where they reach further than what the table holds. Always leaves at least one token to
    /// compute, which is what gives logits. Returns the tokens gained.
    pub fn reuse(&mut self, pool: &mut BlockPool, tokens: &[u32]) -> usize {
        if !self.dropped.is_empty() {
            return 0;
        }
        let known = self.chain.len();
        let mut link = self.chain.last().copied().unwrap_or(pool.prefix.root());
        let most = tokens.len().saturating_sub(1) / pool.tokens;
        let mut hits = Vec::new();
        for tokens in tokens.chunks_exact(pool.tokens).take(most).skip(known) {
            let Some(hit) = pool.prefix.find(link, tokens) else { break };
            if hits.try_reserve(1).is_err() {
                break;
            }
            hits.push(hit);
            link = hit.1;
        }
        let (before, end) = (self.len, (known + hits.len()) * pool.tokens);
        let room = self.blocks.try_reserve(hits.len()).and(self.chain.try_reserve(hits.len()));
        if end <= before || room.is_err() {
            return 0;
        }
        self.truncate(pool, known * pool.tokens);
        for (block, link) in hits {
            pool.hold(block);
            self.blocks.push(block);
            self.chain.push(link);
        }
        (self.len, self.reserved) = (end, end);
        end - before
    }

    /// Lets other sequences find the full blocks among `tokens`: the sequence from its start, as far as
    /// it is verified. Never pass draft tokens. A block that is already cached elsewhere is given back
    /// and the cached one held instead.
    pub fn publish(&mut self, pool: &mut BlockPool, tokens: &[u32]) {
        let verified = tokens.len().min(self.len);
        let known = self.chain.len();
        for (index, tokens) in tokens[..verified].chunks_exact(pool.tokens).enumerate().skip(known)
        {
            let own = self.blocks[index];
            if own == NULL_BLOCK || self.chain.try_reserve(1).is_err() {
                return;
            }
            let parent = self.chain.last().copied().unwrap_or(pool.prefix.root());
            let link = match pool.prefix.find(parent, tokens) {
                Some((cached, link)) => {
                    pool.hold(cached);
                    pool.release(own);
                    self.blocks[index] = cached;
                    link
                }
                None => match pool.prefix.insert(own, parent, tokens) {
                    Some(link) => link,
                    None => return,
                },
            };
            self.chain.push(link);
        }
    }

    /// Gives back the blocks that lie wholly between the first `sinks` tokens and position `from`, which
    /// no layer will look at again. They cannot come back: do not truncate to where they would be seen.
    pub fn drop_before(&mut self, pool: &mut BlockPool, sinks: usize, from: usize) {
        let from = from.min(self.len) / pool.tokens;
        let start = match self.dropped.is_empty() {
            true => sinks.div_ceil(pool.tokens),
            false => self.dropped.start,
        };
        if from > self.dropped.end.max(start) {
            for block in &mut self.blocks[self.dropped.end.max(start)..from] {
                pool.release(std::mem::replace(block, NULL_BLOCK));
            }
            self.dropped = start..from;
        }
    }

    /// Holds the positions up to `to` as dropped by a window: how a snapshot of such a sequence comes
    /// back. `false`, and nothing changed, when memory for the table is short.
    ///
    /// # Panics
    /// When either end lies inside a block or positions were dropped before: a bug of the caller.
    #[must_use]
    pub fn skip(&mut self, pool: &mut BlockPool, to: usize) -> bool {
        self.truncate(pool, self.len);
        let range = self.len / pool.tokens..to / pool.tokens;
        assert!(range.start * pool.tokens == self.len && range.end * pool.tokens == to);
        assert!(self.dropped.is_empty() && !range.is_empty(), "dropped before");
        if self.blocks.try_reserve(range.len()).is_err() {
            return false;
        }
        self.blocks.resize(range.end, NULL_BLOCK);
        self.dropped = range;
        (self.len, self.reserved) = (to, to);
        true
    }

    /// The block and the place in it of a position.
    ///
    /// # Panics
    /// When the position has no block: a bug of the caller.
    #[must_use]
    pub fn locate(&self, pool: &BlockPool, position: usize) -> (u32, usize) {
        (self.blocks[position / pool.tokens], position % pool.tokens)
    }
}

#[cfg(any(test, fuzzing))]
impl BlockPool {
    /// References, free list and index agree with the tables, which are all there are.
    pub(super) fn check(&self, tables: &[&BlockTable]) {
        let mut refs = vec![0; self.blocks.len()];
        let held = tables.iter().flat_map(|table| &table.blocks);
        held.filter(|block| **block != NULL_BLOCK).for_each(|block| refs[*block as usize] += 1);
        let counted: Vec<_> = self.blocks.iter().map(|block| block.refs).collect();
        assert_eq!(counted, refs, "references");

        let (mut block, mut prev, mut seen, mut cached) = (self.head, END, vec![], false);
        while block != END {
            assert_eq!((self.blocks[block as usize].prev, refs[block as usize]), (prev, 0));
            assert!(self.prefix.contains(block) || !cached, "an empty block behind a cached one");
            cached |= self.prefix.contains(block);
            seen.push(block);
            (prev, block) = (block, self.blocks[block as usize].next);
        }
        assert_eq!((self.tail, self.free), (prev, seen.len()));
        assert_eq!(seen.len(), refs.iter().filter(|refs| **refs == 0).count());
        assert!(self.blocks.len() <= self.limit && self.prefix.is_consistent());
        assert!(self.prefix.entries().all(|(_, tokens)| tokens.len() == self.tokens));
        for table in tables {
            assert_eq!(table.blocks.len(), table.reserved.div_ceil(self.tokens));
            assert!(table.chain.len() <= table.len / self.tokens);
            for position in table.len..table.reserved {
                assert!(self.is_writable(table.blocks[position / self.tokens]), "at {position}");
            }
        }
    }

    /// All there is to compare before and after a call that failed.
    pub(super) fn state(&self) -> String {
        format!("{:?} {} {} {} {:?}", self.blocks, self.head, self.tail, self.free, {
            let mut cached: Vec<_> = self.prefix.entries().collect();
            cached.sort_unstable();
            cached
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reserve(table: &mut BlockTable, pool: &mut BlockPool, count: usize) -> Option<Plan> {
        let plan = table.plan(pool, count).ok()?;
        assert!(table.reserve(pool, &plan));
        Some(plan)
    }

    fn filled(pool: &mut BlockPool, tokens: &[u32]) -> BlockTable {
        let mut table = BlockTable::default();
        let gained = table.reuse(pool, tokens);
        reserve(&mut table, pool, tokens.len() - gained).unwrap();
        table.commit(tokens.len() - gained);
        table.publish(pool, tokens);
        table
    }

    #[test]
    fn blocks_come_when_needed_and_go_when_truncated() {
        let mut pool = BlockPool::new(64, 4, 0);
        let mut table = BlockTable::default();
        assert!(reserve(&mut table, &mut pool, 65).is_some());
        assert_eq!((table.blocks(), pool.available()), (&[0, 1][..], 2));
        table.commit(65);
        assert_eq!(table.locate(&pool, 64), (1, 0));
        table.truncate(&mut pool, 64);
        assert_eq!((table.len(), table.blocks(), pool.available()), (64, &[0][..], 3));
        assert!(reserve(&mut table, &mut pool, 100).is_some());
        assert_eq!(table.blocks(), [0, 1, 2]);
    }

    #[test]
    fn a_reservation_takes_all_or_nothing() {
        let mut pool = BlockPool::new(64, 2, 0);
        let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
        assert!(reserve(&mut a, &mut pool, 1).is_some());
        assert_eq!(b.plan(&pool, 65).unwrap_err(), Exhausted { needed: 2, available: 1 });
        assert!(b.plan(&pool, usize::MAX).is_err());
        assert_eq!((b.blocks().len(), pool.available()), (0, 1));
        assert!(reserve(&mut b, &mut pool, 64).is_some());
        a.truncate(&mut pool, 0);
        assert_eq!(pool.available(), 1);
    }

    #[test]
    fn a_fork_copies_the_tail_only_and_only_when_it_writes() {
        let mut pool = BlockPool::new(16, 8, 0);
        let mut a = filled(&mut pool, &[0; 40]);
        let mut b = a.fork(&mut pool).unwrap();
        assert_eq!((a.blocks(), pool.available()), (b.blocks(), 5));
        let plan = reserve(&mut b, &mut pool, 1).unwrap();
        assert_eq!((plan.copy(), plan.blocks()), (Some((2, 3)), &[3][..]));
        assert_eq!((a.blocks(), b.blocks()), (&[0, 1, 2][..], &[0, 1, 3][..]));
        // The other one is alone with its tail now.
        assert_eq!(reserve(&mut a, &mut pool, 1).unwrap().copy(), None);
        pool.check(&[&a, &b]);
        // A fork drops the reservation: the tail it was for is shared again.
        let mut c = a.fork(&mut pool).unwrap();
        assert_eq!(a.reserved(), 40);
        c.truncate(&mut pool, 5);
        assert_eq!(reserve(&mut c, &mut pool, 1).unwrap().copy(), Some((0, 4)));
        pool.check(&[&a, &b, &c]);
    }

    #[test]
    fn prefixes_are_found_and_a_token_is_always_left() {
        let mut pool = BlockPool::new(16, 8, 0);
        let text: Vec<u32> = (0..48).collect();
        let a = filled(&mut pool, &text);
        let mut b = BlockTable::default();
        assert_eq!(b.reuse(&mut pool, &text), 32);
        assert_eq!(b.blocks(), &a.blocks()[..2]);
        b.truncate(&mut pool, 0);
        assert_eq!(b.reuse(&mut pool, &text[..17]), 16);
        // Further than what it holds already, and through a block of its own.
        reserve(&mut b, &mut pool, 4).unwrap();
        b.commit(4);
        let longer: Vec<u32> = (0..60).collect();
        assert_eq!((b.reuse(&mut pool, &longer), b.len()), (28, 48));
        pool.check(&[&a, &b]);
    }

    #[test]
    fn equal_blocks_become_one() {
        let mut pool = BlockPool::new(16, 8, 0);
        let a = filled(&mut pool, &[7; 16]);
        let b = filled(&mut pool, &[7; 16]);
        assert_eq!((a.blocks(), b.blocks(), pool.available()), (&[0][..], &[0][..], 7));
        pool.check(&[&a, &b]);
    }

    #[test]
    fn eviction_takes_the_end_of_the_oldest_prefix_and_never_a_hit() {
        let mut pool = BlockPool::new(16, 4, 0);
        let (old, new): (Vec<u32>, Vec<u32>) = ((0..32).collect(), (100..132).collect());
        filled(&mut pool, &old).truncate(&mut pool, 0);
        filled(&mut pool, &new).truncate(&mut pool, 0);
        assert_eq!((pool.cached(), pool.available()), (4, 4));
        // One block more than the hits and the free ones: refused, and nothing is evicted for it.
        let mut table = BlockTable::default();
        let longer: Vec<u32> = (0..80).collect();
        assert_eq!(table.reuse(&mut pool, &longer), 32);
        let before = pool.state();
        assert_eq!(table.plan(&pool, 48).unwrap_err(), Exhausted { needed: 3, available: 2 });
        assert_eq!(pool.state(), before);
        reserve(&mut table, &mut pool, 16).unwrap();
        assert_eq!(pool.cached(), 3);
        let mut again = BlockTable::default();
        assert_eq!(again.reuse(&mut pool, &[&new[..], &[1]].concat()), 16);
        pool.check(&[&table, &again]);
    }

    #[test]
    fn a_cached_tail_is_forgotten_before_it_is_written() {
        let mut pool = BlockPool::new(16, 4, 0);
        let mut table = filled(&mut pool, &[1; 16]);
        table.truncate(&mut pool, 10);
        assert_eq!(pool.cached(), 1);
        assert_eq!(reserve(&mut table, &mut pool, 1).unwrap().copy(), None);
        assert_eq!(pool.cached(), 0);
        pool.check(&[&table]);
    }

    #[test]
    fn a_window_leaves_null_blocks_behind() {
        let mut pool = BlockPool::new(16, 8, 0);
        let mut table = filled(&mut pool, &(0..100).collect::<Vec<_>>());
        table.drop_before(&mut pool, 4, 70);
        assert_eq!(table.dropped(&pool), 16..64);
        assert_eq!(table.blocks()[1..4], [NULL_BLOCK; 3]);
        table.drop_before(&mut pool, 4, 60);
        table.drop_before(&mut pool, 4, 81);
        assert_eq!((table.dropped(&pool), pool.available()), (16..80, 5));
        let mut fork = table.fork(&mut pool).unwrap();
        pool.check(&[&table, &fork]);
        fork.truncate(&mut pool, 8);
        assert!(fork.dropped(&pool).is_empty());
        let mut inside = table.fork(&mut pool).unwrap();
        inside.truncate(&mut pool, 50);
        assert_eq!(inside.len(), 16);
        inside.truncate(&mut pool, 0);
        table.truncate(&mut pool, 0);
        fork.truncate(&mut pool, 0);
        assert_eq!(pool.available(), 8);
        pool.check(&[&table, &fork]);
    }
}
