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
        Self::part(&name, &file, 0, None)
    }

    /// Maps `length` bytes of an open file from `offset` on, or all that follow: a model that lies
    /// uncompressed inside another file, as an asset lies in an Android package. `name` is what errors
    /// call it. The file may be closed afterwards.
    ///
    /// # Errors
    /// As [`Source::open`]; [`Error::Corrupt`] when the file ends before the part does, or when the part
    /// does not begin at a multiple of 64, which the kernels need.
    pub fn part(name: &str, file: &File, offset: u64, length: Option<u64>) -> Result<Self> {
        let metadata = file.metadata().map_err(|reason| Error::io(name, &reason))?;
        if metadata.is_dir() {
            let reason = "is a folder, not a model file".into();
            return Err(Error::Io { path: name.into(), reason });
        }
        let whole = metadata.len();
        #[cfg(target_os = "android")]
        let whole = if whole > 0 { whole } else { super::sealed::shared_length(file).unwrap_or(0) };
        let rest = whole.saturating_sub(offset);
        let length = length.unwrap_or(rest);
        if length > rest {
            let reason = format!("of {whole} bytes ends before {length} bytes from {offset} on do");
            return Err(Error::corrupt(name, "file", reason));
        }
        if length == 0 {
            return Err(Error::corrupt(name, "file", "is empty"));
        }
        if !offset.is_multiple_of(64) {
            let reason = format!(
                "begins at {offset}, which is no multiple of 64: store it uncompressed and align it (zipalign)"
            );
            return Err(Error::corrupt(name, "offset", reason));
        }
        let mut options = memmap2::MmapOptions::new();
        options.offset(offset).len(super::reader::size(length));
        // SAFETY: the mapping is private to this library and only read. Another process that
        // truncates the file can fault it, which is documented above and cannot be excluded.
        let map = unsafe { options.map(file) }.or_else(|reason| {
            // A sealed file that was opened for writing cannot be mapped as shared before Linux 6.7. Its pages
            // are the same ones when they are mapped as private and never written to.
            // SAFETY: as above.
            unsafe { options.map_copy_read_only(file) }.map_err(|_| reason)
        });
        let map = map.map_err(|reason| Error::io(name, &reason))?;
        // What is not cached yet is then read in pieces of 2 MiB that lie together in memory, where the file
        // system can, instead of page by page; weights stream from them up to 1.6 times as fast. A refusal
        // leaves the pages small.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { name: name.into(), bytes: Bytes::Mapped(Arc::new(map)) })
    }

    /// A copy of all bytes in memory, as a file without a name that nobody can change, shorten or lengthen any
    /// more: a memfd with seals on Linux and Android, ASharedMemory on Android 8 to 10. A service that hands its
    /// descriptor to other processes, by a socket or Binder, keeps one model warm for all of them, and each may
    /// check the seals instead of trusting it.
    ///
    /// # Errors
    /// [`Error::Io`] when the system has no room or no such files; [`Error::Unsupported`] elsewhere.
    pub fn sealed_copy(&self) -> Result<File> {
        #[cfg(all(any(target_os = "linux", target_os = "android"), not(miri)))]
        return super::sealed::copy(self.bytes()).map_err(|reason| Error::io(self.name(), &reason));
        #[cfg(not(all(any(target_os = "linux", target_os = "android"), not(miri))))]
        Err(Error::Unsupported("sealed files, which Linux and Android have".into()))
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

    /// Whether the bytes are a mapped file, whose pages come and go.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        matches!(self.bytes, Bytes::Mapped(_))
    }

    /// Brings the pages of `range` into memory and into this process' tables, reading them in order, and
    /// returns when they are there. Does nothing for bytes that are in memory anyway.
    pub fn prefetch(&self, range: Range<usize>) {
        let Bytes::Mapped(map) = &self.bytes else { return };
        let range = range.start.min(map.len())..range.end.min(map.len());
        // Where the system cannot do it in one call (Linux before 5.14, Apple's), touching a byte of each
        // page does; the hint lets it read ahead. A refusal of either only makes it slower.
        #[cfg(target_os = "linux")]
        if map.advise_range(memmap2::Advice::PopulateRead, range.start, range.len()).is_ok() {
            return;
        }
        #[cfg(unix)]
        let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        let sum = map[range].iter().step_by(4096).fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        std::hint::black_box(sum);
    }

    /// Gives the pages of `range` back to the system, which reads them again when they are used: bytes
    /// given back, at most. The file's pages may stay in the system's cache.
    pub fn release(&self, range: Range<usize>) -> usize {
        let Bytes::Mapped(map) = &self.bytes else { return 0 };
        let range = range.start.min(map.len())..range.end.min(map.len());
        #[cfg(unix)]
        {
            let (start, len) = (range.start, range.len());
            // SAFETY: the mapping is of a file and never written to, so that a page that is dropped comes
            // back with the same bytes; nobody can see that it was away.
            let advised = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len)
            };
            advised.map_or(0, |()| len)
        }
        #[cfg(not(unix))]
        0
    }

    /// Asks the system to drop the file at `path` from its cache, so that what opens it next reads the
    /// disk: for measurements. Pages that are mapped or not yet written stay, and systems without such a
    /// call do nothing.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be opened.
    pub fn forget_cached(path: &Path) -> Result<()> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|reason| Error::io(&name, &reason))?;
        #[cfg(any(target_os = "linux", target_os = "android"))]
        {
            use std::os::fd::AsRawFd;
            // SAFETY: the descriptor is open; the call touches no memory of ours. It is advice: a refusal
            // leaves everything as it was.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        }
        drop(file);
        Ok(())
    }

    /// Keeps all pages in memory until the source is closed. Needs a right that phones seldom give.
    ///
    /// # Errors
    /// [`Error::Io`] with the system's reason; nothing has changed then.
    pub fn lock(&self) -> Result<()> {
        match &self.bytes {
            #[cfg(unix)]
            Bytes::Mapped(map) => map.lock().map_err(|reason| Error::io(self.name(), &reason)),
            _ => Ok(()),
        }
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

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    fn file(name: &str, bytes: &[u8]) -> (std::path::PathBuf, File) {
        let path = std::env::temp_dir().join(format!("nybl-source-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        let file = File::open(&path).unwrap();
        (path, file)
    }

    #[test]
    fn a_part_of_a_file_is_a_source() {
        let bytes: Vec<u8> = (0..10_000_u32).map(|i| (i % 251) as u8).collect();
        let (path, file) = file("part", &bytes);
        let part = Source::part("asset", &file, 192, Some(5_000)).unwrap();
        assert_eq!(part.bytes(), &bytes[192..5_192]);
        assert_eq!(part.bytes().as_ptr().align_offset(64), 0);
        assert_eq!(Source::part("asset", &file, 64, None).unwrap().bytes(), &bytes[64..]);
        for (offset, length, word) in [
            (0, Some(10_001), "ends before"),
            (20_032, Some(1), "ends before"),
            (9_984, Some(0), "empty"),
            (100, None, "multiple of 64"),
        ] {
            let error = Source::part("asset", &file, offset, length).err().unwrap().to_string();
            assert!(error.contains(word) && error.starts_with("asset"), "{error}");
        }
        std::fs::remove_file(path).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_sealed_copy_is_a_source_that_nobody_can_change() {
        use std::io::{Seek, Write};
        let bytes: Vec<u8> = (0..20_000_u32).map(|i| (i % 251) as u8).collect();
        let source = Source::from_vec("model", bytes.clone());
        let mut file = source.sealed_copy().unwrap();
        let handed = Source::part("handed over", &file, 0, None).unwrap();
        assert_eq!(handed.bytes(), bytes);
        assert!(file.set_len(10).is_err() && file.set_len(30_000).is_err());
        file.rewind().unwrap();
        assert!(file.write_all(b"changed").is_err());
        drop(file);
        handed.prefetch(0..usize::MAX);
        assert_eq!(handed.release(0..usize::MAX), bytes.len());
        assert_eq!(handed.bytes(), bytes);
    }

    #[test]
    fn released_pages_come_back_with_the_same_bytes() {
        let bytes: Vec<u8> = (0..300_000_u32).map(|i| (i % 241) as u8).collect();
        let (path, file) = file("pages", &bytes);
        let source = Source::part("pages", &file, 0, None).unwrap();
        source.prefetch(0..bytes.len());
        source.prefetch(299_999..usize::MAX);
        assert_eq!(source.release(0..bytes.len()), bytes.len());
        assert_eq!(source.bytes(), bytes);
        assert_eq!(Source::from_static("memory", b"abc").release(0..3), 0);
        std::fs::remove_file(path).unwrap();
    }
}
