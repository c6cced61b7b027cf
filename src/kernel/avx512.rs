//! AVX-512 VNNI rows: VPDPBUSD with the activations broadcast from memory.
//!
//! The products of codes are those of [`super::vnni`] and [`super::x86`] at sixteen lanes, so a line is one
//! vector. The conversion of the scales (F16C) is exact.

use super::abi::MatmulArgs;
use super::layout::PANEL;
use std::arch::x86_64::*;

/// How far ahead of their use floats are fetched.
const PREFETCH: usize = 2048;

/// Vectors of 512 bits.
struct Zmm;

/// The lanes below `count`.
fn first(count: usize) -> u16 {
    (0xffff_u32 >> (16 - count.min(16))) as u16
}

/// Sixteen halves as floats. The form without a rounding mode of its own takes them from memory, which is one
/// operation of the vector ports less.
///
/// # Safety
/// There are sixteen at `at`; the CPU has F16C, AVX-512 F and DQ.
#[inline(always)]
pub(super) unsafe fn sixteen_halves(at: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        // Miri knows the conversion of eight alone.
        if cfg!(miri) {
            let [low, high] =
                [0, 16].map(|byte| _mm256_cvtph_ps(_mm_loadu_si128(at.add(byte).cast())));
            return _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high);
        }
        _mm512_cvt_roundph_ps::<_MM_FROUND_CUR_DIRECTION>(_mm256_loadu_si256(at.cast()))
    }
}

// Every function needs the features of this file's rows, which are all that call them.
#[rustfmt::skip] // one operation a line or two
impl x86::Simd for Zmm {
    const LANES: usize = 16;
    type I = __m512i;
    type F = __m512;

    #[inline(always)]
    unsafe fn splat_byte(byte: u8) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_set1_epi8(byte.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn splat(word: i32) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_set1_epi32(word) }
    }
    #[inline(always)]
    unsafe fn load(at: *const u8) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_loadu_si512(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store(at: *mut u8, x: __m512i) {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_storeu_si512(at.cast(), x) }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn xor(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_sub_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn right_words<const N: u32>(a: __m512i) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_srli_epi16::<N>(a) }
    }
    #[inline(always)]
    unsafe fn left_words<const N: u32>(a: __m512i) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_slli_epi16::<N>(a) }
    }
    #[inline(always)]
    unsafe fn right<const N: u32>(a: __m512i) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_srai_epi32::<N>(a) }
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512i, codes: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_dpbusd_epi32(acc, codes, x) }
    }
    const SMALL: usize = i32::MAX as usize;
    #[inline(always)]
    unsafe fn small_dot(sums: __m512i, codes: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { Self::dot(sums, codes, x) }
    }
    #[inline(always)]
    unsafe fn small_sum(sums: __m512i) -> __m512i {
        sums
    }
    #[inline(always)]
    unsafe fn zeros(at: *const u8) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast())) }
    }
    #[inline(always)]
    unsafe fn less_zeros(dots: __m512i, zeros: __m512i, sum: i32) -> __m512i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe {
            let less = _mm512_set1_epi16(-sum as i16);
            // Miri knows the two operations, but not the one.
            if cfg!(miri) { return _mm512_add_epi32(dots, _mm512_madd_epi16(zeros, less)); }
            _mm512_dpwssd_epi32(dots, zeros, less)
        }
    }
    #[inline(always)]
    unsafe fn to_floats(a: __m512i) -> __m512 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn splat_float(x: f32) -> __m512 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn halves(at: *const u8) -> __m512 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { sixteen_halves(at) }
    }
    #[inline(always)]
    unsafe fn load_floats(at: *const f32, count: usize) -> __m512 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_maskz_loadu_ps(first(count), at) }
    }
    #[inline(always)]
    unsafe fn store_floats(at: *mut f32, x: __m512, count: usize) {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm512_mask_storeu_ps(at, first(count), x) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

/// The two f32 halves of a table of 32 f16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn halves(table: *const u8) -> [__m512; 2] {
    // SAFETY: the caller vouches for 64 bytes.
    unsafe { [sixteen_halves(table), sixteen_halves(table.add(32))] }
}

/// Stores the 32 outputs of one activation row, or as many as are left.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn store(y: *mut f32, acc: [__m512; 2], count: usize) {
    let low = if count >= 16 { !0 } else { (1_u16 << count) - 1 };
    let high = if count >= 32 { !0 } else { (1_u16 << count.saturating_sub(16)) - 1 };
    // SAFETY: the masks cover `count` floats, which the caller vouches for; masked lanes are not
    // touched.
    unsafe {
        _mm512_mask_storeu_ps(y, low, acc[0]);
        _mm512_mask_storeu_ps(y.wrapping_add(16), high, acc[1]);
    }
}

/// Floats of `BYTES` bytes each: `M` rows of activations against one panel.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn float_panel<const M: usize, const BYTES: usize, const BRAIN: bool>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
) {
    // SAFETY: every pointer stays inside the panel and the `M` activation rows from `first_row`,
    // which the caller vouches for.
    unsafe {
        let mut w = a.w.add(panel * a.panel_bytes);
        let x: [*const f32; M] =
            std::array::from_fn(|r| a.x.cast::<f32>().add((first_row + r) * a.x_stride));
        let mut acc = [[_mm512_setzero_ps(); 2]; M];
        for k in 0..a.groups {
            let weights = match (BYTES, BRAIN) {
                (4, _) => [_mm512_loadu_ps(w.cast()), _mm512_loadu_ps(w.add(64).cast())],
                (_, false) => halves(w),
                (_, true) => std::array::from_fn(|half| {
                    let words = _mm256_loadu_si256(w.add(half * 32).cast());
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
                }),
            };
            _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(PREFETCH).cast());
            w = w.add(PANEL * BYTES);
            for r in 0..M {
                let x = _mm512_set1_ps(*x[r].add(k));
                acc[r][0] = _mm512_fmadd_ps(weights[0], x, acc[r][0]);
                acc[r][1] = _mm512_fmadd_ps(weights[1], x, acc[r][1]);
            }
        }
        finish(a, panel, first_row, acc);
    }
}

/// Writes the outputs of `M` activation rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn finish<const M: usize>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
    acc: [[__m512; 2]; M],
) {
    let count = PANEL.min(a.n - panel * PANEL);
    for (r, acc) in acc.into_iter().enumerate() {
        // SAFETY: the caller vouches for `n` outputs of every row; `count` ends at `n`.
        unsafe { store(a.y.add((first_row + r) * a.y_stride + panel * PANEL), acc, count) };
    }
}

super::exact_m! {
    [#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]] 8;
    /// f32 weights.
    matmul_f32 = float_panel[4, false];
    /// f16 weights.
    matmul_f16 = float_panel[2, false];
    /// bf16 weights.
    matmul_bf16 = float_panel[2, true];
}

super::vnni::entries!(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c",
    Zmm,
    [1, 2, 3, 4, 5, 6, 7, 8],
    32,
    [1, 2, 3, 4, 5],
    32,
    // More would not fit the registers, with an accumulator for every sum of a group.
    [1, 2, 3, 4, 5, 6]
);

super::ops::instantiate!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c");
