//! The bytes of the KV cache: blocks of keys and values, made on demand.
//!
//! A block holds some positions of every layer and KV head, in chunks of 16 positions: for each layer and
//! head first the chunks of keys, then those of values. Heads are padded to a multiple of 16 elements. The
//! operations on sequences are here because each of them is a decision of [`super::blocks`] followed by a
//! movement of bytes.
//!
//! Memory is counted before it is taken. Where it would exceed the budget, blocks that no sequence holds
//! give theirs up, and with a spill file also the blocks of sequences that were not used for the longest
//! time; they come back when their sequence is used again.
#![forbid(unsafe_code)]

use super::BLOCK_TOKENS;
use super::blocks::{BlockPool, BlockTable, Exhausted, NULL_BLOCK, Plan};
use super::elements;
use super::regions::{Piece, Regions};
use super::spill::{Slot, SpillFile};
use crate::error::{Error, Result};
use crate::kernel::{KvFormat, LANES};
use crate::memory::Aligned;
use std::ops::Range;
use std::path::Path;

/// Tokens at the start of a sequence that an [`KvFormat::I4`] cache keeps in f16.
const SINK_TOKENS: usize = 64;

/// What one token occupies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers that have a cache.
    pub n_layers: usize,
    /// KV heads in a layer.
    pub n_kv_heads: usize,
    /// Floats in a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Elements of a head as stored: padded to whole vectors.
    #[must_use]
    pub fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Bytes that a token costs in a format, without the start of a sequence that [`KvFormat::I4`] keeps
    /// in f16.
    #[must_use]
    pub fn token_bytes(&self, format: KvFormat) -> usize {
        let d = self.padded_dim();
        self.n_layers * self.n_kv_heads * (format.key_bytes(d) + format.value_bytes(d)) / LANES
    }
}

/// Settings of a [`KvStore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvConfig {
    /// What one token occupies.
    pub shape: KvShape,
    /// How keys and values are kept. f32 changes nothing, the others round.
    pub format: KvFormat,
    /// Tokens in a block: 16 to 256, a multiple of 16; 16, 32 or 64 for [`KvFormat::I4`]. Does not change
    /// a result.
    pub block_tokens: usize,
    /// Bytes of memory that blocks may occupy.
    pub budget: usize,
    /// Names the model and adapter, so that a prefix is never found for another one.
    pub fingerprint: u64,
}

/// What a cache holds and could hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvStats {
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Blocks that may exist at once, in memory and in the spill file.
    pub limit: usize,
    /// Blocks that have memory now.
    pub resident: usize,
    /// Blocks that a sequence holds.
    pub used: usize,
    /// Blocks that a new sequence could find as a part of its prefix.
    pub cached: usize,
    /// Blocks in the spill file.
    pub spilled: usize,
    /// Bytes of memory that blocks occupy.
    pub bytes: usize,
    /// Bytes of memory that they may occupy.
    pub budget: usize,
    /// Bytes that blocks occupy in the spill file.
    pub spilled_bytes: usize,
}

/// Where the bytes of a block are.
#[derive(Default)]
enum Place {
    /// It has none: nobody holds it.
    #[default]
    Nowhere,
    Memory(Piece),
    File(Slot),
}

/// A block's bytes, and what is to be known about them.
#[derive(Default)]
struct Block {
    place: Place,
    /// Whether it is one of those that [`KvFormat::I4`] keeps in f16.
    sink: bool,
    /// When its sequence was used last.
    used: u64,
}

impl Block {
    fn memory(&self) -> usize {
        match &self.place {
            Place::Memory(bytes) => bytes.bytes(),
            _ => 0,
        }
    }
}

/// The blocks themselves and the pool that says which are in use.
pub struct KvStore {
    shape: KvShape,
    format: KvFormat,
    pool: BlockPool,
    /// A block has memory from its first use until [`KvStore::trim`] or until the budget needs it.
    blocks: Vec<Block>,
    regions: Regions,
    budget: usize,
    spill: Option<SpillFile>,
    clock: u64,
}

impl KvStore {
    /// An empty store of f32 that grows to at most `tokens` tokens, rounded up to blocks of 64.
    #[must_use]
    pub fn new(shape: KvShape, tokens: usize) -> Self {
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        let budget = blocks * BLOCK_TOKENS * shape.token_bytes(KvFormat::F32);
        let pool = BlockPool::new(BLOCK_TOKENS, blocks, 0);
        let (format, blocks) = (KvFormat::F32, Vec::new());
        let regions = Regions::of(BLOCK_TOKENS * shape.token_bytes(format));
        Self { shape, format, pool, blocks, regions, budget, spill: None, clock: 0 }
    }

    /// An empty store.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a shape without size, a block size out of range, heads of more than
    /// 1024 elements in a format of integers, or a budget of less than one block.
    pub fn with(config: &KvConfig) -> Result<Self> {
        let KvConfig { shape, format, block_tokens, budget, fingerprint } = *config;
        if !block_tokens.is_multiple_of(LANES) || !(LANES..=256).contains(&block_tokens) {
            return Err(Error::InvalidArgument(format!(
                "blocks of {block_tokens} tokens: must be a multiple of 16 from 16 to 256"
            )));
        }
        if format == KvFormat::I4 && !SINK_TOKENS.is_multiple_of(block_tokens) {
            return Err(Error::InvalidArgument(format!(
                "blocks of {block_tokens} tokens: an i4 cache has blocks of 16, 32 or 64"
            )));
        }
        let sizes = [shape.n_layers, shape.n_kv_heads, shape.head_dim];
        // Far above any model, and far below where a product of these could overflow.
        if sizes.iter().any(|size| !(1..=1 << 16).contains(size))
            || sizes.iter().map(|size| *size as u64).product::<u64>() > 1 << 32
        {
            return Err(Error::InvalidArgument(format!(
                "a cache of {} layers, {} KV heads and {} floats a head",
                shape.n_layers, shape.n_kv_heads, shape.head_dim
            )));
        }
        // Beyond, the integer dots of attention could overflow.
        if format.is_quantised() && shape.padded_dim() > 1024 {
            return Err(Error::InvalidArgument(format!(
                "heads of {} floats: a cache of {} takes 1024",
                shape.head_dim,
                format.name()
            )));
        }
        let mut store = Self {
            shape,
            format,
            pool: BlockPool::new(block_tokens, 0, fingerprint),
            blocks: Vec::new(),
            regions: Regions::of(block_tokens * shape.token_bytes(format)),
            budget,
            spill: None,
            clock: 0,
        };
        let block = store.bytes_of_kind(true);
        if budget < block {
            return Err(Error::InvalidArgument(format!(
                "a budget of {budget} bytes holds no block: one takes {block}"
            )));
        }
        store.pool.set_limit(budget / store.block_bytes());
        Ok(store)
    }

    /// Lets blocks that memory has no room for go to a file in `folder`, which may take `budget` bytes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a budget of less than one block or when there is a file already,
    /// [`Error::Io`].
    pub fn spill_to(&mut self, folder: &Path, budget: usize) -> Result<()> {
        if self.spill.is_some() {
            return Err(Error::InvalidArgument("the cache has a spill file already".into()));
        }
        self.spill = Some(SpillFile::create(folder, self.bytes_of_kind(true), budget)?);
        self.set_budget(self.budget);
        Ok(())
    }

    /// What one token occupies.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// How keys and values are kept.
    #[must_use]
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Which blocks are in use.
    #[must_use]
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Bytes of a block, other than those that [`KvFormat::I4`] keeps in f16.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.bytes_of_kind(false)
    }

    /// Bytes that `blocks` blocks of one sequence take.
    #[must_use]
    pub fn sequence_bytes(&self, blocks: usize) -> usize {
        let sinks =
            if self.format == KvFormat::I4 { SINK_TOKENS / self.pool.block_tokens() } else { 0 };
        let sinks = sinks.min(blocks);
        sinks * self.bytes_of_kind(true) + (blocks - sinks) * self.bytes_of_kind(false)
    }

    fn bytes_of_kind(&self, sink: bool) -> usize {
        self.pool.block_tokens() * self.shape.token_bytes(self.format_of_kind(sink))
    }

    fn format_of_kind(&self, sink: bool) -> KvFormat {
        match self.format {
            KvFormat::I4 if sink => KvFormat::F16,
            format => format,
        }
    }

    /// Whether the block at `index` of a sequence is one of those kept in f16.
    fn is_sink(&self, index: usize) -> bool {
        self.format == KvFormat::I4 && index * self.pool.block_tokens() < SINK_TOKENS
    }

    /// Bytes of memory held by blocks.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(Block::memory).sum()
    }

    /// What the cache holds and could hold.
    #[must_use]
    pub fn stats(&self) -> KvStats {
        let made = self.pool.made();
        KvStats {
            block_bytes: self.block_bytes(),
            limit: self.pool.limit(),
            resident: self.blocks.iter().filter(|block| block.memory() > 0).count(),
            used: (0..made).filter(|block| !self.pool.is_free(*block as u32)).count(),
            cached: self.pool.cached(),
            spilled: self.spill.as_ref().map_or(0, SpillFile::used),
            bytes: self.bytes(),
            budget: self.budget,
            spilled_bytes: self.spill.as_ref().map_or(0, SpillFile::bytes),
        }
    }

    /// Changes the budget of memory. Blocks that no sequence holds are given up where it shrinks; those
    /// that one holds stay until they can be spilled, and no new ones are made meanwhile.
    pub fn set_budget(&mut self, bytes: usize) {
        self.budget = bytes;
        let spilled = self.spill.as_ref().map_or(0, SpillFile::limit);
        self.pool.set_limit((bytes / self.block_bytes()).saturating_add(spilled));
        let over = self.bytes().saturating_sub(bytes);
        let mut given = 0;
        while given < over {
            let Some(block) = self.least_wanted(|store, block| store.pool.is_free(block)) else {
                return;
            };
            given += self.blocks[block as usize].memory();
            self.give_up(block);
        }
    }

    /// Gives the memory of all blocks that no sequence holds back to the system, and with it the cached
    /// prefixes in them. Returns the bytes.
    pub fn trim(&mut self) -> usize {
        let before = self.bytes();
        self.pool.forget_free();
        for block in 0..self.blocks.len() as u32 {
            if self.pool.is_free(block) {
                self.give_up(block);
            }
        }
        before - self.bytes()
    }

    /// Moves blocks to the spill file, those first whose sequence was not used for the longest time, as far as it
    /// has room. They come back when their sequence is used again. Returns the bytes of memory that
    /// are free now, also of what moved before a failure.
    pub fn spill_all(&mut self) -> (usize, Result<()>) {
        let before = self.bytes();
        let held = (0..self.blocks.len() as u32).filter(|block| {
            self.blocks[*block as usize].memory() > 0 && !self.pool.is_free(*block)
        });
        let mut going: Vec<u32> = held.collect();
        going.sort_by_key(|block| self.blocks[*block as usize].used);
        going.truncate(self.spill.as_ref().map_or(0, SpillFile::room));
        let outcome = going.into_iter().try_for_each(|block| self.spill_block(block));
        (before - self.bytes(), outcome)
    }

    /// Gives back the memory of blocks that hold nothing, neither for a sequence nor as a prefix.
    pub fn drop_empty(&mut self) {
        for block in 0..self.blocks.len() as u32 {
            if self.pool.is_free(block) && !self.pool.is_cached(block) {
                self.give_up(block);
            }
        }
    }

    /// Whether there is a spill file.
    #[must_use]
    pub fn spills(&self) -> bool {
        self.spill.is_some()
    }

    /// A free block loses its bytes, and what it had cached.
    fn give_up(&mut self, block: u32) {
        self.pool.forget(block);
        let place = std::mem::take(&mut self.blocks[block as usize].place);
        if let (Place::File(slot), Some(spill)) = (place, &mut self.spill) {
            spill.release(slot);
        }
    }

    /// The block in memory to give up first among those that may be: an empty one, otherwise the one that
    /// was not used for the longest time.
    fn least_wanted(&self, may: impl Fn(&Self, u32) -> bool) -> Option<u32> {
        let numbers = 0..self.blocks.len() as u32;
        let candidates = numbers.filter(|block| self.blocks[*block as usize].memory() > 0);
        candidates.filter(|block| may(self, *block)).min_by_key(|block| {
            let wanted = !self.pool.is_free(*block) || self.pool.is_cached(*block);
            (wanted, self.blocks[*block as usize].used)
        })
    }

    /// Makes room for `count` more tokens in `table`, copying its tail if another sequence shares it, and
    /// has all its blocks in memory; or changes nothing.
    ///
    /// # Errors
    /// [`Error::KvExhausted`] when the budget is reached, [`Error::OutOfMemory`] when the system refuses
    /// a block, [`Error::Io`] and [`Error::Corrupt`] from the spill file.
    pub fn reserve(&mut self, table: &mut BlockTable, count: usize) -> Result<()> {
        let plan = table.plan(&self.pool, count).map_err(|short| self.exhausted(short))?;
        let kinds = self.kinds(table, &plan);
        let no_lists = |bytes| Error::OutOfMemory { what: "the list of KV blocks", bytes };
        let made =
            plan.blocks().iter().filter(|block| **block as usize >= self.blocks.len()).count();
        self.blocks.try_reserve(made).map_err(|_| no_lists(made * size_of::<Block>()))?;
        // What is missing of the plan's blocks, and of those that the table has already.
        let has_memory = |block: u32, sink: bool| {
            let block = self.blocks.get(block as usize);
            block.is_some_and(|block| block.memory() > 0 && block.sink == sink)
        };
        let new: Vec<_> = plan.blocks().iter().copied().zip(kinds.iter().copied()).collect();
        let fresh: Vec<_> =
            new.iter().copied().filter(|(block, sink)| !has_memory(*block, *sink)).collect();
        let returning = self.spilled_of(table);
        let bytes: usize = fresh.iter().map(|(_, sink)| self.bytes_of_kind(*sink)).sum::<usize>()
            + returning.iter().map(|block| self.bytes_of(*block)).sum::<usize>();
        // Blocks of the plan that have memory of the other kind lose it anyway.
        let turned = fresh.iter().filter_map(|(block, _)| self.blocks.get(*block as usize));
        let turned = turned.map(Block::memory).sum::<usize>();
        self.make_room(bytes, turned, |block| {
            table.blocks().contains(&block) || plan.blocks().contains(&block)
        })?;
        let mut given = Vec::new();
        given.try_reserve_exact(fresh.len()).map_err(|_| no_lists(fresh.len() * 32))?;
        for (block, sink) in fresh {
            given.push((block, sink, self.regions.zeroed(self.bytes_of_kind(sink))?));
        }
        let returned = self.read_back(&returning)?;
        if !table.reserve(&mut self.pool, &plan) {
            return Err(no_lists(plan.blocks().len() * 16));
        }
        self.put_back(returned);
        self.blocks.resize_with(self.pool.made().max(self.blocks.len()), Block::default);
        for (number, sink, bytes) in given {
            let place =
                std::mem::replace(&mut self.blocks[number as usize].place, Place::Memory(bytes));
            self.blocks[number as usize].sink = sink;
            if let (Place::File(slot), Some(spill)) = (place, &mut self.spill) {
                spill.release(slot);
            }
        }
        if let Some((from, to)) = plan.copy() {
            self.copy_block(from, to);
        }
        self.touch(table);
        Ok(())
    }

    /// For each block of a plan, whether it will be one of those kept in f16.
    fn kinds(&self, table: &BlockTable, plan: &Plan) -> Vec<bool> {
        let copied = plan.copy().map(|_| table.len() / self.pool.block_tokens());
        let added = table.blocks().len()..;
        copied
            .into_iter()
            .chain(added)
            .map(|index| self.is_sink(index))
            .take(plan.blocks().len())
            .collect()
    }

    /// Has all blocks of `table` in memory, where they stay until other sequences need the room.
    /// Attention, a save and a copy read them there.
    ///
    /// # Errors
    /// As [`KvStore::reserve`].
    pub fn load(&mut self, table: &BlockTable) -> Result<()> {
        let returning = self.spilled_of(table);
        if !returning.is_empty() {
            let bytes = returning.iter().map(|block| self.bytes_of(*block)).sum();
            self.make_room(bytes, 0, |block| table.blocks().contains(&block))?;
            let returned = self.read_back(&returning)?;
            self.put_back(returned);
        }
        self.touch(table);
        Ok(())
    }

    /// Whether all blocks of `table` are in memory.
    #[must_use]
    pub fn is_loaded(&self, table: &BlockTable) -> bool {
        self.spill.is_none() || self.spilled_of(table).is_empty()
    }

    /// Whether the bytes of a block are in memory.
    #[cfg(any(test, fuzzing))]
    pub(super) fn is_in_memory(&self, block: u32) -> bool {
        self.blocks[block as usize].memory() > 0
    }

    fn touch(&mut self, table: &BlockTable) {
        self.clock += 1;
        for block in table.blocks().iter().filter(|block| **block != NULL_BLOCK) {
            self.blocks[*block as usize].used = self.clock;
        }
    }

    fn spilled_of(&self, table: &BlockTable) -> Vec<u32> {
        if self.spill.is_none() {
            return Vec::new();
        }
        let held = table.blocks().iter().copied().filter(|block| *block != NULL_BLOCK);
        held.filter(|block| matches!(self.blocks[*block as usize].place, Place::File(_))).collect()
    }

    /// Bytes that a block has when it is in memory.
    fn bytes_of(&self, block: u32) -> usize {
        self.bytes_of_kind(self.blocks[block as usize].sink)
    }

    fn read_back(&mut self, blocks: &[u32]) -> Result<Vec<(u32, Piece)>> {
        let mut returned = Vec::new();
        for number in blocks {
            let mut bytes = self.regions.zeroed(self.bytes_of(*number))?;
            if let (Place::File(slot), Some(spill)) =
                (&self.blocks[*number as usize].place, &mut self.spill)
            {
                spill.read(*slot, &mut bytes)?;
                returned.push((*number, bytes));
            }
        }
        Ok(returned)
    }

    fn put_back(&mut self, returned: Vec<(u32, Piece)>) {
        for (number, bytes) in returned {
            let place = &mut self.blocks[number as usize].place;
            if let (Place::File(slot), Some(spill)) =
                (std::mem::replace(place, Place::Memory(bytes)), &mut self.spill)
            {
                spill.release(slot);
            }
        }
    }

    /// Sees to it that `bytes` more fit into the budget, `turned` of which are there already, by taking
    /// memory from blocks that `keep` does not name. What no sequence holds goes first. What a sequence
    /// holds goes to the spill file and comes back unchanged, so nothing has changed when this fails.
    fn make_room(&mut self, bytes: usize, turned: usize, keep: impl Fn(u32) -> bool) -> Result<()> {
        let needed = (self.bytes() + bytes).saturating_sub(turned);
        let mut over = needed.saturating_sub(self.budget);
        if over == 0 || bytes == 0 {
            return Ok(());
        }
        let mut file_room = self.spill.as_ref().map_or(0, SpillFile::room);
        // Before anything moves: what could go.
        let (mut going, mut could) = (Vec::new(), 0);
        let mut seen = vec![false; self.blocks.len()];
        while could < over {
            let may = |store: &Self, block: u32| {
                !seen[block as usize]
                    && !keep(block)
                    && (store.pool.is_free(block) || file_room > 0)
            };
            let Some(block) = self.least_wanted(may) else {
                return Err(Error::KvExhausted {
                    needed: bytes,
                    available: (bytes + could).saturating_sub(over),
                    budget: self.budget,
                });
            };
            seen[block as usize] = true;
            could += self.blocks[block as usize].memory();
            let spills = file_room > 0 && (!self.pool.is_free(block) || self.pool.is_cached(block));
            file_room -= usize::from(spills);
            going.push((block, spills));
        }
        for (block, spills) in going {
            let memory = self.blocks[block as usize].memory();
            if spills {
                self.spill_block(block)?;
            } else {
                self.give_up(block);
            }
            over = over.saturating_sub(memory);
        }
        debug_assert_eq!(over, 0);
        Ok(())
    }

    fn spill_block(&mut self, block: u32) -> Result<()> {
        let place = &mut self.blocks[block as usize].place;
        if let (Place::Memory(bytes), Some(spill)) = (&*place, &mut self.spill) {
            *place = Place::File(spill.write(bytes)?);
        }
        Ok(())
    }

    fn exhausted(&self, short: Exhausted) -> Error {
        Error::KvExhausted {
            needed: short.needed.saturating_mul(self.block_bytes()),
            available: short.available * self.block_bytes(),
            budget: self.pool.limit() * self.block_bytes(),
        }
    }

    fn copy_block(&mut self, from: u32, to: u32) {
        if let Ok(
            [Block { place: Place::Memory(from), .. }, Block { place: Place::Memory(to), .. }],
        ) = self.blocks.get_disjoint_mut([from as usize, to as usize])
        {
            to.copy_from_slice(from);
        }
    }

    /// Keeps the first `len` tokens of `table`; 0 frees it.
    pub fn truncate(&mut self, table: &mut BlockTable, len: usize) {
        table.truncate(&mut self.pool, len);
    }

    /// [`KvStore::truncate`] for a sequence that goes on at `len` and then looks at positions from
    /// `first_seen` on. Where a window has dropped one of these, everything behind what was dropped goes,
    /// too, and has to be computed again: `table.len()` tells from where.
    pub fn rewind(&mut self, table: &mut BlockTable, len: usize, first_seen: usize) {
        let dropped = table.dropped(&self.pool);
        let lost = first_seen < dropped.end && dropped.start < len;
        table.truncate(&mut self.pool, if lost { dropped.start } else { len });
    }

    /// A second sequence with the same tokens, sharing all blocks until one of the two writes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] for the table.
    pub fn fork(&mut self, table: &mut BlockTable) -> Result<BlockTable> {
        let bytes = size_of_val(table.blocks());
        table
            .fork(&mut self.pool)
            .ok_or(Error::OutOfMemory { what: "the table of a forked sequence", bytes })
    }

    /// Takes over cached blocks for the beginning of `tokens`, the whole sequence as it is going to be.
    /// At least one token is left to compute. Returns how many tokens `table` gained.
    pub fn reuse(&mut self, table: &mut BlockTable, tokens: &[u32]) -> usize {
        table.reuse(&mut self.pool, tokens)
    }

    /// Lets other sequences find the full blocks of `tokens`, the verified part of the sequence from its
    /// start. Never pass draft tokens.
    pub fn publish(&mut self, table: &mut BlockTable, tokens: &[u32]) {
        table.publish(&mut self.pool, tokens);
    }

    /// Gives back the blocks between the first `sinks` tokens and position `from`, which no layer looks
    /// at any more. Do not truncate to where they would be seen again.
    pub fn drop_before(&mut self, table: &mut BlockTable, sinks: usize, from: usize) {
        table.drop_before(&mut self.pool, sinks, from);
    }

    /// Whether a tree of tokens may be written behind `len` tokens: not where an i4 cache changes from f16
    /// to integers, because a position that is kept could not move across that border.
    #[must_use]
    pub fn takes_trees(&self, len: usize) -> bool {
        self.format != KvFormat::I4 || len >= SINK_TOKENS
    }

    /// Keeps one path of a token tree that was written behind the `table.len()` tokens held, without
    /// having been committed: `path` are the places of its nodes in the tree, ascending, a parent before
    /// its child. Their keys and values move together and are committed; the other nodes' places may
    /// be written again.
    ///
    /// # Panics
    /// When the places do not ascend or were not reserved, or something is to move where
    /// [`KvStore::takes_trees`] says no: a bug of the caller.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] for a chunk, and nothing has changed.
    pub fn keep_path(&mut self, table: &mut BlockTable, path: &[usize]) -> Result<()> {
        let d = self.shape.padded_dim();
        // Room for a chunk of the widest format.
        let mut through = (
            Aligned::zeroed("a chunk of keys", self.format_of_kind(true).key_bytes(d))?,
            Aligned::zeroed("a chunk of values", self.format_of_kind(true).value_bytes(d))?,
        );
        assert!(path.is_sorted_by(|a, b| a < b), "a path goes from a parent to its child");
        let first = table.len();
        for (depth, place) in path.iter().enumerate() {
            assert!(first + place < table.reserved(), "not reserved");
            if depth != *place {
                assert!(self.takes_trees(first), "a tree across the border of formats");
                self.copy_position(table, (first + place, first + depth), &mut through);
            }
        }
        table.commit(path.len());
        Ok(())
    }

    /// The byte where the keys of a layer and head start in a block, the byte where the values do, and the
    /// byte where those end.
    fn planes(&self, format: KvFormat, layer: usize, head: usize) -> [usize; 3] {
        let (chunks, d) = (self.pool.block_tokens() / LANES, self.shape.padded_dim());
        let (keys, values) = (chunks * format.key_bytes(d), chunks * format.value_bytes(d));
        let start = (layer * self.shape.n_kv_heads + head) * (keys + values);
        [start, start + keys, start + keys + values]
    }

    fn memory_of(&self, block: u32) -> &[u8] {
        match self.blocks.get(block as usize) {
            Some(Block { place: Place::Memory(bytes), .. }) => bytes,
            _ => unreachable!("a block that is read has been loaded"),
        }
    }

    fn memory_of_mut(&mut self, block: u32) -> &mut [u8] {
        match self.blocks.get_mut(block as usize) {
            Some(Block { place: Place::Memory(bytes), .. }) => bytes,
            _ => unreachable!("a block that is written has been reserved"),
        }
    }

    /// The format of a block: that of the store, or f16 for the start of a sequence in an i4 cache.
    #[must_use]
    pub fn block_format(&self, block: u32) -> KvFormat {
        self.format_of_kind(self.blocks[block as usize].sink)
    }

    fn copy_position(
        &mut self,
        table: &BlockTable,
        (from, to): (usize, usize),
        through: &mut (Aligned<u8>, Aligned<u8>),
    ) {
        let (d, lane) = (self.shape.padded_dim(), to % LANES);
        for layer in 0..self.shape.n_layers {
            for head in 0..self.shape.n_kv_heads {
                let format = self.block_format(table.locate(&self.pool, from).0);
                let (keys, values) = self.chunk(table, from, layer, head);
                let through = (
                    &mut through.0[..format.key_bytes(d)],
                    &mut through.1[..format.value_bytes(d)],
                );
                // Both chunks may be the same one, so the position goes through one of its own.
                elements::move_key(format, d, (keys, from % LANES), (&mut *through.0, lane));
                elements::move_value(format, d, (values, from % LANES), (&mut *through.1, lane));
                let (to_keys, to_values) = self.chunk_mut(table, to, layer, head);
                elements::move_key(format, d, (&*through.0, lane), (to_keys, lane));
                elements::move_value(format, d, (&*through.1, lane), (to_values, lane));
            }
        }
    }

    /// Writes the key and value of every head for one reserved position of one layer.
    ///
    /// # Panics
    /// When the position is not reserved or the rows are not `n_kv_heads * head_dim` long: a bug of
    /// the caller.
    pub fn write(
        &mut self,
        table: &BlockTable,
        layer: usize,
        position: usize,
        keys: &[f32],
        values: &[f32],
    ) {
        assert!((table.len()..table.reserved()).contains(&position), "{position} is not reserved");
        let (dim, d) = (self.shape.head_dim, self.shape.padded_dim());
        assert_eq!((keys.len(), values.len()), (dim * self.shape.n_kv_heads, keys.len()));
        let format = self.block_format(table.locate(&self.pool, position).0);
        let heads = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
        for (head, (key, value)) in heads.enumerate() {
            let (to_keys, to_values) = self.chunk_mut(table, position, layer, head);
            elements::write_key(format, to_keys, d, position % LANES, key);
            elements::write_value(format, to_values, d, position % LANES, value);
        }
    }

    /// Holds the positions of `table` up to `to`, whole blocks, as dropped by a window.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] for the table.
    pub(super) fn skip(&mut self, table: &mut BlockTable, to: usize) -> Result<()> {
        let bytes = to / self.pool.block_tokens() * size_of::<u32>();
        match table.skip(&mut self.pool, to) {
            true => Ok(()),
            false => Err(Error::OutOfMemory { what: "the table of a sequence", bytes }),
        }
    }

    /// The bytes in its block of the chunk of keys and of values that hold a position.
    fn chunk_ranges(
        &self,
        place: usize,
        format: KvFormat,
        layer: usize,
        head: usize,
    ) -> [Range<usize>; 2] {
        let [keys, values, _] = self.planes(format, layer, head);
        let (d, chunk) = (self.shape.padded_dim(), place / LANES);
        [(keys, format.key_bytes(d)), (values, format.value_bytes(d))]
            .map(|(start, bytes)| start + chunk * bytes..start + (chunk + 1) * bytes)
    }

    /// Bytes of the keys and values of one layer and head for the 16 positions around `position`.
    pub(super) fn chunk(
        &self,
        table: &BlockTable,
        position: usize,
        layer: usize,
        head: usize,
    ) -> (&[u8], &[u8]) {
        let (block, place) = table.locate(&self.pool, position);
        let [keys, values] = self.chunk_ranges(place, self.block_format(block), layer, head);
        let bytes = self.memory_of(block);
        (&bytes[keys], &bytes[values])
    }

    /// [`KvStore::chunk`], to be written: no other sequence may hold the block.
    pub(super) fn chunk_mut(
        &mut self,
        table: &BlockTable,
        position: usize,
        layer: usize,
        head: usize,
    ) -> (&mut [u8], &mut [u8]) {
        let (block, place) = table.locate(&self.pool, position);
        assert!(self.pool.is_writable(block), "others read the block of {position}");
        let [keys, values] = self.chunk_ranges(place, self.block_format(block), layer, head);
        let (before, after) = self.memory_of_mut(block).split_at_mut(values.start);
        (&mut before[keys], &mut after[..values.end - values.start])
    }

    /// Bytes of the keys and values of one layer and head in a block, which must be in memory.
    #[must_use]
    pub fn block(&self, block: u32, layer: usize, head: usize) -> (&[u8], &[u8]) {
        let [keys, values, end] = self.planes(self.block_format(block), layer, head);
        let bytes = self.memory_of(block);
        (&bytes[keys..values], &bytes[values..end])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(position: usize) -> (Vec<f32>, Vec<f32>) {
        let value = |x: usize| (position * 1000 + x) as f32;
        ((0..24).map(value).collect(), (100..124).map(value).collect())
    }

    fn floats((keys, values): (&[u8], &[u8])) -> (Vec<f32>, Vec<f32>) {
        (bytemuck::pod_collect_to_vec(keys), bytemuck::pod_collect_to_vec(values))
    }

    fn filled(tokens: usize) -> (KvStore, BlockTable) {
        let shape = KvShape { n_layers: 2, n_kv_heads: 3, head_dim: 8 };
        let mut store = KvStore::new(shape, 200);
        let mut table = BlockTable::default();
        store.reserve(&mut table, tokens).unwrap();
        for position in 0..tokens {
            let (keys, values) = rows(position);
            store.write(&table, 1, position, &keys, &values);
        }
        (store, table)
    }

    #[test]
    fn what_is_written_is_read_where_the_layout_says() {
        let (store, table) = filled(70);
        let (keys, values) = floats(store.block(table.blocks()[1], 1, 2));
        // Position 69 is place 5 of the second block; head 2 starts at channel 16.
        assert_eq!(keys[3 * LANES + 5], 69_019.0);
        assert_eq!(values[5 * 16 + 3], 69_119.0);
        assert_eq!(values[5 * 16 + 8..6 * 16], [0.0; 8]);
        let (keys, _) = floats(store.block(table.blocks()[0], 1, 0));
        assert_eq!(keys[16 * 16 + 7 * LANES + 1], 17_007.0);
    }

    #[test]
    fn a_kept_path_lies_as_if_it_had_been_written_so() {
        let (mut store, mut table) = filled(70);
        table.commit(60);
        store.keep_path(&mut table, &[1, 2, 5, 9]).unwrap();
        assert_eq!(table.len(), 64);
        let (keys, values) = floats(store.block(table.blocks()[0], 1, 2));
        for (depth, from) in [(60, 61), (61, 62), (62, 65), (63, 69)] {
            let (key, value) = rows(from);
            for i in 0..8 {
                let at = depth / LANES * LANES * 16 + i * LANES + depth % LANES;
                assert_eq!((keys[at], values[depth * 16 + i]), (key[16 + i], value[16 + i]));
            }
        }
    }

    #[test]
    fn the_limit_is_a_status_and_changes_nothing() {
        let shape = KvShape { n_layers: 1, n_kv_heads: 1, head_dim: 16 };
        let block = 64 * shape.token_bytes(KvFormat::F32);
        let mut store = KvStore::new(shape, 64);
        let mut table = BlockTable::default();
        let error = Error::KvExhausted { needed: 2 * block, available: block, budget: block };
        assert_eq!(store.reserve(&mut table, 65), Err(error));
        assert_eq!((store.bytes(), table.len()), (0, 0));
        store.reserve(&mut table, 64).unwrap();
        assert_eq!(store.bytes(), block);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let shape = KvShape { n_layers: 1, n_kv_heads: 1, head_dim: 16 };
        let good = KvConfig {
            shape,
            format: KvFormat::F32,
            block_tokens: 16,
            budget: 1 << 20,
            fingerprint: 0,
        };
        assert!(KvStore::with(&good).is_ok());
        for block_tokens in [0, 8, 24, 272] {
            assert!(KvStore::with(&KvConfig { block_tokens, ..good }).is_err());
        }
        assert!(KvStore::with(&KvConfig { budget: 100, ..good }).is_err());
        for head_dim in [0, usize::MAX] {
            let shape = KvShape { head_dim, ..shape };
            assert!(KvStore::with(&KvConfig { shape, ..good }).is_err());
        }
    }

    #[cfg(all(any(target_os = "linux", target_os = "android"), not(miri)))]
    #[test]
    fn large_blocks_lie_in_regions() {
        let shape = KvShape { n_layers: 4, n_kv_heads: 4, head_dim: 64 };
        let (mut store, mut table) = (KvStore::new(shape, 128), BlockTable::default());
        store.reserve(&mut table, 128).unwrap();
        assert_eq!(store.bytes(), 128 * shape.token_bytes(KvFormat::F32));
        let mut places = store.blocks.iter().map(|block| &block.place);
        assert!(places.all(|place| matches!(place, Place::Memory(Piece::InRegion(_)))));
    }

    #[test]
    fn trim_gives_free_memory_back_and_nothing_else() {
        let (mut store, mut table) = filled(70);
        table.commit(70);
        store.publish(&mut table, &[1; 70]);
        store.truncate(&mut table, 64);
        assert_eq!(store.trim(), store.block_bytes());
        store.truncate(&mut table, 0);
        assert_eq!(store.stats().cached, 1);
        assert_eq!(store.trim(), store.block_bytes());
        assert_eq!((store.bytes(), store.stats().cached), (0, 0));
        store.reserve(&mut table, 128).unwrap();
        assert_eq!(store.bytes(), 2 * store.block_bytes());
    }
}
