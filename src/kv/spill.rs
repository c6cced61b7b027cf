//! A file for blocks that memory has no room for.
//!
//! Slots of one size, a multiple of the largest page of any phone; a block goes out and comes back whole.
//! What comes back is compared with a checksum that stayed in memory. The file has no name while it is
//! used where the system allows that, so a process that dies leaves nothing behind.
#![forbid(unsafe_code)]

use super::hash::{START, mix_bytes};
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Slots start at multiples of this.
const PAGE: usize = 16 * 1024;

/// Where a block lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    number: u32,
    sum: u64,
}

pub(super) struct SpillFile {
    file: File,
    path: PathBuf,
    slot_bytes: usize,
    /// Slots that may be in use at once.
    limit: u32,
    /// Slots that were used and are not, and the first that never was.
    free: Vec<u32>,
    fresh: u32,
}

impl SpillFile {
    /// A new file in `folder` for as many blocks of up to `block_bytes` as fit into `budget` bytes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a budget of less than one block, [`Error::Io`].
    pub(super) fn create(folder: &Path, block_bytes: usize, budget: usize) -> Result<Self> {
        let slot_bytes = block_bytes.next_multiple_of(PAGE);
        let limit = u32::try_from(budget / slot_bytes).unwrap_or(u32::MAX);
        if limit == 0 {
            let text =
                format!("a spill file of {budget} bytes holds no block: one takes {slot_bytes}");
            return Err(Error::InvalidArgument(text));
        }
        let mut serial = 0;
        let (file, path) = loop {
            let path = folder.join(format!("nybl-kv-{}-{serial}.spill", std::process::id()));
            match File::options().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => break (file, path),
                Err(error)
                    if error.kind() == std::io::ErrorKind::AlreadyExists && serial < 1000 =>
                {
                    serial += 1;
                }
                Err(error) => return Err(Error::io(path.display().to_string(), &error)),
            }
        };
        #[cfg(unix)]
        // If it fails, the file has its name until it is dropped.
        let _ = std::fs::remove_file(&path);
        Ok(Self { file, path, slot_bytes, limit, free: Vec::new(), fresh: 0 })
    }

    /// Blocks that can still go out.
    pub(super) fn room(&self) -> usize {
        self.free.len() + (self.limit - self.fresh) as usize
    }

    /// Blocks that may be out at once.
    pub(super) fn limit(&self) -> usize {
        self.limit as usize
    }

    /// Blocks that are out.
    pub(super) fn used(&self) -> usize {
        self.fresh as usize - self.free.len()
    }

    /// Bytes that the blocks in the file take there.
    pub(super) fn bytes(&self) -> usize {
        self.used() * self.slot_bytes
    }

    fn io(&self, error: &std::io::Error) -> Error {
        Error::io(self.path.display().to_string(), error)
    }

    fn seek(&mut self, number: u32) -> std::io::Result<u64> {
        self.file.seek(SeekFrom::Start(u64::from(number) * self.slot_bytes as u64))
    }

    /// Writes a block into a free slot, of which there must be one.
    pub(super) fn write(&mut self, block: &[u8]) -> Result<Slot> {
        // A slot is only taken once the block is in it.
        let number = self.free.last().copied().unwrap_or(self.fresh);
        self.seek(number)
            .and_then(|_| self.file.write_all(block))
            .map_err(|error| self.io(&error))?;
        if self.free.pop().is_none() {
            self.fresh += 1;
        }
        Ok(Slot { number, sum: mix_bytes(START, block) })
    }

    /// Reads a block back; it stays in the file until [`SpillFile::release`].
    pub(super) fn read(&mut self, slot: Slot, block: &mut [u8]) -> Result<()> {
        self.seek(slot.number)
            .and_then(|_| self.file.read_exact(block))
            .map_err(|error| self.io(&error))?;
        if mix_bytes(START, block) != slot.sum {
            let reason = "is not what was written: the storage is damaged";
            return Err(Error::corrupt(
                self.path.display().to_string(),
                "a spilled KV block",
                reason,
            ));
        }
        Ok(())
    }

    /// The slot may be written again.
    pub(super) fn release(&mut self, slot: Slot) {
        // Without memory for the list the slot is lost to this file, which harms nothing.
        if self.free.try_reserve(1).is_ok() {
            self.free.push(slot.number);
        }
    }
}

impl Drop for SpillFile {
    fn drop(&mut self) {
        // Gone already where it has no name.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_back_and_damage_is_seen() {
        let folder = std::env::temp_dir();
        assert!(SpillFile::create(&folder, 100_000, 100_000).is_err());
        let mut spill = SpillFile::create(&folder, 1000, 3 * PAGE).unwrap();
        let blocks: Vec<Vec<u8>> = (0..3).map(|i| vec![i; 1000]).collect();
        let slots: Vec<_> = blocks.iter().map(|block| spill.write(block).unwrap()).collect();
        assert_eq!((spill.room(), spill.used()), (0, 3));
        let mut back = vec![9; 1000];
        spill.read(slots[1], &mut back).unwrap();
        assert_eq!(back, blocks[1]);
        spill.release(slots[1]);
        let again = spill.write(&[7; 1000]).unwrap();
        assert!(matches!(spill.read(slots[1], &mut back), Err(Error::Corrupt { .. })));
        spill.read(again, &mut back).unwrap();
        assert_eq!(back, [7; 1000]);
        assert_eq!(spill.bytes(), 3 * PAGE);
    }
}
