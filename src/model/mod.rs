//! The model: its configuration, its weights and one forward pass for every family.

pub mod config;
mod family;
pub mod forward;
pub mod rope;
pub mod steps;
pub mod weights;
