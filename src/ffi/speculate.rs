//! # Speculation
//!
//! A session that speculates: a drafter foretells tokens and the model checks several of them in one pass. The
//! tokens are those of the session alone, greedy or with a seed; drafts change how long a text takes. A
//! controller measures passes and drafts and goes without where they do not pay.

use super::drafter::{Attached, boxed, nybl_drafter};
use super::model::nybl_model;
use super::session::{lock, nybl_session};
use super::status::{Failure, NYBL_ERR_INVALID_ARGUMENT, NYBL_ERR_UNSUPPORTED, guard, nybl_status};
use super::structs::{Sized32, handle, read_config, set, write_result};
use crate::engine::draft::ModelDrafter;
use crate::spec::control::Controller;
use std::sync::Arc;

/// nybl_spec_config.mode: as many drafts as pay, none when none do.
pub const NYBL_SPEC_AUTO: u32 = 0;
/// nybl_spec_config.mode: every draft there is, for comparisons.
pub const NYBL_SPEC_ALWAYS: u32 = 1;

/// Settings of speculation; all zeros is the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_spec_config {
    /// sizeof(nybl_spec_config).
    pub struct_size: u32,
    /// One of NYBL_SPEC_*.
    pub mode: u32,
    /// The most drafts in a round; 0 for as many as can be, which is 7.
    pub max_drafts: u32,
    /// Not used; must be zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, starts with a u32, integers only.
unsafe impl Sized32 for nybl_spec_config {}

/// What speculation has come to since the drafter was attached. A round is one pass of the model.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_spec_stats {
    /// sizeof(nybl_spec_stats).
    pub struct_size: u32,
    /// The most drafts that a round may have now.
    pub limit: u32,
    /// Drafts of the last round.
    pub current: u32,
    /// Not used.
    pub reserved: u32,
    /// Passes of the model. Every pass gives one token more than it accepted drafts.
    pub passes: u64,
    /// Drafts that were checked.
    pub drafted: u64,
    /// Drafts that were accepted.
    pub accepted: u64,
    /// Drafts checked at each place of a round, those before them having been accepted.
    pub tried_at: [u64; 7],
    /// And accepted there.
    pub accepted_at: [u64; 7],
    /// Rounds of 0, 1, ... drafts.
    pub rounds: [u64; 8],
    /// Rounds without drafts, because a plain pass had to be measured.
    pub undrafted_measuring: u64,
    /// Because the limit or the end of the context left no room.
    pub undrafted_limited: u64,
    /// Because drafts were not expected to pay.
    pub undrafted_not_worth: u64,
    /// Because drafts have cost as much as they may.
    pub undrafted_overdrawn: u64,
    /// Because the drafter had nothing to say.
    pub undrafted_not_found: u64,
    /// Rounds that only served to look whether drafts pay again.
    pub probes: u64,
    /// Drafts that ended early because the drafter was not sure enough.
    pub early_stops: u64,
    /// Measured seconds of a pass over 1, 2, ... rows; 0 where there is no measurement.
    pub pass_seconds: [f64; 8],
    /// Measured seconds of drafting one token.
    pub draft_seconds: f64,
    /// Seconds that the drafter took to make good times without drafts.
    pub catch_up_seconds: f64,
    /// Seconds that drafts are reckoned to have saved; negative when they have cost some.
    pub saved_seconds: f64,
}

// SAFETY: `repr(C)`, starts with a u32, numbers only.
unsafe impl Sized32 for nybl_spec_stats {}

/// Makes a drafter of a smaller model, for sessions of `target`. It keeps `model` open and has KV cache and buffers
/// of its own. The vocabularies are the same, or have at least half of the tokens of `model` in common by their text;
/// NYBL_ERR_INVALID_ARGUMENT otherwise. Destroy it with nybl_drafter_destroy().
///
/// # Safety
/// `model` and `target` are live handles, `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_drafter_create_model(
    model: *const nybl_model,
    target: *const nybl_model,
    out: *mut *mut nybl_drafter,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let model = Arc::clone(&handle("model", model)?.model);
            let _memory = model.runtime().memory().enter();
            let drafter = ModelDrafter::new(model, &handle("target", target)?.model)?;
            set("out", out, boxed(Box::new(drafter)))
        }
    })
}

/// Lets `session` speculate with `drafter` from now on, instead of with the one before. `config` may be NULL. A
/// drafter serves one session at a time: NYBL_ERR_BUSY when it is attached. On failure the session is as before.
///
/// # Safety
/// `session` and `drafter` are live handles; `config` is NULL or states its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_spec_attach(
    session: *mut nybl_session,
    drafter: *mut nybl_drafter,
    config: *const nybl_spec_config,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        let (mut state, drafter, config) =
            unsafe { (lock(session)?, handle("drafter", drafter)?, read_config(config)?) };
        if config.reserved != 0 {
            return Err(Failure::new(NYBL_ERR_UNSUPPORTED, "config->reserved is not zero"));
        }
        let mut controller = match config.mode {
            NYBL_SPEC_AUTO => Controller::new(),
            NYBL_SPEC_ALWAYS => Controller::always(),
            mode => {
                let text = format!("config->mode is {mode}");
                return Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text));
            }
        };
        if config.max_drafts > 0 {
            controller.set_limit(config.max_drafts as usize);
        }
        Ok(state.session().attach(Box::new(Attached::new(drafter)?), controller)?)
    })
}

/// Lets the session go on without a drafter; no error when it has none. The drafter is free for another one.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_spec_detach(session: *mut nybl_session) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        unsafe { lock(session) }?.session().detach();
        Ok(())
    })
}

/// Shortens drafts to `share`, 0 to 1, of what they may be, as for heat or to save energy; 0 is no drafts. The
/// less is left, the likelier a draft must be to stand. NYBL_ERR_INVALID_ARGUMENT when no drafter is attached.
///
/// # Safety
/// `session` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_spec_set_share(
    session: *mut nybl_session,
    share: f32,
) -> nybl_status {
    guard(|| {
        if !(0.0..=1.0).contains(&share) {
            let text = format!("share is {share}: must be 0 to 1");
            return Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text));
        }
        // SAFETY: the caller vouches for the handle.
        let mut state = unsafe { lock(session) }?;
        state.session().controller().ok_or_else(no_drafter)?.set_share(share);
        Ok(())
    })
}

/// Fills `stats`, whose struct_size the caller has set. NYBL_ERR_INVALID_ARGUMENT when no drafter is attached.
///
/// # Safety
/// `session` is a live handle; `stats` states its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_spec_get_stats(
    session: *mut nybl_session,
    stats: *mut nybl_spec_stats,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let mut state = lock(session)?;
            let metrics = state.session().controller().ok_or_else(no_drafter)?.metrics();
            let undrafted = metrics.undrafted;
            let value = nybl_spec_stats {
                struct_size: 0,
                limit: metrics.limit as u32,
                current: metrics.current as u32,
                reserved: 0,
                passes: metrics.passes,
                drafted: metrics.drafted,
                accepted: metrics.accepted,
                tried_at: metrics.tried_at,
                accepted_at: metrics.accepted_at,
                rounds: metrics.rounds,
                undrafted_measuring: undrafted.measuring,
                undrafted_limited: undrafted.limited,
                undrafted_not_worth: undrafted.not_worth,
                undrafted_overdrawn: undrafted.overdrawn,
                undrafted_not_found: undrafted.not_found,
                probes: metrics.probes,
                early_stops: metrics.early_stops,
                pass_seconds: metrics.pass_seconds.map(Option::unwrap_or_default),
                draft_seconds: metrics.draft_seconds,
                catch_up_seconds: metrics.catch_up_seconds,
                saved_seconds: metrics.saved_seconds,
            };
            write_result("stats", stats, &value)
        }
    })
}

fn no_drafter() -> Failure {
    Failure::new(NYBL_ERR_INVALID_ARGUMENT, "no drafter is attached to the session")
}
