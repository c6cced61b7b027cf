//! Size-versioned structs: a program built against an older or newer header is understood.

use super::status::{Failure, NYBL_ERR_INVALID_ARGUMENT, NYBL_ERR_UNSUPPORTED};

/// A struct of the header: starts with `uint32_t struct_size`, and all zeros is a valid value.
///
/// # Safety
/// `#[repr(C)]`, a `u32` first, and every field may be all zero bits.
pub(super) unsafe trait Sized32: Copy {
    /// All zeros: every setting at its default.
    fn zero() -> Self {
        // SAFETY: promised by the trait.
        unsafe { std::mem::zeroed() }
    }
}

/// Reads a config that may be NULL (all defaults), older (its missing tail is zero) or newer than this
/// library (its tail must be zero: a setting that is not understood is refused, not ignored).
///
/// # Safety
/// `config` is NULL or points to as many bytes as its first field says.
pub(super) unsafe fn read_config<T: Sized32>(config: *const T) -> Result<T, Failure> {
    let mut out = T::zero();
    if config.is_null() {
        return Ok(out);
    }
    // SAFETY: the caller vouches for the size field and for that many bytes.
    let theirs = unsafe { config.cast::<u32>().read_unaligned() } as usize;
    if theirs < size_of::<u32>() {
        let text = "struct_size is not set: assign sizeof the struct to it";
        return Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text));
    }
    let ours = size_of::<T>();
    // SAFETY: as above; `out` has `ours` bytes.
    unsafe {
        let bytes = std::slice::from_raw_parts(config.cast::<u8>(), theirs);
        if bytes[ours.min(theirs)..].iter().any(|byte| *byte != 0) {
            let text = "the struct has settings that this version of the library does not know";
            return Err(Failure::new(NYBL_ERR_UNSUPPORTED, text));
        }
        let out = (&raw mut out).cast::<u8>();
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), out, ours.min(theirs));
    }
    Ok(out)
}

/// Fills a result struct as far as the caller's version of it reaches; `struct_size` stays theirs.
///
/// # Safety
/// `out` is NULL or points to as many writable bytes as its first field says.
pub(super) unsafe fn write_result<T: Sized32>(
    name: &str,
    out: *mut T,
    value: &T,
) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::null(name));
    }
    // SAFETY: the caller vouches for the size field and for that many bytes.
    let theirs = unsafe { out.cast::<u32>().read_unaligned() } as usize;
    if theirs < size_of::<u32>() {
        let text = format!("{name}->struct_size is not set: assign sizeof the struct to it");
        return Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text));
    }
    let skip = size_of::<u32>();
    // SAFETY: as above, both sides have the bytes from `skip` up to the smaller size.
    unsafe {
        let from = std::ptr::from_ref(value).cast::<u8>().add(skip);
        let count = theirs.min(size_of::<T>()) - skip;
        std::ptr::copy_nonoverlapping(from, out.cast::<u8>().add(skip), count);
    }
    Ok(())
}

/// The bytes of a (pointer, length) argument.
///
/// # Safety
/// `data` points to `len` readable elements that outlive `'a`, or is NULL with `len` zero.
pub(super) unsafe fn slice<'a, T>(
    name: &str,
    data: *const T,
    len: usize,
) -> Result<&'a [T], Failure> {
    match (data.is_null(), len) {
        (true, 0) => Ok(&[]),
        (true, _) => Err(Failure::null(name)),
        (false, _) if len > isize::MAX as usize / size_of::<T>() || !data.is_aligned() => {
            let text = format!("{name}: a length of {len} or a misaligned pointer");
            Err(Failure::new(NYBL_ERR_INVALID_ARGUMENT, text))
        }
        // SAFETY: the caller vouches for the elements; length and alignment are checked.
        (false, _) => Ok(unsafe { std::slice::from_raw_parts(data, len) }),
    }
}

/// The elements of a (pointer, length) argument, to be written.
///
/// # Safety
/// `data` points to `len` initialised, writable elements that nothing else uses during `'a`, or is NULL
/// with `len` zero.
pub(super) unsafe fn slice_mut<'a, T>(
    name: &str,
    data: *mut T,
    len: usize,
) -> Result<&'a mut [T], Failure> {
    // SAFETY: the caller vouches for the elements; length and alignment are checked there.
    unsafe { slice(name, data, len) }?;
    match data.is_null() {
        true => Ok(&mut []),
        // SAFETY: as above.
        false => Ok(unsafe { std::slice::from_raw_parts_mut(data, len) }),
    }
}

/// The text of a (pointer, length) argument.
///
/// # Safety
/// As [`slice`].
pub(super) unsafe fn text<'a>(
    name: &str,
    data: *const std::ffi::c_char,
    len: usize,
) -> Result<&'a str, Failure> {
    // SAFETY: the caller vouches for the bytes.
    let bytes = unsafe { slice(name, data.cast::<u8>(), len) }?;
    std::str::from_utf8(bytes)
        .map_err(|_| Failure::new(NYBL_ERR_INVALID_ARGUMENT, format!("{name} is not UTF-8")))
}

/// Sets an out-parameter.
///
/// # Safety
/// `out` is NULL or writable.
pub(super) unsafe fn set<T>(name: &str, out: *mut T, value: T) -> Result<(), Failure> {
    if out.is_null() || !out.is_aligned() {
        return Err(Failure::null(name));
    }
    // SAFETY: the caller vouches for the pointer.
    unsafe { out.write(value) };
    Ok(())
}

/// The object behind a handle.
///
/// # Safety
/// `handle` is NULL or was made by this library and not yet destroyed.
pub(super) unsafe fn handle<'a, T>(name: &str, handle: *const T) -> Result<&'a T, Failure> {
    // SAFETY: the caller vouches for the handle.
    unsafe { handle.as_ref() }.ok_or_else(|| Failure::null(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Now {
        struct_size: u32,
        a: u32,
        b: u64,
    }
    // SAFETY: `repr(C)`, starts with a u32, integers only.
    unsafe impl Sized32 for Now {}

    #[repr(C)]
    struct Later {
        now: Now,
        c: u64,
    }

    fn read(config: *const Now) -> Option<Now> {
        // SAFETY: every test passes a struct of the size it states.
        unsafe { read_config(config) }.ok()
    }

    #[test]
    fn older_and_newer_structs_are_understood() {
        let now = Now { struct_size: 16, a: 1, b: 2 };
        assert_eq!(read(&raw const now), Some(now));
        let old = Now { struct_size: 8, a: 1, b: 99 };
        assert_eq!(read(&raw const old).map(|x| (x.a, x.b)), Some((1, 0)));
        let mut later = Later { now: Now { struct_size: 24, a: 1, b: 2 }, c: 0 };
        assert!(read((&raw const later).cast()).is_some());
        later.c = 1;
        assert!(read((&raw const later).cast()).is_none());
        assert_eq!(read(std::ptr::null()), Some(Now::zero()));
        let unset = Now { struct_size: 0, a: 1, b: 2 };
        assert!(read(&raw const unset).is_none());
    }

    #[test]
    fn results_stop_where_the_callers_struct_does() {
        let mut old = Now { struct_size: 8, a: 0, b: 99 };
        let value = Now { struct_size: 0, a: 5, b: 6 };
        // SAFETY: `old` is larger than it states.
        assert!(unsafe { write_result("out", &raw mut old, &value) }.is_ok());
        assert_eq!(old, Now { struct_size: 8, a: 5, b: 99 });
    }
}
