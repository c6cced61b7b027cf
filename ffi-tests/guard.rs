//! Buffers between unmapped pages, canaries around them, and a name for every fault.
//!
//! A row that reads past its input is right on most days: what lies there is usually mapped. Here it
//! is not, and the fault says which row and which case ran into it. Under Miri, which sees each access
//! by itself, and on systems without `mmap`, the buffers are plain memory and the canaries remain.

use bytemuck::Pod;

/// Bytes of canary on each side of a buffer.
const ZONE: usize = 256;

/// No code, float or sum that a test works with looks like this.
const CANARY: u8 = 0xa5;

/// Where a buffer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Its end touches an unmapped page.
    RightEdge,
    /// Its start touches an unmapped page.
    LeftEdge,
    /// Between canaries, 4 bytes past a cache line.
    Middle,
}

impl Place {
    /// The middle first: canaries tell more than a fault.
    pub(crate) const ALL: [Place; 3] = [Place::Middle, Place::RightEdge, Place::LeftEdge];
}

/// The buffers of one case; their memory is kept from case to case.
#[derive(Default)]
pub(crate) struct Arena {
    slots: Vec<Slot>,
    used: usize,
}

struct Slot {
    region: Region,
    at: usize,
    bytes: usize,
    /// What an input held before the run.
    input: Option<Vec<u8>>,
}

impl Arena {
    /// Gives all buffers back.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }

    /// A buffer that the row may only read, holding `data`.
    pub(crate) fn input<T: Pod>(&mut self, data: &[T], place: Place) -> *const T {
        let pointer = self.put(data, place);
        self.slots[self.used - 1].input = Some(bytemuck::cast_slice(data).to_vec());
        pointer
    }

    /// A buffer that the row writes, holding `data` to start with.
    pub(crate) fn output<T: Pod>(&mut self, data: &[T], place: Place) -> *mut T {
        self.put(data, place)
    }

    fn put<T: Pod>(&mut self, data: &[T], place: Place) -> *mut T {
        let data: &[u8] = bytemuck::cast_slice(data);
        let least = data.len() + 2 * ZONE + 64;
        if self.used == self.slots.len() {
            let region = Region::new(least);
            self.slots.push(Slot { region, at: 0, bytes: 0, input: None });
        }
        let slot = &mut self.slots[self.used];
        self.used += 1;
        if slot.region.len < least {
            slot.region = Region::new(least);
        }
        slot.at = match place {
            Place::RightEdge => slot.region.len - data.len(),
            Place::LeftEdge => 0,
            Place::Middle => ZONE + 4,
        };
        (slot.bytes, slot.input) = (data.len(), None);
        let (at, end) = (slot.at, slot.at + data.len());
        let memory = slot.region.memory();
        let most = memory.len();
        memory[at.saturating_sub(ZONE)..at].fill(CANARY);
        memory[end..most.min(end + ZONE)].fill(CANARY);
        memory[at..end].copy_from_slice(data);
        memory[at..].as_mut_ptr().cast()
    }

    /// What the buffer that was made as number `index` holds now.
    pub(crate) fn read<T: Pod>(&mut self, index: usize) -> Vec<T> {
        let slot = &mut self.slots[index];
        let (at, bytes) = (slot.at, slot.bytes);
        bytemuck::pod_collect_to_vec(&slot.region.memory()[at..at + bytes])
    }

    /// Whether every canary and every input is as it was.
    pub(crate) fn verify(&mut self) -> Result<(), String> {
        for (index, slot) in self.slots[..self.used].iter_mut().enumerate() {
            let (at, end) = (slot.at, slot.at + slot.bytes);
            let memory = slot.region.memory();
            let before = memory[at.saturating_sub(ZONE)..at].iter().rev();
            if let Some(distance) = before.clone().position(|byte| *byte != CANARY) {
                return Err(format!("buffer {index}: byte {} before it was written", distance + 1));
            }
            let after = &memory[end..memory.len().min(end + ZONE)];
            if let Some(distance) = after.iter().position(|byte| *byte != CANARY) {
                return Err(format!("buffer {index}: byte {distance} past its end was written"));
            }
            if let Some(input) = &slot.input {
                let changed = input.iter().zip(&memory[at..end]).position(|(a, b)| a != b);
                if let Some(byte) = changed {
                    return Err(format!("buffer {index} is an input: its byte {byte} was written"));
                }
            }
        }
        Ok(())
    }
}

#[cfg(all(unix, not(miri)))]
use faulting::Region;
#[cfg(all(unix, not(miri)))]
pub(crate) use faulting::{announce, name_faults};
#[cfg(not(all(unix, not(miri))))]
use plain::Region;
#[cfg(not(all(unix, not(miri))))]
pub use plain::{announce, name_faults};

#[cfg(all(unix, not(miri)))]
mod faulting {
    use std::cell::Cell;
    use std::ptr::null_mut;

    /// Pages that can be used, with one on each side that cannot.
    pub(super) struct Region {
        base: *mut u8,
        page: usize,
        pub len: usize,
    }

    impl Region {
        pub(super) fn new(least: usize) -> Self {
            // SAFETY: asks for a number.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
            let page = usize::try_from(page).expect("a page has a size");
            let len = least.next_multiple_of(page);
            // SAFETY: a new anonymous mapping, of which the middle is then made accessible.
            unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
                let all = len + 2 * page;
                let base = libc::mmap(null_mut(), all, libc::PROT_NONE, flags, -1, 0);
                assert!(base != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
                let base = base.cast::<u8>();
                let access = libc::PROT_READ | libc::PROT_WRITE;
                let status = libc::mprotect(base.add(page).cast(), len, access);
                assert!(status == 0, "mprotect: {}", std::io::Error::last_os_error());
                Self { base, page, len }
            }
        }

        pub(super) fn memory(&mut self) -> &mut [u8] {
            // SAFETY: `len` readable and writable bytes that live as long as the mapping.
            unsafe { std::slice::from_raw_parts_mut(self.base.add(self.page), self.len) }
        }
    }

    impl Drop for Region {
        fn drop(&mut self) {
            // SAFETY: the mapping made in `new`; nothing borrows from a region that is dropped.
            unsafe { libc::munmap(self.base.cast(), self.len + 2 * self.page) };
        }
    }

    thread_local! {
        /// The text of the running case; a trial runs on one thread.
        static RUNNING: Cell<(*const u8, usize)> = const { Cell::new((null_mut(), 0)) };
    }

    /// Makes `text` the name of a fault on this thread while `work` runs.
    pub(crate) fn announce<T>(text: &str, work: impl FnOnce() -> T) -> T {
        RUNNING.set((text.as_ptr(), text.len()));
        let result = work();
        RUNNING.set((null_mut(), 0));
        result
    }

    /// Only `write` and `_exit`, which a signal handler may call.
    extern "C" fn tell(signal: libc::c_int) {
        let kind: &[u8] = match signal {
            libc::SIGILL => b"\nillegal instruction in ",
            libc::SIGABRT => b"\nabort in ",
            _ => b"\nmemory fault in ",
        };
        let (text, len) = RUNNING.get();
        // SAFETY: the text outlives `announce`, which set it; without one nothing is written.
        unsafe {
            libc::write(2, kind.as_ptr().cast(), kind.len());
            if text.is_null() {
                libc::write(2, b"no row".as_ptr().cast(), 6);
            } else {
                libc::write(2, text.cast(), len);
            }
            libc::write(2, b"\n".as_ptr().cast(), 1);
            libc::_exit(101);
        }
    }

    /// From here on a fault names the row and the case it came from. An abort does so too: that is
    /// how a panic inside a row ends.
    pub(crate) fn name_faults() {
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGABRT] {
            // SAFETY: a zeroed `sigaction` is valid, and the handler keeps to what handlers may do.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = tell as *const () as libc::sighandler_t;
                action.sa_flags = libc::SA_ONSTACK;
                libc::sigaction(signal, &raw const action, null_mut());
            }
        }
    }
}

#[cfg(not(all(unix, not(miri))))]
mod plain {
    /// Exactly as many bytes as were asked for, on a cache line.
    pub struct Region {
        lines: nybl::memory::Aligned<u8>,
        pub len: usize,
    }

    impl Region {
        pub fn new(least: usize) -> Self {
            let len = least.next_multiple_of(64);
            let lines = nybl::memory::Aligned::zeroed("test buffer", len).expect("a few pages");
            Self { lines, len }
        }

        pub fn memory(&mut self) -> &mut [u8] {
            &mut self.lines
        }
    }

    /// Faults are named where there are pages to fault on.
    pub fn announce<T>(_text: &str, work: impl FnOnce() -> T) -> T {
        work()
    }

    pub fn name_faults() {}
}
