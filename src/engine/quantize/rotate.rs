//! Rotations that leave the function of a model as it is and spread outliers over all columns (QuaRot,
//! Ashkboos et al. 2024), as far as they can be fused into weights.
//!
//! The residual stream `x` becomes `x R` with `R = diag(signs) H`, `H` a Hadamard matrix over blocks of the
//! largest power of two that divides the width. RMSNorm without weights commutes with it, so the weights
//! of norms go into the matrices behind them first; no mean is taken off, as that would be for LayerNorm. An
//! output head that was tied to the embedding becomes a matrix of its own, because only one of the two has
//! the norm's weights in it. Heads of values are rotated as well, and the output of attention back.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::model::config::Config;

pub(super) struct Rotation {
    signs: Vec<f64>,
    head_signs: Vec<f64>,
}

impl Rotation {
    /// The rotation of a model; the same one every time.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for models that normalise what joins the residual stream: the weights of
    /// those norms do not commute with a rotation.
    pub(super) fn new(config: &Config) -> Result<Self> {
        if config.post_norms {
            return Err(Error::Unsupported(format!(
                "rotating {} models: they normalise what joins the residual stream",
                config.architecture
            )));
        }
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut sign = || {
            // xorshift64*, top bit.
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            if state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 63 == 0 { 1.0 } else { -1.0 }
        };
        Ok(Self {
            signs: (0..config.d_model).map(|_| sign()).collect(),
            head_signs: (0..config.head_dim).map(|_| sign()).collect(),
        })
    }

    /// `x R` for a row as wide as the residual stream.
    pub(super) fn stream(&self, row: &mut [f32]) {
        rotate(row, &self.signs);
    }

    /// `R^T W` for a matrix `W` whose outputs join the residual stream.
    pub(super) fn stream_columns(&self, w: &mut [f32], rows: usize) {
        columns(w, rows, |column| self.stream(column));
    }

    /// Rotates every head of a row of values.
    pub(super) fn heads(&self, row: &mut [f32]) {
        row.chunks_exact_mut(self.head_signs.len()).for_each(|head| rotate(head, &self.head_signs));
    }

    /// Rotates the outputs of a matrix that makes values.
    pub(super) fn head_columns(&self, w: &mut [f32], rows: usize) {
        columns(w, rows, |column| self.heads(column));
    }
}

fn columns(w: &mut [f32], rows: usize, rotate: impl Fn(&mut [f32])) {
    let k = w.len() / rows;
    let mut column = vec![0.0; rows];
    for j in 0..k {
        column.iter_mut().enumerate().for_each(|(i, x)| *x = w[i * k + j]);
        rotate(&mut column);
        column.iter().enumerate().for_each(|(i, x)| w[i * k + j] = *x);
    }
}

/// `x diag(signs) H`, in f64.
fn rotate(x: &mut [f32], signs: &[f64]) {
    let mut y: Vec<f64> = x.iter().zip(signs).map(|(x, sign)| f64::from(*x) * sign).collect();
    let block = 1 << x.len().trailing_zeros();
    for block in y.chunks_exact_mut(block) {
        let mut half = 1;
        while half < block.len() {
            for pair in block.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
    }
    let norm = 1.0 / (block as f64).sqrt();
    x.iter_mut().zip(&y).for_each(|(x, y)| *x = (y * norm) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_keep_products() {
        let rotation =
            Rotation { signs: vec![1.0, -1.0, -1.0, 1.0, 1.0, -1.0], head_signs: vec![] };
        let (mut a, mut b) = ([1.0, 2.0, -3.0, 0.5, 4.0, -1.0], [0.5, -2.0, 1.0, 3.0, 1.5, 2.0]);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let before = dot(&a, &b);
        let was = a;
        rotation.stream(&mut a);
        rotation.stream(&mut b);
        assert!((dot(&a, &b) - before).abs() < 1e-4 && a != was);
    }
}
