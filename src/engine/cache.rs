//! One KV cache for all sessions of a model whose keys and values are alike.
//!
//! A session finds there what another one has computed of the same text, and the cache outlives its
//! sessions: a prompt that comes again is not computed again, until the memory is wanted for something else.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::kernel::KvFormat;
use crate::kv::BLOCK_TOKENS;
use crate::kv::attend::Streaming;
use crate::kv::store::{KvConfig, KvShape, KvStore};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// A cache and what has been promised of it.
pub(super) struct Cache(Mutex<Shared>);

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
        let cache = Arc::new(Cache(Mutex::new(shared)));
        caches.push((kind, Arc::clone(&cache)));
        Ok(cache)
    }

    /// Gives back all memory that no session holds. Returns the bytes.
    pub(super) fn trim(&self) -> usize {
        let caches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        caches.iter().map(|(_, cache)| cache.lock().store.trim()).sum()
    }
}

impl Cache {
    /// The cache, also after a panic inside the model: that session is poisoned, and it can only have
    /// written where no other one reads.
    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
