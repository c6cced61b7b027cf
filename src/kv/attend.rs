//! Attention over the blocks of one sequence.
//!
//! Work is cut by KV head and by runs of query positions. A task walks the blocks in its outer loop, so
//! that a block's keys and values are loaded once for all query heads of the group and all rows of the
//! run. Nothing is split along the positions: every query row sees the same sequence of operations
//! whatever the batch, the chunking of the prompt, the block size and the number of threads.
#![forbid(unsafe_code)]

use super::blocks::BlockTable;
use super::store::KvStore;
use crate::error::Result;
use crate::kernel::{AttendStep, Kernels, LANES, sum_lanes};
use crate::memory::{self, Aligned};
use crate::threads::Pool;

/// Query rows a task carries along a block: enough to hide the loads, few enough for the L1 cache.
const TASK_ROWS: usize = 16;

/// Padded queries and running state for a number of query positions, reused from call to call.
pub struct AttendScratch {
    n_heads: usize,
    padded_dim: usize,
    q: Aligned<f32>,
    acc: Aligned<f32>,
    sum: Aligned<f32>,
    max: Vec<f32>,
    visible: Vec<u32>,
}

impl AttendScratch {
    /// Room for `m` positions of `n_heads` query heads.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(m: usize, n_heads: usize, padded_dim: usize) -> Result<Self> {
        let rows = m * n_heads;
        Ok(Self {
            n_heads,
            padded_dim,
            q: Aligned::zeroed("attention queries", rows * padded_dim)?,
            acc: Aligned::zeroed("attention sums", rows * padded_dim)?,
            sum: Aligned::zeroed("attention weights", rows * LANES)?,
            max: memory::zeroed("attention maxima", rows)?,
            visible: memory::zeroed("attention windows", rows)?,
        })
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.q.bytes() + self.acc.bytes() + self.sum.bytes() + 8 * self.max.len()
    }
}

/// The part of the scratch that one task works on.
struct Task<'a> {
    head: usize,
    first: usize,
    q: &'a mut [f32],
    acc: &'a mut [f32],
    sum: &'a mut [f32],
    max: &'a mut [f32],
    visible: &'a mut [u32],
}

/// The cache of one sequence as attention reads it.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// The bytes.
    pub store: &'a KvStore,
    /// The blocks of the sequence.
    pub table: &'a BlockTable,
    /// The layer.
    pub layer: usize,
}

/// Attention of `m` query rows at positions `first..first + m`, each over all positions up to its own,
/// scores multiplied by `scale`. `q` and `out` are `m` rows of `n_heads * head_dim` floats; query heads
/// `h * group` to `(h + 1) * group` share KV head `h`. Keys and values of these positions must have been
/// written.
///
/// # Panics
/// When the rows are not of that shape or exceed the scratch: a bug of the caller.
pub fn attend(
    kernels: &Kernels,
    pool: &Pool,
    keys: Keys<'_>,
    first: usize,
    scale: f32,
    scratch: &mut AttendScratch,
    (q, out): (&[f32], &mut [f32]),
) {
    let shape = keys.store.shape();
    let (dim, padded, n_heads) = (shape.head_dim, scratch.padded_dim, scratch.n_heads);
    let m = q.len() / (n_heads * dim);
    let group = n_heads / shape.n_kv_heads;
    let head_rows = m * group;
    let positions = (TASK_ROWS / group).max(1);

    let mut tasks = Vec::with_capacity(shape.n_kv_heads * m.div_ceil(positions));
    let heads = scratch
        .q
        .chunks_exact_mut(head_rows * padded)
        .zip(scratch.acc.chunks_exact_mut(head_rows * padded))
        .zip(scratch.sum.chunks_exact_mut(head_rows * LANES))
        .zip(scratch.max.chunks_exact_mut(head_rows))
        .zip(scratch.visible.chunks_exact_mut(head_rows))
        .take(shape.n_kv_heads);
    let rows = positions * group;
    for (head, ((((q, acc), sum), max), visible)) in heads.enumerate() {
        let runs = q
            .chunks_mut(rows * padded)
            .zip(acc.chunks_mut(rows * padded))
            .zip(sum.chunks_mut(rows * LANES))
            .zip(max.chunks_mut(rows))
            .zip(visible.chunks_mut(rows));
        for (run, ((((q, acc), sum), max), visible)) in runs.enumerate() {
            tasks.push(Task { head, first: run * positions, q, acc, sum, max, visible });
        }
    }
    pool.chunks_mut(&mut tasks, 1, &|_, task| {
        let task = &mut task[0];
        task.start(q, dim, padded, group, n_heads);
        task.walk(kernels, keys, first, scale, group, padded);
    });
    drop(tasks);

    let (acc, (sums, _)) = (&scratch.acc, scratch.sum.as_chunks::<LANES>());
    pool.chunks_mut(out, n_heads * dim, &|row, out| {
        for (head, out) in out.chunks_exact_mut(dim).enumerate() {
            let at = head / group * head_rows + row * group + head % group;
            let total = sum_lanes(sums[at]);
            for (out, acc) in out.iter_mut().zip(&acc[at * padded..]) {
                *out = acc / total;
            }
        }
    });
}

impl Task<'_> {
    /// Copies the queries of this task, padded, and clears the state.
    fn start(&mut self, q: &[f32], dim: usize, padded: usize, group: usize, n_heads: usize) {
        for (row, slot) in self.q.chunks_exact_mut(padded).enumerate() {
            let position = self.first + row / group;
            let head = self.head * group + row % group;
            let at = (position * n_heads + head) * dim;
            slot[..dim].copy_from_slice(&q[at..at + dim]);
            slot[dim..].fill(0.0);
        }
        self.acc.fill(0.0);
        self.sum.fill(0.0);
        self.max.fill(f32::NEG_INFINITY);
    }

    /// Carries the state over all blocks that any row of this task sees.
    fn walk(
        &mut self,
        kernels: &Kernels,
        keys: Keys<'_>,
        first: usize,
        scale: f32,
        group: usize,
        padded: usize,
    ) {
        let last = first + self.first + self.visible.len() / group;
        let tokens = keys.store.pool().block_tokens();
        for (index, block) in keys.table.blocks().iter().enumerate() {
            let start = index * tokens;
            if start >= last {
                break;
            }
            for (row, visible) in self.visible.iter_mut().enumerate() {
                let seen = first + self.first + row / group + 1;
                *visible = seen.saturating_sub(start).min(tokens) as u32;
            }
            let (k, v) = keys.store.block(*block, keys.layer, self.head);
            kernels.attend(&mut AttendStep {
                q: self.q,
                d: padded,
                format: keys.store.format(),
                k,
                v,
                visible: self.visible,
                scale,
                max: self.max,
                sum: self.sum,
                acc: self.acc,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::kernel::KvFormat;
    use crate::kv::store::{KvConfig, KvShape};

    const SHAPE: KvShape = KvShape { n_layers: 1, n_kv_heads: 2, head_dim: 24 };
    const HEADS: usize = 6;

    fn noise(seed: usize) -> f32 {
        let x = (seed as u32).wrapping_mul(2_654_435_761) >> 8;
        x as f32 / (1 << 23) as f32 - 1.0
    }

    fn store(format: KvFormat, block_tokens: usize) -> KvStore {
        let (shape, budget) = (SHAPE, 1 << 22);
        let config = KvConfig { shape, format, block_tokens, budget, fingerprint: 0 };
        KvStore::with(&config).unwrap()
    }

    fn append(store: &mut KvStore, table: &mut BlockTable, count: usize) {
        store.reserve(table, count).unwrap();
        for position in table.len()..table.len() + count {
            let keys: Vec<_> = (0..48).map(|i| noise(position * 48 + i)).collect();
            let values: Vec<_> = (0..48).map(|i| noise(900_000 + position * 48 + i)).collect();
            store.write(table, 0, position, &keys, &values);
        }
        table.commit(count);
    }

    fn run(isa: Isa, threads: usize, first: usize, m: usize) -> Vec<f32> {
        let (mut store, mut table) = (store(KvFormat::F32, 64), BlockTable::default());
        append(&mut store, &mut table, 200);
        run_on(isa, threads, (&store, &table), first, m)
    }

    fn run_on(
        isa: Isa,
        threads: usize,
        (store, table): (&KvStore, &BlockTable),
        first: usize,
        m: usize,
    ) -> Vec<f32> {
        let kernels = Kernels::new(isa).unwrap();
        let pool = Pool::new(threads).unwrap();
        let mut scratch = AttendScratch::new(m, HEADS, SHAPE.padded_dim()).unwrap();
        let q: Vec<_> = (first * HEADS * 24..(first + m) * HEADS * 24).map(noise).collect();
        let mut out = vec![0.0; q.len()];
        let keys = Keys { store, table, layer: 0 };
        attend(&kernels, &pool, keys, first, 0.2, &mut scratch, (&q, &mut out));
        out
    }

    #[test]
    fn equals_the_definition() {
        let out = run(Isa::detect(), 2, 130, 3);
        for (row, out) in out.chunks_exact(HEADS * 24).enumerate() {
            for (head, out) in out.chunks_exact(24).enumerate() {
                let position = 130 + row;
                let dot = |p: usize| -> f64 {
                    let q = (position * HEADS + head) * 24;
                    let k = p * 48 + head / 3 * 24;
                    (0..24).map(|i| f64::from(noise(q + i)) * f64::from(noise(k + i))).sum()
                };
                let weights: Vec<f64> = (0..=position).map(|p| (dot(p) * 0.2).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (i, out) in out.iter().enumerate() {
                    let v = |p: usize| f64::from(noise(900_000 + p * 48 + head / 3 * 24 + i));
                    let want: f64 =
                        weights.iter().enumerate().map(|(p, w)| w * v(p)).sum::<f64>() / total;
                    assert!((f64::from(*out) - want).abs() < 1e-5, "{out} {want}");
                }
            }
        }
    }

    #[test]
    fn batch_threads_and_instruction_set_do_not_change_a_bit() {
        let all = run(Isa::NONE, 1, 0, 150);
        let width = HEADS * 24;
        for isa in [Isa::NONE, Isa::detect()] {
            assert_eq!(run(isa, 3, 0, 150), all);
            for position in [0, 15, 16, 63, 64, 149] {
                let one = run(isa, 1, position, 1);
                assert_eq!(one, all[position * width..(position + 1) * width], "at {position}");
            }
        }
    }

    #[test]
    fn blocks_of_any_size_in_any_order_give_the_bits_of_one_that_holds_all() {
        KvFormat::ALL.into_iter().for_each(any_size_any_order);
    }

    fn any_size_any_order(format: KvFormat) {
        let isa = Isa::detect();
        let (mut whole, mut table) = (store(format, 256), BlockTable::default());
        append(&mut whole, &mut table, 200);
        let want = run_on(isa, 1, (&whole, &table), 170, 3);
        for block in [16, 32, 48, 64, 128, 256] {
            let (mut store, mut table) = (store(format, block), BlockTable::default());
            // Others take and free blocks in between, so that the order in memory is not that of time.
            let mut others: Vec<_> = (0..7).map(|_| BlockTable::default()).collect();
            for (i, count) in [5, 31, 64, 3, 57, 40].into_iter().enumerate() {
                store.reserve(&mut others[i], 90).unwrap();
                store.truncate(&mut others[i / 2], 0);
                append(&mut store, &mut table, count);
            }
            let fork = store.fork(&mut table).unwrap();
            assert_eq!(run_on(isa, 2, (&store, &table), 170, 3), want, "blocks of {block}");
            // A rollback with other tokens in between, in a copied tail.
            store.truncate(&mut table, 150);
            append(&mut store, &mut table, 7);
            store.truncate(&mut table, 151);
            append(&mut store, &mut table, 49);
            assert_eq!(run_on(isa, 2, (&store, &table), 170, 3), want, "blocks of {block}");
            assert_eq!(run_on(isa, 2, (&store, &fork), 170, 3), want, "blocks of {block}");
        }
    }
}
