//! # Verifier
//!
//! Which drafted tokens stand, over plain arrays: for hosts that run their models elsewhere. Stateless; any thread.

use super::status::{Failure, NYBL_ERR_INVALID_ARGUMENT, NYBL_ERR_UNSUPPORTED, guard, nybl_status};
use super::structs::{Sized32, read_config, set, slice};
use crate::isa::Isa;
use crate::kernel::Kernels;
use crate::spec::distribution::{Penalties, SamplerConfig};
use crate::spec::random::Random;
use crate::spec::tree::Drafts;
use crate::spec::verify::{Round, Verifier};

/// How a token is chosen from logits; all zeros is greedy.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_sampler {
    /// sizeof(nybl_sampler).
    pub struct_size: u32,
    /// Divides the logits before they become probabilities; 0 takes the largest, the lowest id on ties.
    pub temperature: f32,
    /// Keep the top_k largest; 0 keeps all.
    pub top_k: u32,
    /// Keep the likeliest tokens that together reach this probability; 0 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this much as probable as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides the logit of a token of the history when positive, multiplies it otherwise; 0 for 1.
    pub repeat_penalty: f32,
    /// Taken from the logit of a token for every time it is in the history.
    pub frequency_penalty: f32,
    /// Taken once from the logit of a token that is in the history.
    pub presence_penalty: f32,
    /// How many of the last tokens of the history count; 0 for all.
    pub penalty_window: u32,
    /// Not used; must be zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, starts with a u32, numbers only.
unsafe impl Sized32 for nybl_sampler {}

/// What nybl_verify() decides over. Rows are the tokens of one pass of the target model: row 0 is the last
/// token of the sequence, row i + 1 is draft i.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_verify_args {
    /// sizeof(nybl_verify_args).
    pub struct_size: u32,
    /// Tokens of the vocabulary.
    pub vocab: u32,
    /// The target's logits after each row: (n_drafts + 1) x vocab.
    pub logits: *const f32,
    /// The drafted tokens.
    pub drafts: *const u32,
    /// How many there are; may be 0.
    pub n_drafts: usize,
    /// The row that each draft follows, lower than the draft's own; NULL for a chain. Drafts that
    /// follow the same row are alternatives. Compute the target so that a row sees itself and its
    /// ancestors only.
    pub parents: *const u32,
    /// The distributions that the drafts were drawn from, n_drafts x vocab: row r is what the drafts that
    /// follow row r were drawn from, without replacement and in their order, after all of the
    /// drafter's own processing. NULL when the drafts were not drawn: greedy or looked up.
    pub draft_probabilities: *const f32,
    /// The sequence so far, for penalties; may be NULL.
    pub history: *const u32,
    /// Tokens in history.
    pub n_history: usize,
    /// The target's sampler; NULL for greedy.
    pub sampler: *const nybl_sampler,
}

// SAFETY: `repr(C)`, starts with a u32, and integers and pointers may be zero.
unsafe impl Sized32 for nybl_verify_args {}

/// Decides which drafts stand. What comes out is distributed exactly as if the target had been sampled
/// alone; a greedy target gives its own tokens, and so does a seed when the drafts were not drawn.
///
/// Stores the number of accepted drafts in `accepted`, their rows in `path` (room for n_drafts, NULL if
/// not wanted; 1, 2, 3, ... for a chain) and the token after them in `next`. Keep the target's cache of
/// row 0 and of the rows in `path`; `next` has not been through the target yet.
///
/// `random` is the state of the random numbers: any value to begin with, then what the last call left.
/// NULL if the sampler is greedy. NYBL_ERR_INVALID_ARGUMENT, and `random` is as before, for anything out
/// of range, for needed logits that are all NaN or minus infinity, and for probabilities that are no
/// distribution or could not have given their draft.
///
/// # Safety
/// `args` states its size and its pointers cover what their comments say; `random`, `path`, `accepted` and
/// `next` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_verify(
    args: *const nybl_verify_args,
    random: *mut u64,
    path: *mut u32,
    accepted: *mut usize,
    next: *mut u32,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("accepted", accepted, 0)?;
            set("next", next, 0)?;
            if args.is_null() {
                return Err(Failure::null("args"));
            }
            let args = read_config(args)?;
            let config = sampler(read_config(args.sampler)?)?;
            if random.is_null() && !config.is_greedy() {
                return Err(Failure::null("random"));
            }
            let (vocab, n) = (args.vocab as usize, args.n_drafts);
            let tokens = slice("args->drafts", args.drafts, n)?;
            let drafts = if args.parents.is_null() {
                Drafts::chain(tokens)
            } else {
                Drafts::tree(tokens, slice("args->parents", args.parents, n)?)?
            };
            let product = |rows: Option<usize>| {
                rows.and_then(|rows| rows.checked_mul(vocab)).ok_or_else(|| {
                    let text = format!("args->n_drafts is {n}");
                    Failure::new(NYBL_ERR_INVALID_ARGUMENT, text)
                })
            };
            let (floats, drawn) = (product(n.checked_add(1))?, product(Some(n))?);
            let probabilities = if args.draft_probabilities.is_null() {
                None
            } else {
                Some(slice("args->draft_probabilities", args.draft_probabilities, drawn)?)
            };
            let round = Round {
                scores: slice("args->logits", args.logits, floats)?.into(),
                vocab,
                drafts,
                probabilities,
                history: slice("args->history", args.history, args.n_history)?,
            };
            let kernels = Kernels::new(Isa::detect())?;
            let mut numbers = Random(if random.is_null() { 0 } else { random.read() });
            let verdict = Verifier::default().verify(&kernels, &config, &round, &mut numbers)?;
            if !path.is_null() {
                std::ptr::copy_nonoverlapping(verdict.path.as_ptr(), path, verdict.path.len());
            }
            if !random.is_null() {
                random.write(numbers.0);
            }
            set("accepted", accepted, verdict.path.len())?;
            set("next", next, verdict.next)
        }
    })
}

pub(super) fn sampler(config: nybl_sampler) -> Result<SamplerConfig, Failure> {
    if config.reserved != 0 {
        return Err(Failure::new(NYBL_ERR_UNSUPPORTED, "sampler->reserved is not zero"));
    }
    let or_one = |value: f32| if value == 0.0 { 1.0 } else { value };
    Ok(SamplerConfig {
        temperature: config.temperature,
        top_k: config.top_k as usize,
        top_p: or_one(config.top_p),
        min_p: config.min_p,
        penalties: Penalties {
            repeat: or_one(config.repeat_penalty),
            frequency: config.frequency_penalty,
            presence: config.presence_penalty,
            window: config.penalty_window as usize,
        },
        seed: 0,
    })
}
