//! # Engine: models and their text
//!
//! An opened file, and the text that its vocabulary makes of tokens.

use super::runtime::nybl_runtime;
use super::status::{
    Failure, NYBL_ERR_BUFFER_TOO_SMALL, NYBL_ERR_INVALID_ARGUMENT, destroy, guard, guard_or,
    nybl_status,
};
use super::structs::{Sized32, handle, set, slice, text, write_result};
use crate::engine::load::Model;
use crate::kernel::KvFormat;
use std::ffi::c_char;
use std::path::Path;
use std::sync::Arc;

/// An opened model. Any thread may use it, several at a time.
pub struct nybl_model {
    pub(super) model: Arc<Model>,
}

/// What a model is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_model_info {
    /// sizeof(nybl_model_info).
    pub struct_size: u32,
    /// Tokens in the vocabulary.
    pub vocab: u32,
    /// Tokens the model was trained to see.
    pub context: u32,
    /// Transformer blocks.
    pub n_layers: u32,
    /// Width of the residual stream.
    pub d_model: u32,
    /// Query heads.
    pub n_heads: u32,
    /// Heads of keys and values.
    pub n_kv_heads: u32,
    /// Floats in a head.
    pub head_dim: u32,
    /// Bytes that a token costs in the KV cache.
    pub kv_token_bytes: u64,
    /// Bytes of weights in the mapping of the file: clean, shared, reclaimable.
    pub mapped_bytes: u64,
    /// Bytes of weights in private memory.
    pub private_bytes: u64,
}

// SAFETY: `repr(C)`, starts with a u32, integers only.
unsafe impl Sized32 for nybl_model_info {}

/// For nybl_tokenize(): begin with the model's begin-of-sequence token if it wants one.
pub const NYBL_TOKENIZE_ADD_SPECIAL: u32 = 1;
/// For nybl_tokenize(): text that names a special token becomes that token. Never set it for text from a
/// user, who could then write control tokens.
pub const NYBL_TOKENIZE_PARSE_SPECIAL: u32 = 2;

/// Opens the .nybl or GGUF file at `path` (UTF-8, `path_len` bytes). The weights of a .nybl file stay
/// in the mapping, so the file must not be truncated while it is open; replace it by renaming. Release
/// the model with nybl_model_release().
///
/// # Safety
/// `runtime` is a live handle, `path` has `path_len` bytes, `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_open(
    runtime: *const nybl_runtime,
    path: *const c_char,
    path_len: usize,
    out: *mut *mut nybl_model,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("out", out, std::ptr::null_mut())?;
            let runtime = handle("runtime", runtime)?;
            let path = text("path", path, path_len)?;
            let _memory = runtime.runtime.memory().enter();
            let model = Model::open_path(Arc::clone(&runtime.runtime), Path::new(path))?;
            set("out", out, Box::into_raw(Box::new(nybl_model { model })))
        }
    })
}

/// Another handle to the same model, to be released on its own; NULL for NULL.
///
/// # Safety
/// `model` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_retain(model: *const nybl_model) -> *mut nybl_model {
    guard_or(std::ptr::null_mut(), || {
        // SAFETY: the caller vouches for the handle.
        match unsafe { model.as_ref() } {
            Some(model) => Box::into_raw(Box::new(nybl_model { model: Arc::clone(&model.model) })),
            None => std::ptr::null_mut(),
        }
    })
}

/// Gives up a handle; the model is closed when its last handle and its last session are gone. NULL is
/// ignored.
///
/// # Safety
/// `model` is NULL or a live handle, which is dead afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_release(model: *mut nybl_model) {
    // SAFETY: the caller vouches for the handle, which came out of a box.
    unsafe { destroy(model) };
}

/// Fills `info`, whose struct_size the caller has set.
///
/// # Safety
/// `model` is a live handle; `info` states its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_model_get_info(
    model: *const nybl_model,
    info: *mut nybl_model_info,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            let model = &handle("model", model)?.model;
            let config = model.config();
            let (private, mapped) = model.weight_bytes();
            let value = nybl_model_info {
                vocab: model.vocab() as u32,
                context: config.context as u32,
                n_layers: config.n_layers as u32,
                d_model: config.d_model as u32,
                n_heads: config.n_heads as u32,
                n_kv_heads: config.n_kv_heads as u32,
                head_dim: config.head_dim as u32,
                kv_token_bytes: config.kv_shape().token_bytes(KvFormat::F32) as u64,
                mapped_bytes: mapped as u64,
                private_bytes: private as u64,
                ..nybl_model_info::zero()
            };
            write_result("info", info, &value)
        }
    })
}

/// Turns UTF-8 text into token ids. Stores the number of ids in `count` and as many as fit in `ids`;
/// NYBL_ERR_BUFFER_TOO_SMALL when that is not all of them. `ids` may be NULL with `capacity` 0 to ask for the
/// number. `flags` is a sum of NYBL_TOKENIZE_*.
///
/// # Safety
/// `model` is a live handle, `text` has `text_len` bytes, `ids` has room for `capacity`, `count` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_tokenize(
    model: *const nybl_model,
    text_utf8: *const c_char,
    text_len: usize,
    flags: u32,
    ids: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("count", count, 0)?;
            let model = &handle("model", model)?.model;
            let text = text("text_utf8", text_utf8, text_len)?;
            if flags & !(NYBL_TOKENIZE_ADD_SPECIAL | NYBL_TOKENIZE_PARSE_SPECIAL) != 0 {
                return Err(Failure::new(
                    NYBL_ERR_INVALID_ARGUMENT,
                    "flags: an unknown bit is set",
                ));
            }
            let add = flags & NYBL_TOKENIZE_ADD_SPECIAL != 0;
            let parse = flags & NYBL_TOKENIZE_PARSE_SPECIAL != 0;
            let found = model.tokenizer()?.encode(text, add, parse)?;
            copy_out("ids", &found, ids, capacity, count)
        }
    })
}

/// Turns token ids into UTF-8 text (special tokens are left out). Stores the length in `text_len` and as
/// many bytes as fit in `buffer`; NYBL_ERR_BUFFER_TOO_SMALL when that is not all of them. `buffer` may be
/// NULL with `capacity` 0 to ask for the length. No terminating zero is written.
///
/// # Safety
/// `model` is a live handle, `ids` has `count` ids, `buffer` has room for `capacity`, `text_len` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_detokenize(
    model: *const nybl_model,
    ids: *const u32,
    count: usize,
    buffer: *mut c_char,
    capacity: usize,
    text_len: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("text_len", text_len, 0)?;
            let model = &handle("model", model)?.model;
            let text = model.tokenizer()?.decode(slice("ids", ids, count)?)?;
            copy_out("buffer", text.as_bytes(), buffer.cast(), capacity, text_len)
        }
    })
}

/// Copies as much of `from` as fits and stores its whole length.
///
/// # Safety
/// `to` has room for `capacity` elements or is NULL; `length` is writable.
pub(super) unsafe fn copy_out<T: Copy>(
    name: &str,
    from: &[T],
    to: *mut T,
    capacity: usize,
    length: *mut usize,
) -> Result<(), Failure> {
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        set("length", length, from.len())?;
        if to.is_null() && capacity > 0 {
            return Err(Failure::null(name));
        }
        let fits = from.len().min(capacity);
        if fits > 0 {
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, fits);
        }
        if fits < from.len() {
            let text = format!("{name}: room for {capacity}, {} needed", from.len());
            return Err(Failure::new(NYBL_ERR_BUFFER_TOO_SMALL, text));
        }
    }
    Ok(())
}
