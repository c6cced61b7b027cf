//! One error type for the whole library.
//!
//! A message answers three questions: what went wrong, where (file, field, tensor) and what to do.
//! The variants are the causes a host program can act on; each maps to one status code of the C
//! interface, so a new variant needs a new code there.

use std::fmt;
use std::time::Duration;

/// What every fallible function of nybl returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An argument is outside what the function documents.
    InvalidArgument(String),
    /// The input is well formed, but names something that this build cannot do.
    Unsupported(String),
    /// An allocation of `bytes` for `what` was refused by the system.
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
    },
    /// The operating system refused to open, read, map or write `path`.
    Io {
        /// The file.
        path: String,
        /// The system's words.
        reason: String,
    },
    /// A file contradicts its own format.
    Corrupt {
        /// The file.
        path: String,
        /// The header field, metadata key or tensor that is wrong.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The session holds as many tokens as its context allows.
    ContextFull {
        /// The context length in tokens.
        limit: usize,
    },
    /// The KV cache has used its budget up. Nothing has changed.
    KvExhausted {
        /// Bytes that the call needed.
        needed: usize,
        /// Bytes of the budget that no sequence holds.
        available: usize,
        /// The whole budget in bytes.
        budget: usize,
    },
    /// An earlier call on this session failed part-way; reset it to go on.
    Poisoned,
    /// The call was cancelled from another thread. The session holds what it held before the call.
    Cancelled,
    /// The device is too hot to go on. Nothing has changed.
    ThermalPause {
        /// When another try makes sense.
        retry: Duration,
    },
    /// A bug in nybl, caught before it could reach the host.
    Internal(String),
}

impl Error {
    /// A corrupt-file error; the readers of `file/` build most errors through this.
    pub fn corrupt(
        path: impl Into<String>,
        field: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        Self::Corrupt { path: path.into(), field: field.into(), reason: reason.into() }
    }

    /// The same error about a tensor of a file, where it did not know what it was about.
    #[must_use]
    pub fn in_tensor(self, path: &str, tensor: &str) -> Self {
        match self {
            Self::InvalidArgument(reason) => Self::corrupt(path, tensor, reason),
            Self::Unsupported(what) => {
                Self::Unsupported(format!("{path}: tensor {tensor}: {what}"))
            }
            other => other,
        }
    }

    /// An operating-system error on `path`.
    pub fn io(path: impl Into<String>, reason: &std::io::Error) -> Self {
        Self::Io { path: path.into(), reason: reason.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidArgument(why) => write!(f, "invalid argument: {why}"),
            Self::Unsupported(what) => write!(f, "unsupported: {what}"),
            Self::OutOfMemory { what, bytes } => {
                write!(f, "out of memory: {bytes} bytes for {what}")
            }
            Self::Io { path, reason } => write!(f, "{path}: {reason}"),
            Self::Corrupt { path, field, reason } => write!(f, "{path}: {field}: {reason}"),
            Self::ContextFull { limit } => write!(
                f,
                "context full: {limit} tokens; truncate or reset the session, or open it with a larger context"
            ),
            Self::KvExhausted { needed, available, budget } => write!(
                f,
                "KV cache full: {needed} bytes needed and {available} of {budget} free; truncate or free a sequence, or give the cache a larger budget"
            ),
            Self::Poisoned => {
                write!(f, "an earlier call on this session failed; reset it before going on")
            }
            Self::Cancelled => write!(f, "cancelled"),
            Self::ThermalPause { retry } => {
                write!(f, "too hot: try again in {} s, after a new report", retry.as_secs())
            }
            Self::Internal(what) => write!(f, "internal error (a bug in nybl): {what}"),
        }
    }
}

impl std::error::Error for Error {}
