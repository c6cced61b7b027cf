//! The tensor types of GGUF: sizes, names and bit maps.
//!
//! Types of one scale a block map onto a packed format without losing a bit: Q4_0 and Q4_1 keep their
//! nibbles, Q5_0 and Q8_0 become bytes with the same scale. The K types scale their scales: codes are
//! kept, and the products that become the scales of groups are rounded to f16. Q5_1 and Q5_K have five
//! bits and a minimum, which no packed format has; they are rounded to bytes.
#![forbid(unsafe_code)]

use crate::kernel::Format;
use crate::kernel::layout::Offset;
use half::{bf16, f16};

/// A tensor type that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// 32-bit floats.
    F32,
    /// Half-precision floats.
    F16,
    /// bfloat16.
    Bf16,
    /// 18 bytes for 32 weights: scale, nibbles; `w = d * (q - 8)`.
    Q4_0,
    /// 20 bytes for 32 weights: scale, minimum, nibbles; `w = d * q + m`.
    Q4_1,
    /// 22 bytes for 32 weights: scale, fifth bits, nibbles; `w = d * (q - 16)`.
    Q5_0,
    /// 24 bytes for 32 weights: scale, minimum, fifth bits, nibbles; `w = d * q + m`.
    Q5_1,
    /// 34 bytes for 32 weights: scale, bytes; `w = d * q`.
    Q8_0,
    /// 84 bytes for 256 weights in groups of 16; `w = d * s * q - e * m`, `s` and `m` of four bits.
    Q2K,
    /// 110 bytes for 256 weights in groups of 16; `w = d * (s - 32) * (q - 4)`, `s` of six bits.
    Q3K,
    /// 144 bytes for 256 weights in groups of 32; `w = d * s * q - e * m`, `s` and `m` of six bits.
    Q4K,
    /// 176 bytes for 256 weights: Q4_K with a fifth bit.
    Q5K,
    /// 210 bytes for 256 weights in groups of 16; `w = d * s * (q - 32)`, `s` a signed byte.
    Q6K,
}

/// What packing keeps of an encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeps {
    /// Every weight, bit for bit.
    Weights,
    /// The codes; scales are rounded to f16.
    Codes,
    /// Neither: weights are rounded anew.
    Nothing,
}

/// Every type code of the format by name, so that a refusal can say what it found.
const NAMES: &[(u32, &str, Option<Type>)] = &[
    (0, "F32", Some(Type::F32)),
    (1, "F16", Some(Type::F16)),
    (2, "Q4_0", Some(Type::Q4_0)),
    (3, "Q4_1", Some(Type::Q4_1)),
    (6, "Q5_0", Some(Type::Q5_0)),
    (7, "Q5_1", Some(Type::Q5_1)),
    (8, "Q8_0", Some(Type::Q8_0)),
    (9, "Q8_1", None),
    (10, "Q2_K", Some(Type::Q2K)),
    (11, "Q3_K", Some(Type::Q3K)),
    (12, "Q4_K", Some(Type::Q4K)),
    (13, "Q5_K", Some(Type::Q5K)),
    (14, "Q6_K", Some(Type::Q6K)),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", None),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", None),
    (25, "I16", None),
    (26, "I32", None),
    (27, "I64", None),
    (28, "F64", None),
    (29, "IQ1_M", None),
    (30, "BF16", Some(Type::Bf16)),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (39, "MXFP4", None),
    (40, "NVFP4", None),
];

/// The name of a type code.
#[must_use]
pub fn type_name(code: u32) -> String {
    match NAMES.iter().find(|(known, ..)| *known == code) {
        Some((_, name, _)) => (*name).into(),
        None => format!("unknown type {code}"),
    }
}

/// The names of all types that can be read.
#[must_use]
pub fn readable() -> String {
    let names = NAMES.iter().filter(|(_, _, kind)| kind.is_some()).map(|(_, name, _)| *name);
    names.collect::<Vec<_>>().join(", ")
}

impl Type {
    /// The type with this code, if it can be read.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        NAMES.iter().find(|(known, ..)| *known == code)?.2
    }

    /// The name.
    #[must_use]
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, _, kind)| *kind == Some(self)).map_or("", |(_, name, _)| *name)
    }

    /// Weights in a block and bytes of a block.
    #[must_use]
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    /// The packed format and group that hold the same weights, or come nearest.
    #[must_use]
    pub fn packed(self) -> (Format, usize) {
        match self {
            Self::F32 => (Format::F32, 1),
            Self::F16 => (Format::F16, 1),
            Self::Bf16 => (Format::Bf16, 1),
            Self::Q4_0 => (Format::Q4, 32),
            Self::Q4_1 | Self::Q4K => (Format::Q4M, 32),
            Self::Q5_0 | Self::Q5_1 | Self::Q5K | Self::Q8_0 => (Format::Q8, 32),
            Self::Q2K => (Format::Q2M, 16),
            Self::Q3K => (Format::Q3, 16),
            Self::Q6K => (Format::Q8, 16),
        }
    }

    /// What [`Type::packed`] keeps.
    #[must_use]
    pub fn keeps(self) -> Keeps {
        match self {
            Self::Q5_1 | Self::Q5K => Keeps::Nothing,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q6K => Keeps::Codes,
            _ => Keeps::Weights,
        }
    }

    /// Appends the weights in `bytes`, a whole number of blocks, as floats.
    pub fn dequantise(self, bytes: &[u8], out: &mut Vec<f32>) {
        match self {
            Self::F32 => out.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
            Self::F16 => {
                let halves = bytes.as_chunks().0.iter();
                out.extend(halves.map(|b| f16::from_le_bytes(*b).to_f32()));
            }
            Self::Bf16 => {
                let halves = bytes.as_chunks().0.iter();
                out.extend(halves.map(|b| bf16::from_le_bytes(*b).to_f32()));
            }
            _ => {
                for block in bytes.chunks_exact(self.block().1) {
                    self.block_groups(block, |codes, scale, offset| {
                        // Multiplied and added apart, as the definition of each type does.
                        out.extend(codes.iter().map(|code| scale * f32::from(*code) + offset));
                    });
                }
            }
        }
    }

    /// Appends codes, scales and offsets as the packed format wants them, scales rounded to f16 where
    /// they are products. Not for floats, nor for types that keep nothing.
    pub fn read(self, bytes: &[u8], out: &mut Blocks) {
        let (format, _) = self.packed();
        // Codes of fewer bits than a byte are stored from 0 up.
        let middle = i8::try_from(format.middle()).unwrap_or(0);
        let with_offsets = format.offset() != Offset::None;
        for block in bytes.chunks_exact(self.block().1) {
            self.block_groups(block, |codes, scale, offset| {
                out.codes.extend(codes.iter().map(|code| (code + middle).cast_unsigned()));
                out.scales.push(f16::from_f32(scale));
                if with_offsets {
                    out.offsets.push(f16::from_f32(offset).to_bits());
                }
            });
        }
    }

    /// Calls `group(codes, scale, offset)` for the groups of a block in order: `w = scale * code + offset`.
    fn block_groups(self, block: &[u8], mut group: impl FnMut(&[i8], f32, f32)) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let mut codes = [0_i8; 256];
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => {}
            Self::Q4_0 => {
                nibbles(&block[2..], &mut codes, 8);
                group(&codes[..32], half(0), 0.0);
            }
            Self::Q4_1 => {
                nibbles(&block[4..], &mut codes, 0);
                group(&codes[..32], half(0), half(2));
            }
            Self::Q5_0 => {
                nibbles(&block[6..], &mut codes, 0);
                fifth_bits(&block[2..6], &mut codes, 16);
                group(&codes[..32], half(0), 0.0);
            }
            Self::Q5_1 => {
                nibbles(&block[8..], &mut codes, 0);
                fifth_bits(&block[4..8], &mut codes, 0);
                group(&codes[..32], half(0), half(2));
            }
            Self::Q8_0 => {
                for (code, byte) in codes.iter_mut().zip(&block[2..]) {
                    *code = byte.cast_signed();
                }
                group(&codes[..32], half(0), 0.0);
            }
            Self::Q2K => {
                let (scales, qs) = block.split_at(16);
                for (i, code) in codes.iter_mut().enumerate() {
                    *code = (qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3).cast_signed();
                }
                let (d, e) = (half(80), half(82));
                for (codes, scale) in codes.chunks_exact(16).zip(scales) {
                    group(codes, d * f32::from(scale & 15), -(e * f32::from(scale >> 4)));
                }
            }
            Self::Q3K => {
                let (mask, rest) = block.split_at(32);
                let (qs, scales) = rest.split_at(64);
                for (i, code) in codes.iter_mut().enumerate() {
                    let low = qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
                    let high = mask[i % 32] >> (i / 32) & 1;
                    *code = (low | high << 2).cast_signed() - 4;
                }
                let d = half(108);
                for (j, codes) in codes.chunks_exact(16).enumerate() {
                    let low = if j < 8 { scales[j] & 15 } else { scales[j - 8] >> 4 };
                    let high = scales[8 + j % 4] >> (j / 4 * 2) & 3;
                    let scale = (low | high << 4).cast_signed() - 32;
                    group(codes, d * f32::from(scale), 0.0);
                }
            }
            Self::Q4K | Self::Q5K => {
                let qs = &block[if self == Self::Q4K { 16 } else { 48 }..];
                for (i, code) in codes.iter_mut().enumerate() {
                    let byte = qs[i / 64 * 32 + i % 32];
                    *code = (if i % 64 < 32 { byte & 15 } else { byte >> 4 }).cast_signed();
                }
                if self == Self::Q5K {
                    for (i, code) in codes.iter_mut().enumerate() {
                        *code |= ((block[16 + i % 32] >> (i / 32) & 1) << 4).cast_signed();
                    }
                }
                let (d, e) = (half(0), half(2));
                for (j, codes) in codes.chunks_exact(32).enumerate() {
                    let (scale, minimum) = six_bits(&block[4..16], j);
                    group(codes, d * f32::from(scale), -(e * f32::from(minimum)));
                }
            }
            Self::Q6K => {
                let (ql, qh) = (&block[..128], &block[128..192]);
                for (i, code) in codes.iter_mut().enumerate() {
                    let (half, at) = (i / 128, i % 128);
                    let low = ql[half * 64 + at % 64] >> (at / 64 * 4) & 15;
                    let high = qh[half * 32 + at % 32] >> (at / 32 * 2) & 3;
                    *code = (low | high << 4).cast_signed() - 32;
                }
                let d = half(208);
                for (codes, scale) in codes.chunks_exact(16).zip(&block[192..208]) {
                    group(codes, d * f32::from(scale.cast_signed()), 0.0);
                }
            }
        }
    }
}

/// Low nibbles of 16 bytes are the first 16 weights, high nibbles the other 16.
fn nibbles(bytes: &[u8], codes: &mut [i8; 256], zero: i8) {
    for (i, byte) in bytes[..16].iter().enumerate() {
        codes[i] = (byte & 15).cast_signed() - zero;
        codes[16 + i] = (byte >> 4).cast_signed() - zero;
    }
}

/// The fifth bits of 32 weights, in order from the lowest.
fn fifth_bits(bytes: &[u8], codes: &mut [i8; 256], zero: i8) {
    for (i, code) in codes[..32].iter_mut().enumerate() {
        *code = (*code | ((bytes[i / 8] >> (i % 8) & 1) << 4).cast_signed()) - zero;
    }
}

/// Scale and minimum `j` of the eight pairs of six bits in twelve bytes.
fn six_bits(bytes: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (bytes[j] & 63, bytes[j + 4] & 63);
    }
    let high = |byte: u8| byte >> 6 << 4;
    (bytes[j + 4] & 15 | high(bytes[j - 4]), bytes[j + 4] >> 4 | high(bytes[j]))
}

/// Codes, scales and offsets of some rows, in order.
#[derive(Default)]
pub struct Blocks {
    /// One code a weight; signed bytes for the types that become bytes.
    pub codes: Vec<u8>,
    /// One scale a group.
    pub scales: Vec<f16>,
    /// One offset a group for formats that have them.
    pub offsets: Vec<u16>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_read_as_their_formulas_say() {
        let d = f16::from_f32(0.5).to_le_bytes();
        let m = f16::from_f32(-3.0).to_le_bytes();
        let qs: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        let weights = |kind: Type, head: &[u8], body: &[u8]| {
            let mut out = Vec::new();
            kind.dequantise(&[head, body].concat(), &mut out);
            out
        };
        let w = weights(Type::Q4_0, &d, &qs);
        assert_eq!((w[0], w[15], w[16], w[31]), (-4.0, 3.5, 3.5, -4.0));
        let w = weights(Type::Q4_1, &[d, m].concat(), &qs);
        assert_eq!((w[0], w[3], w[16]), (-3.0, -1.5, 4.5));
        // Fifth bits of weights 1 and 16.
        let w = weights(Type::Q5_0, &[&d[..], &[2, 0, 1, 0]].concat(), &qs);
        assert_eq!((w[0], w[1], w[16], w[17]), (-8.0, 0.5, 7.5, -1.0));
        let bytes: Vec<u8> = (0..32_u8).map(|i| i.wrapping_mul(9)).collect();
        let w = weights(Type::Q8_0, &d, &bytes);
        assert_eq!((w[1], w[15], w[31]), (4.5, 0.5 * -121.0, 0.5 * 23.0));
    }

    #[test]
    fn types_without_a_reader_have_a_name() {
        assert_eq!((Type::from_code(16), type_name(16).as_str()), (None, "IQ2_XXS"));
        assert_eq!(type_name(77), "unknown type 77");
    }
}
