//! The methods that choose codes, for all matrices that multiply the same inputs at once.
#![forbid(unsafe_code)]

use super::layer::MOST;
use crate::error::{Error, Result};
use crate::kernel::Format;
use crate::quant::dense::{Machine, Operand};
use crate::quant::factor::Solver;
use crate::quant::gptq::Problem;
use crate::quant::grid::{Grid, Levels, Row, Search};
use crate::quant::stats::Stats;

/// How codes are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Round to nearest, with the scales of least squared error; weighted by the inputs where they are
    /// known.
    Rtn,
    /// Activation-aware scales (Lin et al. 2023): columns that meet large inputs get finer steps.
    Awq,
    /// Second-order rounding (Frantar et al. 2022).
    Gptq,
    /// All of it: activation-aware scales judged after second-order rounding, targets that make up for
    /// what earlier layers have lost, and descent on codes and scales.
    Best,
}

impl Method {
    /// All methods.
    pub const ALL: [Self; 4] = [Self::Rtn, Self::Awq, Self::Gptq, Self::Best];

    /// The name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Awq => "awq",
            Self::Gptq => "gptq",
            Self::Best => "best",
        }
    }
}

/// A matrix to quantise.
#[derive(Clone, Copy)]
pub(super) struct Linear<'a> {
    /// Rows of `k` floats.
    pub w: &'a [f32],
    /// Its packed format.
    pub format: Format,
    /// Columns that share a scale.
    pub group: usize,
}

/// By what the columns may be multiplied, because something before them can be divided by it.
#[derive(Clone, Copy)]
pub(super) enum Scaling<'a> {
    /// Any factor: a norm before the matrices takes it up.
    Free,
    /// Powers of two: the scales of rows that are quantised already take them up exactly. Column `j` is
    /// made by row `producers[j]`.
    PowersOfTwo {
        /// The rows that make the columns.
        producers: &'a [u32],
        /// Rows whose scales cannot take them up.
        pinned: &'a [bool],
    },
}

/// What was chosen for a matrix.
pub(super) struct Chosen {
    /// Its rows.
    pub rows: Vec<Row>,
    /// Mean square of the error of its outputs over the calibration, or of its weights without one.
    pub error: f64,
    /// Mean square of the outputs, or of the weights.
    pub energy: f64,
}

/// What was chosen for matrices with the same inputs.
pub(super) struct Outcome {
    /// What the weights were multiplied by, for each producer of inputs; what makes the inputs is to be
    /// divided by it. None for ones.
    pub scales: Option<Vec<f32>>,
    /// The matrices.
    pub matrices: Vec<Chosen>,
}

/// Rounds of descent.
const SWEEPS: usize = 6;

/// Rows of a matrix that a scaling is judged by.
const JUDGES: usize = 192;

/// Chooses codes for `linears`, whose rows are all `k` long.
///
/// # Errors
/// [`Error::InvalidArgument`] for a method that needs `stats` without them and for numbers that are not
/// finite, [`Error::OutOfMemory`].
pub(super) fn choose(
    machine: Machine<'_>,
    method: Method,
    linears: &[Linear<'_>],
    k: usize,
    stats: Option<&Stats>,
    scaling: Scaling<'_>,
) -> Result<Outcome> {
    let ones = vec![1.0; k];
    let Some(stats) = stats else {
        if method != Method::Rtn {
            let what = format!("{} needs a calibration text", method.name());
            return Err(Error::InvalidArgument(what));
        }
        let matrices = linears.iter().map(|linear| {
            let rows = nearest(machine, linear, &ones, &ones, Search::Best)?;
            let off = difference(machine, linear, linear.w, &ones, &rows)?;
            Ok(Chosen { rows, error: squares(&off), energy: squares(linear.w) })
        });
        return Ok(Outcome { scales: None, matrices: matrices.collect::<Result<_>>()? });
    };
    let hessian = Operand::rows(machine, &stats.hessian, k)?;
    let diagonal = stats.diagonal();
    let finish = |linear: &Linear<'_>, rows: Vec<Row>, columns: &[f32]| {
        let off = difference(machine, linear, linear.w, columns, &rows)?;
        let error = quadratic(machine, &hessian, &off)?;
        let energy = quadratic(machine, &hessian, linear.w)?;
        Ok(Chosen { rows, error, energy })
    };
    match method {
        Method::Rtn => {
            let matrices = linears.iter().map(|linear| {
                let rows = nearest(machine, linear, &ones, &diagonal, Search::Best)?;
                finish(linear, rows, &ones)
            });
            Ok(Outcome { scales: None, matrices: matrices.collect::<Result<_>>()? })
        }
        Method::Awq => {
            let judge = |linear: &Linear<'_>, columns: &[f32]| {
                let rows = nearest(machine, linear, columns, &ones, Search::Range)?;
                let off = difference(machine, linear, linear.w, columns, &rows)?;
                quadratic(machine, &hessian, &off)
            };
            let ratios = (0..=20).map(|step| step as f32 / 20.0);
            let found = search(linears, k, &stats.magnitude, scaling, ratios, judge)?;
            let columns = found.as_ref().map_or(&ones, |found| &found.columns);
            let matrices = linears.iter().map(|linear| {
                let rows = nearest(machine, linear, columns, &diagonal, Search::Best)?;
                finish(linear, rows, columns)
            });
            let matrices = matrices.collect::<Result<_>>()?;
            Ok(Outcome { scales: found.map(|found| found.scales), matrices })
        }
        Method::Gptq => {
            let problem = Problem::new(machine.pool, stats.hessian.clone())?;
            let matrices = linears.iter().map(|linear| {
                let rows = second_order(machine, &problem, linear, linear.w, &ones, 0)?.0;
                finish(linear, rows, &ones)
            });
            Ok(Outcome { scales: None, matrices: matrices.collect::<Result<_>>()? })
        }
        Method::Best => {
            let problem = Problem::new(machine.pool, stats.hessian.clone())?;
            let judge = |linear: &Linear<'_>, columns: &[f32]| {
                Ok(second_order(machine, &problem, linear, linear.w, columns, 0)?.1)
            };
            let ratios = [0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9].into_iter();
            let found = search(linears, k, &stats.magnitude, scaling, ratios, judge)?;
            let columns = found.as_ref().map_or(&ones, |found| &found.columns);
            let solver = (!stats.drift.is_empty())
                .then(|| Solver::new(machine.pool, problem.hessian()))
                .transpose()?;
            let matrices = linears.iter().map(|linear| {
                let target = solver
                    .as_ref()
                    .map(|solver| target(machine, solver, stats, linear.w, k))
                    .transpose()?;
                let target = target.as_deref().unwrap_or(linear.w);
                let rows = second_order(machine, &problem, linear, target, columns, SWEEPS)?.0;
                finish(linear, rows, columns)
            });
            let matrices = matrices.collect::<Result<_>>()?;
            Ok(Outcome { scales: found.map(|found| found.scales), matrices })
        }
    }
}

/// The weights whose outputs on today's inputs come nearest to what the matrix made of the inputs before
/// quantisation, and to what the residual stream has lost:
/// `W + (W (X0 - X)^T X + (R0 - R)^T X) (X^T X + damp)^-1`.
fn target(
    machine: Machine<'_>,
    solver: &Solver,
    stats: &Stats,
    w: &[f32],
    k: usize,
) -> Result<Vec<f32>> {
    let drift = Operand::columns(machine, &stats.drift, k)?;
    let mut wanted = drift.product(machine, w)?;
    if !stats.residual.is_empty() {
        wanted.iter_mut().zip(&stats.residual).for_each(|(wanted, lost)| *wanted += lost);
    }
    solver.solve(machine.pool, &mut wanted)?;
    wanted.iter_mut().zip(w).for_each(|(wanted, w)| *wanted += w);
    Ok(wanted)
}

/// Factors of the columns that were found.
struct Found {
    scales: Vec<f32>,
    columns: Vec<f32>,
}

/// Tries `a^ratio` as factors, with the mean magnitudes `a` of the inputs, and keeps those for which the
/// relative errors that `judge` finds have the least sum; none where that is all ones.
fn search(
    linears: &[Linear<'_>],
    k: usize,
    magnitude: &[f32],
    scaling: Scaling<'_>,
    ratios: impl Iterator<Item = f32>,
    judge: impl Fn(&Linear<'_>, &[f32]) -> Result<f64>,
) -> Result<Option<Found>> {
    let samples: Vec<Vec<f32>> = linears.iter().map(|linear| sample(linear.w, k)).collect();
    let mut plain: Option<Vec<f64>> = None;
    let mut best: Option<(f64, Option<Found>)> = None;
    for ratio in ratios {
        let found = factors(k, magnitude, scaling, ratio);
        let judged = linears.iter().zip(&samples);
        let errors = judged.map(|(linear, w)| judge(&Linear { w, ..*linear }, &found.columns));
        let errors = errors.collect::<Result<Vec<f64>>>()?;
        // The first ratio is 0: no factors.
        let plain = plain.get_or_insert_with(|| errors.clone());
        let sum: f64 =
            errors.iter().zip(plain).map(|(error, plain)| error / plain.max(1e-300)).sum();
        if best.as_ref().is_none_or(|(least, _)| sum < *least) {
            best = Some((sum, (ratio > 0.0).then_some(found)));
        }
    }
    Ok(best.and_then(|(_, found)| found))
}

fn factors(k: usize, magnitude: &[f32], scaling: Scaling<'_>, ratio: f32) -> Found {
    let own: Vec<u32>;
    let (producers, pinned) = match scaling {
        Scaling::PowersOfTwo { producers, pinned } => (producers, Some(pinned)),
        _ => {
            own = (0..k as u32).collect();
            (own.as_slice(), None)
        }
    };
    let count = producers.iter().max().map_or(0, |most| *most as usize + 1);
    let (mut sums, mut uses) = (vec![0.0_f32; count], vec![0.0_f32; count]);
    for (producer, magnitude) in producers.iter().zip(magnitude) {
        sums[*producer as usize] += magnitude;
        uses[*producer as usize] += 1.0;
    }
    let power = |(sum, uses): (&f32, &f32)| libm::powf(sum / uses.max(1.0), ratio).max(1e-4);
    let mut scales: Vec<f32> = sums.iter().zip(&uses).map(power).collect();
    let least = scales.iter().fold(f32::INFINITY, |least, x| least.min(*x));
    let most = scales.iter().fold(0.0_f32, |most, x| most.max(*x));
    let middle = (least * most).sqrt();
    for (row, scale) in scales.iter_mut().enumerate() {
        *scale /= middle;
        if let Some(pinned) = pinned {
            let power = libm::exp2f(libm::log2f(*scale).round_ties_even());
            *scale = if pinned[row] { 1.0 } else { power.clamp(1.0 / MOST, MOST) };
        }
    }
    let columns = producers.iter().map(|producer| 1.0 / scales[*producer as usize]).collect();
    Found { scales, columns }
}

/// Some rows of a matrix, evenly taken.
fn sample(w: &[f32], k: usize) -> Vec<f32> {
    let rows = w.len() / k;
    let step = rows.div_ceil(JUDGES).max(1);
    w.chunks_exact(k).step_by(step).flatten().copied().collect()
}

fn grid<'a>(linear: &Linear<'_>, columns: &'a [f32]) -> Result<Grid<'a>> {
    Ok(Grid { levels: Levels::of(linear.format)?, group: linear.group, columns })
}

/// Rows rounded to nearest, with the scales of least error where column `j` counts `h[j]`.
pub(super) fn rounded(machine: Machine<'_>, linear: &Linear<'_>, h: &[f32]) -> Result<Vec<Row>> {
    nearest(machine, linear, &vec![1.0; h.len()], h, Search::Best)
}

fn nearest(
    machine: Machine<'_>,
    linear: &Linear<'_>,
    columns: &[f32],
    h: &[f32],
    search: Search,
) -> Result<Vec<Row>> {
    let grid = grid(linear, columns)?;
    let mut rows = grid.fit(machine.pool, linear.w, h, search)?;
    grid.round(machine.pool, linear.w, &mut rows);
    Ok(rows)
}

/// Rows, and the sum of their errors with the damped Hessian.
fn second_order(
    machine: Machine<'_>,
    problem: &Problem,
    linear: &Linear<'_>,
    target: &[f32],
    columns: &[f32],
    sweeps: usize,
) -> Result<(Vec<Row>, f64)> {
    let grid = grid(linear, columns)?;
    let mut rows = grid.fit(machine.pool, target, &problem.diagonal(), Search::Best)?;
    let errors = problem.round(machine.pool, &grid, target, &mut rows, sweeps);
    Ok((rows, errors.iter().sum()))
}

/// What the codes stand for, less the weights.
fn difference(
    machine: Machine<'_>,
    linear: &Linear<'_>,
    w: &[f32],
    columns: &[f32],
    rows: &[Row],
) -> Result<Vec<f32>> {
    let (grid, k) = (grid(linear, columns)?, columns.len());
    let mut off = w.to_vec();
    machine.pool.chunks_mut(&mut off, k, &|index, off| {
        for (j, off) in off.iter_mut().enumerate() {
            *off = grid.value(&rows[index], j) - *off;
        }
    });
    Ok(off)
}

fn squares(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum()
}

/// The sum of `x H x^T` over the rows.
fn quadratic(machine: Machine<'_>, hessian: &Operand, x: &[f32]) -> Result<f64> {
    let product = hessian.product(machine, x)?;
    Ok(x.iter().zip(&product).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::kernel::Kernels;
    use crate::quant::stats::Inputs;
    use crate::threads::Pool;

    const K: usize = 256;
    const ROWS: usize = 48;

    /// Numbers of about a normal distribution.
    struct Noise(u64);

    impl Noise {
        fn uniform(&mut self) -> f32 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 40) as f32 / (1 << 24) as f32
        }

        fn normal(&mut self) -> f32 {
            (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
        }
    }

    /// A layer as trained ones are: weights with heavy tails; inputs that share a few directions, and some
    /// columns that are far larger than the rest.
    fn layer(noise: &mut Noise) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let w = (0..ROWS * K).map(|_| {
            let spread = (0..5).map(|_| noise.normal().powi(2)).sum::<f32>() / 5.0;
            0.02 * noise.normal() / spread.sqrt()
        });
        let w: Vec<f32> = w.collect();
        let strength = |rank: usize| ((rank + 1) as f32).powf(-0.5);
        let mixing: Vec<f32> =
            (0..K * K).map(|at| strength(at / K) * noise.normal() / 4.0).collect();
        let columns: Vec<f32> =
            (0..K).map(|j| if j % 85 == 3 { 25.0 } else { (0.5 * noise.normal()).exp() }).collect();
        let mut inputs = || {
            let mut x = Vec::new();
            for _ in 0..1024 {
                let hidden: Vec<f32> = (0..K).map(|_| noise.normal()).collect();
                let mut row = vec![0.0; K];
                for (hidden, mixing) in hidden.iter().zip(mixing.chunks_exact(K)) {
                    row.iter_mut().zip(mixing).for_each(|(x, m)| *x += hidden * m);
                }
                row.iter_mut().zip(&columns).for_each(|(x, c)| *x = (*x + 0.3 * hidden[0]) * c);
                x.extend(row);
            }
            x
        };
        let (calibration, held_out) = (inputs(), inputs());
        (w, calibration, held_out)
    }

    #[test]
    fn the_methods_stand_in_their_order() {
        let (kernels, pool) = (Kernels::new(Isa::detect()).unwrap(), Pool::new(2).unwrap());
        let machine = Machine { kernels: &kernels, pool: &pool };
        let (w, calibration, held_out) = layer(&mut Noise(88_172_645_463_325_252));
        let mut stats = Stats::new(K).unwrap();
        for x in calibration.chunks(128 * K) {
            stats.add(machine, Inputs { x, original: None, residual: None }).unwrap();
        }
        stats.finish();
        for (format, group) in
            [(Format::Q4, 128), (Format::Q4, 32), (Format::Q3, 128), (Format::Q3, 32)]
        {
            let linear = Linear { w: &w, format, group };
            let error = |method: Method| {
                let stats = (method != Method::Rtn).then_some(&stats);
                let outcome = choose(machine, method, &[linear], K, stats, Scaling::Free).unwrap();
                let columns: Vec<f32> = match &outcome.scales {
                    Some(scales) => scales.iter().map(|scale| 1.0 / scale).collect(),
                    None => vec![1.0; K],
                };
                let rows = &outcome.matrices[0].rows;
                let off = difference(machine, &linear, &w, &columns, rows).unwrap();
                let outputs = Operand::rows(machine, &off, K).unwrap();
                squares(&outputs.product(machine, &held_out).unwrap())
            };
            let [rtn, awq, gptq, best] = Method::ALL.map(error);
            println!("{format:?} g{group}: {:.3} {:.3} {:.3}", awq / rtn, gptq / rtn, best / rtn);
            assert!(awq < rtn && gptq < awq && best < gptq, "{rtn} {awq} {gptq} {best}");
        }
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        let (kernels, pool) = (Kernels::new(Isa::NONE).unwrap(), Pool::new(1).unwrap());
        let machine = Machine { kernels: &kernels, pool: &pool };
        let mut w = vec![0.5; 64];
        let run = |w: &[f32], method| {
            let linear = Linear { w, format: Format::Q4, group: 32 };
            choose(machine, method, &[linear], 32, None, Scaling::Free).map(|_| ())
        };
        assert!(run(&w, Method::Rtn).is_ok());
        let error = run(&w, Method::Gptq).unwrap_err().to_string();
        assert!(error.contains("calibration"), "{error}");
        w[5] = f32::NAN;
        let error = run(&w, Method::Rtn).unwrap_err().to_string();
        assert!(error.contains("NaN"), "{error}");
    }
}
