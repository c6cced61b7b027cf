//! Regions of memory in large pages, and places in them.
//!
//! Whatever of a region was not written takes no memory, up to the large page that was begun. A place that
//! is given back gives its pages back at once, and the region goes with its last place.

use crate::memory::mapping::Mapping;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// About what a region has, unless one place needs more: enough that the page begun at its end is a small part.
const REGION: usize = 32 << 20;

/// Addresses for a number of places of one size.
pub(super) struct Region {
    mapping: Mapping,
    place_bytes: usize,
    places: u32,
    /// A bit for each place that somebody has.
    taken: AtomicU64,
}

impl Region {
    /// Room for places of `place_bytes`, a multiple of a cache line; none where the system has no large pages or no
    /// addresses left.
    pub(super) fn new(place_bytes: usize) -> Option<Self> {
        debug_assert!(place_bytes.is_multiple_of(64));
        let places = (REGION / place_bytes).clamp(1, 64);
        let mapping = Mapping::new(place_bytes.checked_mul(places)?)?;
        mapping.ask_for_large_pages(mapping.bytes());
        Some(Self { mapping, place_bytes, places: places as u32, taken: AtomicU64::new(0) })
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

    /// Where it begins in the mapping of its region.
    fn offset(&self) -> usize {
        self.number as usize * self.region.place_bytes
    }

    fn start(&self) -> *mut u8 {
        self.region.mapping.start().wrapping_add(self.offset())
    }

    /// Makes all bytes zero again, and gives back the pages that lie within the place.
    fn empty(&mut self) {
        let (start, end) = (self.offset(), self.offset() + self.len());
        let page = Mapping::page();
        let (first, last) = (start.next_multiple_of(page).min(end), end / page * page);
        // SAFETY: whole pages of this place, which is nobody else's.
        if first < last && unsafe { self.region.mapping.discard(first..last) } {
            self[..first - start].fill(0);
            self[last - start..].fill(0);
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
