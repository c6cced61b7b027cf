//! The way through a quantised product that all Arm rows share; [`super::neon`], [`super::dotprod`] and
//! [`super::i8mm`] bring the innermost loops.
//!
//! Up to eight rows of activations go over a panel in spans, some groups that fit the first-level cache:
//! there up to four rows at a time meet a few vectors of codes at a time, as many as leave room in the
//! registers for their sums of integers and of floats, and the next ones find the span in the cache. So a
//! weight comes from memory once, and a float leaves its register once a span.
//!
//! For more rows, a chunk of a panel, 32 outputs by 512 `k`, is decoded to signed bytes once, and one product
//! of bytes serves every format, in tiles of four rows by eight outputs; the outputs themselves carry the
//! sums from chunk to chunk. Zero points go into the bytes where they fit. A panel with one that does not,
//! and a group that is a long row, are left to the loops for few rows.
//!
//! Either way each output has one accumulator and takes the groups in order.

use super::abi::MatmulArgs;
use super::arm_codes::{Codes, panel_rows, step_bytes, two_steps};
use super::layout::MAX_PANEL;
use std::arch::aarch64::*;
use std::mem::MaybeUninit;
use std::ptr::copy_nonoverlapping as copy;

/// Values of [`MatmulArgs::offset`].
pub(super) const HAS_ZERO: u32 = 1;
/// See [`HAS_ZERO`].
pub(super) const HAS_MINIMUM: u32 = 2;

/// The longest group whose dots are below 2^22; one that is a whole row may be longer.
pub(super) const LONGEST: usize = 128;

/// The most rows that go over a panel in spans together.
const FEW: usize = 8;
/// The most bytes of a span, unless a group has more.
const SPAN: usize = 8 * 1024;
/// Values of `k` in a chunk, and the most in a span that is gathered: 16 kB of decoded codes.
pub(super) const CHUNK: usize = 512;
/// The most groups of a chunk.
pub(super) const GROUPS: usize = CHUNK / 16;
/// Rows of activations that are gathered, and outputs of a chunk.
const ROWS: usize = 4;
const OUTPUTS: usize = 32;

/// Four f32 from four f16.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn halves(table: *const u8) -> float32x4_t {
    // SAFETY: the caller vouches for 8 bytes.
    vcvt_f32_f16(vreinterpret_f16_u16(unsafe { vld1_u16(table.cast()) }))
}

/// The first two lanes twice, and the last two twice.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn twice(quad: float32x4_t) -> [float32x4_t; 2] {
    let pairs = vreinterpretq_f64_f32(quad);
    [
        vreinterpretq_f32_f64(vdupq_laneq_f64::<0>(pairs)),
        vreinterpretq_f32_f64(vdupq_laneq_f64::<1>(pairs)),
    ]
}

/// What of `sum`, the sum of the activations of a group, belongs to the dot of a field of `C` that is
/// stored less `less`.
#[inline]
pub(super) fn share<C: Codes>(offset: u32, less: i32, sum: i32) -> i32 {
    (less - if offset == 0 { C::MIDDLE } else { 0 }) * sum
}

/// Some groups of a panel, and the rows of activations that meet them together.
pub(super) struct Span {
    /// The first group.
    pub(super) w: *const u8,
    pub(super) group_bytes: usize,
    pub(super) groups: usize,
    /// Values of `k` in a group.
    pub(super) group: usize,
    /// [`MatmulArgs::offset`].
    pub(super) offset: u32,
    /// One to four rows.
    pub(super) rows: usize,
    /// The first row at the first `k`.
    pub(super) x: *const i8,
    pub(super) x_stride: usize,
    /// The first row's of the first group.
    pub(super) scales: *const f32,
    pub(super) sums: *const i32,
    /// Scales from one row to the next.
    pub(super) scales_stride: usize,
    /// The outputs of the panel so far, [`MAX_PANEL`] for each row.
    pub(super) acc: *mut f32,
}

impl Span {
    /// The scale of `row` in group `g`.
    #[inline]
    pub(super) unsafe fn scale(&self, row: usize, g: usize) -> f32 {
        // SAFETY: the caller vouches for row and group.
        unsafe { *self.scales.add(row * self.scales_stride + g) }
    }

    /// The sum of `row` in group `g`.
    #[inline]
    pub(super) unsafe fn sum(&self, row: usize, g: usize) -> i32 {
        // SAFETY: the caller vouches for row and group.
        unsafe { *self.sums.add(row * self.scales_stride + g) }
    }

    /// The codes and the tables of group `g`.
    #[inline]
    pub(super) unsafe fn group_at<C: Codes>(&self, g: usize) -> (*const u8, *const u8) {
        // SAFETY: the caller vouches for the group.
        unsafe {
            // Spares the compiler a way around every loop.
            std::hint::assert_unchecked(self.group >= 16 && self.group.is_multiple_of(16));
            let w = self.w.add(g * self.group_bytes);
            (w, w.add(self.group / 4 * step_bytes::<C>()))
        }
    }
}

/// Adds a span to the outputs of its rows.
pub(super) type Walk = unsafe fn(&Span);
/// Adds the groups of `chunk` to outputs `8 * part` and on of it, for four rows at `y`, `stride` apart.
pub(super) type Tile =
    unsafe fn(chunk: *const Chunk, x: *const Block, part: usize, y: *mut f32, stride: usize);

/// The innermost loops of an instruction set for one width of codes.
#[derive(Clone, Copy)]
pub(super) struct Loops {
    /// For one row, two, three and four.
    pub(super) few: [Walk; 4],
    /// For many, and whether it wants activations and codes in pairs of rows; without one, `few` does.
    pub(super) many: Option<(bool, Tile)>,
}

/// The product that `a` describes, of codes `C`.
///
/// # Safety
/// The block keeps its promises, and the CPU has what `loops` need.
pub(super) unsafe fn matmul<C: Codes>(a: *const MatmulArgs, loops: &Loops) {
    // SAFETY: handed on; a part of a block with one panel is a block.
    unsafe {
        let a = &*a;
        let many = loops.many.filter(|_| a.m > FEW && a.group <= LONGEST);
        let (mut chunk, mut block) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        for panel in 0..a.panels {
            let rows = panel_rows::<C>();
            let a = MatmulArgs {
                w: a.w.add(panel * a.panel_bytes),
                panels: 1,
                y: a.y.add(panel * rows),
                n: rows.min(a.n - panel * rows),
                ..*a
            };
            match many {
                Some((paired, tile)) if a.offset != HAS_ZERO || zeros_fit::<C>(&a) => {
                    let (chunk, block) = (chunk.as_mut_ptr(), block.as_mut_ptr());
                    many_rows::<C>(&a, paired, tile, chunk, block);
                }
                _ => {
                    for row in (0..a.m).step_by(FEW) {
                        few_rows::<C>(&a, row, FEW.min(a.m - row), &loops.few);
                    }
                }
            }
        }
    }
}

/// `rows` rows, at most eight, from `row` against the one panel of `a`.
unsafe fn few_rows<C: Codes>(a: &MatmulArgs, row: usize, rows: usize, walks: &[Walk; 4]) {
    let group_bytes = a.panel_bytes / a.groups;
    let groups = (SPAN / group_bytes).min(CHUNK / a.group).max(1);
    let mut acc = [MaybeUninit::<f32>::uninit(); FEW * MAX_PANEL];
    let acc = acc.as_mut_ptr().cast::<f32>();
    for r in 0..rows {
        // Only what is used: clearing the whole buffer took 7% of the instructions of a token.
        // SAFETY: at most `FEW` rows of at most `MAX_PANEL` outputs.
        unsafe { acc.add(r * MAX_PANEL).write_bytes(0, panel_rows::<C>()) };
    }
    for g in (0..a.groups).step_by(groups) {
        let mut done = 0;
        while done < rows {
            let now = (rows - done).min(ROWS);
            // SAFETY: the places are of a group and a row that the caller vouches for.
            unsafe {
                let at = (row + done) * a.groups + g;
                let span = Span {
                    w: a.w.add(g * group_bytes),
                    group_bytes,
                    groups: groups.min(a.groups - g),
                    group: a.group,
                    offset: a.offset,
                    rows: now,
                    x: a.x.cast::<i8>().add((row + done) * a.x_stride + g * a.group),
                    x_stride: a.x_stride,
                    scales: a.x_scales.add(at),
                    sums: a.x_sums.add(at),
                    scales_stride: a.groups,
                    acc: acc.add(done * MAX_PANEL),
                };
                walks[now - 1](&span);
            }
            done += now;
        }
    }
    for r in 0..rows {
        // SAFETY: the caller vouches for `n` outputs of the row, at most those of a panel.
        unsafe { copy(acc.add(r * MAX_PANEL), a.y.add((row + r) * a.y_stride), a.n) };
    }
}

/// Some groups of 32 outputs, decoded. Vectors of eight `k`: if paired, sixteen of two outputs; else
/// eight of four outputs and four `k`, then of the next four `k`.
#[repr(C, align(64))]
pub(super) struct Chunk {
    pub(super) codes: [[u64; 2]; CHUNK * OUTPUTS / 16],
    /// For each group room for sixteen vectors: the scales of four outputs, or if paired of two, twice.
    pub(super) scales: [[f32; 4]; GROUPS * OUTPUTS / 2],
    pub(super) minima: [[f32; 4]; GROUPS * OUTPUTS / 2],
    /// What is taken off the codes, in the order of the vectors of eight `k`.
    less: [[u64; 2]; OUTPUTS / 2],
    pub(super) groups: usize,
    /// Values of `k` in a group.
    pub(super) group: usize,
    pub(super) has_minima: bool,
    /// Whether the outputs hold sums already.
    pub(super) resumes: bool,
}

/// The activations of four rows that a chunk meets; the last row again where there are fewer.
#[repr(C, align(64))]
pub(super) struct Block {
    /// If paired: eight `k` of rows 0 and 1, then of rows 2 and 3.
    pub(super) codes: [[u64; 2]; CHUNK * ROWS / 16],
    /// For each group room for two vectors: the scales of four rows, or if paired of two, each twice.
    pub(super) scales: [[f32; 4]; GROUPS * 2],
    /// The sums of the codes, likewise.
    pub(super) sums: [[i32; 4]; GROUPS * 2],
    /// If not paired: where the rows start.
    pub(super) rows: [*const i8; ROWS],
}

/// Whether every code less its zero point is a signed byte, in the one panel of `a`.
unsafe fn zeros_fit<C: Codes>(a: &MatmulArgs) -> bool {
    let group_bytes = a.panel_bytes / a.groups;
    let table_bytes = panel_rows::<C>() * 2;
    (0..a.groups).all(|g| {
        // SAFETY: the zero points are the last table of a group.
        let zeros = unsafe { a.w.add((g + 1) * group_bytes - table_bytes).cast::<i16>() };
        // SAFETY: as above.
        (0..a.n).all(|row| (-112..=128).contains(&unsafe { zeros.add(row).read_unaligned() }))
    })
}

/// The one panel of `a` against all its rows.
unsafe fn many_rows<C: Codes>(
    a: &MatmulArgs,
    paired: bool,
    tile: Tile,
    chunk: *mut Chunk,
    block: *mut Block,
) {
    // SAFETY: the places below are those of groups and rows that the caller vouches for; `chunk` and
    // `block` have room for a chunk.
    unsafe {
        (*chunk).group = a.group;
        (*chunk).has_minima = a.offset == HAS_MINIMUM;
        for output in (0..a.n).step_by(OUTPUTS) {
            let n = OUTPUTS.min(a.n - output);
            for g in (0..a.groups).step_by(CHUNK / a.group) {
                let groups = (CHUNK / a.group).min(a.groups - g);
                (*chunk).groups = groups;
                (*chunk).resumes = g > 0;
                match (paired, output / OUTPUTS) {
                    (false, 0) => decode::<C, false, 0>(a, g, chunk),
                    (true, 0) => decode::<C, true, 0>(a, g, chunk),
                    (false, 1) => decode::<C, false, 1>(a, g, chunk),
                    (true, 1) => decode::<C, true, 1>(a, g, chunk),
                    (false, 2) => decode::<C, false, 2>(a, g, chunk),
                    (true, 2) => decode::<C, true, 2>(a, g, chunk),
                    (false, _) => decode::<C, false, 3>(a, g, chunk),
                    (true, _) => decode::<C, true, 3>(a, g, chunk),
                }
                for row in (0..a.m).step_by(ROWS) {
                    let rows = ROWS.min(a.m - row);
                    let at = row * a.groups + g;
                    let span = Span {
                        w: a.w,
                        group_bytes: 0,
                        groups,
                        group: a.group,
                        offset: a.offset,
                        rows,
                        x: a.x.cast::<i8>().add(row * a.x_stride + g * a.group),
                        x_stride: a.x_stride,
                        scales: a.x_scales.add(at),
                        sums: a.x_sums.add(at),
                        scales_stride: a.groups,
                        acc: a.y.add(row * a.y_stride + output),
                    };
                    gather(&span, paired, block);
                    tiles(&span, a.y_stride, n, tile, chunk, block);
                }
            }
        }
    }
}

/// The tiles of the rows of `span` and of `n` outputs.
unsafe fn tiles(
    span: &Span,
    stride: usize,
    n: usize,
    tile: Tile,
    chunk: *const Chunk,
    block: *const Block,
) {
    // SAFETY: handed on.
    unsafe {
        if span.rows == ROWS && n == OUTPUTS {
            for part in 0..OUTPUTS / 8 {
                tile(chunk, block, part, span.acc.add(part * 8), stride);
            }
            return;
        }
        let mut whole = [0.0_f32; ROWS * OUTPUTS];
        let whole = whole.as_mut_ptr();
        if (*chunk).resumes {
            for row in 0..span.rows {
                copy(span.acc.add(row * stride), whole.add(row * OUTPUTS), n);
            }
        }
        for part in 0..n.div_ceil(8) {
            tile(chunk, block, part, whole.add(part * 8), OUTPUTS);
        }
        for row in 0..span.rows {
            copy(whole.add(row * OUTPUTS), span.acc.add(row * stride), n);
        }
    }
}

/// Where the vector of the four outputs of `quad` stands among the sixteen of eight `k`; `half` is the
/// half of the outputs if paired, else of the `k`.
#[inline]
fn place<const PAIRED: bool>(quad: usize, half: usize) -> usize {
    if PAIRED { quad * 2 + half } else { half * 8 + quad }
}

/// Decodes outputs `32 * PART` and on of the groups of `chunk`, from group `first` of the panel of `a`.
#[inline(never)]
#[target_feature(enable = "neon")]
unsafe fn decode<C: Codes, const PAIRED: bool, const PART: usize>(
    a: &MatmulArgs,
    first: usize,
    chunk: *mut Chunk,
) {
    if PART * 2 >= C::FIELDS {
        return;
    }
    // SAFETY: as in `many_rows`.
    unsafe {
        let group_bytes = a.panel_bytes / a.groups;
        let less = (&raw mut (*chunk).less).cast::<int8x16_t>();
        for g in 0..(*chunk).groups {
            let w = a.w.add((first + g) * group_bytes);
            let scales = w.add(a.group / 4 * step_bytes::<C>() + PART * OUTPUTS * 2);
            let offsets = scales.add(panel_rows::<C>() * 2);
            if g == 0 || a.offset == HAS_ZERO {
                spread_less::<C, PAIRED, PART>(a.offset, offsets.cast(), less.cast());
            }
            let out = (&raw mut (*chunk).codes).cast::<int8x16_t>().add(g * a.group * 2);
            let less: [int8x16_t; 16] = std::array::from_fn(|i| *less.add(i));
            for pair in 0..a.group / 8 {
                for vector in 0..4 {
                    let at = w.add(pair * 2 * step_bytes::<C>() + vector * 16);
                    let both = two_steps::<C, PAIRED>(at);
                    for half in 0..2 {
                        for field in 0..2 {
                            let stored = C::stored(&both[half], PART * 2 + field);
                            let place = place::<PAIRED>(field * 4 + vector, half);
                            *out.add(pair * 16 + place) = match C::BITS {
                                8 => stored,
                                _ => vsubq_s8(stored, less[place]),
                            };
                        }
                    }
                }
            }
            spread::<PAIRED>(scales, (&raw mut (*chunk).scales).cast::<float32x4_t>().add(g * 16));
            if a.offset == HAS_MINIMUM {
                let minima = (&raw mut (*chunk).minima).cast::<float32x4_t>().add(g * 16);
                spread::<PAIRED>(offsets, minima);
            }
        }
    }
}

/// What to take off the stored codes of 32 outputs.
unsafe fn spread_less<C: Codes, const PAIRED: bool, const PART: usize>(
    offset: u32,
    zeros: *const i16,
    out: *mut u8,
) {
    for output in 0..OUTPUTS {
        let zero = match offset {
            0 => C::MIDDLE,
            // SAFETY: the caller vouches for the table. Volatile, or the compiler makes worse vectors.
            HAS_ZERO => i32::from(unsafe { zeros.add(output).read_volatile() }),
            _ => 0,
        };
        let less = (zero - C::LESS[PART * 2 + output / 16]) as u8;
        // SAFETY: the caller vouches for 256 bytes.
        unsafe {
            if PAIRED {
                out.add(output * 8).cast::<[u8; 8]>().write([less; 8]);
            } else {
                out.add(output * 4).cast::<[u8; 4]>().write([less; 4]);
                out.add(output * 4 + 128).cast::<[u8; 4]>().write([less; 4]);
            }
        }
    }
}

/// 32 halves of a table as floats, each twice if paired.
#[target_feature(enable = "neon")]
unsafe fn spread<const PAIRED: bool>(table: *const u8, out: *mut float32x4_t) {
    for quad in 0..OUTPUTS / 4 {
        // SAFETY: the caller vouches for the table and sixteen vectors.
        unsafe {
            let values = halves(table.add(quad * 8));
            if PAIRED {
                [*out.add(quad * 2), *out.add(quad * 2 + 1)] = twice(values);
            } else {
                *out.add(quad) = values;
            }
        }
    }
}

/// Lays out the activations of `span`.
pub(super) unsafe fn gather(span: &Span, paired: bool, block: *mut Block) {
    // SAFETY: `span` has the rows and the groups, and no more than a chunk of `k`.
    unsafe {
        let rows: [usize; ROWS] = std::array::from_fn(|i| i.min(span.rows - 1));
        let starts = rows.map(|row| span.x.add(row * span.x_stride));
        (*block).rows = starts;
        let scales = rows.map(|row| span.scales.add(row * span.scales_stride).cast::<u32>());
        let sums = rows.map(|row| span.sums.add(row * span.scales_stride).cast::<u32>());
        let (out_scales, out_sums) = (&raw mut (*block).scales, &raw mut (*block).sums);
        if paired {
            pair_up(starts, span.groups * span.group, (&raw mut (*block).codes).cast());
            pair_words(scales, span.groups, out_scales.cast());
            pair_words(sums, span.groups, out_sums.cast());
        } else {
            transpose_words(scales, span.groups, out_scales.cast());
            transpose_words(sums, span.groups, out_sums.cast());
        }
    }
}

/// Eight bytes of rows 0 and 1, of rows 2 and 3, and so on, up to `k` of them.
#[target_feature(enable = "neon")]
unsafe fn pair_up(rows: [*const i8; ROWS], k: usize, out: *mut int64x2_t) {
    for k in (0..k).step_by(16) {
        // SAFETY: the caller vouches for `k` bytes of each row and room for them.
        unsafe {
            let [a, b, c, d] = rows.map(|row| vld1q_s64(row.add(k).cast()));
            let out = out.add(k / 4);
            *out = vzip1q_s64(a, b);
            *out.add(1) = vzip1q_s64(c, d);
            *out.add(2) = vzip2q_s64(a, b);
            *out.add(3) = vzip2q_s64(c, d);
        }
    }
}

/// For each group the word of each row twice.
unsafe fn pair_words(rows: [*const u32; ROWS], groups: usize, out: *mut [u64; ROWS]) {
    for g in 0..groups {
        // SAFETY: the caller vouches for `groups` words of each row and room for them.
        unsafe {
            *out.add(g) = rows.map(|row| {
                // Volatile, or the compiler makes vectors of it, with ways around for rows that overlap.
                let word = u64::from(row.add(g).read_volatile());
                word << 32 | word
            });
        }
    }
}

/// For each group the words of the rows.
unsafe fn transpose_words(rows: [*const u32; ROWS], groups: usize, out: *mut [u32; 2 * ROWS]) {
    for g in 0..groups {
        // SAFETY: the caller vouches for `groups` words of each row and room for them.
        unsafe { *out.add(g).cast::<[u32; ROWS]>() = rows.map(|row| *row.add(g)) };
    }
}

/// Declares the matmul entries of a row file from its innermost loops, `few` and `many` for each width.
macro_rules! entries {
    ($many:expr; $($(#[$doc:meta])* $name:ident = $codes:ident[$one:expr, $two:expr, $three:expr, $four:expr];)*) => {
        $($(#[$doc])*
        pub(super) unsafe extern "C" fn $name(a: *const $crate::kernel::abi::MatmulArgs) {
            const LOOPS: $crate::kernel::arm_matmul::Loops = $crate::kernel::arm_matmul::Loops {
                few: [$one, $two, $three, $four],
                many: $many,
            };
            // SAFETY: handed on.
            unsafe {
                $crate::kernel::arm_matmul::matmul::<$crate::kernel::arm_codes::$codes>(a, &LOOPS)
            }
        })*
    };
}
pub(super) use entries;
