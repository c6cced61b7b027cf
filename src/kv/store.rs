//! The bytes of the KV cache: blocks of keys and values, made on demand.
//!
//! A block holds some positions of every layer and KV head. Keys of 16 positions lie side by side
//! (`[d][16]`), the order in which a vector of 16 scores is computed with no horizontal sum; values lie
//! position after position. Heads are padded to a multiple of 16 elements, which are f32 or f16. The
//! operations on sequences are here because each of them is a decision of [`super::blocks`] followed by a
//! movement of bytes.
#![forbid(unsafe_code)]

use super::BLOCK_TOKENS;
use super::blocks::{BlockPool, BlockTable, Exhausted};
use crate::error::{Error, Result};
use crate::kernel::{KvFormat, LANES};
use crate::memory::Aligned;
use bytemuck::Pod;
use half::f16;

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

    /// Bytes that a token costs in a format.
    #[must_use]
    pub fn token_bytes(&self, format: KvFormat) -> usize {
        2 * self.n_layers * self.n_kv_heads * self.padded_dim() * format.bytes()
    }
}

/// Settings of a [`KvStore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvConfig {
    /// What one token occupies.
    pub shape: KvShape,
    /// How keys and values are kept. f32 changes nothing; f16 rounds them.
    pub format: KvFormat,
    /// Tokens in a block: 16 to 256, a multiple of 16. Does not change a result.
    pub block_tokens: usize,
    /// Bytes that blocks may occupy; whole blocks of it are used.
    pub budget: usize,
    /// Names the model and adapter, so that a prefix is never found for another one.
    pub fingerprint: u64,
}

/// What a cache holds and could hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvStats {
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Blocks that may exist at once.
    pub limit: usize,
    /// Blocks that have memory now.
    pub resident: usize,
    /// Blocks that a sequence holds.
    pub used: usize,
    /// Blocks that a new sequence could find as a part of its prefix.
    pub cached: usize,
}

/// The blocks themselves and the pool that says which are in use.
pub struct KvStore {
    shape: KvShape,
    format: KvFormat,
    pool: BlockPool,
    /// A block has memory from its first use until [`KvStore::trim`].
    blocks: Vec<Option<Aligned<u8>>>,
}

impl KvStore {
    /// An empty store of f32 that grows to at most `tokens` tokens, rounded up to blocks of 64.
    #[must_use]
    pub fn new(shape: KvShape, tokens: usize) -> Self {
        let pool = BlockPool::new(BLOCK_TOKENS, tokens.div_ceil(BLOCK_TOKENS), 0);
        Self { shape, format: KvFormat::F32, pool, blocks: Vec::new() }
    }

    /// An empty store.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a shape without size, a block size out of range, or a budget of
    /// less than one block.
    pub fn with(config: &KvConfig) -> Result<Self> {
        let KvConfig { shape, format, block_tokens, budget, fingerprint } = *config;
        if !block_tokens.is_multiple_of(LANES) || !(LANES..=256).contains(&block_tokens) {
            return Err(Error::InvalidArgument(format!(
                "blocks of {block_tokens} tokens: must be a multiple of 16 from 16 to 256"
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
        let block = block_tokens * shape.token_bytes(format);
        if budget < block {
            return Err(Error::InvalidArgument(format!(
                "a budget of {budget} bytes holds no block: one takes {block}"
            )));
        }
        let pool = BlockPool::new(block_tokens, budget / block, fingerprint);
        Ok(Self { shape, format, pool, blocks: Vec::new() })
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

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.pool.block_tokens() * self.shape.token_bytes(self.format)
    }

    /// Bytes held by blocks.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.blocks.iter().flatten().map(Aligned::bytes).sum()
    }

    /// What the cache holds and could hold.
    #[must_use]
    pub fn stats(&self) -> KvStats {
        let made = self.pool.made();
        KvStats {
            block_bytes: self.block_bytes(),
            limit: self.pool.limit(),
            resident: self.blocks.iter().flatten().count(),
            used: (0..made).filter(|block| !self.pool.is_free(*block as u32)).count(),
            cached: self.pool.cached(),
        }
    }

    /// Changes the budget to `bytes`, but never below what blocks occupy already.
    pub fn set_budget(&mut self, bytes: usize) {
        self.pool.set_limit(bytes / self.block_bytes());
    }

    /// Gives the memory of all blocks that no sequence holds back to the system, and with it the cached
    /// prefixes in them. Returns the bytes.
    pub fn trim(&mut self) -> usize {
        let before = self.bytes();
        self.pool.forget_free();
        for (number, block) in self.blocks.iter_mut().enumerate() {
            if self.pool.is_free(number as u32) {
                *block = None;
            }
        }
        before - self.bytes()
    }

    /// Makes room for `count` more tokens in `table`, copying its tail if another sequence shares it, or
    /// changes nothing.
    ///
    /// # Errors
    /// [`Error::KvExhausted`] when the budget is reached, [`Error::OutOfMemory`] when the system refuses
    /// a block.
    pub fn reserve(&mut self, table: &mut BlockTable, count: usize) -> Result<()> {
        let plan = table.plan(&self.pool, count).map_err(|short| self.exhausted(short))?;
        let mut given = Vec::new();
        let bytes = plan.blocks().len() * size_of::<Option<Aligned<u8>>>();
        let no_lists = || Error::OutOfMemory { what: "the list of KV blocks", bytes };
        given.try_reserve_exact(plan.blocks().len()).map_err(|_| no_lists())?;
        self.blocks.try_reserve(plan.blocks().len()).map_err(|_| no_lists())?;
        for block in plan.blocks() {
            if !matches!(self.blocks.get(*block as usize), Some(Some(_))) {
                given.push((*block, Aligned::zeroed("a KV block", self.block_bytes())?));
            }
        }
        if !table.reserve(&mut self.pool, &plan) {
            return Err(no_lists());
        }
        for (number, block) in given {
            if number as usize == self.blocks.len() {
                self.blocks.push(None);
            }
            self.blocks[number as usize] = Some(block);
        }
        if let Some((from, to)) = plan.copy() {
            self.copy_block(from, to);
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
        if let Ok([Some(from), Some(to)]) =
            self.blocks.get_disjoint_mut([from as usize, to as usize])
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

    /// Keeps one path of a token tree that was written behind the `table.len()` tokens held, without
    /// having been committed: `path` are the places of its nodes in the tree, ascending, a parent before
    /// its child. Their keys and values move together and are committed; the other nodes' places may
    /// be written again.
    ///
    /// # Panics
    /// When the places do not ascend or were not reserved: a bug of the caller.
    pub fn keep_path(&mut self, table: &mut BlockTable, path: &[usize]) {
        assert!(path.is_sorted_by(|a, b| a < b), "a path goes from a parent to its child");
        let first = table.len();
        for (depth, place) in path.iter().enumerate() {
            assert!(first + place < table.reserved(), "not reserved");
            if depth != *place {
                self.copy_position(table, first + place, first + depth);
            }
        }
        table.commit(path.len());
    }

    /// Elements of the keys (or of the values) of one layer and head in a block.
    fn plane(&self) -> usize {
        self.pool.block_tokens() * self.shape.padded_dim()
    }

    /// The element where keys (0) or values (1) of a layer and head start in a block.
    fn offset(&self, layer: usize, head: usize, values: usize) -> usize {
        ((layer * self.shape.n_kv_heads + head) * 2 + values) * self.plane()
    }

    /// The element where the key of a place starts among the keys of a layer and head; its elements are
    /// 16 apart.
    fn key_at(&self, place: usize) -> usize {
        place / LANES * LANES * self.shape.padded_dim() + place % LANES
    }

    fn bytes_of(&self, block: u32) -> &[u8] {
        match self.blocks.get(block as usize) {
            Some(Some(block)) => block,
            _ => unreachable!("a block that a table holds has memory"),
        }
    }

    fn bytes_of_mut(&mut self, block: u32) -> &mut [u8] {
        match self.blocks.get_mut(block as usize) {
            Some(Some(block)) => block,
            _ => unreachable!("a block that a table holds has memory"),
        }
    }

    fn copy_position(&mut self, table: &BlockTable, from: usize, to: usize) {
        match self.format {
            KvFormat::F32 => self.copy_elements::<f32>(table, from, to),
            KvFormat::F16 => self.copy_elements::<f16>(table, from, to),
        }
    }

    fn copy_elements<T: Pod>(&mut self, table: &BlockTable, from: usize, to: usize) {
        let padded = self.shape.padded_dim();
        let (from, to) = (table.locate(&self.pool, from), table.locate(&self.pool, to));
        for layer in 0..self.shape.n_layers {
            for head in 0..self.shape.n_kv_heads {
                let (keys, values) = (self.offset(layer, head, 0), self.offset(layer, head, 1));
                let (k_from, k_to) = (keys + self.key_at(from.1), keys + self.key_at(to.1));
                for i in 0..padded {
                    let (v_from, v_to) = (from.1 * padded + i, to.1 * padded + i);
                    let source: &[T] = bytemuck::cast_slice(self.bytes_of(from.0));
                    let (key, value) = (source[k_from + i * LANES], source[values + v_from]);
                    let target: &mut [T] = bytemuck::cast_slice_mut(self.bytes_of_mut(to.0));
                    target[k_to + i * LANES] = key;
                    target[values + v_to] = value;
                }
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
        let at = table.locate(&self.pool, position);
        match self.format {
            KvFormat::F32 => self.write_elements(at, layer, (keys, values), |x| x),
            KvFormat::F16 => self.write_elements(at, layer, (keys, values), to_half),
        }
    }

    fn write_elements<T: Pod>(
        &mut self,
        (block, place): (u32, usize),
        layer: usize,
        (keys, values): (&[f32], &[f32]),
        convert: impl Fn(f32) -> T,
    ) {
        let (dim, padded) = (self.shape.head_dim, self.shape.padded_dim());
        assert_eq!((keys.len(), values.len()), (dim * self.shape.n_kv_heads, keys.len()));
        let heads = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
        for (head, (key, value)) in heads.enumerate() {
            let k = self.offset(layer, head, 0) + self.key_at(place);
            let v = self.offset(layer, head, 1) + place * padded;
            let block: &mut [T] = bytemuck::cast_slice_mut(self.bytes_of_mut(block));
            for (slot, x) in block[k..].iter_mut().step_by(LANES).zip(key) {
                *slot = convert(*x);
            }
            for (slot, x) in block[v..].iter_mut().zip(value) {
                *slot = convert(*x);
            }
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

    /// Bytes of the keys and values of one layer and head for 16 positions from `first`, a multiple of 16.
    pub(super) fn chunk(
        &self,
        table: &BlockTable,
        first: usize,
        layer: usize,
        head: usize,
    ) -> (&[u8], &[u8]) {
        let (block, place) = table.locate(&self.pool, first);
        let (keys, values) = self.block(block, layer, head);
        let padded = self.shape.padded_dim() * self.format.bytes();
        let range = place * padded..(place + LANES) * padded;
        (&keys[range.clone()], &values[range])
    }

    /// [`KvStore::chunk`], to be written: no other sequence may hold the block.
    pub(super) fn chunk_mut(
        &mut self,
        table: &BlockTable,
        first: usize,
        layer: usize,
        head: usize,
    ) -> (&mut [u8], &mut [u8]) {
        let (block, place) = table.locate(&self.pool, first);
        assert!(self.pool.is_writable(block), "others read the block of {first}");
        let width = self.format.bytes();
        let (at, plane) = (self.offset(layer, head, 0) * width, self.plane() * width);
        let padded = self.shape.padded_dim() * width;
        let (keys, values) = self.bytes_of_mut(block)[at..at + 2 * plane].split_at_mut(plane);
        let range = place * padded..(place + LANES) * padded;
        (&mut keys[range.clone()], &mut values[range])
    }

    /// Bytes of the keys and values of one layer and head in a block.
    #[must_use]
    pub fn block(&self, block: u32, layer: usize, head: usize) -> (&[u8], &[u8]) {
        let width = self.format.bytes();
        let (at, plane) = (self.offset(layer, head, 0) * width, self.plane() * width);
        self.bytes_of(block)[at..at + 2 * plane].split_at(plane)
    }
}

/// To half precision, ties to even. What is out of range becomes the largest number there is, because
/// an infinity among the keys would turn a whole row to NaN; a NaN stays one, so that damage shows.
fn to_half(x: f32) -> f16 {
    let half = f16::from_f32(x);
    if half.is_infinite() && x.is_finite() { f16::MAX.copysign(half) } else { half }
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
        store.keep_path(&mut table, &[1, 2, 5, 9]);
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
    fn halves_saturate_and_keep_their_nans() {
        for (x, want) in [(1e6, 65504.0), (-1e6, -65504.0), (65519.0, 65504.0), (0.1, 0.099975586)]
        {
            assert_eq!(to_half(x).to_f32(), want);
        }
        assert!(to_half(f32::NAN).is_nan() && to_half(f32::INFINITY).is_infinite());
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
