//! The C interface: what `include/nybl.h` declares. Nothing is implemented here.
//!
//! Every function checks its pointers, runs inside a panic boundary and answers with a status; results go
//! through out-parameters, which are set to NULL or zero first. `include/nybl.h` is generated from these
//! files, so their doc comments speak to a C reader. The levels below the engine build without it.

#[cfg_attr(not(feature = "text"), allow(dead_code, reason = "the engine's functions use the rest"))]
mod structs;

// The chapters of the header, in its order, which is why they stand apart.

#[cfg_attr(not(feature = "text"), allow(dead_code, reason = "the engine's functions use the rest"))]
mod status;

mod kernels;

mod kv;

mod spec;

mod drafter;

#[cfg(feature = "text")]
mod runtime;

#[cfg(feature = "text")]
mod model;

#[cfg(feature = "text")]
mod load;

#[cfg(feature = "chat")]
mod chat;

#[cfg(feature = "text")]
mod session;

#[cfg(feature = "text")]
mod plan;

#[cfg(feature = "text")]
mod choice;

#[cfg(feature = "text")]
mod keep;

#[cfg(feature = "text")]
mod speculate;

#[cfg(feature = "text")]
mod batch;

#[cfg(feature = "text")]
mod govern;

mod api;

#[cfg(feature = "jni")]
mod java;

pub use api::*;
pub use drafter::*;
pub use kernels::*;
pub use kv::*;
pub use spec::*;
pub use status::*;

#[cfg(feature = "text")]
pub use {
    batch::*, choice::*, govern::*, keep::*, load::*, model::*, plan::*, runtime::*, session::*,
    speculate::*,
};

#[cfg(feature = "chat")]
pub use chat::*;
