//! Writes packed files under temporary names and renames them when all is there: whatever happens, the old
//! files or the new ones are there, never half of one.
//!
//! A temporary file begins with the head of the finished one, except that its magic says that it is
//! unfinished, that a fingerprint of what it is made from takes the place of the head's checksum, and that
//! the checksum of a tensor is zero until the tensor is complete. A later writer with the same
//! fingerprint goes on after the last tensor whose bytes match their checksum, so neither a killed
//! process nor a lost page can leave anything wrong behind.
#![forbid(unsafe_code)]

use super::metadata::{Metadata, Value};
use super::nybl::{
    CHECKSUM, ENDIAN, HEAD_BYTES, Kind, MAGIC, ORDER, SET, VECTOR, VERSION, head_checksum,
};
use crate::error::{Error, Result};
use crate::memory::Aligned;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh64::Xxh64;

/// First bytes of an unfinished file.
const UNFINISHED: [u8; 8] = *b"\x89nybl...";

/// What is to be written where.
pub struct Target<'a> {
    /// The file; of several, the name that they are numbered after.
    pub path: &'a Path,
    /// Most bytes of tensors in a file, where there may be several.
    pub shard_bytes: Option<u64>,
    /// Identifies what is written: an unfinished file with the same fingerprint is continued. Zero
    /// continues none.
    pub fingerprint: u64,
}

/// A packed file, or several, in the making.
pub struct Writer {
    shards: Vec<Shard>,
    current: usize,
}

impl Writer {
    /// Starts a file that will hold `metadata` and the tensors `plan`, in that order.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be created, or another process is writing it.
    pub fn create(path: &Path, metadata: &Metadata, plan: &[(String, Kind)]) -> Result<Self> {
        Self::start(&Target { path, shard_bytes: None, fingerprint: 0 }, metadata, plan)
    }

    /// Starts or continues what the target says. Metadata goes into the first file; the others name the
    /// model and their place.
    ///
    /// # Errors
    /// As [`Writer::create`].
    pub fn start(
        target: &Target<'_>,
        metadata: &Metadata,
        plan: &[(String, Kind)],
    ) -> Result<Self> {
        let mut parts: Vec<&[(String, Kind)]> = Vec::new();
        let (mut from, mut bytes) = (0, 0_u64);
        for (index, (_, kind)) in plan.iter().enumerate() {
            let next = kind.bytes() as u64;
            if index > from && target.shard_bytes.is_some_and(|most| bytes + next > most) {
                parts.push(&plan[from..index]);
                (from, bytes) = (index, 0);
            }
            bytes += next;
        }
        parts.push(&plan[from..]);
        let count = parts.len();
        let mut shards = Vec::new();
        for (index, plan) in parts.into_iter().enumerate() {
            let path = shard_path(target.path, index, count);
            if count == 1 {
                shards.push(Shard::start(path, target.fingerprint, 0, metadata, plan)?);
                continue;
            }
            let mut own = if index == 0 {
                metadata.clone()
            } else {
                let mut own = Metadata::new(target.path.to_string_lossy().as_ref());
                for key in ["general.architecture", "general.name", "general.version"] {
                    if let Some(value) = metadata.get(key) {
                        own.set(key, value.clone());
                    }
                }
                own
            };
            own.set("split.no", Value::Unsigned(index as u64));
            own.set("split.count", Value::Unsigned(count as u64));
            // Shards of two conversions must not be taken for one model.
            let set = target.fingerprint.max(1);
            shards.push(Shard::start(path, target.fingerprint, set, &own, plan)?);
        }
        let mut writer = Self { shards, current: 0 };
        writer.skip_whole_shards();
        Ok(writer)
    }

    fn skip_whole_shards(&mut self) {
        while self.shards.get(self.current).is_some_and(Shard::is_complete) {
            self.current += 1;
        }
    }

    /// Which tensors of the plan are there already and must not be appended.
    #[must_use]
    pub fn complete(&self) -> Vec<bool> {
        let shard = |shard: &Shard| (0..shard.slots.len()).map(|at| at < shard.next).collect();
        self.shards.iter().flat_map::<Vec<_>, _>(shard).collect()
    }

    /// The bytes of tensor `index` of the plan, which must be complete.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when it is not, [`Error::Io`], [`Error::OutOfMemory`].
    pub fn read(&mut self, mut index: usize) -> Result<Aligned<u8>> {
        for shard in &mut self.shards {
            if index < shard.slots.len() {
                return shard.read(index);
            }
            index -= shard.slots.len();
        }
        Err(Error::InvalidArgument("a tensor that was not planned".into()))
    }

    /// Appends bytes to the first tensor that is not complete.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk is full or fails; [`Error::InvalidArgument`] when the bytes are more
    /// than were planned.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(shard) = self.shards.get_mut(self.current) else {
            return Err(Error::InvalidArgument("more bytes than were planned".into()));
        };
        shard.append(bytes)?;
        self.skip_whole_shards();
        Ok(())
    }

    /// Makes the bytes safe and gives the files their names, the first one last.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidArgument`] when a planned tensor is missing.
    pub fn finish(mut self) -> Result<Vec<PathBuf>> {
        if !self.shards.iter().all(Shard::is_complete) {
            return Err(Error::InvalidArgument("a planned tensor was not written".into()));
        }
        for shard in &mut self.shards {
            let synced = shard.out.flush().and_then(|()| shard.out.get_ref().sync_all());
            shard.io(synced)?;
        }
        for shard in self.shards.iter_mut().rev() {
            shard.seal()?;
        }
        Ok(self.shards.iter().map(|shard| shard.path.clone()).collect())
    }
}

/// The name of file `index` of `count`.
fn shard_path(path: &Path, index: usize, count: usize) -> PathBuf {
    if count == 1 {
        return path.into();
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or("nybl".into(), |extension| extension.to_string_lossy());
    path.with_file_name(format!("{stem}-{:05}-of-{count:05}.{extension}", index + 1))
}

struct Slot {
    range: Range<usize>,
    /// Where its checksum lies in the head.
    checksum_at: usize,
}

struct Shard {
    path: PathBuf,
    temporary: PathBuf,
    out: BufWriter<File>,
    head: Vec<u8>,
    slots: Vec<Slot>,
    next: usize,
    at: usize,
    hash: Xxh64,
    /// Whether an unfinished file is worth keeping: when it was the disk that failed, or the process.
    keep: bool,
}

/// A count as the head holds it.
fn count(number: usize) -> Result<u32> {
    u32::try_from(number)
        .map_err(|_| Error::InvalidArgument(format!("{number} does not fit the head of a file")))
}

impl Shard {
    fn start(
        path: PathBuf,
        fingerprint: u64,
        set: u64,
        metadata: &Metadata,
        plan: &[(String, Kind)],
    ) -> Result<Self> {
        let (mut head, slots) = unfinished_head(fingerprint, set, metadata, plan)?;
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".partial");
        let temporary = PathBuf::from(temporary);
        let name = temporary.display().to_string();
        let mut file = open_alone(&temporary).map_err(|reason| Error::io(&name, &reason))?;
        let next = match fingerprint {
            0 => 0,
            _ => complete(&mut file, &mut head, &slots)
                .map_err(|reason| Error::io(&name, &reason))?,
        };
        let mut shard = Self {
            path,
            temporary,
            out: BufWriter::with_capacity(1 << 20, file),
            head,
            slots,
            next,
            at: 0,
            hash: Xxh64::new(0),
            keep: fingerprint != 0,
        };
        if next == 0 {
            let head = std::mem::take(&mut shard.head);
            let written = shard
                .out
                .get_ref()
                .set_len(0)
                .and_then(|()| shard.out.seek(SeekFrom::Start(0)))
                .and_then(|_| shard.out.write_all(&head))
                .and_then(|()| shard.out.flush());
            shard.head = head;
            shard.io(written)?;
        }
        shard.begin_tensor()?;
        Ok(shard)
    }

    fn io<T>(&self, outcome: std::io::Result<T>) -> Result<T> {
        outcome.map_err(|reason| Error::io(self.temporary.display().to_string(), &reason))
    }

    fn is_complete(&self) -> bool {
        self.next == self.slots.len()
    }

    /// Moves on to where the next tensor starts.
    fn begin_tensor(&mut self) -> Result<()> {
        if let Some(slot) = self.slots.get(self.next) {
            self.at = slot.range.start;
            let moved = self.out.seek(SeekFrom::Start(self.at as u64));
            self.io(moved)?;
            self.hash = Xxh64::new(0);
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.slots.get(self.next).map_or(0, |slot| slot.range.end);
        if self.at + bytes.len() > end {
            self.keep = false;
            let what = "more bytes than the tensor was planned for";
            return Err(Error::InvalidArgument(what.into()));
        }
        let written = self.out.write_all(bytes);
        self.io(written)?;
        self.hash.update(bytes);
        self.at += bytes.len();
        if self.at == end {
            let at = self.slots[self.next].checksum_at;
            let checksum = self.hash.digest().to_le_bytes();
            self.head[at..at + 8].copy_from_slice(&checksum);
            let written = self
                .out
                .seek(SeekFrom::Start(at as u64))
                .and_then(|_| self.out.write_all(&checksum))
                .and_then(|()| self.out.flush());
            self.io(written)?;
            self.next += 1;
            self.begin_tensor()?;
        }
        Ok(())
    }

    fn read(&mut self, index: usize) -> Result<Aligned<u8>> {
        if index >= self.next {
            return Err(Error::InvalidArgument("a tensor that is not written yet".into()));
        }
        let range = self.slots[index].range.clone();
        let mut bytes = Aligned::zeroed("a tensor of a file", range.len())?;
        let read = self
            .out
            .seek(SeekFrom::Start(range.start as u64))
            .and_then(|_| self.out.get_mut().read_exact(&mut bytes))
            .and_then(|()| self.out.seek(SeekFrom::Start(self.at as u64)));
        self.io(read)?;
        Ok(bytes)
    }

    /// Writes the head as it is in a finished file, and gives the file its name.
    fn seal(&mut self) -> Result<()> {
        let length = self.slots.last().map_or(self.head.len(), |slot| slot.range.end);
        self.head[..8].copy_from_slice(&MAGIC);
        let checksum = head_checksum(&self.head).to_le_bytes();
        self.head[CHECKSUM].copy_from_slice(&checksum);
        let written = self
            .out
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.out.write_all(&self.head))
            .and_then(|()| self.out.flush())
            .and_then(|()| self.out.get_ref().set_len(length as u64))
            .and_then(|()| self.out.get_ref().sync_all())
            .and_then(|()| std::fs::rename(&self.temporary, &self.path))
            .and_then(|()| sync_folder(&self.path));
        self.io(written)?;
        self.keep = true;
        Ok(())
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        if !self.keep {
            // If it cannot be removed, its name tells what it is.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

impl Writer {
    /// Removes what was written: it cannot be finished, so nothing would ever continue it.
    pub fn discard(mut self) {
        self.shards.iter_mut().for_each(|shard| shard.keep = false);
    }
}

/// A rename is safe when its folder is.
fn sync_folder(path: &Path) -> std::io::Result<()> {
    if cfg!(unix) {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}

/// Opens or creates a file that no other writer has open.
fn open_alone(path: &Path) -> std::io::Result<File> {
    loop {
        let options =
            File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = options?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(std::io::Error::other("another process is writing this file"));
            }
            // Some file systems have no locks: then two writers are the user's to avoid.
            Err(std::fs::TryLockError::Error(_)) => return Ok(file),
        }
        // The one that had it may have renamed it meanwhile: then this is its finished file.
        if is_still(&file, path)? {
            return Ok(file);
        }
    }
}

#[cfg(unix)]
fn is_still(file: &File, path: &Path) -> std::io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let own = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (own.dev(), own.ino())),
        Err(reason) if reason.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(reason) => Err(reason),
    }
}

#[cfg(not(unix))]
fn is_still(_: &File, _: &Path) -> std::io::Result<bool> {
    // A file that is open cannot be renamed there.
    Ok(true)
}

/// The head of an unfinished file, and where its tensors go.
fn unfinished_head(
    fingerprint: u64,
    set: u64,
    metadata: &Metadata,
    plan: &[(String, Kind)],
) -> Result<(Vec<u8>, Vec<Slot>)> {
    let mut head = vec![0; HEAD_BYTES];
    metadata.write(&mut head);
    let entries: usize = plan.iter().map(|(name, _)| 8 + name.len() + 48).sum();
    let mut end = head.len() + entries;
    let head_end = end;
    let mut slots = Vec::with_capacity(plan.len());
    for (name, kind) in plan {
        let start = end.next_multiple_of(kind.alignment());
        end = start + kind.bytes();
        let (code, group, n, k) = match kind {
            Kind::Vector(len) => (VECTOR, 1, 1, *len),
            Kind::Order(len) => (ORDER, 1, 1, *len),
            Kind::Matrix(layout) => (layout.format() as u8, layout.group(), layout.n(), layout.k()),
        };
        head.extend((name.len() as u64).to_le_bytes());
        head.extend(name.as_bytes());
        head.extend([code, 0, 0, 0]);
        head.extend(count(group)?.to_le_bytes());
        for number in [n, k, start, kind.bytes()] {
            head.extend((number as u64).to_le_bytes());
        }
        slots.push(Slot { range: start..end, checksum_at: head.len() });
        head.extend([0; 8]);
    }
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &UNFINISHED);
    put(8, &VERSION.to_le_bytes());
    put(12, &ENDIAN.to_le_bytes());
    put(16, &(end as u64).to_le_bytes());
    put(24, &(head_end as u64).to_le_bytes());
    put(CHECKSUM.start, &fingerprint.to_le_bytes());
    put(40, &count(metadata.len())?.to_le_bytes());
    put(44, &count(plan.len())?.to_le_bytes());
    put(SET.start, &set.to_le_bytes());
    Ok((head, slots))
}

/// How many tensors of an unfinished file are whole, if its head is the expected one; the head takes
/// over their checksums.
fn complete(file: &mut File, head: &mut [u8], slots: &[Slot]) -> std::io::Result<usize> {
    let length = file.metadata()?.len();
    if length < head.len() as u64 {
        return Ok(0);
    }
    let mut found = vec![0; head.len()];
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut found)?;
    let mut blank = found.clone();
    for slot in slots {
        blank[slot.checksum_at..slot.checksum_at + 8].fill(0);
    }
    if blank != head {
        return Ok(0);
    }
    let mut buffer = vec![0; 1 << 20];
    for (index, slot) in slots.iter().enumerate() {
        let at = slot.checksum_at;
        let mut checksum = [0; 8];
        checksum.copy_from_slice(&found[at..at + 8]);
        if slot.range.end as u64 > length || checksum == [0; 8] {
            return Ok(index);
        }
        let mut hash = Xxh64::new(0);
        file.seek(SeekFrom::Start(slot.range.start as u64))?;
        let mut left = slot.range.len();
        while left > 0 {
            let part = &mut buffer[..left.min(1 << 20)];
            file.read_exact(part)?;
            hash.update(part);
            left -= part.len();
        }
        if hash.digest().to_le_bytes() != checksum {
            return Ok(index);
        }
        head[at..at + 8].copy_from_slice(&checksum);
    }
    Ok(slots.len())
}
