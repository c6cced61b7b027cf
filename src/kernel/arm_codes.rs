//! How the Arm rows take packed codes apart: the bit maps of `docs/formats.md` as vector operations.
//!
//! A vector is four lanes of a line, so the same operations serve a line as it lies and two lines zipped
//! together. A field can be had as it is, or multiplied by a power of two where that saves a shift: SDOT
//! and SMMLA do not care, and the power is taken out of their sums for nothing.

use super::arm_asm::opaque;
use std::arch::aarch64::*;

/// The lines of a step, a vector of each; formats with fewer leave the rest alone.
pub(super) type Planes = [int8x16_t; 3];

/// Codes of one width. Field `f` holds the rows `16 * f` and on.
pub(super) trait Codes {
    /// Bits of a code.
    const BITS: u32;
    /// Fields in the bytes of a step.
    const FIELDS: usize;
    /// Lines of a step.
    const PLANES: usize;
    /// Bytes from a line to the next of its step.
    const PLANE: usize = 64;
    /// Bytes from the first step of a pair to the second.
    const STEP: usize = 64 * Self::PLANES;
    /// For each field, the power of two in [`Codes::scaled`].
    const SHIFTS: &'static [u32];
    /// For each field, what its codes are stored less: half their range in a field with an inverted top
    /// bit, which is a signed number.
    const LESS: &'static [i32];
    /// The code that stands for zero where no offset says otherwise.
    const MIDDLE: i32;
    /// Whether a whole byte, as a signed number, is the sum of all its scaled fields.
    const IS_SUM: bool = false;

    /// The codes of a field, as they are stored, times `1 << SHIFTS[field]`.
    ///
    /// # Safety
    /// There is such a field. (Traits have no other way to name a CPU feature.)
    unsafe fn scaled(planes: &Planes, field: usize) -> int8x16_t;

    /// The codes of a field, as they are stored.
    ///
    /// # Safety
    /// As above.
    unsafe fn stored(planes: &Planes, field: usize) -> int8x16_t;
}

/// Rows in a panel.
pub(super) const fn panel_rows<C: Codes>() -> usize {
    C::FIELDS * 16
}

/// Bytes of the codes of a panel at four columns.
pub(super) const fn step_bytes<C: Codes>() -> usize {
    C::PLANES * 64
}

/// The lines of a step at `at`: four outputs and four `k` of each.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn one_step<C: Codes>(at: *const u8) -> Planes {
    let mut planes = [vdupq_n_s8(0); 3];
    for plane in 0..C::PLANES {
        // SAFETY: the caller vouches for a vector of each line.
        planes[plane] = unsafe { vld1q_s8(at.wrapping_add(plane * C::PLANE).cast()) };
    }
    planes
}

/// The lines at `at`; if `ZIPPED`, with those of the next step: two outputs and eight `k` instead of four
/// and four. The second of the two has the other outputs if zipped, else the other `k`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn two_steps<C: Codes, const ZIPPED: bool>(at: *const u8) -> [Planes; 2] {
    let mut both = [[vdupq_n_s8(0); 3]; 2];
    for plane in 0..C::PLANES {
        let at = at.wrapping_add(plane * C::PLANE);
        // SAFETY: the caller vouches for a vector of each line of both steps.
        let (near, far) = unsafe { (vld1q_s32(at.cast()), vld1q_s32(at.add(C::STEP).cast())) };
        let (first, second) =
            if ZIPPED { (vzip1q_s32(near, far), vzip2q_s32(near, far)) } else { (near, far) };
        both[0][plane] = vreinterpretq_s8_s32(first);
        both[1][plane] = vreinterpretq_s8_s32(second);
    }
    both
}

/// The first eight bytes of the lines at `at` zipped with those of the next step: two outputs and eight `k`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn half_steps<C: Codes>(at: *const u8) -> Planes {
    let mut planes = [vdupq_n_s8(0); 3];
    for plane in 0..C::PLANES {
        let at = at.wrapping_add(plane * C::PLANE);
        // SAFETY: the caller vouches for half a vector of each line of both steps.
        let (near, far) = unsafe { (vld1_s32(at.cast()), vld1_s32(at.add(C::STEP).cast())) };
        let both = vcombine_s32(vzip1_s32(near, far), vzip2_s32(near, far));
        planes[plane] = vreinterpretq_s8_s32(both);
    }
    planes
}

/// The bits of `bytes` under `mask`.
#[inline]
#[target_feature(enable = "neon")]
fn under(bytes: int8x16_t, mask: u8) -> int8x16_t {
    vandq_s8(bytes, vreinterpretq_s8_u8(vdupq_n_u8(mask)))
}

/// The bits of `bytes` from `BIT` on under `mask`.
#[inline]
#[target_feature(enable = "neon")]
fn above<const BIT: i32>(bytes: int8x16_t, mask: u8) -> int8x16_t {
    under(vreinterpretq_s8_u8(vshrq_n_u8::<BIT>(vreinterpretq_u8_s8(bytes))), mask)
}

/// Signed bytes.
pub(super) struct Q8;

impl Codes for Q8 {
    const BITS: u32 = 8;
    const FIELDS: usize = 2;
    const PLANES: usize = 2;
    const SHIFTS: &'static [u32] = &[0, 0];
    const LESS: &'static [i32] = &[0, 0];
    const MIDDLE: i32 = 0;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scaled(planes: &Planes, field: usize) -> int8x16_t {
        planes[field]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn stored(planes: &Planes, field: usize) -> int8x16_t {
        planes[field]
    }
}

/// Nibbles.
pub(super) struct Q4;

impl Codes for Q4 {
    const BITS: u32 = 4;
    const FIELDS: usize = 2;
    const PLANES: usize = 1;
    const SHIFTS: &'static [u32] = &[0, 4];
    const LESS: &'static [i32] = &[0, 8];
    const MIDDLE: i32 = 8;
    const IS_SUM: bool = true;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scaled(planes: &Planes, field: usize) -> int8x16_t {
        under(planes[0], [0x0f, 0xf0][field])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn stored(planes: &Planes, field: usize) -> int8x16_t {
        match field {
            0 => under(planes[0], 0x0f),
            _ => vshrq_n_s8::<4>(planes[0]),
        }
    }
}

/// Eight fields of three bits in three bytes.
pub(super) struct Q3;

impl Codes for Q3 {
    const BITS: u32 = 3;
    const FIELDS: usize = 8;
    const PLANES: usize = 3;
    const PLANE: usize = 128;
    const STEP: usize = 64;
    const SHIFTS: &'static [u32] = &[2, 5, 0, 3, 1, 4, 0, 5];
    const LESS: &'static [i32] = &[0, 4, 0, 0, 0, 0, 0, 4];
    const MIDDLE: i32 = 4;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scaled(planes: &Planes, field: usize) -> int8x16_t {
        let [p, q, r] = *planes;
        match field {
            0 => under(p, 0x1c),
            1 => under(p, 0xe0),
            2 => under(q, 0x07),
            3 => under(q, 0x38),
            4 => under(r, 0x0e),
            5 => under(r, 0x70),
            6 => under(vsliq_n_s8::<2>(p, r), 0x07),
            _ => under(opaque(vsriq_n_s8::<2>(q, r)), 0xe0),
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn stored(planes: &Planes, field: usize) -> int8x16_t {
        let [p, q, r] = *planes;
        match field {
            0 => above::<2>(p, 0x07),
            1 => vshrq_n_s8::<5>(p),
            2 => under(q, 0x07),
            3 => above::<3>(q, 0x07),
            4 => above::<1>(r, 0x07),
            5 => above::<4>(r, 0x07),
            6 => under(vsliq_n_s8::<2>(p, r), 0x07),
            _ => vshrq_n_s8::<5>(vsriq_n_s8::<2>(q, r)),
        }
    }
}

/// Four fields of two bits in a byte.
pub(super) struct Q2;

impl Codes for Q2 {
    const BITS: u32 = 2;
    const FIELDS: usize = 4;
    const PLANES: usize = 1;
    const SHIFTS: &'static [u32] = &[0, 2, 4, 6];
    const LESS: &'static [i32] = &[0, 0, 0, 2];
    const MIDDLE: i32 = 2;
    const IS_SUM: bool = true;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn scaled(planes: &Planes, field: usize) -> int8x16_t {
        under(planes[0], 3 << (2 * field))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn stored(planes: &Planes, field: usize) -> int8x16_t {
        match field {
            0 => under(planes[0], 3),
            1 => above::<2>(planes[0], 3),
            2 => above::<4>(planes[0], 3),
            _ => vshrq_n_s8::<6>(planes[0]),
        }
    }
}
