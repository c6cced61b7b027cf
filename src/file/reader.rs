//! A bounds-checked cursor over untrusted bytes; every error names the file and the field.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Longest string a header may hold: a chat template or tokenizer fits, an absurd length does not.
const MAX_STRING: u64 = 1 << 28;

/// A number of a file as a size in memory.
#[expect(clippy::cast_possible_truncation, reason = "the crate refuses targets below 64 bits")]
#[must_use]
pub const fn size(number: u64) -> usize {
    number as usize
}

/// Reads little-endian values one after the other.
pub struct Reader<'a> {
    name: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// A cursor at the start of `bytes` of the file `name`.
    #[must_use]
    pub fn new(name: &'a str, bytes: &'a [u8]) -> Self {
        Self { name, bytes, at: 0 }
    }

    /// The file's name.
    #[must_use]
    pub fn file(&self) -> &'a str {
        self.name
    }

    /// Bytes read so far.
    #[must_use]
    pub fn position(&self) -> usize {
        self.at
    }

    /// Bytes left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// An error about `field` of this file.
    #[must_use]
    pub fn error(&self, field: &str, reason: impl Into<String>) -> Error {
        Error::corrupt(self.name, field, reason)
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the file ends before.
    pub fn take(&mut self, field: &str, count: usize) -> Result<&'a [u8]> {
        if count > self.left() {
            let reason = format!(
                "the file ends after {} bytes; {count} more were expected at byte {}",
                self.bytes.len(),
                self.at
            );
            return Err(self.error(field, reason));
        }
        let bytes = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(field, N)?);
        Ok(array)
    }

    /// One byte.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the file ends before.
    pub fn u8(&mut self, field: &str) -> Result<u8> {
        Ok(self.array::<1>(field)?[0])
    }

    /// A 32-bit number.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the file ends before.
    pub fn u32(&mut self, field: &str) -> Result<u32> {
        self.array(field).map(u32::from_le_bytes)
    }

    /// A 64-bit number.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the file ends before.
    pub fn u64(&mut self, field: &str) -> Result<u64> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// Text with its length as a 64-bit number in front.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the file ends before, or the bytes are no UTF-8.
    pub fn string(&mut self, field: &str) -> Result<&'a str> {
        let length = self.u64(field)?;
        if length > MAX_STRING || length > self.left() as u64 {
            let reason = format!("a string of {length} bytes where {} are left", self.left());
            return Err(self.error(field, reason));
        }
        let bytes = self.take(field, size(length))?;
        std::str::from_utf8(bytes).map_err(|_| self.error(field, "is not UTF-8 text"))
    }
}
