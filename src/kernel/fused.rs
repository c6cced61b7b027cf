//! `a * b + c` with one rounding, where the target's baseline has no such instruction.
//!
//! The library's call takes it one lane at a time and some forty instructions on a CPU without FMA. Here it is sums of f64,
//! which a compiler makes vectors of.

/// Whether `mul_add` is an instruction.
const HAS_FMA: bool = cfg!(any(
    target_feature = "fma",
    target_arch = "aarch64",
    target_arch = "powerpc64",
    target_arch = "riscv64",
    target_arch = "s390x"
));

/// The product is exact in f64. The sum is rounded to odd, which keeps the second rounding from seeing a tie that is none
/// (Boldo and Melquiond, Emulation of a FMA and correctly rounded sums, 2008); what its first rounding has lost, exactly,
/// is by Knuth's two-sum.
#[inline(always)]
fn in_f64(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    let of_c = sum - product;
    let lost = (product - (sum - of_c)) + (c - of_c);
    let bits = sum.to_bits();
    // False for a NaN: infinities stay.
    let inexact = if lost.abs() > 0.0 { u64::MAX } else { 0 };
    let even = (bits & 1).wrapping_sub(1);
    // Away from zero or towards it.
    let step = 1_u64.wrapping_sub((bits ^ lost.to_bits()) >> 63 << 1);
    f64::from_bits(bits.wrapping_add(step & even & inexact)) as f32
}

/// `c[i] = a[i].mul_add(b[i], c[i])` for all lanes, but for which NaN a NaN is.
#[inline(always)]
pub(super) fn fused_lanes<const N: usize>(a: &[f32; N], b: &[f32; N], c: &mut [f32; N]) {
    if HAS_FMA {
        for i in 0..N {
            c[i] = a[i].mul_add(b[i], c[i]);
        }
    } else {
        in_f64_lanes(a, b, c);
    }
}

/// Where it was inlined, the library was 30 kB larger.
#[inline(never)]
fn in_f64_lanes<const N: usize>(a: &[f32; N], b: &[f32; N], c: &mut [f32; N]) {
    let mut sums = [0.0_f64; N];
    for i in 0..N {
        sums[i] = f64::from(a[i]) * f64::from(b[i]) + f64::from(c[i]);
    }
    // A sum that f64 has rounded matters only where it looks like a tie of f32, or where f32 has fewer bits.
    let mut doubtful = false;
    for sum in &sums {
        let (high, low) = ((sum.to_bits() >> 32) as u32, sum.to_bits() as u32);
        let subnormal = (high & 0x7fff_ffff).wrapping_sub(1) < ((1023 - 126) << 20) - 1;
        doubtful |= (low & 0x1fff_ffff == 0x1000_0000) | subnormal;
    }
    for i in 0..N {
        c[i] = if doubtful { in_f64(a[i], b[i], c[i]) } else { sums[i] as f32 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_rounded_once() {
        let mut state = 1_u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 32) as u32
        };
        let special = [
            0.0,
            -0.0,
            1.0,
            f32::MAX,
            f32::MIN_POSITIVE,
            1e-45,
            f32::INFINITY,
            -f32::INFINITY,
            f32::NAN,
        ];
        for round in 0..if cfg!(miri) { 2_000 } else { 4_000_000 } {
            let mut float = |spread: u32| {
                let bits = random();
                match (round % 8, bits % 16) {
                    (0, at) => *special.get(at as usize).unwrap_or(&f32::from_bits(bits)),
                    // Exponents that are near each other, and short fractions, which make ties.
                    (1..5, _) => f32::from_bits(
                        bits & 0x807f_f000 | (127 - spread + (bits >> 8) % (2 * spread + 1)) << 23,
                    ),
                    (5..7, _) => f32::from_bits(
                        bits & 0x807f_ffff | (127 - spread + (bits >> 8) % (2 * spread + 1)) << 23,
                    ),
                    _ => f32::from_bits(bits),
                }
            };
            let (a, b, c) = (float(6), float(6), float(30));
            let (is, want) = (in_f64(a, b, c), a.mul_add(b, c));
            assert!(
                is.to_bits() == want.to_bits() || is.is_nan() && want.is_nan(),
                "{a:e} * {b:e} + {c:e}: {is:e} {want:e}"
            );
        }
        // Just above a tie of f32, by less than f64 can tell.
        let (a, b, c) = (1.0 + f32::EPSILON, f32::EPSILON / 2.0, 1.0);
        assert_eq!(in_f64(a, b, c), a.mul_add(b, c));
        let mut lanes = [0.0, c];
        in_f64_lanes(&[1.0, a], &[2.0, b], &mut lanes);
        assert_eq!(lanes, [2.0, a.mul_add(b, c)]);
        let (a, b, c) = (f32::MIN_POSITIVE, f32::MIN_POSITIVE, 1.0 + f32::EPSILON);
        assert_eq!(in_f64(a, b, c), c);
    }
}
