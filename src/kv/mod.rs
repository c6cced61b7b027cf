//! The block-allocated KV cache: integers apart from bytes.
//!
//! [`blocks`] decides which block holds which positions and never sees a float, [`prefix`] knows which
//! blocks a new sequence can take over; [`store`] owns the bytes and never decides anything;
//! [`attend`] walks the blocks of a sequence as far as [`sight`] reaches, [`snapshot`] takes one out of the process.

pub mod attend;
pub mod blocks;
mod elements;
pub(crate) mod hash;
mod large_pages;
pub mod prefix;
#[cfg(any(test, fuzzing))]
pub mod property;
mod regions;
pub mod sight;
pub mod snapshot;
mod spill;
mod states;
pub mod store;

/// Tokens in a block unless a cache is made with another number. A multiple of 16 in any case, so that
/// the order of floating-point operations in attention does not depend on it.
pub const BLOCK_TOKENS: usize = 64;
