//! What the KV cache costs: attention of one decoding step over long sequences, with blocks in order of
//! memory and in none, against what the memory can be read with in the same run; forks; waste.
//!
//! `cargo bench --bench kv`. Layers of 8 KV heads of 64 floats, four query heads on each; as many layers as
//! make 131072 tokens together, so that no cache of the CPU holds them. Medians of interleaved rounds.

use nybl::isa::Isa;
use nybl::kernel::limits::read_seconds;
use nybl::kernel::{Kernels, KvFormat};
use nybl::kv::attend::{AttendScratch, Keys, attend};
use nybl::kv::blocks::BlockTable;
use nybl::kv::sight::{Rows, Sight};
use nybl::kv::store::{KvConfig, KvShape, KvStore};
use nybl::threads::Pool;
use std::hint::black_box;
use std::time::{Duration, Instant};

const HEADS: usize = 32;

/// Tokens of all layers together.
const TOKENS: usize = 131_072;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    // Once over something small, to see that it works.
    let test = arguments.iter().any(|argument| argument == "--test");
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let isa = Isa::from_environment().unwrap();
    println!("{isa}, {threads} threads; {} query heads on 8 KV heads of 64, blocks of 64", HEADS);
    for format in KvFormat::ALL {
        println!("{}: {} bytes a token and layer", format.name(), shape(1).token_bytes(format));
    }
    println!(
        "\n{:>6} {:>7} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "format", "tokens", "threads", "in order", "shuffled", "shuffled", "read", "of read"
    );
    println!(
        "{:>6} {:>7} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "", "", "", "us/layer", "us/layer", "/in order", "GB/s", "bandwidth"
    );
    let sizes: &[usize] = if test { &[256] } else { &[4096, 16_384, 32_768] };
    // Names of formats and numbers of tokens leave out all others.
    let chosen = |name: &str| {
        let number = |text: &str| text.parse::<usize>().is_ok();
        let mut alike = arguments.iter().filter(|x| !x.starts_with("--"));
        let alike: Vec<_> = alike.by_ref().filter(|x| number(x) == number(name)).collect();
        alike.is_empty() || alike.iter().any(|x| *x == name)
    };
    for tokens in sizes.iter().filter(|tokens| test || chosen(&tokens.to_string())) {
        let layers = if test { 2 } else { TOKENS / tokens };
        for format in KvFormat::ALL.into_iter().filter(|format| chosen(format.name())) {
            let mut counts = vec![1, threads];
            counts.dedup();
            for threads in counts {
                decode(isa, format, *tokens, layers, threads, if test { 1 } else { 9 });
            }
        }
    }
    forks(if test { 256 } else { 16_384 });
    waste();
}

fn shape(n_layers: usize) -> KvShape {
    KvShape { n_layers, n_kv_heads: 8, head_dim: 64 }
}

/// A sequence of `tokens`, its blocks in order of memory or in no order.
fn sequence(
    tokens: usize,
    layers: usize,
    format: KvFormat,
    shuffled: bool,
) -> (KvStore, BlockTable) {
    let (shape, block_tokens) = (shape(layers), 64);
    // The start of a sequence may be f16, and before it is shuffled every block is one.
    let budget = (tokens + 1024) * shape.token_bytes(KvFormat::F32);
    let config = KvConfig { shape, format, block_tokens, budget, fingerprint: 0 };
    let mut store = KvStore::with(&config).unwrap();
    if shuffled {
        // Blocks are taken again in the order in which they were given back last.
        let blocks = tokens / block_tokens;
        let mut single: Vec<BlockTable> = (0..blocks).map(|_| BlockTable::default()).collect();
        for table in &mut single {
            store.reserve(table, 1).unwrap();
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
        for layer in 0..layers {
            store.write(&table, layer, position, &row, &row);
        }
    }
    table.commit(tokens);
    (store, table)
}

fn decode(isa: Isa, format: KvFormat, tokens: usize, layers: usize, threads: usize, rounds: usize) {
    let caches = [false, true].map(|shuffled| sequence(tokens, layers, format, shuffled));
    let (kernels, pool) = (Kernels::new(isa).unwrap(), Pool::new(threads).unwrap());
    let mut scratch = AttendScratch::new(8, HEADS, shape(layers)).unwrap();
    let q: Vec<f32> = (0..HEADS * 64).map(|i| (i as f32 * 0.11).cos()).collect();
    let mut out = vec![0.0; q.len()];
    let bytes = tokens * shape(layers).token_bytes(format);
    // Read as often as the keys and values, and in as many bytes.
    let plain = vec![1_u8; bytes];
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        for ((store, table), times) in caches.iter().zip(&mut times) {
            times.push(time(|| {
                for layer in 0..layers {
                    let keys = Keys { store, table, layer };
                    let (rows, sight) = (Rows::chain(tokens - 1), Sight::causal(0.125));
                    let ends = (black_box(&q[..]), &mut out[..]);
                    attend(&kernels, &pool, keys, rows, &sight, &mut scratch, ends);
                }
            }));
        }
        times[2].push(Duration::from_secs_f64(read_seconds(&pool, &[&plain])));
    }
    let [ordered, shuffled, read] = times.map(median);
    println!(
        "{:>6} {tokens:>7} {threads:>7} {:>9.1} {:>9.1} {:>9.3} {:>9.2} {:>8.0}%",
        format.name(),
        ordered * 1e6 / layers as f64,
        shuffled * 1e6 / layers as f64,
        shuffled / ordered,
        bytes as f64 / read / 1e9,
        100.0 * read / ordered,
    );
}

fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// In seconds.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

/// A fork of a long sequence, and its end.
fn forks(tokens: usize) {
    let (mut store, mut table) = sequence(tokens, 1, KvFormat::F16, false);
    let mut times = [const { Vec::new() }; 2];
    for _ in 0..200 {
        let start = Instant::now();
        let mut fork = store.fork(&mut table).unwrap();
        times[0].push(start.elapsed());
        times[1].push(time(|| store.truncate(&mut fork, 0)));
    }
    let [fork, end] = times.map(median);
    println!("\na fork of {tokens} tokens: {:.2} us, its end {:.2} us", fork * 1e6, end * 1e6);
}

/// What half-empty blocks cost sequences of about 2k tokens.
fn waste() {
    let shares = (2017..=2080).map(|tokens: usize| {
        let shape = KvShape { n_layers: 1, n_kv_heads: 1, head_dim: 16 };
        let (mut store, mut table) = (KvStore::new(shape, 4096), BlockTable::default());
        store.reserve(&mut table, tokens).unwrap();
        let used = tokens * shape.token_bytes(KvFormat::F32);
        (store.bytes() - used) as f64 / store.bytes() as f64
    });
    let shares: Vec<f64> = shares.collect();
    let mean = shares.iter().sum::<f64>() / shares.len() as f64;
    println!("2017 to 2080 tokens in blocks of 64: {:.2}% of the memory is not used", 100.0 * mean);
}
