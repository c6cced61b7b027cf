//! Attention of query rows over one KV block: the walk, written once for every format and instruction set.
//!
//! A chunk of 16 positions is the unit of everything: its scores are one vector of 16, the running maximum
//! moves on once for it, its weights are summed lane by lane. Keys and values of a chunk are loaded and
//! widened once for all query rows that see the same positions of it, which in decoding are the heads of a
//! group, so that reading the cache costs what its bytes cost. An instruction set gives the vectors
//! ([`Simd`]), a format says how its elements become floats ([`Elements`]); the order of every operation is
//! here and the same for all (`docs/numerics.md`).

use super::abi::AttendArgs;
use super::fused::fused_lanes;
use super::ops::{LANES, Lanes, exp_down, soft_cap};
use std::marker::PhantomData;

/// Chunks between the one at work and the one that is fetched: about the latency of memory.
const AHEAD: usize = 2;

/// Lanes of query rows. At cache lines, since a vector that lies across two of them cannot be read back
/// before it is in the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Rows<T, const R: usize>(pub(super) [[T; LANES]; R]);

/// Vectors of one instruction set. All methods are unsafe for the features they need and for the memory
/// behind their pointers.
pub(super) trait Simd {
    /// `WIDTH` floats.
    type V: Copy;
    /// 4, 8 or 16.
    const WIDTH: usize;
    /// Query rows that share a load: as many as leave their sums in registers.
    const ROWS: usize;
    /// What a chunk seldom needs.
    const SELDOM: Seldom;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// Integers as floats.
    unsafe fn load_i32(from: *const i32) -> Self::V;
    /// Whether any lane of `a` is larger than that of `b`.
    unsafe fn any_above(a: Self::V, b: Self::V) -> bool;
    /// Halves as floats.
    unsafe fn load_f16(from: *const u8) -> Self::V;
    /// Signed bytes as floats.
    unsafe fn load_i8(from: *const u8) -> Self::V;
    /// The low or high nibbles of bytes, less 8, as floats.
    unsafe fn load_i4(from: *const u8, high: bool) -> Self::V;
    /// The dots of 16 keys (`[d / 4][16][4]`) with rows of query codes (`AttendArgs::q_codes`), whose sums
    /// are at hand. Meanwhile as many bytes are fetched from `ahead`, if that is somewhere.
    unsafe fn dots<const R: usize>(
        k: *const u8,
        d: usize,
        q: [*const i8; R],
        sums: [i32; R],
        ahead: *const u8,
    ) -> Rows<i32, R>;
    /// Fetches a line, on x86 into the second cache: the first can wait for few lines at a time, and a fetch that finds
    /// no place among them holds up everything behind it.
    unsafe fn prefetch(line: *const u8);

    /// `acc[j] += q[j] * k[j]`.
    #[inline(always)]
    unsafe fn fma4(acc: &mut [Self::V; 4], k: [Self::V; 4], q: *const f32) {
        for j in 0..4 {
            // SAFETY: the caller vouches for four floats and the features.
            unsafe { acc[j] = Self::fma(Self::splat(*q.add(j)), k[j], acc[j]) };
        }
    }
}

/// Steps that few chunks take, compiled once for an instruction set: in the loops of every format and number of rows they were
/// a fifth of the code.
pub(super) struct Seldom {
    /// [`cap`].
    pub(super) cap: unsafe fn(&mut Lanes, f32),
    /// [`raise`].
    pub(super) raise: unsafe fn(&AttendArgs, usize, &[f32]),
}

/// Caps the scores of a row softly.
#[inline(always)]
pub(super) fn cap(scores: &mut Lanes, softcap: f32) {
    scores.iter_mut().for_each(|score| *score = soft_cap(*score, softcap));
}

/// Moves the maximum of a row on to the largest of `scores`, if that is larger.
///
/// # Safety
/// The pointers of `a` cover the row.
#[inline(always)]
pub(super) unsafe fn raise(a: &AttendArgs, row: usize, scores: &[f32]) {
    // SAFETY: the caller vouches for the row.
    unsafe {
        let max = &mut *a.max.add(row);
        let top = scores.iter().fold(*max, |top, score| if *score > top { *score } else { top });
        // Multiplying by one changes nothing, so only a new maximum needs the rescale.
        if top > *max {
            let shrink = exp_down(*max - top);
            let sum = std::slice::from_raw_parts_mut(a.sum.add(row * LANES), LANES);
            let acc = std::slice::from_raw_parts_mut(a.acc.add(row * a.d), a.d);
            sum.iter_mut().for_each(|x| *x *= shrink);
            acc.iter_mut().for_each(|x| *x *= shrink);
            *max = top;
        }
    }
}

/// How the elements of a block lie and become floats.
pub(super) trait Elements {
    /// Bytes of 16 keys.
    fn key_chunk(d: usize) -> usize;
    /// Bytes of a value.
    fn value_row(d: usize) -> usize;
    /// Whether 16 scales, f32, follow each chunk of keys and of values.
    const SCALED: bool;

    /// The dots of 16 keys with `R` query rows, not yet multiplied by the scale of attention.
    unsafe fn scores<S: Simd, const R: usize>(
        a: &AttendArgs,
        k: *const u8,
        row: usize,
        ahead: *const u8,
    ) -> Rows<f32, R>;

    /// Columns `column..column + WIDTH` of a value.
    unsafe fn value<S: Simd>(row: *const u8, column: usize) -> S::V;
}

/// Fetches the line that lies `at` bytes after `ahead`, if that is somewhere.
#[inline(always)]
pub(super) unsafe fn fetch<S: Simd>(ahead: *const u8, at: usize) {
    if !ahead.is_null() {
        // SAFETY: the caller vouches for the features; a prefetch never faults.
        unsafe { S::prefetch(ahead.wrapping_add(at)) };
    }
}

/// Elements that are floats already, or become floats one by one.
pub(super) trait Float {
    const BYTES: usize;
    unsafe fn load<S: Simd>(from: *const u8) -> S::V;
}

pub(super) struct F32;
pub(super) struct F16;

impl Float for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::V {
        // SAFETY: the caller vouches for the floats and the features.
        unsafe { S::load(from.cast()) }
    }
}

impl Float for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const u8) -> S::V {
        // SAFETY: the caller vouches for the halves and the features.
        unsafe { S::load_f16(from) }
    }
}

/// Keys `[d][16]` and values `[16][d]` of floats.
pub(super) struct Floats<T>(PhantomData<T>);

impl<T: Float> Elements for Floats<T> {
    const SCALED: bool = false;

    #[inline(always)]
    fn key_chunk(d: usize) -> usize {
        LANES * d * T::BYTES
    }

    #[inline(always)]
    fn value_row(d: usize) -> usize {
        d * T::BYTES
    }

    /// Four partial sums over `d` modulo 4, so that the chain of dependent additions is a quarter as long.
    #[inline(always)]
    unsafe fn scores<S: Simd, const R: usize>(
        a: &AttendArgs,
        k: *const u8,
        row: usize,
        ahead: *const u8,
    ) -> Rows<f32, R> {
        let line = LANES * T::BYTES;
        let mut dots = Rows([[0.0; LANES]; R]);
        // SAFETY: the caller vouches for a chunk of keys, `R` query rows from `row`, and the features.
        unsafe {
            for part in (0..LANES).step_by(S::WIDTH) {
                let mut partial = [[S::splat(0.0); 4]; R];
                for i in (0..a.d).step_by(4) {
                    if part == 0 {
                        for at in 0..T::BYTES {
                            fetch::<S>(ahead, i * line + at * 64);
                        }
                    }
                    let from = k.add(i * line + part * T::BYTES);
                    let keys = std::array::from_fn(|j| T::load::<S>(from.add(j * line)));
                    for r in 0..R {
                        S::fma4(&mut partial[r], keys, a.q.add((row + r) * a.d + i));
                    }
                }
                for r in 0..R {
                    let [p0, p1, p2, p3] = partial[r];
                    let sum = S::add(S::add(p0, p1), S::add(p2, p3));
                    S::store(dots.0[r].as_mut_ptr().add(part), sum);
                }
            }
        }
        dots
    }

    #[inline(always)]
    unsafe fn value<S: Simd>(row: *const u8, column: usize) -> S::V {
        // SAFETY: the caller vouches for the columns and the features.
        unsafe { T::load::<S>(row.add(column * T::BYTES)) }
    }
}

/// Eight-bit keys, and values of eight bits or, with `FOUR`, of four.
pub(super) struct Codes<const FOUR: bool>;

impl<const FOUR: bool> Elements for Codes<FOUR> {
    const SCALED: bool = true;

    #[inline(always)]
    fn key_chunk(d: usize) -> usize {
        LANES * d
    }

    #[inline(always)]
    fn value_row(d: usize) -> usize {
        if FOUR { d.div_ceil(32) * 16 } else { d }
    }

    /// An exact dot of integers, then one product with both scales.
    #[inline(always)]
    unsafe fn scores<S: Simd, const R: usize>(
        a: &AttendArgs,
        k: *const u8,
        row: usize,
        ahead: *const u8,
    ) -> Rows<f32, R> {
        let mut scores = Rows([[0.0; LANES]; R]);
        // SAFETY: the caller vouches for a chunk of keys with its scales, `R` query rows from `row`, and
        // the features.
        unsafe {
            let codes = std::array::from_fn(|r| a.q_codes.add((row + r) * 4 * a.d));
            let sums = std::array::from_fn(|r| *a.q_sums.add(row + r));
            let dots = S::dots::<R>(k, a.d, codes, sums, ahead);
            fetch::<S>(ahead, LANES * a.d);
            let key_scales = k.add(LANES * a.d).cast::<f32>();
            for r in 0..R {
                let scale = S::splat(*a.q_scales.add(row + r));
                for part in (0..LANES).step_by(S::WIDTH) {
                    let factors = S::mul(scale, S::load(key_scales.add(part)));
                    let products = S::mul(S::load_i32(dots.0[r].as_ptr().add(part)), factors);
                    S::store(scores.0[r].as_mut_ptr().add(part), products);
                }
            }
        }
        scores
    }

    #[inline(always)]
    unsafe fn value<S: Simd>(row: *const u8, column: usize) -> S::V {
        // SAFETY: the caller vouches for the columns and the features.
        unsafe {
            if FOUR {
                // A line of 16 bytes: columns 0 to 15 in the low nibbles, 16 to 31 in the high ones.
                S::load_i4(row.add(column / 32 * 16 + column % 16), column % 32 >= 16)
            } else {
                S::load_i8(row.add(column))
            }
        }
    }
}

/// From `LANES - count` on: all bits for the first `count` lanes, none for the others.
const SEEN: [u32; 2 * LANES] = {
    let mut seen = [0; 2 * LANES];
    let mut i = 0;
    while i < LANES {
        seen[i] = !0;
        i += 1;
    }
    seen
};

/// Attention of query rows over one block, with the running maximum of the online softmax (Milakov
/// and Gimelshein 2018) moved on once every 16 positions. A chunk of 16 starts at a multiple of 16 of
/// the absolute position, so block size, prefill chunking and batching do not touch the result.
///
/// # Safety
/// The pointers of `a` cover what their documentation says, and the CPU has what `S` needs.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd, E: Elements>(a: &AttendArgs) {
    // SAFETY: the caller vouches for `rows` numbers each.
    let (visible, from) = unsafe {
        (std::slice::from_raw_parts(a.visible, a.rows), std::slice::from_raw_parts(a.from, a.rows))
    };
    let most = visible.iter().fold(0, |most, &visible| most.max(visible as usize));
    let scales = if E::SCALED { LANES * 4 } else { 0 };
    let (k_bytes, v_bytes) = (E::key_chunk(a.d) + scales, LANES * E::value_row(a.d) + scales);
    let chunks = most.div_ceil(LANES);
    // Chunks outside, rows inside: a chunk stays in the first cache for all rows.
    for chunk in 0..chunks {
        let first = chunk * LANES;
        let (k, v) = (a.k.wrapping_add(chunk * k_bytes), a.v.wrapping_add(chunk * v_bytes));
        let ahead = |block: *const u8, next: *const u8, bytes: usize| match chunk + AHEAD {
            later if later < chunks => block.wrapping_add(later * bytes),
            _ if next.is_null() => next,
            later => next.wrapping_add((later - chunks) * bytes),
        };
        let (mut k_ahead, mut v_ahead) =
            (ahead(a.k, a.next_k, k_bytes), ahead(a.v, a.next_v, v_bytes));
        let part = |row: usize| {
            let count = LANES.min((visible[row] as usize).saturating_sub(first));
            (LANES.min((from[row] as usize).saturating_sub(first)), count)
        };
        let mut row = 0;
        while row < a.rows {
            let (hidden, count) = part(row);
            if count <= hidden {
                row += 1;
                continue;
            }
            let most = S::ROWS.min(a.rows - row);
            let alike = (1..most).take_while(|r| part(row + r) == (hidden, count)).count() + 1;
            let step = Step { k, v, row, seen: (hidden, count), k_ahead, v_ahead };
            // SAFETY: the caller vouches for the positions of the block that `visible` names, rounded up
            // to whole chunks, and for the rows; a run has 1 to `S::ROWS` of them.
            unsafe {
                match alike {
                    1 => step.run::<S, E, 1>(a),
                    2 => step.run::<S, E, 2>(a),
                    3 if S::ROWS > 2 => step.run::<S, E, 3>(a),
                    4 if S::ROWS > 2 => step.run::<S, E, 4>(a),
                    _ => std::hint::unreachable_unchecked(),
                }
            }
            (k_ahead, v_ahead) = (std::ptr::null(), std::ptr::null());
            row += alike;
        }
    }
}

/// `x = f(x, lane)` for all lanes, a vector from its first lane on at a time. A compiler left to itself makes vectors
/// across rows.
#[inline(always)]
unsafe fn each_vector<S: Simd>(x: &mut Lanes, f: impl Fn(S::V, usize) -> S::V) {
    for lane in (0..LANES).step_by(S::WIDTH) {
        let at = x.as_mut_ptr().wrapping_add(lane);
        // SAFETY: a vector from there ends at sixteen; the caller vouches for the features.
        unsafe { S::store(at, f(S::load(at), lane)) };
    }
}

/// Whether a score is larger than `limit`.
#[inline(always)]
unsafe fn above<S: Simd>(scores: &Lanes, limit: f32) -> bool {
    (0..LANES).step_by(S::WIDTH).any(|part| {
        // SAFETY: the lanes end at sixteen; the caller vouches for the features.
        unsafe { S::any_above(S::load(scores.as_ptr().add(part)), S::splat(limit)) }
    })
}

/// A chunk and the query rows that see the same positions of it.
struct Step {
    k: *const u8,
    v: *const u8,
    row: usize,
    /// First and last position, exclusive, of the chunk that the rows see.
    seen: (usize, usize),
    k_ahead: *const u8,
    v_ahead: *const u8,
}

impl Step {
    #[inline(always)]
    unsafe fn run<S: Simd, E: Elements, const R: usize>(&self, a: &AttendArgs) {
        let (hidden, count) = self.seen;
        // SAFETY: the caller vouches for the chunk, for `R` rows from `row`, and the features.
        unsafe {
            let mut weights = E::scores::<S, R>(a, self.k, self.row, self.k_ahead);
            let scale = S::splat(a.scale);
            let mut tops = [0.0; R];
            for r in 0..R {
                let row = self.row + r;
                let scores = &mut weights.0[r];
                each_vector::<S>(scores, |score, _| S::mul(score, scale));
                if a.softcap != 0.0 {
                    (S::SELDOM.cap)(scores, a.softcap);
                }
                // A new maximum is rare, and vectors see at once that there is none.
                if above::<S>(scores, *a.max.add(row)) {
                    (S::SELDOM.raise)(a, row, &scores[hidden..count]);
                }
                tops[r] = *a.max.add(row);
            }
            // Bits, not branches: a choice by `count` would take the lanes out of their vector.
            let (seen, unseen) = (&SEEN[LANES - count..], &SEEN[LANES - hidden..]);
            // One row after the other without a branch between, so that their long chains run side by side.
            for r in 0..R {
                let weights = &mut weights.0[r];
                for i in 0..LANES {
                    let weight = exp_down(weights[i] - tops[r]);
                    let weight = weight.to_bits() & seen[i] & !unseen[i];
                    weights[i] = f32::from_bits(weight);
                }
            }
            for r in 0..R {
                let weights = &mut weights.0[r];
                let sum = &mut *a.sum.add((self.row + r) * LANES).cast::<Lanes>();
                each_vector::<S>(sum, |sum, lane| S::add(sum, S::load(weights.as_ptr().add(lane))));
                if E::SCALED {
                    let scales: *const f32 = self.v.add(LANES * E::value_row(a.d)).cast();
                    each_vector::<S>(weights, |weight, lane| {
                        S::mul(weight, S::load(scales.add(lane)))
                    });
                }
            }
            self.add_values::<S, E, R>(a, &weights);
        }
    }

    /// `acc += weights * v`, positions in order for each of the `d` sums; four vectors of sums of each row
    /// at a time, so that their additions do not wait for each other.
    #[inline(always)]
    unsafe fn add_values<S: Simd, E: Elements, const R: usize>(
        &self,
        a: &AttendArgs,
        weights: &Rows<f32, R>,
    ) {
        let mut column = 0;
        // SAFETY: the caller vouches for the chunk, the rows and the features; `d` is a multiple of 16 and
        // so of every width.
        unsafe {
            if E::SCALED {
                fetch::<S>(self.v_ahead, LANES * E::value_row(a.d));
            }
            while column + 4 * S::WIDTH <= a.d {
                self.add_columns::<S, E, R, 4>(a, weights, column);
                column += 4 * S::WIDTH;
            }
            // Four vectors of four leave no rest of sixteen.
            while S::WIDTH > LANES / 4 && column < a.d {
                self.add_columns::<S, E, R, 1>(a, weights, column);
                column += S::WIDTH;
            }
        }
    }

    #[inline(always)]
    unsafe fn add_columns<S: Simd, E: Elements, const R: usize, const C: usize>(
        &self,
        a: &AttendArgs,
        weights: &Rows<f32, R>,
        column: usize,
    ) {
        let row_bytes = E::value_row(a.d);
        // SAFETY: as in `add_values`.
        unsafe {
            let at = |r: usize, c: usize| a.acc.add((self.row + r) * a.d + column + c * S::WIDTH);
            let mut acc = [[S::splat(0.0); C]; R];
            for r in 0..R {
                for c in 0..C {
                    acc[r][c] = S::load(at(r, c));
                }
            }
            for position in self.seen.0..self.seen.1 {
                let from = self.v.add(position * row_bytes);
                for line in (0..row_bytes * C * S::WIDTH / a.d).step_by(64) {
                    let line = position * row_bytes + column * row_bytes / a.d + line;
                    fetch::<S>(self.v_ahead, line);
                }
                let weight: [_; R] = std::array::from_fn(|r| S::splat(weights.0[r][position]));
                for c in 0..C {
                    let v = E::value::<S>(from, column + c * S::WIDTH);
                    for r in 0..R {
                        acc[r][c] = S::fma(weight[r], v, acc[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    S::store(at(r, c), acc[r][c]);
                }
            }
        }
    }
}

/// Sixteen lanes without a vector: the oracle of the rows below, and all there is on other CPUs.
pub(super) struct Plain;

impl Simd for Plain {
    type V = Lanes;
    const WIDTH: usize = LANES;
    const ROWS: usize = 1;
    const SELDOM: Seldom = PLAIN;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Lanes {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn add(a: Lanes, b: Lanes) -> Lanes {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn mul(a: Lanes, b: Lanes) -> Lanes {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn fma(a: Lanes, b: Lanes, mut c: Lanes) -> Lanes {
        fused_lanes(&a, &b, &mut c);
        c
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Lanes {
        // SAFETY: the caller vouches for sixteen floats.
        unsafe { from.cast::<Lanes>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Lanes) {
        // SAFETY: the caller vouches for sixteen floats.
        unsafe { to.cast::<Lanes>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn load_i32(from: *const i32) -> Lanes {
        // SAFETY: the caller vouches for sixteen integers.
        unsafe { from.cast::<[i32; LANES]>().read_unaligned() }.map(|x| x as f32)
    }

    #[inline(always)]
    unsafe fn any_above(a: Lanes, b: Lanes) -> bool {
        a.iter().zip(&b).any(|(a, b)| a > b)
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Lanes {
        // SAFETY: the caller vouches for sixteen halves.
        unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(half_to_f32)
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Lanes {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }

    #[inline(always)]
    unsafe fn load_i4(from: *const u8, high: bool) -> Lanes {
        let shift = if high { 4 } else { 0 };
        // SAFETY: the caller vouches for sixteen bytes.
        let bytes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        bytes.map(|byte| f32::from(byte >> shift & 15) - 8.0)
    }

    #[inline(always)]
    unsafe fn dots<const R: usize>(
        k: *const u8,
        d: usize,
        q: [*const i8; R],
        _sums: [i32; R],
        _ahead: *const u8,
    ) -> Rows<i32, R> {
        // SAFETY: the caller vouches for `16 * d` key codes and `2 * d` query codes a row.
        unsafe {
            Rows(q.map(|q| {
                let mut dots = [0; LANES];
                for i in 0..d {
                    let code = i32::from(*q.add(i)) * 128 + i32::from(*q.add(d + i));
                    for lane in 0..LANES {
                        let key = *k.add(i / 4 * 64 + lane * 4 + i % 4).cast::<i8>();
                        dots[lane] += code * i32::from(key);
                    }
                }
                dots
            }))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(_line: *const u8) {}
}

/// A half as a float, without a branch, so that it becomes vector code: the exponent is moved by a
/// multiplication, which is exact for denormal numbers too, and set to all ones for infinities and NaNs.
#[inline(always)]
fn half_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let sign = u32::from(bits & 0x8000) << 16;
    let endless = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000);
    f32::from_bits(scaled.to_bits() | endless | sign)
}

/// Adding and subtracting this rounds a float of less than 2^22 to an integer, ties to even.
const ROUND: f32 = 12_582_912.0;

/// The largest code of a query: `127 * 128`, so that its high byte stays below 128.
const QUERY_TOP: f32 = 16_256.0;

/// A query row in 15 bits for integer dots with keys of eight: `code = 128 * high + low` with both in a
/// signed byte. Writes the high bytes, the low bytes and the codes as i16 (native order), `d` each, and
/// returns the scale and the sum of the codes. As in the quantiser of activations, a row below 1e-30 is all zeros and one with an
/// infinity or a NaN gets a NaN for its scale.
///
/// # Panics
/// When `codes` is not four times as long as `q`: a bug of the caller.
pub fn quantize_query(q: &[f32], codes: &mut [i8]) -> (f32, i32) {
    let d = q.len();
    assert_eq!(codes.len(), 4 * d, "room for codes");
    let top = f32::from_bits(q.iter().fold(0, |top: u32, x| top.max(x.to_bits() & 0x7fff_ffff)));
    if !(top >= 1e-30 && top.is_finite()) {
        codes.fill(0);
        return (if top < 1e-30 { 0.0 } else { f32::NAN }, 0);
    }
    let inverse = QUERY_TOP / top;
    let (high, rest) = codes.split_at_mut(d);
    let (low, whole) = rest.split_at_mut(d);
    let whole = whole.as_chunks_mut::<2>().0;
    let mut sum = 0;
    for (((x, high), low), whole) in q.iter().zip(high).zip(low).zip(whole) {
        let code = ((x * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let upper = (code + 64) >> 7;
        sum += code;
        (*high, *low) = (upper as i8, (code - 128 * upper) as i8);
        *whole = (code as i16).to_ne_bytes().map(u8::cast_signed);
    }
    (top / QUERY_TOP, sum)
}

/// Compiles what chunks seldom need under a set of target features. `cold` keeps it out of the loops: rustc 1.95 forgets
/// `inline(never)` where there are target features.
macro_rules! seldom {
    ([$($features:literal)?] $name:ident) => {
        const $name: $crate::kernel::attend::Seldom = {
            #[cold]
            $(#[target_feature(enable = $features)])?
            unsafe fn cap(scores: &mut $crate::kernel::ops::Lanes, softcap: f32) {
                $crate::kernel::attend::cap(scores, softcap);
            }
            #[cold]
            $(#[target_feature(enable = $features)])?
            unsafe fn raise(a: &$crate::kernel::abi::AttendArgs, row: usize, scores: &[f32]) {
                // SAFETY: the caller vouches for the row and the features.
                unsafe { $crate::kernel::attend::raise(a, row, scores) }
            }
            $crate::kernel::attend::Seldom { cap, raise }
        };
    };
}
pub(super) use seldom;

/// Compiles the walk for the four formats under a set of target features.
macro_rules! attend_rows {
    ([$($features:literal)?] $simd:ty: $f32:ident, $f16:ident, $i8:ident, $i4:ident) => {
        $crate::kernel::attend::attend_rows!(@one [$($features)?] $simd, $f32, Floats<F32>);
        $crate::kernel::attend::attend_rows!(@one [$($features)?] $simd, $f16, Floats<F16>);
        $crate::kernel::attend::attend_rows!([$($features)?] $simd: $i8, $i4);
    };
    ([$($features:literal)?] $simd:ty: $i8:ident, $i4:ident) => {
        $crate::kernel::attend::attend_rows!(@one [$($features)?] $simd, $i8, Codes<false>);
        $crate::kernel::attend::attend_rows!(@one [$($features)?] $simd, $i4, Codes<true>);
    };
    (@one [$($features:literal)?] $simd:ty, $name:ident, $elements:ty) => {
        /// Attention over a block of one format.
        $(#[target_feature(enable = $features)])?
        pub(super) unsafe extern "C" fn $name(a: *const $crate::kernel::abi::AttendArgs) {
            // SAFETY: the caller vouches for the block and for the CPU features.
            unsafe { $crate::kernel::attend::attend::<$simd, $elements>(&*a) }
        }
    };
}
pub(super) use attend_rows;

seldom!([] PLAIN);
attend_rows!([] Plain: scalar_f32, scalar_f16, scalar_i8, scalar_i4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_to_its_value() {
        for bits in (0..=u16::MAX).step_by(if cfg!(miri) { 7 } else { 1 }) {
            let want = half::f16::from_bits(bits).to_f32();
            let got = half_to_f32(bits);
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}");
        }
    }

    #[test]
    fn query_codes_are_within_half_a_step() {
        let q: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let mut codes = [0; 256];
        let (scale, sum) = quantize_query(&q, &mut codes);
        let whole: i32 =
            (0..64).map(|i| 128 * i32::from(codes[i]) + i32::from(codes[64 + i])).sum();
        assert_eq!(sum, whole);
        for (i, x) in q.iter().enumerate() {
            let code = 128 * i32::from(codes[i]) + i32::from(codes[64 + i]);
            assert!((code as f32 * scale - x).abs() <= 0.501 * scale, "{x}");
            let bytes = [codes[128 + 2 * i], codes[129 + 2 * i]].map(i8::cast_unsigned);
            assert_eq!(i32::from(i16::from_ne_bytes(bytes)), code);
        }
        assert_eq!(quantize_query(&[1e-31; 64], &mut codes), (0.0, 0));
        assert!(quantize_query(&[f32::INFINITY; 64], &mut codes).0.is_nan());
        quantize_query(&[3.0, -3.0], &mut codes[..8]);
        assert_eq!(codes[..4], [127, -127, 0, 0]);
    }
}
