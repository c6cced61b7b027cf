//! The figures that decide, each beside the limit of this machine as it was measured in the same run.
//!
//! - *in cache*: one row of activations, weights in the first cache, in multiply-adds a cycle of one core;
//!   on x86 beside the bound of the vector ports at the instructions that the method needs;
//! - *out of cache*: 8192 x 8192 on all cores, in weight bytes a second and as a share of what a plain read of the
//!   same bytes gave in turn with it, and how much longer M rows take than one;
//! - *many rows*: 512 rows of activations on one core, as a share of the peak of its dot instruction.

use super::*;

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
    let have = Isa::from_environment().unwrap_or_else(|error| panic!("NYBL_ISA: {error}"));
    nybl::kernel::select(Op::Matmul(format), have)
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
    let ports = peak::vector_operations();
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
            let copy: &[u64] = bytemuck::cast_slice(&weights[turn][..layout.bytes() / 8 * 8]);
            let tile = copy.len().div_ceil(threads * 16).next_multiple_of(32);
            let start = Instant::now();
            pool.run(copy.len().div_ceil(tile), &|i| {
                black_box(read_all(&copy[i * tile..copy.len().min((i + 1) * tile)]));
            });
            read.push(start.elapsed().as_secs_f64());
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
                let share = peak::dots().map_or(f64::NAN, |peak| rate / peak);
                (rate / core_clock(), share)
            })
            .collect();
        rates.sort_by(|a, b| a.0.total_cmp(&b.0));
        let name = format!("{} g{group}", ready.case.row.name);
        let (rate, share) = rates[rates.len() / 2];
        println!("{name:<28} {rate:>8.1} {:>7.0}%", share * 100.0);
    }
    if let Some(peak) = peak::dots() {
        println!("peak of the dot instruction: {:.1} MAC a cycle", peak / core_clock());
    }
}

/// What the vector units of this CPU do at most.
#[cfg(target_arch = "x86_64")]
mod peak {
    use super::{Instant, Isa, core_clock};
    use std::arch::asm;

    const ROUNDS: u64 = 20_000;

    /// Products a second of the dots of four bytes.
    pub(super) fn dots() -> Option<f64> {
        let have = Isa::from_environment().ok()?;
        if have.has(Isa::AVX512) {
            return Some(best(16 * 64, avx512_dots));
        }
        have.has(Isa::AVXVNNI).then(|| best(12 * 32, avxvnni_dots))
    }

    /// Vector operations of 512 bits a cycle, half of them dots.
    pub(super) fn vector_operations() -> Option<f64> {
        let have = Isa::from_environment().ok()?;
        have.has(Isa::AVX512).then(|| best(24, avx512_mix) / core_clock())
    }

    /// Things a second, of which a round makes `each`.
    fn best(each: u64, work: unsafe fn()) -> f64 {
        let time = (0..200).map(|_| {
            let start = Instant::now();
            // SAFETY: the caller asked the CPU.
            unsafe { work() };
            start.elapsed().as_secs_f64()
        });
        (each * ROUNDS) as f64 / time.fold(f64::INFINITY, f64::min)
    }

    /// A loop around instructions that only touch vector registers.
    macro_rules! rounds {
        ($name:ident, $($line:literal),*) => {
            unsafe fn $name() {
                // SAFETY: vector registers and a counter only; all of them are declared.
                unsafe {
                    asm!(
                        "2:", $($line,)* "dec {n}", "jnz 2b",
                        n = inout(reg) ROUNDS => _,
                        out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
                        out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
                        out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                        out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
                        out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                        out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                        options(nomem, nostack)
                    );
                }
            }
        };
    }

    rounds!(
        avx512_dots,
        ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
        "vpdpbusd zmm\\i, zmm30, zmm31",
        ".endr"
    );
    rounds!(
        avxvnni_dots,
        ".irp i,0,1,2,3,4,5,6,7,8,9,10,11",
        "{{vex}} vpdpbusd ymm\\i, ymm14, ymm15",
        ".endr"
    );
    rounds!(
        avx512_mix,
        ".irp i,0,1,2,3,4,5,6,7,8,9,10,11",
        "vpdpbusd zmm\\i, zmm30, zmm31",
        ".endr",
        ".irp i,12,13,14,15,16,17,18,19,20,21,22,23",
        "vpandd zmm\\i, zmm30, zmm31",
        ".endr"
    );
}

/// Elsewhere the report of `kernels/mca.py` says it.
#[cfg(not(target_arch = "x86_64"))]
mod peak {
    pub(super) fn dots() -> Option<f64> {
        None
    }

    pub(super) fn vector_operations() -> Option<f64> {
        None
    }
}
