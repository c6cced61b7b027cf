//! The C interface: what `include/nybl.h` declares. Nothing is implemented here.
//!
//! Every function checks its pointers, runs inside a panic boundary and answers with a status; results go
//! through out-parameters, which are set to NULL or zero first. `include/nybl.h` is generated from these
//! files, so their doc comments speak to a C reader.

mod model;
mod runtime;
mod session;
mod spec;
mod status;
mod structs;

pub use model::*;
pub use runtime::*;
pub use session::*;
pub use spec::*;
pub use status::*;
