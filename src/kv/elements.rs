//! How one key and one value become elements of a chunk of 16 positions, and move from chunk to chunk.
//!
//! The chunks are those of the attention rows (`kernel::abi::AttendArgs`): a position is a lane of them.
//! Rounding happens here, once, when a position is written; after that only bytes move, so a fork, a
//! kept path or a restored snapshot holds what was written.
#![forbid(unsafe_code)]

use crate::kernel::{KvFormat, LANES};
use bytemuck::{cast_slice, cast_slice_mut};
use half::f16;

/// Rows of so few floats are rounded clearly better by one scale than by another, and searching costs them little.
const SHORT: usize = 16;

/// Codes that the largest magnitude of a short row may become.
const TOPS: std::ops::Range<u8> = 96..128;

/// Writes a key of up to `d` floats into lane `lane` of a chunk of keys.
pub(super) fn write_key(format: KvFormat, chunk: &mut [u8], d: usize, lane: usize, key: &[f32]) {
    match format {
        KvFormat::F32 => spread(cast_slice_mut::<_, f32>(chunk), lane, key.iter().copied()),
        KvFormat::F16 => {
            spread(cast_slice_mut::<_, f16>(chunk), lane, key.iter().map(|x| to_half(*x)));
        }
        KvFormat::I8 | KvFormat::I4 => {
            let (codes, scales) = chunk.split_at_mut(LANES * d);
            let (scale, inverse) = eight_bits(key);
            cast_slice_mut::<_, f32>(scales)[lane] = scale;
            for (i, x) in key.iter().enumerate() {
                codes[i / 4 * 64 + lane * 4 + i % 4] = round(x * inverse).cast_unsigned();
            }
        }
    }
}

/// Writes a value of up to `d` floats as lane `lane` of a chunk of values.
pub(super) fn write_value(
    format: KvFormat,
    chunk: &mut [u8],
    d: usize,
    lane: usize,
    value: &[f32],
) {
    let (rows, scales) = chunk.split_at_mut(LANES * value_row(format, d));
    let row = &mut rows[lane * value_row(format, d)..][..value_row(format, d)];
    match format {
        KvFormat::F32 => cast_slice_mut::<_, f32>(row)[..value.len()].copy_from_slice(value),
        KvFormat::F16 => {
            for (slot, x) in cast_slice_mut::<_, f16>(row).iter_mut().zip(value) {
                *slot = to_half(*x);
            }
        }
        KvFormat::I8 => {
            let (scale, inverse) = eight_bits(value);
            cast_slice_mut::<_, f32>(scales)[lane] = scale;
            for (slot, x) in row.iter_mut().zip(value) {
                *slot = round(x * inverse).cast_unsigned();
            }
        }
        KvFormat::I4 => {
            let (scale, inverse) = four_bits(value);
            cast_slice_mut::<_, f32>(scales)[lane] = scale;
            row.fill(0x88);
            for (i, x) in value.iter().enumerate() {
                let code = (i16::from(round(x * inverse)) + 8).clamp(0, 15) as u8;
                let (slot, shift) = (&mut row[i / 32 * 16 + i % 16], i % 32 / 16 * 4);
                *slot = *slot & !(15 << shift) | code << shift;
            }
        }
    }
}

/// Copies the key in lane `from.1` of a chunk to lane `to.1` of another one.
pub(super) fn move_key(format: KvFormat, d: usize, from: (&[u8], usize), to: (&mut [u8], usize)) {
    match format {
        KvFormat::F32 => {
            move_spread::<u32>((cast_slice(from.0), from.1), (cast_slice_mut(to.0), to.1))
        }
        KvFormat::F16 => {
            move_spread::<u16>((cast_slice(from.0), from.1), (cast_slice_mut(to.0), to.1))
        }
        KvFormat::I8 | KvFormat::I4 => {
            // Four codes to a lane, and the scales are one row more of four bytes.
            debug_assert_eq!(from.0.len(), LANES * (d + 4));
            move_spread::<u32>((cast_slice(from.0), from.1), (cast_slice_mut(to.0), to.1));
        }
    }
}

/// Copies the value in lane `from.1` of a chunk to lane `to.1` of another one.
pub(super) fn move_value(format: KvFormat, d: usize, from: (&[u8], usize), to: (&mut [u8], usize)) {
    let width = value_row(format, d);
    let row = |lane: usize| lane * width..(lane + 1) * width;
    to.0[row(to.1)].copy_from_slice(&from.0[row(from.1)]);
    if format.is_quantised() {
        let scale = |lane: usize| LANES * width + lane * 4..LANES * width + lane * 4 + 4;
        to.0[scale(to.1)].copy_from_slice(&from.0[scale(from.1)]);
    }
}

/// Bytes of a value without its scale.
fn value_row(format: KvFormat, d: usize) -> usize {
    let scales = if format.is_quantised() { 4 } else { 0 };
    format.value_bytes(d) / LANES - scales
}

fn spread<T: Copy>(chunk: &mut [T], lane: usize, elements: impl Iterator<Item = T>) {
    for (slot, x) in chunk[lane..].iter_mut().step_by(LANES).zip(elements) {
        *slot = x;
    }
}

fn move_spread<T: Copy>((from, lane): (&[T], usize), (to, to_lane): (&mut [T], usize)) {
    spread(to, to_lane, from[lane..].iter().step_by(LANES).copied());
}

/// To half precision, ties to even. What is out of range becomes the largest number there is, because
/// an infinity among the keys would turn a whole row to NaN; a NaN stays one, so that damage shows.
fn to_half(x: f32) -> f16 {
    let half = f16::from_f32(x);
    if half.is_infinite() && x.is_finite() { f16::MAX.copysign(half) } else { half }
}

/// The scale of a row in codes of -127 to 127, and its inverse: the largest magnitude becomes 127 or, in a short
/// row, that of [`TOPS`] with the least squared error. A row below 1e-30 is all zeros; one that holds an infinity
/// or a NaN gets a NaN for its scale, so that damage shows.
fn eight_bits(row: &[f32]) -> (f32, f32) {
    let top = f32::from_bits(row.iter().fold(0, |top: u32, x| top.max(x.to_bits() & 0x7fff_ffff)));
    match top {
        _ if top < 1e-30 => (0.0, 0.0),
        _ if !top.is_finite() => (f32::NAN, 0.0),
        _ if row.len() > SHORT => (top / 127.0, 127.0 / top),
        _ => {
            let error = |code: f32| {
                let off = |x: &f32| nearest(x * (code / top)) * (top / code) - x;
                row.iter().map(off).fold(0.0, |sum, off| off.mul_add(off, sum))
            };
            let better = |best: (f32, f32), code| {
                let error = error(code);
                if error < best.1 { (code, error) } else { best }
            };
            let (code, _) = TOPS.map(f32::from).fold((127.0, f32::INFINITY), better);
            (top / code, code / top)
        }
    }
}

/// The scale of a row in codes of -8 to 7, and its inverse: the element of the largest magnitude becomes
/// -8, whatever its sign, which uses all 16 codes. Zeros and damage as in [`eight_bits`].
fn four_bits(row: &[f32]) -> (f32, f32) {
    let largest = |top: f32, x: &f32| if x.abs() > top.abs() || x.is_nan() { *x } else { top };
    let top = row.iter().fold(0.0, largest);
    match top.abs() {
        magnitude if magnitude < 1e-30 => (0.0, 0.0),
        magnitude if magnitude.is_finite() => (top / -8.0, -8.0 / top),
        _ => (f32::NAN, 0.0),
    }
}

/// The nearest integer, ties to even, of what is below 2^22: there the sum has no bits for a fraction. `round_ties_even` is
/// a call for every element where the baseline of x86-64 has no such instruction.
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 1.5 * (1 << 23) as f32;
    (x + SHIFT) - SHIFT
}

/// The nearest code; 0 for what is no number.
fn round(x: f32) -> i8 {
    nearest(x) as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: usize = 48;

    fn row(seed: usize) -> Vec<f32> {
        (0..D).map(|i| ((seed * 31 + i * 7) as f32 * 0.37).sin() * 2.5).collect()
    }

    fn chunk(bytes: usize) -> crate::memory::Aligned<u8> {
        crate::memory::Aligned::zeroed("test", bytes).unwrap()
    }

    #[test]
    fn halves_saturate_and_keep_their_nans() {
        for (x, want) in [(1e6, 65504.0), (-1e6, -65504.0), (65519.0, 65504.0), (0.1, 0.099975586)]
        {
            assert_eq!(to_half(x).to_f32(), want);
        }
        assert!(to_half(f32::NAN).is_nan() && to_half(f32::INFINITY).is_infinite());
    }

    #[test]
    fn the_nearest_integer_is_that_of_the_library() {
        let step = if cfg!(miri) { 1_000_003 } else { 1009 };
        for bits in (0..129_f32.to_bits()).step_by(step) {
            for x in [f32::from_bits(bits), (bits % 1024) as f32 / 8.0] {
                for x in [x, -x] {
                    assert_eq!(nearest(x), x.round_ties_even(), "{x}");
                }
            }
        }
        assert_eq!(round(f32::NAN), 0);
    }

    #[test]
    fn codes_lie_where_the_kernels_look_and_are_within_half_a_step() {
        let (mut keys, mut values) =
            (chunk(KvFormat::I8.key_bytes(D)), chunk(KvFormat::I4.value_bytes(D)));
        for lane in 0..LANES {
            write_key(KvFormat::I8, &mut keys, D, lane, &row(lane));
            write_value(KvFormat::I4, &mut values, D, lane, &row(lane));
        }
        let key_scales: &[f32] = cast_slice(&keys[LANES * D..]);
        let value_scales: &[f32] = cast_slice(&values[LANES * 32..]);
        for lane in 0..LANES {
            for (i, x) in row(lane).iter().enumerate() {
                let code = keys[i / 4 * 64 + lane * 4 + i % 4].cast_signed();
                let near = f32::from(code) * key_scales[lane];
                assert!((near - x).abs() <= 0.501 * key_scales[lane], "{near} {x}");
                let byte = values[lane * 32 + i / 32 * 16 + i % 16];
                let code = f32::from(byte >> (i % 32 / 16 * 4) & 15) - 8.0;
                let near = code * value_scales[lane];
                // The code 8 does not exist: what would have it is a whole step away.
                assert!((near - x).abs() <= 1.001 * value_scales[lane].abs(), "{near} {x}");
            }
        }
    }

    #[test]
    fn a_short_row_has_the_best_of_its_scales() {
        let error = |row: &[f32], (scale, inverse): (f32, f32)| -> f64 {
            let off = |x: &f32| f64::from(f32::from(round(x * inverse)) * scale - x);
            row.iter().map(off).map(|off| off * off).sum()
        };
        let (mut searched, mut plain) = (0.0, 0.0);
        for seed in 0..if cfg!(miri) { 20 } else { 200 } {
            let row = &row(seed)[..8];
            let top = row.iter().fold(0.0, |top: f32, x| top.max(x.abs()));
            let chosen = error(row, eight_bits(row));
            for code in TOPS.map(f32::from) {
                assert!(chosen <= error(row, (top / code, code / top)) * 1.001);
            }
            (searched, plain) = (searched + chosen, plain + error(row, (top / 127.0, 127.0 / top)));
        }
        assert!(searched < plain * 0.6, "{searched} {plain}");
        let long = &row(1)[..17];
        let top = long.iter().fold(0.0, |top: f32, x| top.max(x.abs()));
        assert_eq!(eight_bits(long), (top / 127.0, 127.0 / top));
    }

    #[test]
    fn damage_shows_and_zeros_stay() {
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(eight_bits(&[1.0, bad, 2.0]).0.is_nan());
            assert!(four_bits(&[1.0, bad, 2.0]).0.is_nan());
        }
        assert_eq!((eight_bits(&[0.0; 4]), four_bits(&[-0.0; 4])), ((0.0, 0.0), (0.0, 0.0)));
    }

    #[test]
    fn what_moves_is_what_was_written() {
        // Made once: under Miri a sine is another one in its last bits each time.
        let (key, value) = (row(1), row(2));
        for format in KvFormat::ALL {
            let make = || (chunk(format.key_bytes(D)), chunk(format.value_bytes(D)));
            let ((mut k, mut v), (mut want_k, mut want_v)) = (make(), make());
            write_key(format, &mut k, D, 3, &key);
            write_value(format, &mut v, D, 3, &value);
            write_key(format, &mut want_k, D, 11, &key);
            write_value(format, &mut want_v, D, 11, &value);
            let ((mut to_k, mut to_v), from) = (make(), 3);
            move_key(format, D, (&k, from), (&mut to_k, 11));
            move_value(format, D, (&v, from), (&mut to_v, 11));
            assert!(to_k[..] == want_k[..] && to_v[..] == want_v[..], "{format:?}");
        }
    }
}
