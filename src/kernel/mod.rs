//! The kernels, and the one table that names them.
//!
//! A row of [`ROWS`] is data: an operation, the CPU features it needs, its numeric contract and one
//! function. Selection, conformance tests, fuzz targets and benchmarks all walk this slice, so a new
//! instruction set is one file, one `mod` line and its rows here (`docs/kernels.md`).

pub mod abi;
mod attend;
mod call;
mod fused;
#[cfg(feature = "hexagon")]
pub mod hexagon;
pub mod layout;
pub mod limits;
mod ops;
mod scalar;
pub mod scores;

#[cfg(target_arch = "aarch64")]
mod arm_asm;
#[cfg(target_arch = "aarch64")]
mod arm_codes;
#[cfg(target_arch = "aarch64")]
mod arm_matmul;
#[cfg(target_arch = "aarch64")]
mod attend_arm;
#[cfg(target_arch = "x86_64")]
mod attend_x86;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
#[cfg(target_arch = "aarch64")]
mod dotprod;
#[cfg(target_arch = "aarch64")]
mod i8mm;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(c_kernel = "sve_matmul")]
mod sve;
#[cfg(target_arch = "x86_64")]
mod vnni;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_few;

pub use attend::quantize_query;
pub use call::{Activations, AttendStep, Epilogue, Input, Kernels, MatmulJob, Packed, QueryCodes};
pub use layout::{Format, Layout, Offset};
pub use ops::{LANES, exp, sum_lanes};

use crate::isa::Isa;
use abi::{
    AttendArgs, EpilogueArgs, GeGluArgs, MatmulArgs, QuantizeArgs, RmsNormArgs, SoftCapArgs,
    SoftmaxArgs, SwiGluArgs,
};

/// How keys and values lie in a KV block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvFormat {
    /// As they were computed.
    #[default]
    F32,
    /// Rounded to half precision: half the memory. A magnitude above 65504 becomes 65504.
    F16,
    /// Eight bits with one f32 scale for each token and head: about a quarter of the memory.
    I8,
    /// Keys as in `I8`, values of four bits. The first 64 tokens of a sequence, which every later token
    /// looks at most, stay f16.
    I4,
}

impl KvFormat {
    /// Every format.
    pub const ALL: [KvFormat; 4] = [KvFormat::F32, KvFormat::F16, KvFormat::I8, KvFormat::I4];

    /// The name: `f32`, `f16`, `i8` or `i4`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::I8 => "i8",
            Self::I4 => "i4",
        }
    }

    /// Whether the elements are integers with scales.
    #[must_use]
    pub const fn is_quantised(self) -> bool {
        matches!(self, Self::I8 | Self::I4)
    }

    /// Bytes of 16 keys with heads of `d` elements, a multiple of 16, scales included.
    #[must_use]
    pub const fn key_bytes(self, d: usize) -> usize {
        match self {
            Self::F32 => LANES * d * 4,
            Self::F16 => LANES * d * 2,
            Self::I8 | Self::I4 => LANES * d + LANES * 4,
        }
    }

    /// Bytes of 16 values, scales included.
    #[must_use]
    pub const fn value_bytes(self, d: usize) -> usize {
        match self {
            Self::I4 => LANES * d.div_ceil(32) * 16 + LANES * 4,
            format => format.key_bytes(d),
        }
    }
}

/// What a row computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `y = x * w^T` on packed weights of one format, any number of activation rows.
    Matmul(Format),
    /// Activations to int8 groups.
    Quantize,
    /// Bias, clamp and rounding to halves after a matmul.
    Epilogue,
    /// Root-mean-square normalisation.
    RmsNorm,
    /// `silu(gate) * up`.
    SwiGlu,
    /// `gelu(gate) * up`.
    GeGlu,
    /// `cap * tanh(x / cap)`.
    SoftCap,
    /// Softmax of one row.
    Softmax,
    /// Attention of query rows over one KV block of one format.
    Attend(KvFormat),
}

/// How near a row is to the scalar one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contract {
    /// The same bits.
    Exact,
    /// Within so many units in the last place, and why.
    Ulp(u32, &'static str),
}

/// The function of a row; the variant is its argument block.
#[derive(Clone, Copy)]
pub enum Run {
    /// A matmul of any format.
    Matmul(unsafe extern "C" fn(*const MatmulArgs)),
    /// The activation quantiser.
    Quantize(unsafe extern "C" fn(*const QuantizeArgs)),
    /// Bias, clamp and halves.
    Epilogue(unsafe extern "C" fn(*const EpilogueArgs)),
    /// RMS normalisation.
    RmsNorm(unsafe extern "C" fn(*const RmsNormArgs)),
    /// SwiGLU.
    SwiGlu(unsafe extern "C" fn(*const SwiGluArgs)),
    /// GeGLU.
    GeGlu(unsafe extern "C" fn(*const GeGluArgs)),
    /// Soft cap.
    SoftCap(unsafe extern "C" fn(*const SoftCapArgs)),
    /// Softmax.
    Softmax(unsafe extern "C" fn(*const SoftmaxArgs)),
    /// Attention over one block.
    Attend(unsafe extern "C" fn(*const AttendArgs)),
}

/// One kernel.
pub struct Row {
    /// `operation-isa`, with the weight format in front for matmuls: also the name in tests,
    /// benchmarks, logs and `NYBL_EXPECT`.
    pub name: &'static str,
    /// What it computes.
    pub op: Op,
    /// The CPU features it uses.
    pub needs: Isa,
    /// How near to the scalar row of the same operation.
    pub contract: Contract,
    /// The function. Calling it needs the features in `needs` and a block that keeps the promises of
    /// [`abi`].
    pub run: Run,
}

/// A row with the same bits as the scalar one.
const fn exact(name: &'static str, op: Op, needs: Isa, run: Run) -> Row {
    Row { name, op, needs, contract: Contract::Exact, run }
}

#[cfg(target_arch = "x86_64")]
const AVXVNNI: Isa = Isa::AVX2.and(Isa::AVXVNNI);
#[cfg(target_arch = "x86_64")]
const AVX512: Isa = Isa::AVX2.and(Isa::AVX512);
#[cfg(target_arch = "aarch64")]
const I8MM: Isa = Isa::DOTPROD.and(Isa::I8MM);

/// THE TABLE: slowest first within an operation; the first row of an operation is its oracle.
#[rustfmt::skip] // one row a line, whatever its length
pub static ROWS: &[Row] = &[
    exact("f32-matmul-scalar", Op::Matmul(Format::F32), Isa::NONE, Run::Matmul(scalar::matmul_f32)),
    exact("f16-matmul-scalar", Op::Matmul(Format::F16), Isa::NONE, Run::Matmul(scalar::matmul_f16)),
    exact("bf16-matmul-scalar", Op::Matmul(Format::Bf16), Isa::NONE, Run::Matmul(scalar::matmul_bf16)),
    exact("q8-matmul-scalar", Op::Matmul(Format::Q8), Isa::NONE, Run::Matmul(scalar::matmul_q8)),
    exact("q4-matmul-scalar", Op::Matmul(Format::Q4), Isa::NONE, Run::Matmul(scalar::matmul_q4)),
    exact("q4z-matmul-scalar", Op::Matmul(Format::Q4Z), Isa::NONE, Run::Matmul(scalar::matmul_q4)),
    exact("q4m-matmul-scalar", Op::Matmul(Format::Q4M), Isa::NONE, Run::Matmul(scalar::matmul_q4)),
    exact("q3-matmul-scalar", Op::Matmul(Format::Q3), Isa::NONE, Run::Matmul(scalar::matmul_q3)),
    exact("q3z-matmul-scalar", Op::Matmul(Format::Q3Z), Isa::NONE, Run::Matmul(scalar::matmul_q3)),
    exact("q3m-matmul-scalar", Op::Matmul(Format::Q3M), Isa::NONE, Run::Matmul(scalar::matmul_q3)),
    exact("q2-matmul-scalar", Op::Matmul(Format::Q2), Isa::NONE, Run::Matmul(scalar::matmul_q2)),
    exact("q2z-matmul-scalar", Op::Matmul(Format::Q2Z), Isa::NONE, Run::Matmul(scalar::matmul_q2)),
    exact("q2m-matmul-scalar", Op::Matmul(Format::Q2M), Isa::NONE, Run::Matmul(scalar::matmul_q2)),
    exact("quantize-scalar", Op::Quantize, Isa::NONE, Run::Quantize(scalar::quantize)),
    exact("epilogue-scalar", Op::Epilogue, Isa::NONE, Run::Epilogue(scalar::epilogue)),
    exact("rmsnorm-scalar", Op::RmsNorm, Isa::NONE, Run::RmsNorm(scalar::rmsnorm)),
    exact("swiglu-scalar", Op::SwiGlu, Isa::NONE, Run::SwiGlu(scalar::swiglu)),
    exact("geglu-scalar", Op::GeGlu, Isa::NONE, Run::GeGlu(scalar::geglu)),
    exact("softcap-scalar", Op::SoftCap, Isa::NONE, Run::SoftCap(scalar::softcap)),
    exact("softmax-scalar", Op::Softmax, Isa::NONE, Run::Softmax(scalar::softmax)),
    exact("attend-scalar", Op::Attend(KvFormat::F32), Isa::NONE, Run::Attend(attend::scalar_f32)),
    exact("attend-f16-scalar", Op::Attend(KvFormat::F16), Isa::NONE, Run::Attend(attend::scalar_f16)),
    exact("attend-i8-scalar", Op::Attend(KvFormat::I8), Isa::NONE, Run::Attend(attend::scalar_i8)),
    exact("attend-i4-scalar", Op::Attend(KvFormat::I4), Isa::NONE, Run::Attend(attend::scalar_i4)),

    exact("f32-matmul-portable", Op::Matmul(Format::F32), Isa::PORTABLE, Run::Matmul(portable::matmul_f32)),
    exact("f16-matmul-portable", Op::Matmul(Format::F16), Isa::PORTABLE, Run::Matmul(portable::matmul_f16)),
    exact("bf16-matmul-portable", Op::Matmul(Format::Bf16), Isa::PORTABLE, Run::Matmul(portable::matmul_bf16)),
    exact("q8-matmul-portable", Op::Matmul(Format::Q8), Isa::PORTABLE, Run::Matmul(portable::matmul_q8)),
    exact("q4-matmul-portable", Op::Matmul(Format::Q4), Isa::PORTABLE, Run::Matmul(portable::matmul_q4)),
    exact("q4z-matmul-portable", Op::Matmul(Format::Q4Z), Isa::PORTABLE, Run::Matmul(portable::matmul_q4)),
    exact("q4m-matmul-portable", Op::Matmul(Format::Q4M), Isa::PORTABLE, Run::Matmul(portable::matmul_q4)),
    exact("q3-matmul-portable", Op::Matmul(Format::Q3), Isa::PORTABLE, Run::Matmul(portable::matmul_q3)),
    exact("q3z-matmul-portable", Op::Matmul(Format::Q3Z), Isa::PORTABLE, Run::Matmul(portable::matmul_q3)),
    exact("q3m-matmul-portable", Op::Matmul(Format::Q3M), Isa::PORTABLE, Run::Matmul(portable::matmul_q3)),
    exact("q2-matmul-portable", Op::Matmul(Format::Q2), Isa::PORTABLE, Run::Matmul(portable::matmul_q2)),
    exact("q2z-matmul-portable", Op::Matmul(Format::Q2Z), Isa::PORTABLE, Run::Matmul(portable::matmul_q2)),
    exact("q2m-matmul-portable", Op::Matmul(Format::Q2M), Isa::PORTABLE, Run::Matmul(portable::matmul_q2)),

    #[cfg(target_arch = "x86_64")] exact("f32-matmul-avx2", Op::Matmul(Format::F32), Isa::AVX2, Run::Matmul(avx2::matmul_f32)),
    #[cfg(target_arch = "x86_64")] exact("f16-matmul-avx2", Op::Matmul(Format::F16), Isa::AVX2, Run::Matmul(avx2::matmul_f16)),
    #[cfg(target_arch = "x86_64")] exact("bf16-matmul-avx2", Op::Matmul(Format::Bf16), Isa::AVX2, Run::Matmul(avx2::matmul_bf16)),
    #[cfg(target_arch = "x86_64")] exact("q8-matmul-avx2", Op::Matmul(Format::Q8), Isa::AVX2, Run::Matmul(avx2::matmul_q8)),
    #[cfg(target_arch = "x86_64")] exact("q4-matmul-avx2", Op::Matmul(Format::Q4), Isa::AVX2, Run::Matmul(avx2::matmul_q4)),
    #[cfg(target_arch = "x86_64")] exact("q4z-matmul-avx2", Op::Matmul(Format::Q4Z), Isa::AVX2, Run::Matmul(avx2::matmul_q4)),
    #[cfg(target_arch = "x86_64")] exact("q4m-matmul-avx2", Op::Matmul(Format::Q4M), Isa::AVX2, Run::Matmul(avx2::matmul_q4)),
    #[cfg(target_arch = "x86_64")] exact("q3-matmul-avx2", Op::Matmul(Format::Q3), Isa::AVX2, Run::Matmul(avx2::matmul_q3)),
    #[cfg(target_arch = "x86_64")] exact("q3z-matmul-avx2", Op::Matmul(Format::Q3Z), Isa::AVX2, Run::Matmul(avx2::matmul_q3)),
    #[cfg(target_arch = "x86_64")] exact("q3m-matmul-avx2", Op::Matmul(Format::Q3M), Isa::AVX2, Run::Matmul(avx2::matmul_q3)),
    #[cfg(target_arch = "x86_64")] exact("q2-matmul-avx2", Op::Matmul(Format::Q2), Isa::AVX2, Run::Matmul(avx2::matmul_q2)),
    #[cfg(target_arch = "x86_64")] exact("q2z-matmul-avx2", Op::Matmul(Format::Q2Z), Isa::AVX2, Run::Matmul(avx2::matmul_q2)),
    #[cfg(target_arch = "x86_64")] exact("q2m-matmul-avx2", Op::Matmul(Format::Q2M), Isa::AVX2, Run::Matmul(avx2::matmul_q2)),
    #[cfg(target_arch = "x86_64")] exact("quantize-avx2", Op::Quantize, Isa::AVX2, Run::Quantize(avx2::quantize)),
    #[cfg(target_arch = "x86_64")] exact("epilogue-avx2", Op::Epilogue, Isa::AVX2, Run::Epilogue(avx2::epilogue)),
    #[cfg(target_arch = "x86_64")] exact("rmsnorm-avx2", Op::RmsNorm, Isa::AVX2, Run::RmsNorm(avx2::rmsnorm)),
    #[cfg(target_arch = "x86_64")] exact("swiglu-avx2", Op::SwiGlu, Isa::AVX2, Run::SwiGlu(avx2::swiglu)),
    #[cfg(target_arch = "x86_64")] exact("geglu-avx2", Op::GeGlu, Isa::AVX2, Run::GeGlu(avx2::geglu)),
    #[cfg(target_arch = "x86_64")] exact("softcap-avx2", Op::SoftCap, Isa::AVX2, Run::SoftCap(avx2::softcap)),
    #[cfg(target_arch = "x86_64")] exact("softmax-avx2", Op::Softmax, Isa::AVX2, Run::Softmax(avx2::softmax)),
    #[cfg(target_arch = "x86_64")] exact("attend-avx2", Op::Attend(KvFormat::F32), Isa::AVX2, Run::Attend(attend_x86::avx2_f32)),
    #[cfg(target_arch = "x86_64")] exact("attend-f16-avx2", Op::Attend(KvFormat::F16), Isa::AVX2, Run::Attend(attend_x86::avx2_f16)),
    #[cfg(target_arch = "x86_64")] exact("attend-i8-avx2", Op::Attend(KvFormat::I8), Isa::AVX2, Run::Attend(attend_x86::avx2_i8)),
    #[cfg(target_arch = "x86_64")] exact("attend-i4-avx2", Op::Attend(KvFormat::I4), Isa::AVX2, Run::Attend(attend_x86::avx2_i4)),

    #[cfg(target_arch = "x86_64")] exact("q8-matmul-avxvnni", Op::Matmul(Format::Q8), AVXVNNI, Run::Matmul(avxvnni::matmul_q8)),
    #[cfg(target_arch = "x86_64")] exact("q4-matmul-avxvnni", Op::Matmul(Format::Q4), AVXVNNI, Run::Matmul(avxvnni::matmul_q4)),
    #[cfg(target_arch = "x86_64")] exact("q4z-matmul-avxvnni", Op::Matmul(Format::Q4Z), AVXVNNI, Run::Matmul(avxvnni::matmul_q4)),
    #[cfg(target_arch = "x86_64")] exact("q4m-matmul-avxvnni", Op::Matmul(Format::Q4M), AVXVNNI, Run::Matmul(avxvnni::matmul_q4)),
    #[cfg(target_arch = "x86_64")] exact("q3-matmul-avxvnni", Op::Matmul(Format::Q3), AVXVNNI, Run::Matmul(avxvnni::matmul_q3)),
    #[cfg(target_arch = "x86_64")] exact("q3z-matmul-avxvnni", Op::Matmul(Format::Q3Z), AVXVNNI, Run::Matmul(avxvnni::matmul_q3)),
    #[cfg(target_arch = "x86_64")] exact("q3m-matmul-avxvnni", Op::Matmul(Format::Q3M), AVXVNNI, Run::Matmul(avxvnni::matmul_q3)),
    #[cfg(target_arch = "x86_64")] exact("q2-matmul-avxvnni", Op::Matmul(Format::Q2), AVXVNNI, Run::Matmul(avxvnni::matmul_q2)),
    #[cfg(target_arch = "x86_64")] exact("q2z-matmul-avxvnni", Op::Matmul(Format::Q2Z), AVXVNNI, Run::Matmul(avxvnni::matmul_q2)),
    #[cfg(target_arch = "x86_64")] exact("q2m-matmul-avxvnni", Op::Matmul(Format::Q2M), AVXVNNI, Run::Matmul(avxvnni::matmul_q2)),

    #[cfg(target_arch = "x86_64")] exact("f32-matmul-avx512", Op::Matmul(Format::F32), AVX512, Run::Matmul(avx512::matmul_f32)),
    #[cfg(target_arch = "x86_64")] exact("f16-matmul-avx512", Op::Matmul(Format::F16), AVX512, Run::Matmul(avx512::matmul_f16)),
    #[cfg(target_arch = "x86_64")] exact("bf16-matmul-avx512", Op::Matmul(Format::Bf16), AVX512, Run::Matmul(avx512::matmul_bf16)),
    #[cfg(target_arch = "x86_64")] exact("q8-matmul-avx512", Op::Matmul(Format::Q8), AVX512, Run::Matmul(avx512::matmul_q8)),
    #[cfg(target_arch = "x86_64")] exact("q4-matmul-avx512", Op::Matmul(Format::Q4), AVX512, Run::Matmul(avx512::matmul_q4)),
    #[cfg(target_arch = "x86_64")] exact("q4z-matmul-avx512", Op::Matmul(Format::Q4Z), AVX512, Run::Matmul(avx512::matmul_q4)),
    #[cfg(target_arch = "x86_64")] exact("q4m-matmul-avx512", Op::Matmul(Format::Q4M), AVX512, Run::Matmul(avx512::matmul_q4)),
    #[cfg(target_arch = "x86_64")] exact("q3-matmul-avx512", Op::Matmul(Format::Q3), AVX512, Run::Matmul(avx512::matmul_q3)),
    #[cfg(target_arch = "x86_64")] exact("q3z-matmul-avx512", Op::Matmul(Format::Q3Z), AVX512, Run::Matmul(avx512::matmul_q3)),
    #[cfg(target_arch = "x86_64")] exact("q3m-matmul-avx512", Op::Matmul(Format::Q3M), AVX512, Run::Matmul(avx512::matmul_q3)),
    #[cfg(target_arch = "x86_64")] exact("q2-matmul-avx512", Op::Matmul(Format::Q2), AVX512, Run::Matmul(avx512::matmul_q2)),
    #[cfg(target_arch = "x86_64")] exact("q2z-matmul-avx512", Op::Matmul(Format::Q2Z), AVX512, Run::Matmul(avx512::matmul_q2)),
    #[cfg(target_arch = "x86_64")] exact("q2m-matmul-avx512", Op::Matmul(Format::Q2M), AVX512, Run::Matmul(avx512::matmul_q2)),
    #[cfg(target_arch = "x86_64")] exact("quantize-avx512", Op::Quantize, AVX512, Run::Quantize(avx512::quantize)),
    #[cfg(target_arch = "x86_64")] exact("epilogue-avx512", Op::Epilogue, AVX512, Run::Epilogue(avx512::epilogue)),
    #[cfg(target_arch = "x86_64")] exact("rmsnorm-avx512", Op::RmsNorm, AVX512, Run::RmsNorm(avx512::rmsnorm)),
    #[cfg(target_arch = "x86_64")] exact("swiglu-avx512", Op::SwiGlu, AVX512, Run::SwiGlu(avx512::swiglu)),
    #[cfg(target_arch = "x86_64")] exact("geglu-avx512", Op::GeGlu, AVX512, Run::GeGlu(avx512::geglu)),
    #[cfg(target_arch = "x86_64")] exact("softcap-avx512", Op::SoftCap, AVX512, Run::SoftCap(avx512::softcap)),
    #[cfg(target_arch = "x86_64")] exact("softmax-avx512", Op::Softmax, AVX512, Run::Softmax(avx512::softmax)),
    #[cfg(target_arch = "x86_64")] exact("attend-avx512", Op::Attend(KvFormat::F32), AVX512, Run::Attend(attend_x86::avx512_f32)),
    #[cfg(target_arch = "x86_64")] exact("attend-f16-avx512", Op::Attend(KvFormat::F16), AVX512, Run::Attend(attend_x86::avx512_f16)),
    #[cfg(target_arch = "x86_64")] exact("attend-i8-avx512", Op::Attend(KvFormat::I8), AVX512, Run::Attend(attend_x86::avx512_i8)),
    #[cfg(target_arch = "x86_64")] exact("attend-i4-avx512", Op::Attend(KvFormat::I4), AVX512, Run::Attend(attend_x86::avx512_i4)),

    #[cfg(target_arch = "aarch64")] exact("f32-matmul-neon", Op::Matmul(Format::F32), Isa::NEON, Run::Matmul(neon::matmul_f32)),
    #[cfg(target_arch = "aarch64")] exact("f16-matmul-neon", Op::Matmul(Format::F16), Isa::NEON, Run::Matmul(neon::matmul_f16)),
    #[cfg(target_arch = "aarch64")] exact("bf16-matmul-neon", Op::Matmul(Format::Bf16), Isa::NEON, Run::Matmul(neon::matmul_bf16)),
    #[cfg(target_arch = "aarch64")] exact("q8-matmul-neon", Op::Matmul(Format::Q8), Isa::NEON, Run::Matmul(neon::matmul_q8)),
    #[cfg(target_arch = "aarch64")] exact("q4-matmul-neon", Op::Matmul(Format::Q4), Isa::NEON, Run::Matmul(neon::matmul_q4)),
    #[cfg(target_arch = "aarch64")] exact("q4z-matmul-neon", Op::Matmul(Format::Q4Z), Isa::NEON, Run::Matmul(neon::matmul_q4)),
    #[cfg(target_arch = "aarch64")] exact("q4m-matmul-neon", Op::Matmul(Format::Q4M), Isa::NEON, Run::Matmul(neon::matmul_q4)),
    #[cfg(target_arch = "aarch64")] exact("q3-matmul-neon", Op::Matmul(Format::Q3), Isa::NEON, Run::Matmul(neon::matmul_q3)),
    #[cfg(target_arch = "aarch64")] exact("q3z-matmul-neon", Op::Matmul(Format::Q3Z), Isa::NEON, Run::Matmul(neon::matmul_q3)),
    #[cfg(target_arch = "aarch64")] exact("q3m-matmul-neon", Op::Matmul(Format::Q3M), Isa::NEON, Run::Matmul(neon::matmul_q3)),
    #[cfg(target_arch = "aarch64")] exact("q2-matmul-neon", Op::Matmul(Format::Q2), Isa::NEON, Run::Matmul(neon::matmul_q2)),
    #[cfg(target_arch = "aarch64")] exact("q2z-matmul-neon", Op::Matmul(Format::Q2Z), Isa::NEON, Run::Matmul(neon::matmul_q2)),
    #[cfg(target_arch = "aarch64")] exact("q2m-matmul-neon", Op::Matmul(Format::Q2M), Isa::NEON, Run::Matmul(neon::matmul_q2)),
    #[cfg(target_arch = "aarch64")] exact("quantize-neon", Op::Quantize, Isa::NEON, Run::Quantize(neon::quantize)),
    #[cfg(target_arch = "aarch64")] exact("epilogue-neon", Op::Epilogue, Isa::NEON, Run::Epilogue(neon::epilogue)),
    #[cfg(target_arch = "aarch64")] exact("rmsnorm-neon", Op::RmsNorm, Isa::NEON, Run::RmsNorm(neon::rmsnorm)),
    #[cfg(target_arch = "aarch64")] exact("swiglu-neon", Op::SwiGlu, Isa::NEON, Run::SwiGlu(neon::swiglu)),
    #[cfg(target_arch = "aarch64")] exact("geglu-neon", Op::GeGlu, Isa::NEON, Run::GeGlu(neon::geglu)),
    #[cfg(target_arch = "aarch64")] exact("softcap-neon", Op::SoftCap, Isa::NEON, Run::SoftCap(neon::softcap)),
    #[cfg(target_arch = "aarch64")] exact("softmax-neon", Op::Softmax, Isa::NEON, Run::Softmax(neon::softmax)),
    #[cfg(target_arch = "aarch64")] exact("attend-neon", Op::Attend(KvFormat::F32), Isa::NEON, Run::Attend(attend_arm::neon_f32)),
    #[cfg(target_arch = "aarch64")] exact("attend-f16-neon", Op::Attend(KvFormat::F16), Isa::NEON, Run::Attend(attend_arm::neon_f16)),
    #[cfg(target_arch = "aarch64")] exact("attend-i8-neon", Op::Attend(KvFormat::I8), Isa::NEON, Run::Attend(attend_arm::neon_i8)),
    #[cfg(target_arch = "aarch64")] exact("attend-i4-neon", Op::Attend(KvFormat::I4), Isa::NEON, Run::Attend(attend_arm::neon_i4)),

    // Before dotprod: an SDOT of SVE is wider where a core's pipes are fewer, so at 128 and 256 bits, which is all that
    // cores with both have, these rows gain nothing over the next ones. SMMLA has an SVE form for which the same holds.
    // They are for cores with SVE and no dotprod (A64FX).
    #[cfg(c_kernel = "sve_matmul")] exact("q8-matmul-sve", Op::Matmul(Format::Q8), Isa::SVE, Run::Matmul(sve::matmul_q8)),
    #[cfg(c_kernel = "sve_matmul")] exact("q4-matmul-sve", Op::Matmul(Format::Q4), Isa::SVE, Run::Matmul(sve::matmul_q4)),
    #[cfg(c_kernel = "sve_matmul")] exact("q4z-matmul-sve", Op::Matmul(Format::Q4Z), Isa::SVE, Run::Matmul(sve::matmul_q4)),
    #[cfg(c_kernel = "sve_matmul")] exact("q4m-matmul-sve", Op::Matmul(Format::Q4M), Isa::SVE, Run::Matmul(sve::matmul_q4)),
    #[cfg(c_kernel = "sve_matmul")] exact("q3-matmul-sve", Op::Matmul(Format::Q3), Isa::SVE, Run::Matmul(sve::matmul_q3)),
    #[cfg(c_kernel = "sve_matmul")] exact("q3z-matmul-sve", Op::Matmul(Format::Q3Z), Isa::SVE, Run::Matmul(sve::matmul_q3)),
    #[cfg(c_kernel = "sve_matmul")] exact("q3m-matmul-sve", Op::Matmul(Format::Q3M), Isa::SVE, Run::Matmul(sve::matmul_q3)),
    #[cfg(c_kernel = "sve_matmul")] exact("q2-matmul-sve", Op::Matmul(Format::Q2), Isa::SVE, Run::Matmul(sve::matmul_q2)),
    #[cfg(c_kernel = "sve_matmul")] exact("q2z-matmul-sve", Op::Matmul(Format::Q2Z), Isa::SVE, Run::Matmul(sve::matmul_q2)),
    #[cfg(c_kernel = "sve_matmul")] exact("q2m-matmul-sve", Op::Matmul(Format::Q2M), Isa::SVE, Run::Matmul(sve::matmul_q2)),

    #[cfg(target_arch = "aarch64")] exact("q8-matmul-dotprod", Op::Matmul(Format::Q8), Isa::DOTPROD, Run::Matmul(dotprod::matmul_q8)),
    #[cfg(target_arch = "aarch64")] exact("q4-matmul-dotprod", Op::Matmul(Format::Q4), Isa::DOTPROD, Run::Matmul(dotprod::matmul_q4)),
    #[cfg(target_arch = "aarch64")] exact("q4z-matmul-dotprod", Op::Matmul(Format::Q4Z), Isa::DOTPROD, Run::Matmul(dotprod::matmul_q4)),
    #[cfg(target_arch = "aarch64")] exact("q4m-matmul-dotprod", Op::Matmul(Format::Q4M), Isa::DOTPROD, Run::Matmul(dotprod::matmul_q4)),
    #[cfg(target_arch = "aarch64")] exact("q3-matmul-dotprod", Op::Matmul(Format::Q3), Isa::DOTPROD, Run::Matmul(dotprod::matmul_q3)),
    #[cfg(target_arch = "aarch64")] exact("q3z-matmul-dotprod", Op::Matmul(Format::Q3Z), Isa::DOTPROD, Run::Matmul(dotprod::matmul_q3)),
    #[cfg(target_arch = "aarch64")] exact("q3m-matmul-dotprod", Op::Matmul(Format::Q3M), Isa::DOTPROD, Run::Matmul(dotprod::matmul_q3)),
    #[cfg(target_arch = "aarch64")] exact("q2-matmul-dotprod", Op::Matmul(Format::Q2), Isa::DOTPROD, Run::Matmul(dotprod::matmul_q2)),
    #[cfg(target_arch = "aarch64")] exact("q2z-matmul-dotprod", Op::Matmul(Format::Q2Z), Isa::DOTPROD, Run::Matmul(dotprod::matmul_q2)),
    #[cfg(target_arch = "aarch64")] exact("q2m-matmul-dotprod", Op::Matmul(Format::Q2M), Isa::DOTPROD, Run::Matmul(dotprod::matmul_q2)),
    #[cfg(target_arch = "aarch64")] exact("attend-i8-dotprod", Op::Attend(KvFormat::I8), Isa::DOTPROD, Run::Attend(attend_arm::dotprod_i8)),
    #[cfg(target_arch = "aarch64")] exact("attend-i4-dotprod", Op::Attend(KvFormat::I4), Isa::DOTPROD, Run::Attend(attend_arm::dotprod_i4)),

    #[cfg(target_arch = "aarch64")] exact("q8-matmul-i8mm", Op::Matmul(Format::Q8), I8MM, Run::Matmul(i8mm::matmul_q8)),
    #[cfg(target_arch = "aarch64")] exact("q4-matmul-i8mm", Op::Matmul(Format::Q4), I8MM, Run::Matmul(i8mm::matmul_q4)),
    #[cfg(target_arch = "aarch64")] exact("q4z-matmul-i8mm", Op::Matmul(Format::Q4Z), I8MM, Run::Matmul(i8mm::matmul_q4)),
    #[cfg(target_arch = "aarch64")] exact("q4m-matmul-i8mm", Op::Matmul(Format::Q4M), I8MM, Run::Matmul(i8mm::matmul_q4)),
    #[cfg(target_arch = "aarch64")] exact("q3-matmul-i8mm", Op::Matmul(Format::Q3), I8MM, Run::Matmul(i8mm::matmul_q3)),
    #[cfg(target_arch = "aarch64")] exact("q3z-matmul-i8mm", Op::Matmul(Format::Q3Z), I8MM, Run::Matmul(i8mm::matmul_q3)),
    #[cfg(target_arch = "aarch64")] exact("q3m-matmul-i8mm", Op::Matmul(Format::Q3M), I8MM, Run::Matmul(i8mm::matmul_q3)),
    #[cfg(target_arch = "aarch64")] exact("q2-matmul-i8mm", Op::Matmul(Format::Q2), I8MM, Run::Matmul(i8mm::matmul_q2)),
    #[cfg(target_arch = "aarch64")] exact("q2z-matmul-i8mm", Op::Matmul(Format::Q2Z), I8MM, Run::Matmul(i8mm::matmul_q2)),
    #[cfg(target_arch = "aarch64")] exact("q2m-matmul-i8mm", Op::Matmul(Format::Q2M), I8MM, Run::Matmul(i8mm::matmul_q2)),
];

/// The fastest row for `op` on a CPU that has `have`.
#[must_use]
pub fn select(op: Op, have: Isa) -> &'static Row {
    let fits = |row: &&Row| row.op == op && have.has(row.needs);
    match ROWS.iter().rev().find(fits) {
        Some(row) => row,
        // A test asserts that every operation has a row without needs, so this cannot be reached.
        None => unreachable!("no row for {op:?}"),
    }
}

/// Declares the matmul entries of a row file under `[attributes]`: all panels, and for each the
/// activation rows in runs of at most `$most`, every run by a panel function compiled for exactly that
/// many rows.
macro_rules! exact_m {
    ($features:tt $most:literal;
     $($(#[$doc:meta])* $name:ident = $panel:ident[$($extra:tt),*];)*) => {
        $($crate::kernel::exact_m!(@one $features [$(#[$doc])*] $most, $name, $panel[$($extra),*]);)*
    };
    (@one [$($features:tt)*] [$($doc:tt)*] $most:literal, $name:ident, $panel:ident[$($extra:tt),*]) => {
        $($doc)*
        $($features)*
        pub(super) unsafe extern "C" fn $name(a: *const $crate::kernel::abi::MatmulArgs) {
            // SAFETY: the caller vouches for the block; the runs below end at `m` and `panels`, and each
            // has 1 to `$most` rows.
            unsafe {
                let a = &*a;
                for panel in 0..a.panels {
                    let mut row = 0;
                    while row < a.m {
                        let run = (a.m - row).min($most);
                        match run {
                            1 => $panel::<1 $(, $extra)*>(a, panel, row),
                            2 => $panel::<2 $(, $extra)*>(a, panel, row),
                            3 => $panel::<3 $(, $extra)*>(a, panel, row),
                            4 => $panel::<4 $(, $extra)*>(a, panel, row),
                            5 => $panel::<5 $(, $extra)*>(a, panel, row),
                            6 => $panel::<6 $(, $extra)*>(a, panel, row),
                            7 => $panel::<7 $(, $extra)*>(a, panel, row),
                            8 => $panel::<8 $(, $extra)*>(a, panel, row),
                            // Keeps the compiler from making functions for more rows than `$most`.
                            _ => std::hint::unreachable_unchecked(),
                        }
                        row += run;
                    }
                }
            }
        }
    };
}
use exact_m;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_operation_has_an_oracle() {
        for (i, row) in ROWS.iter().enumerate() {
            assert!(ROWS[..i].iter().all(|other| other.name != row.name), "{} twice", row.name);
            let first = ROWS.iter().find(|other| other.op == row.op);
            assert_eq!(first.map(|r| r.needs), Some(Isa::NONE), "{} has no scalar row", row.name);
        }
        for format in Format::ALL {
            assert_eq!(select(Op::Matmul(format), Isa::NONE).op, Op::Matmul(format));
        }
        for format in KvFormat::ALL {
            assert_eq!(select(Op::Attend(format), Isa::NONE).op, Op::Attend(format));
        }
    }

    #[test]
    fn a_mask_takes_rows_away() {
        let have = Isa::detect().masked(Isa::up_to("portable").unwrap());
        assert_eq!(select(Op::Matmul(Format::Q4), have).name, "q4-matmul-portable");
    }
}
