//! The way through a quantised product that all Arm rows share; [`super::neon`], [`super::dotprod`] and
//! [`super::i8mm`] bring the innermost loops.
//!
//! Up to eight rows of activations go over a panel in spans, some groups that fit the first-level cache:
//! there as many rows as the registers allow meet a few vectors of codes at a time, as many as leave room
//! for their sums of integers and of floats, and the next ones find the span in the cache. So a
//! weight comes from memory once, and a float leaves its register once a span. What several rows need in
//! every panel, such as activations in another order, is laid out once for several panels, which then take
//! turns, a span each. One row has nothing to share, and goes through memory in order.
//!
//! For more rows, a chunk of a panel, 32 outputs by 512 `k`, is decoded to signed bytes once, and one product
//! of bytes serves every format, in tiles of four rows by eight outputs; the outputs themselves carry the
//! sums from chunk to chunk. Zero points go into the bytes where they fit. A panel with one that does not,
//! and a group that is a long row, are left to the loops for few rows.
//!
//! Either way each output has one accumulator and takes the groups in order.

use super::abi::MatmulArgs;
use super::arm_asm::prefetch;
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
/// The most outputs that share what is laid out of a span, some panels.
pub(super) const HELD: usize = 2 * MAX_PANEL;
/// The most bytes of a span, unless a group has more.
const SPAN: usize = 8 * 1024;
/// How many lines of a span are fetched before it is walked.
const AHEAD: usize = 8;
/// Values of `k` in a chunk, and the most in a span that is gathered: 16 kB of decoded codes.
pub(super) const CHUNK: usize = 512;
/// The most groups of a chunk.
pub(super) const GROUPS: usize = CHUNK / 16;
/// The most groups of a span times fields of a group: sixteen `k` of sixteen outputs take 64 bytes of codes of two
/// bits and 32 of scales.
const FIELDS: usize = SPAN / (64 + 32);
/// Rows of activations that are gathered, and outputs of a chunk.
const ROWS: usize = 4;
const OUTPUTS: usize = 32;

/// Four f32 from four f16.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn halves(table: *const u8) -> float32x4_t {
    // SAFETY: the caller vouches for 8 bytes.
    halves_of(unsafe { vld1_s16(table.cast()) })
}

/// Four f32 from the bits of four f16.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn halves_of(bits: int16x4_t) -> float32x4_t {
    vcvt_f32_f16(vreinterpret_f16_s16(bits))
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

/// `word` in both lanes: large cores have more pipes for this than for vectors.
#[inline]
pub(super) fn twice_word(word: u32) -> u64 {
    u64::from(word) << 32 | u64::from(word)
}

/// What of `sum`, the sum of the activations of a group, belongs to the dot of a field of `C` that is
/// stored less `less`.
#[inline]
pub(super) fn share<C: Codes>(offset: u32, less: i32, sum: i32) -> i32 {
    (less - if offset == 0 { C::MIDDLE } else { 0 }) * sum
}

/// Some groups of a panel, and the rows of activations that meet them together.
#[derive(Clone, Copy)]
pub(super) struct Span {
    /// The first group.
    pub(super) w: *const u8,
    pub(super) group_bytes: usize,
    pub(super) groups: usize,
    /// Values of `k` in a group.
    pub(super) group: usize,
    /// [`MatmulArgs::offset`].
    pub(super) offset: u32,
    /// One to eight rows.
    pub(super) rows: usize,
    /// The first row at the first `k`.
    pub(super) x: *const i8,
    pub(super) x_stride: usize,
    /// The first row's of the first group.
    pub(super) scales: *const f32,
    pub(super) sums: *const i32,
    /// Scales from one row to the next.
    pub(super) scales_stride: usize,
    /// The outputs of the panel so far, each row [`HELD`] after the one before.
    pub(super) acc: *mut f32,
    /// What [`Few::lay`] lays out.
    pub(super) laid: *mut Laid,
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

    /// Without the first rows.
    pub(super) unsafe fn rows_after(&self, rows: usize) -> Self {
        // SAFETY: the caller vouches for a row after these.
        unsafe {
            Self {
                rows: self.rows - rows,
                x: self.x.add(rows * self.x_stride),
                scales: self.scales.add(rows * self.scales_stride),
                sums: self.sums.add(rows * self.scales_stride),
                acc: self.acc.add(rows * HELD),
                ..*self
            }
        }
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

/// Adds a span to the outputs of its rows, or lays out what it needs of them.
pub(super) type Walk = unsafe fn(&Span);
/// Adds the groups of `chunk` to outputs `8 * part` and on of it, for four rows at `y`, `stride` apart.
pub(super) type Tile =
    unsafe fn(chunk: *const Chunk, x: *const Block, part: usize, y: *mut f32, stride: usize);

/// The innermost loop for so many rows.
#[derive(Clone, Copy)]
pub(super) struct Few {
    /// What comes before it, once for several panels.
    pub(super) lay: Option<Walk>,
    pub(super) walk: Walk,
}

impl Few {
    /// Makes `span` ready for any panel.
    pub(super) unsafe fn prepare(&self, span: &Span) {
        if let Some(lay) = self.lay {
            // SAFETY: handed on.
            unsafe { lay(span) };
        }
    }
}

/// A loop that takes the activations as they lie.
pub(super) const fn plain(walk: Walk) -> Few {
    Few { lay: None, walk }
}

/// The innermost loops of an instruction set for one width of codes.
#[derive(Clone, Copy)]
pub(super) struct Loops {
    /// For one row, for two, and so on, up to as many as go together.
    pub(super) few: &'static [Few],
    /// For many, and whether it wants activations and codes in pairs of rows; without one, `few` does.
    pub(super) many: Option<(bool, Tile)>,
}

/// The product that `a` describes, of codes `C`.
///
/// # Safety
/// The block keeps its promises, and the CPU has what `loops` need.
pub(super) unsafe fn matmul<C: Codes>(a: *const MatmulArgs, loops: &Loops) {
    // SAFETY: handed on; some panels of a block are a block.
    unsafe {
        let a = &*a;
        let (mut chunk, mut block) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        let mut laid = MaybeUninit::uninit();
        let mut few = |a: &MatmulArgs| {
            for row in (0..a.m).step_by(FEW) {
                few_rows::<C>(a, row, FEW.min(a.m - row), loops.few, laid.as_mut_ptr());
            }
        };
        let Some((paired, tile)) = loops.many.filter(|_| a.m > FEW && a.group <= LONGEST) else {
            let first = loops.few[a.m.min(loops.few.len()) - 1];
            let together = if first.lay.is_some() { HELD / panel_rows::<C>() } else { 1 };
            for panel in (0..a.panels).step_by(together) {
                few(&panels::<C>(a, panel, together.min(a.panels - panel)));
            }
            return;
        };
        for panel in 0..a.panels {
            let a = panels::<C>(a, panel, 1);
            if a.offset != HAS_ZERO || zeros_fit::<C>(&a) {
                many_rows::<C>(&a, paired, tile, chunk.as_mut_ptr(), block.as_mut_ptr());
            } else {
                few(&a);
            }
        }
    }
}

/// The product with so many panels of `a`.
unsafe fn panels<C: Codes>(a: &MatmulArgs, first: usize, panels: usize) -> MatmulArgs {
    let rows = panel_rows::<C>();
    // SAFETY: the caller vouches for the panels.
    unsafe {
        MatmulArgs {
            w: a.w.add(first * a.panel_bytes),
            panels,
            y: a.y.add(first * rows),
            n: (panels * rows).min(a.n - first * rows),
            ..*a
        }
    }
}

/// `rows` rows, at most eight, from `row` against the panels of `a`, at most [`HELD`] outputs.
unsafe fn few_rows<C: Codes>(
    a: &MatmulArgs,
    row: usize,
    rows: usize,
    few: &[Few],
    laid: *mut [Laid; 2],
) {
    let group_bytes = a.panel_bytes / a.groups;
    let groups = (SPAN / group_bytes).min(CHUNK / a.group).max(1);
    let mut acc = [MaybeUninit::<f32>::uninit(); FEW * HELD];
    let acc = acc.as_mut_ptr().cast::<f32>();
    // An odd last row may be taken for two.
    let taken = if rows == 1 { 1 } else { rows.next_multiple_of(2) };
    for r in 0..taken {
        for panel in 0..a.panels {
            // Only what is used: clearing the whole buffer took 7% of the instructions of a token.
            // SAFETY: at most `FEW` rows of at most `HELD` outputs.
            unsafe {
                let at = acc.add(r * HELD + panel * panel_rows::<C>());
                at.write_bytes(0, panel_rows::<C>());
            }
        }
    }
    let together = few.len().min(rows);
    let (turns, lays) = (rows.div_ceil(together), few[together - 1].lay.is_some());
    for g in (0..a.groups).step_by(groups) {
        let span = |turn: usize, panel: usize| {
            let first = turn * together;
            // SAFETY: the places are of a group, a row and a panel that the caller vouches for.
            unsafe {
                let at = (row + first) * a.groups + g;
                Span {
                    w: a.w.add(panel * a.panel_bytes + g * group_bytes),
                    group_bytes,
                    groups: groups.min(a.groups - g),
                    group: a.group,
                    offset: a.offset,
                    rows: together.min(rows - first),
                    x: a.x.cast::<i8>().add((row + first) * a.x_stride + g * a.group),
                    x_stride: a.x_stride,
                    scales: a.x_scales.add(at),
                    sums: a.x_sums.add(at),
                    scales_stride: a.groups,
                    acc: acc.add(first * HELD + panel * panel_rows::<C>()),
                    laid: laid.cast::<Laid>().add(turn),
                }
            }
        };
        for turn in 0..if lays { turns } else { 0 } {
            let span = span(turn, 0);
            // SAFETY: handed on.
            unsafe { few[span.rows - 1].prepare(&span) };
        }
        for panel in 0..a.panels {
            if a.panels > 1 {
                // The weights that are next lie elsewhere, where no core looks by itself.
                let (panel, g) =
                    if panel + 1 < a.panels { (panel + 1, g) } else { (0, g + groups) };
                let next = a.w.wrapping_add(panel * a.panel_bytes + g * group_bytes);
                (0..AHEAD).for_each(|line| prefetch(next.wrapping_add(line * 64)));
            }
            for turn in 0..turns {
                let span = span(turn, panel);
                // SAFETY: handed on.
                unsafe { (few[span.rows - 1].walk)(&span) };
            }
        }
    }
    for r in 0..rows {
        // SAFETY: the caller vouches for `n` outputs of the row, at most those of the panels.
        unsafe { copy(acc.add(r * HELD), a.y.add((row + r) * a.y_stride), a.n) };
    }
}

/// What all panels need of the activations of a span.
#[repr(C, align(64))]
pub(super) struct Laid {
    /// For i8mm eight `k` of each pair of rows after the other, then the next eight.
    pub(super) codes: [[u64; 2]; CHUNK * FEW / 16],
    /// What the sums of each group, row or pair of rows, and field start with.
    pub(super) starts: [[i32; 4]; FIELDS * FEW / 2],
    /// For i8mm what the scales of weights are multiplied with, likewise.
    pub(super) scales: [[f32; 4]; FIELDS * FEW / 2],
    /// For i8mm the sums of the codes of each group and pair of rows, each twice.
    pub(super) sums: [[i32; 4]; GROUPS * FEW / 2],
    /// For i8mm whether sums start with zero and the floats are converted.
    pub(super) converts: bool,
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
                        laid: std::ptr::null_mut(),
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
#[inline(never)]
unsafe fn gather(span: &Span, paired: bool, block: *mut Block) {
    // SAFETY: `span` has the rows and the groups, and no more than a chunk of `k`.
    unsafe {
        let rows: [usize; ROWS] = std::array::from_fn(|i| i.min(span.rows - 1));
        let starts = rows.map(|row| span.x.add(row * span.x_stride));
        (*block).rows = starts;
        let scales = rows.map(|row| span.scales.add(row * span.scales_stride).cast::<u32>());
        let sums = rows.map(|row| span.sums.add(row * span.scales_stride).cast::<u32>());
        let (out_scales, out_sums) = (&raw mut (*block).scales, &raw mut (*block).sums);
        if paired {
            let [a, b, c, d] = starts;
            let codes = (&raw mut (*block).codes).cast();
            pair_up([[a, b], [c, d]], span.groups * span.group, codes);
            pair_words(scales, span.groups, out_scales.cast());
            pair_words(sums, span.groups, out_sums.cast());
        } else {
            transpose_words(scales, span.groups, out_scales.cast());
            transpose_words(sums, span.groups, out_sums.cast());
        }
    }
}

/// Eight bytes of both rows of each pair, and so on, up to `k` of them.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn pair_up<const PAIRS: usize>(
    rows: [[*const i8; 2]; PAIRS],
    k: usize,
    mut out: *mut int64x2_t,
) {
    for k in (0..k).step_by(16) {
        // A loop and no `map`, which is not inlined where it calls what some CPUs alone have.
        for (pair, [a, b]) in rows.iter().enumerate() {
            // SAFETY: the caller vouches for `k` bytes of each row and room for them.
            unsafe {
                let (a, b) = (vld1q_s64(a.add(k).cast()), vld1q_s64(b.add(k).cast()));
                *out.add(pair) = vzip1q_s64(a, b);
                *out.add(PAIRS + pair) = vzip2q_s64(a, b);
            }
        }
        out = out.wrapping_add(2 * PAIRS);
    }
}

/// For each group the word of each row twice.
unsafe fn pair_words(rows: [*const u32; ROWS], groups: usize, out: *mut [u64; ROWS]) {
    for g in 0..groups {
        // SAFETY: the caller vouches for `groups` words of each row and room for them.
        unsafe {
            *out.add(g) = rows.map(|row| {
                // Volatile, or the compiler makes vectors of it, with ways around for rows that overlap.
                twice_word(row.add(g).read_volatile())
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
    ($many:expr; $($(#[$doc:meta])* $name:ident = $codes:ident[$($few:expr),*];)*) => {
        $($(#[$doc])*
        pub(super) unsafe extern "C" fn $name(a: *const $crate::kernel::abi::MatmulArgs) {
            const LOOPS: $crate::kernel::arm_matmul::Loops = $crate::kernel::arm_matmul::Loops {
                few: &[$($few),*],
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
