//! The cases of each operation: shapes, fills, and the definition of the result.
//!
//! A definition is written from `docs/formats.md` and `docs/numerics.md` in the plainest way, one
//! output at a time, and must give the scalar row's bits. The operations are also compared with their
//! mathematical definition in f64, because an order of additions can be right and the formula wrong.

use crate::guard::{Arena, Place};
use half::{bf16, f16};
use nybl::kernel::abi::{
    AttendArgs, EpilogueArgs, GeGluArgs, MatmulArgs, QuantizeArgs, RmsNormArgs, SoftCapArgs,
    SoftmaxArgs, SwiGluArgs,
};
use nybl::kernel::layout::WHOLE_ROW;
use nybl::kernel::{Contract, Format, KvFormat, LANES, Layout, Offset, Run, exp, quantize_query};

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

// --- Matmul -----------------------------------------------------------------------------------

/// Contents of a matmul; an empty list stands for random ones.
#[derive(Clone, Copy)]
struct Fill {
    name: &'static str,
    /// Code bytes. 0x80 is the least code of every format and 0x7f the largest, nibbles included.
    codes: &'static [u8],
    /// f16 bits.
    scales: &'static [u16],
    /// Bits of an i16 zero point or an f16 minimum.
    offsets: &'static [u16],
    /// Activation codes.
    x: &'static [i8],
    x_scales: &'static [f32],
    /// For float formats: weights and activations.
    floats: [Floats; 2],
}

const RANDOM: Fill = Fill {
    name: "random",
    codes: &[],
    scales: &[],
    offsets: &[],
    x: &[],
    x_scales: &[],
    floats: [Floats::Tame, Floats::Tame],
};

#[rustfmt::skip] // one fill a line
const FILLS: &[Fill] = &[
    Fill { name: "least codes, x 127", codes: &[0x80], x: &[127], floats: [Floats::Wide, Floats::Wide], ..RANDOM },
    Fill { name: "least codes, x -127", codes: &[0x80], x: &[-127], floats: [Floats::Mixed, Floats::Tame], ..RANDOM },
    Fill { name: "largest codes, x 127", codes: &[0x7f], x: &[127], floats: [Floats::Tame, Floats::Mixed], ..RANDOM },
    Fill { name: "largest codes, x -127", codes: &[0x7f], x: &[-127], floats: [Floats::Mixed, Floats::Mixed], ..RANDOM },
    Fill { name: "codes and x alternate", codes: &[0x80, 0x7f], x: &[-127, 127], floats: [Floats::All(0.0), Floats::Mixed], ..RANDOM },
    Fill { name: "codes and x alternate against each other", codes: &[0x7f, 0x80], x: &[-127, 127], floats: [Floats::All(-0.0), Floats::Tame], ..RANDOM },
    Fill { name: "bytes 0", codes: &[0], floats: [Floats::All(1e-45), Floats::Tame], ..RANDOM },
    Fill { name: "bytes 255", codes: &[0xff], floats: [Floats::Tame, Floats::All(1e-45)], ..RANDOM },
    Fill { name: "x 0", x: &[0], floats: [Floats::Wide, Floats::All(0.0)], ..RANDOM },
    Fill { name: "scales 0", scales: &[0, 0x8000], floats: [Floats::Wide, Floats::All(-0.0)], ..RANDOM },
    Fill { name: "denormal scales", scales: &[1, 0x8001, 0x3ff], offsets: &[1, 0x83ff], floats: [Floats::All(1e-6), Floats::Wide], ..RANDOM },
    Fill { name: "largest scales", scales: &[0x7bff, 0xfbff], offsets: &[0x7bff, 0xfbff], floats: [Floats::All(6e4), Floats::Wide], ..RANDOM },
    Fill { name: "overflow", scales: &[0x7bff], x_scales: &[3e34], x: &[127, 126], floats: [Floats::All(6e4), Floats::All(3e35)], ..RANDOM },
    Fill { name: "scales no number", scales: &[0x3c00, 0x7c00, 0xfc00, 0x7e00, 0x7d01], offsets: &[0x3c00, 0x7c00, 0x7e00], floats: [Floats::All(f32::INFINITY), Floats::Tame], ..RANDOM },
    Fill { name: "x scales no number", x_scales: &[f32::NAN, f32::INFINITY, 1.0, 0.0], floats: [Floats::Tame, Floats::All(f32::INFINITY)], ..RANDOM },
    Fill { name: "x scales denormal and huge", x_scales: &[1e-45, 3e38, 1e-38, -0.0], floats: [Floats::Tame, Floats::All(f32::MAX)], ..RANDOM },
    Fill { name: "offsets -32768, x 127", offsets: &[0x8000], x: &[127], floats: [Floats::All(f32::NAN), Floats::Tame], ..RANDOM },
    Fill { name: "offsets 32767, x -127", offsets: &[0x7fff], x: &[-127], floats: [Floats::Tame, Floats::All(f32::NAN)], ..RANDOM },
    // Some rows decode codes less zero points to bytes, which takes from -112 to 128.
    Fill { name: "offsets that just fit a byte", offsets: &[128, 0xff90], codes: &[0x80, 0x7f], ..RANDOM },
    Fill { name: "offsets that just do not", offsets: &[129, 128, 0xff8f], codes: &[0x80, 0x7f], ..RANDOM },
    Fill { name: "offsets -32768, largest codes", offsets: &[0x8000], codes: &[0x7f], x: &[127, -126], ..RANDOM },
];

pub(crate) struct MatmulCase {
    layout: Layout,
    m: usize,
    fill: &'static str,
    /// One panel more on each side than the row is told of.
    bytes: Vec<u8>,
    codes: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    floats: Vec<f32>,
}

impl MatmulCase {
    pub(crate) fn all(format: Format, seed: u64) -> impl Iterator<Item = Self> {
        const M: [usize; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17];
        const N: [usize; 10] = [1, 15, 16, 17, 31, 32, 33, 63, 65, 100];
        const GROUPS: [usize; 4] = [16, 32, 64, 128];
        // A higher panel needs more outputs for the same edges.
        let more = format.panel_rows() - 32;
        let shapes = M.iter().flat_map(|m| N.iter().map(move |n| (*m, *n)));
        // A step that is prime to the others, so that groups meet every m and n.
        let shapes = shapes.enumerate().map(move |(i, (m, n))| {
            let n = if i % 3 == 0 { n + more } else { n };
            (m, n, GROUPS[i * 7 % 4], i % 5 + 1)
        });
        let shapes = shapes.chain([
            (64, 100, 32, 2),
            (64, 33, 128, 3),
            (35, 97 + more, 16, 9),
            (1, 32, 64, 40),
            (9, 40 + more, 128, 9),
            (12, 65 + more, 64, 17),
            // So long that rows decode or walk them stretch by stretch, with a rest.
            (7, 40, 32, 35),
            (33, 33, 128, 17),
        ]);
        let random = shapes.map(|(m, n, group, groups)| (m, n, group, groups, RANDOM));
        let pathological = FILLS.iter().flat_map(move |fill| {
            [(1, 32, 4), (3, 33, 2), (8, 17, 1), (9, 65, 3)].into_iter().enumerate().flat_map(
                move |(i, (m, n, groups))| {
                    let group = GROUPS[(i + 1) % 4];
                    [(m, n, group, groups, *fill), (m, n + more, 128, groups, *fill)]
                },
            )
        });
        let whole_rows =
            [(1, 32, 40), (2, 33, 7), (5, 17, 16), (8, 65, 9), (9, 31, 33), (17, 32, 3)];
        let whole_rows = whole_rows.into_iter().flat_map(|(m, n, sixteens)| {
            [RANDOM, FILLS[0], FILLS[3]].map(|fill| (m, n, WHOLE_ROW, sixteens, fill))
        });
        let whole_rows = whole_rows.filter(move |_| format == Format::Q8);
        let all = random.chain(pathological).chain(whole_rows).enumerate().filter(
            move |(index, (m, n, group, groups, _))| {
                let rows = n.next_multiple_of(format.panel_rows());
                keep(*index, m * rows * group.max(&16) * groups)
            },
        );
        all.map(move |(index, (m, n, group, groups, fill))| {
            let mut rng = Rng::of_case(seed, index);
            // A last group need not be full; floats have any k.
            let k = groups * group.max(16);
            let k = k - if format.is_quantised() { index % 4 } else { index % 29 % k };
            let layout = Layout::new(format, group, n, k).expect("a valid shape");
            Self::new(layout, m, &fill, &mut rng)
        })
    }

    fn new(layout: Layout, m: usize, fill: &Fill, rng: &mut Rng) -> Self {
        let panels = layout.panels() + 2;
        let mut case = Self {
            layout,
            m,
            fill: fill.name,
            bytes: Vec::with_capacity(panels * layout.panel_bytes()),
            codes: Vec::new(),
            scales: Vec::new(),
            sums: Vec::new(),
            floats: Vec::new(),
        };
        for panel in 0..panels {
            for g in 0..layout.groups() {
                let high = layout.panel_rows();
                let rows = (layout.n() + high).saturating_sub(panel * high);
                case.push_group(fill, rng, g, if panel == 0 { 0 } else { rows });
            }
        }
        if layout.format().is_quantised() {
            let padded = layout.padded_k();
            for i in 0..m * padded {
                let code = rng.pick(fill.x, i, |rng| (rng.below(255) as i32 - 127) as i8);
                case.codes.push(if i % padded < layout.k() { code } else { 0 });
            }
            let groups = case.codes.chunks_exact(layout.group());
            case.sums = groups.map(|x| x.iter().map(|x| i32::from(*x)).sum()).collect();
            case.scales = (0..m * layout.groups())
                .map(|i| rng.pick(fill.x_scales, i, |rng| rng.unit() * 0.1))
                .collect();
        } else {
            case.floats = fill.floats[1].many(rng, m * layout.k());
        }
        case
    }

    /// One group of a panel. Rows past the last output hold what must not show: NaN.
    fn push_group(&mut self, fill: &Fill, rng: &mut Rng, g: usize, rows: usize) {
        let layout = self.layout;
        if !layout.format().is_quantised() {
            for row in 0..layout.panel_rows() {
                let x = if row < rows { fill.floats[0].one(rng) } else { f32::NAN };
                match layout.format() {
                    Format::F16 => self.bytes.extend(f16::from_f32(x).to_le_bytes()),
                    Format::Bf16 => self.bytes.extend(bf16::from_f32(x).to_le_bytes()),
                    _ => self.bytes.extend(x.to_le_bytes()),
                }
            }
            return;
        }
        for i in 0..layout.code_bytes() {
            self.bytes.push(rng.pick(fill.codes, i, |rng| rng.next() as u8));
        }
        let tables = (layout.group_bytes() - layout.code_bytes()) / (2 * layout.panel_rows());
        for table in 0..tables {
            for row in 0..layout.panel_rows() {
                let small = |rng: &mut Rng| f16::from_f32(rng.unit() * 0.5).to_bits();
                let word = match (table, layout.format().offset()) {
                    _ if row >= rows => 0x7e00,
                    (0, _) => rng.pick(fill.scales, g + row, small),
                    (_, Offset::Zero) => rng
                        .pick(fill.offsets, g + row, |rng| (rng.below(40) as u16).wrapping_sub(12)),
                    _ => rng.pick(fill.offsets, g + row, small),
                };
                self.bytes.extend(word.to_le_bytes());
            }
        }
    }

    /// The panel that output `output` lies in.
    fn panel(&self, output: usize) -> &[u8] {
        let size = self.layout.panel_bytes();
        &self.bytes[(output / self.layout.panel_rows() + 1) * size..][..size]
    }

    fn quantised(&self, row: usize, output: usize) -> f32 {
        let layout = self.layout;
        let (group, groups) = (layout.group(), layout.groups());
        let mut acc = 0.0_f32;
        for g in 0..groups {
            let bytes = &self.panel(output)[g * layout.group_bytes()..][..layout.group_bytes()];
            let (codes, tables) = bytes.split_at(layout.code_bytes());
            let place = output % layout.panel_rows();
            let word = |table: usize| {
                let at = (table * layout.panel_rows() + place) * 2;
                u16::from_le_bytes([tables[at], tables[at + 1]])
            };
            let x = &self.codes[row * layout.padded_k() + g * group..][..group];
            let x_scale = self.scales[row * groups + g];
            let sum: i64 = x.iter().map(|x| i64::from(*x)).sum();
            let mut dot = 0_i64;
            for (k, x) in x.iter().enumerate() {
                let code = code_value(layout.format(), codes, place, k);
                let zero = match layout.format().offset() {
                    Offset::None => match layout.format() {
                        Format::Q4 => 8,
                        Format::Q3 => 4,
                        Format::Q2 => 2,
                        _ => 0,
                    },
                    Offset::Zero if word(1) < 0x8000 => i64::from(word(1)),
                    Offset::Zero => i64::from(word(1)) - 0x1_0000,
                    Offset::Minimum => 0,
                };
                dot += (code - zero) * i64::from(*x);
            }
            acc = (half_value(word(0)) * x_scale).mul_add(dot as f32, acc);
            if layout.format().offset() == Offset::Minimum {
                acc = (half_value(word(1)) * x_scale).mul_add(sum as f32, acc);
            }
        }
        acc
    }

    fn float(&self, row: usize, output: usize) -> f32 {
        let k = self.layout.k();
        let (panel, high) = (self.panel(output), self.layout.panel_rows());
        let mut acc = 0.0_f32;
        for i in 0..k {
            let at = i * high + output % high;
            let w = match self.layout.format() {
                Format::F16 => half_value(u16::from_le_bytes([panel[at * 2], panel[at * 2 + 1]])),
                Format::Bf16 => f32::from_le_bytes([0, 0, panel[at * 2], panel[at * 2 + 1]]),
                _ => f32::from_le_bytes(panel[at * 4..at * 4 + 4].try_into().expect("4 bytes")),
            };
            acc = w.mul_add(self.floats[row * k + i], acc);
        }
        acc
    }
}

/// The code of row `row` of a panel at column `k` of a group, from the tables of `docs/formats.md`.
fn code_value(format: Format, codes: &[u8], row: usize, k: usize) -> i64 {
    /// Bits of a code, lowest first: plane of the byte and bit in it.
    const THREE: [[(usize, u32); 3]; 8] = [
        [(0, 2), (0, 3), (0, 4)],
        [(0, 5), (0, 6), (0, 7)],
        [(1, 0), (1, 1), (1, 2)],
        [(1, 3), (1, 4), (1, 5)],
        [(2, 1), (2, 2), (2, 3)],
        [(2, 4), (2, 5), (2, 6)],
        [(0, 0), (0, 1), (2, 0)],
        [(2, 7), (1, 6), (1, 7)],
    ];
    let lane = row % 16 * 4 + k % 4;
    let bit = |byte: u8, bit: u32| i64::from(byte / 2_u8.pow(bit) % 2);
    match format {
        Format::Q8 => {
            let byte = codes[k / 4 * 128 + row / 16 * 64 + lane];
            if byte < 128 { i64::from(byte) } else { i64::from(byte) - 256 }
        }
        Format::Q4 | Format::Q4Z | Format::Q4M => {
            let byte = codes[k / 4 * 64 + lane];
            i64::from(if row < 16 { byte % 16 } else { (byte / 16 + 8) % 16 })
        }
        Format::Q3 | Format::Q3Z | Format::Q3M => {
            let line = k / 8 * 6 + k / 4 % 2;
            let code: i64 = (0..3)
                .map(|i| {
                    let (plane, place) = THREE[row / 16][i];
                    bit(codes[(line + 2 * plane) * 64 + lane], place) << i
                })
                .sum();
            if matches!(row / 16, 1 | 7) { (code + 4) % 8 } else { code }
        }
        _ => {
            let byte = codes[k / 4 * 64 + lane];
            let code = i64::from(byte / 4_u8.pow((row / 16) as u32) % 4);
            if row / 16 == 3 { (code + 2) % 4 } else { code }
        }
    }
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

impl Case for MatmulCase {
    type Args = MatmulArgs;

    fn function(run: Run) -> Option<Function<MatmulArgs>> {
        if let Run::Matmul(function) = run { Some(function) } else { None }
    }

    fn describe(&self) -> String {
        let layout = self.layout;
        format!(
            "m {} n {} k {} group {} fill {:?}",
            self.m,
            layout.n(),
            layout.k(),
            layout.group(),
            self.fill
        )
    }

    fn run(&self, function: Function<MatmulArgs>, arena: &mut Arena, place: Place) -> Outcome {
        // NaN as the canary between rows: no output of a case that could be mistaken for it is
        // written there, since its bits are compared.
        const UNTOUCHED: f32 = f32::from_bits(0xffa5_a5a5);
        let layout = self.layout;
        let (n, size) = (layout.n(), layout.panel_bytes());
        let middle = place == Place::Middle;
        let gap = if middle { 5 } else { 0 };
        arena.clear();
        let y = vec![UNTOUCHED; (self.m - 1) * (n + gap) + n];
        let y = arena.output(&y, place);
        // In the middle the row works on a run of panels with others around it.
        let w = if middle {
            arena.input(&self.bytes, place).wrapping_add(size)
        } else {
            arena.input(&self.bytes[size..self.bytes.len() - size], place)
        };
        let (x, x_stride, x_scales, x_sums) = if layout.format().is_quantised() {
            let (width, gap) = (layout.padded_k(), if middle { layout.group() } else { 0 });
            let x = arena.input(&spread(&self.codes, width, gap, 99), place);
            let scales = arena.input(&self.scales, place);
            (x.cast(), width + gap, scales, arena.input(&self.sums, place))
        } else {
            let gap = if middle { 3 } else { 0 };
            let x = arena.input(&spread(&self.floats, layout.k(), gap, f32::NAN), place);
            (x.cast(), layout.k() + gap, std::ptr::null(), std::ptr::null())
        };
        let args = MatmulArgs {
            w,
            panel_bytes: size,
            panels: layout.panels(),
            groups: layout.groups(),
            group: layout.group(),
            offset: layout.format().offset() as u32,
            x,
            x_stride,
            x_scales,
            x_sums,
            m: self.m,
            y,
            y_stride: n + gap,
            n,
        };
        // SAFETY: every buffer is as long as its argument says; the caller checked the CPU.
        unsafe { function(&raw const args) };
        arena.verify()?;
        let y = arena.read::<f32>(0);
        let gaps = y.chunks(n + gap).filter_map(|row| row.get(n..));
        let touched = gaps.flatten().filter(|y| y.to_bits() != UNTOUCHED.to_bits()).count();
        let y = y.chunks(n + gap).flat_map(|row| &row[..n]).copied().collect();
        let touched = i32::try_from(touched).expect("a small buffer");
        Ok(vec![
            Output::floats("y", n, y),
            Output::integers("floats written between the rows of y", 1, vec![touched]),
        ])
    }

    fn define(&self) -> Vec<Output> {
        let n = self.layout.n();
        let is_quantised = self.layout.format().is_quantised();
        let of = |(row, output)| {
            if is_quantised { self.quantised(row, output) } else { self.float(row, output) }
        };
        let y = (0..self.m).flat_map(|row| (0..n).map(move |output| (row, output))).map(of);
        vec![
            Output::floats("y", n, y.collect()),
            Output::integers("floats written between the rows of y", 1, vec![0]),
        ]
    }
}

// --- Quantize ---------------------------------------------------------------------------------

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

// --- Finish -----------------------------------------------------------------------------------

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

// --- RmsNorm ----------------------------------------------------------------------------------

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

// --- SwiGlu -----------------------------------------------------------------------------------

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

// --- GeGlu ------------------------------------------------------------------------------------

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

// --- SoftCap ----------------------------------------------------------------------------------

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

// --- Softmax ----------------------------------------------------------------------------------

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

// --- Attend -----------------------------------------------------------------------------------

/// Positions of a KV block.
const BLOCK: usize = 64;

/// Three blocks in a row, with the running state carried over.
pub(crate) struct AttendCase {
    format: KvFormat,
    rows: usize,
    d: usize,
    scale: f32,
    softcap: f32,
    fill: Floats,
    q: Vec<f32>,
    /// The same rows as integers.
    codes: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    blocks: Vec<Block>,
}

struct Block {
    format: KvFormat,
    visible: Vec<u32>,
    from: Vec<u32>,
    /// Chunks of 16 positions; as long as a row may read and no longer.
    k: Vec<u8>,
    v: Vec<u8>,
}

impl AttendCase {
    pub(crate) fn all(format: KvFormat, seed: u64) -> impl Iterator<Item = Self> {
        const D: [usize; 5] = [16, 32, 64, 80, 128];
        let shapes = D.into_iter().flat_map(|d| (1..=6).map(move |rows| (d, rows)));
        let shapes = shapes.flat_map(|(d, rows)| {
            [Floats::Tame, Floats::Wide, Floats::Mixed].map(|fill| (d, rows, fill))
        });
        let pathological = Floats::EVERY.map(|fill| (32, 3, fill)).into_iter();
        let all = shapes
            .chain(pathological)
            .enumerate()
            .filter(|(index, (d, rows, _))| keep(*index, d * rows * 200));
        all.map(move |(index, (d, rows, fill))| {
            let rng = &mut Rng::of_case(seed, index);
            let q = fill.many(rng, rows * d);
            let mut codes = vec![0; rows * 4 * d];
            let quantised = q.chunks(d).zip(codes.chunks_mut(4 * d));
            let quantised = quantised.map(|(q, codes)| quantize_query(q, codes));
            let (scales, sums) = quantised.unzip();
            Self {
                format,
                rows,
                d,
                scale: [0.125, 1.0, 3.0][index % 3],
                softcap: [0.0, 0.0, 30.0, 0.5][index % 4],
                fill,
                q,
                codes,
                scales,
                sums,
                blocks: (0..3)
                    .map(|i| Block::new(rng, (fill, format), d, rows, index + i))
                    .collect(),
            }
        })
    }
}

impl Block {
    fn new(
        rng: &mut Rng,
        (fill, format): (Floats, KvFormat),
        d: usize,
        rows: usize,
        index: usize,
    ) -> Self {
        const VISIBLE: [usize; 8] = [64, 17, 0, 15, 16, 1, 33, 63];
        const FROM: [u32; 7] = [0, 0, 3, 16, 31, 0, 64];
        let visible = (0..rows).map(|row| VISIBLE[(index + row) % VISIBLE.len()].min(BLOCK));
        let visible: Vec<usize> = visible.collect();
        let most = visible.iter().copied().max().unwrap_or(0);
        let positions = most.next_multiple_of(LANES);
        // What no query sees must not show.
        let mut float = |seen: bool| match format {
            KvFormat::F16 => {
                f16::from_f32(if seen { fill.one(rng) } else { f32::NAN }).to_le_bytes().to_vec()
            }
            KvFormat::F32 => (if seen { fill.one(rng) } else { f32::NAN }).to_le_bytes().to_vec(),
            // A scale: codes go to 128.
            KvFormat::I8 | KvFormat::I4 => {
                (if seen { fill.one(rng) / 128.0 } else { f32::NAN }).to_le_bytes().to_vec()
            }
        };
        let (mut k, mut v) = (Vec::new(), Vec::new());
        let mut codes = Rng(index as u64);
        for chunk in (0..positions).step_by(LANES) {
            if matches!(format, KvFormat::I8 | KvFormat::I4) {
                let scales = |bytes: &mut Vec<u8>, float: &mut dyn FnMut(bool) -> Vec<u8>| {
                    bytes.extend((0..LANES).flat_map(|i| float(chunk + i < most)));
                };
                // Every code there is, also the one that the cache does not write.
                let extreme = [0x80, 0x7f, 0xff];
                let extreme = &extreme[..if index.is_multiple_of(5) { 1 + index % 3 } else { 0 }];
                let mut code = |i| codes.pick(extreme, i, |rng| rng.next() as u8);
                k.extend((0..LANES * d).map(&mut code));
                scales(&mut k, &mut float);
                let row = if format == KvFormat::I4 { d.div_ceil(32) * 16 } else { d };
                v.extend((0..LANES * row).map(&mut code));
                scales(&mut v, &mut float);
            } else {
                k.extend((0..d * LANES).flat_map(|i| float(chunk + i % LANES < most)));
                v.extend((0..d * LANES).flat_map(|i| float(chunk + i / d < most)));
            }
        }
        let from = (0..rows).map(|row| FROM[(index / 2 + row) % FROM.len()]).collect();
        Self { format, visible: visible.iter().map(|x| *x as u32).collect(), from, k, v }
    }

    fn float(bytes: &[u8], index: usize, format: KvFormat) -> f32 {
        match format {
            KvFormat::F16 => f16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32(),
            _ => {
                f32::from_le_bytes(bytes[4 * index..4 * index + 4].try_into().expect("four bytes"))
            }
        }
    }

    /// A key of floats, or its code.
    fn key(&self, d: usize, position: usize, i: usize) -> f32 {
        let (chunk, lane) = (position / LANES, position % LANES);
        match self.format {
            KvFormat::F32 | KvFormat::F16 => {
                Self::float(&self.k, chunk * LANES * d + i * LANES + lane, self.format)
            }
            KvFormat::I8 | KvFormat::I4 => {
                f32::from(self.k[chunk * LANES * (d + 4) + i / 4 * 64 + lane * 4 + i % 4] as i8)
            }
        }
    }

    /// A value of floats, or its code.
    fn value(&self, d: usize, position: usize, i: usize) -> f32 {
        let (chunk, lane) = (position / LANES, position % LANES);
        match self.format {
            KvFormat::F32 | KvFormat::F16 => Self::float(&self.v, position * d + i, self.format),
            KvFormat::I8 => f32::from(self.v[chunk * LANES * (d + 4) + lane * d + i] as i8),
            KvFormat::I4 => {
                let row = d.div_ceil(32) * 16;
                let byte = self.v[chunk * LANES * (row + 4) + lane * row + i / 32 * 16 + i % 16];
                f32::from(if i % 32 < 16 { byte & 15 } else { byte >> 4 }) - 8.0
            }
        }
    }

    /// The scales of the key and the value at a position; one for floats.
    fn scales(&self, d: usize, position: usize) -> (f32, f32) {
        let (chunk, lane) = (position / LANES, position % LANES);
        let row = if self.format == KvFormat::I4 { d.div_ceil(32) * 16 } else { d };
        let scale = |bytes: &[u8], row: usize| {
            Self::float(bytes, (chunk * LANES * (row + 4) + LANES * row) / 4 + lane, KvFormat::F32)
        };
        match self.format {
            KvFormat::F32 | KvFormat::F16 => (1.0, 1.0),
            KvFormat::I8 | KvFormat::I4 => (scale(&self.k, d), scale(&self.v, row)),
        }
    }
}

impl AttendCase {
    /// A query's code.
    fn code(&self, row: usize, i: usize) -> i32 {
        let codes = &self.codes[row * 4 * self.d..];
        128 * i32::from(codes[i]) + i32::from(codes[self.d + i])
    }
}

/// The running maximum, without the sign of a zero: which of two equal zeros is the largest is left
/// open, because nothing that is computed from it can tell.
fn largest(max: &[f32]) -> Output {
    Output::floats("max", 1, max.iter().map(|max| max + 0.0).collect())
}

impl Case for AttendCase {
    type Args = AttendArgs;

    fn function(run: Run) -> Option<Function<AttendArgs>> {
        if let Run::Attend(function) = run { Some(function) } else { None }
    }

    fn describe(&self) -> String {
        let visible: Vec<_> = self.blocks.iter().map(|block| &block.visible).collect();
        let from: Vec<_> = self.blocks.iter().map(|block| &block.from).collect();
        format!(
            "rows {} d {} scale {} cap {} visible {visible:?} from {from:?} fill {:?}",
            self.rows, self.d, self.scale, self.softcap, self.fill
        )
    }

    fn run(&self, function: Function<AttendArgs>, arena: &mut Arena, place: Place) -> Outcome {
        let (rows, d) = (self.rows, self.d);
        let mut max = vec![f32::NEG_INFINITY; rows];
        let mut sum = vec![0.0_f32; rows * LANES];
        let mut acc = vec![0.0_f32; rows * d];
        let mut outputs = Vec::new();
        for block in &self.blocks {
            arena.clear();
            let args = AttendArgs {
                max: arena.output(&max, place),
                sum: arena.output(&sum, place),
                acc: arena.output(&acc, place),
                q: arena.input(&self.q, place),
                q_codes: arena.input(&self.codes, place),
                q_scales: arena.input(&self.scales, place),
                q_sums: arena.input(&self.sums, place),
                rows,
                d,
                k: arena.input(&block.k, place),
                v: arena.input(&block.v, place),
                // Only ever fetched: an address that is not there must do no harm.
                next_k: std::ptr::without_provenance(4096),
                next_v: std::ptr::null(),
                visible: arena.input(&block.visible, place),
                from: arena.input(&block.from, place),
                scale: self.scale,
                softcap: self.softcap,
            };
            // SAFETY: every buffer is as long as its argument says; the caller checked the CPU.
            unsafe { function(&raw const args) };
            arena.verify()?;
            (max, sum, acc) = (arena.read(0), arena.read(1), arena.read(2));
            outputs.push(largest(&max));
            outputs.push(Output::floats("sum", LANES, sum.clone()));
            outputs.push(Output::floats("acc", d, acc.clone()));
        }
        Ok(outputs)
    }

    fn define(&self) -> Vec<Output> {
        let (rows, d) = (self.rows, self.d);
        let mut max = vec![f32::NEG_INFINITY; rows];
        let mut sum = vec![0.0_f32; rows * LANES];
        let mut acc = vec![0.0_f32; rows * d];
        let mut outputs = Vec::new();
        for block in &self.blocks {
            for row in 0..rows {
                let q = &self.q[row * d..(row + 1) * d];
                let (sum, acc) = (&mut sum[row * LANES..][..LANES], &mut acc[row * d..][..d]);
                let (from, visible) = (block.from[row] as usize, block.visible[row] as usize);
                for first in (0..visible).step_by(LANES) {
                    let positions = first.max(from)..visible.min(first + LANES);
                    if positions.is_empty() {
                        continue;
                    }
                    let score = |position: usize| {
                        let score = match self.format {
                            KvFormat::F32 | KvFormat::F16 => {
                                let mut partial = [0.0_f32; 4];
                                for i in 0..d {
                                    let key = block.key(d, position, i);
                                    partial[i % 4] = q[i].mul_add(key, partial[i % 4]);
                                }
                                (partial[0] + partial[1]) + (partial[2] + partial[3])
                            }
                            KvFormat::I8 | KvFormat::I4 => {
                                let code = |i| i64::from(self.code(row, i));
                                let products =
                                    (0..d).map(|i| code(i) * block.key(d, position, i) as i64);
                                let dot: i64 = products.sum();
                                dot as f32 * (self.scales[row] * block.scales(d, position).0)
                            }
                        };
                        let score = score * self.scale;
                        match self.softcap {
                            0.0 => score,
                            cap => cap * (1.0 - 2.0 / (exp(2.0 * (score / cap)) + 1.0)),
                        }
                    };
                    let scores: Vec<f32> = positions.clone().map(score).collect();
                    let top = scores.iter().copied().fold(max[row], f32::max);
                    if top > max[row] {
                        let shrink = exp(max[row] - top);
                        sum.iter_mut().for_each(|sum| *sum *= shrink);
                        acc.iter_mut().for_each(|acc| *acc *= shrink);
                        max[row] = top;
                    }
                    for (position, score) in positions.zip(scores) {
                        let weight = exp(score - top);
                        sum[position % LANES] += weight;
                        let weight = weight * block.scales(d, position).1;
                        for (i, acc) in acc.iter_mut().enumerate() {
                            *acc = weight.mul_add(block.value(d, position, i), *acc);
                        }
                    }
                }
            }
            outputs.push(largest(&max));
            outputs.push(Output::floats("sum", LANES, sum.clone()));
            outputs.push(Output::floats("acc", d, acc.clone()));
        }
        outputs
    }

    fn approximates(&self, got: &[Output]) -> Result<(), String> {
        if !matches!(self.fill, Floats::Tame) {
            return Ok(());
        }
        let [.., sum, acc] = got else { return Ok(()) };
        let (Values::Floats(sum), Values::Floats(acc)) = (&sum.values, &acc.values) else {
            return Ok(());
        };
        let d = self.d;
        for row in 0..self.rows {
            let seen = self.blocks.iter().flat_map(|block| {
                let seen = block.from[row] as usize..block.visible[row] as usize;
                seen.map(move |position| (block, position))
            });
            let scores: Vec<f64> = seen
                .clone()
                .map(|(block, position)| {
                    let q = |i: usize| match self.format {
                        KvFormat::F32 | KvFormat::F16 => f64::from(self.q[row * d + i]),
                        KvFormat::I8 | KvFormat::I4 => {
                            f64::from(self.code(row, i)) * f64::from(self.scales[row])
                        }
                    };
                    let scale = f64::from(block.scales(d, position).0);
                    let dot: f64 =
                        (0..d).map(|i| q(i) * f64::from(block.key(d, position, i)) * scale).sum();
                    let score = dot * f64::from(self.scale);
                    match f64::from(self.softcap) {
                        0.0 => score,
                        cap => cap * (score / cap).tanh(),
                    }
                })
                .collect();
            if scores.is_empty() {
                continue;
            }
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|score| (score - top).exp()).sum();
            // Values of both signs take each other away; what is rounded are the values.
            let (mut want, mut magnitude) = (vec![0.0; d], vec![0.0_f64; d]);
            for ((block, position), score) in seen.zip(&scores) {
                let position = &position;
                for i in 0..d {
                    let weight = (score - top).exp() / total;
                    let scale = f64::from(block.scales(d, *position).1);
                    let part = weight * f64::from(block.value(d, *position, i)) * scale;
                    want[i] += part;
                    magnitude[i] += part.abs();
                }
            }
            let largest = magnitude.iter().copied().fold(0.0, f64::max);
            let sum: f32 = sum[row * LANES..][..LANES].iter().sum();
            let out = acc[row * d..][..d].iter().map(|acc| acc / sum).collect();
            // The rounding of a large score is multiplied by the exponential function.
            Output::floats("attention", d, out).is_near(&want, |_| 1e-4 * largest)?;
        }
        Ok(())
    }
}
