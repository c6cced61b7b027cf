//! What would otherwise be global: the threads, the chosen kernels and the governor. Two runtimes share
//! nothing.
#![forbid(unsafe_code)]

use super::governor::{Governor, GovernorConfig, Heat, PowerMode, Step};
use crate::cores::CorePolicy;
use crate::error::Result;
use crate::isa::Isa;
use crate::kernel::Kernels;
use crate::memory::Memory;
use crate::threads::{Executor, Pool};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Settings of a [`Runtime`].
#[derive(Clone, Default)]
pub struct RuntimeConfig {
    /// Threads to compute with, the calling one included; 0 for one on each core that `cores` allows.
    pub threads: usize,
    /// The strongest instruction set to use, as [`Isa::up_to`] names it; none for all this CPU has
    /// (and `NYBL_ISA` allows).
    pub isa: Option<String>,
    /// Where buffers come from.
    pub memory: Memory,
    /// Which cores the threads may run on.
    pub cores: CorePolicy,
    /// The host's threads, `threads` of them, to be used instead of own ones.
    pub executor: Option<Executor>,
    /// What to do about heat.
    pub governor: GovernorConfig,
}

/// A thread pool, a set of kernels, a source of memory and a governor.
pub struct Runtime {
    pool: Pool,
    kernels: Kernels,
    governor: Mutex<Governor>,
    memory: Memory,
    /// Where the governor's clock begins.
    start: Instant,
}

impl Runtime {
    /// Starts the threads and selects the kernels.
    ///
    /// # Errors
    /// [`crate::Error::InvalidArgument`] for an unknown instruction set, an absurd thread count or
    /// temperatures that make no sense.
    pub fn new(config: &RuntimeConfig) -> Result<Self> {
        let mut isa = Isa::from_environment()?;
        if let Some(name) = &config.isa {
            isa = isa.masked(Isa::up_to(name)?);
        }
        let threads = match config.threads {
            0 => config.cores.count().min(256),
            threads => threads,
        };
        let pool = match &config.executor {
            Some(executor) => Pool::lent(threads, Arc::clone(executor))?,
            None => Pool::on(threads, &config.cores)?,
        };
        Ok(Self {
            pool,
            kernels: Kernels::new(isa)?,
            memory: config.memory.clone(),
            governor: Mutex::new(Governor::new(config.governor)?),
            start: Instant::now(),
        })
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

    /// Takes the host's report on heat: see [`Governor::report`].
    ///
    /// # Errors
    /// As [`Governor::report`].
    pub fn report_heat(&self, heat: Heat) -> Result<()> {
        self.governor().report(heat, self.start.elapsed())
    }

    /// Sets how much of the machine may be used.
    pub fn set_power_mode(&self, mode: PowerMode) {
        self.governor().set_mode(mode);
    }

    /// The governor, for its figures and settings.
    pub fn governor(&self) -> MutexGuard<'_, Governor> {
        // Its arithmetic does not panic, and would leave it in order if it did.
        self.governor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the next pass is to be made; limits the threads accordingly.
    ///
    /// # Errors
    /// [`crate::Error::ThermalPause`].
    pub(super) fn step(&self) -> Result<Step> {
        let step = self.governor().step()?;
        let threads = self.pool.threads() as f32 * step.threads;
        self.pool.limit(threads.ceil() as usize);
        Ok(step)
    }
}
