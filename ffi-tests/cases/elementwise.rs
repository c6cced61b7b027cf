//! Operations on one element at a time: gated activations and the soft cap of logits.

use super::{Case, Floats, Function, Outcome, Output, Rng, keep};
use crate::guard::{Arena, Place};
use nybl::kernel::abi::{GeGluArgs, SoftCapArgs, SwiGluArgs};
use nybl::kernel::{Run, exp};
use std::marker::PhantomData;

/// Lengths around every vector's, and the values to fill them with, for each index of a case that is kept.
fn lengths() -> impl Iterator<Item = (usize, (usize, Floats))> {
    let lengths = (1..=70).chain([128, 1000]);
    let lengths = lengths.flat_map(|len| [(len, Floats::Steep), (len, Floats::Mixed)]);
    let pathological = Floats::EVERY.into_iter().flat_map(|fill| [(16, fill), (77, fill)]);
    lengths.chain(pathological).enumerate().filter(|(index, (len, _))| keep(*index, len * 50))
}

/// A gate through its activation, times `up`, in place.
pub(crate) struct GatedCase<A> {
    fill: Floats,
    gate: Vec<f32>,
    up: Vec<f32>,
    activation: PhantomData<A>,
}

/// The activation of a gate.
pub(crate) trait Activation {
    type Args;

    fn function(run: Run) -> Option<Function<Self::Args>>;

    fn args(gate: *mut f32, up: *const f32, len: usize) -> Self::Args;

    /// What it is defined to give, to the bit.
    fn define(gate: f32) -> f32;

    /// What it approximates, and the exponent that is taken on the way where that is large enough to be rounded.
    fn exact(gate: f64) -> (f64, f64);
}

/// `x * sigmoid(x)`.
pub(crate) struct Silu;

/// The approximation of GELU by a hyperbolic tangent.
pub(crate) struct Gelu;

impl Activation for Silu {
    type Args = SwiGluArgs;

    fn function(run: Run) -> Option<Function<SwiGluArgs>> {
        if let Run::SwiGlu(function) = run { Some(function) } else { None }
    }

    fn args(gate: *mut f32, up: *const f32, len: usize) -> SwiGluArgs {
        SwiGluArgs { gate, up, len }
    }

    fn define(gate: f32) -> f32 {
        gate / (1.0 + exp(-gate))
    }

    fn exact(gate: f64) -> (f64, f64) {
        (gate / (1.0 + (-gate).exp()), 0.0)
    }
}

impl Activation for Gelu {
    type Args = GeGluArgs;

    fn function(run: Run) -> Option<Function<GeGluArgs>> {
        if let Run::GeGlu(function) = run { Some(function) } else { None }
    }

    fn args(gate: *mut f32, up: *const f32, len: usize) -> GeGluArgs {
        GeGluArgs { gate, up, len }
    }

    fn define(gate: f32) -> f32 {
        let bent = (gate * gate * gate).mul_add(0.044_715, gate);
        gate / (1.0 + exp(-1.595_769 * bent))
    }

    fn exact(gate: f64) -> (f64, f64) {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044_715 * gate.powi(3));
        // Half of 1 + tanh(u), without the cancellation where that is next to nothing.
        (gate / (1.0 + (-2.0 * u).exp()), 2.0 * u)
    }
}

impl<A> GatedCase<A> {
    pub(crate) fn all(seed: u64) -> impl Iterator<Item = Self> {
        lengths().map(move |(index, (len, fill))| {
            let mut rng = Rng::of_case(seed, index);
            let up = [Floats::Tame, fill][index % 2].many(&mut rng, len);
            Self { fill, gate: fill.many(&mut rng, len), up, activation: PhantomData }
        })
    }
}

impl<A: Activation> Case for GatedCase<A> {
    type Args = A::Args;

    fn function(run: Run) -> Option<Function<A::Args>> {
        A::function(run)
    }

    fn describe(&self) -> String {
        format!("len {} fill {:?}", self.up.len(), self.fill)
    }

    fn run(&self, function: Function<A::Args>, arena: &mut Arena, place: Place) -> Outcome {
        arena.clear();
        let gate = arena.output(&self.gate, place);
        let args = A::args(gate, arena.input(&self.up, place), self.up.len());
        // SAFETY: every buffer is as long as its argument says; the caller checked the CPU.
        unsafe { function(&raw const args) };
        arena.verify()?;
        Ok(vec![Output::floats("gate", self.up.len(), arena.read(0))])
    }

    fn define(&self) -> Vec<Output> {
        let pairs = self.gate.iter().zip(&self.up);
        let y = pairs.map(|(gate, up)| A::define(*gate) * up).collect();
        vec![Output::floats("gate", self.up.len(), y)]
    }

    fn approximates(&self, got: &[Output]) -> Result<(), String> {
        if !matches!(self.fill, Floats::Tame | Floats::Steep) {
            return Ok(());
        }
        let pairs = self.gate.iter().zip(&self.up).map(|(a, b)| (f64::from(*a), f64::from(*b)));
        let exact = pairs.map(|(gate, up)| {
            let (bent, exponent) = A::exact(gate);
            (bent * up, exponent)
        });
        let (want, exponents): (Vec<f64>, Vec<f64>) = exact.unzip();
        let top = want.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
        got[0].is_near(&want, |i| {
            // An exponent is rounded to as many bits as any float, and its power to the range of floats: the
            // smallest are rounded to nothing.
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
        lengths().map(move |(index, (len, fill))| {
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
