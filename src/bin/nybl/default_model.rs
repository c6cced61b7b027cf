//! The models inside the program, so that a first run needs no file: a target, and a smaller model that
//! drafts for it.

use nybl::file::source::Source;

/// Aligned as the kernels want weights.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static TARGET: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../models/demo.nybl"));
static DRAFT: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../models/demo-draft.nybl"));

/// The model.
pub(crate) fn target() -> Source {
    Source::from_static("embedded demo.nybl", &TARGET.0)
}

/// What drafts for it.
pub(crate) fn draft() -> Source {
    Source::from_static("embedded demo-draft.nybl", &DRAFT.0)
}
