//! Random operations on a cache, against a model in which every sequence owns a plain list of tokens.
//!
//! What is written at a position is a function of the tokens up to it, so every row of every sequence
//! can be checked at any time, whoever computed it. The test takes its choices from random numbers
//! (`NYBL_KV_STEPS` makes it longer, `NYBL_SEED` another one; a failure names the step), the fuzz target
//! `kv_ops` from its input.
#![forbid(unsafe_code)]

use super::attend::{AttendScratch, Keys, attend};
use super::blocks::{BlockTable, NULL_BLOCK};
use super::elements;
use super::hash::mix;
use super::sight::{Rows, Sight};
use super::snapshot::{self, Identity};
use super::store::{KvConfig, KvShape, KvStore};
use crate::error::Error;
use crate::isa::Isa;
use crate::kernel::{Kernels, KvFormat, LANES};
use crate::threads::Pool;

const IDENTITY: Identity = Identity { model: 1, rope_theta: 1e4, rope_dim: 4 };

const SHAPE: KvShape = KvShape { n_layers: 2, n_kv_heads: 2, head_dim: 4 };

/// Most sequences at once.
const MOST: usize = 6;

/// Where choices come from.
trait Choices {
    /// A number below `n`.
    fn below(&mut self, n: usize) -> usize;

    /// Few different tokens, so that prefixes meet.
    fn tokens(&mut self, most: usize) -> Vec<u32> {
        let token = self.below(2) as u32;
        let count = 1 + self.below(most);
        let odd = self.below(4 * count);
        (0..count).map(|i| if i == odd { 9 } else { token }).collect()
    }
}

#[cfg(test)]
struct Random(u64);

#[cfg(test)]
impl Choices for Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(1);
        (mix(super::hash::START, self.0) % n as u64) as usize
    }
}

/// Two bytes a choice; zeros when there are no more.
struct Bytes<'a>(&'a [u8]);

impl Choices for Bytes<'_> {
    fn below(&mut self, n: usize) -> usize {
        let (two, rest) = self.0.split_at_checked(2).unwrap_or((&[0, 0], &[]));
        self.0 = rest;
        usize::from(u16::from_le_bytes([two[0], two[1]])) % n
    }
}

/// Operations as a fuzzer chooses them: the settings of a cache, then one operation after the other until
/// `bytes` end. Panics where an invariant does not hold.
pub fn run(bytes: &[u8]) {
    let mut choices = Bytes(bytes);
    let settings = &SETTINGS[choices.below(SETTINGS.len())];
    let mut world = World::new(settings);
    while !choices.0.is_empty() {
        world.step(&mut choices);
        world.check(&mut choices);
    }
    world.check_all();
}

/// A cache to try: tokens of a block, blocks of memory, format, blocks of a spill file.
struct Settings(usize, usize, KvFormat, usize);

const SETTINGS: [Settings; 9] = [
    Settings(16, 12, KvFormat::F32, 0),
    Settings(16, 40, KvFormat::F32, 0),
    Settings(32, 9, KvFormat::F16, 0),
    Settings(64, 6, KvFormat::I8, 0),
    Settings(16, 30, KvFormat::I4, 0),
    Settings(64, 9, KvFormat::I4, 0),
    Settings(16, 14, KvFormat::F32, 9),
    Settings(16, 20, KvFormat::I4, 16),
    Settings(32, 10, KvFormat::I8, 100),
];

/// The rows that belong to the last of `tokens`.
fn rows(tokens: &[u32], layer: usize) -> (Vec<f32>, Vec<f32>) {
    let hash = tokens.iter().fold(layer as u64, |hash, token| mix(hash, u64::from(*token)));
    let value = |i: u64| (mix(hash, i) >> 44) as f32 / 1e6 - 0.5;
    ((0..8).map(value).collect(), (8..16).map(value).collect())
}

struct Sequence {
    table: BlockTable,
    tokens: Vec<u32>,
}

struct World {
    store: KvStore,
    sequences: Vec<Sequence>,
    spills: bool,
    gained: usize,
    refused: usize,
    came_back: usize,
}

impl World {
    fn new(&Settings(block_tokens, blocks, format, spilled): &Settings) -> Self {
        let budget = blocks * block_tokens * SHAPE.token_bytes(format);
        let config = KvConfig { shape: SHAPE, format, block_tokens, budget, fingerprint: 1 };
        let mut store = KvStore::with(&config).unwrap();
        if spilled > 0 {
            store.spill_to(&std::env::temp_dir(), spilled * 64 * 1024).unwrap();
        }
        let sequences = Vec::new();
        Self { store, sequences, spills: spilled > 0, gained: 0, refused: 0, came_back: 0 }
    }

    /// Writes `tokens` behind what sequence `index` has; `false` when they do not fit.
    fn write(&mut self, index: usize, tokens: &[u32]) -> bool {
        let sequence = &mut self.sequences[index];
        // What a refusal for want of memory may do is to drop cached prefixes, so only the others are
        // compared bit by bit.
        let refused = sequence.table.plan(self.store.pool(), tokens.len()).is_err();
        let state = |store: &KvStore, table: &BlockTable| {
            if refused {
                format!("{} {table:?}", store.pool().state())
            } else {
                format!("{table:?}")
            }
        };
        let before = state(&self.store, &sequence.table);
        let was_out = !self.store.is_loaded(&sequence.table);
        match self.store.reserve(&mut sequence.table, tokens.len()) {
            Ok(()) => self.came_back += usize::from(was_out),
            Err(Error::KvExhausted { .. }) => {
                assert_eq!(before, state(&self.store, &sequence.table));
                self.refused += 1;
                return false;
            }
            Err(error) => panic!("{error}"),
        }
        let first = sequence.table.len();
        let mut all = sequence.tokens[..first].to_vec();
        for (i, token) in tokens.iter().enumerate() {
            all.push(*token);
            for layer in 0..SHAPE.n_layers {
                let (keys, values) = rows(&all, layer);
                self.store.write(&sequence.table, layer, first + i, &keys, &values);
            }
        }
        true
    }

    fn append(&mut self, index: usize, tokens: &[u32]) {
        let sequence = &mut self.sequences[index];
        let mut all = sequence.tokens.clone();
        all.extend_from_slice(tokens);
        self.gained += self.store.reuse(&mut sequence.table, &all);
        let start = sequence.table.len();
        sequence.tokens = all[..start].to_vec();
        if self.write(index, &all[start..]) {
            let sequence = &mut self.sequences[index];
            sequence.table.commit(all.len() - start);
            self.store.publish(&mut sequence.table, &all);
            sequence.tokens = all;
        }
    }

    /// A tree of one right path and wrong siblings, all written, the path kept.
    fn speculate(&mut self, index: usize, right: &[u32], wrong: usize) {
        let first = self.sequences[index].table.len();
        let wrong = if self.store.takes_trees(first) { wrong } else { 0 };
        let mut nodes: Vec<u32> = vec![77; wrong];
        nodes.extend_from_slice(right);
        if !self.write(index, &nodes) {
            return;
        }
        let sequence = &mut self.sequences[index];
        let mut all = sequence.tokens.clone();
        for (i, token) in right.iter().enumerate() {
            all.push(*token);
            for layer in 0..SHAPE.n_layers {
                let (keys, values) = rows(&all, layer);
                let position = first + wrong + i;
                self.store.write(&sequence.table, layer, position, &keys, &values);
            }
        }
        let path: Vec<_> = (wrong..nodes.len()).collect();
        self.store.keep_path(&mut sequence.table, &path).unwrap();
        let len = sequence.table.len();
        self.store.truncate(&mut sequence.table, len);
        sequence.tokens = all;
    }

    /// Out into a file and back as another sequence, or not at all where there is no room.
    fn save_and_restore(&mut self, index: usize) {
        let Sequence { table, tokens } = &self.sequences[index];
        let (mut file, mut copy) = (Vec::new(), BlockTable::default());
        match snapshot::save(&mut self.store, table, tokens, &IDENTITY, (&mut file, "test")) {
            Ok(()) => {}
            Err(Error::KvExhausted { .. }) => {
                self.refused += 1;
                return;
            }
            Err(error) => panic!("{error}"),
        }
        let file = (&mut &file[..] as &mut dyn std::io::Read, "test");
        match snapshot::restore(&mut self.store, &mut copy, &IDENTITY, file) {
            Ok(tokens) => {
                self.store.publish(&mut copy, &tokens);
                self.sequences.push(Sequence { table: copy, tokens });
            }
            Err(Error::KvExhausted { .. }) => self.refused += 1,
            Err(error) => panic!("{error}"),
        }
    }

    /// To any length, where positions from some place before it on are still wanted.
    fn rewind(&mut self, index: usize, choices: &mut impl Choices) {
        let sequence = &mut self.sequences[index];
        let len = choices.below(sequence.tokens.len() + 1);
        let first_seen = choices.below(len + 1);
        let dropped = sequence.table.dropped(self.store.pool());
        self.store.rewind(&mut sequence.table, len, first_seen);
        let got = sequence.table.len();
        let still = sequence.table.dropped(self.store.pool());
        if got == len {
            assert!(still.is_empty() || still.end <= first_seen || still.start >= len);
        } else {
            assert_eq!((got, still), (dropped.start.min(len), 0..0));
        }
        sequence.tokens.truncate(got);
    }

    /// Attention over a sequence equals attention over a cache that holds nothing else.
    fn attend(&mut self, index: usize, choices: &mut impl Choices) {
        let Sequence { table, tokens } = &self.sequences[index];
        if tokens.is_empty() || !table.dropped(self.store.pool()).is_empty() {
            return;
        }
        match self.store.load(table) {
            Ok(()) => {}
            Err(Error::KvExhausted { .. }) => return,
            Err(error) => panic!("{error}"),
        }
        let (format, block_tokens) = (self.store.format(), [16, 32, 64][choices.below(3)]);
        let budget = (tokens.len() + 64) * 4 * SHAPE.token_bytes(KvFormat::F32);
        let config = KvConfig { shape: SHAPE, format, block_tokens, budget, fingerprint: 1 };
        let (mut plain, mut whole) = (KvStore::with(&config).unwrap(), BlockTable::default());
        plain.reserve(&mut whole, tokens.len()).unwrap();
        for position in 0..tokens.len() {
            for layer in 0..SHAPE.n_layers {
                let (keys, values) = rows(&tokens[..=position], layer);
                plain.write(&whole, layer, position, &keys, &values);
            }
        }
        whole.commit(tokens.len());
        let kernels = Kernels::new(Isa::detect()).unwrap();
        let pool = Pool::new(1).unwrap();
        let mut scratch = AttendScratch::new(1, 4, SHAPE).unwrap();
        let q: Vec<f32> = (0..16).map(|i| (i as f32).sin()).collect();
        let (rows, layer) = (Rows::chain(tokens.len() - 1), choices.below(SHAPE.n_layers));
        let sight = Sight { window: 1 + choices.below(100), ..Sight::causal(0.5) };
        let mut look = |store, table| {
            let (keys, mut out) = (Keys { store, table, layer }, vec![0.0; 16]);
            attend(&kernels, &pool, keys, rows, &sight, &mut scratch, (&q, &mut out));
            out
        };
        assert_eq!(look(&self.store, table), look(&plain, &whole));
    }

    fn step(&mut self, choices: &mut impl Choices) {
        let count = self.sequences.len();
        let index = choices.below(count.max(1));
        match choices.below(17) {
            0 if count < MOST => {
                self.sequences.push(Sequence { table: BlockTable::default(), tokens: vec![] });
            }
            _ if count == 0 => {}
            1 if count < MOST => {
                let sequence = &mut self.sequences[index];
                let table = self.store.fork(&mut sequence.table).unwrap();
                let tokens = sequence.tokens.clone();
                self.sequences.push(Sequence { table, tokens });
            }
            2 => {
                let mut gone = self.sequences.swap_remove(index);
                self.store.truncate(&mut gone.table, 0);
            }
            3 | 4 => self.rewind(index, choices),
            5 => {
                let right = choices.tokens(6);
                self.speculate(index, &right, choices.below(4));
            }
            6 => {
                // Rejected drafts: written, never committed, never published.
                self.write(index, &[55; 7]);
                let sequence = &mut self.sequences[index];
                let len = sequence.table.len();
                self.store.truncate(&mut sequence.table, len);
            }
            7 if choices.below(4) == 0 => {
                self.store.trim();
                let stats = self.store.stats();
                assert_eq!(stats.resident + stats.spilled, stats.used);
            }
            8 if count < MOST => self.save_and_restore(index),
            9 if choices.below(4) == 0 => {
                let sequence = &mut self.sequences[index];
                let from = choices.below(sequence.tokens.len() + 1);
                self.store.drop_before(&mut sequence.table, choices.below(20), from);
            }
            10 if choices.below(8) == 0 => self.attend(index, choices),
            11 if choices.below(4) == 0 => {
                // Less for a moment: what nobody holds goes, the rest stays.
                let budget = self.store.stats().budget;
                self.store.set_budget(budget / 2);
                self.store.set_budget(budget);
            }
            _ => {
                let tokens = choices.tokens(60);
                self.append(index, &tokens);
            }
        }
    }

    /// Counts, and that some sequence reads what belongs to its tokens at some places.
    fn check(&self, choices: &mut impl Choices) {
        self.check_counts();
        if let Some(sequence) = self.sequences.get(choices.below(MOST)) {
            for _ in 0..4.min(sequence.tokens.len()) {
                self.check_row(sequence, choices.below(sequence.tokens.len()));
            }
        }
    }

    /// Counts, and that every sequence reads what belongs to its tokens.
    fn check_all(&self) {
        self.check_counts();
        for sequence in &self.sequences {
            assert_eq!(sequence.table.len(), sequence.tokens.len());
            for position in 0..sequence.tokens.len() {
                self.check_row(sequence, position);
            }
        }
    }

    fn check_counts(&self) {
        let tables: Vec<_> = self.sequences.iter().map(|sequence| &sequence.table).collect();
        self.store.pool().check(&tables);
        let stats = self.store.stats();
        assert!(stats.bytes <= stats.budget, "{stats:?}");
        assert!(stats.resident + stats.spilled >= stats.used, "{stats:?}");
        assert!(self.spills || stats.spilled == 0);
    }

    fn check_row(&self, Sequence { table, tokens }: &Sequence, position: usize) {
        let (block, place) = table.locate(self.store.pool(), position);
        // What a window dropped is gone; what is in the file is checked when it comes back.
        if block == NULL_BLOCK || !self.store.is_in_memory(block) {
            return;
        }
        let (format, d) = (self.store.block_format(block), SHAPE.padded_dim());
        let sink = self.store.format() == KvFormat::I4 && position < 64;
        let want = if sink { KvFormat::F16 } else { self.store.format() };
        assert_eq!(format, want, "position {position}");
        let (mut got, mut expected) = (Lane::default(), Lane::default());
        for layer in 0..SHAPE.n_layers {
            let (keys, values) = rows(&tokens[..=position], layer);
            for head in 0..SHAPE.n_kv_heads {
                let (k, v) = self.store.chunk(table, position, layer, head);
                let (got_k, got_v) = got.parts(format);
                elements::move_key(format, d, (k, place % LANES), (got_k, 0));
                elements::move_value(format, d, (v, place % LANES), (got_v, 0));
                let (want_k, want_v) = expected.parts(format);
                elements::write_key(format, want_k, d, 0, &keys[head * 4..head * 4 + 4]);
                elements::write_value(format, want_v, d, 0, &values[head * 4..head * 4 + 4]);
                assert!(got.0[..] == expected.0[..], "position {position} of {tokens:?}");
            }
        }
    }
}

/// One position by itself, in the first lane of chunks that are empty otherwise.
struct Lane(crate::memory::Aligned<u8>);

impl Default for Lane {
    fn default() -> Self {
        Self(crate::memory::Aligned::zeroed("test", 2 * LANES * LANES * 4).unwrap())
    }
}

impl Lane {
    fn parts(&mut self, format: KvFormat) -> (&mut [u8], &mut [u8]) {
        let (k, v) = self.0.split_at_mut(format.key_bytes(LANES));
        (k, &mut v[..format.value_bytes(LANES)])
    }
}

#[cfg(test)]
fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn random_operations_keep_the_invariants() {
    let steps = environment("NYBL_KV_STEPS", if cfg!(miri) { 5 } else { 3000 });
    let seed = environment("NYBL_SEED", 1);
    let (mut gained, mut refused, mut came_back) = (0, 0, 0);
    // Miri has no files.
    for settings in SETTINGS.iter().filter(|settings| settings.3 == 0 || !cfg!(miri)) {
        let mut random = Random(seed << 32);
        let mut world = World::new(settings);
        for step in 0..steps {
            let run = std::panic::AssertUnwindSafe(|| {
                world.step(&mut random);
                world.check(&mut random);
                if step % 64 == 0 {
                    world.check_all();
                }
            });
            if let Err(panic) = std::panic::catch_unwind(run) {
                let Settings(block, blocks, format, spilled) = settings;
                eprintln!(
                    "NYBL_SEED={seed} {blocks} blocks of {block} {format:?}, {spilled} in a file: step {step}"
                );
                std::panic::resume_unwind(panic);
            }
        }
        world.check_all();
        gained += world.gained;
        refused += world.refused;
        came_back += world.came_back;
    }
    // None of what is to be tested may be missing from it: hits, a full pool, blocks from the file.
    let enough = gained as u64 > steps / 4 && refused as u64 > steps / 40;
    let enough = enough && came_back as u64 > steps / 100;
    assert!(cfg!(miri) || enough, "{gained} gained, {refused} refused, {came_back} came back");
}

#[test]
fn choices_from_bytes_are_operations_as_well() {
    let most = if cfg!(miri) { 60 } else { 4000 };
    for seed in 0..SETTINGS.len() as u8 {
        let bytes: Vec<u8> = (0..most).map(|i| (mix(u64::from(seed), i) >> 30) as u8).collect();
        if !cfg!(miri) || SETTINGS[usize::from(seed)].3 == 0 {
            run(&[&[seed, 0], &bytes[..]].concat());
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "too many for it")]
fn a_thousand_forks_cost_what_they_wrote() {
    let mut world = World::new(&Settings(64, 2000, KvFormat::F32, 0));
    world.sequences.push(Sequence { table: BlockTable::default(), tokens: vec![] });
    world.append(0, &[3; 6400]);
    let mut forks: Vec<_> =
        (0..1000).map(|_| world.store.fork(&mut world.sequences[0].table).unwrap()).collect();
    assert_eq!(world.store.stats().used, 100);
    for fork in forks.iter_mut().take(300) {
        world.store.reserve(fork, 1).unwrap();
    }
    assert_eq!(world.store.stats().used, 400);
    for fork in &mut forks {
        world.store.truncate(fork, 0);
    }
    assert_eq!(world.store.stats().used, 100);
}
