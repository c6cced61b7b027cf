//! Few rows of activations against codes of few bits, straight from the lines, on x86.
//!
//! Rows meet a panel in runs that share every line ([`few`]). What a run does with a line is here for codes that are decoded
//! in registers ([`decoded`]), and in [`super::vnni`] for those that are multiplied as they lie.

use super::abi::MatmulArgs;
use super::x86::{PREFETCH, RowsOfX, Simd, fields, line, panel_rows, scale_in};
use std::ops::Range;

/// Four activations in every lane.
#[inline(always)]
pub(super) unsafe fn four<S: Simd>(x: *const u8) -> S::I {
    // SAFETY: the caller vouches for four bytes.
    unsafe { S::splat(x.cast::<i32>().read_unaligned()) }
}

/// Calls `each(row, vector, outputs, count)` for every vector of outputs of a panel, where vector `v` has those
/// from `at[v]`, of which `count` exist.
#[inline(always)]
pub(super) unsafe fn each_output<S: Simd, const M: usize, const V: usize>(
    a: &MatmulArgs,
    first_output: usize,
    first_row: usize,
    at: [usize; V],
    mut each: impl FnMut(usize, usize, *mut f32, usize),
) {
    for r in 0..M {
        for v in 0..V {
            let output = first_output + at[v];
            let count = a.n.saturating_sub(output).min(S::LANES);
            // SAFETY: the caller vouches for `n` outputs of every row.
            let y = unsafe { a.y.add((first_row + r) * a.y_stride) };
            each(r, v, y.wrapping_add(output), count);
        }
    }
}

/// Writes the outputs of a panel.
#[inline(always)]
pub(super) unsafe fn finish<S: Simd, const M: usize, const V: usize>(
    a: &MatmulArgs,
    first_output: usize,
    first_row: usize,
    acc: &[[S::F; V]; M],
    at: [usize; V],
) {
    // SAFETY: `count` ends at `n`, up to which the caller vouches for every row.
    unsafe {
        each_output::<S, M, V>(a, first_output, first_row, at, |r, v, y, count| {
            S::store_floats(y, acc[r][v], count);
        });
    }
}

/// Some groups of a panel, and how those that follow are fetched meanwhile.
pub(super) struct Stretch {
    pub panel: usize,
    pub first_group: usize,
    pub groups: usize,
    /// The first line to fetch, and the bytes on to the next for every line of the stretch.
    pub ahead: *const u8,
    pub pace: usize,
}

/// A stretch with a run of rows of activations: the stretch and the first of the rows.
pub(super) type RunFn = unsafe fn(&MatmulArgs, &Stretch, usize);

/// Bytes that several runs go through one after the other: so few that they stay in the first cache, so many that
/// loading and storing the outputs does not count.
const STRETCH: usize = 20 * 1024;

/// The most rows of several runs. A run alone may have more: its float sums do not fit the registers, which costs less than
/// waiting for memory a stretch at a time.
const SHARED: usize = 6;

/// Panels of codes with `m` rows of activations, in runs of nearly the same length.
///
/// # Safety
/// The block keeps its promises, and the CPU has what the functions need; `runs[i]` takes `i + 1` rows.
#[inline(always)]
pub(super) unsafe fn few(a: &MatmulArgs, runs: &[RunFn]) {
    let count = if a.m <= runs.len() { 1 } else { a.m.div_ceil(runs.len().min(SHARED)) };
    let group_bytes = a.panel_bytes / a.groups;
    let stretch = if count == 1 { a.groups } else { (STRETCH / group_bytes).max(1) };
    // A run alone goes through a group's codes more than once: what is fetched lies beyond them.
    let distance = PREFETCH.next_multiple_of(group_bytes);
    for panel in 0..a.panels {
        for first_group in (0..a.groups).step_by(stretch) {
            let groups = stretch.min(a.groups - first_group);
            let w = a.w.wrapping_add(panel * a.panel_bytes + first_group * group_bytes);
            for run in 0..count {
                let (first, end) = (a.m * run / count, a.m * (run + 1) / count);
                // Every run fetches its part of the next stretch, so that memory works all the time.
                let bytes = groups * group_bytes;
                let ahead = if count == 1 { distance } else { bytes + bytes * run / count };
                let (ahead, pace) = (w.wrapping_add(ahead), 64 / count);
                let s = Stretch { panel, first_group, groups, ahead, pace };
                // SAFETY: the caller's promise; a run has 1 to `runs.len()` rows.
                unsafe { runs.get_unchecked(end - first - 1)(a, &s, first) };
            }
        }
    }
}

/// `M` rows of activations from `first_row` against a stretch of codes of `BITS` bits, which are decoded in registers: beside
/// the dots that costs little, since it takes other vector ports. `V` fields of a line are multiplied at a time, two of
/// four bits and four of fewer: the sums of all would not fit the registers.
#[inline(always)]
pub(super) unsafe fn decoded<S: Simd, const M: usize, const BITS: usize, const V: usize>(
    a: &MatmulArgs,
    s: &Stretch,
    first_row: usize,
) {
    let group_bytes = a.panel_bytes / a.groups;
    let first_output = s.panel * panel_rows(BITS);
    // The vectors of a line and the parts of their fields: sums `i` belong to part `i % 2` of the vector from lane `lane(i)`.
    let lane = |i: usize| i / 2 * S::LANES;
    let exists = |i: usize| lane(i) < 16 && (BITS == 3 || i.is_multiple_of(2));
    // SAFETY: every pointer stays inside the panel and the `M` rows of activations and outputs, which the
    // caller vouches for.
    unsafe {
        let mut acc = [[[S::splat_float(0.0); V]; M]; 4];
        if s.first_group > 0 {
            for i in (0..4).filter(|i| exists(*i)) {
                let (at, acc) = (outputs(i % 2, lane(i)), &mut acc[i]);
                each_output::<S, M, V>(a, first_output, first_row, at, |r, v, y, count| {
                    acc[r][v] = S::load_floats(y, count);
                });
            }
        }
        let mut w = a.w.add(s.panel * a.panel_bytes + s.first_group * group_bytes);
        let mut ahead = s.ahead;
        for g in s.first_group..s.first_group + s.groups {
            let x = RowsOfX::<M>::new(a, first_row, g);
            // One vector of a line after the other, group by group: a group stays in the first cache, a panel does not.
            // Each fetches its share of the lines.
            let pace = s.pace * S::LANES / 16;
            if S::LANES == 16 {
                vector::<S, M, BITS, V>(a, &mut acc, 0, &x, w, (&mut ahead, pace));
            } else {
                for half in 0..2 {
                    vector::<S, M, BITS, V>(a, &mut acc, half, &x, w, (&mut ahead, pace));
                }
            }
            if fetches::<S, M>() {
                for _ in 0..(group_bytes - a.group * panel_rows(BITS) * BITS / 8) / 64 {
                    S::prefetch(ahead);
                    ahead = ahead.wrapping_add(s.pace);
                }
            }
            w = w.add(group_bytes);
        }
        for i in (0..4).filter(|i| exists(*i)) {
            let at = outputs(i % 2, lane(i));
            finish::<S, M, V>(a, first_output, first_row, &acc[i], at);
        }
    }
}

/// Whether `M` rows fetch ahead. One row in vectors of 512 bits waits for memory alone and goes through it once, which the
/// CPU's own prefetcher follows best; in vectors of 256 bits it goes through each group a half of the lines at a time.
const fn fetches<S: Simd, const M: usize>() -> bool {
    M > 1 || S::LANES < 16
}

/// Where in its panel the outputs of a part lie, field by field.
fn outputs<const V: usize>(part: usize, lane: usize) -> [usize; V] {
    std::array::from_fn(|field| (part * V + field) * 16 + lane)
}

/// Vector `half` of the lines of a group, scaled into its sums.
#[inline(always)]
unsafe fn vector<S: Simd, const M: usize, const BITS: usize, const V: usize>(
    a: &MatmulArgs,
    acc: &mut [[[S::F; V]; M]; 4],
    half: usize,
    x: &RowsOfX<M>,
    w: *const u8,
    (ahead, pace): (&mut *const u8, usize),
) {
    let from = (w, half * S::LANES);
    // SAFETY: as in `decoded`.
    unsafe {
        part::<S, M, BITS, V, 0>(a, &mut acc[2 * half], x, from, (&mut *ahead, pace));
        if BITS == 3 {
            part::<S, M, BITS, V, 1>(a, &mut acc[2 * half + 1], x, from, (ahead, pace));
        }
    }
}

/// Part `PART` of a group, scaled into `acc`.
#[inline(always)]
unsafe fn part<S: Simd, const M: usize, const BITS: usize, const V: usize, const PART: usize>(
    a: &MatmulArgs,
    acc: &mut [[S::F; V]; M],
    x: &RowsOfX<M>,
    (w, lane): (*const u8, usize),
    mut fetch: (&mut *const u8, usize),
) {
    // SAFETY: as in `decoded`.
    unsafe {
        let middle = if a.offset == 0 { 1 << (BITS - 1) } else { 0 };
        let mut dots = [[S::splat(0); V]; M];
        for r in 0..M {
            dots[r] = [S::splat(x.sum(r) * -middle); V];
        }
        let steps = a.group / 4;
        if S::SMALL == i32::MAX as usize {
            walk::<S, M, BITS, V, PART>(&mut dots, x, (w, lane), 0..steps, &mut fetch);
        } else {
            // As many products with 127 as a lane holds, two at a time; a power of two, as steps are.
            let most = 1 << (S::SMALL / (2 * 127 * ((1 << BITS) - 1))).ilog2();
            for first in (0..steps).step_by(most) {
                let mut sums = [[S::splat(0); V]; M];
                let range = first..steps.min(first + most);
                walk::<S, M, BITS, V, PART>(&mut sums, x, (w, lane), range, &mut fetch);
                for r in 0..M {
                    for v in 0..V {
                        dots[r][v] = S::add(dots[r][v], S::small_sum(sums[r][v]));
                    }
                }
            }
        }
        let high = panel_rows(BITS);
        let tables = w.add(a.group * high * BITS / 8);
        scale_in::<S, M, V>(acc, &dots, x, a.offset, tables, high, outputs(PART, lane));
    }
}

/// Adds the dots of some steps to small sums.
#[inline(always)]
unsafe fn walk<S: Simd, const M: usize, const BITS: usize, const V: usize, const PART: usize>(
    sums: &mut [[S::I; V]; M],
    x: &RowsOfX<M>,
    (w, lane): (*const u8, usize),
    steps: Range<usize>,
    (ahead, pace): &mut (&mut *const u8, usize),
) {
    // SAFETY: as in `decoded`.
    unsafe {
        for step in steps {
            let codes = fields::<S, BITS, PART>(line::<BITS>(w, step).add(lane * 4));
            if fetches::<S, M>() {
                // Three bits have three lines a step.
                for _ in 0..if BITS == 3 && PART == 0 { 2 } else { 1 } {
                    S::prefetch(**ahead);
                    **ahead = ahead.wrapping_add(*pace);
                }
            }
            for r in 0..M {
                let x = four::<S>(x.x[r].add(step * 4));
                for v in 0..V {
                    sums[r][v] = S::small_dot(sums[r][v], codes[v], x);
                }
            }
        }
    }
}
