//! The bytes of the KV cache: blocks of keys and values, made on demand.
//!
//! A block holds 64 positions of every layer and KV head. Keys of 16 positions lie side by side
//! (`[d][16]`), the order in which a vector of 16 scores is computed with no horizontal sum; values lie
//! position after position. Heads are padded to a multiple of 16 floats.
#![forbid(unsafe_code)]

use super::BLOCK_TOKENS;
use super::blocks::{BlockPool, BlockTable};
use crate::error::{Error, Result};
use crate::kernel::LANES;
use crate::memory::Aligned;

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
    /// Floats of a head as stored: padded to whole vectors.
    #[must_use]
    pub fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Floats of the keys (or of the values) of one layer and head in a block.
    fn plane(&self) -> usize {
        BLOCK_TOKENS * self.padded_dim()
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        2 * self.n_layers * self.n_kv_heads * self.plane() * size_of::<f32>()
    }

    /// Bytes that a token costs.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        self.block_bytes() / BLOCK_TOKENS
    }
}

/// The blocks themselves and the pool that says which are in use.
pub struct KvStore {
    shape: KvShape,
    pool: BlockPool,
    blocks: Vec<Aligned<f32>>,
}

impl KvStore {
    /// An empty store that grows to at most `tokens` tokens, rounded up to blocks.
    #[must_use]
    pub fn new(shape: KvShape, tokens: usize) -> Self {
        let pool = BlockPool::new(tokens.div_ceil(BLOCK_TOKENS));
        Self { shape, pool, blocks: Vec::new() }
    }

    /// What one token occupies.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Bytes held by blocks.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(Aligned::bytes).sum()
    }

    /// Makes room for `count` more tokens in `table`, or changes nothing.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when the store's limit is reached, [`Error::OutOfMemory`] when the system
    /// refuses a block.
    pub fn reserve(&mut self, table: &mut BlockTable, count: usize) -> Result<()> {
        if !table.reserve(&mut self.pool, count) {
            let limit = (self.pool.made() + self.pool.available()) * BLOCK_TOKENS;
            return Err(Error::ContextFull { limit });
        }
        while self.blocks.len() < self.pool.made() {
            let floats = self.shape.block_bytes() / size_of::<f32>();
            match Aligned::zeroed("a KV block", floats) {
                Ok(block) => self.blocks.push(block),
                Err(error) => {
                    table.truncate(&mut self.pool, table.len());
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Keeps the first `len` tokens of `table`.
    pub fn truncate(&mut self, table: &mut BlockTable, len: usize) {
        table.truncate(&mut self.pool, len);
    }

    /// Where keys (0) or values (1) of a layer and head start in a block.
    fn offset(&self, layer: usize, head: usize, values: usize) -> usize {
        ((layer * self.shape.n_kv_heads + head) * 2 + values) * self.shape.plane()
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
        let (block, place) = table.locate(position);
        let (dim, padded) = (self.shape.head_dim, self.shape.padded_dim());
        assert_eq!((keys.len(), values.len()), (dim * self.shape.n_kv_heads, keys.len()));
        let heads = keys.chunks_exact(dim).zip(values.chunks_exact(dim));
        for (head, (key, value)) in heads.enumerate() {
            let at = self.offset(layer, head, 0) + place / LANES * LANES * padded + place % LANES;
            let block = &mut self.blocks[block as usize];
            for (slot, x) in block[at..].iter_mut().step_by(LANES).zip(key) {
                *slot = *x;
            }
            let at = self.shape.plane() + at / self.shape.plane() * self.shape.plane();
            block[at + place * padded..][..dim].copy_from_slice(value);
        }
    }

    /// Keys and values of one layer and head in a block.
    #[must_use]
    pub fn block(&self, block: u32, layer: usize, head: usize) -> (&[f32], &[f32]) {
        let at = self.offset(layer, head, 0);
        self.blocks[block as usize][at..at + 2 * self.shape.plane()].split_at(self.shape.plane())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_where_the_layout_says() {
        let shape = KvShape { n_layers: 2, n_kv_heads: 3, head_dim: 8 };
        let mut store = KvStore::new(shape, 200);
        let mut table = BlockTable::default();
        store.reserve(&mut table, 70).unwrap();
        for position in 0..70 {
            let value = |x: usize| (position * 1000 + x) as f32;
            let keys: Vec<_> = (0..24).map(value).collect();
            let values: Vec<_> = (100..124).map(value).collect();
            store.write(&table, 1, position, &keys, &values);
        }
        table.commit(70);
        let (keys, values) = store.block(table.blocks()[1], 1, 2);
        // Position 69 is place 5 of the second block; head 2 starts at channel 16.
        assert_eq!(keys[3 * LANES + 5], 69_019.0);
        assert_eq!(values[5 * 16 + 3], 69_119.0);
        assert_eq!(values[5 * 16 + 8..6 * 16], [0.0; 8]);
        let (keys, _) = store.block(table.blocks()[0], 1, 0);
        assert_eq!(keys[16 * 16 + 7 * LANES + 1], 17_007.0);
    }

    #[test]
    fn the_limit_is_a_status_and_changes_nothing() {
        let shape = KvShape { n_layers: 1, n_kv_heads: 1, head_dim: 16 };
        let mut store = KvStore::new(shape, 64);
        let mut table = BlockTable::default();
        assert_eq!(store.reserve(&mut table, 65), Err(Error::ContextFull { limit: 64 }));
        assert_eq!((store.bytes(), table.len()), (0, 0));
        store.reserve(&mut table, 64).unwrap();
        assert_eq!(store.bytes(), shape.block_bytes());
    }
}
