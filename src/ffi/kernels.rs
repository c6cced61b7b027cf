//! # Kernels
//!
//! The matrix kernels alone, for host runtimes that own memory and threads: stateless, no allocation, no I/O.
//! Any thread may call them, several at a time, on memory that nobody else writes.

use super::status::{
    Failure, NYBL_ERR_BUFFER_TOO_SMALL, NYBL_ERR_INVALID_ARGUMENT, NYBL_ERR_UNSUPPORTED, copy_text,
    guard, nybl_status,
};
use super::structs::{Sized32, read_config, set, slice};
use crate::isa::Isa;
use crate::kernel::abi::{EpilogueArgs, MatmulArgs, QuantizeArgs};
use crate::kernel::layout::MAX_PANEL;
use crate::kernel::{Format, Layout, Op, Packed, Row, Run, select};
use crate::quant::format::unpack_row;
use crate::quant::pack::{Rows, pack_panel};
use crate::quant::rtn;
use crate::quant::shapes::Source;
use half::{bf16, f16};
use std::ffi::{c_char, c_void};

/// nybl_layout.format: 32-bit floats.
pub const NYBL_FORMAT_F32: i32 = 0;
/// nybl_layout.format: IEEE half-precision floats.
pub const NYBL_FORMAT_F16: i32 = 1;
/// nybl_layout.format: bfloat16.
pub const NYBL_FORMAT_BF16: i32 = 2;
/// nybl_layout.format: signed bytes in groups, w = scale * q.
pub const NYBL_FORMAT_Q8: i32 = 3;
/// nybl_layout.format: four bits in groups, w = scale * (q - 8).
pub const NYBL_FORMAT_Q4: i32 = 4;
/// nybl_layout.format: four bits in groups, w = scale * (q - zero), zero an int16.
pub const NYBL_FORMAT_Q4Z: i32 = 5;
/// nybl_layout.format: four bits in groups, w = scale * q + minimum, minimum an f16.
pub const NYBL_FORMAT_Q4M: i32 = 6;
/// nybl_layout.format: three bits in groups, w = scale * (q - 4).
pub const NYBL_FORMAT_Q3: i32 = 7;
/// nybl_layout.format: three bits in groups, w = scale * (q - zero), zero an int16.
pub const NYBL_FORMAT_Q3Z: i32 = 8;
/// nybl_layout.format: three bits in groups, w = scale * q + minimum, minimum an f16.
pub const NYBL_FORMAT_Q3M: i32 = 9;
/// nybl_layout.format: two bits in groups, w = scale * (q - 2).
pub const NYBL_FORMAT_Q2: i32 = 10;
/// nybl_layout.format: two bits in groups, w = scale * (q - zero), zero an int16.
pub const NYBL_FORMAT_Q2Z: i32 = 11;
/// nybl_layout.format: two bits in groups, w = scale * q + minimum, minimum an f16.
pub const NYBL_FORMAT_Q2M: i32 = 12;

/// nybl_weights.kind: n rows of k floats; the quantised formats round them to nearest.
pub const NYBL_WEIGHTS_F32: i32 = 0;
/// nybl_weights.kind: n rows of k halves, for NYBL_FORMAT_F16.
pub const NYBL_WEIGHTS_F16: i32 = 1;
/// nybl_weights.kind: n rows of k bfloat16, for NYBL_FORMAT_BF16.
pub const NYBL_WEIGHTS_BF16: i32 = 2;
/// nybl_weights.kind: n rows of k codes, a byte each (0 to 15 for four bits, 0 to 7, 0 to 3, int8 for Q8), with
/// scales and offsets by row and group.
pub const NYBL_WEIGHTS_CODES: i32 = 3;
/// nybl_weights.kind: the arrays of a GPTQ checkpoint for Q4Z, Q3Z or Q2Z (or Q4, Q3, Q2 where all zero
/// points are the middle): `values` qweight `int32[k * bits / 32][n]`, `offsets` qzeros
/// `int32[groups][n * bits / 32]`, `scales` `f16[groups][n]`. Groups are of neighbouring columns: with desc_act sort
/// columns and activations by g_idx first. Zero points are stored less one, unless the checkpoint says gptq_v2.
pub const NYBL_WEIGHTS_GPTQ: i32 = 4;
/// nybl_weights.kind: as NYBL_WEIGHTS_GPTQ, zero points as they are.
pub const NYBL_WEIGHTS_GPTQ_V2: i32 = 5;
/// nybl_weights.kind: the arrays of an AWQ checkpoint (GEMM version) for Q4Z or Q4: `values` qweight
/// `int32[k][n / 8]`, `offsets` qzeros `int32[groups][n / 8]`, `scales` `f16[groups][n]`.
pub const NYBL_WEIGHTS_AWQ: i32 = 6;
/// nybl_weights.kind: `values` are the bytes of GGUF blocks, row after row, group 32: Q4_0 for Q4, Q4_1 for Q4M,
/// Q8_0 for Q8.
pub const NYBL_WEIGHTS_GGUF: i32 = 7;

/// A CPU feature: fixed-width vectors of the target's baseline.
pub const NYBL_CPU_PORTABLE: u32 = 1;
/// A CPU feature: AVX2 with FMA and F16C.
pub const NYBL_CPU_AVX2: u32 = 2;
/// A CPU feature: AVX-512 F, BW, DQ, VL and VNNI.
pub const NYBL_CPU_AVX512: u32 = 4;
/// A CPU feature: Arm's Advanced SIMD.
pub const NYBL_CPU_NEON: u32 = 8;
/// A CPU feature: SDOT and UDOT.
pub const NYBL_CPU_DOTPROD: u32 = 16;
/// A CPU feature: SMMLA.
pub const NYBL_CPU_I8MM: u32 = 32;
/// A CPU feature: scalable vectors.
pub const NYBL_CPU_SVE: u32 = 64;
/// A CPU feature: AVX-VNNI, dots of four bytes on 256 bits.
pub const NYBL_CPU_AVXVNNI: u32 = 128;

/// Format and shape of a matrix W[n, k]: n outputs, k inputs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_layout {
    /// sizeof(nybl_layout).
    pub struct_size: u32,
    /// One of NYBL_FORMAT_*.
    pub format: i32,
    /// Values of k that share a scale: 16, 32, 64 or 128, or 0 for one scale a row (NYBL_FORMAT_Q8 only);
    /// ignored for floats.
    pub group: u32,
    /// Outputs.
    pub n: u32,
    /// Inputs. Rows that are no whole number of groups are padded.
    pub k: u32,
}

// SAFETY: `repr(C)`, starts with a u32, integers only.
unsafe impl Sized32 for nybl_layout {}

/// Weights to be packed, row after row.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_weights {
    /// sizeof(nybl_weights).
    pub struct_size: u32,
    /// One of NYBL_WEIGHTS_*.
    pub kind: i32,
    /// n * k values of that kind, or what the kind says.
    pub values: *const c_void,
    /// Number of values: floats, codes, int32 words or, for GGUF, bytes.
    pub values_count: usize,
    /// For codes: one f16 for each row and group, ceil(k / group) of them a row. GPTQ and AWQ: by group and row.
    pub scales: *const u16,
    /// Number of scales.
    pub scales_count: usize,
    /// For codes of Q4Z, Q3Z and Q2Z one int16 zero point, of Q4M, Q3M and Q2M one f16 minimum, for each row
    /// and group; for GPTQ and AWQ the int32 words of qzeros; else NULL.
    pub offsets: *const c_void,
    /// Number of offsets, or of words.
    pub offsets_count: usize,
}

// SAFETY: `repr(C)`, starts with a u32, and integers and pointers may be zero.
unsafe impl Sized32 for nybl_weights {}

/// Arguments of nybl_matmul(): y[m, n] = x[m, k] * W[n, k]^T for the outputs n0 to n1.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_matmul_args {
    /// sizeof(nybl_matmul_args).
    pub struct_size: u32,
    /// CPU features the kernel may use, a sum of NYBL_CPU_*; 0 for all this CPU has.
    pub features: u32,
    /// The packed weights: nybl_pack_size() bytes, at a multiple of 4 (64 is best).
    pub weights: *const c_void,
    /// Their number of bytes.
    pub weights_len: usize,
    /// What nybl_quantize_activations() wrote for m rows.
    pub activations: *const c_void,
    /// Its number of bytes: nybl_matmul_scratch_size().
    pub activations_len: usize,
    /// Activation rows.
    pub m: usize,
    /// First output, a multiple of 32; of 64 for two bits and of 128 for three.
    pub n0: usize,
    /// One past the last output: such a multiple, or n.
    pub n1: usize,
    /// m rows of outputs; output i of a row is at index i whatever n0 is.
    pub y: *mut f32,
    /// Elements from one row of outputs to the next, at least n.
    pub y_stride: usize,
    /// n floats that are added to every row, or NULL.
    pub bias: *const f32,
    /// The least and the largest output after the bias; both 0 for no bounds.
    pub clamp_low: f32,
    /// See clamp_low.
    pub clamp_high: f32,
    /// Where outputs go as halves (f16 bits), laid out like y, which is then not used; or NULL.
    pub y_f16: *mut u16,
}

// SAFETY: `repr(C)`, starts with a u32, and integers and pointers may be zero.
unsafe impl Sized32 for nybl_matmul_args {}

fn invalid(text: impl Into<String>) -> Failure {
    Failure::new(NYBL_ERR_INVALID_ARGUMENT, text)
}

/// The layout that a C struct describes.
///
/// # Safety
/// `layout` is NULL or states its size.
unsafe fn read_layout(layout: *const nybl_layout) -> Result<Layout, Failure> {
    if layout.is_null() {
        return Err(Failure::null("layout"));
    }
    // SAFETY: the caller vouches for the pointer.
    let layout = unsafe { read_config(layout)? };
    let format = u8::try_from(layout.format).ok().and_then(Format::from_code);
    let format = format.ok_or_else(|| invalid("layout->format is none of NYBL_FORMAT_*"))?;
    Ok(Layout::new(format, layout.group as usize, layout.n as usize, layout.k as usize)?)
}

/// The features to use: those asked for, or all.
fn features(asked: u32) -> Result<Isa, Failure> {
    let have = Isa::detect();
    if asked == 0 {
        return Ok(have);
    }
    if asked & !have.bits() != 0 {
        let text = format!("features {asked:#x}: this CPU has {:#x} ({have})", have.bits());
        return Err(Failure::new(NYBL_ERR_UNSUPPORTED, text));
    }
    Ok(have.masked(Isa::from_bits(asked)))
}

/// The first `least` bytes of a caller's buffer, which must have as many.
///
/// # Safety
/// `data` points to `len` writable bytes, or is NULL.
unsafe fn buffer<'a>(
    name: &str,
    data: *mut c_void,
    len: usize,
    least: usize,
) -> Result<&'a mut [u8], Failure> {
    if data.is_null() {
        return Err(Failure::null(name));
    }
    if len < least || len > isize::MAX as usize {
        let text = format!("{name} has {len} bytes, {least} are needed");
        return Err(Failure::new(NYBL_ERR_BUFFER_TOO_SMALL, text));
    }
    // SAFETY: the caller vouches for the bytes.
    Ok(unsafe { std::slice::from_raw_parts_mut(data.cast::<u8>(), least) })
}

/// Where codes, scales and sums of `m` activation rows lie in a scratch buffer.
struct Scratch {
    scales: usize,
    sums: usize,
    bytes: usize,
}

impl Scratch {
    fn new(layout: &Layout, m: usize) -> Result<Self, Failure> {
        let too_many = || invalid(format!("{m} activation rows are too many"));
        let rows =
            |width: usize| m.checked_mul(width).filter(|bytes| *bytes < isize::MAX as usize / 4);
        if !layout.format().is_quantised() {
            let bytes = rows(layout.k() * 4).ok_or_else(too_many)?;
            return Ok(Self { scales: bytes, sums: bytes, bytes });
        }
        let codes = rows(layout.padded_k()).ok_or_else(too_many)?;
        let table = rows(layout.groups() * 4).ok_or_else(too_many)?.next_multiple_of(64);
        let scales = codes.next_multiple_of(64);
        Ok(Self { scales, sums: scales + table, bytes: scales + 2 * table })
    }
}

/// Stores the bytes that nybl_pack() writes for a matrix of this layout.
///
/// # Safety
/// `layout` states its size; `bytes` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_pack_size(
    layout: *const nybl_layout,
    bytes: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("bytes", bytes, 0)?;
            set("bytes", bytes, read_layout(layout)?.bytes())
        }
    })
}

/// The weights, if they are in the layout of another project.
///
/// # Safety
/// The arrays of `w` are as long as it says.
unsafe fn source<'a>(w: &nybl_weights) -> Result<Option<Source<'a>>, Failure> {
    // SAFETY: the caller vouches for the arrays.
    unsafe {
        if w.kind == NYBL_WEIGHTS_GGUF {
            let blocks = slice("weights->values", w.values.cast::<u8>(), w.values_count)?;
            return Ok(Some(Source::Gguf(blocks)));
        }
        if !(NYBL_WEIGHTS_GPTQ..=NYBL_WEIGHTS_AWQ).contains(&w.kind) {
            return Ok(None);
        }
        let qweight = slice("weights->values", w.values.cast::<u32>(), w.values_count)?;
        let qzeros = slice("weights->offsets", w.offsets.cast::<u32>(), w.offsets_count)?;
        let scales = slice("weights->scales", w.scales.cast::<f16>(), w.scales_count)?;
        let less_one = w.kind == NYBL_WEIGHTS_GPTQ;
        Ok(Some(match w.kind {
            NYBL_WEIGHTS_AWQ => Source::Awq { qweight, qzeros, scales },
            _ => Source::Gptq { qweight, qzeros, scales, less_one },
        }))
    }
}

/// Packs a matrix into `packed`, which has room for nybl_pack_size() bytes. The result is the same for
/// every CPU: it may be kept in a file and mapped.
///
/// # Safety
/// `layout` and `weights` state their sizes, the arrays of `weights` are as long as it says, and `packed`
/// has `packed_len` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_pack(
    layout: *const nybl_layout,
    weights: *const nybl_weights,
    packed: *mut c_void,
    packed_len: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let layout = read_layout(layout)?;
            if weights.is_null() {
                return Err(Failure::null("weights"));
            }
            let w = read_config(weights)?;
            let packed = buffer("packed", packed, packed_len, layout.bytes())?;
            if let Some(source) = source(&w)? {
                source.check(&layout)?;
                for (index, panel) in packed.chunks_exact_mut(layout.panel_bytes()).enumerate() {
                    source.pack_panel(&layout, index, panel)?;
                }
                return Ok(());
            }
            let (n, k, groups) = (layout.n(), layout.k(), layout.groups());
            if w.values_count != n * k {
                return Err(invalid(format!("{} weights for {n} x {k}", w.values_count)));
            }
            let scales = slice("weights->scales", w.scales.cast::<f16>(), w.scales_count)?;
            let offsets = slice("weights->offsets", w.offsets.cast::<u16>(), w.offsets_count)?;
            let is_codes = w.kind == NYBL_WEIGHTS_CODES;
            if is_codes && scales.len() != n * groups {
                return Err(invalid(format!("{} scales for {n} x {groups}", scales.len())));
            }
            if !offsets.is_empty() && offsets.len() != scales.len() {
                return Err(invalid("as many offsets as scales, or none"));
            }
            let count = w.values_count;
            let values = w.values;
            for (index, panel) in packed.chunks_exact_mut(layout.panel_bytes()).enumerate() {
                let first = index * layout.panel_rows();
                let rows = layout.panel_rows().min(n - first);
                let range = first * k..(first + rows) * k;
                let tables = first * groups..(first + rows) * groups;
                match w.kind {
                    NYBL_WEIGHTS_F32 => {
                        let x = &slice("weights->values", values.cast::<f32>(), count)?[range];
                        if layout.format() == Format::F32 {
                            pack_panel(&layout, rows, Rows::F32(x), panel)?;
                        } else {
                            rtn::pack_panel(&layout, rows, x, panel)?;
                        }
                    }
                    NYBL_WEIGHTS_F16 => {
                        let x = &slice("weights->values", values.cast::<f16>(), count)?[range];
                        pack_panel(&layout, rows, Rows::F16(x), panel)?;
                    }
                    NYBL_WEIGHTS_BF16 => {
                        let x = &slice("weights->values", values.cast::<bf16>(), count)?[range];
                        pack_panel(&layout, rows, Rows::Bf16(x), panel)?;
                    }
                    NYBL_WEIGHTS_CODES => {
                        let codes = &slice("weights->values", values.cast::<u8>(), count)?[range];
                        let offsets =
                            if offsets.is_empty() { &[] } else { &offsets[tables.clone()] };
                        let scales = &scales[tables];
                        pack_panel(&layout, rows, Rows::Codes { codes, scales, offsets }, panel)?;
                    }
                    _ => return Err(invalid("weights->kind is none of NYBL_WEIGHTS_*")),
                }
            }
            Ok(())
        }
    })
}

/// Writes rows `row` to `row + count` of a packed matrix as floats, k for each.
///
/// # Safety
/// `layout` states its size, `packed` has `packed_len` bytes, and `out` has room for `count * k` floats.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_unpack_rows(
    layout: *const nybl_layout,
    packed: *const c_void,
    packed_len: usize,
    row: usize,
    count: usize,
    out: *mut f32,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let layout = read_layout(layout)?;
            let bytes = slice("packed", packed.cast::<u8>(), packed_len)?;
            let packed = Packed::new(layout, bytes)?;
            if row.checked_add(count).is_none_or(|end| end > layout.n()) {
                return Err(invalid(format!("rows {row} + {count} of {}", layout.n())));
            }
            if out.is_null() || !out.is_aligned() {
                return Err(Failure::null("out"));
            }
            for i in 0..count {
                let out = std::slice::from_raw_parts_mut(out.add(i * layout.k()), layout.k());
                unpack_row(&packed, row + i, out);
            }
            Ok(())
        }
    })
}

/// Stores the bytes that nybl_quantize_activations() writes for m rows; 64 bytes are a good alignment, 4 the
/// least.
///
/// # Safety
/// `layout` states its size; `bytes` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_matmul_scratch_size(
    layout: *const nybl_layout,
    m: usize,
    bytes: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("bytes", bytes, 0)?;
            set("bytes", bytes, Scratch::new(&read_layout(layout)?, m)?.bytes)
        }
    })
}

/// Prepares m rows of k floats, `x_stride` floats apart, for products with matrices of this k, group and
/// kind of format: int8 groups for quantised formats, a copy for floats. One call serves all matrices that
/// share an input (query, key and value; gate and up).
///
/// # Safety
/// `layout` states its size, `x` has m rows, and `scratch` has `scratch_len` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_quantize_activations(
    layout: *const nybl_layout,
    x: *const f32,
    x_stride: usize,
    m: usize,
    scratch: *mut c_void,
    scratch_len: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers; the places inside `scratch` are those of
        // `Scratch`, which its length was checked against.
        unsafe {
            let layout = read_layout(layout)?;
            let k = layout.k();
            let place = Scratch::new(&layout, m)?;
            let scratch = buffer("scratch", scratch, scratch_len, place.bytes)?.as_mut_ptr();
            if x.is_null() || !x.is_aligned() || !scratch.cast::<f32>().is_aligned() {
                return Err(invalid("x or scratch is NULL or not aligned to 4 bytes"));
            }
            if x_stride < k {
                return Err(invalid(format!("x_stride {x_stride} is less than k, {k}")));
            }
            if !layout.format().is_quantised() {
                for row in 0..m {
                    let from = x.add(row * x_stride);
                    std::ptr::copy_nonoverlapping(from, scratch.cast::<f32>().add(row * k), k);
                }
                return Ok(());
            }
            let Run::Quantize(run) = select(Op::Quantize, Isa::detect()).run else {
                unreachable!("a row runs its own operation")
            };
            let args = QuantizeArgs {
                x,
                x_stride,
                m,
                k,
                group: layout.group(),
                q: scratch.cast(),
                scales: scratch.add(place.scales).cast(),
                sums: scratch.add(place.sums).cast(),
            };
            run(&raw const args);
            Ok(())
        }
    })
}

/// Multiplies the outputs n0 to n1 on the calling thread. Several threads may call it for different
/// ranges of one product at the same time. The result does not depend on the ranges, on m or on the CPU.
///
/// # Safety
/// `layout` and `args` state their sizes, and the arrays of `args` are as long as it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_matmul(
    layout: *const nybl_layout,
    args: *const nybl_matmul_args,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers; every length is checked against the layout
        // before a row of the table gets to see it.
        unsafe {
            let layout = read_layout(layout)?;
            if args.is_null() {
                return Err(Failure::null("args"));
            }
            let a = read_config(args)?;
            let (n, m) = (layout.n(), a.m);
            let bytes = slice("args->weights", a.weights.cast::<u8>(), a.weights_len)?;
            let weights = Packed::new(layout, bytes)?;
            let place = Scratch::new(&layout, m)?;
            let x = slice("args->activations", a.activations.cast::<u8>(), a.activations_len)?;
            if x.len() < place.bytes || !x.as_ptr().cast::<f32>().is_aligned() {
                let text = format!("args->activations: {} aligned bytes needed", place.bytes);
                return Err(invalid(text));
            }
            let panel = layout.panel_rows();
            let whole = |edge: usize| edge.is_multiple_of(panel);
            if a.n0 > a.n1 || a.n1 > n || !whole(a.n0) || !(whole(a.n1) || a.n1 == n) {
                let text =
                    format!("outputs {} to {} of {n}: multiples of {panel}, or n", a.n0, a.n1);
                return Err(invalid(text));
            }
            let to_halves = !a.y_f16.is_null();
            let y = if to_halves { a.y_f16.cast::<c_void>() } else { a.y.cast() };
            let is_aligned = if to_halves { a.y_f16.is_aligned() } else { a.y.is_aligned() };
            if y.is_null() || !is_aligned || a.y_stride < n {
                return Err(invalid("args->y is NULL or misaligned, or y_stride is less than n"));
            }
            if !a.bias.is_aligned() {
                return Err(invalid("args->bias is not aligned to 4 bytes"));
            }
            let clamped = a.clamp_low != 0.0 || a.clamp_high != 0.0;
            if a.clamp_low > a.clamp_high || a.clamp_low.is_nan() || a.clamp_high.is_nan() {
                let text = format!("clamp from {} to {}: no such range", a.clamp_low, a.clamp_high);
                return Err(invalid(text));
            }
            if m == 0 || a.n0 == a.n1 {
                return Ok(());
            }
            let quantised = layout.format().is_quantised();
            let first = a.n0 / panel;
            let matmul = MatmulArgs {
                w: weights.bytes().as_ptr().add(first * layout.panel_bytes()),
                panel_bytes: layout.panel_bytes(),
                panels: (a.n1 - a.n0).div_ceil(panel),
                groups: layout.groups(),
                group: layout.group(),
                offset: layout.format().offset() as u32,
                x: x.as_ptr(),
                x_stride: if quantised { layout.padded_k() } else { layout.k() },
                x_scales: x.as_ptr().add(place.scales).cast(),
                x_sums: x.as_ptr().add(place.sums).cast(),
                m,
                y: if to_halves { std::ptr::null_mut() } else { a.y.add(a.n0) },
                y_stride: a.y_stride,
                n: a.n1 - a.n0,
            };
            let epilogue = EpilogueArgs {
                y: matmul.y,
                y_stride: a.y_stride,
                m,
                n: matmul.n,
                bias: if a.bias.is_null() { a.bias } else { a.bias.add(a.n0) },
                low: if clamped { a.clamp_low } else { f32::NEG_INFINITY },
                high: if clamped { a.clamp_high } else { f32::INFINITY },
                halves: if to_halves { a.y_f16.add(a.n0) } else { std::ptr::null_mut() },
                halves_stride: a.y_stride,
            };
            let have = features(a.features)?;
            let Run::Matmul(run) = select(Op::Matmul(layout.format()), have).run else {
                unreachable!("a row runs its own operation")
            };
            let Run::Epilogue(last) = select(Op::Epilogue, have).run else {
                unreachable!("a row runs its own operation")
            };
            if to_halves {
                by_panels(run, last, &matmul, &epilogue, panel);
                return Ok(());
            }
            run(&raw const matmul);
            if clamped || !a.bias.is_null() {
                last(&raw const epilogue);
            }
            Ok(())
        }
    })
}

/// Multiplies panel by panel into a buffer on the stack, because the halves leave no room for the floats
/// that they are rounded from.
///
/// # Safety
/// The blocks keep their promises, and the CPU has what the rows need.
unsafe fn by_panels(
    run: unsafe extern "C" fn(*const MatmulArgs),
    last: unsafe extern "C" fn(*const EpilogueArgs),
    matmul: &MatmulArgs,
    epilogue: &EpilogueArgs,
    panel_rows: usize,
) {
    const ROWS: usize = 32;
    let mut y = [0.0_f32; ROWS * MAX_PANEL];
    for panel in 0..matmul.panels {
        let first = panel * panel_rows;
        let n = panel_rows.min(matmul.n - first);
        for row in (0..matmul.m).step_by(ROWS) {
            let m = ROWS.min(matmul.m - row);
            let args = MatmulArgs {
                w: matmul.w.wrapping_add(panel * matmul.panel_bytes),
                panels: 1,
                // Elements of x are bytes where it is quantised, else floats.
                x: matmul
                    .x
                    .wrapping_add(row * matmul.x_stride * if matmul.group == 1 { 4 } else { 1 }),
                x_scales: matmul.x_scales.wrapping_add(row * matmul.groups),
                x_sums: matmul.x_sums.wrapping_add(row * matmul.groups),
                m,
                y: y.as_mut_ptr(),
                y_stride: n,
                n,
                ..*matmul
            };
            let at = row * epilogue.halves_stride + first;
            let bias = epilogue.bias;
            let epilogue = EpilogueArgs {
                y: y.as_mut_ptr(),
                y_stride: n,
                m,
                n,
                bias: if bias.is_null() { bias } else { bias.wrapping_add(first) },
                halves: epilogue.halves.wrapping_add(at),
                ..*epilogue
            };
            // SAFETY: part of the caller's blocks; the buffer has room for `ROWS` rows of a panel.
            unsafe {
                run(&raw const args);
                last(&raw const epilogue);
            }
        }
    }
}

fn row(layout: &Layout, asked: u32) -> Result<&'static Row, Failure> {
    Ok(select(Op::Matmul(layout.format()), features(asked)?))
}

/// The features of this CPU that kernels use, a sum of NYBL_CPU_*.
#[unsafe(no_mangle)]
pub extern "C" fn nybl_cpu_features() -> u32 {
    Isa::detect().bits()
}

/// Copies the name of the kernel that nybl_matmul() would use, such as "q4-matmul-dotprod", into `buffer`,
/// zero-terminated and cut to `capacity`.
///
/// # Safety
/// `layout` states its size; `buffer` has `capacity` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kernel_name(
    layout: *const nybl_layout,
    features: u32,
    buffer: *mut c_char,
    capacity: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let row = row(&read_layout(layout)?, features)?;
            if buffer.is_null() {
                return Err(Failure::null("buffer"));
            }
            copy_text(row.name, buffer, capacity);
            Ok(())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_constants_are_the_librarys_own() {
        let formats = [
            NYBL_FORMAT_F32,
            NYBL_FORMAT_F16,
            NYBL_FORMAT_BF16,
            NYBL_FORMAT_Q8,
            NYBL_FORMAT_Q4,
            NYBL_FORMAT_Q4Z,
            NYBL_FORMAT_Q4M,
            NYBL_FORMAT_Q3,
            NYBL_FORMAT_Q3Z,
            NYBL_FORMAT_Q3M,
            NYBL_FORMAT_Q2,
            NYBL_FORMAT_Q2Z,
            NYBL_FORMAT_Q2M,
        ];
        assert_eq!(formats, Format::ALL.map(|format| i32::from(format as u8)));
        let features = [
            NYBL_CPU_PORTABLE,
            NYBL_CPU_AVX2,
            NYBL_CPU_AVXVNNI,
            NYBL_CPU_AVX512,
            NYBL_CPU_NEON,
            NYBL_CPU_DOTPROD,
            NYBL_CPU_I8MM,
            NYBL_CPU_SVE,
        ];
        assert_eq!(&features[..], Isa::FEATURES.iter().map(|(_, x)| x.bits()).collect::<Vec<_>>());
    }
}
