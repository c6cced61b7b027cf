//! The oracle: every operation in plain loops that follow the definition.
//!
//! All other rows must equal these bit for bit. Kept naive on purpose; speed is not its job.

use super::abi::{MatmulArgs, QuantizeArgs, RmsNormArgs, SoftmaxArgs, SwiGluArgs};
use super::layout::{Format, PANEL};
use super::ops;
use half::{bf16, f16};

/// Where the weights of one output row lie inside its panel.
struct RowReader {
    panel: *const u8,
    lane: usize,
    high: bool,
}

impl RowReader {
    /// # Safety
    /// `panel` points to a whole panel.
    unsafe fn new(panel: *const u8, row: usize) -> Self {
        Self { panel, lane: row % 16, high: row >= 16 }
    }

    /// The four-bit code at place `k` of the codes that start at `at`.
    unsafe fn nibble(&self, at: usize, k: usize) -> i32 {
        // SAFETY: the caller stays inside the panel.
        let byte = unsafe { *self.panel.add(at + k / 4 * 64 + self.lane * 4 + k % 4) };
        i32::from(if self.high { (byte >> 4) ^ 8 } else { byte & 15 })
    }

    /// The byte code at place `k` of the codes that start at `at`.
    unsafe fn byte(&self, at: usize, k: usize) -> i32 {
        let half = if self.high { 64 } else { 0 };
        // SAFETY: the caller stays inside the panel.
        let byte = unsafe { *self.panel.add(at + k / 4 * 128 + half + self.lane * 4 + k % 4) };
        i32::from(byte.cast_signed())
    }

    /// The 16-bit word of this row in the table of 32 words that starts at `at`.
    unsafe fn word(&self, at: usize) -> u16 {
        let row = self.lane + if self.high { 16 } else { 0 };
        // SAFETY: the caller stays inside the panel; tables are 64-byte aligned.
        unsafe { self.panel.add(at + row * 2).cast::<u16>().read_unaligned() }
    }
}

/// One quantised matmul: the integer dot of each group, then one fused multiply-add.
unsafe fn quantised(format: Format, a: &MatmulArgs) {
    let step = if format == Format::Q8 { 128 } else { 64 };
    let codes = a.group / 4 * step;
    let stride = a.panel_bytes / a.groups;
    for row in 0..a.m {
        for output in 0..a.n {
            let mut acc = 0.0_f32;
            for g in 0..a.groups {
                // SAFETY: all reads stay inside the panels and the activation rows that the caller
                // vouches for.
                unsafe {
                    let panel = a.w.add(output / PANEL * a.panel_bytes);
                    let reader = RowReader::new(panel, output % PANEL);
                    let at = g * stride;
                    let x = a.x.cast::<i8>().add(row * a.x_stride + g * a.group);
                    let sum = *a.x_sums.add(row * a.groups + g);
                    let x_scale = *a.x_scales.add(row * a.groups + g);
                    let mut dot = 0_i32;
                    for k in 0..a.group {
                        let q = if step == 128 { reader.byte(at, k) } else { reader.nibble(at, k) };
                        dot += q * i32::from(*x.add(k));
                    }
                    let scale = f16::from_bits(reader.word(at + codes)).to_f32();
                    let offset = reader.word(at + codes + 64 * usize::from(stride > codes + 64));
                    match format {
                        Format::Q4 => dot -= 8 * sum,
                        Format::Q4Z => dot -= i32::from(offset.cast_signed()) * sum,
                        _ => {}
                    }
                    acc = (scale * x_scale).mul_add(dot as f32, acc);
                    if format == Format::Q4M {
                        let minimum = f16::from_bits(offset).to_f32();
                        acc = (minimum * x_scale).mul_add(sum as f32, acc);
                    }
                }
            }
            // SAFETY: the caller vouches for `m` rows of `n` outputs.
            unsafe { *a.y.add(row * a.y_stride + output) = acc };
        }
    }
}

/// One float matmul: a fused multiply-add for each `k` in order.
unsafe fn float<T: Copy>(a: &MatmulArgs, to_f32: impl Fn(T) -> f32) {
    for row in 0..a.m {
        for output in 0..a.n {
            let mut acc = 0.0_f32;
            for k in 0..a.groups {
                // SAFETY: inside the panels and the activation rows that the caller vouches for.
                unsafe {
                    let panel = a.w.add(output / PANEL * a.panel_bytes).cast::<T>();
                    let w = to_f32(*panel.add(k * PANEL + output % PANEL));
                    acc = w.mul_add(*a.x.cast::<f32>().add(row * a.x_stride + k), acc);
                }
            }
            // SAFETY: the caller vouches for `m` rows of `n` outputs.
            unsafe { *a.y.add(row * a.y_stride + output) = acc };
        }
    }
}

/// Declares the exported functions of this file.
macro_rules! rows {
    ($($(#[$doc:meta])* $name:ident($args:ty) = $body:expr;)*) => {
        $($(#[$doc])*
        pub(super) unsafe extern "C" fn $name(a: *const $args) {
            // SAFETY: the caller vouches for the argument block.
            unsafe { $body(&*a) }
        })*
    };
}

rows! {
    /// f32 weights.
    matmul_f32(MatmulArgs) = |a| float::<f32>(a, |w| w);
    /// f16 weights.
    matmul_f16(MatmulArgs) = |a| float::<f16>(a, f16::to_f32);
    /// bf16 weights.
    matmul_bf16(MatmulArgs) = |a| float::<bf16>(a, bf16::to_f32);
    /// Signed bytes.
    matmul_q8(MatmulArgs) = |a| quantised(Format::Q8, a);
    /// Four bits, symmetric.
    matmul_q4(MatmulArgs) = |a| quantised(Format::Q4, a);
    /// Four bits with a zero point.
    matmul_q4z(MatmulArgs) = |a| quantised(Format::Q4Z, a);
    /// Four bits with a minimum.
    matmul_q4m(MatmulArgs) = |a| quantised(Format::Q4M, a);
    /// Activation quantiser.
    quantize(QuantizeArgs) = |a| ops::quantize(a);
    /// RMS normalisation.
    rmsnorm(RmsNormArgs) = |a| ops::rmsnorm(a);
    /// SwiGLU.
    swiglu(SwiGluArgs) = |a| ops::swiglu(a);
    /// Softmax.
    softmax(SoftmaxArgs) = |a| ops::softmax(a);
}
