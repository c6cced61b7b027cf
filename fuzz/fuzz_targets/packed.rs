//! Bytes as the head of a packed file: opened, verified, and run if it can be.
//! `cargo +nightly fuzz run packed`.
//!
//! Weights follow behind it, and what only stands for the rest (lengths, checksum of the head) is put right, unless
//! the last byte is odd: no mutation would ever get past it.
#![no_main]

mod support;

use nybl::engine::load::Model;
use nybl::file::nybl::Nybl;
use nybl::file::source::Source;
use xxhash_rust::xxh64::xxh64;

/// Bytes of the file: the seeds' tensors lie within.
const WHOLE: usize = 320 << 10;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((odd, bytes)) = bytes.split_last() else { return };
    let mut file = bytes.to_vec();
    if odd % 2 == 0 && file.len() >= 64 {
        let head = file.len();
        // Scales that are small floats.
        file.extend((head..WHOLE.max(head)).map(|i| if i % 2 == 1 { 0x2c } else { (i / 2) as u8 }));
        let length = file.len() as u64;
        file[..8].copy_from_slice(b"\x89NYBL\r\n\x1a");
        file[16..24].copy_from_slice(&length.to_le_bytes());
        file[24..32].copy_from_slice(&(head as u64).to_le_bytes());
        let checksum = xxh64(&[&file[..32], &file[40..head]].concat(), 0);
        file[32..40].copy_from_slice(&checksum.to_le_bytes());
    }
    let Ok(packed) = Nybl::open(Source::from_vec("a.nybl", file)) else { return };
    let _ = packed.verify();
    if let Ok(model) = Model::from_nybl(support::runtime(), &packed) {
        support::run(model);
    }
});
