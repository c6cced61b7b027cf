//! Text on either side of the model: tokenizers before it, samplers after it.

pub mod logprobs;
pub mod sample;
pub mod stop;
#[cfg(feature = "chat")]
pub mod template;
#[cfg(feature = "text")]
pub mod tokenizer;
#[cfg(feature = "text")]
pub mod vocabulary;
