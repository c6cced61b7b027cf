//! Operations on one element at a time: gated activations and the soft cap of logits.

use super::{Case, Floats, Function, Outcome, Output, Rng, keep};
use crate::guard::{Arena, Place};
use nybl::kernel::abi::{GeGluArgs, SoftCapArgs, SwiGluArgs};
use nybl::kernel::{Run, exp};

pub(crate) struct SwiGluCase {
    fill: Floats,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl SwiGluCase {
    pub(crate) fn all(seed: u64) -> impl Iterator<Item = Self> {
        let lengths = (1..=70).chain([128, 1000]);
        let lengths = lengths.flat_map(|len| [(len, Floats::Steep), (len, Floats::Mixed)]);
        let pathological = Floats::EVERY.into_iter().flat_map(|fill| [(16, fill), (77, fill)]);
        let all = lengths
            .chain(pathological)
            .enumerate()
            .filter(|(index, (len, _))| keep(*index, len * 50));
        all.map(move |(index, (len, fill))| {
            let mut rng = Rng::of_case(seed, index);
            let up = [Floats::Tame, fill][index % 2].many(&mut rng, len);
            Self { fill, gate: fill.many(&mut rng, len), up }
        })
    }
}

impl Case for SwiGluCase {
    type Args = SwiGluArgs;

    fn function(run: Run) -> Option<Function<SwiGluArgs>> {
        if let Run::SwiGlu(function) = run { Some(function) } else { None }
    }

    fn describe(&self) -> String {
        format!("len {} fill {:?}", self.up.len(), self.fill)
    }

    fn run(&self, function: Function<SwiGluArgs>, arena: &mut Arena, place: Place) -> Outcome {
        arena.clear();
        let gate = arena.output(&self.gate, place);
        let args = SwiGluArgs { gate, up: arena.input(&self.up, place), len: self.up.len() };
        // SAFETY: every buffer is as long as its argument says; the caller checked the CPU.
        unsafe { function(&raw const args) };
        arena.verify()?;
        Ok(vec![Output::floats("gate", self.up.len(), arena.read(0))])
    }

    fn define(&self) -> Vec<Output> {
        let pairs = self.gate.iter().zip(&self.up);
        let y = pairs.map(|(gate, up)| gate / (1.0 + exp(-gate)) * up).collect();
        vec![Output::floats("gate", self.up.len(), y)]
    }

    fn approximates(&self, got: &[Output]) -> Result<(), String> {
        if !matches!(self.fill, Floats::Tame | Floats::Steep) {
            return Ok(());
        }
        let pairs = self.gate.iter().zip(&self.up).map(|(a, b)| (f64::from(*a), f64::from(*b)));
        let want: Vec<f64> = pairs.map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
        let top = want.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
        // Powers are floats, too: the smallest are rounded to nothing.
        got[0].is_near(&want, |i| {
            let product = f64::from(self.gate[i] * self.up[i]).abs();
            4e-6 * top + product * f64::from(f32::MIN_POSITIVE)
        })
    }
}

pub(crate) struct GeGluCase {
    fill: Floats,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl GeGluCase {
    pub(crate) fn all(seed: u64) -> impl Iterator<Item = Self> {
        let lengths = (1..=70).chain([128, 1000]);
        let lengths = lengths.flat_map(|len| [(len, Floats::Steep), (len, Floats::Mixed)]);
        let pathological = Floats::EVERY.into_iter().flat_map(|fill| [(16, fill), (77, fill)]);
        let all = lengths
            .chain(pathological)
            .enumerate()
            .filter(|(index, (len, _))| keep(*index, len * 50));
        all.map(move |(index, (len, fill))| {
            let mut rng = Rng::of_case(seed, index);
            let up = [Floats::Tame, fill][index % 2].many(&mut rng, len);
            Self { fill, gate: fill.many(&mut rng, len), up }
        })
    }
}

impl Case for GeGluCase {
    type Args = GeGluArgs;

    fn function(run: Run) -> Option<Function<GeGluArgs>> {
        if let Run::GeGlu(function) = run { Some(function) } else { None }
    }

    fn describe(&self) -> String {
        format!("len {} fill {:?}", self.up.len(), self.fill)
    }

    fn run(&self, function: Function<GeGluArgs>, arena: &mut Arena, place: Place) -> Outcome {
        arena.clear();
        let gate = arena.output(&self.gate, place);
        let args = GeGluArgs { gate, up: arena.input(&self.up, place), len: self.up.len() };
        // SAFETY: every buffer is as long as its argument says; the caller checked the CPU.
        unsafe { function(&raw const args) };
        arena.verify()?;
        Ok(vec![Output::floats("gate", self.up.len(), arena.read(0))])
    }

    fn define(&self) -> Vec<Output> {
        let pairs = self.gate.iter().zip(&self.up);
        let y = pairs
            .map(|(gate, up)| {
                let bent = (gate * gate * gate).mul_add(0.044_715, *gate);
                gate / (1.0 + exp(-1.595_769 * bent)) * up
            })
            .collect();
        vec![Output::floats("gate", self.up.len(), y)]
    }

    fn approximates(&self, got: &[Output]) -> Result<(), String> {
        if !matches!(self.fill, Floats::Tame | Floats::Steep) {
            return Ok(());
        }
        let pairs = self.gate.iter().zip(&self.up).map(|(a, b)| (f64::from(*a), f64::from(*b)));
        let (exponents, want): (Vec<f64>, Vec<f64>) = pairs
            .map(|(gate, up)| {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044_715 * gate.powi(3));
                // Half of 1 + tanh(u), without the cancellation where that is next to nothing.
                (2.0 * u, gate / (1.0 + (-2.0 * u).exp()) * up)
            })
            .unzip();
        let top = want.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
        got[0].is_near(&want, |i| {
            // An exponent is rounded to as many bits as any float, and its power to the range of floats.
            let rounded = want[i].abs() * exponents[i].abs() * f64::from(f32::EPSILON);
            let product = f64::from(self.gate[i] * self.up[i]).abs();
            4e-6 * top + rounded + product * f64::from(f32::MIN_POSITIVE)
        })
    }
}

pub(crate) struct SoftCapCase {
    fill: Floats,
    cap: f32,
    x: Vec<f32>,
}

impl SoftCapCase {
    pub(crate) fn all(seed: u64) -> impl Iterator<Item = Self> {
        let lengths = (1..=70).chain([128, 1000]);
        let lengths = lengths.flat_map(|len| [(len, Floats::Steep), (len, Floats::Mixed)]);
        let pathological = Floats::EVERY.into_iter().flat_map(|fill| [(16, fill), (77, fill)]);
        let all = lengths
            .chain(pathological)
            .enumerate()
            .filter(|(index, (len, _))| keep(*index, len * 50));
        all.map(move |(index, (len, fill))| {
            let mut rng = Rng::of_case(seed, index);
            let cap = [30.0, 50.0, 0.5, 1e-3, 1e30][index % 5];
            Self { fill, cap, x: fill.many(&mut rng, len) }
        })
    }
}

impl Case for SoftCapCase {
    type Args = SoftCapArgs;

    fn function(run: Run) -> Option<Function<SoftCapArgs>> {
        if let Run::SoftCap(function) = run { Some(function) } else { None }
    }

    fn describe(&self) -> String {
        format!("len {} cap {} fill {:?}", self.x.len(), self.cap, self.fill)
    }

    fn run(&self, function: Function<SoftCapArgs>, arena: &mut Arena, place: Place) -> Outcome {
        arena.clear();
        let x = arena.output(&self.x, place);
        let args = SoftCapArgs { x, len: self.x.len(), cap: self.cap };
        // SAFETY: the buffer is as long as its argument says; the caller checked the CPU.
        unsafe { function(&raw const args) };
        arena.verify()?;
        Ok(vec![Output::floats("x", self.x.len(), arena.read(0))])
    }

    fn define(&self) -> Vec<Output> {
        let bend = |x: &f32| self.cap * (1.0 - 2.0 / (exp(2.0 * (x / self.cap)) + 1.0));
        vec![Output::floats("x", self.x.len(), self.x.iter().map(bend).collect())]
    }

    fn approximates(&self, got: &[Output]) -> Result<(), String> {
        // A cap far above the values leaves the difference of two numbers near one.
        if !matches!(self.fill, Floats::Tame | Floats::Steep) || self.cap > 100.0 {
            return Ok(());
        }
        let cap = f64::from(self.cap);
        let want: Vec<f64> = self.x.iter().map(|x| cap * (f64::from(*x) / cap).tanh()).collect();
        // The difference is from one, so the error is relative to the cap.
        let scale = cap / want.iter().fold(f64::MIN_POSITIVE, |top: f64, x| top.max(x.abs()));
        got[0].is_within(4e-7 * scale, &want)
    }
}
