//! What the x86 rows share: one product of decoded bytes, written once for every vector width.
//!
//! A format of few bits meets many rows of activations in two steps. A stretch of a panel is decoded to
//! bytes, once, into a buffer that stays in the first cache; then tiles of exactly `R` rows multiply it,
//! whatever the format was. The floating-point order is that of the oracle: groups ascend, and the
//! accumulator of an output waits in `y` between two stretches.
//!
//! The bodies are generic over [`Simd`] and compiled where a function with `#[target_feature]` calls
//! them; everything here is inlined into that function, so that the intrinsics become instructions. A closure
//! around an intrinsic that is handed to another function would not be, and turn into a call.

use super::abi::MatmulArgs;
use super::layout::PANEL;
use std::mem::MaybeUninit;

/// Bytes of the buffer of decoded codes: a stretch of groups so long that outputs, which lie whole rows apart
/// and so in few sets of the caches, are loaded and stored seldom. It stays in the second cache, from where
/// the tiles read it in order; and on the stack, so it is no more than any host's threads have.
const BUFFER: usize = 64 * 1024;

/// From how many rows of activations on the whole of it is used.
const MANY_ROWS: usize = 32;

/// How far ahead of the dots weights are fetched that are multiplied as they lie, where they are at all: about the
/// latency of memory at the pace of one row of activations.
pub(super) const PREFETCH: usize = 2048;

/// The vectors of one instruction set.
pub(super) trait Simd {
    /// 32-bit lanes of a vector.
    const LANES: usize;
    /// Integers.
    type I: Copy;
    /// Floats.
    type F: Copy;

    unsafe fn splat_byte(byte: u8) -> Self::I;
    unsafe fn splat(word: i32) -> Self::I;
    unsafe fn load(at: *const u8) -> Self::I;
    unsafe fn store(at: *mut u8, x: Self::I);
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn xor(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sub(a: Self::I, b: Self::I) -> Self::I;
    /// Shifts of 16-bit words.
    unsafe fn right_words<const N: u32>(a: Self::I) -> Self::I;
    unsafe fn left_words<const N: u32>(a: Self::I) -> Self::I;
    /// Arithmetic shift of 32-bit words.
    unsafe fn right<const N: u32>(a: Self::I) -> Self::I;
    /// `acc` and the dots of four unsigned codes with four signed activations.
    unsafe fn dot(acc: Self::I, codes: Self::I, x: Self::I) -> Self::I;
    /// The largest sum that small sums hold.
    const SMALL: usize;
    /// Small sums and the dots of four codes with four activations.
    unsafe fn small_dot(sums: Self::I, codes: Self::I, x: Self::I) -> Self::I;
    /// The lanes of small sums.
    unsafe fn small_sum(sums: Self::I) -> Self::I;
    /// i16 zero points in the low halves of the lanes.
    unsafe fn zeros(at: *const u8) -> Self::I;
    /// `dots - zeros * sum`, the sum within 16 bits.
    unsafe fn less_zeros(dots: Self::I, zeros: Self::I, sum: i32) -> Self::I;
    unsafe fn to_floats(a: Self::I) -> Self::F;
    unsafe fn splat_float(x: f32) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// f16 as floats.
    unsafe fn halves(at: *const u8) -> Self::F;
    /// The first `count` floats; the other lanes are zero and not read.
    unsafe fn load_floats(at: *const f32, count: usize) -> Self::F;
    /// Writes the first `count` floats.
    unsafe fn store_floats(at: *mut f32, x: Self::F, count: usize);
    /// Asks for a line of memory that is needed soon.
    unsafe fn prefetch(at: *const u8);

    /// Adds the dots of `steps` times four columns: the two vectors at `codes`, then those 128 bytes on,
    /// with `R` rows of activations. `FLIP` makes signed codes unsigned. What lies
    /// at `ahead`, and so many bytes on at each step, is fetched.
    #[inline(always)]
    unsafe fn walk<const R: usize, const FLIP: bool>(
        dots: &mut [[Self::I; 2]; R],
        codes: *const u8,
        x: &[*const u8; R],
        steps: usize,
        ahead: (*const u8, usize),
    ) {
        // SAFETY: the caller's promise.
        unsafe { walk::<Self, R, FLIP>(dots, codes, x, steps, ahead) }
    }
}

/// [`Simd::walk`] by dots of four. The dots of few rows are too few to hide the latency of each, so steps take
/// turns with sets of accumulators. Integer sums do not mind the order.
#[inline(always)]
pub(super) unsafe fn walk<S: Simd + ?Sized, const R: usize, const FLIP: bool>(
    dots: &mut [[S::I; 2]; R],
    codes: *const u8,
    x: &[*const u8; R],
    steps: usize,
    (mut ahead, pace): (*const u8, usize),
) {
    let sets = if R < 4 { [4, 2, 2][R - 1] } else { 1 };
    // SAFETY: the caller vouches for the codes and the activations of `steps` steps, a multiple of four.
    unsafe {
        let flip = S::splat_byte(0x80);
        let mut more = [[[S::splat(0); 2]; R]; 3];
        for start in (0..steps).step_by(sets) {
            for turn in 0..sets {
                let step = start + turn;
                let at = codes.add(step * 128);
                let mut codes = [S::load(at), S::load(at.add(S::LANES * 4))];
                if !ahead.is_null() {
                    S::prefetch(ahead);
                    ahead = ahead.wrapping_add(pace);
                }
                if FLIP {
                    codes = [S::xor(codes[0], flip), S::xor(codes[1], flip)];
                }
                let dots = if turn == 0 { &mut *dots } else { &mut more[turn - 1] };
                for r in 0..R {
                    let x = S::splat(x[r].add(step * 4).cast::<i32>().read_unaligned());
                    dots[r][0] = S::dot(dots[r][0], codes[0], x);
                    dots[r][1] = S::dot(dots[r][1], codes[1], x);
                }
            }
        }
        for more in &more[..sets - 1] {
            for r in 0..R {
                for v in 0..2 {
                    dots[r][v] = S::add(dots[r][v], more[r][v]);
                }
            }
        }
    }
}

/// The activations of `R` rows from `first_row`, at group `g`.
#[derive(Clone, Copy)]
pub(super) struct RowsOfX<const R: usize> {
    pub x: [*const u8; R],
    scales: [*const f32; R],
    sums: [*const i32; R],
}

impl<const R: usize> RowsOfX<R> {
    #[inline(always)]
    pub(super) unsafe fn new(a: &MatmulArgs, first_row: usize, g: usize) -> Self {
        // SAFETY: the caller vouches for the rows and the group.
        unsafe {
            let row = |r: usize| first_row + r;
            Self {
                x: std::array::from_fn(|r| a.x.add(row(r) * a.x_stride + g * a.group)),
                scales: std::array::from_fn(|r| a.x_scales.add(row(r) * a.groups + g)),
                sums: std::array::from_fn(|r| a.x_sums.add(row(r) * a.groups + g)),
            }
        }
    }

    /// The sum of row `r` in this group.
    #[inline(always)]
    pub(super) unsafe fn sum(&self, r: usize) -> i32 {
        // SAFETY: `new` was given a group that exists.
        unsafe { *self.sums[r] }
    }
}

/// One group's scales and offsets, applied to the dots of `R` rows with `V` vectors of outputs. Vector
/// `v` belongs to the rows from `at[v]` of the panel, which has `high` rows.
#[inline(always)]
pub(super) unsafe fn scale_in<S: Simd, const R: usize, const V: usize>(
    acc: &mut [[S::F; V]; R],
    dots: &[[S::I; V]; R],
    x: &RowsOfX<R>,
    offset: u32,
    tables: *const u8,
    high: usize,
    at: [usize; V],
) {
    // SAFETY: the caller vouches for the tables of this group; `new` for the rows.
    unsafe {
        let offsets = tables.wrapping_add(high * 2);
        for v in 0..V {
            let scale = S::halves(tables.add(at[v] * 2));
            if offset == 1 {
                let zeros = S::zeros(offsets.add(at[v] * 2));
                for r in 0..R {
                    let dots = S::to_floats(S::less_zeros(dots[r][v], zeros, *x.sums[r]));
                    let factor = S::mul(scale, S::splat_float(*x.scales[r]));
                    acc[r][v] = S::fma(factor, dots, acc[r][v]);
                }
                continue;
            }
            for r in 0..R {
                let factor = S::mul(scale, S::splat_float(*x.scales[r]));
                acc[r][v] = S::fma(factor, S::to_floats(dots[r][v]), acc[r][v]);
            }
            if offset == 2 {
                let minimum = S::halves(offsets.add(at[v] * 2));
                for r in 0..R {
                    let factor = S::mul(minimum, S::splat_float(*x.scales[r]));
                    let sum = S::to_floats(S::splat(*x.sums[r]));
                    acc[r][v] = S::fma(factor, sum, acc[r][v]);
                }
            }
        }
    }
}

/// What a tile multiplies: two vectors of outputs, some groups long.
pub(super) struct Tile {
    /// Codes of the first group, at the first of the two vectors.
    codes: *const u8,
    /// Bytes from one group of codes to the next.
    stride: usize,
    first_group: usize,
    groups: usize,
    /// The zero of the codes where the format fixes it.
    middle: i32,
    /// The tables of the first group, and how far those of the next are.
    tables: *const u8,
    group_bytes: usize,
    /// Rows of a panel, and the first of the tile's.
    high: usize,
    row: usize,
    /// The first output.
    output: usize,
    /// Bytes to fetch while others are multiplied, if any: run after run and group after group, `pace` of them at
    /// each step. Memory has all the time for them that the dots take, and no run waits for a burst of fetches.
    ahead: *const u8,
    pace: usize,
}

/// A tile with `R` rows of activations: from a row, in a run.
pub(super) type TileFn = unsafe fn(&MatmulArgs, &Tile, usize, usize);

/// Multiplies bytes: `R` rows of activations from `first_row`, which are run `run`. `FLIP` makes signed codes
/// unsigned.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const R: usize, const FLIP: bool>(
    a: &MatmulArgs,
    t: &Tile,
    first_row: usize,
    run: usize,
) {
    // SAFETY: every pointer stays inside the tile, its tables, `R` rows of activations and of outputs.
    unsafe {
        let counts = [0, S::LANES].map(|lane| (a.n - t.output).saturating_sub(lane).min(S::LANES));
        let y = |r: usize, v: usize| {
            a.y.add((first_row + r) * a.y_stride).wrapping_add(t.output + v * S::LANES)
        };
        let mut acc = [[S::splat_float(0.0); 2]; R];
        if t.first_group > 0 {
            for r in 0..R {
                for v in 0..2 {
                    acc[r][v] = S::load_floats(y(r, v), counts[v]);
                }
            }
        }
        for g in 0..t.groups {
            let x = RowsOfX::<R>::new(a, first_row, t.first_group + g);
            let mut dots = [[S::splat(0); 2]; R];
            if t.middle != 0 {
                for r in 0..R {
                    dots[r] = [S::splat(x.sum(r).wrapping_mul(-t.middle)); 2];
                }
            }
            let steps = a.group / 4;
            let ahead = match t.ahead.is_null() {
                true => t.ahead,
                false => t.ahead.wrapping_add((run * t.groups + g) * steps * t.pace),
            };
            S::walk::<R, FLIP>(&mut dots, t.codes.add(g * t.stride), &x.x, steps, (ahead, t.pace));
            let tables = t.tables.add(g * t.group_bytes);
            let at = [t.row, t.row + S::LANES];
            scale_in::<S, R, 2>(&mut acc, &dots, &x, a.offset, tables, t.high, at);
        }
        for r in 0..R {
            for v in 0..2 {
                S::store_floats(y(r, v), acc[r][v], counts[v]);
            }
        }
    }
}

/// Rows of a panel of codes of `bits` bits.
pub(super) const fn panel_rows(bits: usize) -> usize {
    match bits {
        3 => 128,
        2 => 64,
        _ => PANEL,
    }
}

/// Where the line of a step lies in a group of codes of `BITS` bits: of three bits the first of its three planes,
/// which are 128 bytes apart.
#[inline(always)]
pub(super) unsafe fn line<const BITS: usize>(codes: *const u8, step: usize) -> *const u8 {
    let at = if BITS == 3 { step / 2 * 384 + step % 2 * 64 } else { step * 64 };
    // SAFETY: the caller vouches for the group.
    unsafe { codes.add(at) }
}

/// Part `PART` of the fields of a line of `BITS` bits, each the codes of sixteen rows of the panel: four, of four bits the
/// two that there are, twice.
#[inline(always)]
pub(super) unsafe fn fields<S: Simd, const BITS: usize, const PART: usize>(
    line: *const u8,
) -> [S::I; 4] {
    // SAFETY: the caller vouches for the line.
    unsafe {
        let only = |x, mask| S::and(x, S::splat_byte(mask));
        let part = |x, mask, flip| S::xor(only(x, mask), S::splat_byte(flip));
        if BITS == 4 {
            let line = S::load(line);
            let (low, high) = (only(line, 15), part(S::right_words::<4>(line), 15, 8));
            return [low, high, low, high];
        }
        if BITS == 2 {
            let line = S::load(line);
            return [
                only(line, 3),
                only(S::right_words::<2>(line), 3),
                only(S::right_words::<4>(line), 3),
                part(S::right_words::<6>(line), 3, 2),
            ];
        }
        let [p, q, r] = [S::load(line), S::load(line.add(128)), S::load(line.add(256))];
        if PART == 0 {
            return [
                only(S::right_words::<2>(p), 7),
                part(S::right_words::<5>(p), 7, 4),
                only(q, 7),
                only(S::right_words::<3>(q), 7),
            ];
        }
        [
            only(S::right_words::<1>(r), 7),
            only(S::right_words::<4>(r), 7),
            S::xor(only(p, 3), only(S::left_words::<2>(r), 4)),
            S::xor(part(S::right_words::<5>(q), 6, 4), only(S::right_words::<7>(r), 1)),
        ]
    }
}

/// Decodes a group of codes of `BITS` bits: for each 32 rows of the panel two lines a step, `apart` bytes
/// from those of the next 32.
#[inline(always)]
pub(super) unsafe fn decode<S: Simd, const BITS: usize>(
    codes: *const u8,
    steps: usize,
    out: *mut u8,
    apart: usize,
) {
    // SAFETY: the caller vouches for the group and for the buffer.
    unsafe {
        for step in 0..steps {
            for piece in (0..64).step_by(S::LANES * 4) {
                let put = |field: usize, x| {
                    let at = field / 2 * apart + step * 128 + field % 2 * 64 + piece;
                    S::store(out.add(at), x);
                };
                let line = line::<BITS>(codes, step).add(piece);
                let low = fields::<S, BITS, 0>(line);
                for i in 0..if BITS == 4 { 2 } else { 4 } {
                    put(i, low[i]);
                }
                if BITS == 3 {
                    let high = fields::<S, BITS, 1>(line);
                    for i in 0..4 {
                        put(4 + i, high[i]);
                    }
                }
            }
        }
    }
}

/// Decodes one group; see [`decode`].
pub(super) type DecodeFn = unsafe fn(*const u8, usize, *mut u8, usize);

#[repr(align(64))]
struct Buffer(MaybeUninit<[u8; BUFFER]>);

/// How many runs the rows of activations take.
fn runs(a: &MatmulArgs, tiles: &[TileFn]) -> usize {
    a.m.div_ceil(tiles.len())
}

/// Calls `work(first_row, tile)` so that all rows of activations are met in runs of nearly the same
/// length.
#[inline(always)]
unsafe fn each_run(a: &MatmulArgs, tiles: &[TileFn], t: &Tile) {
    let runs = runs(a, tiles);
    for run in 0..runs {
        let (first, end) = (a.m * run / runs, a.m * (run + 1) / runs);
        // SAFETY: the caller's promise; a run has 1 to `tiles.len()` rows.
        unsafe { tiles.get_unchecked(end - first - 1)(a, t, first, run) };
    }
}

/// Panels of codes of `bits` bits, decoded stretch by stretch and multiplied by `tiles`, which have `width` outputs.
///
/// # Safety
/// The block keeps its promises, and the CPU has what the functions need.
#[inline(never)]
pub(super) unsafe fn many(
    a: &MatmulArgs,
    bits: usize,
    decode: DecodeFn,
    tiles: &[TileFn],
    width: usize,
) {
    let high = panel_rows(bits);
    let mut buffer = Buffer(MaybeUninit::uninit());
    let buffer = buffer.0.as_mut_ptr().cast::<u8>();
    // Few rows would wait for memory while a long stretch is decoded.
    let room = if a.m < MANY_ROWS { BUFFER / 4 } else { BUFFER };
    let stretch = room / high / a.group;
    let apart = stretch * a.group * PANEL;
    let group_bytes = a.panel_bytes / a.groups;
    let code_bytes = a.group * high * bits / 8;
    for panel in 0..a.panels {
        let outputs = high.min(a.n - panel * high);
        for first_group in (0..a.groups).step_by(stretch) {
            let groups = stretch.min(a.groups - first_group);
            // SAFETY: a stretch of groups of this panel, which fits the buffer; tiles end at `n`.
            unsafe {
                let w = a.w.add(panel * a.panel_bytes + first_group * group_bytes);
                for g in 0..groups {
                    let out = buffer.add(g * a.group * PANEL);
                    decode(w.add(g * group_bytes), a.group / 4, out, apart);
                }
                let turns = outputs.div_ceil(width) * runs(a, tiles);
                let pace = group_bytes / (a.group / 4 * turns);
                let ahead = w.wrapping_add(groups * group_bytes);
                for row in (0..outputs).step_by(width) {
                    let t = Tile {
                        codes: buffer.add(row / PANEL * apart + row % PANEL * 4),
                        stride: a.group * PANEL,
                        first_group,
                        groups,
                        middle: if a.offset == 0 { 1 << (bits - 1) } else { 0 },
                        tables: w.add(code_bytes),
                        group_bytes,
                        high,
                        row,
                        output: panel * high + row,
                        ahead: ahead.wrapping_add(groups * group_bytes * row / outputs),
                        pace,
                    };
                    each_run(a, tiles, &t);
                }
            }
        }
    }
}

/// Panels of bytes, multiplied as they lie by `tiles`, which flip their sign and have `width` outputs.
///
/// # Safety
/// The block keeps its promises, and the CPU has what the functions need.
#[inline(never)]
pub(super) unsafe fn bytes(a: &MatmulArgs, tiles: &[TileFn], width: usize) {
    for panel in 0..a.panels {
        let outputs = PANEL.min(a.n - panel * PANEL);
        let w = a.w.wrapping_add(panel * a.panel_bytes);
        let runs = runs(a, tiles);
        let turns = outputs.div_ceil(width) * runs;
        let pace = a.panel_bytes / (a.groups * a.group / 4 * turns);
        for row in (0..outputs).step_by(width) {
            // SAFETY: one panel; tiles end at `n`.
            unsafe {
                let t = Tile {
                    codes: w.add(row * 4),
                    stride: a.panel_bytes / a.groups,
                    first_group: 0,
                    groups: a.groups,
                    middle: 128,
                    tables: w.add(a.group * PANEL),
                    group_bytes: a.panel_bytes / a.groups,
                    high: PANEL,
                    row,
                    output: panel * PANEL + row,
                    // Many runs fetch the next panel, each a part. Few wait for memory alone, and the CPU's own
                    // prefetcher follows their one stream best without fetches that take up the few lines that
                    // the first cache can wait for.
                    ahead: match runs {
                        1 | 2 => std::ptr::null(),
                        _ => w.wrapping_add(a.panel_bytes + a.panel_bytes * row / outputs),
                    },
                    pace,
                };
                each_run(a, tiles, &t);
            }
        }
    }
}
