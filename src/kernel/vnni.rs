//! Few rows of activations against codes of few bits, on x86 with a dot of unsigned by signed bytes.
//!
//! Every byte of a line is multiplied raw and under nested masks, and the fields come out of the
//! differences once a group (`docs/kernels.md`). VPDPBUSD wants unsigned bytes, so the raw line has its
//! top bit flipped, one XOR a line; for symmetric codes what a middle adds is taken off again where the
//! accumulators start, which costs nothing.

use super::abi::MatmulArgs;
use super::layout::PANEL;
use super::x86::{PREFETCH, RowsOfX, Simd, fields, line, panel_rows, scale_in};

/// Four activations in every lane.
#[inline(always)]
unsafe fn four<S: Simd>(x: *const u8) -> S::I {
    // SAFETY: the caller vouches for four bytes.
    unsafe { S::splat(x.cast::<i32>().read_unaligned()) }
}

/// Calls `each(row, vector, outputs, count)` for every vector of outputs of a panel, where vector `v` has those
/// from `at[v]`, of which `count` exist.
#[inline(always)]
unsafe fn each_output<S: Simd, const M: usize, const V: usize>(
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
unsafe fn finish<S: Simd, const M: usize, const V: usize>(
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
    panel: usize,
    first_group: usize,
    groups: usize,
    /// The first line to fetch, and the bytes on to the next for every line of the stretch.
    ahead: *const u8,
    pace: usize,
}

/// Four bits: `M` rows of activations from `first_row` against a stretch; each line is unpacked once for
/// all of them. One or two rows wait for memory alone, and the CPU's own prefetcher follows their one stream
/// best without fetches that take up the few lines that the first cache can wait for.
#[inline(always)]
pub(super) unsafe fn q4<S: Simd, const M: usize>(a: &MatmulArgs, s: &Stretch, first_row: usize) {
    let group_bytes = a.panel_bytes / a.groups;
    // The dots of few rows are too few to hide the latency of each: lines take turns with sets of
    // accumulators. Integer sums do not mind the order.
    let sets = [4, 2, 2, 1, 1, 1][M - 1];
    // A row alone is no run among others and has the whole panel: nothing to find out.
    let groups = if M == 1 { 0..a.groups } else { s.first_group..s.first_group + s.groups };
    for lane in (0..16).step_by(S::LANES) {
        let at = [lane, 16 + lane];
        // SAFETY: every pointer stays inside the panel and the `M` rows of activations and outputs, which the
        // caller vouches for.
        unsafe {
            let mask = S::splat_byte(15);
            let flip = S::splat_byte(0x80);
            let mut acc = [[S::splat_float(0.0); 2]; M];
            if groups.start > 0 {
                each_output::<S, M, 2>(a, s.panel * PANEL, first_row, at, |r, v, y, count| {
                    acc[r][v] = S::load_floats(y, count);
                });
            }
            let mut w = a.w.add(s.panel * a.panel_bytes + groups.start * group_bytes);
            let mut ahead = s.ahead;
            for g in groups.clone() {
                let x = RowsOfX::<M>::new(a, first_row, g);
                let mut low = [[S::splat(0); M]; 4];
                let mut raw = low;
                if a.offset == 0 {
                    // Minus eight times the sum: 8 for the low row, and for the raw byte 16 * 8 + 8.
                    for r in 0..M {
                        low[0][r] = S::splat(x.sum(r) * -8);
                        raw[0][r] = S::splat(x.sum(r) * -136);
                    }
                }
                for step in (0..a.group / 4).step_by(4) {
                    for turn in 0..4 {
                        let codes = w.add((step + turn) * 64);
                        let line = S::load(codes.add(lane * 4));
                        if M > 2 {
                            S::prefetch(ahead);
                            ahead = ahead.wrapping_add(s.pace);
                        }
                        let masked = S::and(line, mask);
                        let whole = S::xor(line, flip);
                        let set = turn % sets;
                        for r in 0..M {
                            let x = four::<S>(x.x[r].add((step + turn) * 4));
                            raw[set][r] = S::dot(raw[set][r], whole, x);
                            low[set][r] = S::dot(low[set][r], masked, x);
                        }
                    }
                }
                let mut dots = [[low[0][0]; 2]; M];
                for r in 0..M {
                    for set in 1..sets {
                        low[0][r] = S::add(low[0][r], low[set][r]);
                        raw[0][r] = S::add(raw[0][r], raw[set][r]);
                    }
                    dots[r] = [low[0][r], S::right::<4>(S::sub(raw[0][r], low[0][r]))];
                }
                let tables = w.add(a.group * 16);
                ahead = ahead.wrapping_add(s.pace);
                scale_in::<S, M, 2>(&mut acc, &dots, &x, a.offset, tables, PANEL, at);
                w = w.add(group_bytes);
            }
            finish::<S, M, 2>(a, s.panel * PANEL, first_row, &acc, at);
        }
    }
}

/// Three bits, one row of activations.
#[inline(always)]
pub(super) unsafe fn q3<S: Simd>(a: &MatmulArgs) {
    let group_bytes = a.panel_bytes / a.groups;
    for (panel, lane) in
        (0..a.panels).flat_map(|panel| (0..16).step_by(S::LANES).map(move |lane| (panel, lane)))
    {
        let at: [usize; 8] = std::array::from_fn(|field| field * 16 + lane);
        // SAFETY: as in `q4`.
        unsafe {
            let mut acc = [[S::splat_float(0.0); 8]; 1];
            let mut w = a.w.add(panel * a.panel_bytes);
            let flip = S::splat_byte(0x80);
            let only = |x, mask| S::and(x, S::splat_byte(mask));
            for g in 0..a.groups {
                let x = RowsOfX::<1>::new(a, 0, g);
                let mut p = [S::splat(0); 3];
                let mut q = [S::splat(0); 3];
                let mut r = [S::splat(0); 4];
                for step in 0..a.group / 4 {
                    let at = w.add(step / 2 * 384 + step % 2 * 64);
                    let planes = at.add(lane * 4);
                    let x = four::<S>(x.x[0].add(step * 4));
                    let line = S::load(planes);
                    p[0] = S::dot(p[0], S::xor(line, flip), x);
                    p[1] = S::dot(p[1], only(line, 0x1f), x);
                    p[2] = S::dot(p[2], only(line, 0x03), x);
                    let line = S::load(planes.add(128));
                    q[0] = S::dot(q[0], S::xor(line, flip), x);
                    q[1] = S::dot(q[1], only(line, 0x3f), x);
                    q[2] = S::dot(q[2], only(line, 0x07), x);
                    let line = S::load(planes.add(256));
                    r[0] = S::dot(r[0], line, x);
                    r[1] = S::dot(r[1], only(line, 0x7f), x);
                    r[2] = S::dot(r[2], only(line, 0x0f), x);
                    r[3] = S::dot(r[3], only(line, 0x01), x);
                }
                let high = S::right::<6>(S::sub(q[0], q[1]));
                let four_of_six = S::add(S::add(r[3], r[3]), S::add(r[3], r[3]));
                let mut dots = [[
                    S::right::<2>(S::sub(p[1], p[2])),
                    S::right::<5>(S::sub(p[0], p[1])),
                    q[2],
                    S::right::<3>(S::sub(q[1], q[2])),
                    S::right::<1>(S::sub(r[2], r[3])),
                    S::right::<4>(S::sub(r[1], r[2])),
                    S::add(p[2], four_of_six),
                    S::add(S::add(high, high), S::right::<7>(S::sub(r[0], r[1]))),
                ]];
                if a.offset == 0 {
                    let middle = S::splat(4 * x.sum(0));
                    for dots in &mut dots[0] {
                        *dots = S::sub(*dots, middle);
                    }
                }
                let tables = w.add(a.group * 48);
                scale_in::<S, 1, 8>(&mut acc, &dots, &x, a.offset, tables, 128, at);
                w = w.add(group_bytes);
            }
            finish::<S, 1, 8>(a, panel * 128, 0, &acc, at);
        }
    }
}

/// Two bits, one row of activations.
#[inline(always)]
pub(super) unsafe fn q2<S: Simd>(a: &MatmulArgs) {
    let group_bytes = a.panel_bytes / a.groups;
    for (panel, lane) in
        (0..a.panels).flat_map(|panel| (0..16).step_by(S::LANES).map(move |lane| (panel, lane)))
    {
        let at: [usize; 4] = std::array::from_fn(|field| field * 16 + lane);
        // SAFETY: as in `q4`.
        unsafe {
            let mut acc = [[S::splat_float(0.0); 4]; 1];
            let mut w = a.w.add(panel * a.panel_bytes);
            let flip = S::splat_byte(0x80);
            let only = |x, mask| S::and(x, S::splat_byte(mask));
            for g in 0..a.groups {
                let x = RowsOfX::<1>::new(a, 0, g);
                let mut sums = [[S::splat(0); 4]; 2];
                for step in (0..a.group / 4).step_by(2) {
                    for turn in 0..2 {
                        let codes = w.add((step + turn) * 64);
                        let line = S::load(codes.add(lane * 4));
                        let x = four::<S>(x.x[0].add((step + turn) * 4));
                        let set = &mut sums[turn];
                        set[0] = S::dot(set[0], S::xor(line, flip), x);
                        set[1] = S::dot(set[1], only(line, 0x3f), x);
                        set[2] = S::dot(set[2], only(line, 0x0f), x);
                        set[3] = S::dot(set[3], only(line, 0x03), x);
                    }
                }
                let mut all = sums[0];
                for i in 0..4 {
                    all[i] = S::add(sums[0][i], sums[1][i]);
                }
                let mut dots = [[
                    all[3],
                    S::right::<2>(S::sub(all[2], all[3])),
                    S::right::<4>(S::sub(all[1], all[2])),
                    S::right::<6>(S::sub(all[0], all[1])),
                ]];
                if a.offset == 0 {
                    let middle = S::splat(2 * x.sum(0));
                    for dots in &mut dots[0] {
                        *dots = S::sub(*dots, middle);
                    }
                }
                let tables = w.add(a.group * 16);
                scale_in::<S, 1, 4>(&mut acc, &dots, &x, a.offset, tables, 64, at);
                w = w.add(group_bytes);
            }
            finish::<S, 1, 4>(a, panel * 64, 0, &acc, at);
        }
    }
}

/// Part `PART` of a group of codes of two or three bits: the dots of `M` rows of activations with four fields of every
/// line, scaled into `acc`. The codes are decoded in registers, which costs next to nothing beside the dots: it takes
/// other vector ports. The sums of more fields would not fit the registers.
#[inline(always)]
unsafe fn part<S: Simd, const M: usize, const BITS: usize, const PART: usize>(
    a: &MatmulArgs,
    acc: &mut [[S::F; 4]; M],
    x: &RowsOfX<M>,
    (w, lane): (*const u8, usize),
    ahead: &mut *const u8,
    pace: usize,
) {
    // SAFETY: as in `q4`.
    unsafe {
        let middle = if a.offset == 0 { 1 << (BITS - 1) } else { 0 };
        let mut dots = [[S::splat(0); 4]; M];
        for r in 0..M {
            dots[r] = [S::splat(x.sum(r) * -middle); 4];
        }
        for step in 0..a.group / 4 {
            let codes = fields::<S, BITS, PART>(line::<BITS>(w, step).add(lane * 4));
            // Three lines a step of three bits, one of two.
            for _ in PART..BITS - 1 {
                S::prefetch(*ahead);
                *ahead = ahead.wrapping_add(pace);
            }
            for r in 0..M {
                let x = four::<S>(x.x[r].add(step * 4));
                for i in 0..4 {
                    dots[r][i] = S::dot(dots[r][i], codes[i], x);
                }
            }
        }
        let high = panel_rows(BITS);
        let tables = w.add(a.group * high * BITS / 8);
        scale_in::<S, M, 4>(acc, &dots, x, a.offset, tables, high, outputs(PART, lane));
    }
}

/// Where in its panel the outputs of a part lie, field by field.
fn outputs(part: usize, lane: usize) -> [usize; 4] {
    std::array::from_fn(|field| (part * 4 + field) * 16 + lane)
}

/// Two or three bits: `M` rows of activations from `first_row` against a stretch.
#[inline(always)]
pub(super) unsafe fn fewer<S: Simd, const M: usize, const BITS: usize>(
    a: &MatmulArgs,
    s: &Stretch,
    first_row: usize,
) {
    let group_bytes = a.panel_bytes / a.groups;
    let first_output = s.panel * panel_rows(BITS);
    for lane in (0..16).step_by(S::LANES) {
        // SAFETY: as in `q4`.
        unsafe {
            let mut acc = [[[S::splat_float(0.0); 4]; M]; 2];
            if s.first_group > 0 {
                for part in 0..BITS - 1 {
                    let (at, acc) = (outputs(part, lane), &mut acc[part]);
                    each_output::<S, M, 4>(a, first_output, first_row, at, |r, v, y, count| {
                        acc[r][v] = S::load_floats(y, count);
                    });
                }
            }
            let mut w = a.w.add(s.panel * a.panel_bytes + s.first_group * group_bytes);
            let mut ahead = s.ahead;
            for g in s.first_group..s.first_group + s.groups {
                let x = RowsOfX::<M>::new(a, first_row, g);
                part::<S, M, BITS, 0>(a, &mut acc[0], &x, (w, lane), &mut ahead, s.pace);
                if BITS == 3 {
                    part::<S, M, BITS, 1>(a, &mut acc[1], &x, (w, lane), &mut ahead, s.pace);
                }
                for _ in 0..(group_bytes - a.group * panel_rows(BITS) * BITS / 8) / 64 {
                    S::prefetch(ahead);
                    ahead = ahead.wrapping_add(s.pace);
                }
                w = w.add(group_bytes);
            }
            for part in 0..BITS - 1 {
                finish::<S, M, 4>(a, first_output, first_row, &acc[part], outputs(part, lane));
            }
        }
    }
}

/// A stretch with a run of rows of activations: the stretch and the first of the rows.
pub(super) type RunFn = unsafe fn(&MatmulArgs, &Stretch, usize);

/// Bytes that several runs go through one after the other: so few that they stay in the first cache, so many that
/// loading and storing the outputs does not count.
const STRETCH: usize = 20 * 1024;

/// Panels of codes with `m` rows of activations, in runs of nearly the same length.
///
/// # Safety
/// The block keeps its promises, and the CPU has what the functions need; `runs[i]` takes `i + 1` rows.
#[inline(always)]
pub(super) unsafe fn few(a: &MatmulArgs, runs: &[RunFn]) {
    let count = a.m.div_ceil(runs.len());
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

/// Declares the matmul entries of a row file for `Simd` type `$simd`: the rows of activations that meet
/// codes of four bits at once, those up to which they do so in runs, the same for codes of fewer bits, and those that meet
/// bytes.
macro_rules! entries {
    (
        $features:literal, $simd:ty,
        [$($few:literal),*], $most:literal, [$($fewer:literal),*], $most_fewer:literal, [$($tile:literal),*]
    ) => {
        use super::x86::{self, Simd as _, Tile, TileFn};
        use super::vnni;

        #[target_feature(enable = $features)]
        unsafe fn tile<const R: usize, const FLIP: bool>(
            a: &MatmulArgs,
            t: &Tile,
            row: usize,
            run: usize,
        ) {
            // SAFETY: the caller's promise.
            unsafe { x86::tile::<$simd, R, FLIP>(a, t, row, run) }
        }

        #[target_feature(enable = $features)]
        unsafe fn decode<const BITS: usize>(w: *const u8, steps: usize, out: *mut u8, apart: usize) {
            // SAFETY: the caller's promise.
            unsafe { x86::decode::<$simd, BITS>(w, steps, out, apart) }
        }

        #[target_feature(enable = $features)]
        unsafe fn few<const M: usize>(a: &MatmulArgs, s: &vnni::Stretch, first_row: usize) {
            // SAFETY: the caller's promise.
            unsafe { vnni::q4::<$simd, M>(a, s, first_row) }
        }

        #[allow(dead_code, reason = "not where registers are few")]
        #[target_feature(enable = $features)]
        unsafe fn fewer<const M: usize, const BITS: usize>(
            a: &MatmulArgs,
            s: &vnni::Stretch,
            first_row: usize,
        ) {
            // SAFETY: the caller's promise.
            unsafe { vnni::fewer::<$simd, M, BITS>(a, s, first_row) }
        }

        #[target_feature(enable = $features)]
        unsafe fn one_q3(a: &MatmulArgs) {
            // SAFETY: the caller's promise.
            unsafe { vnni::q3::<$simd>(a) }
        }

        #[target_feature(enable = $features)]
        unsafe fn one_q2(a: &MatmulArgs) {
            // SAFETY: the caller's promise.
            unsafe { vnni::q2::<$simd>(a) }
        }

        /// Outputs of a tile.
        const WIDTH: usize = 2 * <$simd>::LANES;
        const TILES: &[TileFn] = &[$(tile::<$tile, false>),*];

        /// Signed bytes.
        #[target_feature(enable = $features)]
        pub(super) unsafe extern "C" fn matmul_q8(a: *const MatmulArgs) {
            // SAFETY: the caller vouches for the block.
            unsafe { x86::bytes(&*a, &[$(tile::<$tile, true>),*], WIDTH) }
        }

        /// Four bits.
        #[target_feature(enable = $features)]
        pub(super) unsafe extern "C" fn matmul_q4(a: *const MatmulArgs) {
            // SAFETY: the caller vouches for the block.
            unsafe {
                match (*a).m {
                    1..=$most => vnni::few(&*a, &[$(few::<$few>),*]),
                    _ => x86::many(&*a, 4, decode::<4>, TILES, WIDTH),
                }
            }
        }

        /// Three bits.
        #[target_feature(enable = $features)]
        pub(super) unsafe extern "C" fn matmul_q3(a: *const MatmulArgs) {
            // SAFETY: the caller vouches for the block.
            unsafe {
                match (*a).m {
                    1 => one_q3(&*a),
                    2..=$most_fewer => vnni::few(&*a, &[$(fewer::<$fewer, 3>),*]),
                    _ => x86::many(&*a, 3, decode::<3>, TILES, WIDTH),
                }
            }
        }

        /// Two bits.
        #[target_feature(enable = $features)]
        pub(super) unsafe extern "C" fn matmul_q2(a: *const MatmulArgs) {
            // SAFETY: the caller vouches for the block.
            unsafe {
                match (*a).m {
                    1 => one_q2(&*a),
                    2..=$most_fewer => vnni::few(&*a, &[$(fewer::<$fewer, 2>),*]),
                    _ => x86::many(&*a, 2, decode::<2>, TILES, WIDTH),
                }
            }
        }
    };
}
pub(super) use entries;
