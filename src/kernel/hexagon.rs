//! Matmuls on Qualcomm's Hexagon DSP: the host's side.
//!
//! The two processors share a buffer and no pointers. A [`Job`] says where in it the weights, activations and
//! outputs of one matmul lie and writes them there; the block that tells the DSP is [`HexagonMatmul`], whose
//! fields have the same width on both sides. `kernels/hvx_entry.c` takes it from there, with the rows of
//! `kernels/hvx_matmul.c`, which give the bits of the scalar rows.
//!
//! How a call gets to the DSP is a [`Transport`]: `kernels/hexagon.idl` describes FastRPC, which needs
//! Qualcomm's SDK, and the tests have one that talks to `qemu-hexagon`.
#![forbid(unsafe_code)]

use super::call::{Activations, Packed};
use super::layout::Layout;
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};

/// The version of the block.
pub const HEXAGON_VERSION: u32 = 1;

/// Done.
pub const HEXAGON_OK: i32 = 0;
/// The buffer is missing, or does not start at a multiple of 64.
pub const HEXAGON_BUFFER: i32 = 1;
/// The block is of another version.
pub const HEXAGON_OTHER_VERSION: i32 = 2;
/// No such format.
pub const HEXAGON_FORMAT: i32 = 3;
/// Sizes that do not belong together.
pub const HEXAGON_SHAPE: i32 = 4;
/// Something does not lie in the buffer, or not at a multiple of 64.
pub const HEXAGON_RANGE: i32 = 5;

/// One matmul in a shared buffer: what `MatmulArgs` says, in numbers of fixed width, with offsets in bytes
/// from the start of the buffer where that has pointers. Offsets are multiples of 64.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct HexagonMatmul {
    /// `HEXAGON_VERSION`.
    pub version: u32,
    /// Bits of a code: 8, 4, 3 or 2.
    pub bits: u32,
    /// What follows the scales of a group: 0 nothing, 1 zero points (i16), 2 minima (f16).
    pub offset: u32,
    /// Values of `k` in a group, a multiple of 16.
    pub group: u32,
    /// Groups along `k`.
    pub groups: u32,
    /// Panels to multiply.
    pub panels: u32,
    /// Activation rows.
    pub m: u32,
    /// Outputs to write in each row: at most what the panels have, and into the last of them.
    pub n: u32,
    /// Bytes from one activation row to the next, a multiple of 16.
    pub x_stride: u32,
    /// Floats from one output row to the next.
    pub y_stride: u32,
    /// The panels, packed.
    pub w: u64,
    /// Activations: int8.
    pub x: u64,
    /// One f32 for each activation row and group.
    pub x_scales: u64,
    /// One i32 for each activation row and group.
    pub x_sums: u64,
    /// The outputs: f32.
    pub y: u64,
}

/// Carries a call to the DSP and back.
pub trait Transport {
    /// Runs the block that lies `block` bytes into `buffer`, and gives one of the `HEXAGON_` codes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the DSP could not be reached.
    fn run(&mut self, buffer: &mut [u8], block: u64) -> Result<i32>;
}

/// One matmul, with a place for each of its parts in a buffer that starts with its block.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    layout: Layout,
    block: HexagonMatmul,
    bytes: usize,
}

/// Largest buffer: FastRPC counts its bytes in an `int`.
const MOST_BYTES: u64 = i32::MAX as u64 - 63;

impl Job {
    /// A matmul of weights of this layout with `m` rows of activations.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for float weights and for what does not fit a buffer of 2 GiB.
    pub fn new(layout: Layout, m: usize) -> Result<Self> {
        if !layout.format().is_quantised() {
            let name = layout.format().name();
            return Err(Error::Unsupported(format!("{name} on Hexagon: it multiplies integers")));
        }
        let mut end = 0_u64;
        let mut place = |bytes: Option<u64>| {
            let start = end.next_multiple_of(128);
            end = start.saturating_add(bytes.unwrap_or(u64::MAX)).min(u64::MAX / 2);
            start
        };
        let product = |factors: &[usize]| {
            factors.iter().try_fold(1_u64, |product, factor| product.checked_mul(*factor as u64))
        };
        place(product(&[size_of::<HexagonMatmul>()]));
        let w = place(product(&[layout.panels(), layout.panel_bytes()]));
        let x = place(product(&[m, layout.padded_k()]));
        let x_scales = place(product(&[m, layout.groups(), 4]));
        let x_sums = place(product(&[m, layout.groups(), 4]));
        let y = place(product(&[m, layout.n(), 4]));
        if m == 0 || end > MOST_BYTES {
            return Err(Error::Unsupported(format!(
                "{m} rows of activations times {} x {} on Hexagon: a buffer has up to 2 GiB",
                layout.n(),
                layout.k()
            )));
        }
        // None of these is above the bytes they need, which fit 31 bits.
        let word = |value: usize| value as u32;
        let block = HexagonMatmul {
            version: HEXAGON_VERSION,
            bits: word(layout.format().bits()),
            offset: layout.format().offset() as u32,
            group: word(layout.group()),
            groups: word(layout.groups()),
            panels: word(layout.panels()),
            m: word(m),
            n: word(layout.n()),
            x_stride: word(layout.padded_k()),
            y_stride: word(layout.n()),
            w,
            x,
            x_scales,
            x_sums,
            y,
        };
        // Whole lines, so that a buffer may end where its allocation does.
        Ok(Self { layout, block, bytes: end.next_multiple_of(64) as usize })
    }

    /// What the DSP is told.
    #[must_use]
    pub fn block(&self) -> &HexagonMatmul {
        &self.block
    }

    /// Bytes of the buffer.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes the block and the weights, which then serve any number of calls.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for weights of another layout or a buffer of another length.
    pub fn write_weights(&self, weights: &Packed<'_>, buffer: &mut [u8]) -> Result<()> {
        self.check(buffer)?;
        if weights.layout() != self.layout {
            return Err(Error::InvalidArgument("weights of another layout than the job's".into()));
        }
        put(buffer, 0, bytemuck::bytes_of(&self.block));
        put(buffer, self.block.w, weights.bytes());
        Ok(())
    }

    /// Writes the activations of one call.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for activations of another shape or a buffer of another length.
    pub fn write_activations(&self, x: &Activations, buffer: &mut [u8]) -> Result<()> {
        self.check(buffer)?;
        let (m, groups) = (self.block.m as usize, self.layout.groups());
        if x.codes().len() != m * self.layout.padded_k() || x.scales().len() != m * groups {
            return Err(Error::InvalidArgument(
                "activations of another shape than the job's".into(),
            ));
        }
        put(buffer, self.block.x, bytemuck::cast_slice(x.codes()));
        put(buffer, self.block.x_scales, bytemuck::cast_slice(x.scales()));
        put(buffer, self.block.x_sums, bytemuck::cast_slice(x.sums()));
        Ok(())
    }

    /// Runs the matmul in a buffer that has weights and activations, and copies its outputs, `m` rows of `n`. A bias
    /// and bounds are the host's to add.
    ///
    /// # Errors
    /// What the transport says, [`Error::Internal`] with the code of a DSP that refused, and
    /// [`Error::InvalidArgument`] for a buffer or outputs of another length.
    pub fn run(
        &self,
        transport: &mut dyn Transport,
        buffer: &mut [u8],
        y: &mut [f32],
    ) -> Result<()> {
        self.check(buffer)?;
        if y.len() != self.block.m as usize * self.layout.n() {
            return Err(Error::InvalidArgument("outputs of another shape than the job's".into()));
        }
        match transport.run(buffer, 0)? {
            HEXAGON_OK => {
                let from = &buffer[self.block.y as usize..];
                let y: &mut [u8] = bytemuck::cast_slice_mut(y);
                y.copy_from_slice(&from[..y.len()]);
                Ok(())
            }
            code => Err(Error::Internal(format!("the DSP refused a matmul with code {code}"))),
        }
    }

    fn check(&self, buffer: &[u8]) -> Result<()> {
        if buffer.len() == self.bytes {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!(
            "a buffer of {} bytes where the job has {}",
            buffer.len(),
            self.bytes
        )))
    }
}

/// Copies `bytes` to their place; [`Job::new`] laid the buffer out for them.
fn put(buffer: &mut [u8], at: u64, bytes: &[u8]) {
    buffer[at as usize..][..bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Format;
    use crate::memory::Aligned;

    #[test]
    fn parts_lie_apart_and_inside() {
        let layout = Layout::new(Format::Q3M, 64, 130, 200).unwrap();
        let job = Job::new(layout, 3).unwrap();
        let block = job.block();
        let parts = [
            (0, size_of::<HexagonMatmul>()),
            (block.w, layout.bytes()),
            (block.x, 3 * 256),
            (block.x_scales, 3 * 4 * 4),
            (block.x_sums, 3 * 4 * 4),
            (block.y, 3 * 130 * 4),
        ];
        for pair in parts.windows(2) {
            assert!(pair[0].0 + pair[0].1 as u64 <= pair[1].0 && pair[1].0.is_multiple_of(64));
        }
        assert_eq!(job.bytes() as u64, (block.y + 3 * 130 * 4).next_multiple_of(64));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let huge = Layout::new(Format::Q8, 32, 1 << 20, 1 << 20).unwrap();
        assert!(Job::new(huge, 1).is_err());
        let layout = Layout::new(Format::Q4, 32, 32, 64).unwrap();
        assert!(Job::new(layout, 0).is_err() && Job::new(layout, usize::MAX).is_err());
        assert!(Job::new(Layout::new(Format::F16, 0, 32, 64).unwrap(), 1).is_err());
        let job = Job::new(layout, 1).unwrap();
        let bytes = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
        let weights = Packed::new(layout, &bytes).unwrap();
        assert!(job.write_weights(&weights, &mut vec![0; job.bytes() - 1]).is_err());
        let other = Layout::new(Format::Q4M, 32, 32, 64).unwrap();
        let job = Job::new(other, 1).unwrap();
        assert!(job.write_weights(&weights, &mut vec![0; job.bytes()]).is_err());
    }
}
