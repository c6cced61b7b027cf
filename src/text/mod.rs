//! Text on either side of the model: tokenizers before it, samplers after it.

pub mod sample;
#[cfg(feature = "chat")]
pub mod template;
#[cfg(feature = "text")]
pub mod tokenizer;
#[cfg(feature = "text")]
pub mod vocabulary;
