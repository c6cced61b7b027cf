//! # Engine: how tokens are chosen and texts end
//!
//! Samplers with penalties, biases, a hook on the logits, strings that end a text, and what the model thought.
//! All of it also with speculation, which changes nothing of it.

use super::model::copy_out;
use super::session::{lock, nybl_session};
use super::spec::{nybl_sampler, sampler};
use super::status::{Failure, NYBL_ERR_INVALID_ARGUMENT, guard, nybl_status};
use super::structs::{read_config, set, slice, text};
use crate::spec::distribution::{History, Hook};
use std::ffi::{c_char, c_void};

/// Changes how tokens are chosen, from the next one on. The random numbers go on where they were. NULL is
/// greedy without penalties.
///
/// # Safety
/// `session` is a live handle; `config` is NULL or states its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_set_sampler(
    session: *mut nybl_session,
    config: *const nybl_sampler,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        let (mut state, config) = unsafe { (lock(session)?, sampler(read_config(config)?)?) };
        Ok(state.session().set_sampler(config)?)
    })
}

/// Adds `biases[i]` to the logit of token `tokens[i]` before anything else, from the next token on and instead of
/// the biases before; minus infinity forbids a token. `count` 0 ends it.
///
/// # Safety
/// `session` is a live handle; `tokens` and `biases` have `count` elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_set_logit_bias(
    session: *mut nybl_session,
    tokens: *const u32,
    biases: *const f32,
    count: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        let (mut state, tokens, biases) = unsafe {
            (lock(session)?, slice("tokens", tokens, count)?, slice("biases", biases, count)?)
        };
        let entries: Vec<_> = tokens.iter().copied().zip(biases.iter().copied()).collect();
        Ok(state.session().set_logit_bias(&entries)?)
    })
}

/// Changes `logits`, one for each of the `vocab` tokens, before a token is chosen from them: the mask of a grammar,
/// for example, minus infinity for what it forbids. `tokens` is the sequence before that token, followed by
/// `n_drafts` drafts at its end that are only supposed: the same text may be asked for more than once, and texts
/// that do not come to pass. What it does may depend on `tokens` and on nothing else. It is called by the thread
/// that asks for a token, must not unwind, and must not call functions of the session.
pub type nybl_logits_fn = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        tokens: *const u32,
        n_tokens: usize,
        n_drafts: usize,
        logits: *mut f32,
        vocab: usize,
    ),
>;

/// Lets logits go through `hook` from the next token on, after the biases; NULL for none. Forks keep it: `user` stays
/// valid until they have ended, too.
///
/// # Safety
/// `session` is a live handle; `hook` may be called with `user` by any thread that uses the session or a fork of
/// it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_set_logits_hook(
    session: *mut nybl_session,
    hook: nybl_logits_fn,
    user: *mut c_void,
) -> nybl_status {
    struct User(*mut c_void);
    // SAFETY: the caller says that other threads may have the pointer.
    unsafe impl Send for User {}
    // SAFETY: as above.
    unsafe impl Sync for User {}
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        let mut state = unsafe { lock(session) }?;
        let user = User(user);
        let hook = hook.map(|hook| {
            Hook::new(move |history: History<'_>, logits: &mut [f32]| {
                let user = &user;
                let tokens = [history.settled, history.drafted].concat();
                let (data, vocab) = (logits.as_mut_ptr(), logits.len());
                // SAFETY: the caller vouches for the function and its argument.
                unsafe {
                    hook(user.0, tokens.as_ptr(), tokens.len(), history.drafted.len(), data, vocab);
                }
            })
        });
        state.session().set_logits_hook(hook);
        Ok(())
    })
}

/// Ends texts at any of these strings: NYBL_EVENT_STOP then comes with the token that completes one. Neither the string
/// nor what follows it in that token is in the text of an event, and no part of it either: text that could be the
/// beginning of one is held back until it is known not to be, at the latest until the text ends otherwise. `count` 0
/// ends it.
///
/// # Safety
/// `session` is a live handle; `strings` has `count` pointers to UTF-8 texts of the lengths in `lengths`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_set_stop_strings(
    session: *mut nybl_session,
    strings: *const *const c_char,
    lengths: *const usize,
    count: usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let mut state = lock(session)?;
            let strings = slice("strings", strings, count)?;
            let lengths = slice("lengths", lengths, count)?;
            let texts: Result<Vec<_>, Failure> = (strings.iter().zip(lengths))
                .map(|(string, length)| Ok(text("strings", *string, *length)?.to_owned()))
                .collect();
            Ok(state.text.stop_at(texts?)?)
        }
    })
}

/// A token and the natural logarithm of its probability.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_logprob {
    /// The token.
    pub token: u32,
    /// Minus infinity for a token that cannot come.
    pub logprob: f32,
}

/// Has nybl_session_get_logprobs() tell about every token from the next one on: about the token itself and the `top`
/// likeliest, at most 1024. Costs a pass over the logits for each token. `enabled` 0 ends it.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_set_logprobs(
    session: *mut nybl_session,
    enabled: i32,
    top: u32,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        let mut state = unsafe { lock(session) }?;
        if top > 1024 {
            let text = format!("top is {top}: must be at most 1024");
            return Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text));
        }
        state.session().report_logprobs((enabled != 0).then_some(top as usize));
        Ok(())
    })
}

/// What the model itself, before biases, penalties and everything else, thought of the token of the last event, which
/// comes first, and of the likeliest ones in its place, which follow, likeliest first. Stores their number in
/// `count`, 0 where there is nothing to tell, and as many as fit in `logprobs`; NYBL_ERR_BUFFER_TOO_SMALL when that
/// is not all of them.
///
/// # Safety
/// `session` is a live handle; `logprobs` has room for `capacity`, `count` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_get_logprobs(
    session: *mut nybl_session,
    logprobs: *mut nybl_logprob,
    capacity: usize,
    count: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("count", count, 0)?;
            let mut state = lock(session)?;
            let Some((token, found)) = state.session().logprobs() else { return Ok(()) };
            let own = [(token, found.token)];
            let all: Vec<_> = (own.iter().chain(&found.top))
                .map(|(token, logprob)| nybl_logprob { token: *token, logprob: *logprob })
                .collect();
            copy_out("logprobs", &all, logprobs, capacity, count)
        }
    })
}
