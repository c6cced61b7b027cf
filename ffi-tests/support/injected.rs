//! Counts the faults that a test injects and those that were survived; `--nocapture` shows them.

/// Faults of one kind.
pub(crate) struct Injected {
    kind: &'static str,
    injected: usize,
    survived: usize,
}

impl Injected {
    pub(crate) fn of(kind: &'static str) -> Self {
        Self { kind, injected: 0, survived: 0 }
    }

    /// Said before a fault is injected.
    pub(crate) fn another(&mut self) {
        self.more(1);
    }

    pub(crate) fn more(&mut self, count: usize) {
        self.injected += count;
    }

    pub(crate) fn count(&self) -> usize {
        self.injected
    }

    /// Said when what must hold after the fault was seen to hold.
    pub(crate) fn survived(&mut self) {
        self.survived += 1;
    }

    /// The same of all that were injected, where only what comes after the last one shows it.
    pub(crate) fn all_survived(&mut self) {
        self.survived = self.injected;
    }

    /// The end of the test, which is worth nothing if it injected none.
    pub(crate) fn told(self) {
        let Self { kind, injected, survived } = self;
        assert!(injected > 0 && injected == survived, "{kind}: {injected}, {survived} survived");
        eprintln!("injected: {kind}: {injected}, survived: {survived}");
    }
}
