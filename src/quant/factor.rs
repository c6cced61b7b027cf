//! The triangular factor of a Hessian that second-order rounding works with.
//!
//! GPTQ (Frantar et al. 2022) uses the Cholesky factor of the inverse. QuIP (Chee et al. 2023, theorem 6)
//! shows that its codes are those of rounding with feedback from the factor of the Hessian itself,
//! `H = M D M^T` with `M` unit upper triangular: no inverse is taken, and one factorisation does.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::memory::zeroed;
use crate::threads::Pool;

/// Columns that are eliminated together.
const BLOCK: usize = 64;

/// `M` of `H = M D M^T` for the columns of `H` in the order `order`, row after row; entries on and below
/// the diagonal are not to be used. None when `H` is not positive definite.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub fn feedback(pool: &Pool, h: &[f32], damp: f32, order: &[u32]) -> Result<Option<Vec<f32>>> {
    let n = order.len();
    // With the columns reversed the upper factor becomes the usual lower one.
    let mut l = zeroed::<f64>("the factor of a Hessian", n * n)?;
    pool.chunks_mut(&mut l, n, &|i, row| {
        let from = order[n - 1 - i] as usize;
        for (j, value) in row[..=i].iter_mut().enumerate() {
            *value = f64::from(h[from * n + order[n - 1 - j] as usize]);
        }
        row[i] += f64::from(damp);
    });
    if !cholesky(pool, &mut l, n)? {
        return Ok(None);
    }
    let mut m = zeroed::<f32>("the feedback of a Hessian", n * n)?;
    pool.chunks_mut(&mut m, n, &|j, row| {
        let from = n - 1 - j;
        for (i, value) in row.iter_mut().enumerate().skip(j + 1) {
            let column = n - 1 - i;
            *value = (l[from * n + column] / l[column * n + column]) as f32;
        }
    });
    Ok(Some(m))
}

/// Overwrites the lower triangle of `a` with its Cholesky factor, block by block; says whether there is
/// one.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub fn cholesky(pool: &Pool, a: &mut [f64], n: usize) -> Result<bool> {
    if a.len() != n * n {
        return Err(Error::InvalidArgument(format!("{} elements of {n} x {n}", a.len())));
    }
    let mut panel = zeroed::<f64>("a panel of a factor", BLOCK * n)?;
    for start in (0..n).step_by(BLOCK) {
        let end = n.min(start + BLOCK);
        for i in start..end {
            for j in start..=i {
                let (above, row) = a.split_at(i * n);
                let left = if j == i { &row[start..j] } else { &above[j * n + start..j * n + j] };
                let sum: f64 = left.iter().zip(&row[start..j]).map(|(x, y)| x * y).sum();
                let rest = row[j] - sum;
                a[i * n + j] = if i == j {
                    if rest <= 0.0 || !rest.is_finite() {
                        return Ok(false);
                    }
                    rest.sqrt()
                } else {
                    rest / a[j * n + j]
                };
            }
        }
        let (done, below) = a.split_at_mut(end * n);
        pool.chunks_mut(below, n, &|_, row| {
            for j in start..end {
                let own = &done[j * n + start..j * n + j];
                let sum: f64 = own.iter().zip(&row[start..j]).map(|(x, y)| x * y).sum();
                row[j] = (row[j] - sum) / done[j * n + j];
            }
        });
        // The panel by columns, so that the update below runs along rows.
        let width = n - end;
        for (t, column) in panel.chunks_exact_mut(n).take(end - start).enumerate() {
            for (i, value) in column[..width].iter_mut().enumerate() {
                *value = below[i * n + start + t];
            }
        }
        let panel = &panel;
        pool.chunks_mut(below, n, &|i, row| {
            let (own, rest) = row.split_at_mut(end);
            let rest = &mut rest[..=i];
            let (mut pairs, mut t) = (own[start..end].chunks_exact(4), 0);
            for own in &mut pairs {
                let column = |c: usize| &panel[(t + c) * n..(t + c) * n + i + 1];
                let (p, q, r, s) = (column(0), column(1), column(2), column(3));
                for j in 0..=i {
                    rest[j] -= own[0] * p[j] + own[1] * q[j] + (own[2] * r[j] + own[3] * s[j]);
                }
                t += 4;
            }
            for own in pairs.remainder() {
                for (rest, p) in rest.iter_mut().zip(&panel[t * n..]) {
                    *rest -= own * p;
                }
                t += 1;
            }
        });
    }
    Ok(true)
}

/// Solves systems with one symmetric matrix.
pub struct Solver {
    n: usize,
    l: Vec<f64>,
}

impl Solver {
    /// Factors a positive definite matrix.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when it is none, [`Error::OutOfMemory`].
    pub fn new(pool: &Pool, a: &[f32]) -> Result<Self> {
        let n = a.len().isqrt();
        let mut l = zeroed("the factor of a Hessian", n * n)?;
        l.iter_mut().zip(a).for_each(|(l, a)| *l = f64::from(*a));
        if cholesky(pool, &mut l, n)? {
            return Ok(Self { n, l });
        }
        Err(Error::InvalidArgument("a Hessian that is not positive definite".into()))
    }

    /// Multiplies each row of `b` by the inverse.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn solve(&self, pool: &Pool, b: &mut [f32]) -> Result<()> {
        let (n, l) = (self.n, &self.l);
        pool.chunks_mut(b, n, &|_, b| {
            let mut x: Vec<f64> = b.iter().map(|b| f64::from(*b)).collect();
            for i in 0..n {
                let row = &l[i * n..i * n + i];
                let (left, rest) = row.as_chunks::<4>();
                let (x_left, x_rest) = x[..i].as_chunks::<4>();
                let mut sums = [0.0; 4];
                for (l, x) in left.iter().zip(x_left) {
                    for lane in 0..4 {
                        sums[lane] += l[lane] * x[lane];
                    }
                }
                let tail: f64 = rest.iter().zip(x_rest).map(|(l, x)| l * x).sum();
                let sum = (sums[0] + sums[1]) + (sums[2] + sums[3]) + tail;
                x[i] = (x[i] - sum) / l[i * n + i];
            }
            for i in (0..n).rev() {
                let value = x[i] / l[i * n + i];
                x[i] = value;
                x[..i].iter_mut().zip(&l[i * n..]).for_each(|(x, l)| *x -= value * l);
            }
            b.iter_mut().zip(&x).for_each(|(b, x)| *b = *x as f32);
        });
        Ok(())
    }
}
