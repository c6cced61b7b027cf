//! Rounding that lets later columns make up for the errors of earlier ones (GPTQ, Frantar et al. 2022),
//! and the descent that goes on from there.
//!
//! Columns are rounded in the order of their mean square ("act-order"), while groups, scales and file keep
//! the order of the matrix ("static groups"): no kernel has to know. [`super::factor`] says why no inverse is
//! needed. Afterwards single codes and scales are moved as long as the error of the outputs falls,
//! `E H E^T` with `E = Q - W`: each step is the exact minimum along one coordinate, so that the error
//! never rises.
#![forbid(unsafe_code)]

use super::factor::feedback;
use super::grid::{Grid, Row};
use crate::error::{Error, Result};
use crate::threads::Pool;
use half::f16;

/// Columns whose errors are passed on together.
const BLOCK: usize = 128;

/// Rows that a thread works on at a time: they share what is read of the Hessian.
const TILE: usize = 16;

/// Share of the mean of the diagonal that is added to it, and how often ten times as much is tried.
const DAMP: f32 = 0.01;
const TRIES: usize = 4;

/// The Hessian of the rows of matrices that multiply the same inputs.
pub struct Problem {
    k: usize,
    hessian: Vec<f32>,
    order: Vec<u32>,
    feedback: Vec<f32>,
    damp: f32,
}

impl Problem {
    /// Factors a Hessian, which is kept with its diagonal damped.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a Hessian that is not positive definite however much it is damped,
    /// [`Error::OutOfMemory`].
    pub fn new(pool: &Pool, mut hessian: Vec<f32>) -> Result<Self> {
        let k = hessian.len().isqrt();
        let diagonal: Vec<f32> = (0..k).map(|j| hessian[j * k + j]).collect();
        let mean = diagonal.iter().sum::<f32>() / k as f32;
        // Equal means stay in the order of the matrix.
        let mut order: Vec<u32> = (0..k as u32).collect();
        order.sort_by(|a, b| diagonal[*b as usize].total_cmp(&diagonal[*a as usize]));
        let mut damp = (mean * DAMP).max(f32::MIN_POSITIVE);
        for _ in 0..TRIES {
            if let Some(feedback) = feedback(pool, &hessian, damp, &order)? {
                (0..k).for_each(|j| hessian[j * k + j] += damp);
                return Ok(Self { k, hessian, order, feedback, damp });
            }
            damp *= 10.0;
        }
        let what = "the inputs of a layer are no finite numbers: its Hessian cannot be factored";
        Err(Error::InvalidArgument(what.into()))
    }

    /// The damped Hessian.
    #[must_use]
    pub fn hessian(&self) -> &[f32] {
        &self.hessian
    }

    /// The columns in the order in which they are rounded.
    #[must_use]
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// What was added to the diagonal.
    #[must_use]
    pub fn damp(&self) -> f32 {
        self.damp
    }

    /// The mean square of each input, damped.
    #[must_use]
    pub fn diagonal(&self) -> Vec<f32> {
        (0..self.k).map(|j| self.hessian[j * self.k + j]).collect()
    }

    /// Chooses the codes of `rows` for the weights `w`, whose scales have been fitted; then `sweeps`
    /// rounds of descent. The errors `E H E^T` of the rows, with the damped Hessian.
    pub fn round(
        &self,
        pool: &Pool,
        grid: &Grid<'_>,
        w: &[f32],
        rows: &mut [Row],
        sweeps: usize,
    ) -> Vec<f64> {
        let k = self.k;
        let rounding = Rounding { problem: self, grid };
        let mut work: Vec<_> = rows.iter_mut().map(|row| (row, 0.0)).collect();
        pool.chunks_mut(&mut work, TILE, &|index, tile| {
            let first = index * TILE * k;
            let w = &w[first..first + tile.len() * k];
            let mut tile_rows: Vec<&mut Row> = Vec::with_capacity(tile.len());
            let mut errors: Vec<&mut f64> = Vec::with_capacity(tile.len());
            for (row, error) in tile {
                tile_rows.push(row);
                errors.push(error);
            }
            let mut off = rounding.with_feedback(w, &mut tile_rows);
            let found = rounding.descend(&mut off, &mut tile_rows, sweeps);
            errors.into_iter().zip(found).for_each(|(slot, error)| *slot = error);
        });
        work.into_iter().map(|(_, error)| error).collect()
    }
}

/// A problem, and the values that its rows may take.
struct Rounding<'a> {
    problem: &'a Problem,
    grid: &'a Grid<'a>,
}

impl Rounding<'_> {
    /// Rounds column after column, each moved by what the errors before it ask for; returns `Q - W`.
    fn with_feedback(&self, w: &[f32], rows: &mut [&mut Row]) -> Vec<f32> {
        let Self { grid, problem } = self;
        let (k, count) = (problem.k, rows.len());
        // In the order of rounding: what is wrong so far, and what it asks of the columns of the block.
        let mut errors = vec![0.0_f32; count * k];
        let mut asked = vec![0.0_f32; count * BLOCK];
        for start in (0..k).step_by(BLOCK) {
            let width = BLOCK.min(k - start);
            asked.fill(0.0);
            for j in 0..start {
                let feedback = &problem.feedback[j * k + start..j * k + start + width];
                for (asked, errors) in asked.chunks_exact_mut(BLOCK).zip(errors.chunks_exact(k)) {
                    add_scaled(&mut asked[..width], errors[j], feedback);
                }
            }
            for (r, row) in rows.iter_mut().enumerate() {
                let asked = &mut asked[r * BLOCK..r * BLOCK + width];
                for i in 0..width {
                    let place = start + i;
                    let j = problem.order[place] as usize;
                    let w = w[r * k + j];
                    row.codes[j] = grid.nearest(row, j, w + asked[i]);
                    let error = w - grid.value(row, j);
                    errors[r * k + place] = error;
                    let from = place * k + start;
                    let feedback = &problem.feedback[from + i + 1..from + width];
                    add_scaled(&mut asked[i + 1..], error, feedback);
                }
            }
        }
        let mut off = vec![0.0; count * k];
        for (off, errors) in off.chunks_exact_mut(k).zip(errors.chunks_exact(k)) {
            for (j, error) in problem.order.iter().zip(errors) {
                off[*j as usize] = -error;
            }
        }
        off
    }

    /// Moves codes and scales while that lowers the error; `off` is `Q - W`. The errors of the rows.
    fn descend(&self, off: &mut [f32], rows: &mut [&mut Row], sweeps: usize) -> Vec<f64> {
        let Self { grid, problem } = self;
        let k = problem.k;
        // Half the gradient.
        let mut slope = vec![0.0_f32; off.len()];
        for j in 0..k {
            let h = &problem.hessian[j * k..(j + 1) * k];
            for (slope, off) in slope.chunks_exact_mut(k).zip(off.chunks_exact(k)) {
                add_scaled(slope, off[j], h);
            }
        }
        for sweep in 0..sweeps {
            if sweep > 0 {
                for (r, row) in rows.iter_mut().enumerate() {
                    let range = r * k..(r + 1) * k;
                    self.rescale(&mut off[range.clone()], &mut slope[range], row);
                }
            }
            for j in &problem.order {
                let j = *j as usize;
                let h = &problem.hessian[j * k..(j + 1) * k];
                let curvature = h[j];
                for (r, row) in rows.iter_mut().enumerate() {
                    let slope = &mut slope[r * k..(r + 1) * k];
                    let value = grid.value(row, j);
                    let code = grid.nearest(row, j, value - slope[j] / curvature);
                    if code == row.codes[j] {
                        continue;
                    }
                    let before = row.codes[j];
                    row.codes[j] = code;
                    let change = grid.value(row, j) - value;
                    // The nearest code of a rounded quotient may be the second best: by a hair.
                    if change * (2.0 * slope[j] + change * curvature) >= 0.0 {
                        row.codes[j] = before;
                        continue;
                    }
                    off[r * k + j] += change;
                    add_scaled(slope, change, h);
                }
            }
        }
        let rows = off.chunks_exact(k).zip(slope.chunks_exact(k));
        rows.map(|(off, slope)| dot(off, slope)).collect()
    }

    /// The best scale of each group, the others held.
    fn rescale(&self, off: &mut [f32], slope: &mut [f32], row: &mut Row) {
        let Self { grid, problem } = self;
        let k = problem.k;
        let mut along = vec![0.0_f32; k];
        for start in (0..k).step_by(grid.group) {
            let group = start / grid.group;
            let columns = start..k.min(start + grid.group);
            let direction: Vec<f32> = columns
                .clone()
                .map(|j| (f32::from(row.codes[j]) - row.zeros[group]) * grid.columns[j])
                .collect();
            // H times the direction.
            along.fill(0.0);
            for (j, share) in columns.clone().zip(&direction) {
                add_scaled(&mut along, *share, &problem.hessian[j * k..(j + 1) * k]);
            }
            let curvature = dot(&direction, &along[columns.clone()]);
            let gradient = dot(&direction, &slope[columns.clone()]);
            if curvature <= 0.0 {
                continue;
            }
            let scale = f16::from_f64(f64::from(row.scales[group]) - gradient / curvature);
            let change = scale.to_f32() - row.scales[group];
            let gain = f64::from(change) * (2.0 * gradient + f64::from(change) * curvature);
            if !scale.is_finite() || scale == f16::ZERO || gain >= 0.0 {
                continue;
            }
            row.scales[group] = scale.to_f32();
            for (off, share) in off[columns].iter_mut().zip(&direction) {
                *off += change * share;
            }
            add_scaled(slope, change, &along);
        }
    }
}

#[inline]
fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
    if factor != 0.0 {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
    }
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::layout::Format;
    use crate::quant::grid::{Levels, Search};

    /// A Hessian of inputs that share directions, and weights.
    fn problem(k: usize, rows: usize) -> (Vec<f32>, Vec<f32>) {
        let mut state = 1_u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let x: Vec<f32> = (0..2 * k * k).map(|_| noise()).collect();
        let mut hessian = vec![0.0; k * k];
        for x in x.chunks_exact(k) {
            let shared = x[0];
            for i in 0..k {
                for j in 0..k {
                    hessian[i * k + j] += (x[i] + shared) * (x[j] + shared);
                }
            }
        }
        (hessian, (0..rows * k).map(|_| noise() * 0.1).collect())
    }

    fn quadratic(problem: &Problem, grid: &Grid<'_>, w: &[f32], row: &Row) -> f64 {
        let k = problem.k;
        let off: Vec<f64> =
            (0..k).map(|j| f64::from(grid.value(row, j)) - f64::from(w[j])).collect();
        let line = |i: usize| -> f64 {
            (0..k).map(|j| f64::from(problem.hessian[i * k + j]) * off[j]).sum()
        };
        (0..k).map(|i| off[i] * line(i)).sum()
    }

    #[test]
    fn every_sweep_lowers_the_error_and_says_it_right() {
        let (k, rows) = (140, 5);
        let pool = Pool::new(2).unwrap();
        let (hessian, w) = problem(k, rows);
        let problem = Problem::new(&pool, hessian).unwrap();
        let columns: Vec<f32> = (0..k).map(|j| 1.0 + (j % 3) as f32).collect();
        for format in [Format::Q4, Format::Q3, Format::Q4Z] {
            let levels = Levels::of(format).unwrap();
            let grid = Grid { levels, group: 32, columns: &columns };
            let fitted = grid.fit(&pool, &w, &problem.diagonal(), Search::Best).unwrap();
            let mut nearest = fitted.clone();
            grid.round(&pool, &w, &mut nearest);
            let exact = |rows: &[Row]| -> Vec<f64> {
                let each = rows.iter().zip(w.chunks_exact(k));
                each.map(|(row, w)| quadratic(&problem, &grid, w, row)).collect()
            };
            let mut before: f64 = exact(&nearest).iter().sum();
            for sweeps in 0..4 {
                let mut chosen = fitted.clone();
                let errors = problem.round(&pool, &grid, &w, &mut chosen, sweeps);
                for (said, is) in errors.iter().zip(exact(&chosen)) {
                    assert!((said / is - 1.0).abs() < 1e-3, "{said} {is}");
                }
                let error: f64 = errors.iter().sum();
                assert!(error <= before, "{format:?} sweep {sweeps}: {error} after {before}");
                before = error;
            }
        }
    }

    #[test]
    fn a_singular_hessian_is_damped_and_nonsense_refused() {
        let pool = Pool::new(1).unwrap();
        assert!(Problem::new(&pool, vec![1.0; 64 * 64]).is_ok());
        assert!(Problem::new(&pool, vec![0.0; 16]).is_ok());
        assert!(Problem::new(&pool, vec![f32::NAN; 16]).is_err());
    }
}
