//! Speculative decoding without loss: a target model checks several drafted tokens in one pass.
//!
//! Everything here works on plain arrays of logits and tokens, so a host with its own runtime can use
//! it for its own models. [`distribution`] turns logits into probabilities, and is also what plain
//! sampling uses; [`verify`] decides which drafts stand; [`tree`] says which draft follows which;
//! [`draft`] proposes, and [`control`] decides how many proposals are worth their time.

pub mod control;
mod cost;
pub mod distribution;
pub mod draft;
mod likeliest;
pub mod random;
pub mod tree;
pub mod verify;
