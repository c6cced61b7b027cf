//! Attention over the blocks of one sequence.
//!
//! Work is cut by KV head and by runs of query positions. A task walks the blocks in its outer loop, so
//! that a block's keys and values are loaded once for all query heads of the group and all rows of the
//! run, and names the block after it, so that it is on its way. Positions are cut at multiples of
//! `SPAN`: each span has a state of its own, and the states are joined in order. Where there are fewer
//! heads than threads the spans are shared out among them; where not, one task does all of its own. Every
//! query row sees the same sequence of operations in any case, whatever the batch, the chunking of the
//! prompt, the block size and the number of threads.
//!
//! The rows of a tree of drafts see the sequence and their ancestors. What lies behind the last full chunk
//! of the sequence is put together anew for each row, its ancestors at the positions that they will have
//! when they are kept: a row of a tree has the bits that the same tokens have in a chain.
#![forbid(unsafe_code)]

use super::blocks::{BlockTable, NULL_BLOCK};
use super::elements;
use super::sight::{Rows, Sight};
use super::states::{State, States};
use super::store::{KvShape, KvStore};
use crate::error::Result;
use crate::kernel::{AttendStep, Kernels, KvFormat, LANES, QueryCodes, quantize_query, sum_lanes};
use crate::memory::{self, Aligned};
use crate::threads::Pool;
use std::ops::Range;

/// Query rows a task carries along a block: enough to hide the loads, few enough for the L1 cache.
const TASK_ROWS: usize = 16;

/// Positions whose weights and values are summed in one state. A part of the numeric contract.
const SPAN: usize = 1024;

/// Buffers for a number of query positions, reused from call to call.
pub struct AttendScratch {
    most: usize,
    n_heads: usize,
    padded_dim: usize,
    q: Aligned<f32>,
    codes: Aligned<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    total: States,
    /// States of spans on the way to the total.
    part: States,
    visible: Vec<u32>,
    from: Vec<u32>,
    /// For each KV head, a chunk of keys and one of values: where rows of trees put theirs together.
    gathered: Aligned<u8>,
}

impl AttendScratch {
    /// Room for `m` positions of `n_heads` query heads over a cache of `shape`.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(m: usize, n_heads: usize, shape: KvShape) -> Result<Self> {
        let (rows, padded_dim) = (m * n_heads, shape.padded_dim());
        let chunks = KvFormat::F32.key_bytes(padded_dim) + KvFormat::F32.value_bytes(padded_dim);
        Ok(Self {
            most: m,
            n_heads,
            padded_dim,
            q: Aligned::zeroed("attention queries", rows * padded_dim)?,
            codes: Aligned::zeroed("attention queries", rows * 4 * padded_dim)?,
            scales: memory::zeroed("attention queries", rows)?,
            sums: memory::zeroed("attention queries", rows)?,
            total: States::new(rows, padded_dim)?,
            part: States::new(rows, padded_dim)?,
            visible: memory::zeroed("attention windows", rows)?,
            from: memory::zeroed("attention windows", rows)?,
            gathered: Aligned::zeroed("chunks of a tree", shape.n_kv_heads * chunks)?,
        })
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.q.bytes()
            + self.codes.bytes()
            + self.total.bytes()
            + self.part.bytes()
            + self.gathered.bytes()
            + 16 * self.scales.len()
    }

    /// Lays the queries out by KV head, padded, and as integers where the cache has integers.
    fn load(
        &mut self,
        pool: &Pool,
        q: &[f32],
        (m, group, dim): (usize, usize, usize),
        codes: bool,
    ) {
        let (padded, n_heads) = (self.padded_dim, self.n_heads);
        struct Rows<'a> {
            q: &'a mut [f32],
            codes: &'a mut [i8],
            scales: &'a mut [f32],
            sums: &'a mut [i32],
        }
        let rows = m * group;
        let heads = self.q.chunks_mut(rows * padded).zip(self.codes.chunks_mut(rows * 4 * padded));
        let heads = heads.zip(self.scales.chunks_mut(rows)).zip(self.sums.chunks_mut(rows));
        let heads = heads.map(|(((q, codes), scales), sums)| Rows { q, codes, scales, sums });
        let mut heads: Vec<_> = heads.take(n_heads / group).collect();
        // A few rows are loaded sooner than threads are woken.
        let together = if m <= 4 { heads.len() } else { 1 };
        pool.chunks_mut(&mut heads, together, &|chunk, heads| {
            for (at, head) in heads.iter_mut().enumerate() {
                for (row, slot) in head.q.chunks_exact_mut(padded).enumerate() {
                    let index = (chunk * together + at) * group + row % group;
                    let from = (row / group * n_heads + index) * dim;
                    slot[..dim].copy_from_slice(&q[from..from + dim]);
                    slot[dim..].fill(0.0);
                    if codes {
                        let codes = &mut head.codes[row * 4 * padded..(row + 1) * 4 * padded];
                        (head.scales[row], head.sums[row]) = quantize_query(slot, codes);
                    }
                }
            }
        });
    }
}

/// The cache of one sequence as attention reads it.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// The bytes. All blocks of the sequence must be in memory ([`KvStore::load`]).
    pub store: &'a KvStore,
    /// The blocks of the sequence.
    pub table: &'a BlockTable,
    /// The layer.
    pub layer: usize,
}

/// Attention of `m` query rows, each over what `sight` says of the positions up to its own. `q` and `out`
/// are `m` rows of `n_heads * head_dim` floats; query heads `h * group` to `(h + 1) * group` share KV head
/// `h`. Keys and values of these positions must have been written.
///
/// # Panics
/// When the rows are not of that shape or exceed the scratch, a parent comes after its child, or a row sees
/// positions that were dropped or spilled: a bug of the caller.
pub fn attend(
    kernels: &Kernels,
    pool: &Pool,
    keys: Keys<'_>,
    rows: Rows<'_>,
    sight: &Sight<'_>,
    scratch: &mut AttendScratch,
    (q, out): (&[f32], &mut [f32]),
) {
    let shape = keys.store.shape();
    let (dim, padded, n_heads) = (shape.head_dim, scratch.padded_dim, scratch.n_heads);
    let m = q.len() / (n_heads * dim);
    let group = n_heads / shape.n_kv_heads;
    assert!(m <= scratch.most && out.len() == q.len(), "{m} rows");
    if let Some(parents) = rows.parents {
        let mut parents = parents.iter().enumerate();
        assert!(parents.len() + 1 == m, "a parent for every row but the first");
        assert!(parents.all(|(i, parent)| *parent as usize <= i), "a parent comes first");
        assert!(keys.store.takes_trees(rows.first), "a tree across the border of formats");
    }
    let walk = Walk { kernels, keys, rows, sight, group, padded };
    let quantised = keys.store.format().is_quantised();
    scratch
        .total
        .runs(m * group, padded)
        .take(shape.n_kv_heads)
        .for_each(|mut state| state.clear());

    let positions = (0..m).map(|row| rows.position(row));
    let (low, high) = positions.fold((usize::MAX, 0), |(low, high), p| (low.min(p), high.max(p)));
    if m == 0 {
        return;
    }
    if sight.sinks > 0 && sight.start(high) > 0 {
        scratch.load(pool, sight.sink_q.unwrap_or(q), (m, group, dim), quantised);
        walk.all(pool, scratch, m, &[Span::Sinks]);
    }
    scratch.load(pool, q, (m, group, dim), quantised);
    let spans: Vec<_> = (sight.start(low) / SPAN..=high / SPAN).map(Span::Number).collect();
    walk.all(pool, scratch, m, &spans);

    let (acc, (sums, _)) = (&scratch.total.acc, scratch.total.sum.as_chunks::<LANES>());
    let together = if m <= 4 { out.len() } else { n_heads * dim };
    pool.chunks_mut(out, together, &|chunk, out| {
        for (row, out) in out.chunks_exact_mut(n_heads * dim).enumerate() {
            let row = chunk * (together / (n_heads * dim)) + row;
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let at = (head / group * m + row) * group + head % group;
                let total = sum_lanes(sums[at]);
                for (out, acc) in out.iter_mut().zip(&acc[at * padded..]) {
                    *out = acc / total;
                }
            }
        }
    });
}

/// Positions that are summed in one state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Span {
    /// The sinks, for rows whose window has left them.
    Sinks,
    /// Those from so many times [`SPAN`] on, as far as windows reach.
    Number(usize),
}

/// What all tasks of a call have in common.
#[derive(Clone, Copy)]
struct Walk<'a> {
    kernels: &'a Kernels,
    keys: Keys<'a>,
    rows: Rows<'a>,
    sight: &'a Sight<'a>,
    group: usize,
    padded: usize,
}

/// A run of query positions of one KV head.
struct Task<'a> {
    head: usize,
    /// The first of its positions in the batch.
    row: usize,
    q: &'a [f32],
    codes: QueryCodes<'a>,
    visible: &'a mut [u32],
    from: &'a mut [u32],
    gathered: &'a mut [u8],
}

/// The queries of all rows as they were loaded.
struct Queries<'a> {
    q: &'a [f32],
    codes: &'a [i8],
    scales: &'a [f32],
    sums: &'a [i32],
}

impl<'a> Queries<'a> {
    /// Those of `count` rows from `first`.
    fn rows(&self, first: usize, count: usize, padded: usize) -> (&'a [f32], QueryCodes<'a>) {
        let codes = QueryCodes {
            codes: &self.codes[first * 4 * padded..][..count * 4 * padded],
            scales: &self.scales[first..][..count],
            sums: &self.sums[first..][..count],
        };
        (&self.q[first * padded..][..count * padded], codes)
    }
}

impl Walk<'_> {
    /// Adds `spans`, in order, to the total of `m` positions.
    fn all(&self, pool: &Pool, scratch: &mut AttendScratch, m: usize, spans: &[Span]) {
        let n_kv_heads = scratch.n_heads / self.group;
        // A tree is not cut into runs: its rows share the sequence and the chunks to gather into.
        let run = match self.rows.parents {
            Some(_) => m,
            None => (TASK_ROWS / self.group).clamp(1, m),
        };
        let slots = (scratch.most / m).min(spans.len());
        let idle = n_kv_heads < 2 * pool.threads();
        if idle && slots > 1 && run == m && self.rows.parents.is_none() {
            for spans in spans.chunks(slots) {
                self.share_out(pool, scratch, m, spans);
            }
            return;
        }
        let (group, padded) = (self.group, self.padded);
        let (head_rows, rows) = (m * group, run * group);
        let queries = Queries {
            q: &scratch.q,
            codes: &scratch.codes,
            scales: &scratch.scales,
            sums: &scratch.sums,
        };
        let heads = scratch.total.runs(head_rows, padded).zip(scratch.part.runs(head_rows, padded));
        let heads = heads.zip(scratch.visible.chunks_mut(head_rows));
        let heads = heads.zip(scratch.from.chunks_mut(head_rows));
        let gathered = scratch.gathered.len() / n_kv_heads;
        let heads = heads.zip(scratch.gathered.chunks_mut(gathered)).enumerate();
        let mut tasks = Vec::with_capacity(n_kv_heads * m.div_ceil(run));
        for (head, ((((total, part), visible), from), gathered)) in heads {
            let runs = total.runs(rows, padded).zip(part.runs(rows, padded));
            let runs = runs.zip(visible.chunks_mut(rows)).zip(from.chunks_mut(rows)).enumerate();
            let mut gathered = Some(gathered);
            for (index, (((total, part), visible), from)) in runs {
                let first = head * head_rows + index * rows;
                let (q, codes) = queries.rows(first, visible.len(), padded);
                let (row, gathered) = (index * run, gathered.take().unwrap_or_default());
                let task = Task { head, row, q, codes, visible, from, gathered };
                tasks.push((task, total, part));
            }
        }
        pool.chunks_mut(&mut tasks, 1, &|_, task| {
            let (task, total, part) = &mut task[0];
            for span in spans {
                let rows = 0..total.max.len();
                if rows.clone().all(|row| total.is_empty(row)) {
                    // As if it were copied.
                    self.span(task, total, *span);
                    continue;
                }
                part.clear();
                self.span(task, part, *span);
                for row in rows {
                    if !part.is_empty(row) {
                        total.join(row, part, padded);
                    }
                }
            }
        });
    }

    /// [`Walk::all`] for one run and fewer heads than keep the threads busy: each span of a head is a task,
    /// and has a state until all are done.
    fn share_out(&self, pool: &Pool, scratch: &mut AttendScratch, m: usize, spans: &[Span]) {
        let (group, padded, all) = (self.group, self.padded, m * scratch.n_heads);
        let rows = m * group;
        let queries = Queries {
            q: &scratch.q,
            codes: &scratch.codes,
            scales: &scratch.scales,
            sums: &scratch.sums,
        };
        let slots = scratch.part.runs(all, padded).zip(scratch.visible.chunks_mut(all));
        let slots = slots.zip(scratch.from.chunks_mut(all)).zip(spans);
        let mut tasks = Vec::with_capacity(spans.len() * scratch.n_heads / group);
        for (((part, visible), from), span) in slots {
            let heads = part.runs(rows, padded).zip(visible.chunks_mut(rows));
            let heads = heads.zip(from.chunks_mut(rows)).enumerate();
            for (head, ((part, visible), from)) in heads {
                let (q, codes) = queries.rows(head * rows, rows, padded);
                let gathered = <&mut [u8]>::default();
                tasks.push((Task { head, row: 0, q, codes, visible, from, gathered }, part, *span));
            }
        }
        pool.chunks_mut(&mut tasks, 1, &|_, task| {
            let (task, part, span) = &mut task[0];
            part.clear();
            self.span(task, part, *span);
        });
        drop(tasks);

        let heads = scratch.total.runs(rows, padded).take(scratch.n_heads / group);
        let mut heads: Vec<_> =
            heads.map(|total| (total, Vec::with_capacity(spans.len()))).collect();
        for slot in scratch.part.runs(all, padded).take(spans.len()) {
            for ((_, parts), part) in heads.iter_mut().zip(slot.runs(rows, padded)) {
                parts.push(part);
            }
        }
        pool.chunks_mut(&mut heads, 1, &|_, head| {
            let (total, parts) = &mut head[0];
            for part in parts {
                for row in (0..rows).filter(|row| !part.is_empty(*row)).collect::<Vec<_>>() {
                    total.join(row, part, padded);
                }
            }
        });
    }

    /// The positions of a span that a row of the batch sees.
    fn range(&self, row: usize, span: Span) -> Range<usize> {
        let position = self.rows.position(row);
        let start = self.sight.start(position);
        match span {
            Span::Sinks if start == 0 => 0..0,
            Span::Sinks => 0..self.sight.sinks,
            Span::Number(number) => {
                let end = (position + 1).min((number + 1) * SPAN);
                start.max(number * SPAN).min(end)..end
            }
        }
    }

    /// Carries the state of a task over all blocks of a span of which any of its rows sees something.
    fn span(&self, task: &mut Task<'_>, state: &mut State<'_>, span: Span) {
        let Keys { store, table, layer } = self.keys;
        let tokens = store.pool().block_tokens();
        let rows = task.row..task.row + task.visible.len() / self.group;
        // From here on every row of a tree has positions of its own.
        let common = match self.rows.parents {
            None => usize::MAX,
            Some(_) => self.rows.first / LANES * LANES,
        };
        let (mut low, mut high) = (usize::MAX, 0);
        for range in rows.clone().map(|row| self.range(row, span)).filter(|range| !range.is_empty())
        {
            (low, high) = (low.min(range.start), high.max(range.end.min(common)));
        }
        let blocks = table.blocks();
        for index in (low.min(high) / tokens)..high.div_ceil(tokens) {
            let offset = index * tokens;
            let inside = |position: usize| position.clamp(offset, offset + tokens) - offset;
            for (at, row) in rows.clone().enumerate() {
                let range = self.range(row, span);
                let heads = at * self.group..(at + 1) * self.group;
                task.from[heads.clone()].fill(inside(range.start) as u32);
                task.visible[heads].fill(inside(range.end.min(common)) as u32);
            }
            if task.from.iter().zip(&*task.visible).all(|(from, visible)| from >= visible) {
                continue;
            }
            let block = blocks[index];
            assert!(block != NULL_BLOCK, "positions from {offset} on were dropped");
            let following = blocks.get(index + 1).filter(|block| **block != NULL_BLOCK);
            let (k, v) = store.block(block, layer, task.head);
            let next = following.map(|block| store.block(*block, layer, task.head));
            let format = store.block_format(block);
            self.step(task, state, 0..task.visible.len(), (format, k, v), next);
        }
        if self.rows.parents.is_some() {
            for (at, row) in rows.enumerate() {
                let range = self.range(row, span);
                self.own_path(task, state, (at, row), range.start.max(common)..range.end);
            }
        }
    }

    /// Carries the state of one row of a tree over positions that are its own: those of its path.
    fn own_path(
        &self,
        task: &mut Task<'_>,
        state: &mut State<'_>,
        (at, row): (usize, usize),
        range: Range<usize>,
    ) {
        let Keys { store, table, layer } = self.keys;
        let heads = at * self.group..(at + 1) * self.group;
        for base in (range.start / LANES * LANES..range.end).step_by(LANES) {
            let gathered = std::mem::take(&mut task.gathered);
            let mut format = store.format();
            let seen = base.max(range.start)..range.end.min(base + LANES);
            for position in seen.clone() {
                let place = self.rows.place(row, position);
                format = store.block_format(table.locate(store.pool(), place).0);
                let (keys, values) = store.chunk(table, place, layer, task.head);
                let (k, v) = gathered.split_at_mut(format.key_bytes(self.padded));
                let (from, to) = (place % LANES, position % LANES);
                elements::move_key(format, self.padded, (keys, from), (k, to));
                let v = &mut v[..format.value_bytes(self.padded)];
                elements::move_value(format, self.padded, (values, from), (v, to));
            }
            task.from[heads.clone()].fill((seen.start - base) as u32);
            task.visible[heads.clone()].fill((seen.end - base) as u32);
            let (k, v) = gathered.split_at(format.key_bytes(self.padded));
            self.step(task, state, heads.clone(), (format, k, v), None);
            task.gathered = gathered;
        }
    }

    /// Carries the state of some rows of a task over one block.
    fn step(
        &self,
        task: &Task<'_>,
        state: &mut State<'_>,
        rows: Range<usize>,
        (format, k, v): (KvFormat, &[u8], &[u8]),
        next: Option<(&[u8], &[u8])>,
    ) {
        let (d, Range { start, end }) = (self.padded, rows.clone());
        let codes = QueryCodes {
            codes: &task.codes.codes[start * 4 * d..end * 4 * d],
            scales: &task.codes.scales[rows.clone()],
            sums: &task.codes.sums[rows.clone()],
        };
        self.kernels.attend(&mut AttendStep {
            q: &task.q[start * d..end * d],
            codes,
            d,
            format,
            k,
            v,
            next,
            visible: &task.visible[rows.clone()],
            from: &task.from[rows.clone()],
            scale: self.sight.scale,
            softcap: self.sight.softcap,
            max: &mut state.max[rows],
            sum: &mut state.sum[start * LANES..end * LANES],
            acc: &mut state.acc[start * d..end * d],
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::kv::store::KvConfig;

    const SHAPE: KvShape = KvShape { n_layers: 1, n_kv_heads: 2, head_dim: 24 };
    const HEADS: usize = 6;

    /// All of what a test tries, or only the first where each takes seconds.
    fn tried<T>(all: &[T]) -> &[T] {
        if cfg!(miri) { &all[..1] } else { all }
    }

    fn noise(seed: usize) -> f32 {
        let x = (seed as u32).wrapping_mul(2_654_435_761) >> 8;
        x as f32 / (1 << 23) as f32 - 1.0
    }

    fn store(format: KvFormat, block_tokens: usize) -> KvStore {
        let (shape, budget) = (SHAPE, 1 << 23);
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
        append(&mut store, &mut table, if cfg!(miri) { 16 } else { 200 });
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
        let mut scratch = AttendScratch::new(m, HEADS, SHAPE).unwrap();
        let q: Vec<_> = (first * HEADS * 24..(first + m) * HEADS * 24).map(noise).collect();
        let mut out = vec![0.0; q.len()];
        let keys = Keys { store, table, layer: 0 };
        attend(&kernels, &pool, keys, Rows::chain(first), sight, &mut scratch, (&q, &mut out));
        out
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many positions for it")]
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
        let m = if cfg!(miri) { 3 } else { 150 };
        let all = run(Isa::NONE, 1, 0, m);
        let width = HEADS * 24;
        for &isa in tried(&[Isa::NONE, Isa::detect()]) {
            assert_eq!(run(isa, 3, 0, m), all);
            for position in [0, 15, 16, 63, 64, 149].into_iter().filter(|position| *position < m) {
                let one = run(isa, 1, position, 1);
                assert_eq!(one, all[position * width..(position + 1) * width], "at {position}");
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many positions for it")]
    fn blocks_of_any_size_in_any_order_give_the_bits_of_one_that_holds_all() {
        KvFormat::ALL.into_iter().for_each(any_size_any_order);
    }

    fn any_size_any_order(format: KvFormat) {
        let isa = Isa::detect();
        let whole = if format == KvFormat::I4 { 64 } else { 256 };
        let (mut whole, mut table) = (store(format, whole), BlockTable::default());
        append(&mut whole, &mut table, 200);
        let want = run_on(isa, 1, (&whole, &table), 170, 3);
        let blocks = [16, 32, 64, 48, 128, 256];
        for block in &blocks[..if format == KvFormat::I4 { 3 } else { 6 }] {
            let (mut store, mut table) = (store(format, *block), BlockTable::default());
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
    #[cfg_attr(miri, ignore = "too many positions for it")]
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

    /// Rows of a tree: a row of queries for each node, the first at `first`.
    fn look_tree(
        isa: Isa,
        threads: usize,
        (store, table): (&KvStore, &BlockTable),
        rows: Rows<'_>,
        sight: &Sight<'_>,
        q: &[f32],
    ) -> Vec<f32> {
        let (kernels, pool) = (Kernels::new(isa).unwrap(), Pool::new(threads).unwrap());
        let m = q.len() / (HEADS * 24);
        let mut scratch = AttendScratch::new(m, HEADS, SHAPE).unwrap();
        let mut out = vec![0.0; q.len()];
        let keys = Keys { store, table, layer: 0 };
        attend(&kernels, &pool, keys, rows, sight, &mut scratch, (q, &mut out));
        out
    }

    #[test]
    fn a_row_of_a_tree_has_the_bits_of_its_path_in_a_chain() {
        const WIDTH: usize = HEADS * 24;
        // Root 0 with children 1 and 2, a chain 2-3-4-6, and alternatives 5 and 7.
        let parents = [0, 0, 2, 3, 2, 4, 6];
        let row = |node: usize, offset: usize| -> Vec<f32> {
            (0..48).map(|i| noise(offset + node * 48 + i)).collect()
        };
        let firsts: &[usize] = if cfg!(miri) { &[3] } else { &[64, 70, 77, 79, 80, 1019, 1023] };
        let step = if cfg!(miri) { 7 } else { 1 };
        for &format in tried(&KvFormat::ALL) {
            for &first in firsts {
                for &window in tried(&[usize::MAX, 12]) {
                    let sight = Sight { window, ..Sight::causal(0.2) };
                    let (mut store, mut table) = (store(format, 64), BlockTable::default());
                    append(&mut store, &mut table, first);
                    store.reserve(&mut table, 8).unwrap();
                    for node in 0..8 {
                        let (keys, values) = (row(node, 70_000), row(node, 80_000));
                        store.write(&table, 0, first + node, &keys, &values);
                    }
                    let q: Vec<f32> = (0..8 * WIDTH).map(|i| noise(90_000 + i)).collect();
                    let rows = Rows { first, parents: Some(&parents) };
                    let tree = look_tree(Isa::detect(), 2, (&store, &table), rows, &sight, &q);
                    for (node, want) in tree.chunks_exact(WIDTH).enumerate().step_by(step) {
                        let mut path = vec![node];
                        while path[0] > 0 {
                            path.insert(0, parents[path[0] - 1] as usize);
                        }
                        assert_eq!(rows.depth(node) + 1, path.len());
                        // The same tokens, one after the other, in another sequence.
                        let mut alone = store.fork(&mut table).unwrap();
                        store.reserve(&mut alone, path.len()).unwrap();
                        for (depth, node) in path.iter().enumerate() {
                            let (keys, values) = (row(*node, 70_000), row(*node, 80_000));
                            store.write(&alone, 0, first + depth, &keys, &values);
                        }
                        let last = Rows::chain(first + path.len() - 1);
                        let q = &q[node * WIDTH..(node + 1) * WIDTH];
                        let got = look_tree(Isa::NONE, 1, (&store, &alone), last, &sight, q);
                        assert_eq!(got, want, "{format:?}, node {node} behind {first}");
                        store.truncate(&mut alone, 0);
                        // A fork drops a reservation.
                        store.reserve(&mut table, 8).unwrap();
                        for node in 0..8 {
                            let (keys, values) = (row(node, 70_000), row(node, 80_000));
                            store.write(&table, 0, first + node, &keys, &values);
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many positions for it")]
    fn spans_are_joined_alike_by_any_number_of_threads() {
        for format in KvFormat::ALL {
            let (mut store, mut table) = (store(format, 64), BlockTable::default());
            append(&mut store, &mut table, 4200);
            let plain = Sight::causal(0.2);
            let sink_q: Vec<_> = (7_000..7_000 + HEADS * 24).map(noise).collect();
            let windows = [
                plain,
                Sight { window: 1500, ..plain },
                Sight { window: 2000, sinks: 4, sink_q: Some(&sink_q), ..plain },
            ];
            for sight in &windows {
                for first in [1023, 1024, 2100, 4199] {
                    let q: Vec<f32> = (0..HEADS * 24).map(|i| noise(90_000 + i)).collect();
                    let look = |isa, threads, most: usize| {
                        let (kernels, pool) =
                            (Kernels::new(isa).unwrap(), Pool::new(threads).unwrap());
                        let mut scratch = AttendScratch::new(most, HEADS, SHAPE).unwrap();
                        let mut out = vec![0.0; q.len()];
                        let keys = Keys { store: &store, table: &table, layer: 0 };
                        let rows = Rows::chain(first);
                        attend(&kernels, &pool, keys, rows, sight, &mut scratch, (&q, &mut out));
                        out
                    };
                    // One state for all spans, two at a time, and one for each.
                    let want = look(Isa::NONE, 1, 1);
                    for (threads, most) in [(1, 9), (4, 1), (4, 2), (3, 40)] {
                        assert_eq!(look(Isa::detect(), threads, most), want, "{format:?} {first}");
                    }
                }
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many positions for it")]
    fn integers_are_close_to_floats() {
        let look = |format| {
            let (mut store, mut table) = (store(format, 64), BlockTable::default());
            append(&mut store, &mut table, 300);
            run_on(Isa::detect(), 1, (&store, &table), 299, 1)
        };
        let want = look(KvFormat::F32);
        for (format, limit) in [(KvFormat::F16, 1e-4), (KvFormat::I8, 2e-3), (KvFormat::I4, 2e-2)] {
            let far =
                look(format).iter().zip(&want).fold(0.0_f32, |far, (a, b)| far.max((a - b).abs()));
            assert!(far > 0.0 && far < limit, "{format:?}: {far}");
        }
    }
}
