//! The thread pool of a runtime: few joins, small tiles, and nobody waits for a thread that sleeps.
//!
//! A phone shares its cores with the app that embeds us. So work is cut into tiles taken from one
//! counter (unlike cores then share a matrix well), workers spin briefly and sleep, and the caller
//! waits only for workers that took part: one that the system did not schedule in time simply finds
//! the job closed. A pool is therefore never slower than its caller alone by more than one tile.

use crate::error::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{JoinHandle, Thread};

/// Rounds a thread looks for work before it sleeps: some tens of microseconds, which covers the
/// serial stretches between two joins of a token.
const SPINS: u32 = 4_000;

/// Set in [`Shared::gate`] while a job may be entered; the bits below count the workers inside.
const OPEN: usize = 1 << 31;

/// A fixed set of worker threads; the calling thread is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
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
    quit: AtomicBool,
}

struct Job<'a> {
    tile: &'a (dyn Fn(usize) + Sync),
    tiles: usize,
    next: AtomicUsize,
    panicked: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    caller: Thread,
}

impl Job<'_> {
    /// Takes tiles until none is left. A panic ends the job early and is kept for the caller.
    fn work(&self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= self.tiles {
                    return;
                }
                (self.tile)(index);
            }
        }));
        if let Err(payload) = outcome {
            self.next.store(self.tiles, Ordering::Relaxed);
            if let Ok(mut slot) = self.panicked.lock() {
                slot.get_or_insert(payload);
            }
        }
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller included; one thread starts none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for 0 or more than 256 threads. A thread that the system refuses is
    /// done without: the pool is then smaller.
    pub fn new(threads: usize) -> Result<Self> {
        if threads == 0 || threads > 256 {
            return Err(Error::InvalidArgument(format!("{threads} threads: must be 1 to 256")));
        }
        let shared = Arc::new(Shared {
            job: AtomicPtr::new(std::ptr::null_mut()),
            gate: AtomicUsize::new(0),
            epoch: AtomicUsize::new(0),
            sleeping: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            quit: AtomicBool::new(false),
        });
        let workers = (0..threads - 1)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("nybl-{}", index + 1))
                    .spawn(move || shared.serve(index))
                    .ok()
            })
            .collect();
        Ok(Self { shared, workers, busy: Mutex::new(()) })
    }

    /// Threads that work on a job, the caller included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `tile(0)` to `tile(tiles - 1)`, each once, on any thread of the pool, and returns when
    /// all have returned. A call from inside a tile, or while another thread uses the pool, works on
    /// the calling thread alone.
    ///
    /// # Panics
    /// With the panic of a tile, after every other tile in progress has ended.
    pub fn run(&self, tiles: usize, tile: &(dyn Fn(usize) + Sync)) {
        let busy = match self.busy.try_lock() {
            Ok(guard) if tiles > 1 && !self.workers.is_empty() => Some(guard),
            Err(TryLockError::Poisoned(guard)) if tiles > 1 && !self.workers.is_empty() => {
                Some(guard.into_inner())
            }
            _ => None,
        };
        if busy.is_none() {
            (0..tiles).for_each(tile);
            return;
        }
        let job = Job {
            tile,
            tiles,
            next: AtomicUsize::new(0),
            panicked: Mutex::new(None),
            caller: std::thread::current(),
        };
        self.open(&job);
        job.work();
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
        for (worker, sleeping) in self.workers.iter().zip(&self.shared.sleeping) {
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
                std::hint::spin_loop();
            } else {
                std::thread::park();
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
            if self.has_news(last) {
                if let Some(epoch) = self.take_part() {
                    last = epoch;
                    spins = 0;
                }
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                self.sleeping[index].store(true, Ordering::SeqCst);
                if !self.has_news(last) && !self.quit.load(Ordering::Acquire) {
                    std::thread::park();
                }
                self.sleeping[index].store(false, Ordering::SeqCst);
                spins = 0;
            }
        }
    }

    fn has_news(&self, last: usize) -> bool {
        self.gate.load(Ordering::SeqCst) & OPEN != 0 && self.epoch.load(Ordering::Relaxed) != last
    }

    /// Enters the open job, works on it and leaves; its epoch, or nothing if it closed first.
    fn take_part(&self) -> Option<usize> {
        let enter = |gate| (gate & OPEN != 0).then_some(gate + 1);
        self.gate.fetch_update(Ordering::AcqRel, Ordering::Relaxed, enter).ok()?;
        let epoch = self.epoch.load(Ordering::Relaxed);
        // SAFETY: the pointer was stored before the gate opened, and `close` does not return while
        // this worker is counted in the gate, so the job is alive until the subtraction below.
        let job = unsafe { &*self.job.load(Ordering::Relaxed) };
        job.work();
        // Cloned before leaving: after it the job, and the handle in it, may be gone.
        let caller = job.caller.clone();
        if self.gate.fetch_sub(1, Ordering::AcqRel) == 1 {
            caller.unpark();
        }
        Some(epoch)
    }
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

#[cfg(test)]
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
            std::thread::sleep(std::time::Duration::from_millis(20));
            let mut data = vec![0_usize; 100];
            pool.chunks_mut(&mut data, 7, &|index, chunk| chunk.fill(index));
            assert!(data.iter().enumerate().all(|(i, &x)| x == i / 7));
        }
    }

    #[test]
    fn two_callers_and_nested_calls_do_not_block() {
        let pool = Pool::new(3).unwrap();
        let total = AtomicU32::new(0);
        std::thread::scope(|scope| {
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
    fn absurd_thread_counts_are_refused() {
        assert!(Pool::new(0).is_err() && Pool::new(100_000).is_err());
    }
}
