pub mod error;
pub mod isa;
pub mod kernel;
pub mod kv;
pub mod memory;
pub mod quant;
pub mod threads;

#[cfg(feature = "engine")]
pub mod file;
#[cfg(feature = "engine")]
pub mod model;
#[cfg(feature = "engine")]
pub mod text;

pub use error::{Error, Result};
#[cfg(feature = "engine")]
pub mod engine;
