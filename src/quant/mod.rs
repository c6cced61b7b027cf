//! Weights in and out of the packed layout, and the methods that choose their codes.

pub mod dense;
pub mod factor;
pub mod format;
pub mod gptq;
pub mod grid;
pub mod pack;
pub mod rtn;
pub mod shapes;
pub mod stats;
