//! Round to nearest: the baseline quantiser, no data needed.
//!
//! Scales are rounded to f16 before the codes are chosen, so the codes are the nearest for the scale
//! that the file really holds.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::kernel::layout::{Format, Layout};
use half::f16;

/// Codes, scales and offsets of some rows, as [`super::pack::Rows::Codes`] wants them.
#[derive(Default)]
pub struct Quantised {
    /// One code a weight.
    pub codes: Vec<u8>,
    /// One scale for each group of a row.
    pub scales: Vec<f16>,
    /// One zero point for each group of a row of [`Format::Q4Z`]; else empty.
    pub offsets: Vec<u16>,
}

/// Quantises whole rows of `layout.k()` floats.
///
/// Symmetric four bits use the full range: the value of largest magnitude becomes code 0, which has no
/// positive partner. Zero points are integers between 0 and 15.
///
/// # Errors
/// [`Error::InvalidArgument`] for a weight that is no finite number or too large for an f16 scale, and
/// [`Error::Unsupported`] for a format this method does not write.
pub fn quantise_rows(layout: &Layout, rows: &[f32]) -> Result<Quantised> {
    let mut out = Quantised::default();
    for row in rows.chunks_exact(layout.k()) {
        for group in row.chunks(layout.group()) {
            let scale = match layout.format() {
                Format::Q8 => bytes(group, &mut out.codes),
                Format::Q4 => symmetric(group, &mut out.codes),
                Format::Q4Z => {
                    let (scale, zero) = with_zero(group, &mut out.codes);
                    out.offsets.push(zero);
                    scale
                }
                other => {
                    let what = format!("rounding to the format {}", other.name());
                    return Err(Error::Unsupported(what));
                }
            };
            if !scale.is_finite() || group.iter().any(|w| !w.is_finite()) {
                let what = "a weight that is infinite, no number, or too large for an f16 scale";
                return Err(Error::InvalidArgument(what.into()));
            }
            out.scales.push(scale);
        }
    }
    Ok(out)
}

/// The reciprocal, or zero for a scale that is zero.
fn inverse(scale: f16) -> f32 {
    if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() }
}

fn bytes(group: &[f32], codes: &mut Vec<u8>) -> f16 {
    let top = group.iter().fold(0.0_f32, |top, w| top.max(w.abs()));
    let scale = f16::from_f32(top / 127.0);
    let inverse = inverse(scale);
    codes.extend(group.iter().map(|w| {
        let code = (w * inverse).round_ties_even().clamp(-127.0, 127.0);
        (code as i8).cast_unsigned()
    }));
    scale
}

fn symmetric(group: &[f32], codes: &mut Vec<u8>) -> f16 {
    let extreme = group.iter().fold(0.0_f32, |top, w| if w.abs() > top.abs() { *w } else { top });
    let scale = f16::from_f32(extreme / -8.0);
    let inverse = inverse(scale);
    codes.extend(
        group.iter().map(|w| ((w * inverse).round_ties_even() + 8.0).clamp(0.0, 15.0) as u8),
    );
    scale
}

fn with_zero(group: &[f32], codes: &mut Vec<u8>) -> (f16, u16) {
    let low = group.iter().fold(0.0_f32, |low, w| low.min(*w));
    let high = group.iter().fold(0.0_f32, |high, w| high.max(*w));
    let scale = f16::from_f32((high - low) / 15.0);
    let inverse = inverse(scale);
    let zero = (-low * inverse).round_ties_even().clamp(0.0, 15.0);
    codes.extend(
        group.iter().map(|w| ((w * inverse).round_ties_even() + zero).clamp(0.0, 15.0) as u8),
    );
    (scale, zero as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(format: Format, rows: &[f32]) -> f32 {
        let layout = Layout::new(format, 32, 1, rows.len()).unwrap();
        let q = quantise_rows(&layout, rows).unwrap();
        let mut worst = 0.0_f32;
        for (i, w) in rows.iter().enumerate() {
            let (g, scale) = (i / 32, q.scales[i / 32].to_f32());
            let code = f32::from(q.codes[i]);
            let got = match format {
                Format::Q8 => scale * f32::from(q.codes[i].cast_signed()),
                Format::Q4 => scale * (code - 8.0),
                _ => scale * (code - f32::from(q.offsets[g].cast_signed())),
            };
            worst = worst.max((got - w).abs() / scale.abs());
        }
        worst
    }

    #[test]
    fn every_weight_is_within_half_a_step_where_the_range_allows() {
        let rows: Vec<f32> = (0..100).map(|i| ((i * 37 % 101) as f32 - 60.0) * 0.01).collect();
        assert!(worst(Format::Q8, &rows) <= 0.51);
        assert!(worst(Format::Q4Z, &rows) <= 1.01);
        // The side opposite to the extreme value has one code less.
        assert!(worst(Format::Q4, &rows) <= 1.01);
    }

    #[test]
    fn zeros_stay_zero_and_nonsense_is_refused() {
        let layout = Layout::new(Format::Q4, 32, 1, 32).unwrap();
        let q = quantise_rows(&layout, &[0.0; 32]).unwrap();
        assert!(q.codes.iter().all(|code| *code == 8) && q.scales == [f16::ZERO]);
        for bad in [f32::NAN, f32::INFINITY, 1e30] {
            let mut rows = [0.0; 32];
            rows[7] = bad;
            assert!(quantise_rows(&layout, &rows).is_err(), "{bad}");
        }
    }
}
