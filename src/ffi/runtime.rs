//! # Engine: runtime
//!
//! Threads, kernels and memory: what would otherwise be global. Two runtimes share nothing.

use super::status::{Failure, NYBL_ERR_INVALID_ARGUMENT, destroy, guard, nybl_status};
use super::structs::{Sized32, read_config, set, text};
use crate::engine::runtime::{Runtime, RuntimeConfig};
use crate::memory::{Hooks, Memory};
use std::ffi::{c_char, c_void};
use std::sync::Arc;

/// A runtime. Any thread may use it, several at a time.
pub struct nybl_runtime {
    pub(super) runtime: Arc<Runtime>,
}

/// Gives `size` bytes at a multiple of `align`, a power of two of at most 64, or NULL.
pub type nybl_alloc_fn =
    Option<unsafe extern "C" fn(context: *mut c_void, size: usize, align: usize) -> *mut c_void>;

/// Takes back what the nybl_alloc_fn beside it gave for the same size and alignment.
pub type nybl_free_fn = Option<
    unsafe extern "C" fn(context: *mut c_void, data: *mut c_void, size: usize, align: usize),
>;

/// An allocator of the host. Both functions may be called by any thread, several at a time, until the runtime
/// and everything made with it are gone; they must not unwind.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_allocator {
    /// sizeof(nybl_allocator).
    pub struct_size: u32,
    /// Not used; must be zero.
    pub reserved: u32,
    /// Passed to both functions.
    pub context: *mut c_void,
    /// Allocates.
    pub alloc: nybl_alloc_fn,
    /// Frees.
    pub free: nybl_free_fn,
}

// SAFETY: `repr(C)`, starts with a u32, and integers, pointers and optional functions may be zero.
unsafe impl Sized32 for nybl_allocator {}

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
    /// Where buffers come from: weights that are not mapped, KV blocks, activations, logits. NULL for the
    /// process's own allocator, which small things (handles, names, the tokenizer) always come from.
    pub allocator: *const nybl_allocator,
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
            let memory = memory(config.allocator)?;
            let config = RuntimeConfig {
                threads: config.threads as usize,
                isa,
                memory,
                ..RuntimeConfig::default()
            };
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
    // SAFETY: the caller vouches for the handle, which came out of a box.
    unsafe { destroy(runtime) };
}

/// The memory that a host's allocator stands for.
///
/// # Safety
/// `allocator` is NULL or states its size, and its functions do what their types say.
unsafe fn memory(allocator: *const nybl_allocator) -> Result<Memory, Failure> {
    if allocator.is_null() {
        return Ok(Memory::default());
    }
    // SAFETY: the caller vouches for the pointer.
    let allocator = unsafe { read_config(allocator) }?;
    let (Some(alloc), Some(free), 0) = (allocator.alloc, allocator.free, allocator.reserved) else {
        let text = "config->allocator: alloc or free is NULL, or reserved is not zero";
        return Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text));
    };
    // SAFETY: the caller vouches for the functions.
    Ok(unsafe { Memory::from_hooks(Hooks { context: allocator.context, alloc, free }) })
}
