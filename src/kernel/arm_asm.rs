//! Arm instructions that stable Rust has no intrinsics for, SDOT and SMMLA, and two for which the
//! compiler needs a push.
//!
//! Each is one instruction in `asm!`, declared pure and free of memory, so that the compiler goes on
//! ordering and allocating registers around it as it does around an intrinsic. Miri runs no assembly
//! and gets the same arithmetic in plain loops.

use std::arch::aarch64::*;
#[cfg(not(miri))]
use std::arch::asm;

/// No instruction, but one place for all these vectors.
#[cfg(not(miri))]
macro_rules! at_once {
    ($($x:ident),*) => {
        // SAFETY: no instruction at all.
        unsafe {
            asm!(
                concat!("/*", $(" {", stringify!($x), ":v}",)* " */"),
                $($x = inout(vreg) *$x,)*
                options(pure, nomem, nostack, preserves_flags),
            );
        }
    };
}

/// Adds to each of the four lanes of `acc` the dot of its four bytes of `w` with the four bytes of
/// `x` that `LANE` (0 to 3) names.
#[inline]
#[target_feature(enable = "neon,dotprod")]
#[cfg(not(miri))]
pub(super) fn sdot<const LANE: usize>(mut acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: one instruction of the feature enabled here, on registers only.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]",
            inout(vreg) acc, in(vreg) w, in(vreg) x, const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// Adds the 2 by 2 dots of the two rows of eight bytes in `x` with those in `w`: lane `2 * i + j` gets
/// row `i` of `x` times row `j` of `w`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
#[cfg(not(miri))]
pub(super) fn smmla(mut acc: int32x4_t, x: int8x16_t, w: int8x16_t) -> int32x4_t {
    // SAFETY: one instruction of the feature enabled here, on registers only.
    unsafe {
        asm!(
            "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) acc, in(vreg) x, in(vreg) w,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// The pair of lanes of `w` that `PAIR` names, 0 or 1, times lane 0 of `x` and times lane 2 of it. FCMLA,
/// made for complex numbers, takes a pair where other products take one lane or four.
#[inline]
#[target_feature(enable = "neon,fcma")]
#[cfg(not(miri))]
pub(super) fn pair_times<const PAIR: usize>(x: float32x4_t, w: float32x4_t) -> float32x4_t {
    let mut products: float32x4_t;
    // SAFETY: registers only. Not `pure`, or one zero would be copied for all, which costs what is saved.
    unsafe {
        #[cfg(not(target_vendor = "apple"))]
        asm!("movi {0:v}.2d, #0", out(vreg) products, options(nomem, nostack, preserves_flags));
        // The form above was broken in an early core of Apple's, of which the assembler warns.
        #[cfg(target_vendor = "apple")]
        asm!("movi {0:v}.16b, #0", out(vreg) products, options(nomem, nostack, preserves_flags));
    }
    // SAFETY: one instruction of the feature enabled here, on registers only.
    unsafe {
        asm!(
            "fcmla {0:v}.4s, {1:v}.4s, {2:v}.s[{3}], #0",
            inout(vreg) products, in(vreg) x, in(vreg) w, const PAIR,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    products
}

/// Four halves as floats.
#[inline]
#[target_feature(enable = "neon")]
#[cfg(not(miri))]
pub(super) fn fcvtl(halves: uint16x4_t) -> float32x4_t {
    let floats: float32x4_t;
    // SAFETY: one instruction of the feature enabled here, on registers only.
    unsafe {
        asm!(
            "fcvtl {0:v}.4s, {1:v}.4h",
            out(vreg) floats, in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    floats
}

/// Fetches the cache line at `line`, wherever that is.
#[inline(always)]
pub(super) fn prefetch(line: *const u8) {
    #[cfg(not(miri))]
    // SAFETY: a hint, which never faults.
    unsafe {
        asm!("prfm pldl1keep, [{0}]", in(reg) line, options(nostack, preserves_flags, readonly));
    }
    #[cfg(miri)]
    let _ = line;
}

/// `x` in every lane of a register of its own. The compiler would copy one register to the others, for
/// which large cores use the pipes that multiply; the way from a general register leaves them alone.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn splat(x: i32) -> int32x4_t {
    #[cfg(miri)]
    return vdupq_n_s32(x);
    #[cfg(not(miri))]
    {
        let lanes: int32x4_t;
        // SAFETY: one instruction, on registers only. Not `pure`, or equal ones would be merged.
        unsafe {
            asm!("dup {0:v}.4s, {1:w}", out(vreg) lanes, in(reg) x,
                options(nomem, nostack, preserves_flags));
        }
        lanes
    }
}

/// `x` itself, with the compiler kept from seeing that its halves are equal. It would take the high half
/// of the other factor out with an EXT to multiply it by the low half of `x`, where SMLAL2 does the
/// same for nothing.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn opaque(mut x: int8x16_t) -> int8x16_t {
    #[cfg(not(miri))]
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {0:v} */", inout(vreg) x, options(pure, nomem, nostack, preserves_flags));
    }
    x
}

/// Declares functions that keep the compiler from making one of at most eight vectors later than another: it
/// would put what an operation takes right before the operation, where a core that runs in order waits for it.
macro_rules! together {
    ($($name:ident: $vector:ident;)*) => {
        $(#[inline(always)]
        pub(super) fn $name(vectors: &mut [$vector]) {
            #[cfg(not(miri))]
            match vectors {
                [a, b] => at_once!(a, b),
                [a, b, c] => at_once!(a, b, c),
                [a, b, c, d] => at_once!(a, b, c, d),
                [a, b, c, d, e, f] => at_once!(a, b, c, d, e, f),
                [a, b, c, d, e, f, g, h] => at_once!(a, b, c, d, e, f, g, h),
                _ => {}
            }
            #[cfg(miri)]
            let _ = vectors;
        })*
    };
}
together! {
    together: int8x16_t;
    floats_together: float32x4_t;
}

/// The dot of `N` bytes from `at_a` of `a` with as many from `at_b` of `b`.
#[cfg(miri)]
fn dot<const N: usize>(a: int8x16_t, at_a: usize, b: int8x16_t, at_b: usize) -> i32 {
    // SAFETY: both are sixteen bytes.
    let (a, b): ([i8; 16], [i8; 16]) = unsafe { (std::mem::transmute(a), std::mem::transmute(b)) };
    (0..N).map(|i| i32::from(a[at_a + i]) * i32::from(b[at_b + i])).sum()
}

/// The lanes of `acc`, each plus what `add` gives for it.
#[cfg(miri)]
fn lanes(acc: int32x4_t, add: impl Fn(usize) -> i32) -> int32x4_t {
    // SAFETY: four lanes both ways.
    unsafe {
        let acc: [i32; 4] = std::mem::transmute(acc);
        std::mem::transmute(std::array::from_fn::<_, 4, _>(|i| acc[i].wrapping_add(add(i))))
    }
}

/// The instruction of the same name, one half after the other.
#[target_feature(enable = "neon")]
#[cfg(miri)]
pub(super) fn fcvtl(halves: uint16x4_t) -> float32x4_t {
    // SAFETY: four halves, four floats.
    unsafe {
        let halves: [u16; 4] = std::mem::transmute(halves);
        std::mem::transmute(halves.map(|bits| half::f16::from_bits(bits).to_f32()))
    }
}

/// As above, in plain loops.
#[target_feature(enable = "neon,fcma")]
#[cfg(miri)]
pub(super) fn pair_times<const PAIR: usize>(x: float32x4_t, w: float32x4_t) -> float32x4_t {
    // SAFETY: four floats each.
    unsafe {
        let (x, w): ([f32; 4], [f32; 4]) = (std::mem::transmute(x), std::mem::transmute(w));
        std::mem::transmute(std::array::from_fn::<_, 4, _>(|i| x[i / 2 * 2] * w[2 * PAIR + i % 2]))
    }
}

/// The instruction of the same name, in plain loops.
#[target_feature(enable = "neon,dotprod")]
#[cfg(miri)]
pub(super) fn sdot<const LANE: usize>(acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    lanes(acc, |i| dot::<4>(w, 4 * i, x, 4 * LANE))
}

/// The instruction of the same name, in plain loops.
#[target_feature(enable = "neon,i8mm")]
#[cfg(miri)]
pub(super) fn smmla(acc: int32x4_t, x: int8x16_t, w: int8x16_t) -> int32x4_t {
    lanes(acc, |i| dot::<8>(x, i / 2 * 8, w, i % 2 * 8))
}
