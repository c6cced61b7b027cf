//! Operations that add up a row of lanes: the root mean square norm and the softmax.

use super::{Case, Floats, Function, Outcome, Output, Rng, keep};
use crate::guard::{Arena, Place};
use nybl::kernel::abi::{RmsNormArgs, SoftmaxArgs};
use nybl::kernel::{LANES, Run, exp};

/// The lanes summed: halves onto each other.
fn tree(lanes: &[f32]) -> f32 {
    if let [one] = lanes {
        return *one;
    }
    let (low, high) = lanes.split_at(lanes.len() / 2);
    tree(&low.iter().zip(high).map(|(a, b)| a + b).collect::<Vec<_>>())
}

pub(crate) struct RmsNormCase {
    m: usize,
    d: usize,
    eps: f32,
    fill: Floats,
    x: Vec<f32>,
    weight: Vec<f32>,
}

impl RmsNormCase {
    pub(crate) fn all(seed: u64) -> impl Iterator<Item = Self> {
        let shapes = (1..=70).chain([96, 127, 128, 129, 255, 1000, 2048]);
        let shapes = shapes.flat_map(|d| [(d, Floats::Tame), (d, Floats::Mixed)]);
        let pathological = Floats::EVERY.into_iter().flat_map(|fill| [(16, fill), (77, fill)]);
        let all =
            shapes.chain(pathological).enumerate().filter(|(index, (d, _))| keep(*index, d * 50));
        all.map(move |(index, (d, fill))| {
            let mut rng = Rng::of_case(seed, index);
            let (m, eps) = (index % 4 + 1, [1e-5, 0.0, 1e-6][index % 3]);
            let (x, weight) = (fill.many(&mut rng, m * d), Floats::Tame.many(&mut rng, d));
            Self { m, d, eps, fill, x, weight }
        })
    }
}

impl Case for RmsNormCase {
    type Args = RmsNormArgs;

    fn function(run: Run) -> Option<Function<RmsNormArgs>> {
        if let Run::RmsNorm(function) = run { Some(function) } else { None }
    }

    fn describe(&self) -> String {
        format!("m {} d {} eps {} fill {:?}", self.m, self.d, self.eps, self.fill)
    }

    fn run(&self, function: Function<RmsNormArgs>, arena: &mut Arena, place: Place) -> Outcome {
        arena.clear();
        let y = arena.output(&vec![-1.0_f32; self.m * self.d], place);
        let (x, weight) = (arena.input(&self.x, place), arena.input(&self.weight, place));
        let args = RmsNormArgs { x, weight, y, m: self.m, d: self.d, eps: self.eps };
        // SAFETY: every buffer is as long as its argument says; the caller checked the CPU.
        unsafe { function(&raw const args) };
        arena.verify()?;
        Ok(vec![Output::floats("y", self.d, arena.read(0))])
    }

    fn define(&self) -> Vec<Output> {
        let mut y = Vec::new();
        for x in self.x.chunks_exact(self.d) {
            let mut lanes = [0.0_f32; LANES];
            let whole = self.d / LANES * LANES;
            for i in (whole..self.d).chain(0..whole) {
                lanes[i % LANES] = x[i].mul_add(x[i], lanes[i % LANES]);
            }
            let inverse = 1.0 / (tree(&lanes) / self.d as f32 + self.eps).sqrt();
            y.extend(x.iter().zip(&self.weight).map(|(x, weight)| x * inverse * weight));
        }
        vec![Output::floats("y", self.d, y)]
    }

    fn approximates(&self, got: &[Output]) -> Result<(), String> {
        if !matches!(self.fill, Floats::Tame) {
            return Ok(());
        }
        let mut want = Vec::new();
        for x in self.x.chunks_exact(self.d) {
            let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            let rms = (squares / self.d as f64 + f64::from(self.eps)).sqrt();
            let pairs = x.iter().zip(&self.weight);
            want.extend(pairs.map(|(x, weight)| f64::from(*x) / rms * f64::from(*weight)));
        }
        got[0].is_within(4e-6, &want)
    }
}

pub(crate) struct SoftmaxCase {
    fill: Floats,
    x: Vec<f32>,
}

impl SoftmaxCase {
    pub(crate) fn all(seed: u64) -> impl Iterator<Item = Self> {
        let fills = [Floats::Tame, Floats::Steep, Floats::Mixed];
        let lengths = (1..=70).chain([128, 1000]);
        let lengths = lengths.flat_map(move |len| fills.map(|fill| (len, fill)));
        let pathological = Floats::EVERY.into_iter().flat_map(|fill| [(1, fill), (77, fill)]);
        let all = lengths
            .chain(pathological)
            .enumerate()
            .filter(|(index, (len, _))| keep(*index, len * 50));
        all.map(move |(index, (len, fill))| {
            let mut x = fill.many(&mut Rng::of_case(seed, index), len);
            // Masked scores, as a caller writes them.
            if index % 5 == 0 {
                x.iter_mut().skip(1).step_by(3).for_each(|x| *x = f32::NEG_INFINITY);
            }
            Self { fill, x }
        })
    }
}

impl Case for SoftmaxCase {
    type Args = SoftmaxArgs;

    fn function(run: Run) -> Option<Function<SoftmaxArgs>> {
        if let Run::Softmax(function) = run { Some(function) } else { None }
    }

    fn describe(&self) -> String {
        format!("len {} fill {:?}", self.x.len(), self.fill)
    }

    fn run(&self, function: Function<SoftmaxArgs>, arena: &mut Arena, place: Place) -> Outcome {
        arena.clear();
        let args = SoftmaxArgs { x: arena.output(&self.x, place), len: self.x.len() };
        // SAFETY: the buffer is as long as its argument says; the caller checked the CPU.
        unsafe { function(&raw const args) };
        arena.verify()?;
        Ok(vec![Output::floats("x", self.x.len(), arena.read(0))])
    }

    fn define(&self) -> Vec<Output> {
        let top = self.x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = self.x.iter().map(|x| exp(x - top)).collect();
        let mut lanes = [0.0_f32; LANES];
        for (i, weight) in weights.iter().enumerate() {
            lanes[i % LANES] += weight;
        }
        let inverse = 1.0 / tree(&lanes);
        let y = weights.iter().map(|weight| weight * inverse).collect();
        vec![Output::floats("x", self.x.len(), y)]
    }

    fn approximates(&self, got: &[Output]) -> Result<(), String> {
        if !matches!(self.fill, Floats::Tame | Floats::Steep) {
            return Ok(());
        }
        let top = self.x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights = self.x.iter().map(|x| f64::from(x - top).exp());
        let sum: f64 = weights.clone().sum();
        got[0].is_within(4e-6, &weights.map(|weight| weight / sum).collect::<Vec<_>>())
    }
}
