//! # Engine: runtime
//!
//! Threads, kernels and memory: what would otherwise be global. Two runtimes share nothing.

use super::status::{
    Failure, NYBL_ERR_INVALID_ARGUMENT, NYBL_ERR_UNSUPPORTED, destroy, guard, nybl_status,
};
use super::structs::{Sized32, read_config, set, text};
use crate::cores::CorePolicy;
use crate::engine::governor::GovernorConfig;
use crate::engine::log::{Level, Log};
use crate::engine::runtime::{Runtime, RuntimeConfig};
use crate::memory::{Hooks, Memory};
use crate::threads::Executor;
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

/// nybl_runtime_config.cores: the big ones where cores are unlike, otherwise where the system likes.
pub const NYBL_CORES_AUTO: u32 = 0;
/// nybl_runtime_config.cores: wherever the system likes.
pub const NYBL_CORES_ALL: u32 = 1;
/// nybl_runtime_config.cores: the small ones where cores are unlike: least heat, for what nobody waits for.
pub const NYBL_CORES_SMALL: u32 = 2;
/// nybl_runtime_config.cores: those of core_mask.
pub const NYBL_CORES_MASK: u32 = 3;

/// Something went wrong that no call reports.
pub const NYBL_LOG_ERROR: u32 = 1;
/// Something is not as it should be, and work goes on.
pub const NYBL_LOG_WARN: u32 = 2;
/// What was opened, and what changed.
pub const NYBL_LOG_INFO: u32 = 3;
/// Details for whoever looks for a fault.
pub const NYBL_LOG_DEBUG: u32 = 4;

/// Receives a message of one runtime, `length` bytes of UTF-8 that are valid until it returns, on whichever thread
/// has something to say. It must not unwind and must not call functions of the runtime.
pub type nybl_log_fn = Option<
    unsafe extern "C" fn(user: *mut c_void, level: u32, message: *const c_char, length: usize),
>;

/// A part of a job; must be called once for every index.
pub type nybl_tile_fn = Option<unsafe extern "C" fn(job: *const c_void, index: usize)>;

/// Calls tile(job, 0) to tile(job, tiles - 1), each once, on whichever threads of the host, and returns when all have
/// returned. It must not unwind; `tile` does not.
pub type nybl_executor_fn = Option<
    unsafe extern "C" fn(user: *mut c_void, tiles: usize, tile: nybl_tile_fn, job: *const c_void),
>;

/// Settings of a runtime; all zeros is the default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_runtime_config {
    /// sizeof(nybl_runtime_config).
    pub struct_size: u32,
    /// Threads to compute with, the calling one included; 0 for one on each available core, which is also the most.
    pub threads: u32,
    /// The strongest instruction set to use, such as "avx2", or NULL for all the CPU has.
    pub isa: *const c_char,
    /// Length of isa in bytes.
    pub isa_len: usize,
    /// Where buffers come from: weights that are not mapped, KV blocks, activations, logits. NULL for the
    /// process's own allocator, which small things (handles, names, the tokenizer) always come from.
    pub allocator: *const nybl_allocator,
    /// One of NYBL_CORES_*: where the threads run. The calling thread stays where the host has put it.
    pub cores: u32,
    /// The least important level of messages for `log`: one of NYBL_LOG_*; 0 for NYBL_LOG_INFO.
    pub log_level: u32,
    /// For NYBL_CORES_MASK: core i may be used when bit i is set.
    pub core_mask: u64,
    /// Where messages go; NULL for nowhere.
    pub log: nybl_log_fn,
    /// Passed to log.
    pub log_user: *mut c_void,
    /// The host's own threads, `threads` of them, which must then be given; NULL for threads of the runtime.
    pub executor: nybl_executor_fn,
    /// Passed to executor.
    pub executor_user: *mut c_void,
    /// Degrees Celsius that the governor holds; 0 for 45.
    pub target_celsius: f32,
    /// Degrees from which on nothing runs until the target is reached again; 0 for 50.
    pub critical_celsius: f32,
    /// 1 lets the runtime read the sensors of Linux and Android itself, every few seconds while it works, where the
    /// system allows that; what the host reports counts instead as soon as it does.
    pub read_sensors: u32,
    /// Not used; must be zero.
    pub reserved: u32,
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
            if config.reserved != 0 || config.read_sensors > 1 {
                let text =
                    "config->reserved is not zero, or config->read_sensors is neither 0 nor 1";
                return Err(Failure::new(NYBL_ERR_UNSUPPORTED, text));
            }
            if config.executor.is_some() && config.threads == 0 {
                let text =
                    "config->threads is 0 with config->executor: say how many threads it has";
                return Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text));
            }
            let usual = GovernorConfig::default();
            let or = |value: f32, usual: f32| if value == 0.0 { usual } else { value };
            let config = RuntimeConfig {
                threads: config.threads as usize,
                isa,
                memory,
                cores: cores(&config)?,
                executor: executor(config.executor, User(config.executor_user)),
                governor: GovernorConfig {
                    target_celsius: or(config.target_celsius, usual.target_celsius),
                    critical_celsius: or(config.critical_celsius, usual.critical_celsius),
                    ..usual
                },
                log: log(config.log, User(config.log_user), config.log_level)?,
                read_sensors: config.read_sensors == 1,
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

/// What a host's functions are called with.
struct User(*mut c_void);

// SAFETY: the header says of the functions that any thread may call them with it.
unsafe impl Send for User {}
// SAFETY: as above.
unsafe impl Sync for User {}

fn cores(config: &nybl_runtime_config) -> Result<CorePolicy, Failure> {
    let mask = config.core_mask;
    match config.cores {
        NYBL_CORES_AUTO => Ok(CorePolicy::Auto),
        NYBL_CORES_ALL => Ok(CorePolicy::All),
        NYBL_CORES_SMALL => Ok(CorePolicy::Small),
        NYBL_CORES_MASK if mask != 0 => {
            Ok(CorePolicy::These((0..64).filter(|core| mask >> core & 1 == 1).collect()))
        }
        other => {
            let text = format!("config->cores is {other}, or config->core_mask is empty");
            Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text))
        }
    }
}

/// The caller of `nybl_runtime_create` vouches for the function.
fn executor(executor: nybl_executor_fn, user: User) -> Option<Executor> {
    let executor = executor?;
    Some(Arc::new(move |tiles, tile| {
        let user = &user;
        let job = std::ptr::from_ref(&tile).cast();
        // SAFETY: promised by the host; `tile` outlives the call, which returns when all tiles have.
        unsafe { executor(user.0, tiles, Some(run_tile), job) };
    }))
}

/// # Safety
/// `job` is the pointer that the executor got, and its call has not returned.
unsafe extern "C" fn run_tile(job: *const c_void, index: usize) {
    // SAFETY: the caller's promise. The pool catches what panics in a tile.
    let tile = unsafe { &*job.cast::<&(dyn Fn(usize) + Sync)>() };
    tile(index);
}

fn log(log: nybl_log_fn, user: User, level: u32) -> Result<Log, Failure> {
    const LEVELS: [Level; 4] = [Level::Error, Level::Warn, Level::Info, Level::Debug];
    let number = if level == 0 { NYBL_LOG_INFO } else { level };
    let Some(most) = LEVELS.get(number as usize - 1) else {
        let text = format!("config->log_level: {level} is none of its values");
        return Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text));
    };
    let Some(log) = log else { return Ok(Log::default()) };
    Ok(Log::to(*most, move |level, message| {
        let user = &user;
        let level = LEVELS.iter().position(|known| *known == level).map_or(0, |at| at + 1);
        // SAFETY: promised by the host.
        unsafe { log(user.0, level as u32, message.as_ptr().cast(), message.len()) };
    }))
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
