//! One KV cache for all sessions of a model whose keys and values are alike.
//!
//! A session finds there what another one has computed of the same text, and the cache outlives its
//! sessions: a prompt that comes again is not computed again, until the memory is wanted for something else.
#![forbid(unsafe_code)]

use super::pressure::{Freed, Pressure};
use crate::error::Result;
use crate::kernel::KvFormat;
use crate::kv::BLOCK_TOKENS;
use crate::kv::sight::Streaming;
use crate::kv::store::{KvConfig, KvShape, KvStore};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// A bound to the memory of a cache, and what becomes of blocks beyond it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLimit {
    /// Bytes of memory that the blocks of all sessions together may take.
    pub memory: usize,
    /// A folder for a file that takes the blocks of idle sessions.
    pub spill_folder: Option<PathBuf>,
    /// Bytes that this file may take.
    pub spill: usize,
}

/// What keys and values depend on besides the model: only sessions that agree in it share a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) format: KvFormat,
    /// Whether positions are rotated as for long contexts.
    pub(super) long: bool,
    pub(super) streaming: Option<Streaming>,
}

/// The caches of a model.
#[derive(Default)]
pub(super) struct Caches(Mutex<Vec<(Kind, Arc<Cache>)>>);

/// A cache and what has been promised of it. Sessions compute one after the other: whoever has the lock has the
/// threads.
pub(super) struct Cache {
    shared: Mutex<Shared>,
    /// Pressure that came while a session was inside, as a number of [`Pressure`].
    pressure: AtomicU8,
    /// Sessions in the foreground that wait for their turn or have it.
    foreground: AtomicUsize,
}

/// A session in the foreground that waits for its turn or has it.
pub(super) struct Turn<'a>(&'a AtomicUsize);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) struct Shared {
    pub(super) store: KvStore,
    /// Bytes that the sessions may come to.
    promised: usize,
    /// The most that one of them was promised: what stays for prefixes when all are gone.
    most: usize,
    limit: Option<usize>,
}

impl Caches {
    /// The cache for sessions of a kind, made if there is none.
    pub(super) fn open(&self, kind: Kind, shape: KvShape) -> Result<Arc<Cache>> {
        let mut caches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, cache)) = caches.iter().find(|(other, _)| *other == kind) {
            return Ok(Arc::clone(cache));
        }
        // The budget follows the sessions; until one joins, any will do.
        let budget = 2 * BLOCK_TOKENS * shape.token_bytes(KvFormat::F32);
        let store = KvStore::with(&KvConfig {
            shape,
            format: kind.format,
            block_tokens: BLOCK_TOKENS,
            budget,
            fingerprint: 0,
        })?;
        let shared = Shared { store, promised: 0, most: 0, limit: None };
        let cache = Arc::new(Cache {
            shared: Mutex::new(shared),
            pressure: AtomicU8::new(0),
            foreground: AtomicUsize::new(0),
        });
        caches.push((kind, Arc::clone(&cache)));
        Ok(cache)
    }

    /// Gives back all memory that no session holds. Returns the bytes.
    pub(super) fn trim(&self) -> usize {
        let caches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        caches.iter().map(|(_, cache)| cache.lock().store.trim()).sum()
    }

    /// Gives back what `pressure` asks for, and what cannot be done now when it can.
    pub(super) fn relieve(&self, pressure: Pressure) -> Freed {
        let caches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut freed = Freed::default();
        for (_, cache) in caches.iter() {
            cache.pressure.fetch_max(pressure as u8, Ordering::Relaxed);
            match cache.shared.try_lock() {
                Ok(mut shared) => freed.add(&cache.relieve(&mut shared)),
                Err(TryLockError::Poisoned(shared)) => {
                    freed.add(&cache.relieve(&mut shared.into_inner()));
                }
                Err(TryLockError::WouldBlock) => freed.deferred += 1,
            }
        }
        freed
    }
}

impl Cache {
    /// The cache, also after a panic inside the model: that session is poisoned, and it can only have
    /// written where no other one reads.
    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What pressure has asked for meanwhile, once: for whoever has the lock and is done with the blocks.
    pub(super) fn relieve(&self, shared: &mut Shared) -> Freed {
        let pressure = self.pressure.swap(0, Ordering::Relaxed);
        let mut freed = Freed::default();
        if pressure >= Pressure::Moderate as u8 {
            freed.prefixes = shared.store.trim();
        }
        if pressure >= Pressure::High as u8 {
            // What a full disk does not take stays where it is.
            freed.spilled = shared.store.spill_all().0;
        }
        freed
    }

    /// A turn of a session in the foreground begins.
    pub(super) fn turn(&self) -> Turn<'_> {
        self.foreground.fetch_add(1, Ordering::Relaxed);
        Turn(&self.foreground)
    }

    /// For a session in the background: lets those in the foreground go first, calling `wait` as long as
    /// there are any.
    pub(super) fn give_way(&self, mut wait: impl FnMut(Duration) -> Result<()>) -> Result<()> {
        while self.foreground.load(Ordering::Relaxed) > 0 {
            wait(Duration::from_millis(1))?;
        }
        Ok(())
    }
}

impl Shared {
    /// A session that may come to `tokens` tokens gets room of its own.
    pub(super) fn join(&mut self, tokens: usize) {
        let bytes = self.bytes_of(tokens);
        self.promised += bytes;
        self.most = self.most.max(bytes);
        self.fit();
    }

    /// It gives the room back. What it computed stays as long as there is room for one session.
    pub(super) fn leave(&mut self, tokens: usize) {
        self.promised -= self.bytes_of(tokens);
        self.fit();
        self.store.drop_empty();
    }

    /// Bounds the memory from now on.
    pub(super) fn limit(&mut self, limit: &KvLimit) -> Result<()> {
        if let (Some(folder), false) = (&limit.spill_folder, self.store.spills()) {
            self.store.spill_to(folder, limit.spill)?;
        }
        self.limit = Some(limit.memory);
        self.fit();
        Ok(())
    }

    fn bytes_of(&self, tokens: usize) -> usize {
        self.store.sequence_bytes(tokens.div_ceil(BLOCK_TOKENS))
    }

    fn fit(&mut self) {
        let budget = self.promised.max(self.most);
        self.store.set_budget(self.limit.map_or(budget, |limit| limit.min(budget)));
    }
}
