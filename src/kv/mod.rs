//! The block-allocated KV cache: integers apart from bytes.
//!
//! [`blocks`] decides which block holds which positions and never sees a float; [`store`] owns the
//! bytes and never decides anything; [`attend`] walks the blocks of a sequence.

pub mod attend;
pub mod blocks;
pub mod store;

/// Tokens in a block. A multiple of 16, so that the order of floating-point operations in attention
/// does not depend on it.
pub const BLOCK_TOKENS: usize = 64;
