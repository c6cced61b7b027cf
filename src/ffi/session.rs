//! # Engine: sessions
//!
//! Tokens in, tokens and text out. nybl_session_next() is the primitive; nybl_session_generate() is a loop over it.

use super::model::nybl_model;
use super::status::{Failure, NYBL_ERR_BUSY, NYBL_ERR_UNSUPPORTED, destroy, guard, nybl_status};
use super::structs::{Sized32, handle, read_config, set, slice, text, write_result};
use crate::engine::cache::KvLimit;
use crate::engine::pass::Canceller;
use crate::engine::session::{Session, SessionConfig};
use crate::engine::speculate::Speculator;
use crate::engine::text::{Event, TextSession};
use crate::kv::sight::Streaming;
use crate::memory::Entered;
use crate::text::sample::SamplerConfig;
use std::ffi::{c_char, c_void};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

/// One sequence of tokens on a model. One thread at a time; a second one, or a call from inside a callback of
/// the same session, gets NYBL_ERR_BUSY.
pub struct nybl_session {
    /// Shared with a call in progress, whose callback may destroy the handle.
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    destroyed: AtomicBool,
    /// Beside the state, for a thread that does not wait for it.
    canceller: Canceller,
}

pub(super) struct State {
    pub(super) text: TextSession,
}

/// nybl_session_config.flags: nobody waits for this session. It uses a quarter of the threads and half the time,
/// and lets other sessions of the model go first between chunks of its prompts, which are of 16 tokens unless
/// prefill_chunk says otherwise.
pub const NYBL_SESSION_BACKGROUND: u32 = 1;

/// Settings of a session; all zeros is the default: the model's context, greedy decoding.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_session_config {
    /// sizeof(nybl_session_config).
    pub struct_size: u32,
    /// Tokens the session can hold; 0 for as many as the model was trained for.
    pub context: u32,
    /// Prompt tokens that go through the model together; 0 for the default. Does not change a result.
    pub prefill_chunk: u32,
    /// Divides the logits before sampling; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Keep the top_k likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens that together reach this probability; 0 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this much as probable as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Not used; must be zero.
    pub reserved: u32,
    /// Where the random numbers start: the same seed gives the same tokens on every device.
    pub seed: u64,
    /// One of NYBL_KV_*: how keys and values are kept. All but NYBL_KV_F32 take less memory and round them.
    pub kv_format: u32,
    /// With `window`: the first tokens that are looked at and kept for good; 4 is usual.
    pub sinks: u32,
    /// When not 0, every token looks at the first `sinks` and the last `window` tokens alone, and only those
    /// are kept: `context` may then be longer than what the model was trained for, `sinks` and `window`
    /// together may not.
    pub window: u32,
    /// 0, or NYBL_SESSION_BACKGROUND.
    pub flags: u32,
    /// Bytes of memory for the keys and values of all sessions of the model that agree in the settings
    /// above; 0 for as many as their contexts need.
    pub kv_budget: u64,
    /// A folder for a file that takes those of idle sessions when this is used up; NULL for none.
    pub kv_spill_folder: *const c_char,
    /// Length of kv_spill_folder in bytes.
    pub kv_spill_folder_len: usize,
    /// Bytes that this file may take.
    pub kv_spill_budget: u64,
}

// SAFETY: `repr(C)`, starts with a u32, and numbers and pointers may be zero.
unsafe impl Sized32 for nybl_session_config {}

/// nybl_event.kind: a token was generated.
pub const NYBL_EVENT_TOKEN: i32 = 1;
/// nybl_event.kind: the model ended its text; `token` tells how and is no part of the sequence.
pub const NYBL_EVENT_END: i32 = 2;
/// nybl_event.kind: the context is full.
pub const NYBL_EVENT_CONTEXT_FULL: i32 = 3;
/// nybl_event.kind: a token was generated and with it a stop string is complete: see
/// nybl_session_set_stop_strings().
pub const NYBL_EVENT_STOP: i32 = 4;

/// What nybl_session_next() came to.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_event {
    /// sizeof(nybl_event).
    pub struct_size: u32,
    /// One of NYBL_EVENT_*.
    pub kind: i32,
    /// The token.
    pub token: u32,
    /// Not used.
    pub reserved: u32,
    /// Text that became certain with this event: whole UTF-8 characters, not zero-terminated, possibly
    /// none. Valid until the next call on the session.
    pub text: *const c_char,
    /// Length of text in bytes.
    pub text_len: usize,
}

// SAFETY: `repr(C)`, starts with a u32, and integers and pointers may be zero.
unsafe impl Sized32 for nybl_event {}

/// Starts an empty session. `config` may be NULL. Destroy it with nybl_session_destroy(); it keeps the
/// model open.
///
/// # Safety
/// `model` is a live handle, `config` is NULL or states its size, `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_create(
    model: *const nybl_model,
    config: *const nybl_session_config,
    out: *mut *mut nybl_session,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let model = &handle("model", model)?.model;
            let _memory = model.runtime().memory().enter();
            let config = settings(config)?;
            let session = Session::new(Arc::clone(model), &config)?;
            set("out", out, boxed(TextSession::new(Speculator::plain(session))))
        }
    })
}

/// The settings that a struct of the header stands for.
///
/// # Safety
/// `config` is NULL or states its size.
pub(super) unsafe fn settings(
    config: *const nybl_session_config,
) -> Result<SessionConfig, Failure> {
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        let config = read_config(config)?;
        if config.reserved != 0 || config.flags & !NYBL_SESSION_BACKGROUND != 0 {
            let text = "config->reserved is not zero, or config->flags has an unknown bit";
            return Err(Failure::new(NYBL_ERR_UNSUPPORTED, text));
        }
        let folder =
            text("config->kv_spill_folder", config.kv_spill_folder, config.kv_spill_folder_len)?;
        let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Ok(SessionConfig {
            context: config.context as usize,
            prefill_chunk: config.prefill_chunk as usize,
            sampler: SamplerConfig {
                temperature: config.temperature,
                top_k: config.top_k as usize,
                top_p: if config.top_p == 0.0 { 1.0 } else { config.top_p },
                min_p: config.min_p,
                seed: config.seed,
                ..SamplerConfig::default()
            },
            kv_format: super::kv::format("config->kv_format", config.kv_format)?,
            streaming: (config.window > 0).then_some(Streaming {
                sinks: config.sinks as usize,
                window: config.window as usize,
            }),
            kv_limit: (config.kv_budget > 0).then(|| KvLimit {
                memory: bytes(config.kv_budget),
                spill_folder: (!folder.is_empty()).then(|| folder.into()),
                spill: bytes(config.kv_spill_budget),
            }),
            background: config.flags & NYBL_SESSION_BACKGROUND != 0,
            ..SessionConfig::default()
        })
    }
}

/// A handle for a session.
pub(super) fn boxed(text: TextSession) -> *mut nybl_session {
    let canceller = text.as_session().canceller();
    let (state, destroyed) = (Mutex::new(State { text }), AtomicBool::new(false));
    let shared = Shared { state, destroyed, canceller };
    Box::into_raw(Box::new(nybl_session { shared: Arc::new(shared) }))
}

/// Ends a session. No call on it may be in progress, but for the nybl_session_generate() whose callback this
/// is called from: generation ends there. NULL is ignored. A handle that was destroyed is gone: to use or destroy
/// it once more is as undefined as it is for free().
///
/// # Safety
/// `session` is NULL or a live handle, which is dead afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_destroy(session: *mut nybl_session) {
    // SAFETY: the caller vouches for the handle.
    if let Some(session) = unsafe { session.as_ref() } {
        session.shared.destroyed.store(true, Ordering::Relaxed);
    }
    // SAFETY: the caller vouches for the handle, which came out of a box.
    unsafe { destroy(session) };
}

/// A session's state while a call has it, with the runtime's memory entered.
pub(super) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    _memory: Entered,
}

impl Deref for Locked<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Shared {
    /// The state, unless another call is at it.
    fn state(&self) -> Result<MutexGuard<'_, State>, Failure> {
        match self.state.try_lock() {
            Ok(state) => Ok(state),
            // A panic inside the model: the session itself knows that it is poisoned.
            Err(TryLockError::Poisoned(state)) => Ok(state.into_inner()),
            Err(TryLockError::WouldBlock) => {
                let text = "another thread, or the caller of this callback, is inside a call on this session";
                Err(Failure::new(NYBL_ERR_BUSY, text))
            }
        }
    }

    /// The same with the runtime's memory.
    fn lock(&self) -> Result<Locked<'_>, Failure> {
        let state = self.state()?;
        let memory = state.text.as_session().model().runtime().memory().enter();
        Ok(Locked { state, _memory: memory })
    }
}

/// The state of a live session, unless another call is at it.
///
/// # Safety
/// `session` is NULL or a live handle.
pub(super) unsafe fn lock<'a>(session: *const nybl_session) -> Result<Locked<'a>, Failure> {
    // SAFETY: the caller vouches for the handle.
    unsafe { handle("session", session) }?.shared.lock()
}

/// The states of several sessions, for a caller that has entered their runtime's memory.
///
/// # Safety
/// Each is NULL or a live handle.
pub(super) unsafe fn lock_all<'a>(
    sessions: &[*mut nybl_session],
) -> Result<Vec<MutexGuard<'a, State>>, Failure> {
    let state = |session: &*mut nybl_session| {
        // SAFETY: the caller vouches for the handle.
        unsafe { handle("sessions", session.cast_const()) }?.shared.state()
    };
    sessions.iter().map(state).collect()
}

/// Adds tokens to the sequence and runs them through the model. NYBL_ERR_CONTEXT_FULL when they do not
/// fit: nothing has changed then.
///
/// # Safety
/// `session` is a live handle, `ids` has `count` ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_append(
    session: *mut nybl_session,
    ids: *const u32,
    count: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        let (mut state, ids) = unsafe { (lock(session)?, slice("ids", ids, count)?) };
        Ok(state.text.append(ids)?)
    })
}

/// Chooses the next token and fills `event`, whose struct_size the caller has set. After NYBL_EVENT_END and
/// NYBL_EVENT_STOP the session may go on, with nybl_session_append() or without.
///
/// # Safety
/// `session` is a live handle; `event` states its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_next(
    session: *mut nybl_session,
    event: *mut nybl_event,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            // Before anything is generated, so that no token is lost to a bad pointer.
            write_result("event", event, &nybl_event::zero())?;
            let value = lock(session)?.next()?;
            write_result("event", event, &value)
        }
    })
}

impl State {
    fn next(&mut self) -> Result<nybl_event, Failure> {
        let (event, text) = self.text.next()?;
        let (kind, token) = match event {
            Event::Token(id) => (NYBL_EVENT_TOKEN, id),
            Event::Stop(id) => (NYBL_EVENT_STOP, id),
            Event::End(id) => (NYBL_EVENT_END, id),
            Event::ContextFull => (NYBL_EVENT_CONTEXT_FULL, 0),
        };
        let struct_size = size_of::<nybl_event>() as u32;
        let (text, text_len) = (text.as_ptr().cast(), text.len());
        Ok(nybl_event { struct_size, kind, token, reserved: 0, text, text_len })
    }

    /// The session itself. What adds to it or takes from it goes through `text`.
    pub(super) fn session(&mut self) -> &mut Speculator {
        self.text.session()
    }
}

/// Receives the events of nybl_session_generate(), on the thread that called it. `event` is valid until it
/// returns. Return 0 to go on, anything else to stop. It must not unwind or jump out. On the session that
/// generates it may call nybl_session_destroy(); other calls get NYBL_ERR_BUSY.
pub type nybl_event_fn =
    Option<unsafe extern "C" fn(context: *mut c_void, event: *const nybl_event) -> i32>;

/// Calls nybl_session_next() and passes each event to `each`, until an event is no token, `max_tokens` tokens
/// have been made (0: no limit) or `each` returns other than 0. NYBL_OK then; generation may go on with another
/// call. A failure comes after the events before it.
///
/// # Safety
/// `session` is a live handle, and `each` does what its type says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_generate(
    session: *mut nybl_session,
    max_tokens: usize,
    each: nybl_event_fn,
    context: *mut c_void,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        let shared = Arc::clone(unsafe { &handle("session", session)?.shared });
        let each = each.ok_or_else(|| Failure::null("each"))?;
        let mut state = shared.lock()?;
        let mut made = 0;
        loop {
            let event = state.next()?;
            // SAFETY: the caller vouches for the function.
            let stop = unsafe { each(context, &raw const event) } != 0;
            made += 1;
            let destroyed = shared.destroyed.load(Ordering::Relaxed);
            if stop || destroyed || event.kind != NYBL_EVENT_TOKEN || made == max_tokens {
                return Ok(());
            }
        }
    })
}

/// Cancels, from any thread and from callbacks too: the call in progress on the session, or when there is none
/// the next one, ends with NYBL_ERR_CANCELLED within a step of a layer and has then changed nothing. The call after
/// it goes on as if nothing had been.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_cancel(session: *const nybl_session) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        unsafe { handle("session", session) }?.shared.canceller.cancel();
        Ok(())
    })
}

/// Keeps the first `count` tokens of the sequence; more than it has is no error.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_truncate(
    session: *mut nybl_session,
    count: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        unsafe { lock(session) }?.text.truncate(count);
        Ok(())
    })
}

/// Forgets all tokens and makes a session usable again that answered NYBL_ERR_POISONED.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_reset(session: *mut nybl_session) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        unsafe { lock(session) }?.text.reset();
        Ok(())
    })
}

/// Borrows the logits after the last token: one float for each token of the vocabulary, valid until the
/// next call on the session.
///
/// # Safety
/// `session` is a live handle; `logits` and `count` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_get_logits(
    session: *mut nybl_session,
    logits: *mut *const f32,
    count: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("logits", logits, std::ptr::null())?;
            set("count", count, 0)?;
            let mut state = lock(session)?;
            let found = state.session().logits()?;
            set("logits", logits, found.as_ptr())?;
            set("count", count, found.len())
        }
    })
}
