//! The cases of each operation: shapes, fills, and the definition of the result.
//!
//! A definition is written from `docs/formats.md` and `docs/numerics.md` in the plainest way, one
//! output at a time, and must give the scalar row's bits. The operations are also compared with their
//! mathematical definition in f64, because an order of additions can be right and the formula wrong.

mod attend;
mod elementwise;
mod epilogue;
mod matmul;
mod quantize;
mod reduce;

pub(crate) use attend::AttendCase;
pub(crate) use elementwise::{GatedCase, Gelu, Silu, SoftCapCase};
pub(crate) use epilogue::EpilogueCase;
pub(crate) use matmul::MatmulCase;
pub(crate) use quantize::QuantizeCase;
pub(crate) use reduce::{RmsNormCase, SoftmaxCase};

use crate::guard::{Arena, Place};
use nybl::kernel::{Contract, Run};

/// A row's function.
pub(crate) type Function<A> = unsafe extern "C" fn(*const A);

/// What a row wrote, or where it wrote what it must not.
pub(crate) type Outcome = Result<Vec<Output>, String>;

/// One call of a row.
pub(crate) trait Case {
    type Args;

    /// The function, if it is one of this operation.
    fn function(run: Run) -> Option<Function<Self::Args>>;
    /// The parameters, for a failure.
    fn describe(&self) -> String;
    /// Runs a row, which the CPU must have the features for, and verifies its surroundings.
    fn run(&self, function: Function<Self::Args>, arena: &mut Arena, place: Place) -> Outcome;
    /// What it must give.
    fn define(&self) -> Vec<Output>;
    /// Compares with the definition in f64, where the inputs are tame enough for a tolerance.
    fn approximates(&self, _got: &[Output]) -> Result<(), String> {
        Ok(())
    }
}

/// The contents of one output buffer.
pub(crate) struct Output {
    what: &'static str,
    /// Elements of a row, to say where a difference lies.
    width: usize,
    values: Values,
}

enum Values {
    Floats(Vec<f32>),
    Integers(Vec<i32>),
}

impl Output {
    fn floats(what: &'static str, width: usize, values: Vec<f32>) -> Self {
        Self { what, width, values: Values::Floats(values) }
    }

    fn integers(what: &'static str, width: usize, values: Vec<i32>) -> Self {
        Self { what, width, values: Values::Integers(values) }
    }

    /// Whether this is `want`, as near as the contract asks for.
    pub(crate) fn equals(&self, want: &Self, contract: Contract) -> Result<(), String> {
        let at = |i: usize| format!("{}[{}, {}]", self.what, i / self.width, i % self.width);
        match (&self.values, &want.values) {
            (Values::Floats(got), Values::Floats(want)) => {
                assert_eq!(got.len(), want.len(), "{}", self.what);
                let same = |(got, want): (&f32, &f32)| match contract {
                    Contract::Exact => is_same(*got, *want),
                    Contract::Ulp(most, _) => {
                        is_same(*got, *want) || distance(*got, *want) <= u64::from(most)
                    }
                };
                match got.iter().zip(want).position(|pair| !same(pair)) {
                    None => Ok(()),
                    Some(i) => Err(format!(
                        "{} is {:e} ({:#010x}), not {:e} ({:#010x})",
                        at(i),
                        got[i],
                        got[i].to_bits(),
                        want[i],
                        want[i].to_bits()
                    )),
                }
            }
            (Values::Integers(got), Values::Integers(want)) => {
                assert_eq!(got.len(), want.len(), "{}", self.what);
                match got.iter().zip(want).position(|(got, want)| got != want) {
                    None => Ok(()),
                    Some(i) => Err(format!("{} is {}, not {}", at(i), got[i], want[i])),
                }
            }
            _ => Err(format!("{} has another type", self.what)),
        }
    }

    /// Whether this is `want` within `error`, relative to the largest value of `want`.
    fn is_within(&self, error: f64, want: &[f64]) -> Result<(), String> {
        let top = want.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
        self.is_near(want, |_| top * error)
    }

    /// Whether every float is as near to a formula as `room` says for its place.
    fn is_near(&self, want: &[f64], room: impl Fn(usize) -> f64) -> Result<(), String> {
        let Values::Floats(got) = &self.values else { return Ok(()) };
        let far = |i: &usize| (f64::from(got[*i]) - want[*i]).abs() > room(*i);
        match (0..got.len().min(want.len())).find(far) {
            None => Ok(()),
            Some(i) => {
                Err(format!("{}[{i}] is {}; the formula gives {}", self.what, got[i], want[i]))
            }
        }
    }
}

/// Equal bits, or NaN both: which payload and sign a NaN gets differs between instruction sets, even
/// between the operand orders of one instruction, and nothing downstream can tell.
fn is_same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// Floats between two.
fn distance(a: f32, b: f32) -> u64 {
    if a.is_nan() || b.is_nan() {
        return u64::MAX;
    }
    let place = |x: f32| {
        let magnitude = i64::from(x.to_bits() & 0x7fff_ffff);
        if x.is_sign_negative() { -magnitude } else { magnitude }
    };
    place(a).abs_diff(place(b))
}

/// SplitMix64 (Steele, Lea and Flood 2014): the shortest generator that is good enough.
struct Rng(u64);

impl Rng {
    /// A generator for case number `index`: a case stays the same when others come before it.
    fn of_case(seed: u64, index: usize) -> Self {
        let mut rng = Rng(seed ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        rng.next();
        rng
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Between -1 and 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    /// Element `i` of a buffer: the choices in turn, or a random one where there are none.
    fn pick<T: Copy>(&mut self, choices: &[T], i: usize, random: impl FnOnce(&mut Self) -> T) -> T {
        if choices.is_empty() { random(self) } else { choices[i % choices.len()] }
    }
}

/// What floats are made of.
#[derive(Clone, Copy, Debug)]
enum Floats {
    /// Between -2 and 2.
    Tame,
    /// Of sixty binary orders of magnitude.
    Wide,
    /// Between -100 and 100: past both ends of the exponential function.
    Steep,
    /// One in eight is zero, denormal, huge, infinite or NaN.
    Mixed,
    /// Always this one.
    All(f32),
}

impl Floats {
    const EVERY: [Floats; 15] = [
        Self::Tame,
        Self::Wide,
        Self::Steep,
        Self::Mixed,
        Self::All(0.0),
        Self::All(-0.0),
        Self::All(1e-45),
        Self::All(-1.1e-38),
        Self::All(1e-31),
        Self::All(1.1e-30),
        Self::All(f32::MAX),
        Self::All(f32::MIN),
        Self::All(f32::INFINITY),
        Self::All(f32::NEG_INFINITY),
        Self::All(f32::NAN),
    ];

    const SPECIAL: [f32; 16] = [
        0.0,
        -0.0,
        1e-45,
        -1e-45,
        f32::MIN_POSITIVE,
        -1e-31,
        1.0,
        -1.0,
        88.73,
        -87.34,
        3e38,
        -3e38,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ];

    fn one(self, rng: &mut Rng) -> f32 {
        match self {
            Self::Tame => rng.unit() * 2.0,
            Self::Wide => rng.unit() * 2_f32.powi(rng.below(60) as i32 - 30),
            Self::Steep => rng.unit() * 100.0,
            Self::Mixed if rng.below(8) == 0 => Self::SPECIAL[rng.below(Self::SPECIAL.len())],
            Self::Mixed => rng.unit() * 4.0,
            Self::All(x) => x,
        }
    }

    fn many(self, rng: &mut Rng, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.one(rng)).collect()
    }
}

/// Miri takes a second for what the CPU does in a microsecond: it gets one case of many, and only of
/// the small ones. `work` is about the number of loop rounds.
fn keep(index: usize, work: usize) -> bool {
    !cfg!(miri) || (index.is_multiple_of(21) && work < 5_000)
}

/// The value of an IEEE half, from the definition.
fn half_value(bits: u16) -> f32 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => fraction * 2_f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + fraction) * 2_f64.powi(exponent - 25),
    };
    (if bits >> 15 == 0 { magnitude } else { -magnitude }) as f32
}

/// Rows of `width` at a distance of `width + gap`, the gaps filled with `filler`.
fn spread<T: Copy>(values: &[T], width: usize, gap: usize, filler: T) -> Vec<T> {
    let mut out = Vec::new();
    for (i, row) in values.chunks_exact(width).enumerate() {
        if i > 0 {
            out.extend(std::iter::repeat_n(filler, gap));
        }
        out.extend_from_slice(row);
    }
    out
}
