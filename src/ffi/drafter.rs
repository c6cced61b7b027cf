//! # Drafters
//!
//! Where drafts come from: n-grams of the text, a function of the host, a smaller model. For a session of this
//! library (nybl_spec_attach()), or for a host that verifies with nybl_verify().

use super::status::{Failure, NYBL_ERR_BUSY, destroy, guard, nybl_status};
use super::structs::{handle, set, slice};
use crate::error::{Error, Result};
use crate::spec::distribution::SamplerConfig;
use crate::spec::draft::{Draft, Drafter, Ngram, Request};
use crate::spec::random::Random;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

/// A source of drafts for one sequence. One thread at a time; a second one gets NYBL_ERR_BUSY.
pub struct nybl_drafter {
    shared: Arc<Shared>,
}

struct Shared {
    drafter: Mutex<Box<dyn Drafter>>,
    attached: AtomicBool,
}

impl Shared {
    fn lock(&self) -> std::result::Result<MutexGuard<'_, Box<dyn Drafter>>, Failure> {
        match self.drafter.try_lock() {
            Ok(drafter) => Ok(drafter),
            // Its drafts may be bad now, and bad drafts do no harm.
            Err(TryLockError::Poisoned(drafter)) => Ok(drafter.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(Failure::new(NYBL_ERR_BUSY, "another call is at this drafter"))
            }
        }
    }
}

/// A drafter as long as a session has it.
#[cfg(feature = "text")]
pub(super) struct Attached(Arc<Shared>);

#[cfg(feature = "text")]
impl Attached {
    /// # Errors
    /// When a session has it already.
    pub(super) fn new(drafter: &nybl_drafter) -> std::result::Result<Self, Failure> {
        if drafter.shared.attached.swap(true, Ordering::Acquire) {
            let text = "the drafter is attached to a session: detach it there first";
            return Err(Failure::new(NYBL_ERR_BUSY, text));
        }
        let attached = Self(Arc::clone(&drafter.shared));
        drafter.shared.lock()?.rewind(0);
        Ok(attached)
    }

    fn with<T>(&self, work: impl FnOnce(&mut dyn Drafter) -> Result<T>) -> Result<T> {
        match self.0.lock() {
            Ok(mut drafter) => work(&mut **drafter),
            Err(_) => Err(Error::InvalidArgument("a call on its drafter is in progress".into())),
        }
    }
}

#[cfg(feature = "text")]
impl Drop for Attached {
    fn drop(&mut self) {
        self.0.attached.store(false, Ordering::Release);
    }
}

#[cfg(feature = "text")]
impl Drafter for Attached {
    fn draft(&mut self, request: &Request<'_>, draft: &mut Draft) -> Result<()> {
        self.with(|drafter| drafter.draft(request, draft))
    }

    fn prepare(&mut self, context: &[u32], whole: bool) -> Result<()> {
        self.with(|drafter| drafter.prepare(context, whole))
    }

    fn rewind(&mut self, len: usize) {
        let _ = self.with(|drafter| {
            drafter.rewind(len);
            Ok(())
        });
    }
}

/// A handle of a drafter.
pub(super) fn boxed(drafter: Box<dyn Drafter>) -> *mut nybl_drafter {
    let shared = Shared { drafter: Mutex::new(drafter), attached: AtomicBool::new(false) };
    Box::into_raw(Box::new(nybl_drafter { shared: Arc::new(shared) }))
}

/// Makes a drafter that looks up what followed the last one to four tokens when they were last seen in the
/// sequence. Costs next to nothing and pays where a text repeats itself or its prompt: summaries, code,
/// conversations. Destroy it with nybl_drafter_destroy().
///
/// # Safety
/// `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_drafter_create_ngram(out: *mut *mut nybl_drafter) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointer.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            set("out", out, boxed(Box::new(Ngram::new())))
        }
    })
}

/// Proposes tokens to follow the `n_tokens` tokens of the sequence: stores at most `capacity` of them in
/// `drafts`, how sure it is of each, from 0 to 1, in `confidence` (which holds 0.5 before), and returns how many
/// there are; 0 when it has nothing to say. The pointers are valid during the call. It must not unwind or jump
/// out, and calls on the session that it drafts for get NYBL_ERR_BUSY.
pub type nybl_draft_fn = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        tokens: *const u32,
        n_tokens: usize,
        drafts: *mut u32,
        confidence: *mut f32,
        capacity: usize,
    ) -> usize,
>;

/// The function of a host.
struct Callback {
    function:
        unsafe extern "C" fn(*mut c_void, *const u32, usize, *mut u32, *mut f32, usize) -> usize,
    context: *mut c_void,
}

// SAFETY: the host promises that the function may be called on any thread, one at a time.
unsafe impl Send for Callback {}

impl Drafter for Callback {
    fn draft(&mut self, request: &Request<'_>, draft: &mut Draft) -> Result<()> {
        let (tokens, most) = (request.context, request.most);
        draft.tokens.resize(most, 0);
        draft.confidence.resize(most, 0.5);
        // SAFETY: the host promises a function that writes at most `most` elements to each array.
        let count = unsafe {
            (self.function)(
                self.context,
                tokens.as_ptr(),
                tokens.len(),
                draft.tokens.as_mut_ptr(),
                draft.confidence.as_mut_ptr(),
                most,
            )
        };
        draft.truncate(count);
        if count > most {
            return Err(Error::InvalidArgument(format!(
                "the drafting function says {count} drafts where there is room for {most}"
            )));
        }
        // Whatever else a host writes is no matter of memory, only of judgement.
        draft.confidence.iter_mut().for_each(|c| *c = if c.is_nan() { 0.0 } else { *c });
        Ok(())
    }

    fn prepare(&mut self, _context: &[u32], _whole: bool) -> Result<()> {
        Ok(())
    }

    fn rewind(&mut self, _len: usize) {}
}

/// Makes a drafter that calls `draft` with `context`, on the threads that ask for drafts. Destroy it with
/// nybl_drafter_destroy(); `context` must live as long, and as long as a session that it is attached to.
///
/// # Safety
/// `draft` does what its type says, on any thread; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_drafter_create_callback(
    draft: nybl_draft_fn,
    context: *mut c_void,
    out: *mut *mut nybl_drafter,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointer.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let function = draft.ok_or_else(|| Failure::null("draft"))?;
            set("out", out, boxed(Box::new(Callback { function, context })))
        }
    })
}

/// Gives up a drafter. A session that it is attached to keeps it. NULL is ignored.
///
/// # Safety
/// `drafter` is NULL or a live handle, which is dead afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_drafter_destroy(drafter: *mut nybl_drafter) {
    // SAFETY: the caller vouches for the handle, which came out of a box.
    unsafe { destroy(drafter) };
}

/// Drafts for a host that runs its target elsewhere: stores at most `capacity` tokens to follow the `n_tokens`
/// tokens of the sequence in `drafts`, how sure the drafter is of each in `confidence` (may be NULL), and their
/// number in `count`. Verify them with nybl_verify(), without draft_probabilities. The sequence may grow
/// between calls; when it has been cut or replaced, call nybl_drafter_rewind() first. NYBL_ERR_BUSY while a
/// session has the drafter.
///
/// # Safety
/// `drafter` is a live handle, `tokens` has `n_tokens` tokens, `drafts` and `confidence` have room for `capacity`,
/// `count` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_drafter_draft(
    drafter: *mut nybl_drafter,
    tokens: *const u32,
    n_tokens: usize,
    drafts: *mut u32,
    confidence: *mut f32,
    capacity: usize,
    count: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("count", count, 0)?;
            let shared = &free(drafter)?.shared;
            let context = slice("tokens", tokens, n_tokens)?;
            if drafts.is_null() && capacity > 0 {
                return Err(Failure::null("drafts"));
            }
            let request = Request {
                context,
                most: capacity.min(MOST_AT_ONCE),
                sampler: &SamplerConfig::greedy(),
                hook: None,
                random: Random(0),
                go_on: &|_| true,
            };
            let mut draft = Draft::default();
            shared.lock()?.draft(&request, &mut draft)?;
            draft.truncate(request.most);
            draft.confidence.resize(draft.tokens.len(), 0.0);
            let len = draft.tokens.len();
            if len > 0 {
                std::ptr::copy_nonoverlapping(draft.tokens.as_ptr(), drafts, len);
                if !confidence.is_null() {
                    std::ptr::copy_nonoverlapping(draft.confidence.as_ptr(), confidence, len);
                }
            }
            set("count", count, len)
        }
    })
}

/// However large the host's buffer is.
const MOST_AT_ONCE: usize = 1024;

/// Tells a drafter that its sequence has been cut to `len` tokens; 0 for another sequence.
///
/// # Safety
/// `drafter` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_drafter_rewind(
    drafter: *mut nybl_drafter,
    len: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        unsafe { free(drafter)? }.shared.lock()?.rewind(len);
        Ok(())
    })
}

/// A live drafter that no session has.
///
/// # Safety
/// `drafter` is NULL or a live handle.
unsafe fn free<'a>(drafter: *const nybl_drafter) -> std::result::Result<&'a nybl_drafter, Failure> {
    // SAFETY: the caller vouches for the handle.
    let drafter = unsafe { handle("drafter", drafter) }?;
    if drafter.shared.attached.load(Ordering::Acquire) {
        let text = "the drafter is attached to a session, which alone may use it";
        return Err(Failure::new(NYBL_ERR_BUSY, text));
    }
    Ok(drafter)
}
