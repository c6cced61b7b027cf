//! What would otherwise be global: the threads, the chosen kernels and the governor. Two runtimes share
//! nothing.
#![forbid(unsafe_code)]

use super::governor::{Governor, GovernorConfig, Heat, PowerMode, Step};
use super::load::Model;
use super::log::{Level, Log};
use super::pressure::{Freed, Pressure};
use super::sensors::{self, Sensors};
use crate::cores::CorePolicy;
use crate::error::Result;
use crate::isa::Isa;
use crate::kernel::Kernels;
use crate::memory::Memory;
use crate::threads::{Executor, Pool};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Settings of a [`Runtime`].
#[derive(Clone, Default)]
pub struct RuntimeConfig {
    /// Threads to compute with, the calling one included; 0 for one on each core that `cores` allows, which is also the
    /// most: further ones would only wait for those.
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
    /// Where messages go.
    pub log: Log,
    /// Whether to read the system's own sensors of heat, as long as the host reports nothing.
    pub read_sensors: bool,
}

/// A thread pool, a set of kernels, a source of memory and a governor.
pub struct Runtime {
    pool: Pool,
    kernels: Kernels,
    governor: Mutex<Governor>,
    memory: Memory,
    log: Log,
    /// The models that are open.
    models: Mutex<Vec<Weak<Model>>>,
    /// The system's sensors, as long as they are to be read, and when they were last.
    sensors: Mutex<Option<(Sensors, Duration)>>,
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
        let cores = config.cores.count();
        let threads = match config.threads {
            0 => cores.min(256),
            // More would only wait for each other. An absurd number is the pool's to refuse.
            1..=256 if config.executor.is_none() => config.threads.min(cores),
            threads => threads,
        };
        let pool = match &config.executor {
            Some(executor) => Pool::lent(threads, Arc::clone(executor))?,
            None => Pool::on(threads, &config.cores)?,
        };
        let kernels = Kernels::new(isa)?;
        let sensors = config.read_sensors.then(Sensors::find).filter(|found| !found.is_empty());
        let (threads, log) = (pool.threads(), config.log.clone());
        log.say(Level::Info, || {
            format!("runtime: {threads} threads, kernels for {}", kernels.isa())
        });
        Ok(Self {
            pool,
            kernels,
            log,
            models: Mutex::default(),
            sensors: Mutex::new(sensors.map(|sensors| (sensors, Duration::ZERO))),
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
        // The host knows better from here on.
        *self.sensors.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.take_heat(heat)
    }

    fn take_heat(&self, heat: Heat) -> Result<()> {
        let mut governor = self.governor();
        let before = governor.check().is_err();
        governor.report(heat, self.start.elapsed())?;
        let (after, effort) = (governor.check().is_err(), governor.effort());
        drop(governor);
        self.log.say(Level::Debug, || format!("heat: {heat:?}, effort {effort:.2}"));
        match (before, after) {
            (false, true) => self.log.say(Level::Warn, || format!("too hot, paused: {heat:?}")),
            (true, false) => self.log.say(Level::Info, || format!("cool again: {heat:?}")),
            _ => {}
        }
        Ok(())
    }

    /// Gives memory back, as much as `pressure` asks for, of all models of this runtime. Waits for no
    /// session: what one is working with is given back when its pass is over.
    pub fn relieve(&self, pressure: Pressure) -> Freed {
        let models: Vec<_> = self.models().iter().filter_map(Weak::upgrade).collect();
        let mut freed = Freed::default();
        for model in &models {
            freed.add(&model.relieve(pressure));
        }
        self.log.say(Level::Info, || format!("memory pressure {pressure:?}: {freed:?}"));
        freed
    }

    /// The log.
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// A model that pressure on memory concerns from now on.
    pub(super) fn register(&self, model: &Arc<Model>) {
        let mut models = self.models();
        models.retain(|model| model.strong_count() > 0);
        models.push(Arc::downgrade(model));
    }

    fn models(&self) -> MutexGuard<'_, Vec<Weak<Model>>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// How the next pass is to be made.
    ///
    /// # Errors
    /// [`crate::Error::ThermalPause`].
    pub(super) fn step(&self, background: bool) -> Result<Step> {
        self.read_sensors()?;
        let mut step = self.governor().step()?;
        if background {
            step = step.at_most(PowerMode::Background.most());
        }
        Ok(step)
    }

    /// Reads the system's sensors, if it is time to.
    fn read_sensors(&self) -> Result<()> {
        let mut sensors = self.sensors.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((found, last)) = &mut *sensors else { return Ok(()) };
        let now = self.start.elapsed();
        if *last > Duration::ZERO && now.saturating_sub(*last) < sensors::INTERVAL {
            return Ok(());
        }
        *last = now;
        let celsius = found.celsius();
        drop(sensors);
        self.take_heat(Heat { celsius, ..Heat::default() })
    }

    /// Lets as many threads work as the step allows.
    pub(super) fn limit_threads(&self, step: &Step) {
        let threads = self.pool.threads() as f32 * step.threads;
        self.pool.limit(threads.ceil() as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_no_more_threads_than_cores() {
        let threads = |config: RuntimeConfig| Runtime::new(&config).map(|it| it.pool().threads());
        let all = RuntimeConfig::default();
        let cores = all.cores.count();
        assert_eq!(threads(all.clone()), Ok(cores.min(256)));
        assert_eq!(threads(RuntimeConfig { threads: 256, ..all.clone() }), Ok(cores.min(256)));
        assert_eq!(threads(RuntimeConfig { threads: 1, ..all.clone() }), Ok(1));
        // An absurd number is refused as ever, and a host's threads are the host's to count.
        assert!(threads(RuntimeConfig { threads: 257, ..all.clone() }).is_err());
        let lent: Executor = Arc::new(|tiles, tile| (0..tiles).for_each(tile));
        let lent = RuntimeConfig { threads: 200, executor: Some(lent), ..all };
        assert_eq!(threads(lent), Ok(200));
    }
}
