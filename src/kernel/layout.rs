//! The packed line layout: where every weight lies, in memory and in a `.nybl` file.
//!
//! A matrix `W[n, k]` (`n` outputs, `k` inputs) is cut into panels of [`PANEL`] output rows. A panel
//! runs along `k` group by group. In a group of a quantised format come first the codes, four values
//! of `k` at a time, in 64-byte lines of 16 lanes times 4 bytes; then 32 scales (f16); then, for the
//! formats with an offset, 32 offsets of two bytes. `n` is padded to whole panels and `k` to whole
//! groups with weights of value zero.
//!
//! Every instruction set has a "dot of four bytes into a 32-bit lane, other operand broadcast", and
//! each takes such a line as it lies. See `docs/formats.md` for the bit maps.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Output rows in a panel.
pub const PANEL: usize = 32;

/// How the weights of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Format {
    /// 32-bit floats, 32 rows of one `k` after the other.
    F32 = 0,
    /// IEEE half-precision floats, laid out like [`Format::F32`].
    F16 = 1,
    /// bfloat16, laid out like [`Format::F32`].
    Bf16 = 2,
    /// Signed bytes with one f16 scale a group: `w = s * q`.
    Q8 = 3,
    /// Four bits, symmetric: `w = s * (q - 8)`.
    Q4 = 4,
    /// Four bits with an integer zero point: `w = s * (q - z)`, `z` an i16 (GPTQ, AWQ).
    Q4Z = 5,
    /// Four bits with a minimum: `w = s * q + m`, `m` an f16 (GGUF's Q4_1).
    Q4M = 6,
}

impl Format {
    /// Every format, in the order of its code in the file.
    pub const ALL: [Format; 7] =
        [Format::F32, Format::F16, Format::Bf16, Format::Q8, Format::Q4, Format::Q4Z, Format::Q4M];

    /// The name in kernel rows, logs and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
            Self::Q4Z => "q4z",
            Self::Q4M => "q4m",
        }
    }

    /// The format with this code in a file.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Whether the activations are quantised to int8 groups, too; else they stay f32.
    #[must_use]
    pub const fn is_quantised(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Bytes of one line step: 32 rows times four `k` for quantised formats, times one for floats.
    const fn step_bytes(self) -> usize {
        match self {
            Self::F32 | Self::Q8 => 128,
            Self::F16 | Self::Bf16 | Self::Q4 | Self::Q4Z | Self::Q4M => 64,
        }
    }

    /// Bytes of scales and offsets after each group.
    const fn group_tail(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 0,
            Self::Q8 | Self::Q4 => 64,
            Self::Q4Z | Self::Q4M => 128,
        }
    }
}

/// Format and shape of a packed matrix; everything about its bytes follows from these four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    format: Format,
    group: usize,
    n: usize,
    k: usize,
}

/// Largest `n` or `k`: products of two of them stay far from overflow, and no model comes near.
pub const MAX_DIMENSION: usize = 1 << 24;

impl Layout {
    /// The layout of an `n` by `k` matrix. `group` is 32, 64 or 128 for quantised formats and is
    /// ignored for floats.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a dimension is zero or above [`MAX_DIMENSION`], or the group
    /// size is none of the three.
    pub fn new(format: Format, group: usize, n: usize, k: usize) -> Result<Self> {
        if n == 0 || k == 0 || n > MAX_DIMENSION || k > MAX_DIMENSION {
            return Err(Error::InvalidArgument(format!(
                "a matrix of {n} x {k}: each dimension must be 1 to {MAX_DIMENSION}"
            )));
        }
        if format.is_quantised() && !matches!(group, 32 | 64 | 128) {
            return Err(Error::InvalidArgument(format!(
                "group size {group}: must be 32, 64 or 128"
            )));
        }
        Ok(Self { format, group: if format.is_quantised() { group } else { 1 }, n, k })
    }

    /// The storage format.
    #[must_use]
    pub const fn format(&self) -> Format {
        self.format
    }
    /// Values of `k` that share a scale; 1 for floats.
    #[must_use]
    pub const fn group(&self) -> usize {
        self.group
    }
    /// Outputs (rows of the weight matrix).
    #[must_use]
    pub const fn n(&self) -> usize {
        self.n
    }
    /// Inputs (columns of the weight matrix).
    #[must_use]
    pub const fn k(&self) -> usize {
        self.k
    }
    /// Groups along `k`, the last one padded.
    #[must_use]
    pub const fn groups(&self) -> usize {
        self.k.div_ceil(self.group)
    }
    /// `k` rounded up to whole groups: the length of an activation row.
    #[must_use]
    pub const fn padded_k(&self) -> usize {
        self.groups() * self.group
    }
    /// Panels of 32 rows, the last one padded.
    #[must_use]
    pub const fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }
    /// Bytes of the codes of one group of one panel: where its scales begin.
    #[must_use]
    pub const fn code_bytes(&self) -> usize {
        if self.format.is_quantised() {
            self.group / 4 * self.format.step_bytes()
        } else {
            self.format.step_bytes()
        }
    }
    /// Bytes from one group of a panel to the next.
    #[must_use]
    pub const fn group_bytes(&self) -> usize {
        self.code_bytes() + self.format.group_tail()
    }
    /// Bytes from one panel to the next.
    #[must_use]
    pub const fn panel_bytes(&self) -> usize {
        self.groups() * self.group_bytes()
    }
    /// Bytes of the whole matrix.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.panels() * self.panel_bytes()
    }
    /// Bits a weight costs, scales and padding included.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes() as f64 * 8.0 / (self.n as f64 * self.k as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_the_design() {
        let q4 = Layout::new(Format::Q4, 32, 4096, 4096).unwrap();
        assert_eq!(q4.group_bytes(), 8 * 64 + 64);
        assert!((q4.bits_per_weight() - 4.5).abs() < 1e-9);
        let q4 = Layout::new(Format::Q4, 128, 4096, 4096).unwrap();
        assert!((q4.bits_per_weight() - 4.125).abs() < 1e-9);
        let q8 = Layout::new(Format::Q8, 32, 4096, 4096).unwrap();
        assert!((q8.bits_per_weight() - 8.5).abs() < 1e-9);
        assert_eq!(Layout::new(Format::F32, 0, 33, 7).unwrap().bytes(), 2 * 7 * 128);
    }

    #[test]
    fn rows_that_are_no_multiple_of_the_group_are_padded() {
        let ffn_down = Layout::new(Format::Q4, 32, 64, 172).unwrap();
        assert_eq!((ffn_down.groups(), ffn_down.padded_k()), (6, 192));
    }

    #[test]
    fn nonsense_is_refused() {
        for (group, n, k) in [(32, 0, 8), (32, 8, 0), (31, 8, 8), (32, usize::MAX, 8)] {
            assert!(Layout::new(Format::Q4, group, n, k).is_err());
        }
    }
}
