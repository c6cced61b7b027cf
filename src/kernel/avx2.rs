//! AVX2 rows: VPMADDUBSW in 16 bits, widened once every 32 values of `k`.
//!
//! A raw byte would saturate the 16-bit sums, so fields are decoded first: for few rows of activations in registers
//! ([`super::x86_few`]), for many by [`super::x86`]. Eight steps of four products stay below 2^15 for nibbles
//! (8 * 2 * 15 * 127); for bytes the sign moves from the weight to the activation, which makes one pair at most 2 * 128 * 127.

use super::abi::MatmulArgs;
use super::layout::PANEL;
use super::x86::{self, PREFETCH, Simd, Tile, TileFn};
use super::x86_few::{self, RunFn, Stretch};
use std::arch::x86_64::*;

/// Vectors of 256 bits, with or without a dot of four bytes (AVX-VNNI).
pub(super) struct Ymm<const VNNI: bool>;

/// All bits in the lanes below `count`.
#[inline(always)]
unsafe fn first(count: usize) -> __m256i {
    // SAFETY: the caller vouches for the CPU.
    unsafe {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lanes)
    }
}

// Every function needs the features of the rows that call it.
#[rustfmt::skip] // one operation a line or two
impl<const VNNI: bool> Simd for Ymm<VNNI> {
    const LANES: usize = 8;
    type I = __m256i;
    type F = __m256;

    #[inline(always)]
    unsafe fn splat_byte(byte: u8) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_set1_epi8(byte.cast_signed()) }
    }
    #[inline(always)]
    unsafe fn splat(word: i32) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_set1_epi32(word) }
    }
    #[inline(always)]
    unsafe fn load(at: *const u8) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_loadu_si256(at.cast()) }
    }
    #[inline(always)]
    unsafe fn store(at: *mut u8, x: __m256i) {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_storeu_si256(at.cast(), x) }
    }
    #[inline(always)]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn xor(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_xor_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_sub_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn right_words<const N: u32>(a: __m256i) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_srl_epi16(a, _mm_cvtsi32_si128(N as i32)) }
    }
    #[inline(always)]
    unsafe fn left_words<const N: u32>(a: __m256i) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_sll_epi16(a, _mm_cvtsi32_si128(N as i32)) }
    }
    #[inline(always)]
    unsafe fn right<const N: u32>(a: __m256i) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_sra_epi32(a, _mm_cvtsi32_si128(N as i32)) }
    }
    #[inline(always)]
    unsafe fn dot(acc: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { 
            if VNNI {
                return _mm256_dpbusd_avx_epi32(acc, codes, x);
            }
            let pairs = _mm256_maddubs_epi16(codes, x);
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
         }
    }
    const SMALL: usize = if VNNI { i32::MAX } else { i16::MAX as i32 } as usize;
    #[inline(always)]
    unsafe fn small_dot(sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe {
            if VNNI {
                return Self::dot(sums, codes, x);
            }
            _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x))
        }
    }
    #[inline(always)]
    unsafe fn small_sum(sums: __m256i) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { if VNNI { sums } else { _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) } }
    }
    #[inline(always)]
    unsafe fn zeros(at: *const u8) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    unsafe fn less_zeros(dots: __m256i, zeros: __m256i, sum: i32) -> __m256i {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_sub_epi32(dots, _mm256_madd_epi16(zeros, _mm256_set1_epi16(sum as i16))) }
    }
    #[inline(always)]
    unsafe fn to_floats(a: __m256i) -> __m256 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn splat_float(x: f32) -> __m256 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn halves(at: *const u8) -> __m256 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_floats(at: *const f32, count: usize) -> __m256 {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_maskload_ps(at, first(count)) }
    }
    #[inline(always)]
    unsafe fn store_floats(at: *mut f32, x: __m256, count: usize) {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm256_maskstore_ps(at, first(count), x) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: the caller vouches for the memory and the CPU.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn walk<const R: usize, const FLIP: bool>(
        dots: &mut [[__m256i; 2]; R],
        codes: *const u8,
        x: &[*const u8; R],
        steps: usize,
        (mut ahead, pace): (*const u8, usize),
    ) {
        // SAFETY: the caller vouches for the codes and the activations of `steps` steps.
        unsafe {
            if VNNI {
                return x86::walk::<Self, R, FLIP>(dots, codes, x, steps, (ahead, pace));
            }
            let ones = _mm256_set1_epi16(1);
            for start in (0..steps).step_by(8) {
                let mut words = [[_mm256_setzero_si256(); 2]; R];
                for step in start..steps.min(start + 8) {
                    let at = codes.add(step * 128);
                    let codes = [Self::load(at), Self::load(at.add(32))];
                    if !ahead.is_null() {
                        Self::prefetch(ahead);
                        ahead = ahead.wrapping_add(pace);
                    }
                    for r in 0..R {
                        let x = Self::splat(x[r].add(step * 4).cast::<i32>().read_unaligned());
                        for v in 0..2 {
                            let pairs = _mm256_maddubs_epi16(codes[v], x);
                            words[r][v] = _mm256_add_epi16(words[r][v], pairs);
                        }
                    }
                }
                for r in 0..R {
                    for v in 0..2 {
                        let sums = _mm256_madd_epi16(words[r][v], ones);
                        dots[r][v] = _mm256_add_epi32(dots[r][v], sums);
                    }
                }
            }
        }
    }
}

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

/// Few rows, decoded in registers.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn few<const M: usize, const BITS: usize, const V: usize>(
    a: &MatmulArgs,
    s: &Stretch,
    first_row: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { x86_few::decoded::<Ymm<false>, M, BITS, V>(a, s, first_row) }
}

/// Bytes of a decoded panel.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const R: usize>(a: &MatmulArgs, t: &Tile, row: usize, run: usize) {
    // SAFETY: the caller's promise.
    unsafe { x86::tile::<Ymm<false>, R, false>(a, t, row, run) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode<const BITS: usize>(w: *const u8, steps: usize, out: *mut u8, apart: usize) {
    // SAFETY: the caller's promise.
    unsafe { x86::decode::<Ymm<false>, BITS>(w, steps, out, apart) }
}

const TILES: &[TileFn] = &[tile::<1>, tile::<2>, tile::<3>, tile::<4>];

/// Four bits.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe extern "C" fn matmul_q4(a: *const MatmulArgs) {
    const RUNS: &[RunFn] = &[few::<1, 4, 2>, few::<2, 4, 2>, few::<3, 4, 2>, few::<4, 4, 2>];
    // SAFETY: the caller vouches for the block.
    unsafe {
        match (*a).m {
            1..=8 => x86_few::few(&*a, RUNS),
            _ => x86::many(&*a, 4, decode::<4>, TILES, 16),
        }
    }
}

/// Three bits.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe extern "C" fn matmul_q3(a: *const MatmulArgs) {
    const RUNS: &[RunFn] = &[few::<1, 3, 4>, few::<2, 3, 4>, few::<3, 3, 4>];
    // SAFETY: the caller vouches for the block.
    unsafe {
        match (*a).m {
            1..=8 => x86_few::few(&*a, RUNS),
            _ => x86::many(&*a, 3, decode::<3>, TILES, 16),
        }
    }
}

/// Two bits.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe extern "C" fn matmul_q2(a: *const MatmulArgs) {
    const RUNS: &[RunFn] = &[few::<1, 2, 4>, few::<2, 2, 4>];
    // SAFETY: the caller vouches for the block.
    unsafe {
        match (*a).m {
            1..=16 => x86_few::few(&*a, RUNS),
            _ => x86::many(&*a, 2, decode::<2>, TILES, 16),
        }
    }
}

/// Signed bytes: `M` rows of activations against one panel.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8_panel<const M: usize>(a: &MatmulArgs, panel: usize, first_row: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        // As many quarters as have registers for their sums.
        match M {
            1 => q8_quarters::<M, 4>(a, panel, first_row),
            2 => q8_quarters::<M, 2>(a, panel, first_row),
            _ => q8_quarters::<M, 1>(a, panel, first_row),
        }
    }
}

/// The same, going through each group with `Q` quarters of the panel's outputs at a time.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn q8_quarters<const M: usize, const Q: usize>(
    a: &MatmulArgs,
    panel: usize,
    first_row: usize,
) {
    // SAFETY: every pointer stays inside the panel and the `M` activation rows from `first_row`,
    // which the caller vouches for; what is fetched need not exist.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let stride = a.panel_bytes / a.groups;
        let mut acc = [[_mm256_setzero_ps(); 4]; M];
        for g in 0..a.groups {
            let codes = a.w.add(panel * a.panel_bytes + g * stride);
            let tables = codes.add(a.group * 32);
            for first in (0..4).step_by(Q) {
                let mut dots = [[_mm256_setzero_si256(); Q]; M];
                for k in (0..a.group).step_by(4) {
                    // The two lines of a step, by the first who come by.
                    let ahead = codes.wrapping_add(PREFETCH + k * 32);
                    if first == 0 {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    }
                    if first == Q || Q == 4 {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64).cast());
                    }
                    for q in 0..Q {
                        let w = _mm256_loadu_si256(codes.add(k * 32 + (first + q) * 32).cast());
                        let magnitude = _mm256_abs_epi8(w);
                        for r in 0..M {
                            let x = a.x.add((first_row + r) * a.x_stride + g * a.group + k);
                            let signed = _mm256_sign_epi8(broadcast(x), w);
                            let pairs = _mm256_maddubs_epi16(magnitude, signed);
                            let sums = _mm256_madd_epi16(pairs, ones);
                            dots[r][q] = _mm256_add_epi32(dots[r][q], sums);
                        }
                    }
                }
                for r in 0..M {
                    let x_scale = _mm256_set1_ps(*a.x_scales.add((first_row + r) * a.groups + g));
                    for q in 0..Q {
                        let factor = _mm256_mul_ps(halves(tables.add((first + q) * 16)), x_scale);
                        let sum = &mut acc[r][first + q];
                        *sum = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(dots[r][q]), *sum);
                    }
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
    // SAFETY: every pointer stays inside the panel and the `M` activation rows from `first_row`,
    // which the caller vouches for.
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
