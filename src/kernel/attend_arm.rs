//! Vectors of the attention rows for NEON, and for NEON with dotprod, which only the integer dots differ in.

use super::arm_asm::{fcvtl, sdot};
use super::attend::{Codes, F16, F32, Floats, Rows, Seldom, Simd, attend_rows, fetch, seldom};
use super::ops::LANES;
use std::arch::aarch64::*;

/// `DOTS`: with SDOT.
pub(super) struct Neon<const DOTS: bool>;

impl<const DOTS: bool> Simd for Neon<DOTS> {
    type V = float32x4_t;
    const WIDTH: usize = 4;
    const ROWS: usize = 4;
    const SELDOM: Seldom = NEON;

    #[inline(always)]
    unsafe fn splat(x: f32) -> float32x4_t {
        // SAFETY: the caller vouches for the features.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the caller vouches for the features.
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the caller vouches for the features.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: the caller vouches for the features.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        // SAFETY: the caller vouches for four floats and the features.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: float32x4_t) {
        // SAFETY: the caller vouches for four floats and the features.
        unsafe { vst1q_f32(to, v) }
    }

    #[inline(always)]
    unsafe fn load_i32(from: *const i32) -> float32x4_t {
        // SAFETY: the caller vouches for four integers and the features.
        unsafe { vcvtq_f32_s32(vld1q_s32(from)) }
    }

    #[inline(always)]
    unsafe fn any_above(a: float32x4_t, b: float32x4_t) -> bool {
        // SAFETY: the caller vouches for the features.
        unsafe { vmaxvq_u32(vcgtq_f32(a, b)) != 0 }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> float32x4_t {
        // SAFETY: the caller vouches for four halves and the features.
        unsafe { fcvtl(vld1_u16(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> float32x4_t {
        // SAFETY: the caller vouches for four bytes and the features.
        unsafe {
            let bytes = vcreate_s8(u64::from(from.cast::<u32>().read_unaligned()));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))
        }
    }

    #[inline(always)]
    unsafe fn load_i4(from: *const u8, high: bool) -> float32x4_t {
        // SAFETY: the caller vouches for four bytes and the features.
        unsafe {
            let bytes = vcreate_u8(u64::from(from.cast::<u32>().read_unaligned()));
            let codes = if high { vshr_n_u8::<4>(bytes) } else { vand_u8(bytes, vdup_n_u8(15)) };
            let codes = vsub_s8(vreinterpret_s8_u8(codes), vdup_n_s8(8));
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(codes))))
        }
    }

    #[inline(always)]
    unsafe fn dots<const R: usize>(
        k: *const u8,
        d: usize,
        q: [*const i8; R],
        _sums: [i32; R],
        ahead: *const u8,
    ) -> Rows<i32, R> {
        // SAFETY: as the callee wants it.
        unsafe {
            for line in 0..d / 4 {
                fetch::<Self>(ahead, 64 * line);
            }
            Rows(q.map(|q| if DOTS { dots_sdot(k, d, q) } else { dots_wide(k, d, q) }))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(line: *const u8) {
        super::arm_asm::prefetch(line);
    }

    /// The four factors in one register.
    #[inline(always)]
    unsafe fn fma4(acc: &mut [float32x4_t; 4], k: [float32x4_t; 4], q: *const f32) {
        // SAFETY: the caller vouches for four floats and the features.
        unsafe {
            let q = vld1q_f32(q);
            acc[0] = vfmaq_laneq_f32::<0>(acc[0], k[0], q);
            acc[1] = vfmaq_laneq_f32::<1>(acc[1], k[1], q);
            acc[2] = vfmaq_laneq_f32::<2>(acc[2], k[2], q);
            acc[3] = vfmaq_laneq_f32::<3>(acc[3], k[3], q);
        }
    }
}

/// Both bytes of the query's codes, each by SDOT, sixteen columns at a time.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dots_sdot(k: *const u8, d: usize, q: *const i8) -> [i32; LANES] {
    let mut dots = [0; LANES];
    // SAFETY: the caller vouches for `16 * d` key codes and `2 * d` query codes; `d` is a multiple of 16.
    unsafe {
        let (mut high, mut low) = ([vdupq_n_s32(0); 4], [vdupq_n_s32(0); 4]);
        for i in (0..d).step_by(16) {
            let (upper, lower) = (vld1q_s8(q.add(i)), vld1q_s8(q.add(d + i)));
            for part in 0..4 {
                let keys = |j: usize| vld1q_s8(k.add(16 * (i + 4 * j) + 16 * part).cast());
                high[part] = sdot::<0>(high[part], keys(0), upper);
                low[part] = sdot::<0>(low[part], keys(0), lower);
                high[part] = sdot::<1>(high[part], keys(1), upper);
                low[part] = sdot::<1>(low[part], keys(1), lower);
                high[part] = sdot::<2>(high[part], keys(2), upper);
                low[part] = sdot::<2>(low[part], keys(2), lower);
                high[part] = sdot::<3>(high[part], keys(3), upper);
                low[part] = sdot::<3>(low[part], keys(3), lower);
            }
        }
        for part in 0..4 {
            let whole = vaddq_s32(vshlq_n_s32::<7>(high[part]), low[part]);
            vst1q_s32(dots.as_mut_ptr().add(4 * part), whole);
        }
    }
    dots
}

/// Keys widened to 16 bits by whole codes: the products of a position stay in four lanes until the end.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dots_wide(k: *const u8, d: usize, q: *const i8) -> [i32; LANES] {
    let mut dots = [0; LANES];
    // SAFETY: the caller vouches for `16 * d` key codes and for the query codes, whole ones from `2 * d` on.
    unsafe {
        let mut acc = [vdupq_n_s32(0); LANES];
        for i in (0..d).step_by(4) {
            let code = q.add(2 * d + 2 * i).cast::<u64>().read_unaligned();
            let code = vreinterpret_s16_u64(vcreate_u64(code));
            for pair in 0..LANES / 2 {
                let keys = vmovl_s8(vld1_s8(k.add(16 * i + 8 * pair).cast()));
                acc[2 * pair] = vmlal_s16(acc[2 * pair], vget_low_s16(keys), code);
                acc[2 * pair + 1] = vmlal_s16(acc[2 * pair + 1], vget_high_s16(keys), code);
            }
        }
        for (dot, acc) in dots.iter_mut().zip(acc) {
            *dot = vaddvq_s32(acc);
        }
    }
    dots
}

seldom!(["neon"] NEON);
attend_rows!(["neon"] Neon<false>: neon_f32, neon_f16, neon_i8, neon_i4);
attend_rows!(["neon,dotprod"] Neon<true>: dotprod_i8, dotprod_i4);
