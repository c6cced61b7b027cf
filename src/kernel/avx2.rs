//! AVX2 rows: VPMADDUBSW in 16 bits, widened once every 32 values of `k`.
//!
//! A raw byte would saturate the 16-bit sums, so both nibbles are isolated here. Eight steps of four
//! products stay below 2^15 for nibbles (8 * 2 * 15 * 127); for bytes the sign moves from the weight
//! to the activation, which makes one pair at most 2 * 128 * 127.

use super::abi::MatmulArgs;
use super::layout::PANEL;
use std::arch::x86_64::*;

const HAS_ZERO: u8 = 1;
const HAS_MINIMUM: u8 = 2;

/// Eight f32 from eight f16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves(table: *const u8) -> __m256 {
    // SAFETY: the caller vouches for 16 bytes.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(table.cast())) }
}

/// Four activations in every lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn broadcast(x: *const u8) -> __m256i {
    // SAFETY: the caller vouches for 4 bytes.
    _mm256_set1_epi32(unsafe { x.cast::<i32>().read_unaligned() })
}

/// One group's scale and offset for the eight rows of `quarter`, applied to their dots.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scale_in<const KIND: u8>(
    acc: __m256,
    mut dots: __m256i,
    tables: *const u8,
    quarter: usize,
    x_scale: f32,
    sum: i32,
) -> __m256 {
    // SAFETY: the caller vouches for the tables of this group.
    unsafe {
        let x_scale = _mm256_set1_ps(x_scale);
        let offset = tables.wrapping_add(64 + quarter * 16);
        match KIND {
            HAS_ZERO => {
                let zero = _mm256_cvtepi16_epi32(_mm_loadu_si128(offset.cast()));
                dots = _mm256_sub_epi32(dots, _mm256_mullo_epi32(zero, _mm256_set1_epi32(sum)));
            }
            HAS_MINIMUM => {}
            _ => dots = _mm256_sub_epi32(dots, _mm256_set1_epi32(8 * sum)),
        }
        let factor = _mm256_mul_ps(halves(tables.add(quarter * 16)), x_scale);
        let acc = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(dots), acc);
        if KIND == HAS_MINIMUM {
            let factor = _mm256_mul_ps(halves(offset), x_scale);
            _mm256_fmadd_ps(factor, _mm256_set1_ps(sum as f32), acc)
        } else {
            acc
        }
    }
}

/// Four bits: `M` rows of activations against one panel. The two halves of a line (rows 0 to 7 and
/// 16 to 23, rows 8 to 15 and 24 to 31) are walked one after the other: both would not fit sixteen
/// registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q4_panel<const M: usize, const KIND: u8>(a: &MatmulArgs, panel: usize, first_row: usize) {
    // SAFETY: every pointer stays inside the panel and the `M` activation rows from `first_row`,
    // which the caller vouches for.
    unsafe {
        let mask = _mm256_set1_epi8(15);
        let flip = _mm256_set1_epi8(-128);
        let ones = _mm256_set1_epi16(1);
        let stride = a.panel_bytes / a.groups;
        let mut acc = [[_mm256_setzero_ps(); 4]; M];
        for g in 0..a.groups {
            let codes = a.w.add(panel * a.panel_bytes + g * stride);
            let tables = codes.add(a.group * 16);
            for half in 0..2 {
                let mut low = [_mm256_setzero_si256(); M];
                let mut high = [_mm256_setzero_si256(); M];
                for first in (0..a.group).step_by(32) {
                    let mut low16 = [_mm256_setzero_si256(); M];
                    let mut high16 = [_mm256_setzero_si256(); M];
                    for k in (first..a.group.min(first + 32)).step_by(4) {
                        let line = _mm256_loadu_si256(codes.add(k * 16 + half * 32).cast());
                        let line = _mm256_xor_si256(line, flip);
                        let lows = _mm256_and_si256(line, mask);
                        let highs = _mm256_and_si256(_mm256_srli_epi16::<4>(line), mask);
                        for r in 0..M {
                            let x = a.x.add((first_row + r) * a.x_stride + g * a.group + k);
                            let x = broadcast(x);
                            low16[r] = _mm256_add_epi16(low16[r], _mm256_maddubs_epi16(lows, x));
                            high16[r] = _mm256_add_epi16(high16[r], _mm256_maddubs_epi16(highs, x));
                        }
                    }
                    for r in 0..M {
                        low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(low16[r], ones));
                        high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(high16[r], ones));
                    }
                }
                for r in 0..M {
                    let x_scale = *a.x_scales.add((first_row + r) * a.groups + g);
                    let sum = *a.x_sums.add((first_row + r) * a.groups + g);
                    for (quarter, dots) in [(half, low[r]), (2 + half, high[r])] {
                        acc[r][quarter] =
                            scale_in::<KIND>(acc[r][quarter], dots, tables, quarter, x_scale, sum);
                    }
                }
            }
        }
        finish(a, panel, first_row, acc);
    }
}

/// Signed bytes: `M` rows of activations against one panel.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8_panel<const M: usize>(a: &MatmulArgs, panel: usize, first_row: usize) {
    // SAFETY: as in `q4_panel`.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let stride = a.panel_bytes / a.groups;
        let mut acc = [[_mm256_setzero_ps(); 4]; M];
        for g in 0..a.groups {
            let codes = a.w.add(panel * a.panel_bytes + g * stride);
            let tables = codes.add(a.group * 32);
            for quarter in 0..4 {
                let mut dots = [_mm256_setzero_si256(); M];
                for k in (0..a.group).step_by(4) {
                    let w = _mm256_loadu_si256(codes.add(k * 32 + quarter * 32).cast());
                    let magnitude = _mm256_abs_epi8(w);
                    for r in 0..M {
                        let x = a.x.add((first_row + r) * a.x_stride + g * a.group + k);
                        let signed = _mm256_sign_epi8(broadcast(x), w);
                        let pairs = _mm256_maddubs_epi16(magnitude, signed);
                        dots[r] = _mm256_add_epi32(dots[r], _mm256_madd_epi16(pairs, ones));
                    }
                }
                for r in 0..M {
                    let x_scale = *a.x_scales.add((first_row + r) * a.groups + g);
                    let factor =
                        _mm256_mul_ps(halves(tables.add(quarter * 16)), _mm256_set1_ps(x_scale));
                    acc[r][quarter] =
                        _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(dots[r]), acc[r][quarter]);
                }
            }
        }
        finish(a, panel, first_row, acc);
    }
}

/// Floats of `BYTES` bytes each: `M` rows of activations against one panel.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float_panel<const M: usize, const BYTES: usize, const BRAIN: bool>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
) {
    // SAFETY: as in `q4_panel`.
    unsafe {
        let mut w = a.w.add(panel * a.panel_bytes);
        let mut acc = [[_mm256_setzero_ps(); 4]; M];
        for k in 0..a.groups {
            for quarter in 0..4 {
                let at = w.add(quarter * 8 * BYTES);
                let weights = match (BYTES, BRAIN) {
                    (4, _) => _mm256_loadu_ps(at.cast()),
                    (_, false) => halves(at),
                    (_, true) => {
                        let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
                    }
                };
                for r in 0..M {
                    let x = *a.x.cast::<f32>().add((first_row + r) * a.x_stride + k);
                    acc[r][quarter] = _mm256_fmadd_ps(weights, _mm256_set1_ps(x), acc[r][quarter]);
                }
            }
            w = w.add(PANEL * BYTES);
        }
        finish(a, panel, first_row, acc);
    }
}

/// Writes the outputs of `M` activation rows, or as many of a row as are left.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn finish<const M: usize>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
    acc: [[__m256; 4]; M],
) {
    let count = PANEL.min(a.n - panel * PANEL);
    for (r, acc) in acc.into_iter().enumerate() {
        let mut outputs = [0.0_f32; PANEL];
        // SAFETY: 32 floats on the stack; then `count` of the outputs that the caller vouches for.
        unsafe {
            for (quarter, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(outputs.as_mut_ptr().add(quarter * 8), acc);
            }
            let y = a.y.add((first_row + r) * a.y_stride + panel * PANEL);
            std::ptr::copy_nonoverlapping(outputs.as_ptr(), y, count);
        }
    }
}

super::exact_m! {
    [#[target_feature(enable = "avx2,fma,f16c")]] 4;
    /// Four bits, symmetric.
    matmul_q4 = q4_panel[0];
    /// Four bits with a zero point.
    matmul_q4z = q4_panel[HAS_ZERO];
    /// Four bits with a minimum.
    matmul_q4m = q4_panel[HAS_MINIMUM];
    /// Signed bytes.
    matmul_q8 = q8_panel[];
    /// f32 weights.
    matmul_f32 = float_panel[4, false];
    /// f16 weights.
    matmul_f16 = float_panel[2, false];
    /// bf16 weights.
    matmul_bf16 = float_panel[2, true];
}

super::ops::instantiate!("avx2,fma,f16c");
