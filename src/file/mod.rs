//! Model files. All untrusted bytes end in this layer: what leaves it is checked.
#![warn(clippy::cast_possible_truncation)]

pub mod blocks;
pub mod gguf;
pub mod metadata;
pub mod nybl;
pub mod reader;
pub mod source;
