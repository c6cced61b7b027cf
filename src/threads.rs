//! The thread pool of a runtime: few joins, small tiles, and nobody waits for a thread that sleeps.
//!
//! A phone shares its cores with the app that embeds us. So work is cut into tiles that whoever is free
//! takes (unlike cores then share a matrix well), workers spin briefly and sleep, and the caller
//! waits only for workers that took part: one that the system did not schedule in time simply finds
//! the job closed. A pool is therefore never slower than its caller alone by more than one tile.
//!
//! Every thread begins with a stretch of tiles of its own, and takes from those of others when it is
//! done: weights then stream through each core in one piece, which is how fetching ahead likes them.
//!
//! A host that has threads of its own lends them instead ([`Executor`]); then none is started here.

use crate::cores::CorePolicy;
use crate::error::{Error, Result};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
// What ends a job early: it is set from outside.
use std::sync::atomic::AtomicBool as Flag;
use std::sync::{Arc, Mutex, TryLockError};
#[cfg(not(all(test, loom)))]
use std::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering},
    thread,
};
#[cfg(all(test, loom))]
use {
    loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering},
    loom::{hint::spin_loop, thread},
};

/// Rounds a thread looks for work before it sleeps: some tens of microseconds, which covers the
/// serial stretches between two joins of a token. A model of all orders has no use for them.
const SPINS: u32 = if cfg!(loom) { 0 } else { 4_000 };

/// Set in [`Shared::gate`] while a job may be entered; the bits below count the workers inside.
const OPEN: usize = 1 << 31;

/// Threads of the host: calls `tile(0)` to `tile(tiles - 1)`, each once, on whichever threads, and returns
/// when all have returned.
pub type Executor = Arc<dyn Fn(usize, &(dyn Fn(usize) + Sync)) + Send + Sync>;

/// A fixed set of worker threads; the calling thread is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<thread::JoinHandle<()>>,
    /// The host's threads, and how many it says they are.
    host: Option<(Executor, usize)>,
    /// Held while a job runs. A second caller finds it taken and works alone.
    busy: Mutex<()>,
}

struct Shared {
    /// The job being run; read only between entering and leaving the gate.
    job: AtomicPtr<Job<'static>>,
    gate: AtomicUsize,
    /// Counts jobs, so that a worker enters each at most once.
    epoch: AtomicUsize,
    sleeping: Vec<AtomicBool>,
    /// Workers that may take part; the others sleep.
    limit: AtomicUsize,
    /// The next tile of each thread's stretch, the caller's first.
    next: Vec<Counter>,
    quit: AtomicBool,
}

/// Alone on its cache lines: its thread takes every tile from it, the others look at it rarely.
#[repr(align(128))]
struct Counter(AtomicUsize);

struct Job<'a> {
    tile: &'a (dyn Fn(usize) + Sync),
    interrupt: Option<&'a Flag>,
    tiles: usize,
    /// One for each stretch of tiles.
    next: &'a [Counter],
    panicked: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    caller: thread::Thread,
}

impl Job<'_> {
    /// Takes tiles until none is left, those of stretch `own` first. A panic ends the job early and is kept
    /// for the caller.
    fn work(&self, own: usize) {
        let stretches = self.next.len();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            for stretch in (0..stretches).map(|further| (own + further) % stretches) {
                let end = self.tiles * (stretch + 1) / stretches;
                loop {
                    let index = self.next[stretch].0.fetch_add(1, Ordering::Relaxed);
                    if index >= end {
                        break;
                    }
                    if is_set(self.interrupt) {
                        return;
                    }
                    (self.tile)(index);
                }
            }
        }));
        if let Err(payload) = outcome {
            self.next.iter().for_each(|next| next.0.store(self.tiles, Ordering::Relaxed));
            if let Ok(mut slot) = self.panicked.lock() {
                slot.get_or_insert(payload);
            }
        }
    }
}

thread_local! {
    static INTERRUPT: RefCell<Option<Arc<Flag>>> = const { RefCell::new(None) };
}

/// While it lives, jobs that its thread runs may end early: see [`interruptible`].
#[cfg(feature = "engine")]
pub(crate) struct Interruptible {
    before: Option<Arc<Flag>>,
    of_this_thread: std::marker::PhantomData<*const ()>,
}

/// Jobs that this thread runs from now on leave out the tiles that have not begun once `flag` is set, until
/// the result is dropped. Whoever sets it must not use what they compute: jobs do not tell.
#[cfg(feature = "engine")]
#[must_use = "it holds only as long as this value lives"]
pub(crate) fn interruptible(flag: &Arc<Flag>) -> Interruptible {
    let before = INTERRUPT.replace(Some(Arc::clone(flag)));
    Interruptible { before, of_this_thread: std::marker::PhantomData }
}

#[cfg(feature = "engine")]
impl Drop for Interruptible {
    fn drop(&mut self) {
        // A thread that is ending runs no more jobs.
        let _ = INTERRUPT.try_with(|current| current.replace(self.before.take()));
    }
}

fn is_set(interrupt: Option<&Flag>) -> bool {
    interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed))
}

impl Pool {
    /// A pool of `threads` threads, the caller included; one thread starts none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for 0 or more than 256 threads. A thread that the system refuses is
    /// done without: the pool is then smaller.
    pub fn new(threads: usize) -> Result<Self> {
        Self::on(threads, &CorePolicy::All)
    }

    /// As [`Pool::new`], with the workers on the cores of `policy`. The calling thread is the host's: it
    /// stays where the host has put it.
    ///
    /// # Errors
    /// As [`Pool::new`]. A system that refuses the cores is left to choose them itself.
    pub fn on(threads: usize, policy: &CorePolicy) -> Result<Self> {
        check(threads)?;
        let cores = policy.choose(&affinity::allowed()).map(Arc::new);
        let shared = Arc::new(Shared {
            job: AtomicPtr::new(std::ptr::null_mut()),
            gate: AtomicUsize::new(0),
            epoch: AtomicUsize::new(0),
            sleeping: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            limit: AtomicUsize::new(threads - 1),
            next: (0..threads).map(|_| Counter(AtomicUsize::new(0))).collect(),
            quit: AtomicBool::new(false),
        });
        let workers = (0..threads - 1)
            .map_while(|index| {
                let (shared, cores) = (Arc::clone(&shared), cores.clone());
                thread::Builder::new()
                    .name(format!("nybl-{}", index + 1))
                    .spawn(move || {
                        if let Some(cores) = cores {
                            affinity::stay_on(&cores);
                        }
                        shared.serve(index);
                    })
                    .ok()
            })
            .collect();
        Ok(Self { shared, workers, host: None, busy: Mutex::new(()) })
    }

    /// A pool of the host's `threads` threads, none of its own.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for 0 or more than 256 threads.
    pub fn lent(threads: usize, executor: Executor) -> Result<Self> {
        check(threads)?;
        let mut pool = Self::new(1)?;
        pool.host = Some((executor, threads));
        Ok(pool)
    }

    /// Threads that work on a job, the caller included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.host.as_ref().map_or(self.workers.len() + 1, |(_, threads)| *threads)
    }

    /// Lets at most `threads` threads work on the jobs that follow, the caller included; the rest of
    /// them sleep. Does not change a result. A host's threads are the host's to limit.
    pub fn limit(&self, threads: usize) {
        self.shared.limit.store(threads.max(1) - 1, Ordering::Relaxed);
    }

    /// Calls `tile(0)` to `tile(tiles - 1)`, each once, on any thread of the pool, and returns when
    /// all have returned. A call from inside a tile, or while another thread uses the pool, works on
    /// the calling thread alone.
    ///
    /// # Panics
    /// With the panic of a tile, after every other tile in progress has ended.
    pub fn run(&self, tiles: usize, tile: &(dyn Fn(usize) + Sync)) {
        let interrupt = INTERRUPT.with_borrow(Clone::clone);
        let interrupt = interrupt.as_deref();
        if let (Some((executor, _)), true) = (&self.host, tiles > 1) {
            return run_lent(executor, tiles, &|index| {
                if !is_set(interrupt) {
                    tile(index);
                }
            });
        }
        let busy = match self.busy.try_lock() {
            Ok(guard) if tiles > 1 && !self.workers.is_empty() => Some(guard),
            Err(TryLockError::Poisoned(guard)) if tiles > 1 && !self.workers.is_empty() => {
                Some(guard.into_inner())
            }
            _ => None,
        };
        if busy.is_none() {
            (0..tiles).take_while(|_| !is_set(interrupt)).for_each(tile);
            return;
        }
        let stretches = self.workers.len().min(self.shared.limit.load(Ordering::Relaxed)) + 1;
        let next = &self.shared.next[..stretches];
        for (stretch, next) in next.iter().enumerate() {
            next.0.store(tiles * stretch / stretches, Ordering::Relaxed);
        }
        let job = Job {
            tile,
            interrupt,
            tiles,
            next,
            panicked: Mutex::new(None),
            caller: thread::current(),
        };
        self.open(&job);
        job.work(0);
        self.close();
        let panicked = job.panicked.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(payload) = panicked {
            resume_unwind(payload);
        }
    }

    /// Cuts `data` into chunks of `length` and calls `each(index, chunk)` over the pool.
    pub fn chunks_mut<T: Send>(
        &self,
        data: &mut [T],
        length: usize,
        each: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        let total = data.len();
        let base = SharedMut::new(data.as_mut_ptr());
        self.run(total.div_ceil(length), &|index| {
            let start = index * length;
            let len = length.min(total - start);
            // SAFETY: the chunks of two indices do not overlap, `run` calls each index once, and
            // `data` stays borrowed until it returns.
            each(index, unsafe { std::slice::from_raw_parts_mut(base.get().add(start), len) });
        });
    }
}

impl Pool {
    /// Lets workers in and wakes those that sleep.
    fn open(&self, job: &Job<'_>) {
        self.shared.job.store(std::ptr::from_ref(job).cast_mut().cast(), Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::Relaxed);
        // SeqCst pairs with the worker's "announce sleep, then look once more": at least one of the
        // two sees the other, so no wake-up is lost.
        self.shared.gate.store(OPEN, Ordering::SeqCst);
        let limit = self.shared.limit.load(Ordering::Relaxed);
        for (worker, sleeping) in self.workers.iter().zip(&self.shared.sleeping).take(limit) {
            if sleeping.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    /// Lets no more workers in and waits for those inside.
    fn close(&self) {
        self.shared.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.shared.gate.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS {
                spin_loop();
            } else {
                thread::park();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // Tiles are caught, so a worker does not panic; there is nothing to add if one did.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The life of worker `index`.
    fn serve(&self, index: usize) {
        let mut last = 0;
        let mut spins = 0;
        while !self.quit.load(Ordering::Acquire) {
            if self.has_news(index, last) {
                if let Some(epoch) = self.take_part(index + 1) {
                    last = epoch;
                    spins = 0;
                }
            } else if spins < SPINS {
                spins += 1;
                spin_loop();
            } else {
                self.sleeping[index].store(true, Ordering::SeqCst);
                if !self.has_news(index, last) && !self.quit.load(Ordering::Acquire) {
                    thread::park();
                }
                self.sleeping[index].store(false, Ordering::SeqCst);
                spins = 0;
            }
        }
    }

    fn has_news(&self, index: usize, last: usize) -> bool {
        self.gate.load(Ordering::SeqCst) & OPEN != 0
            && index < self.limit.load(Ordering::Relaxed)
            && self.epoch.load(Ordering::Relaxed) != last
    }

    /// Enters the open job, works on it and leaves; its epoch, or nothing if it closed first.
    fn take_part(&self, own: usize) -> Option<usize> {
        let enter = |gate| (gate & OPEN != 0).then_some(gate + 1);
        self.gate.fetch_update(Ordering::AcqRel, Ordering::Relaxed, enter).ok()?;
        let epoch = self.epoch.load(Ordering::Relaxed);
        // SAFETY: the pointer was stored before the gate opened, and `close` does not return while
        // this worker is counted in the gate, so the job is alive until the subtraction below.
        let job = unsafe { &*self.job.load(Ordering::Relaxed) };
        job.work(own);
        // Cloned before leaving: after it the job, and the handle in it, may be gone.
        let caller = job.caller.clone();
        if self.gate.fetch_sub(1, Ordering::AcqRel) == 1 {
            caller.unpark();
        }
        Some(epoch)
    }
}

fn check(threads: usize) -> Result<()> {
    if threads == 0 || threads > 256 {
        return Err(Error::InvalidArgument(format!("{threads} threads: must be 1 to 256")));
    }
    Ok(())
}

/// Runs a job on the host's threads. A panic must not unwind through them, which may be C's: it is kept
/// and goes on in the caller.
fn run_lent(executor: &Executor, tiles: usize, tile: &(dyn Fn(usize) + Sync)) {
    let panicked = Mutex::new(None);
    let done = AtomicUsize::new(0);
    executor(tiles, &|index| {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| tile(index))) {
            let mut slot = panicked.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            slot.get_or_insert(payload);
        }
        done.fetch_add(1, Ordering::Release);
    });
    if let Some(payload) = panicked.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        resume_unwind(payload);
    }
    let done = done.load(Ordering::Acquire);
    assert!(done == tiles, "the host's executor ran {done} of {tiles} tiles");
}

#[cfg(feature = "engine")]
pub(crate) use affinity::allowed as allowed_cores;

/// Where threads run: only Linux and Android can be asked.
mod affinity {
    /// Cores that a set can name.
    #[cfg(all(any(target_os = "linux", target_os = "android"), not(miri)))]
    const MOST: usize = 1024;

    /// The cores this thread may run on.
    #[cfg(all(any(target_os = "linux", target_os = "android"), not(miri)))]
    pub(crate) fn allowed() -> Vec<usize> {
        // SAFETY: all zeros is an empty set; the call writes one set.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) != 0 {
                return Vec::new();
            }
            (0..MOST).filter(|core| libc::CPU_ISSET(*core, &set)).collect()
        }
    }

    /// Keeps the calling thread on `cores`; a refusal leaves it where it is.
    #[cfg(all(any(target_os = "linux", target_os = "android"), not(miri)))]
    pub(super) fn stay_on(cores: &[usize]) {
        // SAFETY: all zeros is an empty set; the call reads one set. Only numbers below the size of a set
        // get into it.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            for core in cores.iter().filter(|core| **core < MOST) {
                libc::CPU_SET(*core, &mut set);
            }
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
        }
    }

    #[cfg(not(all(any(target_os = "linux", target_os = "android"), not(miri))))]
    pub(crate) fn allowed() -> Vec<usize> {
        Vec::new()
    }

    #[cfg(not(all(any(target_os = "linux", target_os = "android"), not(miri))))]
    pub(super) fn stay_on(_: &[usize]) {}
}

/// A pointer that tiles may share because each uses its own part of what it points to.
pub(crate) struct SharedMut<T>(*mut T);

// SAFETY: the pointer is only handed out by `get`, and each use states why its part is disjoint.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(pointer: *mut T) -> Self {
        Self(pointer)
    }
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

/// The pool under [loom](https://docs.rs/loom), which runs every order of its threads' steps and every value that
/// the memory model lets an atomic load see: `RUSTFLAGS="--cfg loom" cargo test --lib threads::model`.
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::cell::UnsafeCell;

    /// What tiles write and the caller reads, without synchronisation of its own: loom reports every access that
    /// the pool does not order.
    struct Cells(Vec<UnsafeCell<usize>>);

    // SAFETY: loom runs one thread at a time.
    unsafe impl Sync for Cells {}

    impl Cells {
        fn new(count: usize) -> Self {
            Self((0..count).map(|_| UnsafeCell::new(0)).collect())
        }
        fn add(&self, index: usize) {
            // SAFETY: loom has checked that nobody else has it.
            self.0[index].with_mut(|cell| unsafe { *cell += 1 });
        }
        fn all_are(&self, count: usize) {
            // SAFETY: loom has checked that nobody writes it.
            self.0.iter().for_each(|cell| cell.with(|cell| assert_eq!(unsafe { *cell }, count)));
        }
    }

    /// Each tile of each job runs once, its writes are seen when `run` returns, no worker is in a job by then, and
    /// every worker ends with its pool.
    fn check(threads: usize, jobs: usize, tiles: usize, limits: &'static [usize]) {
        let mut model = loom::model::Builder::new();
        // With a third thread, all orders with three take minutes.
        model.preemption_bound = Some(if threads > 2 { 2 } else { 3 });
        model.check(move || {
            let pool = Pool::new(threads).unwrap();
            let kept = Cells::new(tiles);
            for job in 0..jobs {
                if let Some(limit) = limits.get(job) {
                    pool.limit(*limit);
                }
                let cells = Cells::new(tiles);
                pool.run(tiles, &|index| {
                    cells.add(index);
                    kept.add(index);
                });
                cells.all_are(1);
                kept.all_are(job + 1);
            }
        });
    }

    #[test]
    fn one_job_on_two_threads() {
        check(2, 1, 3, &[]);
    }

    #[test]
    fn jobs_after_each_other() {
        check(2, 2, 2, &[]);
    }

    #[test]
    fn a_worker_kept_out_and_let_in() {
        check(2, 2, 2, &[1, 2]);
    }

    #[test]
    fn one_job_on_three_threads() {
        check(3, 1, 2, &[]);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_tile_runs_once_at_any_thread_count() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads).unwrap();
            let rounds = if cfg!(miri) { 5 } else { 2_000 };
            for tiles in (0..rounds).map(|round| round % 67) {
                let counts: Vec<_> = (0..tiles).map(|_| AtomicU32::new(0)).collect();
                pool.run(tiles, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn workers_that_slept_wake_up() {
        let pool = Pool::new(2).unwrap();
        for _ in 0..3 {
            thread::sleep(std::time::Duration::from_millis(20));
            let mut data = vec![0_usize; 100];
            pool.chunks_mut(&mut data, 7, &|index, chunk| chunk.fill(index));
            assert!(data.iter().enumerate().all(|(i, &x)| x == i / 7));
        }
    }

    #[test]
    fn two_callers_and_nested_calls_do_not_block() {
        let pool = Pool::new(3).unwrap();
        let total = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    pool.run(10, &|_| {
                        pool.run(10, &|_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 200);
    }

    #[cfg(feature = "engine")]
    #[test]
    fn an_interrupted_job_ends_after_the_tiles_that_had_begun() {
        let flag = Arc::new(AtomicBool::new(false));
        let executor: Executor = Arc::new(|tiles, tile| (0..tiles).for_each(tile));
        let pools = [Pool::new(1), Pool::new(3), Pool::lent(2, executor)];
        for pool in pools.map(Result::unwrap) {
            let ran = |watched: bool| {
                flag.store(false, Ordering::Relaxed);
                let _watch = watched.then(|| interruptible(&flag));
                let count = AtomicU32::new(0);
                pool.run(1000, &|_| {
                    count.fetch_add(1, Ordering::Relaxed);
                    flag.store(true, Ordering::Relaxed);
                });
                count.into_inner()
            };
            // One for each thread at most, and all of them where nobody watches.
            assert!((1..=3).contains(&ran(true)));
            assert_eq!(ran(false), 1000);
        }
    }

    #[test]
    fn a_panic_in_a_tile_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3).unwrap();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(50, &|i| assert!(i != 20, "tile twenty"));
        }));
        assert!(outcome.is_err());
        let mut data = vec![1_u8; 10];
        pool.chunks_mut(&mut data, 1, &|_, x| x[0] = 2);
        assert_eq!(data, [2; 10]);
    }

    #[test]
    fn a_limit_keeps_workers_out_and_lets_them_in_again() {
        let pool = Pool::new(4).unwrap();
        let seen = |limit| {
            pool.limit(limit);
            let names = Mutex::new(std::collections::BTreeSet::new());
            for _ in 0..if cfg!(miri) { 2 } else { 200 } {
                pool.run(8, &|_| {
                    let name = thread::current().name().map(str::to_owned);
                    names.lock().unwrap().insert(name);
                    thread::yield_now();
                });
            }
            names.into_inner().unwrap().len()
        };
        assert_eq!(seen(1), 1);
        assert!(seen(2) <= 2);
        assert!(seen(4) <= 4);
    }

    #[test]
    fn the_hosts_threads_do_all_the_work() {
        let executor: Executor = Arc::new(|tiles, tile| {
            thread::scope(|scope| {
                scope.spawn(|| (0..tiles / 2).for_each(tile));
                (tiles / 2..tiles).for_each(tile);
            });
        });
        let pool = Pool::lent(2, executor).unwrap();
        assert_eq!(pool.threads(), 2);
        let mut data = vec![0_usize; 100];
        pool.chunks_mut(&mut data, 7, &|index, chunk| chunk.fill(index));
        assert!(data.iter().enumerate().all(|(i, &x)| x == i / 7));
        // A panic reaches the caller, not the host's thread; a host that leaves tiles out is found out.
        let broken = catch_unwind(AssertUnwindSafe(|| pool.run(4, &|i| assert!(i != 0, "zero"))));
        assert!(broken.is_err());
        let lazy = Pool::lent(2, Arc::new(|_, tile| tile(0))).unwrap();
        assert!(catch_unwind(AssertUnwindSafe(|| lazy.run(2, &|_| {}))).is_err());
    }

    #[cfg(all(target_os = "linux", not(miri)))]
    #[test]
    fn workers_stay_on_their_cores() {
        let core = *affinity::allowed().last().unwrap();
        let pool = Pool::on(3, &CorePolicy::These(vec![core])).unwrap();
        let here = thread::current().id();
        for _ in 0..100 {
            pool.run(6, &|_| {
                if thread::current().id() != here {
                    assert_eq!(affinity::allowed(), [core]);
                }
                thread::yield_now();
            });
        }
        assert!(
            affinity::allowed().len() > 1 || thread::available_parallelism().unwrap().get() == 1
        );
    }

    #[test]
    fn absurd_thread_counts_are_refused() {
        assert!(Pool::new(0).is_err() && Pool::new(100_000).is_err());
    }
}
