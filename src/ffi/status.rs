//! # Statuses, errors and versions
//!
//! What every call comes to, the words for a failure, and which library this is. Any thread, at any time.

use crate::error::Error;
use std::cell::RefCell;
use std::ffi::c_char;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a call came to: NYBL_OK or a code whose second byte is its class (1 the caller's mistake, 2 a
/// resource, 3 the data, 4 the state of a handle, 5 a bug in nybl). Codes are never reused; treat one
/// you do not know by its class.
pub type nybl_status = i32;

/// Done.
pub const NYBL_OK: nybl_status = 0;
/// An argument is NULL or outside what the function documents.
pub const NYBL_ERR_INVALID_ARGUMENT: nybl_status = 0x0101;
/// Well formed, but this build cannot do it.
pub const NYBL_ERR_UNSUPPORTED: nybl_status = 0x0102;
/// The caller's buffer is too small; the needed length has been stored.
pub const NYBL_ERR_BUFFER_TOO_SMALL: nybl_status = 0x0103;
/// The system refused memory.
pub const NYBL_ERR_OUT_OF_MEMORY: nybl_status = 0x0201;
/// The system refused to open, read, map or write a file.
pub const NYBL_ERR_IO: nybl_status = 0x0202;
/// The KV cache has used its budget up; truncate or free a sequence.
pub const NYBL_ERR_KV_EXHAUSTED: nybl_status = 0x0203;
/// A file contradicts its own format.
pub const NYBL_ERR_CORRUPT: nybl_status = 0x0301;
/// The session holds as many tokens as its context allows.
pub const NYBL_ERR_CONTEXT_FULL: nybl_status = 0x0401;
/// An earlier call on this session failed part-way; reset it.
pub const NYBL_ERR_POISONED: nybl_status = 0x0402;
/// Another thread is inside a call on this handle.
pub const NYBL_ERR_BUSY: nybl_status = 0x0403;
/// The call was cancelled; the session holds what it held before.
pub const NYBL_ERR_CANCELLED: nybl_status = 0x0404;
/// The device is too hot to go on; nothing has changed. Try again later, after a new report.
pub const NYBL_ERR_THERMAL_PAUSE: nybl_status = 0x0405;
/// A bug in nybl, caught before it could reach the caller.
pub const NYBL_ERR_INTERNAL: nybl_status = 0x0501;

/// Changes when a program built against an older header would break.
pub const NYBL_ABI_MAJOR: u32 = 1;
/// Grows when something is added.
pub const NYBL_ABI_MINOR: u32 = 0;

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Why a call failed, with the code it becomes.
pub(super) struct Failure {
    code: nybl_status,
    text: String,
}

impl Failure {
    pub(super) fn new(code: nybl_status, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    pub(super) fn null(argument: &str) -> Self {
        Self::new(NYBL_ERR_INVALID_ARGUMENT, format!("{argument} is NULL"))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::InvalidArgument(_) => NYBL_ERR_INVALID_ARGUMENT,
            Error::Unsupported(_) => NYBL_ERR_UNSUPPORTED,
            Error::OutOfMemory { .. } => NYBL_ERR_OUT_OF_MEMORY,
            Error::Io { .. } => NYBL_ERR_IO,
            Error::Corrupt { .. } => NYBL_ERR_CORRUPT,
            Error::ContextFull { .. } => NYBL_ERR_CONTEXT_FULL,
            Error::KvExhausted { .. } => NYBL_ERR_KV_EXHAUSTED,
            Error::Poisoned => NYBL_ERR_POISONED,
            Error::Cancelled => NYBL_ERR_CANCELLED,
            Error::ThermalPause { .. } => NYBL_ERR_THERMAL_PAUSE,
            Error::Internal(_) => NYBL_ERR_INTERNAL,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
thread_local! {
    /// Makes the next guarded body of this thread panic before it begins.
    pub(super) static PANIC_NEXT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Where a test may let a panic begin.
fn begin() {
    #[cfg(test)]
    if PANIC_NEXT.take() {
        panic!("injected by a test");
    }
}

/// Runs the body of a function: a failure becomes its code and the thread's last error, a panic becomes
/// NYBL_ERR_INTERNAL.
pub(super) fn guard(body: impl FnOnce() -> Result<(), Failure>) -> nybl_status {
    let body = || {
        begin();
        body()
    };
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return NYBL_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string);
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            let text = text.unwrap_or_else(|| "a panic without a message".into());
            Failure::from(Error::Internal(text))
        }
    };
    // A thread that is ending may have no storage left for the text; the code still tells.
    let _ = LAST_ERROR.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            *last = failure.text;
        }
    });
    failure.code
}

/// Runs the body of a function that cannot report: a panic is swallowed and gives `otherwise`.
pub(super) fn guard_or<T>(otherwise: T, body: impl FnOnce() -> T) -> T {
    let body = || {
        begin();
        body()
    };
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(otherwise)
}

/// The end of a handle, which NULL stands for none of.
///
/// # Safety
/// `handle` is NULL or came out of a box, and is not used again.
pub(super) unsafe fn destroy<T>(handle: *mut T) {
    guard_or((), || {
        if !handle.is_null() {
            // SAFETY: the caller vouches for the handle.
            drop(unsafe { Box::from_raw(handle) });
        }
    });
}

/// Copies `text` and a terminating zero into `buffer`, cut to whole characters if it is too small.
///
/// # Safety
/// `buffer` points to `capacity` writable bytes, or is NULL.
pub(super) unsafe fn copy_text(text: &str, buffer: *mut c_char, capacity: usize) {
    if buffer.is_null() || capacity == 0 {
        return;
    }
    let end = text.floor_char_boundary(capacity - 1);
    // SAFETY: `end < capacity`, and the caller vouches for the buffer.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast(), end);
        *buffer.add(end) = 0;
    }
}

/// The ABI version of the loaded library: major << 16 | minor. Compare the major with NYBL_ABI_MAJOR.
#[unsafe(no_mangle)]
pub extern "C" fn nybl_abi_version() -> u32 {
    NYBL_ABI_MAJOR << 16 | NYBL_ABI_MINOR
}

/// The library's version as text, such as "0.1.0". Static.
#[unsafe(no_mangle)]
pub extern "C" fn nybl_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The name of a status, such as "NYBL_ERR_IO"; "NYBL_ERR_UNKNOWN" for one this library does not have.
/// Static.
#[unsafe(no_mangle)]
pub extern "C" fn nybl_status_name(status: nybl_status) -> *const c_char {
    let name: &std::ffi::CStr = match status {
        NYBL_OK => c"NYBL_OK",
        NYBL_ERR_INVALID_ARGUMENT => c"NYBL_ERR_INVALID_ARGUMENT",
        NYBL_ERR_UNSUPPORTED => c"NYBL_ERR_UNSUPPORTED",
        NYBL_ERR_BUFFER_TOO_SMALL => c"NYBL_ERR_BUFFER_TOO_SMALL",
        NYBL_ERR_OUT_OF_MEMORY => c"NYBL_ERR_OUT_OF_MEMORY",
        NYBL_ERR_IO => c"NYBL_ERR_IO",
        NYBL_ERR_KV_EXHAUSTED => c"NYBL_ERR_KV_EXHAUSTED",
        NYBL_ERR_CORRUPT => c"NYBL_ERR_CORRUPT",
        NYBL_ERR_CONTEXT_FULL => c"NYBL_ERR_CONTEXT_FULL",
        NYBL_ERR_POISONED => c"NYBL_ERR_POISONED",
        NYBL_ERR_BUSY => c"NYBL_ERR_BUSY",
        NYBL_ERR_CANCELLED => c"NYBL_ERR_CANCELLED",
        NYBL_ERR_THERMAL_PAUSE => c"NYBL_ERR_THERMAL_PAUSE",
        NYBL_ERR_INTERNAL => c"NYBL_ERR_INTERNAL",
        _ => c"NYBL_ERR_UNKNOWN",
    };
    name.as_ptr()
}

/// Copies what the last failing call of this thread had to say into `buffer`, zero-terminated and cut to
/// `capacity`, and returns the length of the whole text without the zero. A call that succeeds leaves
/// the text alone. `buffer` may be NULL to ask for the length.
///
/// # Safety
/// `buffer` points to `capacity` writable bytes, or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_last_error(buffer: *mut c_char, capacity: usize) -> usize {
    let copy = |last: &RefCell<String>| {
        let last = last.borrow();
        // SAFETY: the caller vouches for the buffer.
        unsafe { copy_text(&last, buffer, capacity) };
        last.len()
    };
    LAST_ERROR.try_with(copy).unwrap_or(0)
}
