//! Memory behind a descriptor that nobody can change any more: how one process hands a model to others.
//!
//! Linux has it as a memfd with seals, and so has Android since 11. Before, Android has ASharedMemory (since 8), whose
//! protection can be taken away and not given back. Which of the two it is is asked by name: there, a filter may
//! end a process that makes a system call which the C library does not know.
//!
//! ASharedMemory is built, not run: the tests put memfds in its place.

use std::fs::File;
use std::io::{Error, Result, Write};
use std::os::fd::{AsRawFd, FromRawFd};

/// What can no longer be done to a memfd.
const SEALS: libc::c_int =
    libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL;

/// A copy of `bytes`.
pub(super) fn copy(bytes: &[u8]) -> Result<File> {
    #[cfg(target_os = "android")]
    if let Some(memory) = SharedMemory::instead_of_memfd() {
        return memory.copy(bytes);
    }
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // By its number: libraries for Android are linked against versions that do not have the name.
    // SAFETY: a name that ends in zero, and flags.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_create, c"nybl".as_ptr(), flags) };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    let fd = libc::c_int::try_from(fd).map_err(Error::other)?;
    // SAFETY: the descriptor is new and nobody else's.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes)?;
    // SAFETY: the descriptor is open.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } != 0 {
        return Err(Error::last_os_error());
    }
    Ok(file)
}

/// The bytes of shared memory, whose descriptor before Android 11 is that of a device without a length; none for
/// any other descriptor.
#[cfg(target_os = "android")]
pub(super) fn shared_length(file: &File) -> Option<u64> {
    let memory = SharedMemory::find()?;
    // SAFETY: the descriptor is open; what is not shared memory has the size zero.
    let size = unsafe { (memory.size)(file.as_raw_fd()) };
    (size > 0).then_some(size as u64)
}

/// The functions of `<android/sharedmem.h>`.
#[cfg(any(target_os = "android", test))]
struct SharedMemory {
    create: unsafe extern "C" fn(*const libc::c_char, usize) -> libc::c_int,
    #[cfg_attr(test, expect(dead_code, reason = "only a device has descriptors without a length"))]
    size: unsafe extern "C" fn(libc::c_int) -> usize,
    protect: unsafe extern "C" fn(libc::c_int, libc::c_int) -> libc::c_int,
}

#[cfg(any(target_os = "android", test))]
impl SharedMemory {
    /// The functions, where the C library is too old for a memfd and libandroid.so has them.
    #[cfg(target_os = "android")]
    fn instead_of_memfd() -> Option<Self> {
        // SAFETY: a name that ends in zero.
        let memfd = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"memfd_create".as_ptr()) };
        if memfd.is_null() { Self::find() } else { None }
    }

    /// The functions of libandroid.so, which every app has in memory already. Looked up, since they are younger than
    /// the oldest Android that the library runs on.
    #[cfg(target_os = "android")]
    fn find() -> Option<Self> {
        // SAFETY: names that end in zero. The library is never closed, so what is found stays. The types are those of
        // the header.
        unsafe {
            let library =
                libc::dlopen(c"libandroid.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            if library.is_null() {
                return None;
            }
            let [create, size, protect] =
                [c"ASharedMemory_create", c"ASharedMemory_getSize", c"ASharedMemory_setProt"]
                    .map(|name| libc::dlsym(library, name.as_ptr()));
            if create.is_null() || size.is_null() || protect.is_null() {
                return None;
            }
            Some(Self {
                create: std::mem::transmute::<
                    *mut libc::c_void,
                    unsafe extern "C" fn(*const libc::c_char, usize) -> libc::c_int,
                >(create),
                size: std::mem::transmute::<
                    *mut libc::c_void,
                    unsafe extern "C" fn(libc::c_int) -> usize,
                >(size),
                protect: std::mem::transmute::<
                    *mut libc::c_void,
                    unsafe extern "C" fn(libc::c_int, libc::c_int) -> libc::c_int,
                >(protect),
            })
        }
    }

    fn copy(&self, bytes: &[u8]) -> Result<File> {
        // SAFETY: a name that ends in zero.
        let fd = unsafe { (self.create)(c"nybl".as_ptr(), bytes.len()) };
        if fd < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        // Such a device cannot be written to, only mapped; the mapping must be gone when the right to it goes.
        // SAFETY: the memory is as long as asked for, and nobody else has it yet.
        unsafe { memmap2::MmapOptions::new().len(bytes.len()).map_mut(&file) }?
            .copy_from_slice(bytes);
        // SAFETY: the descriptor is open.
        if unsafe { (self.protect)(fd, libc::PROT_READ) } != 0 {
            return Err(Error::last_os_error());
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seals(file: &File) -> libc::c_int {
        // SAFETY: the descriptor is open.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) }
    }

    #[test]
    fn a_memfd_has_every_seal() {
        assert_eq!(seals(&copy(b"bytes").unwrap()) & SEALS, SEALS);
    }

    /// Android's functions over memfds. The seal against writing is refused while there is a mapping to write to.
    #[test]
    fn shared_memory_is_filled_and_then_protected() {
        unsafe extern "C" fn create(name: *const libc::c_char, size: usize) -> libc::c_int {
            // SAFETY: the name ends in zero, and the descriptor is the new one.
            unsafe {
                let fd = libc::memfd_create(name, libc::MFD_ALLOW_SEALING);
                assert_eq!(libc::ftruncate(fd, size.try_into().unwrap()), 0);
                fd
            }
        }
        unsafe extern "C" fn none(_: *const libc::c_char, _: usize) -> libc::c_int {
            // SAFETY: a descriptor that is none, which sets the error.
            unsafe { libc::close(-1) }
        }
        unsafe extern "C" fn size(_: libc::c_int) -> usize {
            0
        }
        unsafe extern "C" fn protect(fd: libc::c_int, rights: libc::c_int) -> libc::c_int {
            assert_eq!(rights, libc::PROT_READ);
            // SAFETY: the descriptor is open.
            unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, SEALS) }
        }
        unsafe extern "C" fn refuse(_: libc::c_int, _: libc::c_int) -> libc::c_int {
            // SAFETY: as above.
            unsafe { libc::close(-1) }
        }
        let bytes: Vec<u8> = (0..20_000_u32).map(|i| (i % 251) as u8).collect();
        let file = SharedMemory { create, size, protect }.copy(&bytes).unwrap();
        assert_eq!(seals(&file) & SEALS, SEALS);
        // SAFETY: nobody can change the file any more.
        let read = unsafe { memmap2::MmapOptions::new().map_copy_read_only(&file) }.unwrap();
        assert_eq!(read[..], bytes);
        assert!(SharedMemory { create: none, size, protect }.copy(&bytes).is_err());
        assert!(SharedMemory { create, size, protect: refuse }.copy(&bytes).is_err());
    }
}
