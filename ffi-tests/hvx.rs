//! The rows for Hexagon's DSP under `qemu-hexagon`, bit for bit against the scalar rows.
//!
//! A program of the DSP's C files is built with Clang and lld alone and keeps running behind two pipes. To the
//! cases of `conformance` it is one more row: a function that puts its argument block into a shared buffer,
//! sends that over, and takes the outputs out of what comes back. Each case is tried with the buffer
//! flush against an unmapped page, a different part of it at the edge each time, and everything outside the
//! outputs must come back as it went.
//!
//! Without the tools the tests are listed as ignored, by name; `NYBL_EXPECT=hvx` makes that a failure.

#[allow(dead_code, unused_imports, reason = "the cases of other operations")]
mod cases;
#[allow(dead_code, unused_imports, reason = "faults happen in the other process")]
mod guard;

use cases::{Case, MatmulCase};
use guard::{Arena, Place};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nybl::isa::Isa;
use nybl::kernel::abi::MatmulArgs;
use nybl::kernel::hexagon::{
    HEXAGON_BUFFER, HEXAGON_FORMAT, HEXAGON_OK, HEXAGON_OTHER_VERSION, HEXAGON_RANGE,
    HEXAGON_SHAPE, HEXAGON_VERSION, HexagonMatmul, Job, Transport,
};
use nybl::kernel::{
    Activations, Epilogue, Format, Input, Kernels, Layout, MatmulJob, Op, Packed, ROWS, Run,
};
use nybl::quant::rtn;
use nybl::threads::Pool;
use std::cell::RefCell;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::OnceLock;

const SEED: u64 = 0x6e79_626c;

fn main() -> ExitCode {
    let expect = std::env::var("NYBL_EXPECT").unwrap_or_default();
    let is_expected = expect.split(',').any(|name| matches!(name.trim(), "hvx" | "*-hvx"));
    let formats = Format::ALL.into_iter().filter(|format| format.is_quantised());
    let mut trials: Vec<Trial> = formats
        .map(|format| {
            let name = format!("{}-matmul-hvx", format.name());
            trial(name, is_expected, move || row(format))
        })
        .collect();
    trials.push(trial("jobs-hvx".into(), is_expected, jobs));
    trials.push(trial("refusals-hvx".into(), is_expected, refusals));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// A test that needs the program.
fn trial(
    name: String,
    is_expected: bool,
    test: impl FnOnce() -> Result<(), String> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match program() {
        Ok(_) => test().map(|()| Completion::Completed).map_err(Failed::from),
        Err(why) if is_expected => Err(format!("NYBL_EXPECT asks for it: {why}").into()),
        Err(why) => Ok(Completion::ignored_with(why.as_str())),
    })
}

// --- The program ------------------------------------------------------------------------------

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The DSP's program, built by the first test that asks for it, or why there is none.
fn program() -> Result<&'static Path, String> {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    PROGRAM.get_or_init(build).as_deref().map_err(Clone::clone)
}

/// The first of these programs that is installed.
fn installed(names: &[&str]) -> Result<String, String> {
    let works = |name: &&&str| Command::new(name).arg("--version").output().is_ok();
    let found = names.iter().find(works);
    found.map(ToString::to_string).ok_or(format!("{} is not installed", names[0]))
}

fn build() -> Result<PathBuf, String> {
    let clang = installed(&["clang-19", "clang"])?;
    let linker = installed(&["ld.lld-19", "ld.lld"])?;
    installed(&["qemu-hexagon"])?;
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hvx");
    std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
    let mut objects = Vec::new();
    for source in ["kernels/hvx_matmul.c", "kernels/hvx_entry.c", "ffi-tests/c/hexagon.c"] {
        let object = folder.join(source.replace('/', "-")).with_extension("o");
        let path = root().join(source);
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{source}: {e}"))?;
        // The files of the kernels say how they are compiled.
        let line = text.lines().find(|line| line.starts_with("//@"));
        let flags = line.and_then(|line| line.split_once("flags=")).map_or("-mv67", |(_, f)| f);
        finish(
            Command::new(&clang)
                .args(["--target=hexagon-unknown-linux-musl", "-O2", "-std=c11", "-ffreestanding"])
                .args(["-fno-tree-vectorize", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"])
                .args(flags.split_whitespace())
                // A sanitizer's, from CI.
                .args(std::env::var("NYBL_HVX_CFLAGS").unwrap_or_default().split_whitespace())
                .args(["-I".as_ref(), root().join("kernels").as_os_str()])
                .args(["-c".as_ref(), path.as_os_str(), "-o".as_ref(), object.as_os_str()]),
        )?;
        objects.push(object);
    }
    let program = folder.join("hexagon");
    finish(Command::new(linker).arg("-static").args(&objects).arg("-o").arg(&program))?;
    Ok(program)
}

fn finish(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    // A failure of a tool that is there is no reason to skip the test.
    panic!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The running program: FastRPC's place is taken by two pipes.
struct Dsp {
    child: Child,
    to: ChildStdin,
    from: ChildStdout,
    /// Whether the next buffer starts after an unmapped page instead of ending before one.
    left: bool,
}

impl Dsp {
    fn start() -> Result<Self, String> {
        let mut child = Command::new("qemu-hexagon")
            .args(["-cpu", "v67"])
            .arg(program()?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| format!("qemu-hexagon: {e}"))?;
        let (to, from) =
            (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        Ok(Self { child, to, from, left: false })
    }

    fn call(&mut self, buffer: &mut [u8], block: u64) -> Result<i32, String> {
        let words = [buffer.len() as u32, block as u32, u32::from(self.left), 0];
        let mut code = 0;
        let mut transfer = || {
            self.to.write_all(bytemuck::bytes_of(&words))?;
            self.to.write_all(buffer)?;
            self.from.read_exact(bytemuck::bytes_of_mut(&mut code))?;
            self.from.read_exact(buffer)
        };
        match transfer() {
            Ok(()) => Ok(code),
            Err(error) => Err(format!("{error}; the program ended: {:?}", self.child.wait())),
        }
    }
}

impl Drop for Dsp {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Transport for Dsp {
    fn run(&mut self, buffer: &mut [u8], block: u64) -> nybl::Result<i32> {
        self.call(buffer, block).map_err(nybl::Error::Unsupported)
    }
}

// --- The cases of `conformance` ---------------------------------------------------------------

thread_local! {
    /// The program of this thread, and how many calls it has had.
    static DSP: RefCell<Option<(Dsp, usize)>> = const { RefCell::new(None) };
    /// Why the last call failed: a row cannot say it.
    static FAILURE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// All cases of a format.
fn row(format: Format) -> Result<(), String> {
    let oracle = ROWS.iter().find(|row| row.op == Op::Matmul(format)).ok_or("no oracle")?;
    let Run::Matmul(oracle) = oracle.run else {
        return Err("an oracle of another operation".into());
    };
    let hvx = match format.bits() {
        8 => on_dsp::<8>,
        4 => on_dsp::<4>,
        3 => on_dsp::<3>,
        _ => on_dsp::<2>,
    };
    let arena = &mut Arena::default();
    for case in MatmulCase::all(format, SEED) {
        for place in [Place::Middle, Place::RightEdge] {
            let named = |what| format!("{}, {place:?}: {what}", case.describe());
            let want = case.run(oracle, arena, place).map_err(named)?;
            let got = case.run(hvx, arena, place).map_err(named)?;
            if let Some(failure) = FAILURE.take() {
                return Err(named(failure));
            }
            for (got, want) in got.iter().zip(&want) {
                got.equals(want, nybl::kernel::Contract::Exact).map_err(named)?;
            }
        }
    }
    Ok(())
}

/// A row that runs on the DSP.
unsafe extern "C" fn on_dsp<const BITS: u32>(a: *const MatmulArgs) {
    // SAFETY: the case vouches for its block.
    if let Err(failure) = unsafe { send::<BITS>(&*a) } {
        FAILURE.set(Some(failure));
    }
}

unsafe fn send<const BITS: u32>(a: &MatmulArgs) -> Result<(), String> {
    DSP.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Some((Dsp::start()?, 0));
        }
        let (dsp, calls) = slot.as_mut().ok_or("no program")?;
        *calls += 1;
        dsp.left = *calls % 2 == 0;
        // SAFETY: the lengths of the argument block's promises.
        let parts: [&[u8]; 4] = unsafe {
            let tables = a.m * a.groups;
            [
                std::slice::from_raw_parts(a.w, a.panels * a.panel_bytes),
                std::slice::from_raw_parts(a.x, (a.m - 1) * a.x_stride + a.groups * a.group),
                bytemuck::cast_slice(std::slice::from_raw_parts(a.x_scales, tables)),
                bytemuck::cast_slice(std::slice::from_raw_parts(a.x_sums, tables)),
            ]
        };
        let outputs = ((a.m - 1) * a.y_stride + a.n) * 4;
        let sizes = [size_of::<HexagonMatmul>(), outputs];
        let sizes: Vec<usize> = parts.iter().map(|part| part.len()).chain(sizes).collect();
        // A different part last, and so at the edge, each time.
        let mut at = [0_u64; 6];
        let mut end = 0;
        for index in (0..6).map(|index| (index + *calls) % 6) {
            at[index] = end as u64;
            end = (end + sizes[index]).next_multiple_of(64);
        }
        let block = HexagonMatmul {
            version: HEXAGON_VERSION,
            bits: BITS,
            offset: a.offset,
            group: a.group as u32,
            groups: a.groups as u32,
            panels: a.panels as u32,
            m: a.m as u32,
            n: a.n as u32,
            x_stride: a.x_stride as u32,
            y_stride: a.y_stride as u32,
            w: at[0],
            x: at[1],
            x_scales: at[2],
            x_sums: at[3],
            y: at[5],
        };
        let mut buffer = vec![0xa5; end];
        let parts = parts.into_iter().chain([bytemuck::bytes_of(&block)]);
        for (at, part) in at.iter().zip(parts) {
            buffer[*at as usize..][..part.len()].copy_from_slice(part);
        }
        let sent = buffer.clone();
        match dsp.call(&mut buffer, at[4])? {
            HEXAGON_OK => {}
            code => return Err(format!("refused with code {code}: {block:?}")),
        }
        let start = at[5] as usize;
        for row in 0..a.m {
            let from = start + row * a.y_stride * 4;
            // SAFETY: row `row` of the outputs has `n` floats.
            let y = unsafe { std::slice::from_raw_parts_mut(a.y.add(row * a.y_stride), a.n) };
            bytemuck::cast_slice_mut(y).copy_from_slice(&buffer[from..from + a.n * 4]);
            buffer[from..from + a.n * 4].fill(0xa5);
        }
        match buffer.iter().zip(&sent).position(|(now, then)| now != then) {
            None => Ok(()),
            Some(byte) => Err(format!("byte {byte} of the buffer was written: {block:?}")),
        }
    })
}

// --- The host's side --------------------------------------------------------------------------

/// A matrix of some floats in a format, packed.
fn weights(layout: Layout) -> Vec<u32> {
    let value = |i: usize| ((i * 7919 % 2003) as f32 - 1001.0) * 1e-3;
    let mut bytes = vec![0_u32; layout.bytes() / 4];
    let panels = bytemuck::cast_slice_mut::<u32, u8>(&mut bytes);
    for (index, panel) in panels.chunks_exact_mut(layout.panel_bytes()).enumerate() {
        let first = index * layout.panel_rows();
        let rows = layout.panel_rows().min(layout.n() - first);
        let x: Vec<f32> = (first * layout.k()..(first + rows) * layout.k()).map(value).collect();
        rtn::pack_panel(&layout, rows, &x, panel).expect("tame weights");
    }
    bytes
}

/// What a host does: quantise activations here, multiply there, with the weights written once.
fn jobs() -> Result<(), String> {
    let text = |error: nybl::Error| error.to_string();
    let (mut dsp, pool) = (Dsp::start()?, Pool::new(1).map_err(text)?);
    let kernels = Kernels::new(Isa::detect()).map_err(text)?;
    for (format, group, n, k, m) in [
        (Format::Q8, 0, 40, 176, 1),
        (Format::Q4, 32, 200, 256, 5),
        (Format::Q4Z, 128, 64, 300, 9),
        (Format::Q3M, 64, 300, 200, 3),
        (Format::Q2, 16, 65, 64, 8),
    ] {
        let layout = Layout::new(format, group, n, k).map_err(text)?;
        let bytes = weights(layout);
        let w = Packed::new(layout, bytemuck::cast_slice(&bytes)).map_err(text)?;
        let job = Job::new(layout, m).map_err(text)?;
        let mut buffer = vec![0; job.bytes()];
        job.write_weights(&w, &mut buffer).map_err(text)?;
        let mut x = Activations::new(m, k).map_err(text)?;
        for call in 0..2 {
            let floats = (0..m * k).map(|i| ((i * 31 + call) % 97) as f32 - 40.0);
            let floats: Vec<f32> = floats.collect();
            kernels.quantize(&pool, &floats, k, layout.group(), &mut x);
            let (mut here, mut there) = (vec![0.0; m * n], vec![0.0; m * n]);
            let input = Input::Quantised(&x);
            let product = MatmulJob { w, x: input, y: &mut here, epilogue: Epilogue::NONE };
            kernels.matmul(&pool, &mut [product]);
            job.write_activations(&x, &mut buffer).map_err(text)?;
            job.run(&mut dsp, &mut buffer, &mut there).map_err(text)?;
            let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
            if bits(&here) != bits(&there) {
                return Err(format!("{} {n} x {k}, {m} rows: other bits", format.name()));
            }
        }
    }
    Ok(())
}

/// Blocks that must be refused, each with one field that is wrong, and leave the buffer as it was.
fn refusals() -> Result<(), String> {
    let layout = Layout::new(Format::Q4, 32, 40, 64).map_err(|e| e.to_string())?;
    let job = Job::new(layout, 2).map_err(|e| e.to_string())?;
    let mut dsp = Dsp::start()?;
    let length = job.bytes();
    let right = *job.block();
    type Change = fn(&mut HexagonMatmul);
    let changes: &[(Change, i32)] = &[
        (|_| (), HEXAGON_OK),
        (|b| b.version += 1, HEXAGON_OTHER_VERSION),
        (|b| b.bits = 5, HEXAGON_FORMAT),
        (|b| b.offset = 3, HEXAGON_FORMAT),
        (|b| (b.bits, b.offset) = (8, 1), HEXAGON_FORMAT),
        (|b| b.group = 0, HEXAGON_SHAPE),
        (|b| b.group = 40, HEXAGON_SHAPE),
        (|b| b.group = 256, HEXAGON_SHAPE),
        (|b| b.groups = 0, HEXAGON_SHAPE),
        (|b| b.groups = 3, HEXAGON_SHAPE),
        (|b| b.groups = u32::MAX, HEXAGON_SHAPE),
        (|b| b.panels = 1, HEXAGON_SHAPE),
        (|b| b.panels = 3, HEXAGON_SHAPE),
        (|b| b.m = 0, HEXAGON_SHAPE),
        (|b| b.m = u32::MAX, HEXAGON_SHAPE),
        (|b| b.m = 1 << 24, HEXAGON_RANGE),
        (|b| b.n = 0, HEXAGON_SHAPE),
        (|b| b.n = 65, HEXAGON_SHAPE),
        (|b| b.x_stride = 48, HEXAGON_SHAPE),
        (|b| b.x_stride = 72, HEXAGON_SHAPE),
        (|b| b.x_stride = 1 << 24, HEXAGON_RANGE),
        (|b| b.y_stride = 39, HEXAGON_SHAPE),
        (|b| b.y_stride = 1 << 24, HEXAGON_RANGE),
        (|b| b.w += 4, HEXAGON_RANGE),
        (|b| b.w = u64::MAX - 63, HEXAGON_RANGE),
        (|b| b.x = 1 << 40, HEXAGON_RANGE),
        (|b| b.x_scales += 1 << 12, HEXAGON_RANGE),
        (|b| b.x_sums += 1 << 12, HEXAGON_RANGE),
        (|b| b.y += 64 * 5, HEXAGON_RANGE),
    ];
    for (index, (change, want)) in changes.iter().enumerate() {
        let mut block = right;
        change(&mut block);
        let mut buffer = vec![0; length];
        buffer[..size_of::<HexagonMatmul>()].copy_from_slice(bytemuck::bytes_of(&block));
        let sent = buffer.clone();
        let code = dsp.call(&mut buffer, 0)?;
        if code != *want {
            return Err(format!("change {index}: code {code}, not {want}: {block:?}"));
        }
        if code != HEXAGON_OK && buffer != sent {
            return Err(format!("change {index} was refused, and the buffer was written"));
        }
    }
    for (block, length) in [(64, 64), (1 << 20, 64 * 20), (8, 64 * 20)] {
        let code = dsp.call(&mut vec![0; length], block)?;
        if code != HEXAGON_RANGE {
            return Err(format!("a block at {block} of {length}: code {code}"));
        }
    }
    // Its start is at no multiple of 64.
    let code = dsp.call(&mut [0; 100], 0)?;
    if code == HEXAGON_BUFFER { Ok(()) } else { Err(format!("a crooked buffer: code {code}")) }
}
