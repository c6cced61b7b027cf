//! Random operations on a cache, against a model in which every sequence owns a plain list of tokens.
//!
//! What is written at a position is a function of the tokens up to it, so every row of every sequence
//! can be checked at any time, whoever computed it. `NYBL_KV_STEPS` makes it longer, `NYBL_SEED`
//! another one; a failure names the step.
#![forbid(unsafe_code)]

use super::blocks::BlockTable;
use super::hash::{START, mix};
use super::snapshot::{self, Identity};
use super::store::{KvConfig, KvShape, KvStore};
use crate::error::Error;
use crate::kernel::{KvFormat, LANES};

const IDENTITY: Identity = Identity { model: 1, rope_theta: 1e4, rope_dim: 4 };

const SHAPE: KvShape = KvShape { n_layers: 2, n_kv_heads: 2, head_dim: 4 };

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(1);
        (mix(START, self.0) % n as u64) as usize
    }

    /// Few different tokens, so that prefixes meet.
    fn tokens(&mut self, most: usize) -> Vec<u32> {
        let token = self.below(2) as u32;
        let count = 1 + self.below(most);
        (0..count).map(|_| if self.below(40) == 0 { 9 } else { token }).collect()
    }
}

/// The rows that belong to the last of `tokens`.
fn rows(tokens: &[u32], layer: usize) -> (Vec<f32>, Vec<f32>) {
    let hash = tokens.iter().fold(layer as u64, |hash, token| mix(hash, u64::from(*token)));
    let value = |i: u64| (mix(hash, i) >> 44) as f32;
    ((0..8).map(value).collect(), (8..16).map(value).collect())
}

struct Sequence {
    table: BlockTable,
    tokens: Vec<u32>,
}

struct World {
    store: KvStore,
    sequences: Vec<Sequence>,
    gained: usize,
    refused: usize,
}

impl World {
    fn new(block_tokens: usize, blocks: usize) -> Self {
        let format = KvFormat::F32;
        let budget = blocks * block_tokens * SHAPE.token_bytes(format);
        let config = KvConfig { shape: SHAPE, format, block_tokens, budget, fingerprint: 1 };
        let store = KvStore::with(&config).unwrap();
        Self { store, sequences: Vec::new(), gained: 0, refused: 0 }
    }

    /// Writes `tokens` behind what sequence `index` has; `false` when they do not fit.
    fn write(&mut self, index: usize, tokens: &[u32]) -> bool {
        let sequence = &mut self.sequences[index];
        let before = self.store.pool().state();
        let held = format!("{:?}", sequence.table);
        match self.store.reserve(&mut sequence.table, tokens.len()) {
            Ok(()) => {}
            Err(Error::KvExhausted { .. }) => {
                assert_eq!(before, self.store.pool().state());
                assert_eq!(held, format!("{:?}", sequence.table));
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
        self.store.keep_path(&mut sequence.table, &path);
        let len = sequence.table.len();
        self.store.truncate(&mut sequence.table, len);
        sequence.tokens = all;
    }

    /// Out into a file and back as another sequence, or not at all where there is no room.
    fn save_and_restore(&mut self, index: usize) {
        let Sequence { table, tokens } = &self.sequences[index];
        let (mut file, mut copy) = (Vec::new(), BlockTable::default());
        snapshot::save(&self.store, table, tokens, &IDENTITY, (&mut file, "test")).unwrap();
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

    fn step(&mut self, rng: &mut Rng) {
        let count = self.sequences.len();
        let index = rng.below(count.max(1));
        match rng.below(13) {
            0 if count < 6 => {
                self.sequences.push(Sequence { table: BlockTable::default(), tokens: vec![] });
            }
            _ if count == 0 => {}
            1 if count < 6 => {
                let sequence = &mut self.sequences[index];
                let table = self.store.fork(&mut sequence.table).unwrap();
                let tokens = sequence.tokens.clone();
                self.sequences.push(Sequence { table, tokens });
            }
            2 => {
                let mut gone = self.sequences.swap_remove(index);
                self.store.truncate(&mut gone.table, 0);
            }
            3 | 4 => {
                let sequence = &mut self.sequences[index];
                let len = rng.below(sequence.tokens.len() + 1);
                self.store.truncate(&mut sequence.table, len);
                sequence.tokens.truncate(len);
            }
            5 => self.speculate(index, &rng.tokens(6), rng.below(4)),
            6 => {
                // Rejected drafts: written, never committed, never published.
                self.write(index, &[55; 7]);
                let sequence = &mut self.sequences[index];
                let len = sequence.table.len();
                self.store.truncate(&mut sequence.table, len);
            }
            7 if rng.below(4) == 0 => {
                self.store.trim();
                let stats = self.store.stats();
                assert_eq!(stats.resident, stats.used);
            }
            8 if count < 6 => self.save_and_restore(index),
            _ => self.append(index, &rng.tokens(60)),
        }
    }

    /// Counts, and that every sequence reads what belongs to its tokens.
    fn check(&self) {
        let tables: Vec<_> = self.sequences.iter().map(|sequence| &sequence.table).collect();
        self.store.pool().check(&tables);
        let stats = self.store.stats();
        assert!(self.store.bytes() <= stats.limit * stats.block_bytes);
        for Sequence { table, tokens } in &self.sequences {
            assert_eq!(table.len(), tokens.len());
            for position in 0..tokens.len() {
                for layer in 0..SHAPE.n_layers {
                    let want = rows(&tokens[..=position], layer);
                    let (block, place) = table.locate(self.store.pool(), position);
                    for head in 0..SHAPE.n_kv_heads {
                        let (keys, values) = self.store.block(block, layer, head);
                        let keys: &[f32] = bytemuck::cast_slice(keys);
                        let values: &[f32] = bytemuck::cast_slice(values);
                        for i in 0..4 {
                            let at = place / LANES * LANES * 16 + i * LANES + place % LANES;
                            let got = (keys[at], values[place * 16 + i]);
                            let want = (want.0[head * 4 + i], want.1[head * 4 + i]);
                            assert_eq!(got, want, "position {position}");
                        }
                    }
                }
            }
        }
    }
}

fn environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn random_operations_keep_the_invariants() {
    let steps = environment("NYBL_KV_STEPS", if cfg!(miri) { 20 } else { 400 });
    let seed = environment("NYBL_SEED", 1);
    let (mut gained, mut refused) = (0, 0);
    for (block_tokens, blocks) in [(16, 12), (16, 40), (32, 9), (64, 6)] {
        let mut rng = Rng(seed << 32);
        let mut world = World::new(block_tokens, blocks);
        for step in 0..steps {
            let at = format!("NYBL_SEED={seed} blocks of {block_tokens}, step {step}");
            let run = std::panic::AssertUnwindSafe(|| {
                world.step(&mut rng);
                world.check();
            });
            if let Err(panic) = std::panic::catch_unwind(run) {
                eprintln!("{at}");
                std::panic::resume_unwind(panic);
            }
        }
        gained += world.gained;
        refused += world.refused;
    }
    // Neither hits nor a full pool may be missing from what was tested.
    let enough = gained as u64 > steps / 4 && refused as u64 > steps / 40;
    assert!(cfg!(miri) || enough, "{gained} gained, {refused} refused");
}

#[test]
fn a_thousand_forks_cost_what_they_wrote() {
    let mut world = World::new(64, 2000);
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
