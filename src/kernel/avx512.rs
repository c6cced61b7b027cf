//! AVX-512 VNNI rows: VPDPBUSD with the activations broadcast from memory.
//!
//! VPDPBUSD multiplies unsigned by signed bytes, so the weights are made unsigned by one XOR a line
//! and what that adds is taken off again where the accumulators start, which costs nothing. The two
//! rows of a nibble pair are had from the raw byte and the masked byte: `high = (raw - low) / 16`,
//! exact, once a group. On x86 the scales' conversion (F16C) is exact as well.

use super::abi::MatmulArgs;
use super::layout::PANEL;
use std::arch::x86_64::*;

/// How far ahead of the dots the weights are fetched: about the latency of memory at the pace of
/// one row of activations.
const PREFETCH: usize = 2048;

const HAS_ZERO: u8 = 1;
const HAS_MINIMUM: u8 = 2;

/// The two f32 halves of a table of 32 f16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn halves(table: *const u8) -> [__m512; 2] {
    // SAFETY: the caller vouches for 64 bytes.
    unsafe {
        [
            _mm512_cvtph_ps(_mm256_loadu_si256(table.cast())),
            _mm512_cvtph_ps(_mm256_loadu_si256(table.add(32).cast())),
        ]
    }
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

/// Four bits: `M` rows of activations against one panel; each line is unpacked once for all of them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn q4_panel<const M: usize, const KIND: u8>(a: &MatmulArgs, panel: usize, first_row: usize) {
    // SAFETY: every pointer stays inside the panel and the `M` activation rows from `first_row`,
    // which the caller vouches for.
    unsafe {
        let mask = _mm512_set1_epi8(15);
        let flip = _mm512_set1_epi8(-128);
        let mut w = a.w.add(panel * a.panel_bytes);
        let x: [*const u8; M] = std::array::from_fn(|r| a.x.add((first_row + r) * a.x_stride));
        let scales: [*const f32; M] =
            std::array::from_fn(|r| a.x_scales.add((first_row + r) * a.groups));
        let sums: [*const i32; M] =
            std::array::from_fn(|r| a.x_sums.add((first_row + r) * a.groups));
        let mut acc = [[_mm512_setzero_ps(); 2]; M];
        for g in 0..a.groups {
            // Symmetric weights start at minus eight times the sum: 8 for the low row, and for the
            // raw byte 16 * 8 + 8.
            let mut low: [__m512i; M] = std::array::from_fn(|r| {
                if KIND == 0 {
                    _mm512_set1_epi32(*sums[r].add(g) * -8)
                } else {
                    _mm512_setzero_si512()
                }
            });
            let mut raw: [__m512i; M] = std::array::from_fn(|r| {
                if KIND == 0 {
                    _mm512_set1_epi32(*sums[r].add(g) * -136)
                } else {
                    _mm512_setzero_si512()
                }
            });
            // The dots of one row are too few to hide the latency of each: odd lines get accumulators
            // of their own. Integer sums do not mind the order.
            let mut odd = [[_mm512_setzero_si512(); 2]; M];
            for step in (0..a.group).step_by(8) {
                for half in 0..2 {
                    let line = _mm512_loadu_si512(w.cast());
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(PREFETCH).cast());
                    w = w.add(64);
                    let masked = _mm512_and_si512(line, mask);
                    let whole = _mm512_xor_si512(line, flip);
                    for r in 0..M {
                        let four = x[r].add(g * a.group + step + half * 4);
                        let four = _mm512_set1_epi32(four.cast::<i32>().read_unaligned());
                        if M == 1 && half == 1 {
                            odd[r][0] = _mm512_dpbusd_epi32(odd[r][0], whole, four);
                            odd[r][1] = _mm512_dpbusd_epi32(odd[r][1], masked, four);
                        } else {
                            raw[r] = _mm512_dpbusd_epi32(raw[r], whole, four);
                            low[r] = _mm512_dpbusd_epi32(low[r], masked, four);
                        }
                    }
                }
            }
            if M == 1 {
                for r in 0..M {
                    raw[r] = _mm512_add_epi32(raw[r], odd[r][0]);
                    low[r] = _mm512_add_epi32(low[r], odd[r][1]);
                }
            }
            let scale = halves(w);
            let offset = w.add(64);
            w = offset.add(if KIND == 0 { 0 } else { 64 });
            for r in 0..M {
                let x_scale = _mm512_set1_ps(*scales[r].add(g));
                let sum = *sums[r].add(g);
                let mut dots = [low[r], _mm512_srai_epi32::<4>(_mm512_sub_epi32(raw[r], low[r]))];
                if KIND == HAS_ZERO {
                    for half in 0..2 {
                        let zero = _mm256_loadu_si256(offset.add(half * 32).cast());
                        let zero = _mm512_cvtepi16_epi32(zero);
                        let product = _mm512_mullo_epi32(zero, _mm512_set1_epi32(sum));
                        dots[half] = _mm512_sub_epi32(dots[half], product);
                    }
                }
                for half in 0..2 {
                    let factor = _mm512_mul_ps(scale[half], x_scale);
                    acc[r][half] =
                        _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(dots[half]), acc[r][half]);
                }
                if KIND == HAS_MINIMUM {
                    let minimum = halves(offset);
                    let sum = _mm512_cvtepi32_ps(_mm512_set1_epi32(sum));
                    for half in 0..2 {
                        let factor = _mm512_mul_ps(minimum[half], x_scale);
                        acc[r][half] = _mm512_fmadd_ps(factor, sum, acc[r][half]);
                    }
                }
            }
        }
        finish(a, panel, first_row, acc);
    }
}

/// Signed bytes: `M` rows of activations against one panel.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn q8_panel<const M: usize>(a: &MatmulArgs, panel: usize, first_row: usize) {
    // SAFETY: as in `q4_panel`.
    unsafe {
        let flip = _mm512_set1_epi8(-128);
        let mut w = a.w.add(panel * a.panel_bytes);
        let x: [*const u8; M] = std::array::from_fn(|r| a.x.add((first_row + r) * a.x_stride));
        let mut acc = [[_mm512_setzero_ps(); 2]; M];
        for g in 0..a.groups {
            let mut dots: [[__m512i; 2]; M] = std::array::from_fn(|r| {
                let sum = *a.x_sums.add((first_row + r) * a.groups + g);
                [_mm512_set1_epi32(sum * -128); 2]
            });
            for step in 0..a.group / 4 {
                let low = _mm512_xor_si512(_mm512_loadu_si512(w.cast()), flip);
                let high = _mm512_xor_si512(_mm512_loadu_si512(w.add(64).cast()), flip);
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(PREFETCH).cast());
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(PREFETCH + 64).cast());
                w = w.add(128);
                for r in 0..M {
                    let four = x[r].add(g * a.group + step * 4).cast::<i32>().read_unaligned();
                    let four = _mm512_set1_epi32(four);
                    dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], low, four);
                    dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], high, four);
                }
            }
            let scale = halves(w);
            w = w.add(64);
            for r in 0..M {
                let x_scale = _mm512_set1_ps(*a.x_scales.add((first_row + r) * a.groups + g));
                for half in 0..2 {
                    let factor = _mm512_mul_ps(scale[half], x_scale);
                    let dot = _mm512_cvtepi32_ps(dots[r][half]);
                    acc[r][half] = _mm512_fmadd_ps(factor, dot, acc[r][half]);
                }
            }
        }
        finish(a, panel, first_row, acc);
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
    // SAFETY: as in `q4_panel`.
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

super::ops::instantiate!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c");
