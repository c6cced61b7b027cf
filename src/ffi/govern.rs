//! # Engine: heat, power and memory
//!
//! The host tells what it knows of heat and of who is waiting; the runtime shortens drafts, uses fewer threads,
//! rests between tokens and, when nothing else helps, pauses. It never changes a token, unless the host has named a
//! smaller model to go on with. When the system wants memory, what costs least to get again goes first.

use super::model::nybl_model;
use super::runtime::nybl_runtime;
use super::session::{lock, nybl_session};
use super::status::{Failure, NYBL_ERR_INVALID_ARGUMENT, guard, nybl_status};
use super::structs::{Sized32, handle, read_config, write_result};
use crate::engine::governor::{Heat, PowerMode, ThermalLevel};
use crate::engine::pressure::Pressure;
use std::sync::Arc;

/// nybl_heat.level: not known.
pub const NYBL_THERMAL_UNKNOWN: i32 = 0;
/// nybl_heat.level: no limit. ProcessInfo's `nominal`; Android's THERMAL_STATUS_NONE.
pub const NYBL_THERMAL_NOMINAL: i32 = 1;
/// nybl_heat.level: no more than now. ProcessInfo's `fair`; Android's LIGHT.
pub const NYBL_THERMAL_FAIR: i32 = 2;
/// nybl_heat.level: less than now. ProcessInfo's `serious`; Android's MODERATE.
pub const NYBL_THERMAL_SERIOUS: i32 = 3;
/// nybl_heat.level: stop. ProcessInfo's `critical`; Android's SEVERE and worse.
pub const NYBL_THERMAL_CRITICAL: i32 = 4;

/// What is known of heat. What is zero is not known; of the rest the worst counts.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_heat {
    /// sizeof(nybl_heat).
    pub struct_size: u32,
    /// One of NYBL_THERMAL_*.
    pub level: i32,
    /// Android's getThermalHeadroom(): 1 is where the system throttles severely.
    pub headroom: f32,
    /// Degrees Celsius of the skin or the battery. 45 is held; at 50 nothing runs until 45 is reached again.
    pub celsius: f32,
}

// SAFETY: `repr(C)`, starts with a u32, numbers only.
unsafe impl Sized32 for nybl_heat {}

/// nybl_runtime_set_power_mode(): somebody is waiting for the text.
pub const NYBL_POWER_FOREGROUND: i32 = 0;
/// nybl_runtime_set_power_mode(): nobody is waiting: a quarter of the threads, half the time.
pub const NYBL_POWER_BACKGROUND: i32 = 1;
/// nybl_runtime_set_power_mode(): the battery is low: half the threads, no drafts.
pub const NYBL_POWER_LOW: i32 = 2;

/// What the governor does at present.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_governor_state {
    /// sizeof(nybl_governor_state).
    pub struct_size: u32,
    /// One of NYBL_POWER_*.
    pub power_mode: i32,
    /// The share of full effort that heat allows, 0 to 1.
    pub effort: f32,
    /// Milliseconds after which another report and another try make sense; 0 when nothing is paused.
    pub retry_ms: u32,
}

// SAFETY: `repr(C)`, starts with a u32, numbers only.
unsafe impl Sized32 for nybl_governor_state {}

/// Reports heat, every few seconds while the runtime works. A report with nothing known, or NULL, ends the
/// governing of heat: full effort again.
///
/// # Safety
/// `runtime` is a live handle; `heat` is NULL or states its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_runtime_report_heat(
    runtime: *const nybl_runtime,
    heat: *const nybl_heat,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        let (runtime, heat) = unsafe { (handle("runtime", runtime)?, read_config(heat)?) };
        let level = match heat.level {
            NYBL_THERMAL_UNKNOWN => None,
            NYBL_THERMAL_NOMINAL => Some(ThermalLevel::Nominal),
            NYBL_THERMAL_FAIR => Some(ThermalLevel::Fair),
            NYBL_THERMAL_SERIOUS => Some(ThermalLevel::Serious),
            NYBL_THERMAL_CRITICAL => Some(ThermalLevel::Critical),
            other => return Err(unknown("heat->level", other)),
        };
        let known = |value: f32| (value != 0.0).then_some(value);
        let heat = Heat { level, headroom: known(heat.headroom), celsius: known(heat.celsius) };
        Ok(runtime.runtime.report_heat(heat)?)
    })
}

/// Sets how much of the machine may be used: one of NYBL_POWER_*.
///
/// # Safety
/// `runtime` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_runtime_set_power_mode(
    runtime: *const nybl_runtime,
    mode: i32,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        let runtime = unsafe { handle("runtime", runtime) }?;
        runtime.runtime.set_power_mode(match mode {
            NYBL_POWER_FOREGROUND => PowerMode::Foreground,
            NYBL_POWER_BACKGROUND => PowerMode::Background,
            NYBL_POWER_LOW => PowerMode::LowPower,
            other => return Err(unknown("mode", other)),
        });
        Ok(())
    })
}

/// Fills `state`, whose struct_size the caller has set.
///
/// # Safety
/// `runtime` is a live handle; `state` states its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_runtime_get_governor_state(
    runtime: *const nybl_runtime,
    state: *mut nybl_governor_state,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let governor = handle("runtime", runtime)?.runtime.governor();
            let retry = governor.pause().map_or(0, |retry| retry.as_millis() as u32);
            let power_mode = match governor.mode() {
                PowerMode::Foreground => NYBL_POWER_FOREGROUND,
                PowerMode::Background => NYBL_POWER_BACKGROUND,
                PowerMode::LowPower => NYBL_POWER_LOW,
            };
            let value = nybl_governor_state {
                struct_size: 0,
                power_mode,
                effort: governor.effort(),
                retry_ms: retry,
            };
            write_result("state", state, &value)
        }
    })
}

/// Names a model that goes on in place of the session's own where it is too hot for that, or none with NULL. Its tokens
/// are its own; the session's model sees them as if they had been appended when it is cool again. The vocabularies
/// are as for nybl_drafter_create_model().
///
/// # Safety
/// `session` is a live handle; `model` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_session_set_small_model(
    session: *mut nybl_session,
    model: *const nybl_model,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the handles.
        let (mut state, model) = unsafe { (lock(session)?, model.as_ref()) };
        Ok(state.session().set_small_model(model.map(|model| Arc::clone(&model.model)))?)
    })
}

/// nybl_runtime_relieve(): cached keys and values that no session holds go. Android's TRIM_MEMORY_RUNNING_LOW.
pub const NYBL_PRESSURE_MODERATE: i32 = 1;
/// nybl_runtime_relieve(): keys and values of sessions go to their spill files as well. Apple's memory warning.
pub const NYBL_PRESSURE_HIGH: i32 = 2;
/// nybl_runtime_relieve(): the pages of weights as well. Android's TRIM_MEMORY_COMPLETE.
pub const NYBL_PRESSURE_CRITICAL: i32 = 3;

/// What was given back, in bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_freed {
    /// sizeof(nybl_freed).
    pub struct_size: u32,
    /// Caches that a session is working in; it gives back what they have when its pass is over.
    pub deferred: u32,
    /// Cached keys and values that no session held.
    pub prefix_bytes: u64,
    /// Keys and values that went to spill files.
    pub spilled_bytes: u64,
    /// Weights, at most: those of pages that were there.
    pub page_bytes: u64,
}

// SAFETY: `repr(C)`, starts with a u32, integers only.
unsafe impl Sized32 for nybl_freed {}

/// Gives memory of all models of the runtime back, as much as `pressure`, one of NYBL_PRESSURE_*, asks for. Waits for
/// no session, so it may be called by the thread that the system's warning comes to. `freed` may be NULL.
///
/// # Safety
/// `runtime` is a live handle; `freed` is NULL or states its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_runtime_relieve(
    runtime: *const nybl_runtime,
    pressure: i32,
    freed: *mut nybl_freed,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let runtime = handle("runtime", runtime)?;
            if !freed.is_null() {
                // Before anything is given back, so that no figure is lost to a bad size.
                write_result("freed", freed, &nybl_freed::zero())?;
            }
            let given = runtime.runtime.relieve(match pressure {
                NYBL_PRESSURE_MODERATE => Pressure::Moderate,
                NYBL_PRESSURE_HIGH => Pressure::High,
                NYBL_PRESSURE_CRITICAL => Pressure::Critical,
                other => return Err(unknown("pressure", other)),
            });
            if freed.is_null() {
                return Ok(());
            }
            let value = nybl_freed {
                struct_size: 0,
                deferred: given.deferred as u32,
                prefix_bytes: given.prefixes as u64,
                spilled_bytes: given.spilled as u64,
                page_bytes: given.pages as u64,
            };
            write_result("freed", freed, &value)
        }
    })
}

fn unknown(what: &str, value: i32) -> Failure {
    Failure::new(NYBL_ERR_INVALID_ARGUMENT, format!("{what}: {value} is none of its values"))
}
