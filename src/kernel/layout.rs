//! The packed line layout: where every weight lies, in memory and in a `.nybl` file.
//!
//! A matrix `W[n, k]` (`n` outputs, `k` inputs) is cut into panels of output rows: 32, or for the
//! narrowest codes as many as share the bytes of a line, which is 64 at two bits and 128 at three. A
//! panel runs along `k` group by group. In a group of a quantised format come first the codes, in
//! 64-byte lines of 16 lanes times 4 bytes, where the bytes of a lane are four values of `k`; then one
//! scale (f16) for each row of the panel; then, for the formats with an offset, one offset of two bytes
//! for each row. `n` is padded to whole panels and `k` to whole groups with weights of value zero.
//!
//! Every instruction set has a "dot of four bytes into a 32-bit lane, other operand broadcast", and
//! each takes such a line as it lies. See `docs/formats.md` for the bit maps.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Output rows in a panel of floats, bytes or four-bit codes: the number that one line of nibbles
/// holds. Other widths have more: [`Layout::panel_rows`].
pub const PANEL: usize = 32;

/// Output rows in the highest panel of any format.
pub const MAX_PANEL: usize = 128;

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
    /// Three bits, symmetric: `w = s * (q - 4)`.
    Q3 = 7,
    /// Three bits with an integer zero point.
    Q3Z = 8,
    /// Three bits with a minimum.
    Q3M = 9,
    /// Two bits, symmetric: `w = s * (q - 2)`.
    Q2 = 10,
    /// Two bits with an integer zero point.
    Q2Z = 11,
    /// Two bits with a minimum.
    Q2M = 12,
}

/// What follows the scales of a group, and so how a code becomes a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Offset {
    /// Nothing: the zero of the codes is fixed by the format.
    None = 0,
    /// One i16 zero point for each row: `w = s * (q - z)`.
    Zero = 1,
    /// One f16 minimum for each row: `w = s * q + m`.
    Minimum = 2,
}

impl Format {
    /// Every format, in the order of its code in the file.
    pub const ALL: [Format; 13] = [
        Format::F32,
        Format::F16,
        Format::Bf16,
        Format::Q8,
        Format::Q4,
        Format::Q4Z,
        Format::Q4M,
        Format::Q3,
        Format::Q3Z,
        Format::Q3M,
        Format::Q2,
        Format::Q2Z,
        Format::Q2M,
    ];

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
            Self::Q3 => "q3",
            Self::Q3Z => "q3z",
            Self::Q3M => "q3m",
            Self::Q2 => "q2",
            Self::Q2Z => "q2z",
            Self::Q2M => "q2m",
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

    /// Bits of a weight without its share of scale and offset.
    #[must_use]
    pub const fn bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::Q8 => 8,
            Self::Q4 | Self::Q4Z | Self::Q4M => 4,
            Self::Q3 | Self::Q3Z | Self::Q3M => 3,
            Self::Q2 | Self::Q2Z | Self::Q2M => 2,
        }
    }

    /// What follows the scales of a group.
    #[must_use]
    pub const fn offset(self) -> Offset {
        match self {
            Self::Q4Z | Self::Q3Z | Self::Q2Z => Offset::Zero,
            Self::Q4M | Self::Q3M | Self::Q2M => Offset::Minimum,
            _ => Offset::None,
        }
    }

    /// The code that stands for zero where no offset says otherwise.
    #[must_use]
    pub const fn middle(self) -> i32 {
        match self {
            Self::Q4 => 8,
            Self::Q3 => 4,
            Self::Q2 => 2,
            _ => 0,
        }
    }

    /// Output rows in a panel.
    #[must_use]
    pub const fn panel_rows(self) -> usize {
        match self.bits() {
            3 => 128,
            2 => 64,
            _ => PANEL,
        }
    }

    /// Bytes of all codes of a panel at four values of `k`; for floats, of a panel at one.
    const fn step_bytes(self) -> usize {
        self.panel_rows() * self.bits() / 8 * if self.is_quantised() { 4 } else { 1 }
    }

    /// Bytes of scales and offsets after each group.
    const fn group_tail(self) -> usize {
        match (self.is_quantised(), self.offset()) {
            (false, _) => 0,
            (true, Offset::None) => self.panel_rows() * 2,
            (true, _) => self.panel_rows() * 4,
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

/// The group size that stands for one group a row ([`Format::Q8`] only).
pub const WHOLE_ROW: usize = 0;

/// The longest row that may be one group: its dots stay below 2^31.
pub const MAX_WHOLE_ROW: usize = 1 << 17;

/// Least group size, of which `k` is padded to a multiple where a row is one group.
pub const MIN_GROUP: usize = 16;

impl Layout {
    /// The layout of an `n` by `k` matrix. `group` is 16, 32, 64 or 128 for quantised formats, for
    /// [`Format::Q8`] also [`WHOLE_ROW`] (or that row's padded length), and is ignored for floats.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a dimension is zero or above [`MAX_DIMENSION`], or the group
    /// size is none of these.
    pub fn new(format: Format, group: usize, n: usize, k: usize) -> Result<Self> {
        if n == 0 || k == 0 || n > MAX_DIMENSION || k > MAX_DIMENSION {
            return Err(Error::InvalidArgument(format!(
                "a matrix of {n} x {k}: each dimension must be 1 to {MAX_DIMENSION}"
            )));
        }
        if !format.is_quantised() {
            return Ok(Self { format, group: 1, n, k });
        }
        if matches!(group, 16 | 32 | 64 | 128) {
            return Ok(Self { format, group, n, k });
        }
        let row = k.next_multiple_of(MIN_GROUP);
        let fits = matches!(format, Format::Q8) && row <= MAX_WHOLE_ROW;
        if fits && (group == WHOLE_ROW || group == row) {
            return Ok(Self { format, group: row, n, k });
        }
        Err(Error::InvalidArgument(format!(
            "group size {group} of {}: must be 16, 32, 64 or 128, or for q8 a row of up to {MAX_WHOLE_ROW}",
            format.name()
        )))
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
    /// Output rows in a panel.
    #[must_use]
    pub const fn panel_rows(&self) -> usize {
        self.format.panel_rows()
    }
    /// Panels, the last one padded.
    #[must_use]
    pub const fn panels(&self) -> usize {
        self.n.div_ceil(self.panel_rows())
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
        let q3 = Layout::new(Format::Q3, 128, 4096, 4096).unwrap();
        assert_eq!((q3.panels(), q3.code_bytes(), q3.group_bytes()), (32, 6144, 6144 + 256));
        assert!((q3.bits_per_weight() - 3.125).abs() < 1e-9);
        let q2 = Layout::new(Format::Q2M, 16, 4096, 4096).unwrap();
        assert_eq!((q2.panels(), q2.code_bytes(), q2.group_bytes()), (64, 256, 256 + 256));
    }

    #[test]
    fn a_row_of_bytes_may_be_one_group() {
        let row = Layout::new(Format::Q8, WHOLE_ROW, 32, 172).unwrap();
        assert_eq!((row.group(), row.groups(), row.bytes()), (176, 1, 176 * 32 + 64));
        assert_eq!(Layout::new(Format::Q8, row.group(), 32, 172).unwrap(), row);
        assert!(Layout::new(Format::Q8, WHOLE_ROW, 32, MAX_WHOLE_ROW).is_ok());
        assert!(Layout::new(Format::Q8, WHOLE_ROW, 32, MAX_WHOLE_ROW + 1).is_err());
        assert!(Layout::new(Format::Q4, WHOLE_ROW, 32, 172).is_err());
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
