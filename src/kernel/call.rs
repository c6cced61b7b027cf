//! The safe side of the table: every length is checked here, because a row does not.

use super::abi::{
    AttendArgs, EpilogueArgs, GeGluArgs, MatmulArgs, QuantizeArgs, RmsNormArgs, SoftCapArgs,
    SoftmaxArgs, SwiGluArgs,
};
use super::layout::{Layout, MIN_GROUP};
use super::scores::{BLOCK, maxima};
use super::{KvFormat, LANES, Op, Row, Run, select};
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::kernel::Format;
use crate::memory::Aligned;
use crate::threads::{Pool, SharedMut};

/// Weight bytes a tile should have: long enough that taking it from the counter costs nothing, short
/// enough that unlike cores end together.
const TILE_BYTES: usize = 64 * 1024;

/// Elements of an element-wise operation that a thread takes at a time.
const CHUNK: usize = 4096;

/// A packed matrix: its layout and exactly that many bytes, owned or mapped by somebody else.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    layout: Layout,
    bytes: &'a [u8],
}

impl<'a> Packed<'a> {
    /// A view of `bytes` as `layout`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the bytes are not exactly as many as the layout has, or start
    /// at an odd address.
    pub fn new(layout: Layout, bytes: &'a [u8]) -> Result<Self> {
        if bytes.len() != layout.bytes() {
            return Err(Error::InvalidArgument(format!(
                "{} bytes of packed weights where the layout has {}",
                bytes.len(),
                layout.bytes()
            )));
        }
        if bytes.as_ptr().align_offset(4) != 0 {
            return Err(Error::InvalidArgument("packed weights must be aligned to 4 bytes".into()));
        }
        Ok(Self { layout, bytes })
    }

    /// Format and shape.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The packed bytes.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

/// Rows of activations quantised to int8 groups, ready for matmuls of one group size.
pub struct Activations {
    capacity: usize,
    most_k: usize,
    q: Aligned<i8>,
    scales: Aligned<f32>,
    sums: Aligned<i32>,
    m: usize,
    k: usize,
    group: usize,
}

impl Activations {
    /// Room for `m` rows of `k` values at any group size.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(m: usize, k: usize) -> Result<Self> {
        let groups = k.div_ceil(MIN_GROUP);
        Ok(Self {
            capacity: m,
            most_k: k,
            q: Aligned::zeroed("quantised activations", m * k.next_multiple_of(128))?,
            scales: Aligned::zeroed("activation scales", m * groups)?,
            sums: Aligned::zeroed("activation sums", m * groups)?,
            m: 0,
            k: 0,
            group: 32,
        })
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.q.bytes() + self.scales.bytes() + self.sums.bytes()
    }

    /// The codes, one row of whole groups after the other.
    #[must_use]
    pub fn codes(&self) -> &[i8] {
        &self.q[..self.m * self.k.div_ceil(self.group) * self.group]
    }

    /// One scale for each row and group.
    #[must_use]
    pub fn scales(&self) -> &[f32] {
        &self.scales[..self.m * self.k.div_ceil(self.group)]
    }

    /// One sum of codes for each row and group.
    #[must_use]
    pub fn sums(&self) -> &[i32] {
        &self.sums[..self.m * self.k.div_ceil(self.group)]
    }
}

/// Activations in the form a format multiplies with.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// For quantised formats.
    Quantised(&'a Activations),
    /// For float formats: `m` rows of `k` floats.
    Float(&'a [f32]),
}

/// What is done to the outputs of a matmul while they are in the first cache.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// One float for each output, added to every row.
    pub bias: Option<&'a [f32]>,
    /// The least and the largest value an output may have, after the bias.
    pub clamp: Option<[f32; 2]>,
}

impl Epilogue<'_> {
    /// Nothing.
    pub const NONE: Self = Self { bias: None, clamp: None };
}

/// One matmul of several that share a join: `y[m, n] = x[m, k] * w[n, k]^T`, then `epilogue`.
pub struct MatmulJob<'a> {
    /// The weights.
    pub w: Packed<'a>,
    /// `m` rows of activations.
    pub x: Input<'a>,
    /// `m` rows of `n` outputs.
    pub y: &'a mut [f32],
    /// Bias and clamp.
    pub epilogue: Epilogue<'a>,
}

/// Query rows as integers, for formats of integers: made by [`super::quantize_query`], row by row.
#[derive(Clone, Copy)]
pub struct QueryCodes<'a> {
    /// For each query row, `d` high bytes, `d` low bytes and `d` codes of two bytes.
    pub codes: &'a [i8],
    /// For each query row, its scale.
    pub scales: &'a [f32],
    /// For each query row, the sum of its codes.
    pub sums: &'a [i32],
}

/// The query rows of one KV head, their running state, and one block of keys and values.
pub struct AttendStep<'a> {
    /// Query rows of `d` floats; `d` is a multiple of 16. Not looked at by formats of integers.
    pub q: &'a [f32],
    /// The same rows as integers. Not looked at by formats of floats.
    pub codes: QueryCodes<'a>,
    /// Floats of a padded head.
    pub d: usize,
    /// What the elements of `k` and `v` are, and how they lie ([`super::abi::AttendArgs`]).
    pub format: KvFormat,
    /// Keys of the block: chunks of 16 positions.
    pub k: &'a [u8],
    /// Values of the block: chunks of 16 positions.
    pub v: &'a [u8],
    /// Keys and values that will be wanted next, to be fetched.
    pub next: Option<(&'a [u8], &'a [u8])>,
    /// For each query row, the end of the positions of the block that it sees.
    pub visible: &'a [u32],
    /// For each query row, the first position of the block that it sees; none when not below `visible`.
    pub from: &'a [u32],
    /// Multiplied onto each score.
    pub scale: f32,
    /// Scores are bent to lie within this of zero, after the scale; 0 leaves them alone.
    pub softcap: f32,
    /// For each query row, the largest score so far.
    pub max: &'a mut [f32],
    /// For each query row, 16 partial sums of weights.
    pub sum: &'a mut [f32],
    /// For each query row, `d` weighted sums of values.
    pub acc: &'a mut [f32],
}

/// The rows chosen for one CPU, one for each operation and format.
pub struct Kernels {
    isa: Isa,
    matmul: [&'static Row; Format::ALL.len()],
    quantize: unsafe extern "C" fn(*const QuantizeArgs),
    epilogue: unsafe extern "C" fn(*const EpilogueArgs),
    rmsnorm: unsafe extern "C" fn(*const RmsNormArgs),
    swiglu: unsafe extern "C" fn(*const SwiGluArgs),
    geglu: unsafe extern "C" fn(*const GeGluArgs),
    softcap: unsafe extern "C" fn(*const SoftCapArgs),
    softmax: unsafe extern "C" fn(*const SoftmaxArgs),
    attend: [&'static Row; KvFormat::ALL.len()],
}

/// The function of the row selected for an operation.
macro_rules! selected {
    ($op:ident, $isa:expr) => {
        match select(Op::$op, $isa).run {
            Run::$op(function) => function,
            _ => unreachable!("a row runs its own operation"),
        }
    };
}

impl Kernels {
    /// The fastest rows for a CPU that has `isa`, which must be part of what [`Isa::detect`] found.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when this CPU lacks a feature of `isa`.
    pub fn new(isa: Isa) -> Result<Self> {
        if !Isa::detect().has(isa) {
            return Err(Error::Unsupported(format!("{isa}: this CPU has {}", Isa::detect())));
        }
        Ok(Self {
            isa,
            matmul: Format::ALL.map(|format| select(Op::Matmul(format), isa)),
            quantize: selected!(Quantize, isa),
            epilogue: selected!(Epilogue, isa),
            rmsnorm: selected!(RmsNorm, isa),
            swiglu: selected!(SwiGlu, isa),
            geglu: selected!(GeGlu, isa),
            softcap: selected!(SoftCap, isa),
            softmax: selected!(Softmax, isa),
            attend: KvFormat::ALL.map(|format| select(Op::Attend(format), isa)),
        })
    }

    /// The CPU features that were selected for.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The row that multiplies `format`.
    #[must_use]
    pub fn matmul_row(&self, format: Format) -> &'static Row {
        self.matmul[format as usize]
    }

    /// Runs several matmuls over the pool with one join.
    ///
    /// # Panics
    /// When the input of a job has another form or `k` than its weights, `y` is not a whole number of
    /// rows that the input has, or a bias is not `n` long: a bug of the caller.
    pub fn matmul(&self, pool: &Pool, jobs: &mut [MatmulJob<'_>]) {
        let mut tiles = 0;
        let plans: Vec<_> = jobs
            .iter_mut()
            .map(|job| {
                let plan = self.plan(job, None, pool.threads(), tiles);
                tiles = plan.end;
                plan
            })
            .collect();
        pool.run(tiles, &|tile| {
            for plan in &plans {
                if (plan.start..plan.end).contains(&tile) {
                    plan.run_tile(tile - plan.start);
                }
            }
        });
    }

    /// Runs a matmul whose outputs are scores, and writes the largest of every block of each row
    /// ([`super::scores`]) to `largest`.
    ///
    /// # Panics
    /// As [`Kernels::matmul`], and when `largest` is not as long as there are blocks.
    pub fn score(&self, pool: &Pool, mut job: MatmulJob<'_>, largest: &mut [f32]) {
        let plan = self.plan(&mut job, Some(largest), pool.threads(), 0);
        pool.run(plan.end, &|tile| plan.run_tile(tile));
    }

    fn plan<'a>(
        &self,
        job: &'a mut MatmulJob<'_>,
        largest: Option<&'a mut [f32]>,
        threads: usize,
        start: usize,
    ) -> Plan<'a> {
        let layout = job.w.layout;
        let m = job.y.len() / layout.n();
        assert_eq!(job.y.len(), m * layout.n(), "outputs are no whole rows");
        let (x, x_stride, x_scales, x_sums) = match job.x {
            Input::Quantised(x) => {
                assert!(layout.format().is_quantised(), "float weights with int8 activations");
                assert_eq!((x.m, x.k, x.group), (m, layout.k(), layout.group()), "other shape");
                (x.q.as_ptr().cast(), layout.padded_k(), x.scales.as_ptr(), x.sums.as_ptr())
            }
            Input::Float(x) => {
                assert!(!layout.format().is_quantised(), "quantised weights with f32 activations");
                assert_eq!(x.len(), m * layout.k(), "other shape");
                (x.as_ptr().cast(), layout.k(), std::ptr::null(), std::ptr::null())
            }
        };
        let Run::Matmul(run) = self.matmul_row(layout.format()).run else {
            unreachable!("a row runs its own operation")
        };
        let [low, high] = job.epilogue.clamp.unwrap_or([f32::NEG_INFINITY, f32::INFINITY]);
        let bias = job.epilogue.bias;
        assert!(bias.is_none_or(|bias| bias.len() == layout.n()), "other shape");
        let does_something = bias.is_some() || job.epilogue.clamp.is_some();
        let epilogue = EpilogueArgs {
            y: std::ptr::null_mut(),
            y_stride: layout.n(),
            m,
            n: layout.n(),
            bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
            low,
            high,
            halves: std::ptr::null_mut(),
            halves_stride: 0,
        };
        let fair = layout.panels() / (threads * 4);
        let mut panels = (TILE_BYTES / layout.panel_bytes()).min(fair).max(1);
        if let Some(largest) = &largest {
            assert_eq!(largest.len(), m * layout.n().div_ceil(BLOCK), "other shape");
            // Whole blocks.
            panels = panels.next_multiple_of(BLOCK.div_ceil(layout.panel_rows()));
        }
        Plan {
            start,
            end: start + layout.panels().div_ceil(panels),
            panels,
            panel_rows: layout.panel_rows(),
            run,
            all: MatmulArgs {
                w: job.w.bytes.as_ptr(),
                panel_bytes: layout.panel_bytes(),
                panels: layout.panels(),
                groups: layout.groups(),
                group: layout.group(),
                offset: layout.format().offset() as u32,
                x,
                x_stride,
                x_scales,
                x_sums,
                m,
                y: std::ptr::null_mut(),
                y_stride: layout.n(),
                n: layout.n(),
            },
            y: SharedMut::new(job.y.as_mut_ptr()),
            epilogue: does_something.then_some((self.epilogue, epilogue)),
            largest: largest.map(|largest| SharedMut::new(largest.as_mut_ptr())),
            borrow: std::marker::PhantomData,
        }
    }

    /// Quantises the rows of `x` (`k` floats each) into `out`, in groups of `group`.
    ///
    /// # Panics
    /// When `x` is not a whole number of rows or `out` has no room for them: a bug of the caller.
    pub fn quantize(&self, pool: &Pool, x: &[f32], k: usize, group: usize, out: &mut Activations) {
        let m = x.len() / k;
        assert!(x.len() == m * k && m <= out.capacity && k <= out.most_k, "no room");
        let row = k.next_multiple_of(MIN_GROUP);
        assert!(matches!(group, 16 | 32 | 64 | 128) || group == row, "group size {group}");
        (out.m, out.k, out.group) = (m, k, group);
        let groups = k.div_ceil(group);
        let q = SharedMut::new(out.q.as_mut_ptr());
        let scales = SharedMut::new(out.scales.as_mut_ptr());
        let sums = SharedMut::new(out.sums.as_mut_ptr());
        each_row_tile(pool, m, k, |first, rows| {
            let args = QuantizeArgs {
                x: x[first * k..].as_ptr(),
                x_stride: k,
                m: rows,
                k,
                group,
                q: q.get().wrapping_add(first * groups * group),
                scales: scales.get().wrapping_add(first * groups),
                sums: sums.get().wrapping_add(first * groups),
            };
            // SAFETY: the buffers have room for all rows (checked above; their capacity is for the
            // smallest group), tiles write disjoint rows, and the CPU has what the row needs.
            unsafe { (self.quantize)(&raw const args) };
        });
    }

    /// `y = x / rms(x) * weight` for every row of `weight.len()` floats.
    ///
    /// # Panics
    /// When `x` and `y` are not the same whole number of rows: a bug of the caller.
    pub fn rmsnorm(&self, pool: &Pool, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let d = weight.len();
        let m = x.len() / d;
        assert!(x.len() == m * d && y.len() == x.len(), "other shape");
        let y = SharedMut::new(y.as_mut_ptr());
        each_row_tile(pool, m, d, |first, rows| {
            let args = RmsNormArgs {
                x: x[first * d..].as_ptr(),
                weight: weight.as_ptr(),
                y: y.get().wrapping_add(first * d),
                m: rows,
                d,
                eps,
            };
            // SAFETY: lengths are checked above, tiles write disjoint rows, and the CPU has what the
            // row needs.
            unsafe { (self.rmsnorm)(&raw const args) };
        });
    }

    /// `gate = silu(gate) * up`.
    ///
    /// # Panics
    /// When the two differ in length: a bug of the caller.
    pub fn swiglu(&self, pool: &Pool, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "other shape");
        pool.chunks_mut(gate, CHUNK, &|index, gate| {
            let up = &up[index * CHUNK..index * CHUNK + gate.len()];
            let args = SwiGluArgs { gate: gate.as_mut_ptr(), up: up.as_ptr(), len: gate.len() };
            // SAFETY: both slices are `len` long, and the CPU has what the row needs.
            unsafe { (self.swiglu)(&raw const args) };
        });
    }

    /// `gate = gelu(gate) * up`, with the tanh form of GELU.
    ///
    /// # Panics
    /// When the two differ in length: a bug of the caller.
    pub fn geglu(&self, pool: &Pool, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "other shape");
        pool.chunks_mut(gate, CHUNK, &|index, gate| {
            let up = &up[index * CHUNK..index * CHUNK + gate.len()];
            let args = GeGluArgs { gate: gate.as_mut_ptr(), up: up.as_ptr(), len: gate.len() };
            // SAFETY: both slices are `len` long, and the CPU has what the row needs.
            unsafe { (self.geglu)(&raw const args) };
        });
    }

    /// `x = cap * tanh(x / cap)`.
    pub fn softcap(&self, pool: &Pool, x: &mut [f32], cap: f32) {
        pool.chunks_mut(x, CHUNK, &|_, x| {
            let args = SoftCapArgs { x: x.as_mut_ptr(), len: x.len(), cap };
            // SAFETY: the slice is `len` long, and the CPU has what the row needs.
            unsafe { (self.softcap)(&raw const args) };
        });
    }

    /// Softmax in place.
    pub fn softmax(&self, x: &mut [f32]) {
        let args = SoftmaxArgs { x: x.as_mut_ptr(), len: x.len() };
        // SAFETY: the slice is `len` long, and the CPU has what the row needs.
        unsafe { (self.softmax)(&raw const args) };
    }

    /// Carries the query rows of `step` over one more block.
    ///
    /// # Panics
    /// When a slice is shorter than its documentation says or misaligned: a bug of the caller.
    pub fn attend(&self, step: &mut AttendStep<'_>) {
        let (d, rows) = (step.d, step.visible.len());
        let seen = step.visible.iter().max().map_or(0, |&v| v as usize).next_multiple_of(LANES);
        assert!(d > 0 && d.is_multiple_of(LANES), "head of {d} floats is not padded");
        assert!(step.acc.len() == rows * d && step.from.len() == rows, "other shape");
        assert!(step.max.len() == rows && step.sum.len() == rows * LANES, "other shape");
        let codes = step.codes;
        if step.format.is_quantised() {
            assert!(codes.codes.len() == rows * 4 * d, "other shape");
            assert!(codes.scales.len() == rows && codes.sums.len() == rows, "other shape");
        } else {
            assert!(step.q.len() == rows * d, "other shape");
        }
        let chunk = (step.format.key_bytes(d), step.format.value_bytes(d));
        for (block, chunk) in [(step.k, chunk.0), (step.v, chunk.1)] {
            assert!(block.len() >= seen / LANES * chunk, "block is too short");
            assert!(block.as_ptr().align_offset(4) == 0, "block is misaligned");
        }
        let Run::Attend(run) = self.attend[step.format as usize].run else {
            unreachable!("a row runs its own operation")
        };
        let args = AttendArgs {
            q: step.q.as_ptr(),
            q_codes: codes.codes.as_ptr(),
            q_scales: codes.scales.as_ptr(),
            q_sums: codes.sums.as_ptr(),
            rows,
            d,
            k: step.k.as_ptr(),
            v: step.v.as_ptr(),
            next_k: step.next.map_or(std::ptr::null(), |(k, _)| k.as_ptr()),
            next_v: step.next.map_or(std::ptr::null(), |(_, v)| v.as_ptr()),
            visible: step.visible.as_ptr(),
            from: step.from.as_ptr(),
            scale: step.scale,
            softcap: step.softcap,
            max: step.max.as_mut_ptr(),
            sum: step.sum.as_mut_ptr(),
            acc: step.acc.as_mut_ptr(),
        };
        // SAFETY: lengths are checked above, and the CPU has what the row needs.
        unsafe { run(&raw const args) };
    }
}

/// Calls `work(first, rows)` over the pool in about two tiles a thread, none so small that the join would
/// cost more than the work: the heads of one token are one tile.
fn each_row_tile(pool: &Pool, m: usize, width: usize, work: impl Fn(usize, usize) + Sync) {
    let rows = m.div_ceil(pool.threads() * 2).max(4).max(CHUNK / width);
    pool.run(m.div_ceil(rows), &|tile| work(tile * rows, rows.min(m - tile * rows)));
}

/// One matmul cut into tiles of whole panels.
struct Plan<'a> {
    start: usize,
    end: usize,
    panels: usize,
    panel_rows: usize,
    run: unsafe extern "C" fn(*const MatmulArgs),
    all: MatmulArgs,
    y: SharedMut<f32>,
    epilogue: Option<(unsafe extern "C" fn(*const EpilogueArgs), EpilogueArgs)>,
    largest: Option<SharedMut<f32>>,
    borrow: std::marker::PhantomData<&'a mut f32>,
}

// SAFETY: the pointers in `all` and `epilogue` are to weights, activations and biases that are only read,
// and `y` and `largest` are written in disjoint columns by each tile.
unsafe impl Sync for Plan<'_> {}

impl Plan<'_> {
    fn run_tile(&self, tile: usize) {
        let first = tile * self.panels;
        let panels = self.panels.min(self.all.panels - first);
        let args = MatmulArgs {
            w: self.all.w.wrapping_add(first * self.all.panel_bytes),
            panels,
            y: self.y.get().wrapping_add(first * self.panel_rows),
            n: (panels * self.panel_rows).min(self.all.n - first * self.panel_rows),
            ..self.all
        };
        // SAFETY: `plan` checked every length against the layout, the tile stays inside, and the CPU
        // has what the row needs (`Kernels::new`).
        unsafe { (self.run)(&raw const args) };
        if let Some((run, all)) = self.epilogue {
            let mut epilogue = EpilogueArgs { y: args.y, n: args.n, ..all };
            if !all.bias.is_null() {
                epilogue.bias = all.bias.wrapping_add(first * self.panel_rows);
            }
            // SAFETY: the same outputs, and the biases of them.
            unsafe { run(&raw const epilogue) };
        }
        if let Some(largest) = &self.largest {
            let (block, blocks) = (first * self.panel_rows / BLOCK, self.all.n.div_ceil(BLOCK));
            for row in 0..self.all.m {
                let y = args.y.wrapping_add(row * self.all.y_stride);
                let largest = largest.get().wrapping_add(row * blocks + block);
                // SAFETY: outputs of this tile, whose blocks are whole or the last of a row (`plan`), and which
                // nobody else has yet.
                unsafe {
                    let y = std::slice::from_raw_parts(y, args.n);
                    for (i, max) in maxima(y).enumerate() {
                        largest.add(i).write(max);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_bytes_must_fit_their_layout() {
        let layout = Layout::new(Format::Q4, 32, 40, 64).unwrap();
        let bytes = Aligned::<u8>::zeroed("test", layout.bytes() + 1).unwrap();
        assert!(Packed::new(layout, &bytes[..layout.bytes()]).is_ok());
        assert!(Packed::new(layout, &bytes).is_err());
        assert!(Packed::new(layout, &bytes[1..]).is_err());
    }

    #[test]
    fn scores_are_those_of_a_matmul_with_the_largest_of_every_block() {
        let kernels = Kernels::new(Isa::detect()).unwrap();
        let (k, m) = (64, 3);
        // Blocks that end with a panel, within one and within a row of panels.
        let sizes: &[_] = &[(200, 3), (1, 1), (64, 2), (1000, 2)];
        let few = cfg!(miri);
        let sizes = if few { &sizes[..1] } else { sizes };
        for format in if few { &[Format::Q4][..] } else { &Format::ALL } {
            let format = *format;
            for (n, threads) in sizes.iter().copied() {
                let layout = Layout::new(format, 32, n, k).unwrap();
                let mut w = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
                // Codes and scales of any kind, NaN among them.
                for (i, byte) in w.iter_mut().enumerate() {
                    *byte = (i * 37 % 251) as u8;
                }
                let floats: Vec<f32> = (0..m * k).map(|i| (i % 13) as f32 - 6.0).collect();
                let (pool, mut x) = (Pool::new(threads).unwrap(), Activations::new(m, k).unwrap());
                kernels.quantize(&pool, &floats, k, 32, &mut x);
                let job = |y| {
                    let quantised = format.is_quantised();
                    let x = if quantised { Input::Quantised(&x) } else { Input::Float(&floats) };
                    let w = Packed::new(layout, &w).unwrap();
                    MatmulJob { w, x, y, epilogue: Epilogue::NONE }
                };
                let (mut plain, mut scored) = (vec![0.0; m * n], vec![0.0; m * n]);
                let mut largest = vec![0.0; m * n.div_ceil(BLOCK)];
                kernels.matmul(&pool, &mut [job(&mut plain)]);
                kernels.score(&pool, job(&mut scored), &mut largest);
                // Which NaN it is says nothing, and Miri takes any.
                let bits_of = |x: &f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
                let bits = |x: &[f32]| x.iter().map(bits_of).collect::<Vec<_>>();
                assert_eq!(bits(&scored), bits(&plain), "{format:?}, {n} outputs");
                let expected: Vec<f32> = plain.chunks(n).flat_map(maxima).collect();
                assert_eq!(bits(&largest), bits(&expected), "{format:?}, {n} outputs");
            }
        }
    }
}
