//! # Engine: several sessions in one pass
//!
//! Decoding is bound by the reading of the weights. A batch reads them once for all its sessions, so that four sequences
//! take hardly longer than one. Nothing of it changes a token.

use super::session::{lock, lock_all, nybl_session};
use super::status::{Failure, NYBL_ERR_BUSY, destroy, guard, nybl_status};
use super::structs::{handle, set, slice};
use crate::engine::session::batch::Batch;
use crate::engine::speculate::Speculator;
use crate::memory::Memory;
use std::sync::{Mutex, TryLockError};

/// The buffers of passes over several sessions. One thread at a time; a second one gets NYBL_ERR_BUSY.
pub struct nybl_batch {
    batch: Mutex<Batch>,
    memory: Memory,
}

/// Makes a batch for up to `max_sessions` sessions in a pass, 1 to 256, that are of the same model as `like` and
/// agree with it in kv_format, sinks and window. It keeps the model open, not the session. Destroy it with
/// nybl_batch_destroy().
///
/// # Safety
/// `like` is a live handle; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_batch_create(
    like: *mut nybl_session,
    max_sessions: u32,
    out: *mut *mut nybl_batch,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let state = lock(like)?;
            let session = state.text.as_session();
            let batch = Mutex::new(session.batch(max_sessions as usize)?);
            let memory = session.model().runtime().memory().clone();
            set("out", out, Box::into_raw(Box::new(nybl_batch { batch, memory })))
        }
    })
}

/// Computes in one pass what the next call of nybl_session_next(), or of nybl_session_get_logits(), on each of the
/// `count` sessions would compute in one of its own: those calls then take no pass, and come to the same bits. More
/// sessions than the batch has room for go in several passes. A session that has nothing to compute or cannot go on is
/// left as it is, and its own call says why. Sessions with a drafter go without drafts here. Stores in `computed`,
/// which may be NULL, how many took part.
///
/// NYBL_ERR_CANCELLED when one of them was cancelled, NYBL_ERR_INVALID_ARGUMENT for a session that does not agree with
/// that of nybl_batch_create(), NYBL_ERR_BUSY when one is in another call or given twice; nothing has changed then.
///
/// # Safety
/// `batch` and the `count` elements of `sessions` are live handles; `computed` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_batch_decode(
    batch: *mut nybl_batch,
    sessions: *const *mut nybl_session,
    count: usize,
    computed: *mut usize,
) -> nybl_status {
    guard(|| {
        if !computed.is_null() {
            // SAFETY: the caller vouches for the pointer.
            unsafe { set("computed", computed, 0) }?;
        }
        // SAFETY: the caller vouches for the pointers.
        let (batch, sessions) =
            unsafe { (handle("batch", batch)?, slice("sessions", sessions, count)?) };
        let _memory = batch.memory.enter();
        let mut batch = match batch.batch.try_lock() {
            Ok(batch) => batch,
            // Every pass fills the buffers anew.
            Err(TryLockError::Poisoned(batch)) => batch.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::new(NYBL_ERR_BUSY, "another call is at this batch"));
            }
        };
        // SAFETY: the caller vouches for the handles.
        let mut states = unsafe { lock_all(sessions) }?;
        let mut sessions: Vec<_> = states.iter_mut().map(|state| state.session()).collect();
        let done = Speculator::decode_batch(&mut batch, &mut sessions)?;
        if !computed.is_null() {
            // SAFETY: the caller vouches for the pointer.
            unsafe { set("computed", computed, done) }?;
        }
        Ok(())
    })
}

/// Ends a batch; NULL is ignored.
///
/// # Safety
/// `batch` is NULL or a live handle, which is dead afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_batch_destroy(batch: *mut nybl_batch) {
    // SAFETY: the caller vouches for the handle, which came out of a box.
    unsafe { destroy(batch) };
}
