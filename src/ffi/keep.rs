//! # Engine: what sessions share and keep
//!
//! Forks, files, and the figures of a session.

use super::model::copy_out;
use super::session::{boxed, lock, nybl_session};
use super::status::{guard, nybl_status};
use super::structs::{Sized32, set, text, write_result};
use std::ffi::c_char;
use std::path::Path;

/// A second session with the same tokens, settings, hook and random numbers. The two share all keys and values until
/// one of them writes, and compute one after the other. It has no drafter. Destroy it with nybl_session_destroy().
///
/// # Safety
/// `session` is a live handle; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_fork(
    session: *mut nybl_session,
    out: *mut *mut nybl_session,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let fork = lock(session)?.text.fork()?;
            set("out", out, boxed(fork))
        }
    })
}

/// Writes tokens, keys and values to the file at `path` (UTF-8), replacing it whole or not at all. The random numbers
/// are no part of it.
///
/// # Safety
/// `session` is a live handle; `path` has `path_len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_save(
    session: *mut nybl_session,
    path: *const c_char,
    path_len: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        let (mut state, path) = unsafe { (lock(session)?, text("path", path, path_len)?) };
        Ok(state.session().settled().save(Path::new(path))?)
    })
}

/// Replaces the sequence by that in a file of nybl_session_save(), written by this process or another one with the same
/// model and the same settings of the KV cache. On failure nothing has changed: NYBL_ERR_CORRUPT or
/// NYBL_ERR_UNSUPPORTED for a file that cannot be used, NYBL_ERR_CONTEXT_FULL when it holds too many tokens. Makes a
/// session usable again that answered NYBL_ERR_POISONED.
///
/// # Safety
/// `session` is a live handle; `path` has `path_len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_restore(
    session: *mut nybl_session,
    path: *const c_char,
    path_len: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        let (mut state, path) = unsafe { (lock(session)?, text("path", path, path_len)?) };
        state.session().settled().restore(Path::new(path))?;
        state.text.restart();
        Ok(())
    })
}

/// Copies the tokens of the sequence. Stores their number in `count` and as many as fit in `ids`;
/// NYBL_ERR_BUFFER_TOO_SMALL when that is not all of them.
///
/// # Safety
/// `session` is a live handle; `ids` has room for `capacity`, `count` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_copy_tokens(
    session: *mut nybl_session,
    ids: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("count", count, 0)?;
            let state = lock(session)?;
            copy_out("ids", state.text.as_session().tokens(), ids, capacity, count)
        }
    })
}

/// What a session has done since it began, and what it takes. Times are those that a caller waits.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_session_metrics {
    /// sizeof(nybl_session_metrics).
    pub struct_size: u32,
    /// Milliseconds for which heat pauses the runtime; 0 when it does not.
    pub retry_ms: u32,
    /// Tokens appended.
    pub prompt_tokens: u64,
    /// Of these, and of tokens that were run again, those found in the cache.
    pub reused_tokens: u64,
    /// Seconds in nybl_session_append().
    pub prompt_seconds: f64,
    /// Seconds from the beginning of the last append to the token after it; 0 before the first one.
    pub first_token_seconds: f64,
    /// Tokens made, but for those that came right after an append and took no pass.
    pub decoded_tokens: u64,
    /// The seconds for these.
    pub decode_seconds: f64,
    /// Drafts that were checked since the drafter was attached, and of these those that were accepted.
    pub drafted: u64,
    /// See above.
    pub accepted: u64,
    /// Tokens of the smaller model: see nybl_session_set_small_model().
    pub small_model_tokens: u64,
    /// Bytes of weights in the mapping of the file.
    pub mapped_bytes: u64,
    /// Bytes of weights in private memory.
    pub private_bytes: u64,
    /// Bytes of keys and values, those of all sessions that share the cache.
    pub kv_bytes: u64,
    /// Bytes of the session's other buffers.
    pub scratch_bytes: u64,
    /// The share of full effort that heat allows, 0 to 1.
    pub effort: f32,
    /// Not used.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, starts with a u32, numbers only.
unsafe impl Sized32 for nybl_session_metrics {}

/// Fills `metrics`, whose struct_size the caller has set.
///
/// # Safety
/// `session` is a live handle; `metrics` states its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_get_metrics(
    session: *mut nybl_session,
    metrics: *mut nybl_session_metrics,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let mut state = lock(session)?;
            let session = state.session();
            let done = session.metrics();
            let (drafted, accepted) = session
                .controller()
                .map_or((0, 0), |c| (c.metrics().drafted, c.metrics().accepted));
            let (private, mapped) = session.model().weight_bytes();
            let (kv, scratch) = session.bytes();
            let governor = session.model().runtime().governor();
            let value = nybl_session_metrics {
                struct_size: 0,
                retry_ms: governor.pause().map_or(0, |retry| retry.as_millis() as u32),
                prompt_tokens: done.prompt_tokens,
                reused_tokens: done.reused_tokens,
                prompt_seconds: done.prompt_time.as_secs_f64(),
                first_token_seconds: done.first_token.map_or(0.0, |time| time.as_secs_f64()),
                decoded_tokens: done.decoded_tokens,
                decode_seconds: done.decode_time.as_secs_f64(),
                drafted,
                accepted,
                small_model_tokens: session.small_model_tokens(),
                mapped_bytes: mapped as u64,
                private_bytes: private as u64,
                kv_bytes: kv as u64,
                scratch_bytes: scratch as u64,
                effort: governor.effort(),
                reserved: 0,
            };
            drop(governor);
            write_result("metrics", metrics, &value)
        }
    })
}
