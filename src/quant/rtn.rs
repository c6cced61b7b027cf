//! Round to nearest: the baseline quantiser, no data needed.
//!
//! Scales are rounded to f16 before the codes are chosen, so the codes are the nearest for the scale
//! that the file really holds.
#![forbid(unsafe_code)]

use super::pack::GroupPacker;
use crate::error::{Error, Result};
use crate::kernel::layout::{Layout, Offset};
use half::f16;

/// Quantises the first `rows` rows of `layout.k()` floats and packs them as one panel; allocates nothing.
///
/// Symmetric codes of few bits use the full range: the value of largest magnitude becomes code 0, which
/// has no positive partner. Zero points are integers among the codes, so that zero stays zero; a minimum
/// is the least weight.
///
/// # Errors
/// [`Error::InvalidArgument`] for a weight that is no finite number or too large for an f16 scale, or when
/// the lengths do not fit the layout; [`Error::Unsupported`] for a format of floats.
pub fn pack_panel(layout: &Layout, rows: usize, x: &[f32], panel: &mut [u8]) -> Result<()> {
    let (format, k, group) = (layout.format(), layout.k(), layout.group());
    if rows > layout.panel_rows() || x.len() != rows * k || panel.len() != layout.panel_bytes() {
        let what = "a panel has a fixed number of rows at most, each as long as the layout says";
        return Err(Error::InvalidArgument(what.into()));
    }
    if !format.is_quantised() {
        return Err(Error::Unsupported(format!("rounding to the format {}", format.name())));
    }
    for (g, bytes) in panel.chunks_exact_mut(layout.group_bytes()).enumerate() {
        let mut out = GroupPacker::new(layout, bytes);
        for (row, x) in x.chunks_exact(k).enumerate() {
            let weights = &x[g * group..k.min((g + 1) * group)];
            let grid = Grid::fit(format.bits(), format.offset(), weights);
            if !grid.scale.is_finite()
                || !f16::from_f32(grid.least).is_finite()
                || weights.iter().any(|w| !w.is_finite())
            {
                let what = "a weight that is infinite, no number, or too large for an f16 scale";
                return Err(Error::InvalidArgument(what.into()));
            }
            let mut codes = [0; 128];
            for (weights, first) in weights.chunks(codes.len()).zip((0..).step_by(128)) {
                let codes = &mut codes[..weights.len()];
                codes.iter_mut().zip(weights).for_each(|(code, w)| *code = grid.code(*w));
                out.codes(row, first, codes);
            }
            out.tables(row, grid.scale, grid.offset);
        }
    }
    Ok(())
}

/// The values that the codes of a group stand for.
struct Grid {
    scale: f16,
    /// The bits that are stored as the offset.
    offset: u16,
    inverse: f32,
    /// What is taken off a weight before it is divided by the scale.
    least: f32,
    /// Added to the rounded quotient.
    middle: f32,
    /// The codes there are; those of bytes are signed.
    codes: [f32; 2],
}

impl Grid {
    fn fit(bits: usize, offset: Offset, weights: &[f32]) -> Self {
        let top = ((1_u32 << bits) - 1) as f32;
        let half = (1_u32 << (bits - 1)) as f32;
        let low = weights.iter().fold(0.0_f32, |low, w| low.min(*w));
        let high = weights.iter().fold(0.0_f32, |high, w| high.max(*w));
        let mut grid = Self {
            scale: f16::ZERO,
            offset: 0,
            inverse: 0.0,
            least: 0.0,
            middle: half,
            codes: [0.0, top],
        };
        grid.scale = f16::from_f32(match offset {
            Offset::None if bits == 8 => {
                (grid.middle, grid.codes) = (0.0, [-127.0, 127.0]);
                high.max(-low) / 127.0
            }
            Offset::None => {
                let largest = |top: f32, w: &f32| if w.abs() > top.abs() { *w } else { top };
                weights.iter().fold(0.0, largest) / -half
            }
            Offset::Zero => (high - low) / top,
            Offset::Minimum => {
                let low = weights.iter().fold(f32::INFINITY, |low, w| low.min(*w));
                let high = weights.iter().fold(f32::NEG_INFINITY, |high, w| high.max(*w));
                let least = f16::from_f32(low);
                (grid.least, grid.middle, grid.offset) = (least.to_f32(), 0.0, least.to_bits());
                (high - grid.least) / top
            }
        });
        if grid.scale != f16::ZERO {
            grid.inverse = 1.0 / grid.scale.to_f32();
        }
        if offset == Offset::Zero {
            grid.middle = (-low * grid.inverse).round_ties_even().clamp(0.0, top);
            grid.offset = grid.middle as u16;
        }
        grid
    }

    /// The nearest code of a weight: a byte whatever its sign.
    fn code(&self, w: f32) -> u8 {
        // Beyond this no quotient has another code than here, and up to it `round` works.
        let quotient = ((w - self.least) * self.inverse).clamp(-1024.0, 1024.0);
        let code = (round(quotient) + self.middle).clamp(self.codes[0], self.codes[1]);
        (code as i32) as u8
    }
}

/// Rounds to the nearest integer, ties to even, what is below 2^22: next to the added number floats are
/// integers. Where a CPU's baseline has no such instruction, the function of the standard library is a call.
fn round(x: f32) -> f32 {
    const INTEGERS: f32 = 1.5 * (1 << 23) as f32;
    x + INTEGERS - INTEGERS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Packed;
    use crate::kernel::layout::Format;
    use crate::memory::Aligned;
    use crate::quant::format::unpack_row;

    /// The largest error of a row of 100 weights between -0.6 and 0.4, in steps of the format.
    fn worst(format: Format, steps: f32) -> f32 {
        let row: Vec<f32> = (0..100).map(|i| ((i * 37 % 101) as f32 - 60.0) * 0.01).collect();
        let layout = Layout::new(format, 32, 1, row.len()).unwrap();
        let mut panel = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
        pack_panel(&layout, 1, &row, &mut panel).unwrap();
        let mut out = vec![0.0; row.len()];
        unpack_row(&Packed::new(layout, &panel).unwrap(), 0, &mut out);
        let errors = out.iter().zip(&row).map(|(a, b)| (a - b).abs());
        errors.fold(0.0, f32::max) * steps
    }

    #[test]
    fn every_weight_is_within_its_step() {
        assert!(worst(Format::Q8, 127.0 / 0.6) <= 0.51);
        assert!(worst(Format::Q4Z, 15.0) <= 1.01);
        // The side opposite to the extreme value has one code less.
        assert!(worst(Format::Q4, 8.0 / 0.6) <= 1.01);
        assert!(worst(Format::Q3, 4.0 / 0.6) <= 1.01);
        assert!(worst(Format::Q2, 2.0 / 0.6) <= 1.01);
        assert!(worst(Format::Q3Z, 7.0) <= 1.01);
        assert!(worst(Format::Q2Z, 3.0) <= 1.01);
        for (format, steps) in [(Format::Q4M, 15.0), (Format::Q3M, 7.0), (Format::Q2M, 3.0)] {
            assert!(worst(format, steps) <= 0.51, "{}", format.name());
        }
    }

    /// The formula that `docs/quantization.md` gives to those who train weights for these codes.
    fn fake_quantise(group: &mut [f32], half: f32) {
        let largest = |top: f32, w: &f32| if w.abs() > top.abs() { *w } else { top };
        let top = group.iter().fold(0.0, largest);
        let s = f16::from_f32(top / -half).to_f32();
        let s = if s == 0.0 { 1.0 } else { s };
        group.iter_mut().for_each(|w| *w = (*w / s).round_ties_even().clamp(-half, half - 1.0) * s);
    }

    #[test]
    fn weights_trained_for_the_codes_come_through_unchanged() {
        let mut row: Vec<f32> = (0..256).map(|i| ((i * 193 % 257) as f32 - 120.5) * 3e-4).collect();
        for (format, half) in [(Format::Q4, 8.0), (Format::Q3, 4.0)] {
            for group in [128, 64, 32] {
                let layout = Layout::new(format, group, 1, row.len()).unwrap();
                let mut panel = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
                let mut out = vec![0.0; row.len()];
                // What training has left, and what a forward pass of it saw.
                let trained = row.clone();
                row.chunks_mut(group).for_each(|group| fake_quantise(group, half));
                for weights in [&trained, &row] {
                    pack_panel(&layout, 1, weights, &mut panel).unwrap();
                    unpack_row(&Packed::new(layout, &panel).unwrap(), 0, &mut out);
                    assert_eq!(out, row, "{} g{group}", format.name());
                }
                row = trained;
            }
        }
    }

    #[test]
    fn rounding_is_that_of_the_standard_library() {
        for step in -8192..=8192 {
            for x in [step as f32 * 0.125, step as f32 * 0.125 + 1e-4] {
                assert_eq!(round(x), x.round_ties_even(), "{x}");
            }
        }
    }

    #[test]
    fn zeros_stay_zero_and_nonsense_is_refused() {
        let layout = Layout::new(Format::Q4, 32, 1, 32).unwrap();
        let mut panel = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
        pack_panel(&layout, 1, &[0.0; 32], &mut panel).unwrap();
        let mut out = [1.0; 32];
        unpack_row(&Packed::new(layout, &panel).unwrap(), 0, &mut out);
        assert_eq!(out, [0.0; 32]);
        for bad in [f32::NAN, f32::INFINITY, 1e30] {
            let mut row = [0.0; 32];
            row[7] = bad;
            assert!(pack_panel(&layout, 1, &row, &mut panel).is_err(), "{bad}");
        }
        assert!(pack_panel(&layout, 2, &[0.0; 32], &mut panel).is_err());
    }
}
