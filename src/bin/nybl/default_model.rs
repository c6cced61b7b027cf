//! The model inside the program, so that a first run needs no file.

use nybl::file::source::Source;

/// Aligned as the kernels want weights.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../models/nursery.nybl"));

/// The embedded model.
pub(crate) fn source() -> Source {
    Source::from_static("embedded nursery.nybl", &MODEL.0)
}
