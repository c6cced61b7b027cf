//! `nybl bench --kernels`: every matmul row of the kernel table that this CPU can run, on matrices that no cache
//! holds, beside what memory and cores could do at that moment.

use crate::picture::{Chart, Scale, Series};
use nybl::isa::Isa;
use nybl::kernel::{
    Activations, Epilogue, Format, Input, Kernels, Layout, MatmulJob, Op, Packed, ROWS, limits,
};
use nybl::memory::Aligned;
use nybl::threads::Pool;
use serde_json::{Value, json};
use std::time::Instant;

/// Outputs and inputs of the matrix: 36 MB at 4.5 bits, and a copy beside it that is used in turn.
const SHAPE: (usize, usize) = (8192, 8192);
/// Formats and group sizes.
const FORMATS: [(Format, usize); 6] = [
    (Format::Q4, 32),
    (Format::Q4, 128),
    (Format::Q3, 128),
    (Format::Q2, 128),
    (Format::Q8, 32),
    (Format::F16, 1),
];
/// Rows of activations.
const BATCHES: [usize; 5] = [1, 2, 4, 8, 64];

/// One row of the table at one shape.
pub(crate) struct Point {
    row: &'static str,
    isa: String,
    format: String,
    m: usize,
    /// Multiply-adds, and bytes of weights, of a call.
    work: (f64, f64),
    seconds: f64,
}

/// What was measured.
pub(crate) struct Table {
    points: Vec<Point>,
    bytes_per_second: f64,
    /// Multiply-adds a second of the dot instruction, where there is one.
    dots_per_second: Option<f64>,
}

/// Measures all rows of `isa` and below on the threads of `pool`.
pub(crate) fn measure(pool: &Pool, isa: Isa, runs: usize) -> nybl::Result<Table> {
    let mut points = Vec::new();
    let mut reads = Vec::new();
    let (n, k) = SHAPE;
    for (format, group) in FORMATS {
        let layout = Layout::new(format, group, n, k)?;
        let mut copies = Vec::new();
        for _ in 0..2 {
            let mut bytes = Aligned::<u8>::zeroed("weights", layout.bytes())?;
            // Any codes do, with scales that are numbers: as a half, this is 0.065.
            bytes.fill(0x2c);
            copies.push(bytes);
        }
        // The naive rows say nothing about a machine.
        let rows = ROWS.iter().filter(|row| {
            row.op == Op::Matmul(format) && row.needs != Isa::NONE && isa.has(row.needs)
        });
        for row in rows {
            let kernels = Kernels::new(row.needs)?;
            let most = if row.needs == Isa::PORTABLE { 1 } else { BATCHES.len() };
            for &m in &BATCHES[..most] {
                let floats: Vec<f32> =
                    (0..m * k).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.02).collect();
                let mut codes = Activations::new(m, k)?;
                if format.is_quantised() {
                    kernels.quantize(pool, &floats, k, group, &mut codes);
                }
                let mut y = vec![0.0; m * n];
                let mut times = Vec::new();
                for run in 0..=runs {
                    reads.push(copies[0].len() as f64 / limits::read_seconds(pool, &[&copies[0]]));
                    let w = Packed::new(layout, &copies[(run + 1) % 2])?;
                    let x = if format.is_quantised() {
                        Input::Quantised(&codes)
                    } else {
                        Input::Float(&floats)
                    };
                    let start = Instant::now();
                    let job = MatmulJob { w, x, y: &mut y, epilogue: Epilogue::NONE };
                    kernels.matmul(pool, &mut [job]);
                    times.push(start.elapsed().as_secs_f64());
                }
                let name = if group > 1 {
                    format!("{} g{group}", format.name())
                } else {
                    format.name().into()
                };
                points.push(Point {
                    row: row.name,
                    isa: row.name.rsplit('-').next().unwrap_or_default().into(),
                    format: name,
                    m,
                    work: ((m * n * k) as f64, layout.bytes() as f64),
                    seconds: median(&mut times),
                });
            }
        }
    }
    let dots_per_second = limits::dots(pool, isa);
    Ok(Table { points, bytes_per_second: median(&mut reads), dots_per_second })
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Point {
    fn macs_per_second(&self) -> f64 {
        self.work.0 / self.seconds
    }

    fn bytes_per_second(&self) -> f64 {
        self.work.1 / self.seconds
    }
}

impl Table {
    /// For `--json`.
    pub(crate) fn object(&self) -> Value {
        let rows = self.points.iter().map(|point| {
            json!({
                "row": point.row,
                "format": point.format,
                "m": point.m,
                "gmac_per_second": point.macs_per_second() * 1e-9,
                "gb_per_second": point.bytes_per_second() * 1e-9,
                "fraction_of_read_bandwidth": point.bytes_per_second() / self.bytes_per_second,
                "fraction_of_dot_peak": self.dots_per_second.map(|peak| point.macs_per_second() / peak),
            })
        });
        json!({
            "outputs": SHAPE.0,
            "inputs": SHAPE.1,
            "read_gb_per_second": self.bytes_per_second * 1e-9,
            "dot_gmac_per_second": self.dots_per_second.map(|peak| peak * 1e-9),
            "rows": rows.collect::<Vec<_>>(),
        })
    }

    /// A line for each row.
    pub(crate) fn lines(&self) -> String {
        let (outputs, inputs) = SHAPE;
        let mut text =
            format!("{outputs} x {inputs}, reading gives {:.1} GB/s", self.bytes_per_second * 1e-9);
        if let Some(peak) = self.dots_per_second {
            text += &format!(", the dot instruction {:.0} Gmac/s", peak * 1e-9);
        }
        text +=
            "\nrow                     format    rows    Gmac/s     GB/s  of reading  of dots\n";
        for point in &self.points {
            let share =
                |part: Option<f64>| part.map_or("".into(), |x| format!("{:.0}%", 100.0 * x));
            text += &format!(
                "{:<23} {:<8} {:>5} {:>9.1} {:>8.1} {:>11} {:>8}\n",
                point.row,
                point.format,
                point.m,
                point.macs_per_second() * 1e-9,
                point.bytes_per_second() * 1e-9,
                share(Some(point.bytes_per_second() / self.bytes_per_second)),
                share(self.dots_per_second.map(|peak| point.macs_per_second() / peak)),
            );
        }
        text
    }

    /// The roofline (Williams, Waterman and Patterson, 2009): multiply-adds a second against multiply-adds for
    /// each byte of weights, under what memory and cores allow.
    pub(crate) fn chart(&self, machine: &str) -> Chart {
        let intensity = |point: &Point| point.work.0 / point.work.1;
        let at = self.points.iter().map(intensity);
        let (first, last) = at.fold((f64::MAX, 0.0), |(a, b), x| (f64::min(a, x), f64::max(b, x)));
        let (first, last) = (first / 1.5, last * 1.5);
        let peak = self.dots_per_second.unwrap_or(f64::INFINITY);
        let roof = |x: f64| (x, (x * self.bytes_per_second).min(peak) * 1e-9);
        let ridge = (peak / self.bytes_per_second).clamp(first, last);
        let mut series = vec![Series {
            name: format!("reading {:.0} GB/s, dots", self.bytes_per_second * 1e-9),
            points: vec![roof(first), roof(ridge), roof(last)],
            joined: true,
            labels: Vec::new(),
        }];
        for point in &self.points {
            let found = series.iter().position(|series| series.name == point.isa);
            let at = found.unwrap_or_else(|| {
                let name = point.isa.clone();
                series.push(Series { name, points: vec![], joined: false, labels: vec![] });
                series.len() - 1
            });
            series[at].points.push((intensity(point), point.macs_per_second() * 1e-9));
        }
        Chart {
            title: format!("Matmul rows, 1 to 64 activation rows, {machine}"),
            x: ("multiply-adds for each byte of weights".into(), Scale::Doubling),
            y: ("Gmac/s".into(), Scale::Doubling),
            series,
        }
    }
}
