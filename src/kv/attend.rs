//! Attention over the blocks of one sequence.
//!
//! Work is cut by KV head and by runs of query positions. A task walks the blocks in its outer loop, so
//! that a block's keys and values are loaded once for all query heads of the group and all rows of the
//! run. Nothing is split along the positions: every query row sees the same sequence of operations
//! whatever the batch, the chunking of the prompt, the block size and the number of threads.
#![forbid(unsafe_code)]

use super::blocks::{BlockTable, NULL_BLOCK};
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
    from: Vec<u32>,
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
            from: memory::zeroed("attention windows", rows)?,
        })
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.q.bytes() + self.acc.bytes() + self.sum.bytes() + 12 * self.max.len()
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
    from: &'a mut [u32],
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

/// What a query row looks at and how it scores it.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// Multiplied onto each score.
    pub scale: f32,
    /// Scores are bent to lie within this of zero (Gemma 2); 0 leaves them alone.
    pub softcap: f32,
    /// Positions that a row sees, its own included; `usize::MAX` for all.
    pub window: usize,
    /// First positions of the sequence that are seen besides the window, as attention sinks (Xiao et
    /// al. 2023, StreamingLLM).
    pub sinks: usize,
    /// The queries for the sinks of rows whose window has left them: rotated for position
    /// `sinks + window - 1`, their place inside the cache, so that keys need never be rotated again. In the
    /// shape of the queries; none to use those.
    pub sink_q: Option<&'a [f32]>,
}

impl Sight<'_> {
    /// All positions up to the row's own.
    #[must_use]
    pub fn causal(scale: f32) -> Self {
        Self { scale, softcap: 0.0, window: usize::MAX, sinks: 0, sink_q: None }
    }

    /// Where the window of the row at `position` starts: 0 as long as nothing lies between the sinks and
    /// the window.
    #[must_use]
    pub fn start(&self, position: usize) -> usize {
        let start = (position + 1).saturating_sub(self.window);
        if start <= self.sinks { 0 } else { start }
    }
}

/// Attention of `m` query rows at positions `first..first + m`, each over what `sight` says of the
/// positions up to its own. `q` and `out` are `m` rows of `n_heads * head_dim` floats; query heads
/// `h * group` to `(h + 1) * group` share KV head `h`. Keys and values of these positions must have been
/// written.
///
/// # Panics
/// When the rows are not of that shape or exceed the scratch, or a row sees positions that were dropped: a
/// bug of the caller.
pub fn attend(
    kernels: &Kernels,
    pool: &Pool,
    keys: Keys<'_>,
    first: usize,
    sight: &Sight<'_>,
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
        .zip(scratch.from.chunks_exact_mut(head_rows))
        .take(shape.n_kv_heads);
    let rows = positions * group;
    for (head, (((((q, acc), sum), max), visible), from)) in heads.enumerate() {
        let runs = q
            .chunks_mut(rows * padded)
            .zip(acc.chunks_mut(rows * padded))
            .zip(sum.chunks_mut(rows * LANES))
            .zip(max.chunks_mut(rows))
            .zip(visible.chunks_mut(rows))
            .zip(from.chunks_mut(rows));
        for (run, (((((q, acc), sum), max), visible), from)) in runs.enumerate() {
            tasks.push(Task { head, first: run * positions, q, acc, sum, max, visible, from });
        }
    }
    pool.chunks_mut(&mut tasks, 1, &|_, task| {
        let task = &mut task[0];
        task.clear();
        if sight.sinks > 0 {
            task.load(sight.sink_q.unwrap_or(q), dim, padded, group, n_heads);
            task.walk(kernels, keys, sight, (first, group, padded), Part::Sinks);
        }
        task.load(q, dim, padded, group, n_heads);
        task.walk(kernels, keys, sight, (first, group, padded), Part::Window);
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

/// Which of the positions a walk goes over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The sinks, for rows whose window has left them.
    Sinks,
    /// The window, or everything.
    Window,
}

impl Task<'_> {
    fn clear(&mut self) {
        self.acc.fill(0.0);
        self.sum.fill(0.0);
        self.max.fill(f32::NEG_INFINITY);
    }

    /// Copies the queries of this task, padded.
    fn load(&mut self, q: &[f32], dim: usize, padded: usize, group: usize, n_heads: usize) {
        for (row, slot) in self.q.chunks_exact_mut(padded).enumerate() {
            let position = self.first + row / group;
            let head = self.head * group + row % group;
            let at = (position * n_heads + head) * dim;
            slot[..dim].copy_from_slice(&q[at..at + dim]);
            slot[dim..].fill(0.0);
        }
    }

    /// Carries the state over all blocks of which any row of this task sees something.
    fn walk(
        &mut self,
        kernels: &Kernels,
        keys: Keys<'_>,
        sight: &Sight<'_>,
        (first, group, padded): (usize, usize, usize),
        part: Part,
    ) {
        let tokens = keys.store.pool().block_tokens();
        // Rows in order of position: the first window starts first, the last one ends last.
        let end = match part {
            Part::Sinks => sight.sinks,
            Part::Window => first + self.first + self.visible.len() / group,
        };
        let start = match part {
            Part::Sinks => 0,
            Part::Window => sight.start(first + self.first),
        };
        let blocks = keys.table.blocks().iter().enumerate().skip(start / tokens);
        for (index, block) in blocks.take_while(|(index, _)| index * tokens < end) {
            let offset = index * tokens;
            let inside = |position: usize| position.saturating_sub(offset).min(tokens) as u32;
            for (row, (from, visible)) in self.from.iter_mut().zip(&mut *self.visible).enumerate() {
                let position = first + self.first + row / group;
                (*from, *visible) = match (part, sight.start(position)) {
                    (Part::Window, start) => (inside(start), inside(position + 1)),
                    (Part::Sinks, 0) => (0, 0),
                    (Part::Sinks, _) => (0, inside(sight.sinks)),
                };
            }
            if self.from.iter().zip(&*self.visible).all(|(from, visible)| from >= visible) {
                continue;
            }
            assert!(*block != NULL_BLOCK, "positions from {offset} on were dropped");
            let (k, v) = keys.store.block(*block, keys.layer, self.head);
            kernels.attend(&mut AttendStep {
                q: self.q,
                d: padded,
                format: keys.store.format(),
                k,
                v,
                visible: self.visible,
                from: self.from,
                scale: sight.scale,
                softcap: sight.softcap,
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
        cache: (&KvStore, &BlockTable),
        first: usize,
        m: usize,
    ) -> Vec<f32> {
        look(isa, threads, cache, &Sight::causal(0.2), first, m)
    }

    fn look(
        isa: Isa,
        threads: usize,
        (store, table): (&KvStore, &BlockTable),
        sight: &Sight<'_>,
        first: usize,
        m: usize,
    ) -> Vec<f32> {
        let kernels = Kernels::new(isa).unwrap();
        let pool = Pool::new(threads).unwrap();
        let mut scratch = AttendScratch::new(m, HEADS, SHAPE.padded_dim()).unwrap();
        let q: Vec<_> = (first * HEADS * 24..(first + m) * HEADS * 24).map(noise).collect();
        let mut out = vec![0.0; q.len()];
        let keys = Keys { store, table, layer: 0 };
        attend(&kernels, &pool, keys, first, sight, &mut scratch, (&q, &mut out));
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

    /// A window over everything, sinks in front of it, or a window with other queries for the sinks, by
    /// the definition in f64.
    fn defined(sight: &Sight<'_>, position: usize, head: usize, i: usize) -> f64 {
        let start = sight.start(position);
        let seen = (0..=position).filter(|p| *p >= start || *p < sight.sinks);
        let q = |p: usize, i: usize| match sight.sink_q {
            Some(q) if p < start => f64::from(q[head * 24 + i]),
            _ => f64::from(noise((position * HEADS + head) * 24 + i)),
        };
        let weighted = seen.map(|p| {
            let k = |i| f64::from(noise(p * 48 + head / 3 * 24 + i));
            let score: f64 = (0..24).map(|i| q(p, i) * k(i)).sum::<f64>() * f64::from(sight.scale);
            let cap = f64::from(sight.softcap);
            let score = if cap > 0.0 { cap * (score / cap).tanh() } else { score };
            (score.exp(), f64::from(noise(900_000 + p * 48 + head / 3 * 24 + i)))
        });
        let (sum, total) = weighted.fold((0.0, 0.0), |(s, t), (w, v)| (s + w * v, t + w));
        sum / total
    }

    #[test]
    fn windows_sinks_and_caps_equal_the_definition_in_any_block_size() {
        let sink_q: Vec<_> = (7_000..7_000 + HEADS * 24).map(noise).collect();
        let plain = Sight::causal(0.2);
        let sights = [
            Sight { softcap: 0.5, ..plain },
            Sight { window: 33, ..plain },
            Sight { window: 50, sinks: 4, ..plain },
            Sight { window: 50, sinks: 20, sink_q: Some(&sink_q), ..plain },
        ];
        for sight in &sights {
            for position in [10, 60, 149] {
                let mut want = None;
                for block in [16, 64, 256] {
                    let (mut store, mut table) =
                        (store(KvFormat::F32, block), BlockTable::default());
                    append(&mut store, &mut table, 150);
                    let from = sight.start(position);
                    store.drop_before(&mut table, sight.sinks, from);
                    let cache = (&store, &table);
                    let got = look(Isa::detect(), 1, cache, sight, position, 1);
                    assert_eq!(look(Isa::NONE, 2, cache, sight, position, 1), got);
                    for (at, got) in got.iter().enumerate() {
                        let defined = defined(sight, position, at / 24, at % 24);
                        assert!((f64::from(*got) - defined).abs() < 1e-5, "{got} {defined}");
                    }
                    let want = want.get_or_insert(got.clone());
                    assert!(*want == got, "{sight:?} at {position}, blocks of {block}");
                }
            }
        }
    }
}
