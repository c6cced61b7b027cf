//! Where the bytes of a model come from: a mapped file, or memory.
//!
//! A mapping is read-only and shared, so its pages are clean, live in the page cache, are the same for
//! every process and stay warm after this one ends.

use crate::error::{Error, Result};
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The bytes of one model file; cheap to clone.
#[derive(Clone)]
pub struct Source {
    name: Arc<str>,
    bytes: Bytes,
}

#[derive(Clone)]
enum Bytes {
    Mapped(Arc<memmap2::Mmap>),
    Static(&'static [u8]),
    Owned(Arc<[u8]>),
}

impl Source {
    /// Maps a file.
    ///
    /// The file must not be truncated while it is open: touching a page that is gone ends the process
    /// on most systems. Its length is checked at open; replacing the file by renaming is safe.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened or mapped, [`Error::Corrupt`] when it is empty.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|reason| Error::io(&name, &reason))?;
        let metadata = file.metadata().map_err(|reason| Error::io(&name, &reason))?;
        if metadata.is_dir() {
            let reason = "is a folder, not a model file".into();
            return Err(Error::Io { path: name, reason });
        }
        if metadata.len() == 0 {
            return Err(Error::corrupt(name, "file", "is empty"));
        }
        // SAFETY: the mapping is private to this library and only read. Another process that
        // truncates the file can fault it, which is documented above and cannot be excluded.
        let map =
            unsafe { memmap2::Mmap::map(&file) }.map_err(|reason| Error::io(&name, &reason))?;
        Ok(Self { name: name.into(), bytes: Bytes::Mapped(Arc::new(map)) })
    }

    /// Bytes that are part of the program.
    #[must_use]
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Self {
        Self { name: name.into(), bytes: Bytes::Static(bytes) }
    }

    /// Bytes in memory.
    #[must_use]
    pub fn from_vec(name: &str, bytes: Vec<u8>) -> Self {
        Self { name: name.into(), bytes: Bytes::Owned(bytes.into()) }
    }

    /// The path, or the name that was given: what error messages start with.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tells the system that a part of a mapping will not be read again soon, so that it need not count
    /// as memory of this process. Reading it again is slower, and right.
    pub fn forget(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = &self.bytes {
            // SAFETY: the mapping is shared with the file and read-only, so pages that are dropped come
            // back from the file with the same bytes.
            let _ = unsafe {
                map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.len(),
                )
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// All bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
            Bytes::Owned(bytes) => bytes,
        }
    }
}
