//! # Engine: what a model will take
//!
//! Asked before it is opened, so that no system has to end the process for it.

use super::load::{nybl_source, open_sources};
use super::session::{nybl_session_config, settings};
use super::status::{guard, nybl_status};
use super::structs::{Sized32, write_result};
use crate::engine::plan::{PlanConfig, plan};
use crate::kernel::KvFormat;

/// What a model and its sessions take, in bytes, and what would make them fit.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_plan {
    /// sizeof(nybl_plan).
    pub struct_size: u32,
    /// 1 when the dirty bytes stay within the budget, or when there is none; 0 otherwise.
    pub fits: i32,
    /// Weights in the mapping of the file: clean, shared, taken back by the system when it needs memory.
    pub mapped_bytes: u64,
    /// Weights in private memory: all of them where the file has to be packed first.
    pub private_bytes: u64,
    /// The tokenizer, an estimate.
    pub tokenizer_bytes: u64,
    /// Keys and values of all sessions when their contexts are full.
    pub kv_bytes: u64,
    /// Keys and values for every thousand tokens of one session.
    pub kv_1k_bytes: u64,
    /// Buffers of all sessions.
    pub scratch_bytes: u64,
    /// All that counts against the process: every member above but mapped_bytes and kv_1k_bytes.
    pub dirty_bytes: u64,
    /// What is left of it with every change that is known: no budget below can be met.
    pub least_bytes: u64,
    /// When it does not fit: the dirty bytes with the change below that harms least; 0 when none helps.
    pub remedy_bytes: u64,
    /// 1 when a part of the change is to convert the file to .nybl.
    pub remedy_convert: u32,
    /// Another nybl_session_config.prefill_chunk; 0 for no change.
    pub remedy_prefill_chunk: u32,
    /// Another nybl_session_config.kv_format; that of the settings for no change.
    pub remedy_kv_format: u32,
    /// Another nybl_session_config.context; 0 for no change.
    pub remedy_context: u32,
}

// SAFETY: `repr(C)`, starts with a u32, integers only.
unsafe impl Sized32 for nybl_plan {}

/// Plans for the model at `sources`, as nybl_model_open_sources() takes them, and for `sessions` sessions with
/// the settings `config`, which may be NULL. `budget` is what may be dirty; 0 for no limit. Reads the head of the
/// file and nothing else. A model that does not fit is NYBL_OK with `fits` 0.
///
/// # Safety
/// `sources` has `count` sources that state their size, `config` is NULL or states its size; `out` states its
/// size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_plan(
    sources: *const nybl_source,
    count: usize,
    config: *const nybl_session_config,
    sessions: u32,
    budget: u64,
    out: *mut nybl_plan,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            write_result("out", out, &nybl_plan::zero())?;
            let session = settings(config)?;
            let format = session.kv_format;
            let config = PlanConfig {
                session,
                sessions: sessions as usize,
                speculates: true,
                budget: (budget > 0).then(|| usize::try_from(budget).unwrap_or(usize::MAX)),
            };
            let plan = plan(&open_sources(sources, count)?, &config)?;
            let remedy = plan.remedies.first().copied().unwrap_or_default();
            let value = nybl_plan {
                struct_size: 0,
                fits: i32::from(plan.fits()),
                mapped_bytes: plan.mapped as u64,
                private_bytes: plan.private as u64,
                tokenizer_bytes: plan.tokenizer as u64,
                kv_bytes: plan.kv as u64,
                kv_1k_bytes: plan.kv_1k as u64,
                scratch_bytes: plan.scratch as u64,
                dirty_bytes: plan.dirty() as u64,
                least_bytes: plan.least as u64,
                remedy_bytes: remedy.dirty as u64,
                remedy_convert: u32::from(remedy.convert),
                remedy_prefill_chunk: remedy.prefill_chunk.unwrap_or(0) as u32,
                remedy_kv_format: remedy.kv_format.map_or(format as u32, |f: KvFormat| f as u32),
                remedy_context: remedy.context.unwrap_or(0) as u32,
            };
            write_result("out", out, &value)
        }
    })
}
