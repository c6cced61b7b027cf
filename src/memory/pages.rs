//! Buffers that lie side by side, so that large pages fit them.
//!
//! The buffers of a forward pass have some hundred kilobytes each, together as much as several large pages. Whether
//! those are worth their memory shows only later: one token uses a row of each buffer, a prompt all of it. So they are
//! laid out for large pages, and the pages are asked for when they are wanted.

use super::mapping::{LARGE, Mapping};
use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Mappings that buffers are cut from; what is given back is free when all are.
#[derive(Debug, Default)]
pub(super) struct Pages {
    mappings: Mutex<Vec<Cut>>,
    asked: AtomicBool,
}

#[derive(Debug)]
struct Cut {
    mapping: Mapping,
    used: usize,
}

impl Pages {
    /// Zeroed bytes that nobody else has until the pages are dropped; none where the system has none.
    pub(super) fn alloc(&self, layout: Layout) -> Option<NonNull<u8>> {
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        // Mappings begin at a large page, so what is aligned in one is aligned.
        let place = |cut: &Cut| {
            let start = cut.used.checked_next_multiple_of(layout.align())?;
            let end = start.checked_add(layout.size())?;
            (end <= cut.mapping.bytes()).then_some((start, end))
        };
        let found = mappings.iter().enumerate().find_map(|(i, cut)| Some((i, place(cut)?)));
        let (i, (start, end)) = match found {
            Some(found) => found,
            None => {
                mappings.try_reserve(1).ok()?;
                let mapping = Mapping::new(layout.size())?;
                mappings.push(Cut { mapping, used: 0 });
                (mappings.len() - 1, (0, layout.size()))
            }
        };
        mappings[i].used = end;
        NonNull::new(mappings[i].mapping.start().wrapping_add(start))
    }

    /// Asks for large pages, as far as buffers fill them by half. Once: asking again changes nothing.
    pub(super) fn ask(&self) {
        if !self.asked.swap(true, Ordering::Relaxed) {
            let mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
            for cut in &*mappings {
                cut.mapping.ask_for_large_pages((cut.used + LARGE / 2) / LARGE * LARGE);
            }
        }
    }
}

#[cfg(all(test, any(target_os = "linux", target_os = "android"), not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn buffers_lie_side_by_side_and_in_their_own_bytes() {
        let pages = Pages::default();
        let sizes = [64, 3 << 20, 64 << 10, 1 << 20, 128];
        let mut taken: Vec<(usize, usize)> = Vec::new();
        for size in sizes {
            let data = pages.alloc(Layout::from_size_align(size, 64).unwrap()).unwrap();
            // SAFETY: so many bytes were asked for.
            let bytes = unsafe { std::slice::from_raw_parts_mut(data.as_ptr(), size) };
            assert!(bytes.iter().all(|byte| *byte == 0) && data.addr().get() % 64 == 0);
            bytes.fill(1);
            taken.push((data.addr().get(), size));
        }
        pages.ask();
        taken.sort_unstable();
        assert!(taken.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{taken:?}");
        // Two mappings: what comes after the large one has room beside it or before it.
        assert_eq!(pages.mappings.lock().unwrap().len(), 2);
        assert!(pages.alloc(Layout::from_size_align(1 << 60, 64).unwrap()).is_none());
    }
}
