//! Buffers whose allocation can fail without taking the host down.
//!
//! Every size that comes from outside (a file, a host's argument) is allocated here: a refusal is
//! [`Error::OutOfMemory`], where the standard collections would abort the process.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};

/// One cache line; a buffer made of these is aligned for every vector width we use.
#[repr(C, align(64))]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Line([u8; 64]);

/// A zeroed vector of `len` elements, or a status.
///
/// # Errors
/// [`Error::OutOfMemory`] naming `what`.
pub fn zeroed<T: Zeroable + Clone>(what: &'static str, len: usize) -> Result<Vec<T>> {
    let mut buffer = Vec::new();
    buffer
        .try_reserve_exact(len)
        .map_err(|_| Error::OutOfMemory { what, bytes: len.saturating_mul(size_of::<T>()) })?;
    buffer.resize(len, T::zeroed());
    Ok(buffer)
}

/// A zeroed, 64-byte aligned buffer, seen as a slice of `T`.
#[derive(Clone)]
pub struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    of: std::marker::PhantomData<T>,
}

impl<T: Pod> Aligned<T> {
    /// A zeroed buffer of `len` elements.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] naming `what`.
    pub fn zeroed(what: &'static str, len: usize) -> Result<Self> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or(Error::OutOfMemory { what, bytes: usize::MAX })?;
        Ok(Self { lines: zeroed(what, bytes.div_ceil(64))?, len, of: std::marker::PhantomData })
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.lines.len() * 64
    }
}

impl<T: Pod> std::ops::Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> std::ops::DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_impossible_size_is_a_status() {
        let error = Aligned::<f32>::zeroed("a test", usize::MAX / 8).err();
        assert!(matches!(error, Some(Error::OutOfMemory { what: "a test", .. })), "{error:?}");
        assert!(zeroed::<u64>("a test", usize::MAX / 8).is_err());
    }

    #[test]
    fn buffers_start_on_a_cache_line() {
        for len in [1, 3, 17, 1000] {
            let buffer = Aligned::<f32>::zeroed("a test", len).unwrap();
            assert_eq!(buffer.as_ptr().align_offset(64), 0);
            assert_eq!(buffer.len(), len);
        }
    }
}
