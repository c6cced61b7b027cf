//! Four sessions at once, for long: they append, generate, are cancelled, fork, go to files and come back, under a
//! budget that does not hold them all, while heat and memory pressure come at random. Every text must be what the
//! same tokens give alone, bit for bit, and memory must not grow.
//!
//! `NYBL_SOAK_TURNS` for how long (200 for each session otherwise), `NYBL_SEED` for another course.

#[path = "support/mod.rs"]
mod support;

use nybl::Error;
use nybl::engine::cache::KvLimit;
use nybl::engine::governor::{Heat, PowerMode, ThermalLevel};
use nybl::engine::load::Model;
use nybl::engine::pressure::Pressure;
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::engine::speculate::Speculator;
use nybl::kernel::KvFormat;
use nybl::memory::{Hooks, Memory};
use nybl::spec::control::Controller;
use nybl::spec::draft::Ngram;
use nybl::spec::random::Random;
use nybl::text::sample::SamplerConfig;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const SESSIONS: u64 = 4;
const CONTEXT: usize = 220;

fn number(variable: &str, usual: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Bytes that the runtime under test has taken and not given back.
static OUT: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn alloc(_: *mut c_void, size: usize, align: usize) -> *mut c_void {
    OUT.fetch_add(size, Ordering::Relaxed);
    // SAFETY: never asked for nothing.
    unsafe { std::alloc::alloc(Layout::from_size_align(size, align).unwrap()).cast() }
}

unsafe extern "C" fn free(_: *mut c_void, data: *mut c_void, size: usize, align: usize) {
    OUT.fetch_sub(size, Ordering::Relaxed);
    // SAFETY: it came from `alloc` with the same size and alignment.
    unsafe { std::alloc::dealloc(data.cast(), Layout::from_size_align(size, align).unwrap()) };
}

/// Bytes that the whole program has allocated and not freed.
static LIVE: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: the system's allocator, with a counter beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, data: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(data, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn packed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nursery.nybl")
}

fn folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("soak");
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<usize>().ok()).unwrap_or(0) * 1024
}

/// A session, how many random numbers it has taken, and what it is compared with.
struct Player {
    model: Arc<Model>,
    session: Speculator,
    config: SessionConfig,
    draws: u64,
    /// The same file in a runtime of its own.
    alone: Arc<Model>,
    dice: Random,
    file: PathBuf,
    /// How often what happened.
    counts: [usize; 10],
}

impl Player {
    fn new(index: u64, model: Arc<Model>, seed: u64) -> Self {
        let limit = KvLimit {
            // Room for a good half of what the sessions come to; the rest is on its way.
            memory: 3 * 220 * model.config().kv_shape().token_bytes(KvFormat::F32) / 2,
            spill_folder: Some(folder()),
            spill: 64 << 20,
        };
        let kv_format = if index == 3 { KvFormat::I8 } else { KvFormat::F32 };
        let temperature = if index == 2 { 0.0 } else { 1.0 };
        let sampler = SamplerConfig { temperature, seed: index, ..SamplerConfig::default() };
        let config = SessionConfig {
            context: CONTEXT,
            prefill_chunk: [0, 7, 32, 64][index as usize],
            sampler,
            kv_format,
            kv_limit: Some(limit),
            ..SessionConfig::default()
        };
        let session = Speculator::plain(Session::new(Arc::clone(&model), &config).unwrap());
        let runtime =
            Arc::new(Runtime::new(&RuntimeConfig { threads: 1, ..Default::default() }).unwrap());
        let alone = Model::open_path(runtime, &packed()).unwrap();
        let file = folder().join(format!("session{index}"));
        let dice = Random(seed ^ (index << 32));
        Self { model, session, config, draws: 0, alone, dice, file, counts: [0; 10] }
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.dice.bits() % sides
    }

    /// What the tokens so far give when nothing else happens.
    fn alone(&self, count: usize) -> Vec<Next> {
        self.alone.trim();
        let mut random = Random(self.config.sampler.seed);
        (0..self.draws).for_each(|_| _ = random.bits());
        let sampler = SamplerConfig { seed: random.0, ..self.config.sampler };
        let config =
            SessionConfig { sampler, kv_limit: None, prefill_chunk: 0, ..self.config.clone() };
        let mut session = Session::new(Arc::clone(&self.alone), &config).unwrap();
        session.append(self.session.tokens()).unwrap();
        (0..count).map(|_| session.next().unwrap()).collect()
    }

    /// What may keep a call from working, and then has changed nothing.
    fn excuse(&mut self, error: &Error) {
        match error {
            Error::Cancelled => self.counts[8] += 1,
            Error::ThermalPause { .. } => {
                self.counts[9] += 1;
                std::thread::sleep(std::time::Duration::from_micros(200));
                if self.roll(3) == 0 {
                    self.heat(Some(40.0));
                }
            }
            // The others hold what there is, in memory and on its way.
            Error::KvExhausted { .. } | Error::ContextFull { .. } => {}
            other => panic!("{other}"),
        }
    }

    fn heat(&mut self, celsius: Option<f32>) {
        let level = (self.roll(4) == 0).then_some(ThermalLevel::Nominal);
        self.model.runtime().report_heat(Heat { celsius, level, headroom: None }).unwrap();
    }

    fn append(&mut self) {
        let before = self.session.tokens().to_vec();
        let count = 1 + self.roll(60) as usize;
        // Few different texts, so that prefixes are found; all from the start of the same long one.
        let text: Vec<u32> = (before.len()..before.len() + count)
            .map(|at| 5 + (at as u32 * 7 + self.roll(8) as u32 / 7) % 300)
            .collect();
        match self.session.append(&text) {
            Ok(()) => assert_eq!(self.session.tokens(), [before, text].concat()),
            Err(error) => {
                assert_eq!(self.session.tokens(), before);
                self.excuse(&error);
            }
        }
    }

    fn generate(&mut self) {
        if self.session.tokens().is_empty() {
            return;
        }
        let count = 1 + self.roll(16) as usize;
        let wanted = self.alone(count);
        let mut made = 0;
        while made < count {
            let before = self.session.tokens().len();
            match self.session.next() {
                Ok(next) => {
                    assert_eq!(next, wanted[made], "token {made} after {before}");
                    made += 1;
                    self.draws += u64::from(!self.config.sampler.is_greedy());
                }
                Err(error) => {
                    assert_eq!(self.session.tokens().len(), before);
                    self.excuse(&error);
                    if matches!(error, Error::KvExhausted { .. }) {
                        return;
                    }
                }
            }
        }
    }

    /// A cancellation from another thread, at any moment of what comes next.
    fn cancel(&mut self) {
        let canceller = self.session.canceller();
        let pause = std::time::Duration::from_micros(self.roll(2_000));
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(pause);
                canceller.cancel();
            });
            if self.roll(2) == 0 { self.append() } else { self.generate() }
        });
    }

    fn fork(&mut self) {
        let fork = match self.session.fork() {
            Ok(fork) => fork,
            Err(error) => return self.excuse(&error),
        };
        let first = std::mem::replace(&mut self.session, fork);
        let draws = self.draws;
        self.generate();
        if self.roll(2) == 0 {
            // The first one has noticed nothing.
            (self.session, self.draws) = (first, draws);
            self.generate();
        }
    }

    fn save(&mut self) {
        let before = self.session.tokens().to_vec();
        match self.session.settled().save(&self.file) {
            Ok(()) => {}
            Err(Error::InvalidArgument(_)) if before.is_empty() => {}
            Err(error) => self.excuse(&error),
        }
        assert_eq!(self.session.tokens(), before);
    }

    fn restore(&mut self) {
        let before = self.session.tokens().to_vec();
        if self.file.exists() {
            if let Err(error) = self.session.settled().restore(&self.file) {
                assert_eq!(self.session.tokens(), before);
                self.excuse(&error);
            }
            self.generate();
        }
    }

    fn turn(&mut self) {
        let what = self.roll(16);
        self.counts[usize::min(what as usize, 7)] += 1;
        match what {
            0 => self.cancel(),
            1 => self.fork(),
            2 => self.save(),
            3 => self.restore(),
            4 => {
                let len = self.roll(CONTEXT as u64) as usize;
                self.session.truncate(len);
            }
            5 if self.roll(4) == 0 => self.session.reset(),
            6 => {
                let pressure = [Pressure::Moderate, Pressure::High, Pressure::Critical];
                let pressure = pressure[self.roll(3) as usize];
                self.model.runtime().relieve(pressure);
            }
            7 => {
                let celsius = [None, Some(38.0), Some(44.0), Some(46.0), Some(48.0), Some(51.0)];
                let celsius = celsius[self.roll(6) as usize];
                self.heat(celsius);
                let modes = [PowerMode::Foreground, PowerMode::Background, PowerMode::LowPower];
                let mode = modes[(self.roll(9) / 4) as usize];
                self.model.runtime().set_power_mode(mode);
            }
            8 if self.roll(2) == 0 => self.session.detach(),
            8 => self.session.attach(Box::new(Ngram::new()), Controller::always()).unwrap(),
            9..=11 => self.append(),
            _ => self.generate(),
        }
        let limit = self.config.kv_limit.as_ref().map_or(0, |limit| limit.memory);
        let held = self.session.bytes().0;
        assert!(held <= limit, "{held} bytes of keys and values of {limit}");
    }
}

#[test]
fn sessions_live_long_and_say_what_they_say_alone() {
    let turns = number("NYBL_SOAK_TURNS", SESSIONS * 200) / SESSIONS;
    let seed = number("NYBL_SEED", 1);
    // SAFETY: they are an allocator for any thread, and live as long as the program.
    let memory =
        unsafe { Memory::from_hooks(Hooks { context: std::ptr::null_mut(), alloc, free }) };
    let config = RuntimeConfig { threads: 2, memory: memory.clone(), ..RuntimeConfig::default() };
    let model = {
        let _memory = memory.enter();
        Model::open_path(Arc::new(Runtime::new(&config).unwrap()), &packed()).unwrap()
    };
    // Memory is looked at after each tenth, when all sessions rest.
    let mut marks = Vec::new();
    let mut players: Vec<Player> = {
        let _memory = memory.enter();
        (0..SESSIONS).map(|index| Player::new(index, Arc::clone(&model), seed)).collect()
    };
    for _ in 0..10 {
        std::thread::scope(|scope| {
            for player in &mut players {
                let memory = memory.clone();
                scope.spawn(move || {
                    let _memory = memory.enter();
                    (0..turns / 10).for_each(|_| player.turn());
                });
            }
        });
        for player in &mut players {
            player.session.reset();
            player.session.detach();
            player.alone.trim();
        }
        model.trim();
        marks.push([OUT.load(Ordering::Relaxed), LIVE.load(Ordering::Relaxed), resident()]);
    }
    let counts: Vec<_> = players.iter().map(|player| player.counts).collect();
    eprintln!(
        "{turns} turns each; buffers, all that is allocated, and resident after each tenth: {marks:?}"
    );
    eprintln!(
        "cancel, fork, save, restore, truncate, reset, pressure, others; cancelled, paused: {counts:?}"
    );
    assert!(marks.iter().all(|mark| mark[0] == marks[0][0]), "buffers came and stayed: {marks:?}");
    // Lists keep the room that they once needed, and by the third tenth they have needed most of it.
    let (early, late) = (marks[2][1], marks[9][1]);
    assert!(late < early + (64 << 10), "{early} bytes were allocated and then {late}");
    drop(players);
    drop(model);
    assert_eq!(OUT.load(Ordering::Relaxed), 0, "buffers that nobody gave back");
    std::fs::remove_dir_all(folder()).unwrap();
}
