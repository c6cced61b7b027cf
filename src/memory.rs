//! Buffers whose allocation can fail without taking the host down, from an allocator that the host may bring.
//!
//! Every size that comes from outside (a file, a host's argument) is allocated here: a refusal is
//! [`Error::OutOfMemory`], where the standard collections would abort the process.
//!
//! Buffers are made deep inside layers that know no runtime. So the allocator is not handed down to them:
//! a runtime's [`Memory`] is entered at the border, for the length of a call, and a buffer keeps the one
//! it came from until it is freed.

pub(crate) mod mapping;
mod pages;

use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};
use pages::Pages;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

/// The alignment of every buffer: one cache line, enough for every vector width we use.
const LINE: usize = 64;

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

/// A host's allocator.
#[derive(Debug)]
pub struct Hooks {
    /// Passed to both functions.
    pub context: *mut c_void,
    /// Gives `size` bytes at a multiple of `align`, or NULL.
    pub alloc: unsafe extern "C" fn(context: *mut c_void, size: usize, align: usize) -> *mut c_void,
    /// Takes back what `alloc` gave for the same size and alignment.
    pub free:
        unsafe extern "C" fn(context: *mut c_void, data: *mut c_void, size: usize, align: usize),
}

// SAFETY: whoever makes a `Memory` of hooks promises that any thread may call them.
unsafe impl Send for Hooks {}
// SAFETY: as above.
unsafe impl Sync for Hooks {}

/// Where buffers come from: the process's allocator, a host's own, or pages of the system.
#[derive(Clone, Debug, Default)]
pub struct Memory(Option<Arc<Source>>);

#[derive(Debug)]
enum Source {
    Host(Hooks),
    Pages(Pages),
}

thread_local! {
    static CURRENT: RefCell<Memory> = const { RefCell::new(Memory(None)) };
}

impl Memory {
    /// Memory from a host's functions.
    ///
    /// # Safety
    /// `alloc` and `free` do what [`Hooks`] says, do not unwind, and may be called by any thread, several at
    /// a time, until the last buffer is gone.
    #[must_use]
    pub unsafe fn from_hooks(hooks: Hooks) -> Self {
        Self(Some(Arc::new(Source::Host(hooks))))
    }

    /// Memory for buffers that live and go together, side by side, so that they may get large pages
    /// ([`Memory::ask_for_large_pages`]). Where a host brings an allocator, it is that of the host.
    #[must_use]
    pub fn side_by_side() -> Self {
        if is_from_host() || !mapping::POSSIBLE {
            return CURRENT.with_borrow(Clone::clone);
        }
        Self(Some(Arc::new(Source::Pages(Pages::default()))))
    }

    /// Asks for large pages for all of [`Memory::side_by_side`]; nothing to do for other memory.
    pub fn ask_for_large_pages(&self) {
        if let Some(Source::Pages(pages)) = self.0.as_deref() {
            pages.ask();
        }
    }

    /// Lets the buffers that this thread makes come from here, until the result is dropped.
    #[must_use = "it holds only as long as this value lives"]
    pub fn enter(&self) -> Entered {
        Entered { before: CURRENT.replace(self.clone()), of_this_thread: PhantomData }
    }

    /// Zeroed bytes at a cache line.
    fn alloc(&self, layout: Layout) -> Option<NonNull<u8>> {
        let hooks = match self.0.as_deref() {
            // SAFETY: the caller never asks for zero bytes.
            None => return NonNull::new(unsafe { alloc_zeroed(layout) }),
            Some(Source::Pages(pages)) => return pages.alloc(layout),
            Some(Source::Host(hooks)) => hooks,
        };
        // SAFETY: promised by `from_hooks`.
        let data = unsafe { (hooks.alloc)(hooks.context, layout.size(), layout.align()) };
        let data = NonNull::new(data.cast::<u8>())?;
        if data.align_offset(layout.align()) != 0 {
            // SAFETY: as above; these are the size and alignment it was asked for.
            unsafe { self.free(data, layout) };
            return None;
        }
        // SAFETY: the host gave that many bytes.
        unsafe { data.write_bytes(0, layout.size()) };
        Some(data)
    }

    /// # Safety
    /// `data` came from `alloc` of an equal memory and layout, and is not used again.
    unsafe fn free(&self, data: NonNull<u8>, layout: Layout) {
        match self.0.as_deref() {
            // SAFETY: the caller's promise.
            None => unsafe { dealloc(data.as_ptr(), layout) },
            // With the last buffer.
            Some(Source::Pages(_)) => {}
            // SAFETY: the caller's promise, and that of `from_hooks`.
            Some(Source::Host(hooks)) => unsafe {
                (hooks.free)(hooks.context, data.as_ptr().cast(), layout.size(), layout.align());
            },
        }
    }
}

/// Whether the buffers that this thread makes come from a host's allocator.
#[must_use]
pub fn is_from_host() -> bool {
    CURRENT.with_borrow(|current| matches!(current.0.as_deref(), Some(Source::Host(_))))
}

/// While it lives, a [`Memory`] is that of the thread.
pub struct Entered {
    before: Memory,
    of_this_thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // A thread that is ending makes no more buffers.
        let _ = CURRENT.try_with(|current| current.replace(std::mem::take(&mut self.before)));
    }
}

/// A zeroed, 64-byte aligned buffer, seen as a slice of `T`.
pub struct Aligned<T> {
    data: NonNull<T>,
    len: usize,
    memory: Memory,
}

// SAFETY: it owns its elements.
unsafe impl<T: Send> Send for Aligned<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Aligned<T> {}

impl<T: Pod> Aligned<T> {
    /// A zeroed buffer of `len` elements.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] naming `what`.
    pub fn zeroed(what: &'static str, len: usize) -> Result<Self> {
        let memory = CURRENT.with_borrow(Clone::clone);
        let refused = |bytes| Error::OutOfMemory { what, bytes };
        let bytes = len.checked_mul(size_of::<T>()).ok_or(refused(usize::MAX))?;
        let layout = Self::layout(len).ok_or(refused(bytes))?;
        let data = match layout.size() {
            0 => NonNull::dangling(),
            _ => memory.alloc(layout).ok_or(refused(bytes))?.cast(),
        };
        Ok(Self { data, len, memory })
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        Self::layout(self.len).map_or(0, |layout| layout.size())
    }
}

impl<T> Aligned<T> {
    /// Whole lines for `len` elements.
    fn layout(len: usize) -> Option<Layout> {
        const { assert!(align_of::<T>() <= LINE && size_of::<T>() > 0) };
        let bytes = len.checked_mul(size_of::<T>())?.checked_next_multiple_of(LINE)?;
        Layout::from_size_align(bytes, LINE).ok()
    }
}

impl<T> Drop for Aligned<T> {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len).filter(|layout| layout.size() > 0) {
            // SAFETY: `zeroed` took it from this memory with this layout.
            unsafe { self.memory.free(self.data.cast(), layout) };
        }
    }
}

impl<T: Pod> std::ops::Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements lie there (dangling and aligned when there are none), all initialised.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Pod> std::ops::DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn an_impossible_size_is_a_status() {
        let error = Aligned::<f32>::zeroed("a test", usize::MAX / 8).err();
        assert!(matches!(error, Some(Error::OutOfMemory { what: "a test", .. })), "{error:?}");
        assert!(Aligned::<f32>::zeroed("a test", usize::MAX / 3).is_err());
        assert!(zeroed::<u64>("a test", usize::MAX / 8).is_err());
    }

    #[test]
    fn buffers_start_on_a_cache_line() {
        for len in [0, 1, 3, 17, 1000] {
            let buffer = Aligned::<f32>::zeroed("a test", len).unwrap();
            assert_eq!(buffer.as_ptr().align_offset(4), 0);
            assert!(len == 0 || buffer.as_ptr().align_offset(64) == 0);
            assert_eq!((buffer.len(), buffer.bytes()), (len, (len * 4).next_multiple_of(64)));
            assert!(buffer.iter().all(|x| *x == 0.0));
        }
    }

    /// Counts the bytes that are out, and gives no more than `most`.
    struct Host {
        out: AtomicUsize,
        most: usize,
    }

    unsafe extern "C" fn alloc(host: *mut c_void, size: usize, align: usize) -> *mut c_void {
        // SAFETY: the tests pass a `Host`.
        let host = unsafe { &*host.cast::<Host>() };
        if host.out.load(Ordering::Relaxed) + size > host.most {
            return std::ptr::null_mut();
        }
        host.out.fetch_add(size, Ordering::Relaxed);
        // SAFETY: never asked for nothing; and bytes that are not zero, so that somebody must zero them.
        unsafe {
            let data = std::alloc::alloc(Layout::from_size_align(size, align).unwrap());
            data.write_bytes(0xA5, size);
            data.cast()
        }
    }

    unsafe extern "C" fn free(host: *mut c_void, data: *mut c_void, size: usize, align: usize) {
        // SAFETY: as above.
        unsafe {
            (*host.cast::<Host>()).out.fetch_sub(size, Ordering::Relaxed);
            dealloc(data.cast(), Layout::from_size_align(size, align).unwrap());
        }
    }

    #[test]
    fn a_hosts_allocator_gives_and_takes_back() {
        let mut host = Host { out: AtomicUsize::new(0), most: 256 };
        let context = (&raw mut host).cast();
        // SAFETY: they are an allocator, and `host` outlives every buffer.
        let memory = unsafe { Memory::from_hooks(Hooks { context, alloc, free }) };
        let out = || host.out.load(Ordering::Relaxed);
        let entered = memory.enter();
        let first = Aligned::<u8>::zeroed("a test", 100).unwrap();
        assert_eq!((out(), first.iter().any(|x| *x != 0)), (128, false));
        assert!(Aligned::<u8>::zeroed("a test", 129).is_err());
        {
            let _none = Memory::default().enter();
            assert!(Aligned::<u8>::zeroed("a test", 1000).is_ok());
        }
        let second = Aligned::<u64>::zeroed("a test", 16).unwrap();
        drop(entered);
        assert!(Aligned::<u8>::zeroed("a test", 1000).is_ok() && out() == 256);
        // Freed where they came from, wherever the thread is by then.
        std::thread::spawn(move || drop(first)).join().unwrap();
        assert_eq!(out(), 128);
        drop(second);
        assert_eq!(out(), 0);
    }

    #[test]
    fn large_blocks_of_a_kv_cache_come_from_the_host_too() {
        use crate::kernel::KvFormat;
        use crate::kv::blocks::BlockTable;
        use crate::kv::store::{KvShape, KvStore};
        let mut host = Host { out: AtomicUsize::new(0), most: 1 << 22 };
        let context = (&raw mut host).cast();
        // SAFETY: they are an allocator, and `host` outlives every buffer.
        let memory = unsafe { Memory::from_hooks(Hooks { context, alloc, free }) };
        assert!(!is_from_host());
        let entered = memory.enter();
        assert!(is_from_host());
        let shape = KvShape { n_layers: 4, n_kv_heads: 4, head_dim: 64 };
        let (mut store, mut table) = (KvStore::new(shape, 128), BlockTable::default());
        store.reserve(&mut table, 128).unwrap();
        let bytes = 128 * shape.token_bytes(KvFormat::F32);
        assert_eq!((store.bytes(), host.out.load(Ordering::Relaxed)), (bytes, bytes));
        store.truncate(&mut table, 0);
        store.trim();
        assert_eq!(host.out.load(Ordering::Relaxed), 0);
        drop(entered);
    }
}
