//! The oracle: every operation in plain loops that follow the definition.
//!
//! All other rows must equal these bit for bit. Kept naive on purpose; speed is not its job.

use super::abi::{
    EpilogueArgs, GeGluArgs, MatmulArgs, QuantizeArgs, RmsNormArgs, SoftCapArgs, SoftmaxArgs,
    SwiGluArgs,
};
use super::layout::PANEL;
use super::ops;
use half::{bf16, f16};

/// Where the weights of one output row lie inside a group of its panel.
struct RowReader {
    group: *const u8,
    lane: usize,
    field: usize,
}

impl RowReader {
    fn new(group: *const u8, row: usize) -> Self {
        Self { group, lane: row % 16, field: row / 16 }
    }

    /// The code of `BITS` bits at place `k`.
    ///
    /// # Safety
    /// `group` points to a whole group of such codes, and `k` lies in it.
    unsafe fn code<const BITS: usize>(&self, k: usize) -> i32 {
        let (step, place) = (k / 4, self.lane * 4 + k % 4);
        // SAFETY: the caller's promise; every place below is among the codes of step `k / 4`.
        let byte = |at: usize| i32::from(unsafe { *self.group.add(at + place) });
        match BITS {
            8 => i32::from((byte(step * 128 + self.field * 64) as u8).cast_signed()),
            4 if self.field == 0 => byte(step * 64) & 15,
            4 => byte(step * 64) >> 4 ^ 8,
            3 => {
                let at = step / 2 * 384 + step % 2 * 64;
                let (p, q, r) = (byte(at), byte(at + 128), byte(at + 256));
                match self.field {
                    0 => p >> 2 & 7,
                    1 => p >> 5 ^ 4,
                    2 => q & 7,
                    3 => q >> 3 & 7,
                    4 => r >> 1 & 7,
                    5 => r >> 4 & 7,
                    6 => p & 3 | (r & 1) << 2,
                    _ => (q >> 6 ^ 2) << 1 | r >> 7,
                }
            }
            _ => (byte(step * 64) ^ 0x80) >> (2 * self.field) & 3,
        }
    }

    /// The 16-bit word of this row in the table of words that starts at `at`.
    ///
    /// # Safety
    /// `group` points to a whole group, in which the table lies.
    unsafe fn word(&self, at: usize) -> u16 {
        let row = self.field * 16 + self.lane;
        // SAFETY: the caller's promise.
        unsafe { self.group.add(at + row * 2).cast::<u16>().read_unaligned() }
    }
}

/// One quantised matmul of codes of `BITS` bits: the integer dot of each group, then one fused
/// multiply-add, or two where there is a minimum.
unsafe fn quantised<const BITS: usize>(a: &MatmulArgs) {
    let rows = match BITS {
        3 => 128,
        2 => 64,
        _ => PANEL,
    };
    let codes = a.group * rows * BITS / 8;
    let stride = a.panel_bytes / a.groups;
    for row in 0..a.m {
        for output in 0..a.n {
            let mut acc = 0.0_f32;
            for g in 0..a.groups {
                // SAFETY: all reads stay inside the panels and the activation rows that the caller
                // vouches for.
                unsafe {
                    let group = a.w.add(output / rows * a.panel_bytes + g * stride);
                    let reader = RowReader::new(group, output % rows);
                    let x = a.x.cast::<i8>().add(row * a.x_stride + g * a.group);
                    let sum = *a.x_sums.add(row * a.groups + g);
                    let x_scale = *a.x_scales.add(row * a.groups + g);
                    let mut dot = 0_i32;
                    for k in 0..a.group {
                        dot += reader.code::<BITS>(k) * i32::from(*x.add(k));
                    }
                    let scale = f16::from_bits(reader.word(codes)).to_f32();
                    match a.offset {
                        0 if BITS == 8 => {}
                        0 => dot -= (1 << (BITS - 1)) * sum,
                        1 => dot -= i32::from(reader.word(codes + rows * 2).cast_signed()) * sum,
                        _ => {}
                    }
                    acc = (scale * x_scale).mul_add(dot as f32, acc);
                    if a.offset == 2 {
                        let minimum = f16::from_bits(reader.word(codes + rows * 2)).to_f32();
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
    matmul_q8(MatmulArgs) = |a| quantised::<8>(a);
    /// Four bits.
    matmul_q4(MatmulArgs) = |a| quantised::<4>(a);
    /// Three bits.
    matmul_q3(MatmulArgs) = |a| quantised::<3>(a);
    /// Two bits.
    matmul_q2(MatmulArgs) = |a| quantised::<2>(a);
    /// Activation quantiser.
    quantize(QuantizeArgs) = |a| ops::quantize(a);
    /// Bias, clamp and halves.
    epilogue(EpilogueArgs) = |a| ops::epilogue(a);
    /// RMS normalisation.
    rmsnorm(RmsNormArgs) = |a| ops::rmsnorm(a);
    /// SwiGLU.
    swiglu(SwiGluArgs) = |a| ops::swiglu(a);
    /// GeGLU.
    geglu(GeGluArgs) = |a| ops::geglu(a);
    /// Soft cap.
    softcap(SoftCapArgs) = |a| ops::softcap(a);
    /// Softmax.
    softmax(SoftmaxArgs) = |a| ops::softmax(a);
}
