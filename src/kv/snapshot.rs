//! A sequence's cache in a file: an app that was killed goes on where it was, without the prompt's cost.
//!
//! All numbers are little-endian. A header of 88 bytes:
//!
//! | bytes | field |
//! |---|---|
//! | 8 | magic, `nyblkv\r\n` |
//! | 4 | format version, 1 |
//! | 4, 4, 4 | layers, KV heads, floats in a head |
//! | 4 | element type: 0 for f32, 1 for f16, 2 for i8, 3 for i4 |
//! | 4 | rotated floats of a head |
//! | 8 | base of the rotary wavelengths, f64 |
//! | 8 | fingerprint of the model and adapter |
//! | 8 | tokens |
//! | 8, 8 | first and last position, exclusive, of what a window has dropped |
//! | 8 | zero |
//! | 8 | checksum of the above |
//!
//! then the tokens (u32 each), then for every 16 positions not dropped, layer after layer and head after
//! head, the chunk of keys and the chunk of values as the kernels read them (`kernel::abi::AttendArgs`; the
//! first 64 tokens of an i4 cache are f16), heads padded to 16 elements, and at the end the checksum of everything behind the header. Blocks do not appear: a snapshot restores into a cache
//! with another block size to the same bits.
#![forbid(unsafe_code)]

use super::blocks::BlockTable;
use super::hash::{START, mix_bytes};
use super::store::{KvShape, KvStore};
use crate::error::{Error, Result};
use crate::kernel::{KvFormat, LANES};
use crate::memory;
use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::ops::Range;
use std::path::Path;

const MAGIC: [u8; 8] = *b"nyblkv\r\n";
const VERSION: u32 = 1;
const HEADER: usize = 88;

/// What the keys and values were computed with: two caches with the same identity are interchangeable.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Identity {
    /// The model and adapter, as the owner of the cache names them.
    pub model: u64,
    /// Base of the rotary embedding's wavelengths.
    pub rope_theta: f64,
    /// Floats of a head that are rotated.
    pub rope_dim: usize,
}

/// The header's contents.
#[derive(Clone, Debug, PartialEq)]
struct Header {
    shape: KvShape,
    format: KvFormat,
    identity: Identity,
    tokens: usize,
    dropped: Range<usize>,
}

impl Header {
    fn encode(&self) -> [u8; HEADER] {
        let Self { shape, format, identity, tokens, dropped } = self;
        let small = [
            VERSION,
            shape.n_layers as u32,
            shape.n_kv_heads as u32,
            shape.head_dim as u32,
            *format as u32,
            identity.rope_dim as u32,
        ];
        let large = [
            identity.rope_theta.to_bits(),
            identity.model,
            *tokens as u64,
            dropped.start as u64,
            dropped.end as u64,
            0,
        ];
        let mut bytes = [0; HEADER];
        let fields = MAGIC.into_iter();
        let fields = fields.chain(small.into_iter().flat_map(u32::to_le_bytes));
        let fields = fields.chain(large.into_iter().flat_map(u64::to_le_bytes));
        for (slot, byte) in bytes.iter_mut().zip(fields) {
            *slot = byte;
        }
        let sum = mix_bytes(START, &bytes[..HEADER - 8]);
        bytes[HEADER - 8..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER], name: &str) -> Result<Self> {
        let small = |at: usize| {
            let mut field = [0; 4];
            field.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(field)
        };
        let large = |at: usize| u64::from(small(at)) | u64::from(small(at + 4)) << 32;
        if bytes[..8] != MAGIC {
            return Err(Error::corrupt(name, "magic", "is not that of a KV snapshot"));
        }
        if small(8) != VERSION {
            let found = small(8);
            let text = format!("{name}: format version {found}; this build reads {VERSION}");
            return Err(Error::Unsupported(text));
        }
        if large(HEADER - 8) != mix_bytes(START, &bytes[..HEADER - 8]) {
            return Err(Error::corrupt(name, "header", "does not match its checksum"));
        }
        let Some(format) = KvFormat::ALL.into_iter().find(|format| *format as u32 == small(24))
        else {
            let text = format!("{name}: element type {}, which this build has not", small(24));
            return Err(Error::Unsupported(text));
        };
        let count = |field: &str, at: usize| {
            let found = usize::try_from(large(at)).ok().filter(|count| *count <= 1 << 32);
            found.ok_or_else(|| Error::corrupt(name, field, "is out of range"))
        };
        let header = Self {
            shape: KvShape {
                n_layers: small(12) as usize,
                n_kv_heads: small(16) as usize,
                head_dim: small(20) as usize,
            },
            format,
            identity: Identity {
                rope_dim: small(28) as usize,
                rope_theta: f64::from_bits(large(32)),
                model: large(40),
            },
            tokens: count("tokens", 48)?,
            dropped: count("dropped", 56)?..count("dropped", 64)?,
        };
        if header.dropped.start > header.dropped.end || header.dropped.end > header.tokens {
            return Err(Error::corrupt(name, "dropped", "is no range of the tokens"));
        }
        Ok(header)
    }

    /// The reason why the contents are of no use to a cache of this shape and identity.
    fn foreign(&self, store: &KvStore, identity: &Identity) -> Option<String> {
        let (shape, format, block) = (store.shape(), store.format(), store.pool().block_tokens());
        let numbers = [
            ("layers", self.shape.n_layers, shape.n_layers),
            ("KV heads", self.shape.n_kv_heads, shape.n_kv_heads),
            ("floats in a head", self.shape.head_dim, shape.head_dim),
            ("rotated floats", self.identity.rope_dim, identity.rope_dim),
        ];
        let odd = numbers.into_iter().find(|(_, found, want)| found != want);
        if let Some((what, found, want)) = odd {
            return Some(format!("{found} {what}; the model has {want}"));
        }
        if self.format != format {
            return Some(format!("elements of type {:?}; the cache has {format:?}", self.format));
        }
        let (found, want) = (self.identity.rope_theta, identity.rope_theta);
        if found.to_bits() != want.to_bits() {
            return Some(format!("a rotary base of {found}; the model has {want}"));
        }
        if self.identity.model != identity.model {
            let (found, want) = (self.identity.model, identity.model);
            return Some(format!("made by model {found:016x}; this one is {want:016x}"));
        }
        let Range { start, end } = self.dropped;
        if !(start.is_multiple_of(block) && end.is_multiple_of(block)) {
            let text = "positions dropped by a window are no whole blocks of";
            return Some(format!("{text} {block} tokens: use the block size it was saved with"));
        }
        None
    }
}

/// Sixteen positions at a time, those of blocks that are there.
fn chunks(header: &Header) -> impl Iterator<Item = usize> {
    let dropped = header.dropped.clone();
    (0..header.tokens).step_by(LANES).filter(move |first| !dropped.contains(first))
}

/// Writes the sequence in `table`, whose tokens are `tokens`, to `out`; `name` is for messages.
///
/// # Errors
/// [`Error::InvalidArgument`] when there is not one token for each position, [`Error::Io`]; as
/// [`KvStore::load`].
pub fn save(
    store: &mut KvStore,
    table: &BlockTable,
    tokens: &[u32],
    identity: &Identity,
    (out, name): (&mut dyn Write, &str),
) -> Result<()> {
    if tokens.len() != table.len() {
        let text = format!("{} tokens for a cache of {}", tokens.len(), table.len());
        return Err(Error::InvalidArgument(text));
    }
    store.load(table)?;
    let (shape, dropped) = (store.shape(), table.dropped(store.pool()));
    let header = Header {
        shape,
        format: store.format(),
        identity: *identity,
        tokens: tokens.len(),
        dropped,
    };
    let mut sum = START;
    let mut write = |bytes: &[u8], sum: &mut u64| {
        *sum = mix_bytes(*sum, bytes);
        out.write_all(bytes).map_err(|error| Error::io(name, &error))
    };
    write(&header.encode(), &mut 0)?;
    write(bytemuck::cast_slice(tokens), &mut sum)?;
    for first in chunks(&header) {
        for layer in 0..shape.n_layers {
            for head in 0..shape.n_kv_heads {
                let (keys, values) = store.chunk(table, first, layer, head);
                write(keys, &mut sum)?;
                write(values, &mut sum)?;
            }
        }
    }
    let end = sum.to_le_bytes();
    write(&end, &mut 0)?;
    out.flush().map_err(|error| Error::io(name, &error))
}

/// Reads a sequence from `input` into the empty `table` and returns its tokens; `name` is for messages.
/// A failure leaves the table empty.
///
/// # Errors
/// [`Error::Corrupt`] for damage, [`Error::Unsupported`] for another format, model or layout, each with
/// its reason; [`Error::InvalidArgument`] for a table that is not empty; as [`KvStore::reserve`].
pub fn restore(
    store: &mut KvStore,
    table: &mut BlockTable,
    identity: &Identity,
    (input, name): (&mut dyn Read, &str),
) -> Result<Vec<u32>> {
    if !table.is_empty() {
        return Err(Error::InvalidArgument("a snapshot needs an empty sequence".into()));
    }
    let tokens = fill(store, table, identity, (input, name));
    if tokens.is_err() {
        store.truncate(table, 0);
    }
    tokens
}

fn fill(
    store: &mut KvStore,
    table: &mut BlockTable,
    identity: &Identity,
    (input, name): (&mut dyn Read, &str),
) -> Result<Vec<u32>> {
    let mut read = |bytes: &mut [u8], what: &str| {
        input.read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => Error::corrupt(name, what, "is cut off: the file ends"),
            _ => Error::io(name, &error),
        })
    };
    let mut bytes = [0; HEADER];
    read(&mut bytes, "header")?;
    let header = Header::decode(&bytes, name)?;
    let shape = store.shape();
    if let Some(reason) = header.foreign(store, identity) {
        return Err(Error::Unsupported(format!("{name}: {reason}")));
    }
    // The room first: a length that no budget allows is refused before memory is taken for it.
    let Range { start, end } = header.dropped;
    store.reserve(table, if end > start { start } else { header.tokens })?;
    if end > start {
        table.commit(start);
        store.skip(table, end)?;
        store.reserve(table, header.tokens - end)?;
    }
    let mut tokens = memory::zeroed::<u32>("tokens of a snapshot", header.tokens)?;
    read(bytemuck::cast_slice_mut(&mut tokens), "tokens")?;
    let mut sum = mix_bytes(START, bytemuck::cast_slice(&tokens));
    for first in chunks(&header) {
        for layer in 0..shape.n_layers {
            for head in 0..shape.n_kv_heads {
                let (keys, values) = store.chunk_mut(table, first, layer, head);
                for bytes in [keys, values] {
                    read(bytes, "keys and values")?;
                    sum = mix_bytes(sum, bytes);
                }
            }
        }
    }
    let mut end = [0; 8];
    read(&mut end, "checksum")?;
    if u64::from_le_bytes(end) != sum {
        return Err(Error::corrupt(name, "checksum", "is not that of the contents"));
    }
    table.commit(header.tokens - table.len());
    Ok(tokens)
}

/// [`save`] to the file at `path`: under a temporary name beside it, then renamed, so that a crash leaves
/// the old file or the new one.
///
/// # Errors
/// As [`save`].
pub fn save_file(
    store: &mut KvStore,
    table: &BlockTable,
    tokens: &[u32],
    identity: &Identity,
    path: &Path,
) -> Result<()> {
    let name = path.display().to_string();
    let io = |error: std::io::Error| Error::io(&name, &error);
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let mut write = || -> Result<()> {
        let mut out = BufWriter::new(File::create(&temporary).map_err(io)?);
        save(store, table, tokens, identity, (&mut out, &name))?;
        out.get_ref().sync_all().map_err(io)?;
        std::fs::rename(&temporary, path).map_err(io)
    };
    write().inspect_err(|_| {
        // The first failure is the one to report.
        let _ = std::fs::remove_file(&temporary);
    })
}

/// [`restore`] from the file at `path`.
///
/// # Errors
/// As [`restore`], and [`Error::Io`].
pub fn restore_file(
    store: &mut KvStore,
    table: &mut BlockTable,
    identity: &Identity,
    path: &Path,
) -> Result<Vec<u32>> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(|error| Error::io(&name, &error))?;
    restore(store, table, identity, (&mut BufReader::new(file), &name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::store::KvConfig;

    const SHAPE: KvShape = KvShape { n_layers: 2, n_kv_heads: 1, head_dim: 4 };
    const IDENTITY: Identity = Identity { model: 5, rope_theta: 1e4, rope_dim: 4 };

    fn empty(block_tokens: usize) -> KvStore {
        of_format(KvFormat::F32, block_tokens)
    }

    fn of_format(format: KvFormat, block_tokens: usize) -> KvStore {
        let (shape, budget) = (SHAPE, 1 << 17);
        let config = KvConfig { shape, format, block_tokens, budget, fingerprint: 5 };
        KvStore::with(&config).unwrap()
    }

    fn snapshot(window: usize) -> (Vec<u8>, Vec<u32>) {
        let (mut store, mut table) = (empty(32), BlockTable::default());
        let tokens: Vec<u32> = (0..150).collect();
        store.reserve(&mut table, 150).unwrap();
        for position in 0..150 {
            for layer in 0..2 {
                let row = [position as f32, layer as f32, 2.0, 3.0];
                store.write(&table, layer, position, &row, &row.map(|x| -x));
            }
        }
        table.commit(150);
        store.drop_before(&mut table, 4, window);
        let mut bytes = Vec::new();
        save(&mut store, &table, &tokens, &IDENTITY, (&mut bytes, "test")).unwrap();
        (bytes, tokens)
    }

    fn read(block: usize, identity: &Identity, bytes: &[u8]) -> Result<(Vec<u32>, Vec<u8>)> {
        let (mut store, mut table) = (empty(block), BlockTable::default());
        let tokens = restore(&mut store, &mut table, identity, (&mut &*bytes, "test"));
        store.pool().check(&[&table]);
        if tokens.is_err() {
            assert_eq!((table.len(), store.stats().used), (0, 0));
        }
        let tokens = tokens?;
        let mut again = Vec::new();
        save(&mut store, &table, &tokens, &IDENTITY, (&mut again, "test")).unwrap();
        Ok((tokens, again))
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many positions for it")]
    fn what_was_saved_comes_back_into_any_block_size() {
        let (bytes, tokens) = snapshot(0);
        for block in [16, 32, 64, 256] {
            assert_eq!(read(block, &IDENTITY, &bytes).unwrap(), (tokens.clone(), bytes.clone()));
        }
        let (bytes, tokens) = snapshot(100);
        assert_eq!(read(32, &IDENTITY, &bytes).unwrap(), (tokens.clone(), bytes.clone()));
        assert_eq!(read(16, &IDENTITY, &bytes).unwrap(), (tokens, bytes.clone()));
        let error = read(64, &IDENTITY, &bytes).unwrap_err().to_string();
        assert!(error.contains("whole blocks"), "{error}");
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many positions for it")]
    fn damage_is_refused_with_its_place() {
        let (bytes, _) = snapshot(0);
        for len in [0, 7, 87, 88, 600, 700, bytes.len() - 1] {
            let error = read(64, &IDENTITY, &bytes[..len]).unwrap_err().to_string();
            assert!(error.contains("is cut off"), "{len}: {error}");
        }
        for at in (0..bytes.len()).step_by(13) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            assert!(read(64, &IDENTITY, &flipped).is_err(), "byte {at}");
        }
    }

    #[test]
    fn another_model_is_refused_with_the_difference() {
        let (bytes, _) = snapshot(0);
        let others = [
            (Identity { model: 6, ..IDENTITY }, "made by model"),
            (Identity { rope_theta: 5e5, ..IDENTITY }, "rotary base"),
            (Identity { rope_dim: 2, ..IDENTITY }, "rotated floats"),
        ];
        for (identity, reason) in others {
            let error = read(64, &identity, &bytes).unwrap_err();
            assert!(matches!(&error, Error::Unsupported(text) if text.contains(reason)), "{error}");
        }
        let (mut store, mut table) = (of_format(KvFormat::F16, 64), BlockTable::default());
        let error = restore(&mut store, &mut table, &IDENTITY, (&mut &*bytes, "test"));
        assert!(error.unwrap_err().to_string().contains("type F32; the cache has F16"));
    }

    #[test]
    fn an_absurd_length_takes_no_memory() {
        let header = Header {
            shape: SHAPE,
            format: KvFormat::F32,
            identity: IDENTITY,
            tokens: 1 << 32,
            dropped: 0..0,
        };
        let error = read(64, &IDENTITY, &header.encode()).unwrap_err();
        assert!(matches!(error, Error::KvExhausted { .. }), "{error}");
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let folder = std::env::temp_dir().join(format!("nybl-snapshot-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("cache");
        let (mut store, mut table) = (empty(64), BlockTable::default());
        store.reserve(&mut table, 3).unwrap();
        table.commit(3);
        save_file(&mut store, &table, &[1, 2, 3], &IDENTITY, &path).unwrap();
        // Refused half-way: the old file stays, and nothing beside it.
        assert!(save_file(&mut store, &table, &[1], &IDENTITY, &path).is_err());
        let (mut other, mut fresh) = (empty(16), BlockTable::default());
        assert_eq!(restore_file(&mut other, &mut fresh, &IDENTITY, &path).unwrap(), [1, 2, 3]);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
