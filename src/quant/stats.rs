//! What the quantisers know about the inputs of a linear layer.
#![forbid(unsafe_code)]

use super::dense::{Machine, Operand, transposed};
use crate::error::Result;
use crate::memory::zeroed;

/// Sums over calibration tokens; [`Stats::finish`] makes means of them.
pub struct Stats {
    k: usize,
    tokens: usize,
    /// `x^T x`: `k * k`.
    pub hessian: Vec<f32>,
    /// Sums of `|x|`, then their means.
    pub magnitude: Vec<f32>,
    /// `(x0 - x)^T x` with the inputs `x0` of the model before quantisation; empty where they are not
    /// followed.
    pub drift: Vec<f32>,
    /// `(r0 - r)^T x`, `[outputs, k]`: what the residual stream that the outputs are added to has lost
    /// already; empty where there is none.
    pub residual: Vec<f32>,
}

/// A chunk of tokens on its way into a linear layer.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Rows of `k` floats.
    pub x: &'a [f32],
    /// The same of the model before quantisation.
    pub original: Option<&'a [f32]>,
    /// The residual stream that the outputs will be added to, before quantisation and now.
    pub residual: Option<[&'a [f32]; 2]>,
}

impl Stats {
    /// No tokens yet.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(k: usize) -> Result<Self> {
        Ok(Self {
            k,
            tokens: 0,
            hessian: zeroed("a Hessian", k * k)?,
            magnitude: zeroed("magnitudes", k)?,
            drift: Vec::new(),
            residual: Vec::new(),
        })
    }

    /// Adds a chunk of tokens.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn add(&mut self, machine: Machine<'_>, inputs: Inputs<'_>) -> Result<()> {
        let Inputs { x, original, residual } = inputs;
        let k = self.k;
        self.tokens += x.len() / k;
        for row in x.chunks_exact(k) {
            self.magnitude.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.abs());
        }
        let columns = Operand::columns(machine, x, k)?;
        accumulate(machine, &columns, &transposed(machine, x, k)?, k, &mut self.hessian)?;
        if let Some(original) = original {
            if self.drift.is_empty() {
                self.drift = zeroed("a drift", k * k)?;
            }
            let lost: Vec<f32> = original.iter().zip(x).map(|(was, is)| was - is).collect();
            accumulate(machine, &columns, &transposed(machine, &lost, k)?, k, &mut self.drift)?;
        }
        if let Some([was, is]) = residual {
            let width = was.len() / (x.len() / k);
            if self.residual.is_empty() {
                self.residual = zeroed("a residual", width * k)?;
            }
            let lost: Vec<f32> = was.iter().zip(is).map(|(was, is)| was - is).collect();
            let lost = transposed(machine, &lost, width)?;
            accumulate(machine, &columns, &lost, k, &mut self.residual)?;
        }
        Ok(())
    }

    /// Makes means of the sums.
    pub fn finish(&mut self) {
        let share = 1.0 / self.tokens.max(1) as f32;
        let all = [&mut self.hessian, &mut self.magnitude, &mut self.drift, &mut self.residual];
        all.into_iter().flatten().for_each(|sum| *sum *= share);
    }

    /// The mean of the squares of each input.
    #[must_use]
    pub fn diagonal(&self) -> Vec<f32> {
        (0..self.k).map(|j| self.hessian[j * self.k + j]).collect()
    }
}

/// Adds `rows * columns^T` to `sum`, a stripe at a time.
fn accumulate(
    machine: Machine<'_>,
    columns: &Operand,
    rows: &[f32],
    k: usize,
    sum: &mut [f32],
) -> Result<()> {
    const STRIPE: usize = 256;
    let tokens = rows.len() / (sum.len() / k);
    let mut part = zeroed("a stripe of a Hessian", STRIPE.min(sum.len() / k) * k)?;
    for (rows, sum) in rows.chunks(STRIPE * tokens).zip(sum.chunks_mut(STRIPE * k)) {
        let part = &mut part[..sum.len()];
        columns.product_into(machine, rows, part)?;
        machine.pool.chunks_mut(sum, k, &|row, sum| {
            for (sum, part) in sum.iter_mut().zip(&part[row * k..]) {
                *sum += part;
            }
        });
    }
    Ok(())
}
