//! What the KV cache costs: attention of one decoding step over a long sequence, with its blocks in order
//! and shuffled; a fork; bytes a token.
//!
//! `cargo bench --bench kv`. One layer of 8 KV heads of 64 floats, four query heads on each.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use nybl::isa::Isa;
use nybl::kernel::{Kernels, KvFormat};
use nybl::kv::attend::{AttendScratch, Keys, Rows, Sight, attend};
use nybl::kv::blocks::BlockTable;
use nybl::kv::store::{KvConfig, KvShape, KvStore};
use nybl::threads::Pool;

const SHAPE: KvShape = KvShape { n_layers: 1, n_kv_heads: 8, head_dim: 64 };
const HEADS: usize = 32;

fn main() {
    for format in KvFormat::ALL {
        println!("{format:?}: {} bytes a token and layer", SHAPE.token_bytes(format));
    }
    divan::main();
}

/// A sequence of `tokens`, its blocks in order of memory or in no order.
fn sequence(
    tokens: usize,
    block_tokens: usize,
    format: KvFormat,
    shuffled: bool,
) -> (KvStore, BlockTable) {
    let budget = tokens * SHAPE.token_bytes(format);
    let config = KvConfig { shape: SHAPE, format, block_tokens, budget, fingerprint: 0 };
    let mut store = KvStore::with(&config).unwrap();
    if shuffled {
        // Blocks are taken again in the order in which they were given back last.
        let mut single: Vec<BlockTable> =
            (0..tokens / block_tokens).map(|_| BlockTable::default()).collect();
        for table in &mut single {
            store.reserve(table, block_tokens).unwrap();
        }
        let mut place = 1;
        while !single.is_empty() {
            place = place * 7919 % 1_000_003;
            let mut table = single.swap_remove(place % single.len());
            store.truncate(&mut table, 0);
        }
    }
    let mut table = BlockTable::default();
    store.reserve(&mut table, tokens).unwrap();
    let row: Vec<f32> = (0..512).map(|i| (i as f32 * 0.37).sin()).collect();
    for position in 0..tokens {
        store.write(&table, 0, position, &row, &row);
    }
    table.commit(tokens);
    (store, table)
}

fn decode(bencher: Bencher, format: KvFormat, tokens: usize, block: usize, shuffled: bool) {
    let (store, table) = sequence(tokens, block, format, shuffled);
    let kernels = Kernels::new(Isa::detect()).unwrap();
    let pool = Pool::new(1).unwrap();
    let mut scratch = AttendScratch::new(1, HEADS, SHAPE).unwrap();
    let q: Vec<f32> = (0..HEADS * 64).map(|i| (i as f32 * 0.11).cos()).collect();
    let mut out = vec![0.0; q.len()];
    bencher.counter(BytesCount::new(tokens * SHAPE.token_bytes(format))).bench_local(|| {
        let keys = Keys { store: &store, table: &table, layer: 0 };
        let rows = (black_box(&q[..]), &mut out[..]);
        attend(
            &kernels,
            &pool,
            keys,
            Rows::chain(tokens - 1),
            &Sight::causal(0.125),
            &mut scratch,
            rows,
        );
    });
}

/// Blocks of 64 tokens and of all other sizes that pay, in order and shuffled.
const PLACES: [(usize, bool); 4] = [(64, false), (64, true), (16, true), (256, true)];

#[divan::bench(args = PLACES, consts = [4096, 16384], max_time = 0.5)]
fn decode_f32<const TOKENS: usize>(bencher: Bencher, (block, shuffled): (usize, bool)) {
    decode(bencher, KvFormat::F32, TOKENS, block, shuffled);
}

#[divan::bench(args = PLACES, consts = [4096, 16384], max_time = 0.5)]
fn decode_f16<const TOKENS: usize>(bencher: Bencher, (block, shuffled): (usize, bool)) {
    decode(bencher, KvFormat::F16, TOKENS, block, shuffled);
}

/// A fork of 16k tokens, and its end.
#[divan::bench(max_time = 0.2)]
fn fork_16k(bencher: Bencher) {
    let (mut store, mut table) = sequence(16384, 64, KvFormat::F16, false);
    bencher.bench_local(|| {
        let mut fork = store.fork(&mut table).unwrap();
        store.truncate(&mut fork, 0);
    });
}
