//! Few rows of activations against codes of few bits, on x86 with a dot of unsigned by signed bytes.
//!
//! Every byte of a line is multiplied raw and under nested masks, and the fields come out of the
//! differences once a group (`docs/kernels.md`). VPDPBUSD wants unsigned bytes, so the raw line has its
//! top bit flipped, one XOR a line; for symmetric codes what a middle adds is taken off again where the
//! accumulators start, which costs nothing.

use super::abi::MatmulArgs;
use super::layout::PANEL;
use super::x86::{PREFETCH, RowsOfX, Simd, scale_in};

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

/// Some groups of a panel of four-bit codes, and how those that follow are fetched meanwhile.
pub(super) struct Stretch {
    panel: usize,
    first_group: usize,
    groups: usize,
    /// The first line to fetch, and the bytes on to the next at every line of codes.
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

/// The dots of a plane of codes under nested masks, the first of which is no mask: whole bytes, with their
/// top bit flipped where `FLIP` says so. `line` is where the line of a step lies; a line from `ahead` on is
/// fetched at each step.
#[inline(always)]
unsafe fn plane<S: Simd, const M: usize, const MASKS: usize, const FLIP: bool>(
    x: &[*const u8; M],
    steps: usize,
    line: impl Fn(usize) -> *const u8,
    ahead: *const u8,
    masks: [u8; MASKS],
) -> [[S::I; MASKS]; M] {
    // SAFETY: the caller vouches for the lines and the activations of all steps.
    unsafe {
        let mut dots = [[S::splat(0); MASKS]; M];
        for step in 0..steps {
            let codes = S::load(line(step));
            S::prefetch(ahead.wrapping_add(step * 64));
            let whole = if FLIP { S::xor(codes, S::splat_byte(0x80)) } else { codes };
            let codes: [S::I; MASKS] = std::array::from_fn(|i| match i {
                0 => whole,
                _ => S::and(codes, S::splat_byte(masks[i])),
            });
            for r in 0..M {
                let x = four::<S>(x[r].add(step * 4));
                for i in 0..MASKS {
                    dots[r][i] = S::dot(dots[r][i], codes[i], x);
                }
            }
        }
        dots
    }
}

/// Three bits, `M` rows of activations: plane by plane, because the sums of all three planes would not fit
/// the registers.
#[inline(always)]
pub(super) unsafe fn q3_rows<S: Simd, const M: usize>(a: &MatmulArgs) {
    let group_bytes = a.panel_bytes / a.groups;
    // A plane is read from one end of a group to the other before the next one is. What is fetched meanwhile
    // lies a group ahead or more, and in the order of addresses, which the CPU's own prefetcher follows.
    let ahead = PREFETCH.next_multiple_of(group_bytes);
    for (panel, lane) in
        (0..a.panels).flat_map(|panel| (0..16).step_by(S::LANES).map(move |lane| (panel, lane)))
    {
        let at: [usize; 8] = std::array::from_fn(|field| field * 16 + lane);
        // SAFETY: as in `q4`.
        unsafe {
            let mut acc = [[S::splat_float(0.0); 8]; M];
            let mut w = a.w.add(panel * a.panel_bytes);
            for g in 0..a.groups {
                let x = RowsOfX::<M>::new(a, 0, g);
                let line = |plane: usize| {
                    move |step: usize| {
                        w.add(step / 2 * 384 + step % 2 * 64 + plane * 128 + lane * 4)
                    }
                };
                let steps = a.group / 4;
                let ahead = |plane: usize| w.wrapping_add(ahead + plane * steps * 64);
                let p = plane::<S, M, 3, true>(&x.x, steps, line(0), ahead(0), [0, 0x1f, 0x03]);
                let q = plane::<S, M, 3, true>(&x.x, steps, line(1), ahead(1), [0, 0x3f, 0x07]);
                let r =
                    plane::<S, M, 4, false>(&x.x, steps, line(2), ahead(2), [0, 0x7f, 0x0f, 0x01]);
                let mut dots = [[S::splat(0); 8]; M];
                for row in 0..M {
                    let (p, q, r) = (p[row], q[row], r[row]);
                    let high = S::right::<6>(S::sub(q[0], q[1]));
                    let four_of_six = S::add(S::add(r[3], r[3]), S::add(r[3], r[3]));
                    dots[row] = [
                        S::right::<2>(S::sub(p[1], p[2])),
                        S::right::<5>(S::sub(p[0], p[1])),
                        q[2],
                        S::right::<3>(S::sub(q[1], q[2])),
                        S::right::<1>(S::sub(r[2], r[3])),
                        S::right::<4>(S::sub(r[1], r[2])),
                        S::add(p[2], four_of_six),
                        S::add(S::add(high, high), S::right::<7>(S::sub(r[0], r[1]))),
                    ];
                    if a.offset == 0 {
                        let middle = S::splat(4 * x.sum(row));
                        for dots in &mut dots[row] {
                            *dots = S::sub(*dots, middle);
                        }
                    }
                }
                let tables = w.add(a.group * 48);
                for at in (0..group_bytes - a.group * 48).step_by(64) {
                    S::prefetch(ahead(3).wrapping_add(at));
                }
                scale_in::<S, M, 8>(&mut acc, &dots, &x, a.offset, tables, 128, at);
                w = w.add(group_bytes);
            }
            finish::<S, M, 8>(a, panel * 128, 0, &acc, at);
        }
    }
}

/// Two bits, `M` rows of activations.
#[inline(always)]
pub(super) unsafe fn q2_rows<S: Simd, const M: usize>(a: &MatmulArgs) {
    let group_bytes = a.panel_bytes / a.groups;
    for (panel, lane) in
        (0..a.panels).flat_map(|panel| (0..16).step_by(S::LANES).map(move |lane| (panel, lane)))
    {
        let at: [usize; 4] = std::array::from_fn(|field| field * 16 + lane);
        // SAFETY: as in `q4`.
        unsafe {
            let mut acc = [[S::splat_float(0.0); 4]; M];
            let mut w = a.w.add(panel * a.panel_bytes);
            for g in 0..a.groups {
                let x = RowsOfX::<M>::new(a, 0, g);
                let line = |step: usize| w.add(step * 64 + lane * 4);
                let (masks, ahead) = ([0, 0x3f, 0x0f, 0x03], w.wrapping_add(PREFETCH));
                let all = plane::<S, M, 4, true>(&x.x, a.group / 4, line, ahead, masks);
                let mut dots = [[S::splat(0); 4]; M];
                for row in 0..M {
                    let all = all[row];
                    dots[row] = [
                        all[3],
                        S::right::<2>(S::sub(all[2], all[3])),
                        S::right::<4>(S::sub(all[1], all[2])),
                        S::right::<6>(S::sub(all[0], all[1])),
                    ];
                    if a.offset == 0 {
                        let middle = S::splat(2 * x.sum(row));
                        for dots in &mut dots[row] {
                            *dots = S::sub(*dots, middle);
                        }
                    }
                }
                let tables = w.add(a.group * 16);
                scale_in::<S, M, 4>(&mut acc, &dots, &x, a.offset, tables, 64, at);
                w = w.add(group_bytes);
            }
            finish::<S, M, 4>(a, panel * 64, 0, &acc, at);
        }
    }
}

/// A stretch of four-bit codes with a run of rows of activations: the stretch and the first of the rows.
pub(super) type RunFn = unsafe fn(&MatmulArgs, &Stretch, usize);

/// Columns that several runs go through one after the other: few enough that the codes stay in the first cache,
/// so many that loading and storing the outputs does not count.
const COLUMNS: usize = 512;

/// Panels of four-bit codes with `m` rows of activations, in runs of nearly the same length.
///
/// # Safety
/// The block keeps its promises, and the CPU has what the functions need; `runs[i]` takes `i + 1` rows.
#[inline(always)]
pub(super) unsafe fn few(a: &MatmulArgs, runs: &[RunFn]) {
    let count = a.m.div_ceil(runs.len());
    let stretch = if count == 1 { a.groups } else { (COLUMNS / a.group).max(1) };
    let group_bytes = a.panel_bytes / a.groups;
    for panel in 0..a.panels {
        for first_group in (0..a.groups).step_by(stretch) {
            let groups = stretch.min(a.groups - first_group);
            let w = a.w.wrapping_add(panel * a.panel_bytes + first_group * group_bytes);
            for run in 0..count {
                let (first, end) = (a.m * run / count, a.m * (run + 1) / count);
                // Every run fetches its part of the next stretch, so that memory works all the time.
                let bytes = groups * group_bytes;
                let ahead = if count == 1 { PREFETCH } else { bytes + bytes * run / count };
                let (ahead, pace) = (w.wrapping_add(ahead), 64 / count);
                let s = Stretch { panel, first_group, groups, ahead, pace };
                // SAFETY: the caller's promise; a run has 1 to `runs.len()` rows.
                unsafe { runs.get_unchecked(end - first - 1)(a, &s, first) };
            }
        }
    }
}

/// Declares the matmul entries of a row file for `Simd` type `$simd`: the rows of activations that meet
/// codes of four bits at once, those up to which they do so in runs, those beyond one that meet codes of fewer bits at
/// once, and those that meet bytes.
macro_rules! entries {
    (
        $features:literal, $simd:ty,
        [$($few:literal),*], $most:literal, [$($fewer:literal),*], [$($tile:literal),*]
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

        $(
            const _: () = assert!($fewer > 1, "one row has functions of its own");
        )*

        #[allow(dead_code, reason = "not where registers are few")]
        #[target_feature(enable = $features)]
        unsafe fn fewer_q3<const M: usize>(a: &MatmulArgs) {
            // SAFETY: the caller's promise.
            unsafe { vnni::q3_rows::<$simd, M>(a) }
        }

        #[allow(dead_code, reason = "not where registers are few")]
        #[target_feature(enable = $features)]
        unsafe fn fewer_q2<const M: usize>(a: &MatmulArgs) {
            // SAFETY: the caller's promise.
            unsafe { vnni::q2_rows::<$simd, M>(a) }
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
                    $($fewer => fewer_q3::<$fewer>(&*a),)*
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
                    $($fewer => fewer_q2::<$fewer>(&*a),)*
                    _ => x86::many(&*a, 2, decode::<2>, TILES, WIDTH),
                }
            }
        }
    };
}
pub(super) use entries;
