//! Few rows of activations against codes of few bits, on x86 with a dot of unsigned by signed bytes and vectors that
//! hold a whole line.
//!
//! Every byte of a line is multiplied raw and under nested masks, and the fields come out of the
//! differences once a group (`docs/kernels.md`). VPDPBUSD wants unsigned bytes, so the raw line has its
//! top bit flipped, one XOR a line; for symmetric codes what a middle adds is taken off again where the
//! accumulators start, which costs nothing.

use super::abi::MatmulArgs;
use super::layout::PANEL;
use super::x86::{RowsOfX, Simd, line, scale_in};
use super::x86_few::{Stretch, each_output, finish, four};

/// Four bits: `M` rows of activations from `first_row` against a stretch; each line is unpacked once for
/// all of them. One or two rows wait for memory alone, and the CPU's own prefetcher follows their one stream
/// best without fetches that take up the few lines that the first cache can wait for.
#[inline(always)]
pub(super) unsafe fn q4<S: Simd, const M: usize>(a: &MatmulArgs, s: &Stretch, first_row: usize) {
    let group_bytes = a.panel_bytes / a.groups;
    // The dots of few rows are too few to hide the latency of each: lines take turns with sets of
    // accumulators. Integer sums do not mind the order.
    let sets = [4, 2, 2, 1, 1, 1, 1, 1][M - 1];
    // A row alone is no run among others and has the whole panel: nothing to find out.
    let groups = if M == 1 { 0..a.groups } else { s.first_group..s.first_group + s.groups };
    let at = [0, 16];
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
                    let line = S::load(codes);
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

/// Three bits, one row of activations against a panel.
#[inline(always)]
pub(super) unsafe fn q3<S: Simd>(a: &MatmulArgs, panel: usize) {
    let group_bytes = a.panel_bytes / a.groups;
    let at: [usize; 8] = std::array::from_fn(|field| field * 16);
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
                let planes = line::<3>(w, step);
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

/// Two bits, one row of activations against a panel.
#[inline(always)]
pub(super) unsafe fn q2<S: Simd>(a: &MatmulArgs, panel: usize) {
    let group_bytes = a.panel_bytes / a.groups;
    let at: [usize; 4] = std::array::from_fn(|field| field * 16);
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
                    let line = S::load(codes);
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

/// Declares the matmul entries of a row file for `Simd` type `$simd`: the rows of activations that meet
/// codes of four bits at once, those up to which they do so in runs, the same for codes of fewer bits, and those that meet
/// bytes.
macro_rules! entries {
    (
        $features:literal, $simd:ty,
        [$($few:literal),*], $most:literal, [$($fewer:literal),*], $most_fewer:literal, [$($tile:literal),*]
    ) => {
        use super::vnni;
        use super::x86::{self, Simd as _, Tile, TileFn};
        use super::x86_few::{self, Stretch};

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
        unsafe fn few<const M: usize>(a: &MatmulArgs, s: &Stretch, first_row: usize) {
            // SAFETY: the caller's promise.
            unsafe {
                if WHOLE {
                    vnni::q4::<$simd, M>(a, s, first_row);
                } else {
                    x86_few::decoded::<$simd, M, 4, 2>(a, s, first_row);
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn fewer<const M: usize, const BITS: usize>(
            a: &MatmulArgs,
            s: &Stretch,
            first_row: usize,
        ) {
            // SAFETY: the caller's promise. One row has the whole panel.
            unsafe {
                match (M, BITS) {
                    (1, 3) if WHOLE => vnni::q3::<$simd>(a, s.panel),
                    (1, 2) if WHOLE => vnni::q2::<$simd>(a, s.panel),
                    _ => x86_few::decoded::<$simd, M, BITS, 4>(a, s, first_row),
                }
            }
        }

        /// Whether a vector holds a line.
        const WHOLE: bool = <$simd>::LANES == 16;
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
                    1..=$most => x86_few::few(&*a, &[$(few::<$few>),*]),
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
                    1..=$most_fewer => x86_few::few(&*a, &[$(fewer::<$fewer, 3>),*]),
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
                    1..=$most_fewer => x86_few::few(&*a, &[$(fewer::<$fewer, 2>),*]),
                    _ => x86::many(&*a, 2, decode::<2>, TILES, WIDTH),
                }
            }
        }
    };
}
pub(super) use entries;
