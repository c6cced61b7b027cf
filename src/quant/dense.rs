//! Products of dense f32 matrices for the quantisers, by the kernels that also multiply float weights: the
//! same bits on every instruction set and number of threads.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::kernel::layout::{Format, Layout, PANEL};
use crate::kernel::{Epilogue, Input, Kernels, MatmulJob, Packed};
use crate::memory::{Aligned, zeroed};
use crate::threads::Pool;

/// What multiplies, and on which threads.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    /// The chosen kernels.
    pub kernels: &'a Kernels,
    /// The threads.
    pub pool: &'a Pool,
}

/// A matrix `[n, k]` as the right operand of products.
pub struct Operand {
    layout: Layout,
    bytes: Aligned<u8>,
}

impl Operand {
    /// From `n` rows of `k` floats.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn rows(machine: Machine<'_>, x: &[f32], k: usize) -> Result<Self> {
        Self::new(machine, x.len() / k, k, &|row, column| x[row * k + column])
    }

    /// The transposed of `k` rows of `n` floats.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn columns(machine: Machine<'_>, x: &[f32], n: usize) -> Result<Self> {
        Self::new(machine, n, x.len() / n, &|row, column| x[column * n + row])
    }

    fn new(
        machine: Machine<'_>,
        n: usize,
        k: usize,
        value: &(dyn Fn(usize, usize) -> f32 + Sync),
    ) -> Result<Self> {
        let layout = Layout::new(Format::F32, 0, n, k)?;
        let mut bytes = Aligned::zeroed("an operand", layout.bytes())?;
        machine.pool.chunks_mut(&mut bytes, layout.panel_bytes(), &|index, panel| {
            let first = index * PANEL;
            let floats: &mut [f32] = bytemuck::cast_slice_mut(panel);
            for (column, floats) in floats.chunks_exact_mut(PANEL).enumerate() {
                for (row, out) in floats[..PANEL.min(n - first)].iter_mut().enumerate() {
                    *out = value(first + row, column);
                }
            }
        });
        Ok(Self { layout, bytes })
    }

    /// `y[m, n] = x[m, k] * self^T`.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn product(&self, machine: Machine<'_>, x: &[f32]) -> Result<Vec<f32>> {
        let m = x.len() / self.layout.k();
        let mut y = zeroed("a product", m * self.layout.n())?;
        self.product_into(machine, x, &mut y)?;
        Ok(y)
    }

    /// [`Operand::product`] into `y`.
    ///
    /// # Errors
    /// [`crate::Error::InvalidArgument`] for a buffer that is damaged: never.
    pub fn product_into(&self, machine: Machine<'_>, x: &[f32], y: &mut [f32]) -> Result<()> {
        let w = Packed::new(self.layout, &self.bytes)?;
        let job = MatmulJob { w, x: Input::Float(x), y, epilogue: Epilogue::NONE };
        machine.kernels.matmul(machine.pool, &mut [job]);
        Ok(())
    }
}

/// The columns of `x`, rows of `width` floats, as rows.
///
/// # Errors
/// [`crate::Error::OutOfMemory`].
pub fn transposed(machine: Machine<'_>, x: &[f32], width: usize) -> Result<Vec<f32>> {
    let rows = x.len() / width;
    let mut out = zeroed("a transposed matrix", x.len())?;
    machine.pool.chunks_mut(&mut out, rows, &|column, out| {
        for (out, x) in out.iter_mut().zip(x.chunks_exact(width)) {
            *out = x[column];
        }
    });
    Ok(out)
}
