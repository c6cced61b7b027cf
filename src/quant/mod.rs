//! Weights in and out of the packed layout, and the methods that choose their codes.

pub mod format;
pub mod pack;
pub mod rtn;
pub mod shapes;
