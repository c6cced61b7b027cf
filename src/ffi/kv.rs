//! The KV cache alone, for hosts that compute keys, values and queries themselves.

use super::status::{Failure, NYBL_ERR_BUFFER_TOO_SMALL, NYBL_ERR_BUSY, NYBL_ERR_INVALID_ARGUMENT};
use super::status::{NYBL_ERR_UNSUPPORTED, destroy, guard, nybl_status};
use super::structs::{Sized32, handle, read_config, set, slice, slice_mut, text, write_result};
use crate::isa::Isa;
use crate::kernel::{Kernels, KvFormat};
use crate::kv::BLOCK_TOKENS;
use crate::kv::attend::{AttendScratch, Keys, attend};
use crate::kv::blocks::BlockTable;
use crate::kv::sight::{Rows, Sight};
use crate::kv::snapshot::{self, Identity};
use crate::kv::store::{KvConfig, KvShape, KvStore};
use crate::threads::Pool;
use std::ffi::c_char;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// Keys and values as they are given.
pub const NYBL_KV_F32: u32 = 0;
/// Rounded to half precision: half the memory.
pub const NYBL_KV_F16: u32 = 1;
/// Eight bits and a scale for each token and head: about a quarter of the memory.
pub const NYBL_KV_I8: u32 = 2;
/// Keys of eight bits, values of four; the first 64 tokens of a sequence stay in half precision.
pub const NYBL_KV_I4: u32 = 3;

/// The format that a number of the header names.
pub(super) fn format(name: &str, number: u32) -> Result<KvFormat, Failure> {
    KvFormat::ALL.into_iter().find(|format| *format as u32 == number).ok_or_else(|| {
        let text = format!("{name} is {number}: must be one of NYBL_KV_*");
        Failure::new(NYBL_ERR_INVALID_ARGUMENT, text)
    })
}

/// A cache: blocks of keys and values that sequences share. Any thread may call; calls on one cache run
/// one after the other.
pub struct nybl_kv {
    cache: Arc<Cache>,
}

/// One sequence of tokens in a cache. One thread at a time; a second one gets NYBL_ERR_BUSY.
pub struct nybl_kv_sequence {
    cache: Arc<Cache>,
    table: Mutex<BlockTable>,
}

struct Cache {
    kernels: Kernels,
    pool: Pool,
    identity: Identity,
    state: Mutex<State>,
}

struct State {
    store: KvStore,
    /// Buffers for so many rows of so many query heads.
    scratch: Option<(usize, usize, AttendScratch)>,
}

impl Cache {
    /// The state, also after a panic inside: it changes in whole steps.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for nybl_kv_sequence {
    fn drop(&mut self) {
        let table = self.table.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.cache.lock().store.truncate(table, 0);
    }
}

/// Settings of a cache. Zero is the default where one is named.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_kv_config {
    /// sizeof(nybl_kv_config).
    pub struct_size: u32,
    /// One of NYBL_KV_*: how keys and values are kept.
    pub format: u32,
    /// Layers that have a cache.
    pub n_layers: u32,
    /// KV heads in a layer.
    pub n_kv_heads: u32,
    /// Floats in a head.
    pub head_dim: u32,
    /// Tokens in a block: a multiple of 16 from 16 to 256 (16, 32 or 64 for NYBL_KV_I4); 0 for 64. Does
    /// not change a result.
    pub block_tokens: u32,
    /// Bytes of memory that blocks may take. They are taken when tokens need them.
    pub budget: u64,
    /// Threads for attention, the calling one included; 0 for one on each available core.
    pub threads: u32,
    /// Floats of a head that are rotated by position. Only compared with that of a saved sequence.
    pub rope_dim: u32,
    /// Base of the rotary wavelengths. Only compared with that of a saved sequence.
    pub rope_theta: f64,
    /// A number of your own for the model and adapter that keys and values come from: a saved sequence of
    /// another one is refused.
    pub model: u64,
    /// A folder for a file that takes blocks of idle sequences when the budget is used up; NULL for none.
    pub spill_folder: *const c_char,
    /// Length of spill_folder in bytes.
    pub spill_folder_len: usize,
    /// Bytes that this file may take.
    pub spill_budget: u64,
}

// SAFETY: `repr(C)`, starts with a u32, and numbers and pointers may be zero.
unsafe impl Sized32 for nybl_kv_config {}

/// What a cache holds and could hold.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_kv_stats {
    /// sizeof(nybl_kv_stats).
    pub struct_size: u32,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Bytes of a token in all layers, NYBL_KV_I4's first 64 tokens left aside.
    pub token_bytes: u64,
    /// Bytes of memory that blocks take.
    pub bytes: u64,
    /// Bytes of memory that they may take.
    pub budget: u64,
    /// Blocks in memory.
    pub resident: u64,
    /// Blocks that a sequence holds; shared ones count once.
    pub used: u64,
    /// Blocks that a sequence with the same beginning would find.
    pub cached: u64,
    /// Blocks in the spill file.
    pub spilled: u64,
    /// Bytes of the spill file that they take.
    pub spilled_bytes: u64,
}

// SAFETY: `repr(C)`, starts with a u32, integers only.
unsafe impl Sized32 for nybl_kv_stats {}

/// What nybl_kv_attend() computes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_kv_attend_args {
    /// sizeof(nybl_kv_attend_args).
    pub struct_size: u32,
    /// The layer.
    pub layer: u32,
    /// Query heads: a multiple of the KV heads, which they share in equal groups, neighbours together.
    pub n_heads: u32,
    /// Query rows.
    pub rows: u32,
    /// Where row 0 was written, counted from the end of the committed tokens: 0 for the first token behind
    /// them. Rows follow each other from there, or are a tree.
    pub first: u32,
    /// Positions that a row sees, its own included; 0 for all before it.
    pub window: u32,
    /// First positions of the sequence that are seen besides the window (attention sinks).
    pub sinks: u32,
    /// Multiplied onto each score; 0 for 1 / sqrt(head_dim).
    pub scale: f32,
    /// Scores are bent to lie within this of zero by tanh, after the scale; 0 leaves them alone.
    pub softcap: f32,
    /// Not used; must be zero.
    pub reserved: u32,
    /// rows x n_heads x head_dim.
    pub queries: *const f32,
    /// Queries for the sinks of rows whose window has left them, rotated to position sinks + window - 1,
    /// so that distances never exceed what the model was trained on; NULL to use queries.
    pub sink_queries: *const f32,
    /// For a tree of drafts: row i + 1 follows row `parents[i]` <= i, rows - 1 numbers, as for
    /// nybl_verify(); a row sees the sequence, its ancestors and itself. NULL for rows that follow each
    /// other. `first` must be 0.
    pub parents: *const u32,
    /// rows x n_heads x head_dim.
    pub output: *mut f32,
}

// SAFETY: `repr(C)`, starts with a u32, and numbers and pointers may be zero.
unsafe impl Sized32 for nybl_kv_attend_args {}

fn invalid(text: impl Into<String>) -> Failure {
    Failure::new(NYBL_ERR_INVALID_ARGUMENT, text)
}

/// The table of a live sequence, unless another thread is at it.
///
/// # Safety
/// `sequence` is NULL or a live handle.
unsafe fn lock<'a>(
    sequence: *const nybl_kv_sequence,
) -> Result<(&'a Cache, MutexGuard<'a, BlockTable>), Failure> {
    // SAFETY: the caller vouches for the handle.
    let sequence = unsafe { handle("sequence", sequence) }?;
    match sequence.table.try_lock() {
        Ok(table) => Ok((&sequence.cache, table)),
        Err(TryLockError::Poisoned(table)) => Ok((&sequence.cache, table.into_inner())),
        Err(TryLockError::WouldBlock) => {
            Err(Failure::new(NYBL_ERR_BUSY, "another thread is inside a call on this sequence"))
        }
    }
}

/// Makes an empty cache. Destroy it with nybl_kv_destroy().
///
/// # Safety
/// `config` states its size; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_create(
    config: *const nybl_kv_config,
    out: *mut *mut nybl_kv,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            if config.is_null() {
                return Err(Failure::null("config"));
            }
            let config = read_config(config)?;
            let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
            let mut store = KvStore::with(&KvConfig {
                shape: KvShape {
                    n_layers: config.n_layers as usize,
                    n_kv_heads: config.n_kv_heads as usize,
                    head_dim: config.head_dim as usize,
                },
                format: format("config->format", config.format)?,
                block_tokens: match config.block_tokens {
                    0 => BLOCK_TOKENS,
                    tokens => tokens as usize,
                },
                budget: bytes(config.budget),
                fingerprint: config.model,
            })?;
            let folder =
                text("config->spill_folder", config.spill_folder, config.spill_folder_len)?;
            if !folder.is_empty() {
                store.spill_to(Path::new(folder), bytes(config.spill_budget))?;
            }
            let threads = match config.threads {
                0 => std::thread::available_parallelism().map_or(1, |n| n.get().min(256)),
                threads => threads as usize,
            };
            let cache = Cache {
                kernels: Kernels::new(Isa::from_environment()?)?,
                pool: Pool::new(threads)?,
                identity: Identity {
                    model: config.model,
                    rope_theta: config.rope_theta,
                    rope_dim: config.rope_dim as usize,
                },
                state: Mutex::new(State { store, scratch: None }),
            };
            set("out", out, Box::into_raw(Box::new(nybl_kv { cache: Arc::new(cache) })))
        }
    })
}

/// Gives up a cache. Its memory goes with its last sequence. NULL is ignored.
///
/// # Safety
/// `kv` is NULL or a live handle, which is dead afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_destroy(kv: *mut nybl_kv) {
    // SAFETY: the caller vouches for the handle, which came out of a box.
    unsafe { destroy(kv) };
}

/// Fills `stats`, whose struct_size the caller has set.
///
/// # Safety
/// `kv` is a live handle; `stats` states its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_get_stats(
    kv: *const nybl_kv,
    stats: *mut nybl_kv_stats,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let state = handle("kv", kv)?.cache.lock();
            let (now, store) = (state.store.stats(), &state.store);
            let value = nybl_kv_stats {
                struct_size: 0,
                block_tokens: store.pool().block_tokens() as u32,
                block_bytes: now.block_bytes as u64,
                token_bytes: store.shape().token_bytes(store.format()) as u64,
                bytes: now.bytes as u64,
                budget: now.budget as u64,
                resident: now.resident as u64,
                used: now.used as u64,
                cached: now.cached as u64,
                spilled: now.spilled as u64,
                spilled_bytes: now.spilled_bytes as u64,
            };
            write_result("stats", stats, &value)
        }
    })
}

/// Gives the memory of all blocks that no sequence holds back to the system, and with it what new
/// sequences could have found there. Stores the bytes in `freed`, which may be NULL.
///
/// # Safety
/// `kv` is a live handle; `freed` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_trim(kv: *mut nybl_kv, freed: *mut u64) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let bytes = handle("kv", kv)?.cache.lock().store.trim();
            if freed.is_null() { Ok(()) } else { set("freed", freed, bytes as u64) }
        }
    })
}

/// Makes an empty sequence in a cache. Destroy it with nybl_kv_sequence_destroy(); it keeps the cache
/// alive.
///
/// # Safety
/// `kv` is a live handle; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_sequence_create(
    kv: *mut nybl_kv,
    out: *mut *mut nybl_kv_sequence,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let cache = Arc::clone(&handle("kv", kv)?.cache);
            let sequence = nybl_kv_sequence { cache, table: Mutex::default() };
            set("out", out, Box::into_raw(Box::new(sequence)))
        }
    })
}

/// Makes a second sequence with the same committed tokens. The two share all blocks; one is copied when one
/// of the two writes into it. A reservation of `sequence` is dropped.
///
/// # Safety
/// `sequence` is a live handle; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_sequence_fork(
    sequence: *mut nybl_kv_sequence,
    out: *mut *mut nybl_kv_sequence,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let (_, mut table) = lock(sequence)?;
            let cache = Arc::clone(&handle("sequence", sequence)?.cache);
            let fork = cache.lock().store.fork(&mut table)?;
            let fork = nybl_kv_sequence { cache, table: Mutex::new(fork) };
            set("out", out, Box::into_raw(Box::new(fork)))
        }
    })
}

/// Ends a sequence and lets go of its blocks. No call on it may be in progress. NULL is ignored.
///
/// # Safety
/// `sequence` is NULL or a live handle, which is dead afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_sequence_destroy(sequence: *mut nybl_kv_sequence) {
    // SAFETY: the caller vouches for the handle, which came out of a box.
    unsafe { destroy(sequence) };
}

/// Stores how many tokens are committed.
///
/// # Safety
/// `sequence` is a live handle; `length` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_sequence_length(
    sequence: *const nybl_kv_sequence,
    length: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("length", length, 0)?;
            set("length", length, lock(sequence)?.1.len())
        }
    })
}

/// Keeps the first `length` tokens, and drops a reservation. Works within shared blocks. What is longer
/// than the sequence changes nothing else. A length inside what nybl_kv_drop() took becomes the length
/// before it; nybl_kv_sequence_length() tells.
///
/// # Safety
/// `sequence` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_sequence_truncate(
    sequence: *mut nybl_kv_sequence,
    length: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointer.
        let (cache, mut table) = unsafe { lock(sequence) }?;
        cache.lock().store.truncate(&mut table, length);
        Ok(())
    })
}

/// Makes room for `count` more tokens behind those committed, copies the last block if another sequence
/// shares it, and brings blocks back from the spill file. NYBL_ERR_KV_EXHAUSTED when the budget does not
/// allow it: nothing has changed then.
///
/// # Safety
/// `sequence` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_reserve(
    sequence: *mut nybl_kv_sequence,
    count: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointer.
        let (cache, mut table) = unsafe { lock(sequence) }?;
        cache.lock().store.reserve(&mut table, count)?;
        Ok(())
    })
}

/// Writes the keys and values of one layer for `rows` tokens, the first of them `first` places behind the
/// committed ones. Room for them must have been reserved. `keys` and `values` are rows x n_kv_heads x
/// head_dim.
///
/// # Safety
/// `sequence` is a live handle; `keys` and `values` have that many floats.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_write(
    sequence: *mut nybl_kv_sequence,
    layer: u32,
    first: usize,
    rows: usize,
    keys: *const f32,
    values: *const f32,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let (cache, table) = lock(sequence)?;
            let store = &mut cache.lock().store;
            let shape = store.shape();
            check_layer(shape, layer)?;
            let end = first.checked_add(rows).filter(|end| *end <= table.reserved() - table.len());
            if end.is_none() {
                return Err(invalid(format!(
                    "{rows} rows from {first} on, and room for {} is reserved",
                    table.reserved() - table.len()
                )));
            }
            store.load(&table)?;
            let width = shape.n_kv_heads * shape.head_dim;
            let count = rows * width;
            let (keys, values) = (slice("keys", keys, count)?, slice("values", values, count)?);
            let rows = keys.chunks_exact(width).zip(values.chunks_exact(width));
            for (row, (key, value)) in rows.enumerate() {
                store.write(&table, layer as usize, table.len() + first + row, key, value);
            }
            Ok(())
        }
    })
}

fn check_layer(shape: KvShape, layer: u32) -> Result<(), Failure> {
    if layer as usize >= shape.n_layers {
        return Err(invalid(format!("layer {layer} of {}", shape.n_layers)));
    }
    Ok(())
}

/// Computes attention of query rows over a sequence: softmax(scale * q . k) . v, over the committed tokens
/// and what has been written behind them up to each row's own place. Equal bits whatever the block
/// size, the number of threads, and however the sequence came about.
///
/// # Safety
/// `sequence` is a live handle; `args` states its size and its pointers cover what their comments say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_attend(
    sequence: *mut nybl_kv_sequence,
    args: *const nybl_kv_attend_args,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            if args.is_null() {
                return Err(Failure::null("args"));
            }
            let args = read_config(args)?;
            let (cache, table) = lock(sequence)?;
            let State { store, scratch } = &mut *cache.lock();
            let shape = store.shape();
            check_layer(shape, args.layer)?;
            if args.reserved != 0 {
                return Err(Failure::new(NYBL_ERR_UNSUPPORTED, "args->reserved is not zero"));
            }
            let (rows, n_heads, first) =
                (args.rows as usize, args.n_heads as usize, args.first as usize);
            if n_heads == 0 || !n_heads.is_multiple_of(shape.n_kv_heads) {
                let text =
                    format!("{n_heads} query heads cannot share {} KV heads", shape.n_kv_heads);
                return Err(invalid(text));
            }
            if first + rows > table.reserved() - table.len() {
                let room = table.reserved() - table.len();
                let text = format!("{rows} rows from {first} on, and room for {room} is reserved");
                return Err(invalid(text));
            }
            let count = rows.checked_mul(n_heads).and_then(|rows| rows.checked_mul(shape.head_dim));
            let count = count.ok_or_else(|| invalid(format!("{rows} rows of {n_heads} heads")))?;
            let q = slice("args->queries", args.queries, count)?;
            let sink_q = match args.sink_queries.is_null() {
                true => None,
                false => Some(slice("args->sink_queries", args.sink_queries, count)?),
            };
            let out = slice_mut("args->output", args.output, count)?;
            let parents = match args.parents.is_null() || rows == 0 {
                true => None,
                false => Some(slice("args->parents", args.parents, rows - 1)?),
            };
            if rows == 0 {
                return Ok(());
            }
            if let Some(parents) = parents {
                let wrong = parents.iter().enumerate().find(|(i, parent)| **parent as usize > *i);
                if let Some((i, parent)) = wrong {
                    return Err(invalid(format!(
                        "row {} follows row {parent}, which is not before it",
                        i + 1
                    )));
                }
                if first != 0 {
                    return Err(invalid(
                        "the root of a tree is the first row: args->first must be 0",
                    ));
                }
                if !store.takes_trees(table.len()) {
                    let text = "a tree within the first 64 tokens of a NYBL_KV_I4 cache";
                    return Err(Failure::new(NYBL_ERR_UNSUPPORTED, text));
                }
            }
            let scale =
                if args.scale == 0.0 { 1.0 / (shape.head_dim as f32).sqrt() } else { args.scale };
            let window = if args.window == 0 { usize::MAX } else { args.window as usize };
            let sight =
                Sight { scale, softcap: args.softcap, window, sinks: args.sinks as usize, sink_q };
            let dropped = table.dropped(store.pool());
            let seen_from = sight.start(table.len() + first);
            if !dropped.is_empty() && seen_from < dropped.end
                || sight.sinks > dropped.start && !dropped.is_empty()
            {
                return Err(invalid(format!(
                    "positions {} to {} were dropped, and the window begins at {seen_from}",
                    dropped.start, dropped.end
                )));
            }
            store.load(&table)?;
            let buffers = match scratch {
                Some((most, heads, buffers)) if rows <= *most && *heads == n_heads => buffers,
                slot => {
                    let most = rows.max(8);
                    let made = AttendScratch::new(most, n_heads, shape)?;
                    &mut slot.insert((most, n_heads, made)).2
                }
            };
            let keys = Keys { store, table: &table, layer: args.layer as usize };
            let rows = Rows { first: table.len() + first, parents };
            attend(&cache.kernels, &cache.pool, keys, rows, &sight, buffers, (q, out));
            Ok(())
        }
    })
}

/// Holds tokens that were reserved and written in all layers: the first `count` of them, or, with `path`,
/// the rows that it names, ascending, whose keys and values move together (what nybl_verify() accepted of
/// a tree, with row 0 in front). The places of the others may be written again.
///
/// # Safety
/// `sequence` is a live handle; `path` is NULL or has `count` rows.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_commit(
    sequence: *mut nybl_kv_sequence,
    path: *const u32,
    count: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let (cache, mut table) = lock(sequence)?;
            let room = table.reserved() - table.len();
            if path.is_null() {
                if count > room {
                    return Err(invalid(format!("{count} tokens where {room} are reserved")));
                }
                table.commit(count);
                return Ok(());
            }
            let path: Vec<usize> =
                slice("path", path, count)?.iter().map(|row| *row as usize).collect();
            if !path.is_sorted_by(|a, b| a < b) || path.last().is_some_and(|last| *last >= room) {
                return Err(invalid(format!(
                    "path does not ascend below the {room} rows reserved"
                )));
            }
            let store = &mut cache.lock().store;
            let moves = path.iter().enumerate().any(|(depth, row)| depth != *row);
            if moves && !store.takes_trees(table.len()) {
                let text = "a tree within the first 64 tokens of a NYBL_KV_I4 cache";
                return Err(Failure::new(NYBL_ERR_UNSUPPORTED, text));
            }
            store.load(&table)?;
            Ok(store.keep_path(&mut table, &path)?)
        }
    })
}

/// Takes over blocks that hold the beginning of `ids`, the whole sequence as it is going to be: what
/// another sequence of the same cache has shared with nybl_kv_share(). At least one token is left to
/// compute. Stores in `length` how many tokens the sequence holds now.
///
/// # Safety
/// `sequence` is a live handle; `ids` has `count` ids; `length` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_reuse(
    sequence: *mut nybl_kv_sequence,
    ids: *const u32,
    count: usize,
    length: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("length", length, 0)?;
            let (cache, mut table) = lock(sequence)?;
            let ids = slice("ids", ids, count)?;
            cache.lock().store.reuse(&mut table, ids);
            set("length", length, table.len())
        }
    })
}

/// Lets other sequences find the full blocks of this one. `ids` are its tokens from the start, as far as
/// they are committed. Never pass drafts.
///
/// # Safety
/// `sequence` is a live handle; `ids` has `count` ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_share(
    sequence: *mut nybl_kv_sequence,
    ids: *const u32,
    count: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        let ((cache, mut table), ids) = unsafe { (lock(sequence)?, slice("ids", ids, count)?) };
        cache.lock().store.publish(&mut table, ids);
        Ok(())
    })
}

/// Gives back the blocks that lie wholly between the first `sinks` tokens and position `from`, which no
/// layer will look at again. They cannot come back.
///
/// # Safety
/// `sequence` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_drop(
    sequence: *mut nybl_kv_sequence,
    sinks: usize,
    from: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointer.
        let (cache, mut table) = unsafe { lock(sequence) }?;
        cache.lock().store.drop_before(&mut table, sinks, from);
        Ok(())
    })
}

/// Writes the committed tokens with their keys and values to the file at `path`, which is replaced whole or
/// not at all. `ids` are the tokens, one for each.
///
/// # Safety
/// `sequence` is a live handle; `ids` has `count` ids; `path` has `path_len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_save(
    sequence: *mut nybl_kv_sequence,
    ids: *const u32,
    count: usize,
    path: *const c_char,
    path_len: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let (cache, table) = lock(sequence)?;
            let (ids, path) = (slice("ids", ids, count)?, text("path", path, path_len)?);
            let store = &mut cache.lock().store;
            Ok(snapshot::save_file(store, &table, ids, &cache.identity, Path::new(path))?)
        }
    })
}

/// Fills an empty sequence from a file that nybl_kv_save() wrote, in this process or another one. Stores the
/// tokens in `ids` and their number in `count`; with too little room there NYBL_ERR_BUFFER_TOO_SMALL, the
/// number, and an empty sequence. NYBL_ERR_CORRUPT for a damaged file, NYBL_ERR_UNSUPPORTED for one of
/// another model, shape or format; the text of the error has the reason.
///
/// # Safety
/// `sequence` is a live handle; `path` has `path_len` bytes; `ids` has room for `capacity` ids; `count` is
/// writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_kv_load(
    sequence: *mut nybl_kv_sequence,
    path: *const c_char,
    path_len: usize,
    ids: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("count", count, 0)?;
            let (cache, mut table) = lock(sequence)?;
            let out = slice_mut("ids", ids, capacity)?;
            let path = Path::new(text("path", path, path_len)?);
            let store = &mut cache.lock().store;
            let tokens = snapshot::restore_file(store, &mut table, &cache.identity, path)?;
            set("count", count, tokens.len())?;
            let Some(out) = out.get_mut(..tokens.len()) else {
                store.truncate(&mut table, 0);
                let text = format!("{} tokens, and room for {capacity}", tokens.len());
                return Err(Failure::new(NYBL_ERR_BUFFER_TOO_SMALL, text));
            };
            out.copy_from_slice(&tokens);
            store.publish(&mut table, &tokens);
            Ok(())
        }
    })
}
