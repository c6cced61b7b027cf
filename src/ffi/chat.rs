//! # Engine: conversations
//!
//! A conversation is JSON, as chat interfaces have it: an array of objects with `role` and `content`, and
//! `tool_calls` or whatever else the model's own template reads.

use super::model::{copy_out, nybl_model};
use super::status::{Failure, guard, nybl_status};
use super::structs::{Sized32, handle, read_config, set, text};
use crate::text::template::Conversation;
use std::ffi::c_char;

/// A conversation. Texts are UTF-8 JSON.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nybl_conversation {
    /// sizeof(nybl_conversation).
    pub struct_size: u32,
    /// Not 0: ends with the beginning of the model's turn, for it to go on.
    pub add_generation_prompt: u32,
    /// An array of messages.
    pub messages: *const c_char,
    /// Length of messages in bytes.
    pub messages_len: usize,
    /// An array of tools, or NULL.
    pub tools: *const c_char,
    /// Length of tools in bytes.
    pub tools_len: usize,
    /// An object whose members are variables of the template, or NULL.
    pub variables: *const c_char,
    /// Length of variables in bytes.
    pub variables_len: usize,
}

// SAFETY: `repr(C)`, starts with a u32, and integers and pointers may be zero.
unsafe impl Sized32 for nybl_conversation {}

/// # Safety
/// `conversation` is NULL or states its size; its texts are as long as it says and outlive `'a`.
unsafe fn read<'a>(conversation: *const nybl_conversation) -> Result<Conversation<'a>, Failure> {
    if conversation.is_null() {
        return Err(Failure::null("conversation"));
    }
    // SAFETY: the caller vouches for the struct and its texts.
    unsafe {
        let given = read_config(conversation)?;
        let optional = |name, data: *const c_char, len| match data.is_null() {
            true => Ok(None),
            false => text(name, data, len).map(Some),
        };
        Ok(Conversation {
            messages: text("conversation->messages", given.messages, given.messages_len)?,
            tools: optional("conversation->tools", given.tools, given.tools_len)?,
            variables: optional("conversation->variables", given.variables, given.variables_len)?,
            add_generation_prompt: given.add_generation_prompt != 0,
        })
    }
}

/// The token ids of a conversation, by the model's chat template. Control tokens come from the template alone:
/// what a message spells stays text. Stores the number of ids in `count` and as many as fit in `ids`;
/// NYBL_ERR_BUFFER_TOO_SMALL when that is not all of them. `ids` may be NULL with `capacity` 0 to ask for the
/// number. NYBL_ERR_UNSUPPORTED when the model has no template.
///
/// # Safety
/// `model` is a live handle, `conversation` states its size and its texts are as long as it says, `ids` has
/// room for `capacity`, `count` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_chat_encode(
    model: *const nybl_model,
    conversation: *const nybl_conversation,
    ids: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("count", count, 0)?;
            let model = &handle("model", model)?.model;
            let conversation = read(conversation)?;
            let found = model.chat_template()?.encode(&conversation, model.tokenizer()?)?;
            copy_out("ids", &found, ids, capacity, count)
        }
    })
}

/// The text of a conversation, by the model's chat template. Stores the length in `text_len` and as many bytes
/// as fit in `buffer`; NYBL_ERR_BUFFER_TOO_SMALL when that is not all of them. `buffer` may be NULL with `capacity` 0
/// to ask for the length. No terminating zero is written.
///
/// # Safety
/// As nybl_chat_encode(), with `buffer` and `text_len`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nybl_chat_render(
    model: *const nybl_model,
    conversation: *const nybl_conversation,
    buffer: *mut c_char,
    capacity: usize,
    text_len: *mut usize,
) -> nybl_status {
    guard(|| {
        // SAFETY: the caller vouches for the pointers.
        unsafe {
            set("text_len", text_len, 0)?;
            let model = &handle("model", model)?.model;
            let text = model.chat_template()?.render(&read(conversation)?)?;
            copy_out("buffer", text.as_bytes(), buffer.cast(), capacity, text_len)
        }
    })
}
