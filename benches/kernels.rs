//! Every row of the kernel table that this CPU can run, and how far each is from the machine's limits.
//!
//! The benchmarks proper are divan's: `cargo bench --bench kernels -- q4` filters by name, and
//! `-- --test` runs each once. Each result is compared with the scalar row first: a fast wrong answer
//! is worth nothing. After them comes a table of medians in the units that decide: weight bytes a second
//! against what a plain read of as many bytes gave in the same run (few rows of activations are bound by
//! memory), and multiply-adds a cycle (many rows are bound by the core). `cold` cycles through so many
//! copies of a matrix that no cache holds them.
//!
//! A figure from here means little without the machine, its load and the compiler beside it.

mod yardsticks;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use half::f16;
use nybl::isa::Isa;
use nybl::kernel::limits::{core_clock, read_seconds};
use nybl::kernel::{
    Activations, AttendStep, Epilogue, Format, Input, Kernels, KvFormat, LANES, Layout, MatmulJob,
    Op, Packed, QueryCodes, ROWS, Row, Run, abi::EpilogueArgs, abi::MatmulArgs, quantize_query,
};
use nybl::memory::Aligned;
use nybl::threads::Pool;
use std::fmt;
use std::hint::black_box;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn main() {
    divan::main();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.iter().any(|x| matches!(x.as_str(), "--test" | "--list")) {
        let filters = arguments.into_iter().filter(|x| !x.starts_with("--")).collect::<Vec<_>>();
        report(&filters);
        yardsticks::report(&filters);
    }
}

/// More than the last-level cache of any machine this is likely to run on.
const COLD_BYTES: usize = 512 << 20;

const ROWS_OF_X: [usize; 5] = [1, 2, 4, 8, 64];

/// One matmul to measure.
#[derive(Clone, Copy)]
struct Case {
    row: &'static Row,
    layout: Layout,
    m: usize,
    cold: bool,
    threads: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, k) = (self.layout.n(), self.layout.k());
        write!(f, "{} g{} {n}x{k}", self.row.name, self.layout.group())?;
        write!(f, "{} m{} t{}", if self.cold { " cold" } else { "" }, self.m, self.threads)
    }
}

fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(256)
}

fn available() -> impl Iterator<Item = &'static Row> {
    let have = Isa::from_environment().unwrap_or_else(|error| panic!("NYBL_ISA: {error}"));
    ROWS.iter().filter(move |row| have.has(row.needs))
}

/// The cases over matrices of these shapes; `true` marks a cold one.
fn cases(shapes: &[(usize, usize, bool)]) -> Vec<Case> {
    const FORMATS: [(Format, usize); 6] = [
        (Format::Q4, 32),
        (Format::Q4, 128),
        (Format::Q3, 128),
        (Format::Q2, 128),
        (Format::Q8, 32),
        (Format::F16, 1),
    ];
    let threads = if all_threads() > 1 { vec![1, all_threads()] } else { vec![1] };
    let mut cases = Vec::new();
    for (format, group) in FORMATS {
        for (i, &(n, k, cold)) in shapes.iter().enumerate() {
            let layout = Layout::new(format, group, n, k).expect("a valid shape");
            for row in available().filter(|row| row.op == Op::Matmul(format)) {
                // The naive rows are here for scale and correctness, not to wait for.
                let most_m = match row.needs {
                    Isa::NONE if i == 0 => 1,
                    Isa::PORTABLE if i == 0 => 8,
                    Isa::NONE | Isa::PORTABLE => 0,
                    _ => 64,
                };
                for m in ROWS_OF_X.into_iter().filter(|m| *m <= most_m) {
                    let of = |threads| Case { row, layout, m, cold, threads };
                    cases.extend(threads.iter().map(|threads| of(*threads)));
                }
            }
        }
    }
    cases
}

/// Everything a case needs, ready to run.
struct Ready {
    case: Case,
    kernels: Kernels,
    pool: Pool,
    weights: Matrices,
    x: Activations,
    floats: Vec<f32>,
    y: Vec<f32>,
    turn: usize,
}

/// A repeatable sequence of bits (xorshift, Marsaglia 2003).
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A matrix of random codes and small scales.
fn weights(layout: &Layout) -> Aligned<u8> {
    let small = |i: usize| f16::from_f32(i as f32 / 8192.0 - 0.05).to_le_bytes();
    let small: [[u8; 2]; 1024] = std::array::from_fn(small);
    let mut bytes = Aligned::<u8>::zeroed("benchmark weights", layout.bytes()).expect("memory");
    let mut state = 0x2545_f491_4f6c_dd1d;
    for group in bytes.chunks_exact_mut(layout.group_bytes()) {
        let codes = if layout.format().is_quantised() { layout.code_bytes() } else { 0 };
        let (codes, words) = group.split_at_mut(codes);
        codes.chunks_mut(8).for_each(|x| x.copy_from_slice(&random(&mut state).to_le_bytes()));
        words
            .chunks_mut(2)
            .for_each(|x| x.copy_from_slice(&small[random(&mut state) as usize % 1024]));
    }
    bytes
}

/// Matrices made once and used by many cases; of the cold ones only the latest is kept.
type Matrices = Arc<Vec<Aligned<u8>>>;
static MATRICES: Mutex<Vec<(Layout, bool, Matrices)>> = Mutex::new(Vec::new());

fn matrices(layout: Layout, cold: bool) -> Matrices {
    let mut known = MATRICES.lock().expect("no benchmark panicked");
    if let Some((.., found)) = known.iter().find(|known| (known.0, known.1) == (layout, cold)) {
        return Arc::clone(found);
    }
    known.retain(|known| !(cold && known.1));
    let copies = if cold { COLD_BYTES.div_ceil(layout.bytes()) } else { 1 };
    let made = Arc::new((0..copies).map(|_| weights(&layout)).collect::<Vec<_>>());
    known.push((layout, cold, Arc::clone(&made)));
    made
}

impl Ready {
    fn new(case: Case) -> Self {
        let (layout, m) = (case.layout, case.m);
        let kernels = Kernels::new(case.row.needs).expect("the row is available");
        assert_eq!(kernels.matmul_row(layout.format()).name, case.row.name, "another row");
        let pool = Pool::new(case.threads).expect("a thread count in range");
        let mut state = 0xd1b5_4a32_d192_ed03;
        let floats = (0..m * layout.k()).map(|_| (random(&mut state) % 2001) as f32 * 1e-3 - 1.0);
        let floats: Vec<f32> = floats.collect();
        let mut x = Activations::new(m, layout.k()).expect("memory");
        if layout.format().is_quantised() {
            kernels.quantize(&pool, &floats, layout.k(), layout.group(), &mut x);
        }
        let weights = matrices(layout, case.cold);
        let y = vec![0.0; m * layout.n()];
        let mut ready = Self { case, kernels, pool, weights, x, floats, y, turn: 0 };
        ready.run();
        ready.verify();
        ready
    }

    fn run(&mut self) {
        let layout = self.case.layout;
        let w = Packed::new(layout, &self.weights[self.turn]).expect("bytes of this layout");
        self.turn = (self.turn + 1) % self.weights.len();
        let x = if layout.format().is_quantised() {
            Input::Quantised(&self.x)
        } else {
            Input::Float(&self.floats)
        };
        self.kernels.matmul(
            &self.pool,
            &mut [MatmulJob { w, x, y: &mut self.y, epilogue: Epilogue::NONE }],
        );
        black_box(&mut self.y);
    }

    /// Compares the first and the last panel with the scalar row.
    fn verify(&self) {
        let layout = self.case.layout;
        let oracle = ROWS.iter().find(|row| row.op == self.case.row.op).map(|row| row.run);
        let Some(Run::Matmul(oracle)) = oracle else { unreachable!("every format has a row") };
        for panel in [0, layout.panels() - 1] {
            let first = panel * layout.panel_rows();
            let n = layout.panel_rows().min(layout.n() - first);
            let mut want = vec![0.0_f32; self.case.m * n];
            let args = MatmulArgs { n, ..self.args(panel, 1, want.as_mut_ptr(), n) };
            // SAFETY: one whole panel, the activations of `m` rows, and `m` rows of outputs.
            unsafe { oracle(&raw const args) };
            let got = self.y.chunks_exact(layout.n()).flat_map(|y| &y[first..][..n]);
            let same = got.zip(&want).all(|(got, want)| got.to_bits() == want.to_bits());
            assert!(same, "{}: panel {panel} is not what the scalar row gives", self.case);
        }
    }

    /// A block for `panels` panels from `panel`.
    fn args(&self, panel: usize, panels: usize, y: *mut f32, y_stride: usize) -> MatmulArgs {
        let layout = self.case.layout;
        let quantised = layout.format().is_quantised();
        let x =
            if quantised { self.x.codes().as_ptr().cast() } else { self.floats.as_ptr().cast() };
        MatmulArgs {
            w: self.weights[0][panel * layout.panel_bytes()..].as_ptr(),
            panel_bytes: layout.panel_bytes(),
            panels,
            groups: layout.groups(),
            group: layout.group(),
            offset: layout.format().offset() as u32,
            x,
            x_stride: layout.padded_k(),
            x_scales: self.x.scales().as_ptr(),
            x_sums: self.x.sums().as_ptr(),
            m: self.case.m,
            y,
            y_stride,
            n: (panels * layout.panel_rows()).min(layout.n()),
        }
    }

    fn macs(&self) -> usize {
        self.case.m * self.case.layout.n() * self.case.layout.k()
    }
}

fn benched() -> Vec<Case> {
    // As a test only the answer counts.
    let is_test = std::env::args().any(|x| x == "--test");
    cases(if is_test { &[(320, 256, false)] } else { &[(2048, 2048, false), (8192, 2048, false)] })
}

#[divan::bench(args = benched(), max_time = 0.1, sample_size = 1)]
fn matmul(bencher: Bencher, case: &Case) {
    let mut ready = Ready::new(*case);
    bencher
        .counter(BytesCount::new(case.layout.bytes()))
        .counter(ItemsCount::new(ready.macs()))
        .bench_local(|| ready.run());
}

/// One element-wise or reducing operation under one row.
#[derive(Clone, Copy)]
struct Other(&'static Row);

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name)
    }
}

fn others() -> impl Iterator<Item = Other> {
    available().filter(|row| !matches!(row.op, Op::Matmul(_))).map(Other)
}

/// A buffer that every iteration starts from.
fn wave(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.07).collect()
}

/// One call of `row` at the sizes of a small model, and the floats it reads.
fn other(row: &'static Row) -> (usize, Box<dyn FnMut()>) {
    const D: usize = 2048;
    let kernels = Kernels::new(row.needs).expect("the row is available");
    let pool = Pool::new(1).expect("one thread");
    match row.op {
        Op::Quantize => {
            let (x, mut q) = (wave(D), Activations::new(1, D).expect("memory"));
            (D, Box::new(move || kernels.quantize(&pool, black_box(&x), D, 32, &mut q)))
        }
        Op::RmsNorm => {
            let (x, weight, mut y) = (wave(D), wave(D), vec![0.0; D]);
            (D, Box::new(move || kernels.rmsnorm(&pool, black_box(&x), &weight, 1e-5, &mut y)))
        }
        Op::SwiGlu => {
            // Written anew each time, or it would settle at denormal numbers.
            let (start, mut gate, up) = (wave(D), wave(D), wave(D));
            let work = move || {
                gate.copy_from_slice(&start);
                kernels.swiglu(&pool, black_box(&mut gate), &up);
            };
            (D, Box::new(work))
        }
        Op::GeGlu => {
            let (start, mut gate, up) = (wave(D), wave(D), wave(D));
            let work = move || {
                gate.copy_from_slice(&start);
                kernels.geglu(&pool, black_box(&mut gate), &up);
            };
            (D, Box::new(work))
        }
        Op::SoftCap => {
            let mut x = wave(D);
            (D, Box::new(move || kernels.softcap(&pool, black_box(&mut x), 30.0)))
        }
        Op::Softmax => {
            let mut x = wave(D);
            (D, Box::new(move || kernels.softmax(black_box(&mut x))))
        }
        Op::Attend(format) => {
            const HEAD: usize = 64;
            const BLOCK: usize = 64;
            let q = wave(4 * HEAD);
            let floats = wave(BLOCK * HEAD);
            let halves: Vec<_> = floats.iter().map(|x| f16::from_f32(*x)).collect();
            let mut block = Aligned::<u8>::zeroed("a KV block", BLOCK * (HEAD + 4) * 4).unwrap();
            match format {
                KvFormat::F32 => {
                    block[..BLOCK * HEAD * 4].copy_from_slice(bytemuck::cast_slice(&floats))
                }
                KvFormat::F16 => {
                    block[..BLOCK * HEAD * 2].copy_from_slice(bytemuck::cast_slice(&halves))
                }
                // Any bytes do, with scales that are numbers.
                KvFormat::I8 | KvFormat::I4 => block.fill(0x3c),
            }
            let mut codes = vec![0; 4 * 4 * HEAD];
            let rows = q.chunks(HEAD).zip(codes.chunks_mut(4 * HEAD));
            let (scales, sums): (Vec<_>, Vec<_>) =
                rows.map(|(q, codes)| quantize_query(q, codes)).unzip();
            let mut state = (vec![f32::NEG_INFINITY; 4], vec![0.0; 4 * LANES], vec![0.0; 4 * HEAD]);
            let work = move || {
                kernels.attend(&mut AttendStep {
                    q: black_box(&q),
                    codes: QueryCodes { codes: &codes, scales: &scales, sums: &sums },
                    d: HEAD,
                    format,
                    k: &block,
                    v: &block,
                    next: None,
                    visible: &[BLOCK as u32; 4],
                    from: &[0; 4],
                    scale: 0.125,
                    softcap: 0.0,
                    max: &mut state.0,
                    sum: &mut state.1,
                    acc: &mut state.2,
                });
            };
            (2 * BLOCK * HEAD, Box::new(work))
        }
        Op::Epilogue => {
            let Run::Epilogue(run) = row.run else { unreachable!("a row runs its own operation") };
            let (mut y, bias, mut halves) = (wave(D), wave(D), vec![0_u16; D]);
            let work = move || {
                let args = EpilogueArgs {
                    y: black_box(&mut y).as_mut_ptr(),
                    y_stride: D,
                    m: 1,
                    n: D,
                    bias: bias.as_ptr(),
                    low: -1e9,
                    high: 1e9,
                    halves: halves.as_mut_ptr(),
                    halves_stride: D,
                };
                // SAFETY: every buffer has `D` elements, and the CPU can run the row.
                unsafe { run(&raw const args) };
            };
            (D, Box::new(work))
        }
        Op::Matmul(_) => unreachable!("has benchmarks of its own"),
    }
}

#[divan::bench(args = others(), max_time = 0.1)]
fn operation(bencher: Bencher, Other(row): &Other) {
    let (floats, work) = other(row);
    bencher.counter(ItemsCount::new(floats)).bench_local(work);
}

// --- The table --------------------------------------------------------------------------------

/// Median time of a call.
fn median(mut work: impl FnMut()) -> Duration {
    work();
    let once = Instant::now();
    work();
    // Batches that are long against the clock's resolution.
    let once = once.elapsed().as_nanos().max(20);
    let batch = (100_000 / once).max(1) as u32;
    let start = Instant::now();
    let mut samples = Vec::new();
    while samples.len() < 5 || (start.elapsed() < Duration::from_millis(60) && samples.len() < 500)
    {
        let start = Instant::now();
        (0..batch).for_each(|_| work());
        samples.push(start.elapsed() / batch);
    }
    samples.sort_unstable();
    samples[samples.len() / 2]
}

/// Bytes a second that reading `bytes` again and again gives.
fn read_bandwidth(bytes: usize, pool: &Pool) -> f64 {
    // Written, or all pages would be the same page of zeros.
    let buffer = vec![1_u8; bytes];
    let time = median(|| {
        black_box(read_seconds(pool, &[&buffer]));
    });
    bytes as f64 / time.as_secs_f64()
}

fn report(filters: &[String]) {
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|x| name.contains(x));
    // Inside the first cache, the second, the third or beyond, and beyond for certain.
    let shapes = &[
        (2048, 2048, false),
        (64, 512, false),
        (512, 1024, false),
        (8192, 2048, false),
        (8192, 2048, true),
    ];
    let clock = core_clock();
    println!("\nCore clock under load: {:.2} GHz", clock * 1e-9);
    println!(
        "{:<44} {:>10} {:>8} {:>10} {:>8} {:>8} {:>8}",
        "matmul", "us", "GB/s", "read GB/s", "of read", "MAC/cyc", "T/T(1)"
    );
    let mut bandwidths: Vec<((usize, usize), f64)> = Vec::new();
    let mut first = Vec::new();
    for case in cases(shapes).into_iter().filter(|case| wanted(&format!("matmul {case}"))) {
        let bytes = if case.cold { COLD_BYTES } else { case.layout.bytes() };
        let key = (bytes, case.threads);
        let known = bandwidths.iter().find(|(other, _)| *other == key).map(|(_, rate)| *rate);
        let read = known.unwrap_or_else(|| {
            let rate = read_bandwidth(bytes, &Pool::new(case.threads).expect("threads"));
            bandwidths.push((key, rate));
            rate
        });
        let mut ready = Ready::new(case);
        let seconds = median(|| ready.run()).as_secs_f64();
        let rate = case.layout.bytes() as f64 / seconds;
        let per_cycle = ready.macs() as f64 / (seconds * clock * case.threads as f64);
        let key = (case.row.name, case.layout, case.cold, case.threads);
        if case.m == 1 {
            first.push((key, seconds));
        }
        let one = first.iter().find(|(other, _)| *other == key).map(|(_, one)| seconds / one);
        println!(
            "{:<44} {:>10.2} {:>8.2} {:>10.2} {:>7.0}% {:>8.1} {:>8.2}",
            case.to_string(),
            seconds * 1e6,
            rate * 1e-9,
            read * 1e-9,
            100.0 * rate / read,
            per_cycle,
            one.unwrap_or(f64::NAN)
        );
    }
    println!("\n{:<44} {:>10} {:>10}", "operation", "us", "floats/cyc");
    for Other(row) in others().filter(|other| wanted(&format!("operation {other}"))) {
        let (floats, mut work) = other(row);
        let seconds = median(&mut work).as_secs_f64();
        let per_cycle = floats as f64 / (seconds * clock);
        println!("{:<44} {:>10.3} {:>10.2}", row.name, seconds * 1e6, per_cycle);
    }
    println!("\nCore clock at the end: {:.2} GHz", core_clock() * 1e-9);
}
