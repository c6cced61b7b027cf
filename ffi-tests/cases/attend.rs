//! Query rows carried over a block of keys and values.

use super::{Case, Floats, Function, Outcome, Output, Rng, Values, keep};
use crate::guard::{Arena, Place};
use half::f16;
use nybl::kernel::abi::AttendArgs;
use nybl::kernel::{KvFormat, LANES, Run, exp, quantize_query};

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
