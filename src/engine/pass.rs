//! What stands between a session and a forward pass: a host that cancels, layers that are still being
//! read, and the pauses of the governor.
#![forbid(unsafe_code)]

use super::warm::Warming;
use crate::error::{Error, Result};
use crate::model::forward::Gate;
use crate::threads::{Interruptible, interruptible};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a wait goes on without a look at whether it was cancelled.
const PATIENCE: Duration = Duration::from_millis(5);

/// Cancels a call on a session, from any thread.
///
/// The call in progress, or when there is none the next one, ends with [`Error::Cancelled`] before its next
/// step of a layer, and has then changed nothing; the call after it goes on as if nothing had been.
#[derive(Clone, Debug, Default)]
pub struct Canceller(Arc<AtomicBool>);

impl Canceller {
    /// Cancels.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Lets a cancellation end the steps of this thread's passes themselves, between tiles. A pass that has come to
    /// its end must ask [`Canceller::check`] before its results are used.
    pub(super) fn watch(&self) -> Interruptible {
        interruptible(&self.0)
    }

    /// Ends the call that asks, once for each cancellation.
    pub(super) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        Ok(())
    }

    /// Sleeps, unless cancelled.
    pub(super) fn sleep(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(PATIENCE));
        }
    }
}

/// The gate of one pass.
pub(super) struct Door<'a> {
    pub(super) canceller: &'a Canceller,
    /// The reader of the model's layers, as long as it reads.
    pub(super) warming: Option<&'a Warming>,
}

impl Gate for Door<'_> {
    fn pass(&self, layer: usize) -> Result<()> {
        self.canceller.check()?;
        if let Some(warming) = self.warming {
            while !warming.is_ready(layer) && !warming.wait(layer, Some(PATIENCE)) {
                self.canceller.check()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cancellation_ends_one_call() {
        let canceller = Canceller::default();
        let door = Door { canceller: &canceller, warming: None };
        assert!(door.pass(0).is_ok());
        canceller.clone().cancel();
        assert_eq!(door.pass(3), Err(Error::Cancelled));
        assert!(door.pass(3).is_ok());
    }

    #[test]
    fn sleep_and_waiting_for_a_layer_end_early() {
        let canceller = Canceller::default();
        assert!(canceller.sleep(Duration::from_millis(1)).is_ok());
        std::thread::scope(|scope| {
            let other = canceller.clone();
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(10));
                other.cancel();
            });
            assert_eq!(canceller.sleep(Duration::from_secs(3600)), Err(Error::Cancelled));
        });
        let (send, hang) = std::sync::mpsc::channel::<()>();
        let source = crate::file::source::Source::from_vec("weights", vec![0; 10]);
        let progress: super::super::warm::Progress = Box::new(move |_, _| hang.recv().is_ok());
        let warming = Warming::start(vec![vec![(source, 0..10)]], Some(progress)).unwrap();
        canceller.cancel();
        let door = Door { canceller: &canceller, warming: Some(&warming) };
        assert_eq!(door.pass(0), Err(Error::Cancelled));
        send.send(()).unwrap();
        assert!(door.pass(0).is_ok());
    }
}
