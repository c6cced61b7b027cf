//! Vectors of the attention rows for AVX2 and AVX-512.
//!
//! Integer dots: VPDPBUSD wants one factor unsigned, so keys are made unsigned by one XOR a line and what
//! that adds is taken off where the accumulators start; the two bytes of a query code have dots of
//! their own. AVX2 widens keys to 16 bits and multiplies them by whole codes. Both are exact.

use super::attend::{Codes, F16, F32, Floats, Rows, Seldom, Simd, attend_rows, fetch, seldom};
use super::avx512::sixteen_halves;
use super::ops::LANES;
use std::arch::x86_64::*;

pub(super) struct Avx2;
pub(super) struct Avx512;

impl Simd for Avx2 {
    type V = __m256;
    const WIDTH: usize = 8;
    const ROWS: usize = 2;
    const SELDOM: Seldom = AVX2;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: the caller vouches for eight floats and the features.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m256) {
        // SAFETY: the caller vouches for eight floats and the features.
        unsafe { _mm256_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn load_i32(from: *const i32) -> __m256 {
        // SAFETY: the caller vouches for eight integers and the features.
        unsafe { _mm256_cvtepi32_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn any_above(a: __m256, b: __m256) -> bool {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) != 0 }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> __m256 {
        // SAFETY: the caller vouches for eight halves and the features.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> __m256 {
        // SAFETY: the caller vouches for eight bytes and the features.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_i4(from: *const u8, high: bool) -> __m256 {
        // SAFETY: the caller vouches for eight bytes and the features.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            let bytes = if high { _mm256_srli_epi32::<4>(bytes) } else { bytes };
            let codes = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
            _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)))
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
        let mut dots = Rows([[0; LANES]; R]);
        // SAFETY: the caller vouches for `16 * d` key codes, the query codes (whole ones from `2 * d` on)
        // and the features.
        unsafe {
            let mut acc = [[_mm256_setzero_si256(); 4]; R];
            for i in (0..d).step_by(4) {
                fetch::<Self>(ahead, LANES * i);
                let code: [_; R] = std::array::from_fn(|r| {
                    _mm256_set1_epi64x(q[r].add(2 * d + 2 * i).cast::<i64>().read_unaligned())
                });
                for part in 0..4 {
                    // Four positions of four codes each.
                    let keys = _mm_loadu_si128(k.add(16 * i + 16 * part).cast());
                    let keys = _mm256_cvtepi8_epi16(keys);
                    for r in 0..R {
                        let products = _mm256_madd_epi16(keys, code[r]);
                        acc[r][part] = _mm256_add_epi32(acc[r][part], products);
                    }
                }
            }
            for r in 0..R {
                for half in 0..2 {
                    // Two sums a position; adding neighbours leaves the positions as 0 1 4 5 2 3 6 7.
                    let sums = _mm256_hadd_epi32(acc[r][2 * half], acc[r][2 * half + 1]);
                    let sums = _mm256_permute4x64_epi64::<0b11_01_10_00>(sums);
                    _mm256_storeu_si256(dots.0[r].as_mut_ptr().add(8 * half).cast(), sums);
                }
            }
        }
        dots
    }

    #[inline(always)]
    unsafe fn prefetch(line: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }
}

impl Simd for Avx512 {
    type V = __m512;
    const WIDTH: usize = 16;
    const ROWS: usize = 4;
    const SELDOM: Seldom = AVX512;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller vouches for the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for sixteen floats and the features.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m512) {
        // SAFETY: the caller vouches for sixteen floats and the features.
        unsafe { _mm512_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn load_i32(from: *const i32) -> __m512 {
        // SAFETY: the caller vouches for sixteen integers and the features.
        unsafe { _mm512_cvtepi32_ps(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn any_above(a: __m512, b: __m512) -> bool {
        // SAFETY: the caller vouches for the features.
        unsafe {
            // Miri compares eight at a time.
            if cfg!(miri) {
                let low = Avx2::any_above(_mm512_castps512_ps256(a), _mm512_castps512_ps256(b));
                let high = [a, b].map(|v| _mm512_extractf32x8_ps::<1>(v));
                return low || Avx2::any_above(high[0], high[1]);
            }
            _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> __m512 {
        // SAFETY: the caller vouches for sixteen halves and the features.
        unsafe { sixteen_halves(from) }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> __m512 {
        // SAFETY: the caller vouches for sixteen bytes and the features.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_i4(from: *const u8, high: bool) -> __m512 {
        // SAFETY: the caller vouches for sixteen bytes and the features.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            let codes = if high { _mm512_srli_epi32::<4>(bytes) } else { bytes };
            // Miri has no such permutation.
            if cfg!(miri) {
                let nibbles = _mm512_and_si512(codes, _mm512_set1_epi32(15));
                return _mm512_cvtepi32_ps(_mm512_sub_epi32(nibbles, _mm512_set1_epi32(8)));
            }
            // The permutation looks at the low four bits alone.
            let values = _mm512_setr_ps(
                -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0,
                7.0,
            );
            _mm512_permutexvar_ps(codes, values)
        }
    }

    #[inline(always)]
    unsafe fn dots<const R: usize>(
        k: *const u8,
        d: usize,
        q: [*const i8; R],
        sums: [i32; R],
        ahead: *const u8,
    ) -> Rows<i32, R> {
        let mut dots = Rows([[0; LANES]; R]);
        // SAFETY: the caller vouches for `16 * d` key codes, the query codes and the features.
        unsafe {
            let flip = _mm512_set1_epi8(-128);
            let mut high = [_mm512_setzero_si512(); R];
            // Takes off what 128 more in every key adds. Whatever overflows on the way, the end fits.
            let mut low = sums.map(|sum| _mm512_set1_epi32(sum.wrapping_mul(-128)));
            for i in (0..d).step_by(4) {
                fetch::<Self>(ahead, LANES * i);
                let keys = _mm512_xor_si512(_mm512_loadu_si512(k.add(16 * i).cast()), flip);
                for r in 0..R {
                    let codes = _mm512_set1_epi32(q[r].add(i).cast::<i32>().read_unaligned());
                    high[r] = _mm512_dpbusd_epi32(high[r], keys, codes);
                    let codes = _mm512_set1_epi32(q[r].add(d + i).cast::<i32>().read_unaligned());
                    low[r] = _mm512_dpbusd_epi32(low[r], keys, codes);
                }
            }
            for r in 0..R {
                let whole = _mm512_add_epi32(_mm512_slli_epi32::<7>(high[r]), low[r]);
                _mm512_storeu_si512(dots.0[r].as_mut_ptr().cast(), whole);
            }
        }
        dots
    }

    #[inline(always)]
    unsafe fn prefetch(line: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }
}

seldom!(["avx2,fma,f16c"] AVX2);
seldom!(["avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"] AVX512);
attend_rows!(["avx2,fma,f16c"] Avx2: avx2_f32, avx2_f16, avx2_i8, avx2_i4);
attend_rows!(["avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"]
    Avx512: avx512_f32, avx512_f16, avx512_i8, avx512_i4);
