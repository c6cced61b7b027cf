//! Round to nearest: the baseline quantiser, no data needed.
//!
//! Scales are rounded to f16 before the codes are chosen, so the codes are the nearest for the scale
//! that the file really holds.
#![forbid(unsafe_code)]

use super::pack::GroupPacker;
use crate::error::{Error, Result};
use crate::kernel::layout::{Format, Layout, PANEL};
use half::f16;

/// Quantises the first `rows` rows of `layout.k()` floats and packs them as one panel; allocates nothing.
///
/// Symmetric four bits use the full range: the value of largest magnitude becomes code 0, which has no
/// positive partner. Zero points are integers between 0 and 15.
///
/// # Errors
/// [`Error::InvalidArgument`] for a weight that is no finite number or too large for an f16 scale, or when
/// the lengths do not fit the layout; [`Error::Unsupported`] for a format this method does not write.
pub fn pack_panel(layout: &Layout, rows: usize, x: &[f32], panel: &mut [u8]) -> Result<()> {
    let (k, group) = (layout.k(), layout.group());
    if rows > PANEL || x.len() != rows * k || panel.len() != layout.panel_bytes() {
        let what = "a panel has at most 32 rows, each as long as the layout says";
        return Err(Error::InvalidArgument(what.into()));
    }
    let round = match layout.format() {
        Format::Q8 => bytes,
        Format::Q4 => symmetric,
        Format::Q4Z => with_zero,
        other => {
            return Err(Error::Unsupported(format!("rounding to the format {}", other.name())));
        }
    };
    let mut codes = [0_u8; 128];
    for (g, bytes) in panel.chunks_exact_mut(layout.group_bytes()).enumerate() {
        let mut out = GroupPacker::new(layout, bytes);
        for (row, x) in x.chunks_exact(k).enumerate() {
            let weights = &x[g * group..k.min((g + 1) * group)];
            let codes = &mut codes[..weights.len()];
            let (scale, offset) = round(weights, codes);
            if !scale.is_finite() || weights.iter().any(|w| !w.is_finite()) {
                let what = "a weight that is infinite, no number, or too large for an f16 scale";
                return Err(Error::InvalidArgument(what.into()));
            }
            out.row(row, codes, scale, offset);
        }
    }
    Ok(())
}

/// The reciprocal, or zero for a scale that is zero.
fn inverse(scale: f16) -> f32 {
    if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() }
}

/// Each rounds one group: codes out, scale and zero point back.
fn bytes(weights: &[f32], codes: &mut [u8]) -> (f16, u16) {
    let top = weights.iter().fold(0.0_f32, |top, w| top.max(w.abs()));
    let scale = f16::from_f32(top / 127.0);
    let inverse = inverse(scale);
    for (code, w) in codes.iter_mut().zip(weights) {
        let value = (w * inverse).round_ties_even().clamp(-127.0, 127.0);
        *code = (value as i8).cast_unsigned();
    }
    (scale, 0)
}

fn symmetric(weights: &[f32], codes: &mut [u8]) -> (f16, u16) {
    let largest = |top: f32, w: &f32| if w.abs() > top.abs() { *w } else { top };
    let scale = f16::from_f32(weights.iter().fold(0.0, largest) / -8.0);
    let inverse = inverse(scale);
    for (code, w) in codes.iter_mut().zip(weights) {
        *code = ((w * inverse).round_ties_even() + 8.0).clamp(0.0, 15.0) as u8;
    }
    (scale, 0)
}

fn with_zero(weights: &[f32], codes: &mut [u8]) -> (f16, u16) {
    let low = weights.iter().fold(0.0_f32, |low, w| low.min(*w));
    let high = weights.iter().fold(0.0_f32, |high, w| high.max(*w));
    let scale = f16::from_f32((high - low) / 15.0);
    let inverse = inverse(scale);
    let zero = (-low * inverse).round_ties_even().clamp(0.0, 15.0);
    for (code, w) in codes.iter_mut().zip(weights) {
        *code = ((w * inverse).round_ties_even() + zero).clamp(0.0, 15.0) as u8;
    }
    (scale, zero as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Packed;
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
