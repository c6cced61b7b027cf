//! Activations to int8, group by group.

use super::{Case, Floats, Function, Outcome, Output, Rng, keep, spread};
use crate::guard::{Arena, Place};
use nybl::kernel::Run;
use nybl::kernel::abi::QuantizeArgs;

pub(crate) struct QuantizeCase {
    m: usize,
    k: usize,
    group: usize,
    fill: Floats,
    x: Vec<f32>,
}

impl QuantizeCase {
    pub(crate) fn all(seed: u64) -> impl Iterator<Item = Self> {
        let tails = [16, 32, 64, 128].into_iter().flat_map(|group| {
            (1..=2 * group)
                .map(move |k| (k % 4 + 1, k, group, [Floats::Tame, Floats::Mixed][k % 2]))
        });
        let pathological = Floats::EVERY.into_iter().flat_map(|fill| {
            [(1, 32, 32), (3, 75, 32), (2, 100, 64), (5, 300, 128)]
                .map(|(m, k, group)| (m, k, group, fill))
        });
        let whole_rows =
            [(1, 2048), (3, 1000), (2, 7)].into_iter().flat_map(|(m, k): (usize, usize)| {
                [Floats::Tame, Floats::Mixed, Floats::Wide]
                    .map(|fill| (m, k, k.next_multiple_of(16), fill))
            });
        let all = tails.chain(pathological).chain(whole_rows).chain([(17, 2048, 32, Floats::Wide)]);
        let all = all.enumerate().filter(|(index, (m, k, ..))| keep(*index, m * k * 40));
        all.map(move |(index, (m, k, group, fill))| {
            let x = fill.many(&mut Rng::of_case(seed, index), m * k);
            Self { m, k, group, fill, x }
        })
    }
}

impl Case for QuantizeCase {
    type Args = QuantizeArgs;

    fn function(run: Run) -> Option<Function<QuantizeArgs>> {
        if let Run::Quantize(function) = run { Some(function) } else { None }
    }

    fn describe(&self) -> String {
        format!("m {} k {} group {} fill {:?}", self.m, self.k, self.group, self.fill)
    }

    fn run(&self, function: Function<QuantizeArgs>, arena: &mut Arena, place: Place) -> Outcome {
        let groups = self.k.div_ceil(self.group);
        let gap = if place == Place::Middle { 3 } else { 0 };
        arena.clear();
        let q = arena.output(&vec![0x55_i8; self.m * groups * self.group], place);
        let scales = arena.output(&vec![-1.0_f32; self.m * groups], place);
        let sums = arena.output(&vec![-1_i32; self.m * groups], place);
        let x = arena.input(&spread(&self.x, self.k, gap, f32::NAN), place);
        let (m, k, group) = (self.m, self.k, self.group);
        let args = QuantizeArgs { x, x_stride: k + gap, m, k, group, q, scales, sums };
        // SAFETY: every buffer is as long as its argument says; the caller checked the CPU.
        unsafe { function(&raw const args) };
        arena.verify()?;
        let q = arena.read::<i8>(0).into_iter().map(i32::from).collect();
        Ok(vec![
            Output::integers("q", groups * group, q),
            Output::floats("scales", groups, arena.read(1)),
            Output::integers("sums", groups, arena.read(2)),
        ])
    }

    fn define(&self) -> Vec<Output> {
        let groups = self.k.div_ceil(self.group);
        let (mut q, mut scales, mut sums) = (vec![], vec![], vec![]);
        for row in self.x.chunks_exact(self.k) {
            for x in row.chunks(self.group) {
                let top = x.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
                let broken = x.iter().any(|x| !x.is_finite());
                let zero = broken || top < 1e-30;
                let code = |x: &f32| (*x * (127.0 / top)).round_ties_even() as i32;
                let codes = x.iter().map(|x| if zero { 0 } else { code(x) });
                let codes = codes.chain(std::iter::repeat(0)).take(self.group);
                let start = q.len();
                q.extend(codes);
                sums.push(q[start..].iter().sum());
                scales.push(match (broken, zero) {
                    (true, _) => f32::NAN,
                    (false, true) => 0.0,
                    (false, false) => top / 127.0,
                });
            }
        }
        vec![
            Output::integers("q", groups * self.group, q),
            Output::floats("scales", groups, scales),
            Output::integers("sums", groups, sums),
        ]
    }
}
