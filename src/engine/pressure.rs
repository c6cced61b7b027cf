//! Giving memory back when the system asks for it: what costs least to get again goes first.
//!
//! Cached prompts that no session holds are computed again, if they come again. Keys and values of sessions
//! go to their spill file and come back when the session goes on. Pages of weights are read again from
//! the model's file. Nothing of this changes a token.
//!
//! Whoever reports pressure may be the thread that draws the screen. So nobody waits for a
//! session that is inside a pass: its cache is seen to by that session, when the pass is over.
#![forbid(unsafe_code)]

/// How badly the system wants memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// It does not.
    #[default]
    None,
    /// Some: cached prefixes go. Android's `TRIM_MEMORY_RUNNING_LOW`.
    Moderate,
    /// Much: keys and values go to their spill files as well. Apple's memory warning.
    High,
    /// All that can be given: the pages of weights as well. Android's `TRIM_MEMORY_COMPLETE`.
    Critical,
}

/// What was given back, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Cached keys and values that no session held.
    pub prefixes: usize,
    /// Keys and values that went to a spill file.
    pub spilled: usize,
    /// Weights, at most: those of pages that were there.
    pub pages: usize,
    /// Caches that a session is working in; it gives back what they have when its pass is over.
    pub deferred: usize,
}

impl Freed {
    /// All of it.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.prefixes + self.spilled + self.pages
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.prefixes += other.prefixes;
        self.spilled += other.spilled;
        self.pages += other.pages;
        self.deferred += other.deferred;
    }
}
