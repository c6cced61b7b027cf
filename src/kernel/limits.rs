//! What this machine does at most, measured: what every figure of speed is to be seen beside.
//!
//! A rate in tokens says little without what the memory and the cores could give at that moment, and on a
//! shared machine that changes from minute to minute. So benchmarks measure the limits in the same run.

use crate::isa::Isa;
use crate::threads::Pool;
use std::hint::black_box;
use std::time::Instant;

/// Cycles a second of the core under load: a chain of additions does one a cycle on every core. Not
/// the clock that the system reports, which leaves turbo out, and no time stamp counter, which runs at
/// a fixed rate. An addition of a constant would not do: newer cores fold those away.
#[must_use]
pub fn core_clock() -> f64 {
    const ROUNDS: u32 = 20_000;
    let mut best = f64::INFINITY;
    // Short and often: some of them are not interrupted.
    for _ in 0..500 {
        let start = Instant::now();
        black_box((0..ROUNDS).fold(1, |x, _| sixteen_additions(x)));
        best = best.min(start.elapsed().as_secs_f64());
    }
    f64::from(16 * ROUNDS) / best
}

/// Sixteen additions that wait for each other.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline(always)]
fn sixteen_additions(mut x: u64) -> u64 {
    // SAFETY: only changes the register that it is given.
    unsafe {
        std::arch::asm!(
            ".rept 16", "add {x}, {y}", ".endr",
            x = inout(reg) x, y = in(reg) 3_u64, options(pure, nomem, nostack)
        );
    }
    x
}

/// Sixteen additions that wait for each other.
#[cfg(all(target_arch = "aarch64", not(miri)))]
#[inline(always)]
fn sixteen_additions(mut x: u64) -> u64 {
    // SAFETY: only changes the register that it is given.
    unsafe {
        std::arch::asm!(
            ".rept 16", "add {x}, {x}, {y}", ".endr",
            x = inout(reg) x, y = in(reg) 3_u64, options(pure, nomem, nostack)
        );
    }
    x
}

/// Sixteen additions that wait for each other.
#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
#[inline(always)]
fn sixteen_additions(x: u64) -> u64 {
    (0..16).fold(x, |x, _| black_box(x + 3))
}

/// Seconds that reading all of `parts` once takes the threads of `pool`, which share them in pieces.
#[must_use]
pub fn read_seconds(pool: &Pool, parts: &[&[u8]]) -> f64 {
    const PIECE: usize = 1 << 18;
    let pieces = parts.iter().flat_map(|part| part.chunks(PIECE)).collect::<Vec<_>>();
    let start = Instant::now();
    pool.run(pieces.len(), &|index| {
        black_box(read_all(pieces[index]));
    });
    start.elapsed().as_secs_f64()
}

/// All whole words of `bytes` combined: a read that cannot be left out.
#[inline(always)]
fn combine(bytes: &[u8]) -> u64 {
    let (_, words, _) = bytemuck::pod_align_to::<u8, u64>(bytes);
    let mut lanes = [0_u64; 32];
    for chunk in words.as_chunks::<32>().0 {
        for i in 0..32 {
            lanes[i] |= chunk[i];
        }
    }
    lanes.iter().fold(0, |a, b| a | b)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn combine_avx2(bytes: &[u8]) -> u64 {
    combine(bytes)
}

fn read_all(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if Isa::detect().has(Isa::AVX2) {
        // SAFETY: the CPU has AVX2.
        return unsafe { combine_avx2(bytes) };
    }
    combine(bytes)
}

pub use peak::{dots, vector_operations};

/// What the vector units of this CPU do at most.
#[cfg(all(target_arch = "x86_64", not(miri)))]
mod peak {
    use super::{Instant, Isa, Pool, core_clock};
    use std::arch::asm;

    const ROUNDS: u64 = 20_000;

    /// Products a second of the dots of four bytes, on all threads of `pool` together, for kernels that use
    /// `isa`; nothing where that has no such dot.
    ///
    /// # Panics
    /// When this CPU lacks a feature of `isa`: a bug of the caller.
    #[must_use]
    pub fn dots(pool: &Pool, isa: Isa) -> Option<f64> {
        assert!(Isa::detect().has(isa), "{isa} on a CPU that has {}", Isa::detect());
        if isa.has(Isa::AVX512) {
            return Some(best(pool, 16 * 64, avx512_dots));
        }
        isa.has(Isa::AVXVNNI).then(|| best(pool, 12 * 32, avxvnni_dots))
    }

    /// Vector operations of 512 bits a cycle of one core, half of them dots; nothing where `isa` has none.
    ///
    /// # Panics
    /// As [`dots`].
    #[must_use]
    pub fn vector_operations(isa: Isa) -> Option<f64> {
        assert!(Isa::detect().has(isa), "{isa} on a CPU that has {}", Isa::detect());
        let one = Pool::new(1).ok()?;
        isa.has(Isa::AVX512).then(|| best(&one, 24, avx512_mix) / core_clock())
    }

    /// Things a second, of which a round makes `each`.
    fn best(pool: &Pool, each: u64, work: unsafe fn()) -> f64 {
        let threads = pool.threads();
        let time = (0..200 / threads).map(|_| {
            let start = Instant::now();
            // More tiles than threads, so that a thread that comes late does not count.
            // SAFETY: the caller asked the CPU.
            pool.run(4 * threads, &|_| unsafe { work() });
            start.elapsed().as_secs_f64()
        });
        (4 * threads as u64 * each * ROUNDS) as f64 / time.fold(f64::INFINITY, f64::min)
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

/// Elsewhere a model of the cores says it (`docs/arm.md`).
#[cfg(any(miri, not(target_arch = "x86_64")))]
mod peak {
    use super::{Isa, Pool};

    /// Products a second of the dots of four bytes; known on x86 alone.
    #[must_use]
    pub fn dots(_: &Pool, _: Isa) -> Option<f64> {
        None
    }

    /// Vector operations of 512 bits a cycle; known on x86 alone.
    #[must_use]
    pub fn vector_operations(_: Isa) -> Option<f64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_numbers_that_a_machine_could_have() {
        let pool = Pool::new(2).unwrap();
        let bytes = vec![3_u8; 1 << 12];
        assert!(read_seconds(&pool, &[&bytes, &bytes[1..1000]]) > 0.0);
        assert_eq!(read_all(&bytes), u64::from_ne_bytes([3; 8]));
        if let (Some(peak), false) = (dots(&pool, Isa::detect()), cfg!(miri)) {
            assert!((1e9..1e15).contains(&peak), "{peak}");
        }
    }
}
