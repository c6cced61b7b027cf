pub mod error;
pub mod isa;
pub mod kernel;
pub mod memory;
pub mod threads;
pub use error::{Error, Result};
pub mod quant;
