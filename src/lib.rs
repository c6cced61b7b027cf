//! nybl: an embeddable LLM inference kernel.
//!
//! One packed file, mapped; int4 matrix kernels that multiply straight out of it; a block-allocated KV
//! cache; and an engine over them that streams tokens. The same model, prompt and seed give the same
//! bits on every instruction set, thread count and batch size.
//!
//! The README has the same in ten lines of C and of Rust.
//!
//! The layers, each using only those above it: [`kernel`], [`kv`], [`spec`], [`quant`] (these build alone, with
//! `default-features = false`), then `file`, `model`, `text`, `engine` and the C interface `ffi`.
//!
//! # Pages
//!
//! - [`docs::guide`]: from a checkpoint to a phone
//! - [`docs::kernels`]: the kernel table and how to add a row
//! - [`docs::numerics`]: the contract behind the equal bits
//! - [`docs::formats`]: packed matrices and the `.nybl` file
//! - [`docs::quantization`]: how codes of few bits are chosen, what that loses, and training for them
//! - [`docs::speculation`]: why drafts change no token, and how many there are
//! - [`docs::performance`]: what bounds each part, how it is measured, what was found
//! - [`docs::safety`]: what is trusted, and what is checked where

#[cfg(not(target_pointer_width = "64"))]
compile_error!("nybl needs a 64-bit target: sizes of models are computed in usize");

pub mod cores;
pub mod error;
pub mod isa;
pub mod kernel;
pub mod kv;
pub mod memory;
pub mod quant;
pub mod spec;
pub mod threads;

#[cfg(feature = "engine")]
pub mod engine;
#[cfg(feature = "capi")]
#[allow(non_camel_case_types, reason = "C names")]
pub mod ffi;
#[cfg(feature = "engine")]
pub mod file;
#[cfg(feature = "engine")]
pub mod model;
#[cfg(feature = "engine")]
pub mod text;

pub use error::{Error, Result};

/// The documentation's pages.
pub mod docs {
    #[doc = include_str!("docs/arm.md")]
    pub mod arm {}
    #[doc = include_str!("docs/formats.md")]
    pub mod formats {}
    #[doc = include_str!("docs/guide.md")]
    pub mod guide {}
    #[doc = include_str!("docs/instructions.md")]
    pub mod instructions {}
    #[doc = include_str!("docs/kernels.md")]
    pub mod kernels {}
    #[doc = include_str!("docs/numerics.md")]
    pub mod numerics {}
    #[doc = include_str!("docs/quantization.md")]
    pub mod quantization {}
    #[doc = include_str!("docs/performance.md")]
    pub mod performance {}
    #[doc = include_str!("docs/safety.md")]
    pub mod safety {}
    #[doc = include_str!("docs/speculation.md")]
    pub mod speculation {}
}

#[cfg(all(doctest, feature = "text"))]
#[doc = include_str!("../README.md")]
struct Readme;
