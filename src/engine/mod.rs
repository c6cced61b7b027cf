//! The engine: opens a model and runs sessions on it. Nothing here that a layer below could do.

pub mod cache;
#[cfg(feature = "text")]
pub mod convert;
pub mod draft;
pub mod governor;
pub mod load;
pub mod log;
pub mod pass;
pub mod perplexity;
pub mod plan;
pub mod pressure;
#[cfg(feature = "text")]
pub mod quantize;
pub mod runtime;
pub mod score;
pub mod sensors;
pub mod session;
pub mod speculate;
#[cfg(feature = "text")]
pub mod text;
mod translate;
pub mod warm;
