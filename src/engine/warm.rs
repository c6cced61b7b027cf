//! Bringing a mapped model into memory in the order in which it will be used.
//!
//! A mapping costs nothing to make, and then every first touch of a page waits for the disk, in
//! whatever order threads happen to touch. A thread that reads the file from front to back, layer by
//! layer, lets a generation start as soon as its first layers are there; a pass that comes to a layer
//! too early waits for exactly that one. Pages that another process, or this one's last run, has left
//! in the system's cache are only entered in the tables.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::file::source::Source;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes between two looks at whether to go on.
const STRETCH: usize = 4 << 20;

/// Told how many bytes of how many are there; answers whether to go on.
pub type Progress = Box<dyn FnMut(u64, u64) -> bool + Send>;

/// What is to be read for one stage of a pass: parts of files, in order.
pub type Stage = Vec<(Source, Range<usize>)>;

/// A thread that reads stages, and those who wait for them.
pub struct Warming {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    /// Stages that are there; `usize::MAX` when nobody has to wait any more.
    ready: AtomicUsize,
    stop: AtomicBool,
    bytes: AtomicUsize,
    total: usize,
    gate: Mutex<()>,
    moved: Condvar,
}

impl Warming {
    /// Starts to read.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses a thread.
    pub fn start(stages: Vec<Stage>, mut progress: Option<Progress>) -> Result<Self> {
        let total = stages.iter().flatten().map(|(_, range)| range.len()).sum();
        let shared = Arc::new(Shared {
            ready: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            bytes: AtomicUsize::new(0),
            total,
            gate: Mutex::new(()),
            moved: Condvar::new(),
        });
        let reader = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("nybl-load".into()).spawn(move || {
            // Nobody may wait for a reader that is gone, whatever ended it: pages come by themselves, too.
            let _done = Release(&reader);
            for stage in &stages {
                if !reader.read(stage, &mut progress) {
                    return;
                }
                reader.advance(reader.ready.load(Ordering::Relaxed) + 1);
            }
        });
        let thread = thread.map_err(|reason| Error::io("the loading thread", &reason))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Whether `stage` is there, without waiting.
    #[must_use]
    pub fn is_ready(&self, stage: usize) -> bool {
        self.shared.ready.load(Ordering::Acquire) > stage
    }

    /// Waits for `stage`, as long as `timeout` allows; whether it is there. After a stop nothing is
    /// waited for.
    #[must_use]
    pub fn wait(&self, stage: usize, timeout: Option<Duration>) -> bool {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut guard = lock(&self.shared.gate);
        while !self.is_ready(stage) {
            let left = match deadline {
                None => Duration::from_secs(1),
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
            };
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.moved.wait_timeout(guard, left);
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Bytes read, of how many.
    #[must_use]
    pub fn bytes(&self) -> (usize, usize) {
        (self.shared.bytes.load(Ordering::Relaxed), self.shared.total)
    }

    /// Ends the reading: what is not there yet is then read when it is touched.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = lock(&self.thread).take() {
            // From inside the progress callback the thread cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() {
                // A panic of the host's callback was the host's to see.
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Warming {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    /// Reads a stage; whether to go on.
    fn read(&self, stage: &Stage, progress: &mut Option<Progress>) -> bool {
        for (source, range) in stage {
            for start in range.clone().step_by(STRETCH) {
                if self.stop.load(Ordering::Relaxed) {
                    return false;
                }
                let end = (start + STRETCH).min(range.end);
                source.prefetch(start..end);
                let bytes = self.bytes.fetch_add(end - start, Ordering::Relaxed) + end - start;
                if let Some(progress) = progress
                    && !progress(bytes as u64, self.total as u64)
                {
                    return false;
                }
            }
        }
        true
    }

    fn advance(&self, ready: usize) {
        let _guard = lock(&self.gate);
        self.ready.store(ready, Ordering::Release);
        self.moved.notify_all();
    }
}

/// Lets everybody through when the reader ends.
struct Release<'a>(&'a Shared);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        self.0.advance(usize::MAX);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn stages(count: usize, bytes: usize) -> Vec<Stage> {
        let source = Source::from_vec("weights", vec![1; count * bytes]);
        (0..count).map(|i| vec![(source.clone(), i * bytes..(i + 1) * bytes)]).collect()
    }

    #[test]
    fn stages_come_in_order_and_are_waited_for() {
        let (send, receive) = channel();
        let (go, wait) = channel::<()>();
        let progress: Progress = Box::new(move |bytes, total| {
            send.send((bytes, total)).unwrap();
            wait.recv().is_ok()
        });
        let warming = Warming::start(stages(3, 1000), Some(progress)).unwrap();
        assert_eq!(receive.recv().unwrap(), (1000, 3000));
        // The reader hangs in the callback of the first stage.
        assert!(!warming.wait(0, Some(Duration::from_millis(5))));
        go.send(()).unwrap();
        assert!(warming.wait(0, None) && !warming.is_ready(1));
        go.send(()).unwrap();
        go.send(()).unwrap();
        assert!(warming.wait(2, None));
        assert_eq!(warming.bytes(), (3000, 3000));
    }

    #[test]
    fn nobody_waits_for_a_reader_that_was_stopped() {
        let warming = Warming::start(stages(3, 1000), Some(Box::new(|_, _| false))).unwrap();
        assert!(warming.wait(2, None));
        let warming = Warming::start(stages(3, 1000), None).unwrap();
        warming.stop();
        assert!(warming.wait(2, None));
        let panics: Progress = Box::new(|_, _| panic!("in the host"));
        assert!(Warming::start(stages(3, 1000), Some(panics)).unwrap().wait(2, None));
    }
}
