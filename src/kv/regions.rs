//! Where the bytes of KV blocks come from: regions of large pages where the system has them.
//!
//! Attention over a long sequence reads all its blocks for every token, and in pages of 4 KB it waits for the
//! translation of an address every few lines. A block is too small for a page of 2 MB of its own, so
//! blocks are cut from larger regions. Small blocks, those of a host with an allocator of its own, and
//! those of systems without such pages are buffers of their own.
#![forbid(unsafe_code)]

use super::large_pages::{Place, Region};
use crate::error::Result;
use crate::memory::{self, Aligned};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};

/// Below, the large page that a first block begins would be too large a part of a cache.
const SMALL: usize = 256 << 10;

/// What gives blocks their memory.
pub(super) struct Regions {
    /// Bytes of a block that comes from a region.
    size: usize,
    /// Those that blocks lie in. It is the blocks that hold them.
    regions: Vec<Weak<Region>>,
}

/// The bytes of a block.
pub(super) enum Piece {
    Alone(Aligned<u8>),
    InRegion(Place),
}

impl Regions {
    /// Nothing yet; blocks of `size` bytes will come from regions.
    pub(super) fn of(size: usize) -> Self {
        Self { size, regions: Vec::new() }
    }

    /// A zeroed block at a cache line.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(super) fn zeroed(&mut self, len: usize) -> Result<Piece> {
        if len == self.size
            && len >= SMALL
            && !memory::is_from_host()
            && let Some(place) = self.place()
        {
            return Ok(Piece::InRegion(place));
        }
        Ok(Piece::Alone(Aligned::zeroed("a KV block", len)?))
    }

    /// A place in a region, a new one if need be.
    fn place(&mut self) -> Option<Place> {
        self.regions.retain(|region| region.strong_count() > 0);
        if let Some(place) = self.regions.iter().find_map(|region| Place::take(&region.upgrade()?))
        {
            return Some(place);
        }
        self.regions.try_reserve(1).ok()?;
        let region = Arc::new(Region::new(self.size)?);
        self.regions.push(Arc::downgrade(&region));
        Place::take(&region)
    }
}

impl Piece {
    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Alone(buffer) => buffer.bytes(),
            Self::InRegion(place) => place.len(),
        }
    }
}

impl Deref for Piece {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Alone(buffer) => buffer,
            Self::InRegion(place) => place,
        }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Alone(buffer) => buffer,
            Self::InRegion(place) => place,
        }
    }
}

#[cfg(all(test, any(target_os = "linux", target_os = "android"), not(miri)))]
mod tests {
    use super::*;

    const SIZE: usize = (1 << 20) + 64 * 3;

    /// Where a piece lies.
    fn at(piece: &Piece) -> usize {
        piece.as_ptr().addr()
    }

    #[test]
    fn blocks_share_regions_and_come_zeroed_again() {
        let mut regions = Regions::of(SIZE);
        let mut pieces: Vec<_> = (0..40).map(|_| regions.zeroed(SIZE).unwrap()).collect();
        assert!(regions.regions.len() > 1 && regions.regions.len() < 10);
        assert_eq!(at(&pieces[0]) % (2 << 20), 0);
        assert_eq!(at(&pieces[1]), at(&pieces[0]) + SIZE);
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert_eq!((piece.len(), piece.bytes(), at(piece) % 64), (SIZE, SIZE, 0));
            assert!(piece.iter().all(|byte| *byte == 0));
            piece.fill(i as u8 + 1);
        }
        // One in the middle goes and comes back empty, in the same place; its neighbours stay.
        let gone = at(&pieces[7]);
        drop(pieces.remove(7));
        let again = regions.zeroed(SIZE).unwrap();
        assert_eq!(at(&again), gone);
        assert!(again.iter().all(|byte| *byte == 0));
        for piece in &pieces {
            assert!(piece[0] > 0 && piece.iter().all(|byte| *byte == piece[0]));
        }
        // Regions go with their last piece.
        drop(pieces);
        drop(again);
        assert!(regions.regions.iter().all(|region| region.strong_count() == 0));
        drop(regions.zeroed(SIZE).unwrap());
        assert_eq!(regions.regions.len(), 1);
    }

    #[test]
    fn small_and_odd_blocks_are_on_their_own() {
        let mut small = Regions::of(4096);
        assert!(matches!(small.zeroed(4096), Ok(Piece::Alone(_))));
        let mut regions = Regions::of(SIZE);
        assert!(matches!(regions.zeroed(SIZE), Ok(Piece::InRegion(_))));
        assert!(matches!(regions.zeroed(2 * SIZE), Ok(Piece::Alone(_))));
        // More than there are addresses: no region, and then no buffer.
        let mut endless = Regions::of(usize::MAX - 127);
        assert!(endless.zeroed(usize::MAX - 127).is_err());
    }
}
