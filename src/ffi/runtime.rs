//! The runtime handle.

use super::status::{guard, guard_void, nybl_status};
use super::structs::{Sized32, read_config, set, text};
use crate::engine::runtime::{Runtime, RuntimeConfig};
use std::ffi::c_char;
use std::sync::Arc;

/// Threads and kernels; what would otherwise be global. Any thread may use it.
pub struct nybl_runtime {
    pub(super) runtime: Arc<Runtime>,
}

/// Settings of a runtime; all zeros is the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_runtime_config {
    /// sizeof(nybl_runtime_config).
    pub struct_size: u32,
    /// Threads to compute with, the calling one included; 0 for one on each available core.
    pub threads: u32,
    /// The strongest instruction set to use, such as "avx2", or NULL for all the CPU has.
    pub isa: *const c_char,
    /// Length of isa in bytes.
    pub isa_len: usize,
}

// SAFETY: `repr(C)`, starts with a u32, and integers and pointers may be zero.
unsafe impl Sized32 for nybl_runtime_config {}

/// Starts a runtime. `config` may be NULL. Destroy it with nybl_runtime_destroy().
///
/// # Safety
/// `config` is NULL or states its size; `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_runtime_create(
    config: *const nybl_runtime_config,
    out: *mut *mut nybl_runtime,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let config = read_config(config)?;
            let isa = text("config->isa", config.isa, config.isa_len)?;
            let isa = (!isa.is_empty()).then(|| isa.to_owned());
            let config =
                RuntimeConfig { threads: config.threads as usize, isa, ..RuntimeConfig::default() };
            let runtime = Arc::new(Runtime::new(&config)?);
            set("out", out, Box::into_raw(Box::new(nybl_runtime { runtime })))
        }
    })
}

/// Gives up a runtime. Models opened with it stay usable. NULL is ignored.
///
/// # Safety
/// `runtime` is NULL or from nybl_runtime_create() and not yet destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_runtime_destroy(runtime: *mut nybl_runtime) {
    if !runtime.is_null() {
        // SAFETY: the caller vouches for the handle, which came out of a box.
        guard_void(|| drop(unsafe { Box::from_raw(runtime) }));
    }
}
