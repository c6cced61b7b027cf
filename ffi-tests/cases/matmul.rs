//! Weights of every format with rows of activations.

use super::{Case, Floats, Function, Outcome, Output, Rng, half_value, keep, spread};
use crate::guard::{Arena, Place};
use half::{bf16, f16};
use nybl::kernel::abi::MatmulArgs;
use nybl::kernel::layout::WHOLE_ROW;
use nybl::kernel::{Format, Layout, Offset, Run};

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
    // 2^-100 and 2^100: what some rows scale by powers of two, with the least f16 and the largest.
    Fill { name: "scales at both ends", scales: &[1, 0x7bff, 0x8001, 0xfbff], x_scales: &[7.888_609e-31, 1.267_650_6e30, 0.0], ..RANDOM },
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
            // So many panels that some rows take them in two runs.
            (6, 290 + more, 64, 9),
            // So long that rows decode or walk them stretch by stretch, with a rest.
            (7, 40, 32, 43),
            (32, 33, 64, 23),
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
