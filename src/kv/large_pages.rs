//! Regions of memory in pages of 2 MB, as Linux gives them on request, and places in them.
//!
//! Whatever of a region was not written takes no memory, up to the large page that was begun. A place that
//! is given back gives its pages back at once, and the region goes with its last place.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A large page, where ordinary ones have 4 KB.
const LARGE: usize = 2 << 20;

/// About what a region has, unless one place needs more: enough that the page begun at its end is a small part.
const REGION: usize = 32 << 20;

/// Addresses for a number of places of one size.
pub(super) struct Region {
    data: NonNull<u8>,
    bytes: usize,
    place_bytes: usize,
    places: u32,
    /// A bit for each place that somebody has.
    taken: AtomicU64,
}

// SAFETY: its bytes are reached through places alone, each of which has its own.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Room for places of `place_bytes`, a multiple of a cache line; none where the system has no addresses left.
    pub(super) fn new(place_bytes: usize) -> Option<Self> {
        debug_assert!(place_bytes.is_multiple_of(64));
        let places = (REGION / place_bytes).clamp(1, 64);
        let bytes = place_bytes.checked_mul(places)?.checked_next_multiple_of(LARGE)?;
        let asked = bytes.checked_add(LARGE)?;
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new addresses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), asked, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        // From a large page on; what lies before it and behind the end goes back.
        let before = start.cast::<u8>().align_offset(LARGE);
        let data = start.cast::<u8>().wrapping_add(before);
        let behind = LARGE - before;
        // SAFETY: parts of the mapping made above, at whole pages, that nobody uses; the advice says nothing of
        // what the bytes hold, and systems without large pages refuse it.
        unsafe {
            if before > 0 {
                libc::munmap(start, before);
            }
            if behind > 0 {
                libc::munmap(data.add(bytes).cast(), behind);
            }
            libc::madvise(data.cast(), bytes, libc::MADV_HUGEPAGE);
        }
        let (data, taken) = (NonNull::new(data)?, AtomicU64::new(0));
        Some(Self { data, bytes, place_bytes, places: places as u32, taken })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and no place holds the region any more.
        unsafe { libc::munmap(self.data.as_ptr().cast(), self.bytes) };
    }
}

/// The bytes of one place, zero at first.
pub(super) struct Place {
    region: Arc<Region>,
    number: u32,
}

impl Place {
    /// The first free place of a region.
    pub(super) fn take(region: &Arc<Region>) -> Option<Self> {
        let free = |taken: u64| {
            let number = taken.trailing_ones();
            (number < region.places).then(|| taken | 1 << number)
        };
        // Acquire: who gave the place back has emptied it.
        let before = region.taken.fetch_update(Ordering::Acquire, Ordering::Relaxed, free).ok()?;
        Some(Self { region: Arc::clone(region), number: before.trailing_ones() })
    }

    fn start(&self) -> *mut u8 {
        self.region.data.as_ptr().wrapping_add(self.number as usize * self.region.place_bytes)
    }

    /// Makes all bytes zero again, and gives back the pages that lie within the place.
    fn empty(&mut self) {
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let before = self.start().align_offset(page).min(self.len());
        let within = (self.len() - before) / page * page;
        let pages = self.start().wrapping_add(before).cast();
        // SAFETY: whole pages of this place; private memory without a file is zero when it is seen again.
        let given = within > 0 && unsafe { libc::madvise(pages, within, libc::MADV_DONTNEED) } == 0;
        if given {
            self[..before].fill(0);
            self[before + within..].fill(0);
        } else {
            self.fill(0);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.empty();
        self.region.taken.fetch_and(!(1 << self.number), Ordering::Release);
    }
}

impl Deref for Place {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes lie in the region, which lives as long as its places, have been zeroed by the system or by
        // the place before, and are those of this place alone: its bit is set.
        unsafe { std::slice::from_raw_parts(self.start(), self.region.place_bytes) }
    }
}

impl DerefMut for Place {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.region.place_bytes) }
    }
}
