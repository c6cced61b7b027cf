//! The tensor types of GGUF: sizes, names and bit maps.
//!
//! Each type that we read maps onto a packed format without losing a bit: Q4_0 and Q4_1 keep their
//! nibbles, Q5_0 and Q8_0 become bytes with the same scale.
#![forbid(unsafe_code)]

use crate::kernel::Format;
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
    /// 34 bytes for 32 weights: scale, bytes; `w = d * q`.
    Q8_0,
}

/// Every type code of the format by name, so that a refusal can say what it found.
const NAMES: &[(u32, &str)] = &[
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (30, "BF16"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// The name of a type code.
#[must_use]
pub fn type_name(code: u32) -> String {
    match NAMES.iter().find(|(known, _)| *known == code) {
        Some((_, name)) => (*name).into(),
        None => format!("unknown type {code}"),
    }
}

impl Type {
    /// The type with this code, if it can be read.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            8 => Self::Q8_0,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// The name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q8_0 => "Q8_0",
        }
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
            Self::Q8_0 => (32, 34),
        }
    }

    /// The packed format that holds the same weights, bit for bit.
    #[must_use]
    pub fn packed(self) -> Format {
        match self {
            Self::F32 => Format::F32,
            Self::F16 => Format::F16,
            Self::Bf16 => Format::Bf16,
            Self::Q4_0 => Format::Q4,
            Self::Q4_1 => Format::Q4M,
            Self::Q5_0 | Self::Q8_0 => Format::Q8,
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
                let mut blocks = Blocks::default();
                self.read(bytes, &mut blocks);
                for (index, codes) in blocks.codes.chunks_exact(32).enumerate() {
                    let scale = blocks.scales[index].to_f32();
                    out.extend(codes.iter().map(|code| match self {
                        Self::Q4_0 => scale * (f32::from(*code) - 8.0),
                        Self::Q4_1 => {
                            let minimum = f16::from_bits(blocks.offsets[index]).to_f32();
                            scale * f32::from(*code) + minimum
                        }
                        _ => scale * f32::from(code.cast_signed()),
                    }));
                }
            }
        }
    }

    /// Appends codes, scales and offsets of a quantised type, as its packed format wants them.
    pub fn read(self, bytes: &[u8], out: &mut Blocks) {
        for block in bytes.chunks_exact(self.block().1) {
            out.scales.push(f16::from_le_bytes([block[0], block[1]]));
            match self {
                Self::Q4_0 => nibbles(&block[2..], &mut out.codes),
                Self::Q4_1 => {
                    out.offsets.push(u16::from_le_bytes([block[2], block[3]]));
                    nibbles(&block[4..], &mut out.codes);
                }
                Self::Q5_0 => {
                    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
                    let start = out.codes.len();
                    nibbles(&block[6..], &mut out.codes);
                    for (i, code) in out.codes[start..].iter_mut().enumerate() {
                        let bit = (fifth >> i & 1) as u8;
                        *code = (*code | bit << 4).wrapping_sub(16);
                    }
                }
                _ => out.codes.extend(&block[2..]),
            }
        }
    }
}

/// Low nibbles of 16 bytes are the first 16 weights, high nibbles the other 16.
fn nibbles(bytes: &[u8], codes: &mut Vec<u8>) {
    codes.extend(bytes.iter().map(|byte| byte & 15));
    codes.extend(bytes.iter().map(|byte| byte >> 4));
}

/// Codes, scales and offsets of some blocks, in order.
#[derive(Default)]
pub struct Blocks {
    /// One code a weight; signed bytes for the types that become bytes.
    pub codes: Vec<u8>,
    /// One scale a block.
    pub scales: Vec<f16>,
    /// One minimum a block for Q4_1.
    pub offsets: Vec<u16>,
}

impl Blocks {
    /// Forgets the content, keeps the memory.
    pub fn clear(&mut self) {
        self.codes.clear();
        self.scales.clear();
        self.offsets.clear();
    }
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
        assert_eq!((Type::from_code(12), type_name(12).as_str()), (None, "Q4_K"));
        assert_eq!(type_name(77), "unknown type 77");
    }
}
