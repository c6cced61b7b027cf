//! Memory straight from the system, which gives large pages on request.
//!
//! What computes over megabytes waits for the translation of an address every few lines where pages have 4 KB.
//! Linux and Android give pages of 2 MB to those who ask; elsewhere nothing can be mapped, and callers
//! take ordinary buffers.

use std::ops::Range;
use std::ptr::NonNull;

/// Whether anything can be mapped here.
pub(super) const POSSIBLE: bool =
    cfg!(all(any(target_os = "linux", target_os = "android"), not(miri)));

/// A large page.
pub(crate) const LARGE: usize = 2 << 20;

/// Addresses of its own from a large page on, zero at first. What was not written takes no memory, up to the page that was
/// begun.
#[derive(Debug)]
pub(crate) struct Mapping {
    data: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its bytes and looks at none of them.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// At least `bytes`, in whole large pages; none where the system has no large pages or no addresses left.
    pub(crate) fn new(bytes: usize) -> Option<Self> {
        let bytes = bytes.checked_next_multiple_of(LARGE)?.max(LARGE);
        let asked = bytes.checked_add(LARGE)?;
        let start = system::map(asked)?.as_ptr();
        // What lies before a large page and behind the end goes back.
        let before = start.align_offset(LARGE);
        let data = start.wrapping_add(before);
        let behind = LARGE - before;
        // SAFETY: parts of the mapping made above, at whole pages, that nobody uses.
        unsafe {
            if before > 0 {
                system::unmap(start, before);
            }
            if behind > 0 {
                system::unmap(data.wrapping_add(bytes), behind);
            }
        }
        Some(Self { data: NonNull::new(data)?, bytes })
    }

    /// Bytes of a page of the system, those that it gives without being asked.
    pub(crate) fn page() -> usize {
        system::page()
    }

    /// The first of its bytes.
    pub(crate) fn start(&self) -> *mut u8 {
        self.data.as_ptr()
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Asks for large pages for the first `bytes` from now on. A request: the system may refuse.
    pub(crate) fn ask_for_large_pages(&self, bytes: usize) {
        // SAFETY: bytes of this mapping; the advice changes none of them.
        unsafe { system::ask(self.start(), bytes.min(self.bytes)) };
    }

    /// Gives the pages within `range` back, so that its bytes are zero when they are seen again; whether the
    /// system took them.
    ///
    /// # Safety
    /// Nobody else looks at the range, which is whole pages of the system within the mapping.
    pub(crate) unsafe fn discard(&self, range: Range<usize>) -> bool {
        debug_assert!(range.end <= self.bytes);
        // SAFETY: the caller's promise.
        unsafe { system::discard(self.start().wrapping_add(range.start), range.len()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and whoever borrowed bytes held the mapping.
        unsafe { system::unmap(self.start(), self.bytes) };
    }
}

#[cfg(all(any(target_os = "linux", target_os = "android"), not(miri)))]
mod system {
    use std::ptr::NonNull;

    pub(super) fn page() -> usize {
        // SAFETY: asks for a number.
        unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
    }

    pub(super) fn map(bytes: usize) -> Option<NonNull<u8>> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new addresses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
        if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) }
    }

    /// # Safety
    /// Whole pages of a mapping that nobody uses.
    pub(super) unsafe fn unmap(start: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { libc::munmap(start.cast(), bytes) };
    }

    /// # Safety
    /// Bytes of a mapping from a page on.
    pub(super) unsafe fn ask(start: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise. Systems without large pages refuse.
        unsafe { libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE) };
    }

    /// # Safety
    /// Whole pages of a private mapping without a file, at which nobody looks.
    pub(super) unsafe fn discard(start: *mut u8, bytes: usize) -> bool {
        // SAFETY: the caller's promise.
        unsafe { libc::madvise(start.cast(), bytes, libc::MADV_DONTNEED) == 0 }
    }
}

/// No system call asks for large pages here, so nothing is ever mapped.
#[cfg(not(all(any(target_os = "linux", target_os = "android"), not(miri))))]
mod system {
    use std::ptr::NonNull;

    pub(super) fn page() -> usize {
        4096
    }

    pub(super) fn map(_: usize) -> Option<NonNull<u8>> {
        None
    }

    pub(super) unsafe fn unmap(_: *mut u8, _: usize) {}

    pub(super) unsafe fn ask(_: *mut u8, _: usize) {}

    pub(super) unsafe fn discard(_: *mut u8, _: usize) -> bool {
        false
    }
}
