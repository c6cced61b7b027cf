//! Model files. All untrusted bytes end in this layer: what leaves it is checked.
#![warn(clippy::cast_possible_truncation)]

pub mod blocks;
pub mod checkpoint;
#[cfg(feature = "huggingface")]
mod families;
pub mod gguf;
#[cfg(feature = "huggingface")]
pub mod huggingface;
pub mod metadata;
pub mod model_file;
pub mod nybl;
pub mod reader;
#[cfg(feature = "huggingface")]
pub mod safetensors;
#[cfg(all(any(target_os = "linux", target_os = "android"), not(miri)))]
mod sealed;
#[cfg(feature = "huggingface")]
mod sentencepiece;
pub mod source;
pub mod tensor;
mod unfuse;
#[cfg(feature = "huggingface")]
mod words;
mod writer;
