//! The element-wise and reducing operations, each written once for every instruction set.
//!
//! A body works on lanes of 16 floats in a fixed order and is compiled again under each target
//! feature, where the compiler turns the lanes into vectors. No reassociation is allowed in Rust, and
//! `mul_add` is one rounding everywhere, so all compilations give the same bits: the scalar one is
//! the reference. The order of every sum is part of the contract (`docs/numerics.md`).

use super::abi::{
    EpilogueArgs, GeGluArgs, QuantizeArgs, RmsNormArgs, SoftCapArgs, SoftmaxArgs, SwiGluArgs,
};

/// Width of the fixed reduction order.
pub const LANES: usize = 16;

/// Sixteen floats in the fixed order.
pub(super) type Lanes = [f32; LANES];

/// Adding and subtracting this rounds a float of less than 2^22 to an integer, ties to even, on any
/// target without an instruction for it.
const ROUND: f32 = 12_582_912.0;

/// `e^x`, within 2 units in the last place; 0 below -87.33 and infinity above 88.72.
///
/// Range reduction by multiples of ln 2 and the degree-6 polynomial of the Cephes library's `expf`.
#[inline(always)]
#[must_use]
pub fn exp(x: f32) -> f32 {
    let clamped = if x < -87.33 { -87.33 } else { x };
    let clamped = if clamped > 88.72 { 88.72 } else { clamped };
    let (e, power) = exp_reduced(clamped);
    // Two factors, because 2^128 itself is no float.
    let half = power >> 1;
    let scaled = e * power_of_two(half) * power_of_two(power.wrapping_sub(half));
    let scaled = if x < -87.33 { 0.0 } else { scaled };
    if x > 88.72 { f32::INFINITY } else { scaled }
}

/// [`exp`] where `x` is not positive: the same bits in two thirds of the operations. Means nothing elsewhere.
#[inline(always)]
#[must_use]
pub(super) fn exp_down(x: f32) -> f32 {
    let clamped = if x < -87.33 { -87.33 } else { x };
    let (e, power) = exp_reduced(clamped);
    // The power is -126 at least.
    let scaled = e * power_of_two(power);
    if x < -87.33 { 0.0 } else { scaled }
}

/// `(e, n)` with `e^x = e * 2^n` and `e` near 1.
#[inline(always)]
fn exp_reduced(x: f32) -> (f32, i32) {
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let power = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    (p.mul_add(r * r, r) + 1.0, power)
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// The sum of the lanes: halves onto each other, 8, 4, 2, 1.
#[inline(always)]
#[must_use]
pub fn sum_lanes(mut lanes: Lanes) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// The largest lane; none is NaN. Which of two equal zeros is left open.
#[inline(always)]
fn max_lanes(mut lanes: Lanes) -> f32 {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] = if lanes[i + width] > lanes[i] { lanes[i + width] } else { lanes[i] };
        }
    }
    lanes[0]
}

#[inline(always)]
fn load(x: &[f32]) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes.copy_from_slice(x);
    lanes
}

/// The nearest f16, ties to even, as bits. Without a branch, so that it becomes vector code.
///
/// The exponent is moved and the fraction rounded in integers; a number below the normal range is added to
/// 0.5 instead, whose last place is that of a denormal f16, so that the addition rounds it.
#[inline(always)]
fn to_half(x: f32) -> u16 {
    let bits = x.to_bits();
    let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7fff_ffff);
    let rounded = magnitude.wrapping_add(0xfff + (magnitude >> 13 & 1));
    let normal = rounded.wrapping_sub(112 << 23) >> 13;
    let small = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
    let finite = if magnitude < 113 << 23 { small } else { normal };
    let bounded = if magnitude >= 143 << 23 { 0x7c00 } else { finite };
    let half = if magnitude > 0x7f80_0000 { 0x7e00 } else { bounded };
    (half | sign) as u16
}

/// Bias, clamp and rounding to halves: what may follow a matmul. A NaN passes the clamp.
///
/// # Safety
/// The pointers of `a` cover what their documentation says.
#[inline(always)]
pub(super) unsafe fn epilogue(a: &EpilogueArgs) {
    for row in 0..a.m {
        // SAFETY: the caller vouches for `m` rows of `n` floats.
        let y = unsafe { std::slice::from_raw_parts_mut(a.y.add(row * a.y_stride), a.n) };
        if !a.bias.is_null() {
            // SAFETY: the caller vouches for `n` floats.
            let bias = unsafe { std::slice::from_raw_parts(a.bias, a.n) };
            y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
        for y in &mut *y {
            let above = if *y < a.low { a.low } else { *y };
            *y = if above > a.high { a.high } else { above };
        }
        if !a.halves.is_null() {
            // SAFETY: the caller vouches for `m` rows of `n` halves.
            let out =
                unsafe { std::slice::from_raw_parts_mut(a.halves.add(row * a.halves_stride), a.n) };
            out.iter_mut().zip(&*y).for_each(|(out, y)| *out = to_half(*y));
        }
    }
}

/// Quantises rows of activations, group by group.
///
/// The scale is the group's largest magnitude over 127, so codes lie in -127 to 127. A group whose
/// magnitude is below 1e-30 is all zeros; one that holds an infinity or NaN gets a NaN scale, which
/// reaches the output. The magnitude is found on the bit patterns, where NaN is larger than infinity
/// and every instruction set agrees.
///
/// # Safety
/// The pointers of `a` cover what their documentation says.
#[inline(always)]
pub(super) unsafe fn quantize(a: &QuantizeArgs) {
    let groups = a.k.div_ceil(a.group);
    for row in 0..a.m {
        // SAFETY: the caller vouches for `m` rows of `k` floats, `groups * group` codes and `groups`
        // scales and sums.
        let (x, q, scales, sums) = unsafe {
            (
                std::slice::from_raw_parts(a.x.add(row * a.x_stride), a.k),
                std::slice::from_raw_parts_mut(a.q.add(row * groups * a.group), groups * a.group),
                std::slice::from_raw_parts_mut(a.scales.add(row * groups), groups),
                std::slice::from_raw_parts_mut(a.sums.add(row * groups), groups),
            )
        };
        let outputs = q.chunks_exact_mut(a.group).zip(scales).zip(sums);
        for (x, ((q, scale), sum)) in x.chunks(a.group).zip(outputs) {
            let top = x.iter().fold(0, |top: u32, x| top.max(x.to_bits() & 0x7fff_ffff));
            let top = f32::from_bits(top);
            if !(top >= 1e-30 && top.is_finite()) {
                q.fill(0);
                *sum = 0;
                *scale = if top < 1e-30 { 0.0 } else { f32::NAN };
                continue;
            }
            *scale = top / 127.0;
            let inverse = 127.0 / top;
            let (codes, padding) = q.split_at_mut(x.len());
            let mut total = 0;
            for (code, x) in codes.iter_mut().zip(x) {
                let shifted = x * inverse + ROUND;
                let value = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
                total += value;
                *code = value as i8;
            }
            padding.fill(0);
            *sum = total;
        }
    }
}

/// Root-mean-square normalisation (Zhang and Sennrich 2019) with 16 partial sums of squares.
///
/// # Safety
/// The pointers of `a` cover what their documentation says.
#[inline(always)]
pub(super) unsafe fn rmsnorm(a: &RmsNormArgs) {
    for row in 0..a.m {
        // SAFETY: the caller vouches for `m` rows of `d` floats and `d` weights.
        let (x, weight, y) = unsafe {
            (
                std::slice::from_raw_parts(a.x.add(row * a.d), a.d),
                std::slice::from_raw_parts(a.weight, a.d),
                std::slice::from_raw_parts_mut(a.y.add(row * a.d), a.d),
            )
        };
        let mut squares = [0.0; LANES];
        let chunks = x.chunks_exact(LANES);
        for (lane, x) in squares.iter_mut().zip(chunks.remainder()) {
            *lane = x.mul_add(*x, *lane);
        }
        for chunk in chunks {
            let x = load(chunk);
            for i in 0..LANES {
                squares[i] = x[i].mul_add(x[i], squares[i]);
            }
        }
        let inverse = 1.0 / (sum_lanes(squares) / a.d as f32 + a.eps).sqrt();
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            *y = x * inverse * weight;
        }
    }
}

/// `gate = gate / (1 + e^-gate) * up` (Shazeer 2020).
///
/// # Safety
/// The pointers of `a` cover what their documentation says.
#[inline(always)]
pub(super) unsafe fn swiglu(a: &SwiGluArgs) {
    // SAFETY: the caller vouches for `len` floats each.
    let (gate, up) = unsafe {
        (std::slice::from_raw_parts_mut(a.gate, a.len), std::slice::from_raw_parts(a.up, a.len))
    };
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// `gate = gelu(gate) * up` (Shazeer 2020) with the tanh form of GELU (Hendrycks and Gimpel 2016), in which
/// `0.5 * (1 + tanh(u))` is `1 / (1 + e^-2u)`.
///
/// # Safety
/// The pointers of `a` cover what their documentation says.
#[inline(always)]
pub(super) unsafe fn geglu(a: &GeGluArgs) {
    /// `-2 * sqrt(2 / pi)`.
    const STEEPNESS: f32 = -1.595_769;
    // SAFETY: the caller vouches for `len` floats each.
    let (gate, up) = unsafe {
        (std::slice::from_raw_parts_mut(a.gate, a.len), std::slice::from_raw_parts(a.up, a.len))
    };
    for (gate, up) in gate.iter_mut().zip(up) {
        let x = *gate;
        let bent = (x * x * x).mul_add(0.044_715, x);
        *gate = x / (1.0 + exp(STEEPNESS * bent)) * up;
    }
}

/// Bends logits to lie within a cap of zero (Gemma 2, 2024).
///
/// # Safety
/// The pointer of `a` covers what its documentation says.
#[inline(always)]
pub(super) unsafe fn softcap(a: &SoftCapArgs) {
    // SAFETY: the caller vouches for `len` floats.
    let x = unsafe { std::slice::from_raw_parts_mut(a.x, a.len) };
    x.iter_mut().for_each(|x| *x = soft_cap(*x, a.cap));
}

/// Softmax with the largest score subtracted and 16 partial sums.
///
/// # Safety
/// The pointer of `a` covers what its documentation says.
#[inline(always)]
pub(super) unsafe fn softmax(a: &SoftmaxArgs) {
    // SAFETY: the caller vouches for `len` floats.
    let x = unsafe { std::slice::from_raw_parts_mut(a.x, a.len) };
    // Which of two equal zeros is the largest does not matter: both are subtracted alike.
    let mut tops = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in &*chunks {
        for i in 0..LANES {
            tops[i] = if chunk[i] > tops[i] { chunk[i] } else { tops[i] };
        }
    }
    let larger = |top, x: &f32| if *x > top { *x } else { top };
    let top = rest.iter().fold(max_lanes(tops), larger);
    let mut sums = [0.0; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp_down(chunk[i] - top);
            sums[i] += chunk[i];
        }
    }
    for (lane, x) in sums.iter_mut().zip(rest) {
        *x = exp_down(*x - top);
        *lane += *x;
    }
    let inverse = 1.0 / sum_lanes(sums);
    for x in x {
        *x *= inverse;
    }
}

/// `cap * tanh(score / cap)` (Gemma 2, 2024) through the one exponential function.
#[inline(always)]
pub(super) fn soft_cap(score: f32, cap: f32) -> f32 {
    cap * (1.0 - 2.0 / (exp(2.0 * (score / cap)) + 1.0))
}

/// Compiles the bodies of this module under a set of target features.
macro_rules! instantiate {
    ($features:literal) => {
        $crate::kernel::ops::instantiate!(@one $features, quantize, QuantizeArgs);
        $crate::kernel::ops::instantiate!(@one $features, epilogue, EpilogueArgs);
        $crate::kernel::ops::instantiate!(@one $features, rmsnorm, RmsNormArgs);
        $crate::kernel::ops::instantiate!(@one $features, swiglu, SwiGluArgs);
        $crate::kernel::ops::instantiate!(@one $features, geglu, GeGluArgs);
        $crate::kernel::ops::instantiate!(@one $features, softcap, SoftCapArgs);
        $crate::kernel::ops::instantiate!(@one $features, softmax, SoftmaxArgs);
    };
    (@one $features:literal, $name:ident, $args:ident) => {
        /// The operation of the same name in [`super::ops`].
        #[target_feature(enable = $features)]
        pub(super) unsafe extern "C" fn $name(a: *const $crate::kernel::abi::$args) {
            // SAFETY: the caller vouches for the block and for the CPU features.
            unsafe { $crate::kernel::ops::$name(&*a) }
        }
    };
}
pub(crate) use instantiate;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let steps = if cfg!(miri) { 500 } else { 1_000_000 };
        let mut worst = 0.0_f64;
        for i in 0..=steps {
            let x = -87.0 + 175.0 * (i as f32 / steps as f32);
            let want = f64::from(x).exp();
            let unit = f64::from(f32::EPSILON) * 2_f64.powi(want.log2().floor() as i32);
            worst = worst.max((f64::from(exp(x)) - want).abs() / unit);
        }
        assert!(worst <= 2.0, "{worst} units");
    }

    #[test]
    fn every_edge_between_halves_is_rounded_to_the_nearest() {
        let (stride, factor) = if cfg!(miri) { (331, 1.1) } else { (1, 1.000_37) };
        // The halves, the points in the middle between two, and the floats beside both.
        for bits in (0..=u16::MAX).step_by(stride) {
            let half = half::f16::from_bits(bits).to_f32().to_bits();
            for float in [half, half.wrapping_add(0x1000), half.wrapping_add(0x2000)]
                .into_iter()
                .flat_map(|x| [x.wrapping_sub(1), x, x.wrapping_add(1)].map(f32::from_bits))
            {
                let want = half::f16::from_f32(float);
                let got = half::f16::from_bits(to_half(float));
                let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                assert!(same, "{float:e} became {got}, not {want}");
            }
        }
        // Denormal halves are further apart than the last places of their floats.
        let mut x = 1e-9_f32;
        while x < 7e-5 {
            for x in [x, -x] {
                assert_eq!(to_half(x), half::f16::from_f32(x).to_bits(), "{x:e}");
            }
            x *= factor;
        }
        for x in [f32::MAX, 65519.99, 65520.0, 1e-45, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(to_half(x), half::f16::from_f32(x).to_bits(), "{x:e}");
        }
    }

    #[test]
    fn of_what_is_not_positive_both_exponentials_are_the_same() {
        // From -0 to the quiet NaNs with a sign, infinity among them, in steps that no exponent divides.
        let step = if cfg!(miri) { 4_194_301 } else { 1021 };
        let some = (0x8000_0000..=u32::MAX).step_by(step);
        for x in some.map(f32::from_bits).chain([0.0, -87.33, -87.340, f32::NEG_INFINITY]) {
            // Which NaN comes out of a NaN is left open by the language.
            let (got, want) = (exp_down(x), exp(x));
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{x}");
        }
    }

    #[test]
    fn exp_at_its_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(88.7).is_finite() && exp(-87.3) > 0.0);
    }
}
