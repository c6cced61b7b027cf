//! What follows a matmul: bias, bounds, halves.

use super::{Case, Floats, Function, Outcome, Output, Rng, half_value, keep, spread};
use crate::guard::{Arena, Place};
use half::f16;
use nybl::kernel::Run;
use nybl::kernel::abi::EpilogueArgs;

pub(crate) struct EpilogueCase {
    m: usize,
    n: usize,
    fill: Floats,
    clamp: [f32; 2],
    y: Vec<f32>,
    bias: Option<Vec<f32>>,
    halves: bool,
}

impl EpilogueCase {
    pub(crate) fn all(seed: u64) -> impl Iterator<Item = Self> {
        const CLAMPS: [[f32; 2]; 5] = [
            [f32::NEG_INFINITY, f32::INFINITY],
            [0.0, f32::INFINITY],
            [-0.25, 1.5],
            [-65504.0, 65504.0],
            [-0.0, 0.0],
        ];
        let lengths = (1..=70).chain([128, 1000]);
        let lengths = lengths.flat_map(|n| [(n, Floats::Tame), (n, Floats::Mixed)]);
        let pathological = Floats::EVERY.into_iter().flat_map(|fill| [(16, fill), (77, fill)]);
        let all = lengths.chain(pathological).enumerate();
        all.filter(|(index, (n, _))| keep(*index, n * 50)).map(move |(index, (n, fill))| {
            let mut rng = Rng::of_case(seed, index);
            let m = index % 3 + 1;
            let bias = (index % 4 != 0).then(|| [Floats::Tame, fill][index % 2].many(&mut rng, n));
            let (clamp, halves) = (CLAMPS[index % 5], index % 7 % 2 == 0);
            Self { m, n, fill, clamp, y: fill.many(&mut rng, m * n), bias, halves }
        })
    }
}

impl Case for EpilogueCase {
    type Args = EpilogueArgs;

    fn function(run: Run) -> Option<Function<EpilogueArgs>> {
        if let Run::Epilogue(function) = run { Some(function) } else { None }
    }

    fn describe(&self) -> String {
        let (m, n, bias) = (self.m, self.n, self.bias.is_some());
        format!("m {m} n {n} bias {bias} clamp {:?} fill {:?}", self.clamp, self.fill)
    }

    fn run(&self, function: Function<EpilogueArgs>, arena: &mut Arena, place: Place) -> Outcome {
        let gap = if place == Place::Middle { 3 } else { 0 };
        arena.clear();
        let y = arena.output(&spread(&self.y, self.n, gap, 7.5), place);
        let halves = arena.output(&vec![0x5555_u16; self.m * self.n], place);
        let bias = self.bias.as_ref().map_or(std::ptr::null(), |bias| arena.input(bias, place));
        let args = EpilogueArgs {
            y,
            y_stride: self.n + gap,
            m: self.m,
            n: self.n,
            bias,
            low: self.clamp[0],
            high: self.clamp[1],
            halves: if self.halves { halves } else { std::ptr::null_mut() },
            halves_stride: self.n,
        };
        // SAFETY: every buffer is as long as its argument says; the caller checked the CPU.
        unsafe { function(&raw const args) };
        arena.verify()?;
        let y = arena.read::<f32>(0);
        let gaps = y.chunks(self.n + gap).filter_map(|row| row.get(self.n..));
        let touched = i32::from(gaps.flatten().any(|y| *y != 7.5));
        let y = y.chunks(self.n + gap).flat_map(|row| &row[..self.n]).copied().collect();
        // As floats: which NaN a NaN becomes is left open.
        let halves = arena.read::<u16>(1).into_iter().map(half_value).collect();
        Ok(vec![
            Output::floats("y", self.n, y),
            Output::floats("halves", self.n, halves),
            Output::integers("floats written between the rows of y", 1, vec![touched]),
        ])
    }

    fn define(&self) -> Vec<Output> {
        let one = |(i, y): (usize, &f32)| {
            let y = self.bias.as_ref().map_or(*y, |bias| *y + bias[i % self.n]);
            let y = if y < self.clamp[0] { self.clamp[0] } else { y };
            if y > self.clamp[1] { self.clamp[1] } else { y }
        };
        let y: Vec<f32> = self.y.iter().enumerate().map(one).collect();
        let half = |y: &f32| if self.halves { f16::from_f32(*y).to_bits() } else { 0x5555 };
        let halves = y.iter().map(|y| half_value(half(y))).collect();
        vec![
            Output::floats("y", self.n, y),
            Output::floats("halves", self.n, halves),
            Output::integers("floats written between the rows of y", 1, vec![0]),
        ]
    }
}
