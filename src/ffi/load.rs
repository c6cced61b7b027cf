//! # Engine: where models come from
//!
//! A part of an open file (an asset of an Android package), memory, and what is read when.

use super::model::nybl_model;
use super::runtime::nybl_runtime;
use super::status::{Failure, NYBL_ERR_INVALID_ARGUMENT, NYBL_ERR_UNSUPPORTED, guard, nybl_status};
use super::structs::{Sized32, handle, read_config, set, slice, text};
use crate::engine::load::Model;
use crate::engine::warm::Progress;
use crate::file::model_file::ModelFile;
use crate::file::source::Source;
use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// nybl_source.kind: the file at `path`.
pub const NYBL_SOURCE_PATH: i32 = 1;
/// nybl_source.kind: `length` bytes of the open file `fd`, from `offset` on. `path` is what errors call it.
pub const NYBL_SOURCE_FD: i32 = 2;
/// nybl_source.kind: the `length` bytes at `data`, which stay there until the model and its sessions are gone.
/// `path` is what errors call them.
pub const NYBL_SOURCE_MEMORY: i32 = 3;

/// Where a model comes from.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_source {
    /// sizeof(nybl_source).
    pub struct_size: u32,
    /// One of NYBL_SOURCE_*.
    pub kind: i32,
    /// A path or a name, UTF-8.
    pub path: *const c_char,
    /// Length of path in bytes.
    pub path_len: usize,
    /// Where the model begins in the file: a multiple of 64. Android's zipalign does that for what is stored
    /// uncompressed.
    pub offset: u64,
    /// Bytes of the model; 0 for all that follow, in a file.
    pub length: u64,
    /// The bytes of NYBL_SOURCE_MEMORY: at a multiple of 64.
    pub data: *const c_void,
    /// The open file of NYBL_SOURCE_FD; it stays the caller's and may be closed afterwards.
    pub fd: i32,
    /// Not used; must be zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, starts with a u32, and integers and pointers may be zero.
unsafe impl Sized32 for nybl_source {}

/// Told by a background thread how many bytes of how many have been read; 0 goes on, anything else ends the
/// reading ahead. Must not unwind.
pub type nybl_progress_fn =
    Option<unsafe extern "C" fn(user: *mut c_void, bytes: u64, total: u64) -> i32>;

/// As nybl_model_open(), from any source.
///
/// # Safety
/// `runtime` is a live handle; `source` states its size and its members are what its kind promises; `out`
/// is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_open_source(
    runtime: *const nybl_runtime,
    source: *const nybl_source,
    out: *mut *mut nybl_model,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let runtime = Arc::clone(&handle("runtime", runtime)?.runtime);
            let file = open_sources(source, 1)?;
            let _memory = runtime.memory().enter();
            let model = Model::from_file(Arc::clone(&runtime), file)?;
            set("out", out, Box::into_raw(Box::new(nybl_model { model })))
        }
    })
}

/// As nybl_model_open_source(), from all parts of a model that was split, in order: the shards of a .nybl or GGUF
/// file. One source of the kind NYBL_SOURCE_PATH finds its other parts by their names, as nybl_model_open() does.
///
/// # Safety
/// `runtime` is a live handle; `sources` has `count` sources, each as nybl_model_open_source() takes it; `out` is
/// writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_open_sources(
    runtime: *const nybl_runtime,
    sources: *const nybl_source,
    count: usize,
    out: *mut *mut nybl_model,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let runtime = Arc::clone(&handle("runtime", runtime)?.runtime);
            let file = open_sources(sources, count)?;
            let _memory = runtime.memory().enter();
            let model = Model::from_file(Arc::clone(&runtime), file)?;
            set("out", out, Box::into_raw(Box::new(nybl_model { model })))
        }
    })
}

/// The head of a model.
///
/// # Safety
/// As [`nybl_model_open_sources`] says of `sources`.
pub(super) unsafe fn open_sources(
    sources: *const nybl_source,
    count: usize,
) -> Result<ModelFile, Failure> {
    if sources.is_null() {
        return Err(Failure::null("sources"));
    }
    // SAFETY: the caller vouches for the structs and their members. All have the size that the first one
    // states, which may not be the one that this library was built with.
    unsafe {
        let first = read_config(sources)?;
        if count == 1 && first.kind == NYBL_SOURCE_PATH {
            let path = text("sources->path", first.path, first.path_len)?;
            return Ok(ModelFile::open_path(Path::new(path))?);
        }
        let size = first.struct_size as usize;
        let each = (0..count).map(|index| read_source(sources.byte_add(index * size)));
        Ok(ModelFile::open(each.collect::<Result<_, Failure>>()?)?)
    }
}

/// Copies the bytes of `source` into memory and stores in `fd` a descriptor of them that the caller closes: a file without
/// a name that nobody can change any more (a sealed memfd on Linux and Android, ASharedMemory on Android 8 to 10;
/// NYBL_ERR_UNSUPPORTED elsewhere). A service hands it to other processes, which open it as NYBL_SOURCE_FD and share its
/// memory.
///
/// # Safety
/// As nybl_model_open_source() says of `source`; `fd` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_source_seal(source: *const nybl_source, fd: *mut i32) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("fd", fd, -1)?;
            let file = read_source(source)?.sealed_copy()?;
            #[cfg(unix)]
            set("fd", fd, std::os::fd::IntoRawFd::into_raw_fd(file))?;
            #[cfg(not(unix))]
            drop(file);
            Ok(())
        }
    })
}

/// Keeps all pages of the weights in memory until the model is closed. Needs a right that phones seldom give:
/// NYBL_ERR_IO without it.
///
/// # Safety
/// `model` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_lock_pages(model: *const nybl_model) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        Ok(unsafe { handle("model", model) }?.model.lock_pages()?)
    })
}

/// # Safety
/// As [`nybl_model_open_source`] says of `source`.
unsafe fn read_source(source: *const nybl_source) -> Result<Source, Failure> {
    if source.is_null() {
        return Err(Failure::null("source"));
    }
    // SAFETY: the caller vouches for the struct and its members.
    unsafe {
        let source = read_config(source)?;
        let name = text("source->path", source.path, source.path_len)?;
        if source.reserved != 0 {
            return Err(Failure::new(NYBL_ERR_UNSUPPORTED, "source->reserved is not zero"));
        }
        match source.kind {
            NYBL_SOURCE_PATH => Ok(Source::open(Path::new(name))?),
            NYBL_SOURCE_FD => {
                let length = (source.length != 0).then_some(source.length);
                let name = if name.is_empty() { "the file of the descriptor" } else { name };
                file_part(name, source.fd, source.offset, length)
            }
            NYBL_SOURCE_MEMORY => {
                let name = if name.is_empty() { "the model in memory" } else { name };
                let length = usize::try_from(source.length).unwrap_or(usize::MAX);
                let bytes = slice("source->data", source.data.cast::<u8>(), length)?;
                Ok(Source::from_static(name, bytes))
            }
            other => {
                let text = format!("source->kind: {other} is none of its values");
                Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text))
            }
        }
    }
}

/// # Safety
/// `fd` is open, or no descriptor at all.
#[cfg(unix)]
unsafe fn file_part(
    name: &str,
    fd: i32,
    offset: u64,
    length: Option<u64>,
) -> Result<Source, Failure> {
    use std::os::fd::BorrowedFd;
    if fd < 0 {
        return Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, format!("source->fd is {fd}")));
    }
    // SAFETY: the caller vouches for the descriptor, which is duplicated before anything else.
    let owned = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
    let file = owned.map_err(|reason| crate::Error::io(name, &reason))?;
    Ok(Source::part(name, &file.into(), offset, length)?)
}

/// # Safety
/// None: there are no descriptors here.
#[cfg(not(unix))]
unsafe fn file_part(_: &str, _: i32, _: u64, _: Option<u64>) -> Result<Source, Failure> {
    Err(Failure::new(NYBL_ERR_UNSUPPORTED, "this system has no file descriptors"))
}

/// Reads the weights into memory in the background, in the order of the layers. Sessions may work meanwhile:
/// they wait only for the layer that they have come to. `progress` may be NULL; it and `user` stay valid until
/// all has been read or the model is closed. Does nothing the second time.
///
/// # Safety
/// `model` is a live handle; `progress` may be called with `user` by another thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_prefetch(
    model: *const nybl_model,
    progress: nybl_progress_fn,
    user: *mut c_void,
) -> nybl_status {
    struct User(*mut c_void);
    // SAFETY: the caller says that another thread may have the pointer.
    unsafe impl Send for User {}
    guard(|| {
        // SAFETY: the caller vouches for the handle.
        let model = unsafe { handle("model", model) }?;
        let user = User(user);
        let report = progress.map(|progress| -> Progress {
            Box::new(move |bytes, total| {
                let user = &user;
                // SAFETY: the caller vouches for the function and its argument.
                unsafe { progress(user.0, bytes, total) == 0 }
            })
        });
        Ok(model.model.prefetch(report)?)
    })
}

/// Whether the first `layers` layers are in memory, in `ready` (0 or 1), after waiting up to `timeout_ms`; the
/// number of layers and one more stands for everything. Without nybl_model_prefetch() nothing is ever waited
/// for: what is not there is read when it is used.
///
/// # Safety
/// `model` is a live handle; `ready` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_wait(
    model: *const nybl_model,
    layers: u32,
    timeout_ms: u32,
    ready: *mut i32,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("ready", ready, 0)?;
            let model = handle("model", model)?;
            let timeout = Duration::from_millis(timeout_ms.into());
            let there = match (model.model.warming(), layers) {
                (Some(warming), 1..) => warming.wait(layers as usize - 1, Some(timeout)),
                _ => true,
            };
            set("ready", ready, i32::from(there))
        }
    })
}

/// Gives the memory of the weights back to the system, which reads them again when they are used; for a
/// host that is asked for memory. `bytes` gets how much it was at most; it may be NULL.
///
/// # Safety
/// `model` is a live handle; `bytes` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_release_pages(
    model: *const nybl_model,
    bytes: *mut u64,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let freed = handle("model", model)?.model.release_pages();
            if !bytes.is_null() {
                set("bytes", bytes, freed as u64)?;
            }
            Ok(())
        }
    })
}
