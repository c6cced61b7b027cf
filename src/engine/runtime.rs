//! What would otherwise be global: the threads and the chosen kernels. Two runtimes share nothing.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::isa::Isa;
use crate::kernel::Kernels;
use crate::memory::Memory;
use crate::threads::Pool;

/// Settings of a [`Runtime`].
#[derive(Clone, Debug, Default)]
pub struct RuntimeConfig {
    /// Threads to compute with, the calling one included; 0 for one on each available core.
    pub threads: usize,
    /// The strongest instruction set to use, as [`Isa::up_to`] names it; none for all this CPU has
    /// (and `NYBL_ISA` allows).
    pub isa: Option<String>,
    /// Where buffers come from.
    pub memory: Memory,
}

/// A thread pool, a set of kernels and a source of memory.
pub struct Runtime {
    pool: Pool,
    kernels: Kernels,
    memory: Memory,
}

impl Runtime {
    /// Starts the threads and selects the kernels.
    ///
    /// # Errors
    /// [`crate::Error::InvalidArgument`] for an unknown instruction set or an absurd thread count.
    pub fn new(config: &RuntimeConfig) -> Result<Self> {
        let threads = match config.threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(256),
            threads => threads,
        };
        let mut isa = Isa::from_environment()?;
        if let Some(name) = &config.isa {
            isa = isa.masked(Isa::up_to(name)?);
        }
        let memory = config.memory.clone();
        Ok(Self { pool: Pool::new(threads)?, kernels: Kernels::new(isa)?, memory })
    }

    /// The threads.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Where buffers come from, once it is entered.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The chosen kernels.
    #[must_use]
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }
}
