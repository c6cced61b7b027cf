//! The model: its configuration, its weights and one forward pass.

pub mod config;
pub mod forward;
pub mod weights;
