//! The values that a group of weights may take, and the search for the scale that fits it best.
//!
//! Scales are f16 in the file, so every scale here is one: what is compared is what will be stored.
#![forbid(unsafe_code)]

use super::pack::{Rows, pack_panel};
use crate::error::{Error, Result};
use crate::kernel::layout::{Format, Layout, Offset};
use crate::threads::Pool;
use half::f16;

/// Adding and subtracting this rounds a float of less than 2^22 to an integer, ties to even, also where
/// there is no instruction for it.
const ROUND: f32 = 12_582_912.0;

/// The codes of a format.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Levels {
    low: f32,
    high: f32,
    middle: f32,
    zero_points: bool,
}

impl Levels {
    /// The codes of `format`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for floats and for formats with a minimum, which no method here chooses.
    pub fn of(format: Format) -> Result<Self> {
        let zero_points = match format.offset() {
            Offset::None => false,
            Offset::Zero => true,
            Offset::Minimum => {
                return Err(Error::Unsupported(format!("quantising to {}", format.name())));
            }
        };
        let (low, high) = match format.bits() {
            8 => (-127.0, 127.0),
            bits if format.is_quantised() => (0.0, ((1_u32 << bits) - 1) as f32),
            _ => return Err(Error::Unsupported(format!("quantising to {}", format.name()))),
        };
        Ok(Self { low, high, middle: format.middle() as f32, zero_points })
    }

    /// The code nearest to `x` steps from the zero.
    #[inline]
    #[must_use]
    pub fn nearest(&self, x: f32, zero: f32) -> f32 {
        let bounded = (x + zero).max(self.low).min(self.high);
        (bounded + ROUND) - ROUND
    }

    /// The scale and zero that give about the least `sum h (w - s (q - z))^2`.
    ///
    /// Ranges between half and somewhat more than that of the weights are tried; for the codes of each, the
    /// best scale is known in closed form.
    #[must_use]
    pub fn fit(&self, w: &[f32], h: &[f32], search: Search) -> (f32, f32) {
        let mut best = Best { error: f64::INFINITY, scale: 0.0, zero: self.middle };
        let low = w.iter().fold(f32::INFINITY, |low, w| low.min(*w));
        let high = w.iter().fold(f32::NEG_INFINITY, |high, w| high.max(*w));
        if low == 0.0 && high == 0.0 || w.is_empty() {
            return (0.0, self.middle);
        }
        if self.zero_points {
            let (low, high) = if low == high { (low.min(0.0), high.max(0.0)) } else { (low, high) };
            let steps = if search == Search::Best { 0..10 } else { 1..2 };
            for a in steps.clone() {
                for b in steps.clone() {
                    let share = |step: i32| 1.05 - 0.05 * step as f32;
                    let (low, high) = (low * share(a), high * share(b));
                    if high > low {
                        let scale = (high - low) / self.high;
                        let zero = (-low / scale).round_ties_even().clamp(-32000.0, 32000.0);
                        self.offer(&mut best, w, h, scale, zero);
                    }
                }
            }
        } else {
            let top = if high >= -low { high } else { low };
            let reach = if self.low < 0.0 { self.high } else { self.middle };
            if search == Search::Range {
                self.offer(&mut best, w, h, -top / reach, self.middle);
                return (best.scale, best.zero);
            }
            for step in 0..40 {
                let scale = top / (reach * (0.75 + 0.03 * step as f32));
                self.offer(&mut best, w, h, scale, self.middle);
                self.offer(&mut best, w, h, -scale, self.middle);
            }
        }
        (best.scale, best.zero)
    }

    /// Compares the codes that a scale gives, under the scale that is best for them.
    fn offer(&self, best: &mut Best, w: &[f32], h: &[f32], scale: f32, zero: f32) {
        if !scale.is_finite() || scale == 0.0 {
            return;
        }
        let inverse = 1.0 / scale;
        const LANES: usize = 8;
        let (mut cross, mut square) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        let (chunks, rest) = w.as_chunks::<LANES>();
        let (h_chunks, h_rest) = h.as_chunks::<LANES>();
        for (w, h) in chunks.iter().zip(h_chunks) {
            for lane in 0..LANES {
                let q = self.nearest(w[lane] * inverse, zero) - zero;
                let hq = h[lane] * q;
                cross[lane] += hq * w[lane];
                square[lane] += hq * q;
            }
        }
        for (lane, (w, h)) in rest.iter().zip(h_rest).enumerate() {
            let q = self.nearest(w * inverse, zero) - zero;
            cross[lane] += h * q * w;
            square[lane] += h * q * q;
        }
        let sum = |lanes: [f32; LANES]| lanes.iter().map(|x| f64::from(*x)).sum::<f64>();
        let (cross, square) = (sum(cross), sum(square));
        if square <= 0.0 {
            return;
        }
        let scale = f16::from_f64(cross / square);
        if !scale.is_finite() || scale == f16::ZERO {
            return;
        }
        let s = scale.to_f64();
        // Less the sum of h w^2, which is the same for all.
        let error = s * s * square - 2.0 * s * cross;
        if error < best.error {
            *best = Best { error, scale: scale.to_f32(), zero };
        }
    }
}

struct Best {
    error: f64,
    scale: f32,
    zero: f32,
}

/// The values that the weights of a matrix may take.
#[derive(Clone, Copy)]
pub struct Grid<'a> {
    /// The codes.
    pub levels: Levels,
    /// Columns that share a scale.
    pub group: usize,
    /// What column `j` is multiplied by after the codes: the inverse of what its weights are multiplied by
    /// before they are packed. Ones where the weights are packed as they are.
    pub columns: &'a [f32],
}

impl Grid<'_> {
    /// The weight that code `j` of a row stands for.
    #[inline]
    #[must_use]
    pub fn value(&self, row: &Row, j: usize) -> f32 {
        let group = j / self.group;
        row.scales[group] * (f32::from(row.codes[j]) - row.zeros[group]) * self.columns[j]
    }

    /// The code nearest to the weight `w` in column `j`.
    #[inline]
    #[must_use]
    pub fn nearest(&self, row: &Row, j: usize, w: f32) -> i8 {
        let group = j / self.group;
        let step = row.scales[group] * self.columns[j];
        let x = if step == 0.0 { 0.0 } else { w / step };
        self.levels.nearest(x, row.zeros[group]) as i8
    }

    /// Fits scales to the rows of `w`, where column `j` counts `h[j]`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a weight that is no finite number.
    pub fn fit(&self, pool: &Pool, w: &[f32], h: &[f32], search: Search) -> Result<Vec<Row>> {
        let k = self.columns.len();
        if let Some(bad) = w.iter().find(|w| !w.is_finite() || w.abs() > 1e6) {
            let what = format!("a weight of {bad}: infinite, no number, or too large for a scale");
            return Err(Error::InvalidArgument(what));
        }
        let h: Vec<f32> = h.iter().zip(self.columns).map(|(h, c)| h * c * c).collect();
        let mut rows = vec![Row::default(); w.len() / k];
        pool.chunks_mut(&mut rows, 1, &|index, row| {
            let w = w[index * k..(index + 1) * k].iter().zip(self.columns);
            let w: Vec<f32> = w.map(|(w, column)| w / column).collect();
            let groups = w.chunks(self.group).zip(h.chunks(self.group));
            let fits = groups.map(|(w, h)| self.levels.fit(w, h, search));
            let (scales, zeros) = fits.unzip();
            row[0] = Row { codes: vec![0; k], scales, zeros };
        });
        Ok(rows)
    }

    /// Gives fitted rows the codes nearest to `w`.
    pub fn round(&self, pool: &Pool, w: &[f32], rows: &mut [Row]) {
        let k = self.columns.len();
        pool.chunks_mut(rows, 1, &|index, row| {
            let row = &mut row[0];
            for j in 0..k {
                row.codes[j] = self.nearest(row, j, w[index * k + j]);
            }
        });
    }
}

/// How long to look for a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// The range of the weights.
    Range,
    /// Ranges around that.
    Best,
}

/// One output row as codes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// One code for each weight: from 0 up, for bytes signed.
    pub codes: Vec<i8>,
    /// One scale for each group; each an f16.
    pub scales: Vec<f32>,
    /// One zero for each group.
    pub zeros: Vec<f32>,
}

impl Row {
    /// Whether every scale divided by `by` is still exactly an f16.
    #[must_use]
    pub fn divides(&self, by: f32) -> bool {
        self.scales.iter().all(|scale| {
            let quotient = scale / by;
            f16::from_f32(quotient).to_f32() == quotient
        })
    }
}

/// Packs panel `index` of a matrix of rows.
///
/// # Errors
/// [`Error::InvalidArgument`] when the rows do not fit the layout.
pub fn pack_rows(layout: &Layout, rows: &[Row], index: usize, panel: &mut [u8]) -> Result<()> {
    let first = index * layout.panel_rows();
    let rows = &rows[first..rows.len().min(first + layout.panel_rows())];
    let codes: Vec<u8> =
        rows.iter().flat_map(|row| row.codes.iter().map(|code| code.cast_unsigned())).collect();
    let scales: Vec<f16> =
        rows.iter().flat_map(|row| row.scales.iter().map(|scale| f16::from_f32(*scale))).collect();
    let zeros = rows.iter().flat_map(|row| row.zeros.iter());
    let offsets: Vec<u16> = match layout.format().offset() {
        Offset::None => Vec::new(),
        _ => zeros.map(|zero| (*zero as i16).cast_unsigned()).collect(),
    };
    let data = Rows::Codes { codes: &codes, scales: &scales, offsets: &offsets };
    pack_panel(layout, rows.len(), data, panel)
}
