//! The figures that decide, each beside the limit of this machine as it was measured in the same run.
//!
//! - *in cache*: one row of activations, weights in the first cache, in multiply-adds a cycle of one core;
//!   on x86 beside the bound of the vector ports at the instructions that the method needs;
//! - *out of cache*: 8192 x 8192 on all cores, in weight bytes a second and as a share of what a plain read of the
//!   same bytes gave in turn with it, and how much longer M rows take than one;
//! - *many rows*: 512 rows of activations on one core, as a share of the peak of its dot instruction.

use super::*;
use nybl::kernel::limits::{self, core_clock, read_seconds};

fn isa() -> Isa {
    Isa::from_environment().unwrap_or_else(|error| panic!("NYBL_ISA: {error}"))
}

pub(crate) fn report(filters: &[String]) {
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|x| name.contains(x));
    if wanted("yardstick in cache") {
        in_cache();
    }
    if wanted("yardstick out of cache") {
        out_of_cache();
    }
    if wanted("yardstick many rows") {
        many_rows();
    }
}

/// The fastest row for a format.
fn fastest(format: Format) -> &'static Row {
    nybl::kernel::select(Op::Matmul(format), isa())
}

fn ready(format: Format, group: usize, n: usize, k: usize, m: usize, threads: usize) -> Ready {
    let layout = Layout::new(format, group, n, k).expect("a valid shape");
    Ready::new(Case { row: fastest(format), layout, m, cold: false, threads })
}

/// Vector instructions for a line of weights and one row of activations, and the products they make: AND,
/// flip and dots. Only where the row is bound by vector ports of 512 bits.
fn instructions(format: Format) -> Option<(f64, f64)> {
    match format.bits() {
        2 => Some((4.0 + 3.0 + 1.0, 256.0)),
        3 => Some((10.0 + 7.0 + 2.0, 512.0)),
        4 => Some((2.0 + 1.0 + 1.0, 128.0)),
        _ => None,
    }
}

fn in_cache() {
    let ports = limits::vector_operations(isa());
    println!("\n{:<28} {:>8} {:>12}", "in cache, M = 1", "MAC/cyc", "port bound");
    for (format, group) in [
        (Format::Q4, 32),
        (Format::Q4, 128),
        (Format::Q4Z, 128),
        (Format::Q3, 32),
        (Format::Q3, 128),
        (Format::Q2, 128),
        (Format::Q8, 32),
    ] {
        let (n, k) = (format.panel_rows(), 512 * 32 * 4 / (format.panel_rows() * format.bits()));
        let mut ready = ready(format, group, n, k.next_multiple_of(128), 1, 1);
        let Run::Matmul(run) = ready.case.row.run else { unreachable!("a matmul") };
        let y = ready.y.as_mut_ptr();
        let args = ready.args(0, ready.case.layout.panels(), y, n);
        let macs = ready.macs() as f64;
        // Clock and kernel in turn: the clock moves with what else the machine does.
        let mut rates: Vec<f64> = (0..9)
            .map(|_| {
                // SAFETY: a block over all of `ready`, whose row the CPU can run.
                let time = median(|| unsafe { run(&raw const args) });
                macs / (time.as_secs_f64() * core_clock())
            })
            .collect();
        rates.sort_by(f64::total_cmp);
        let bound =
            instructions(format).zip(ports).map(|((work, macs), ports)| macs * ports / work);
        let bound = bound.map_or("-".into(), |bound| format!("{bound:.1}"));
        let name = format!("{} g{group}", ready.case.row.name);
        println!("{name:<28} {:>8.1} {bound:>12}", rates[rates.len() / 2]);
    }
    if let Some(ports) = ports {
        println!("vector operations of 512 bits a cycle, measured: {ports:.2}");
    }
}

fn out_of_cache() {
    const ROWS_OF_X: [usize; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16];
    const ROUNDS: usize = 21;
    let threads = all_threads();
    println!("\nout of cache, 8192 x 8192, {threads} threads; T(M)/T(1) for M = {ROWS_OF_X:?}");
    for (format, group) in
        [(Format::Q4, 32), (Format::Q4, 128), (Format::Q3, 128), (Format::Q8, 32)]
    {
        let layout = Layout::new(format, group, 8192, 8192).expect("a valid shape");
        let case = |m| Case { row: fastest(format), layout, m, cold: true, threads };
        let mut ready: Vec<_> = ROWS_OF_X.map(|m| Ready::new(case(m))).into();
        let weights = Arc::clone(&ready[0].weights);
        let pool = Pool::new(threads).expect("a thread count in range");
        let (mut read, mut times) = (Vec::new(), vec![Vec::new(); ready.len()]);
        let mut turn = 0;
        for _ in 0..ROUNDS {
            read.push(read_seconds(&pool, &[&weights[turn]]));
            for (ready, times) in ready.iter_mut().zip(&mut times) {
                turn = (turn + 1) % weights.len();
                ready.turn = turn;
                let start = Instant::now();
                ready.run();
                times.push(start.elapsed().as_secs_f64());
            }
            turn = (turn + 1) % weights.len();
        }
        let middle = |times: &mut Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let read = middle(&mut read);
        let times: Vec<f64> = times.iter_mut().map(middle).collect();
        let rate = |time: f64| layout.bytes() as f64 / time * 1e-9;
        print!(
            "{:<24} read {:.1} GB/s, M=1 {:.1} GB/s = {:.0}%; ",
            format!("{} g{group}", fastest(format).name),
            rate(read),
            rate(times[0]),
            100.0 * read / times[0]
        );
        println!("{}", times.iter().map(|t| format!("{:.2} ", t / times[0])).collect::<String>());
    }
}

fn many_rows() {
    let one = Pool::new(1).expect("one thread");
    let peak = || limits::dots(&one, isa());
    println!("\n{:<28} {:>8} {:>8}", "512 x 2048 x 2048, 1 core", "MAC/cyc", "of peak");
    for (format, group) in [
        (Format::Q4, 32),
        (Format::Q4, 128),
        (Format::Q4Z, 32),
        (Format::Q3, 128),
        (Format::Q2, 128),
        (Format::Q8, 32),
        (Format::Q8, 128),
    ] {
        let mut ready = ready(format, group, 2048, 2048, 512, 1);
        let macs = ready.macs() as f64;
        let mut rates: Vec<(f64, f64)> = (0..9)
            .map(|_| {
                let start = Instant::now();
                ready.run();
                let rate = macs / start.elapsed().as_secs_f64();
                let share = peak().map_or(f64::NAN, |peak| rate / peak);
                (rate / core_clock(), share)
            })
            .collect();
        rates.sort_by(|a, b| a.0.total_cmp(&b.0));
        let name = format!("{} g{group}", ready.case.row.name);
        let (rate, share) = rates[rates.len() / 2];
        println!("{name:<28} {rate:>8.1} {:>7.0}%", share * 100.0);
    }
    if let Some(peak) = peak() {
        println!("peak of the dot instruction: {:.1} MAC a cycle", peak / core_clock());
    }
}
