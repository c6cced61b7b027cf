//! What the system refuses: room on the disk, descriptors, mappings, threads, writes that fail at any byte, and
//! a process that is killed while it saves. Every refusal is a status, and afterwards the old file is there or the new
//! one.
//!
//! Limits hold for a whole process, so those tests that set one run alone in a process of their own: the test program,
//! started once more for one ignored test.
#![cfg(target_os = "linux")]

#[path = "support/mod.rs"]
mod support;

use nybl::Error;
use nybl::engine::load::Model;
use nybl::engine::session::{Session, SessionConfig};
use nybl::file::source::Source;
use nybl::kernel::KvFormat;
use nybl::kv::blocks::BlockTable;
use nybl::kv::snapshot::{self, Identity};
use nybl::kv::store::{KvConfig, KvShape, KvStore};
use nybl::threads::Pool;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use support::injected::Injected;
use support::{data, runtime};

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn limit(resource: libc::__rlimit_resource_t, most: u64) {
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: the struct is one for this call.
    assert_eq!(unsafe { libc::setrlimit(resource, &raw const limit) }, 0);
}

/// Runs an ignored test of this program in a process of its own.
fn alone(name: &str) {
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program)
        .args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && told.contains("1 passed"), "{name}: {text}{told}");
    eprint!("{text}");
}

/// `nybl convert` of the model in the tests, which may write at most `most` bytes to a file.
fn convert(to: &Path, most: Option<u64>) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nybl"));
    command.arg("convert").arg(data("nursery.F16.gguf")).arg(to).args(["--bits", "8"]);
    if let Some(most) = most {
        // SAFETY: both calls may be made between fork and exec.
        unsafe {
            command.pre_exec(move || {
                // Without this the signal would end it before the write could fail.
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                limit(libc::RLIMIT_FSIZE, most);
                Ok(())
            });
        }
    }
    command.output().unwrap()
}

#[test]
fn a_disk_that_is_full_at_any_byte_leaves_the_old_file() {
    let work = folder("full");
    let straight = work.join("straight.nybl");
    assert!(convert(&straight, None).status.success());
    let want = std::fs::read(&straight).unwrap();
    let (to, total) = (work.join("model.nybl"), want.len() as u64);
    std::fs::write(&to, "the old file").unwrap();
    let places = [0, 1, 63, 64, 5_000, total / 3, total / 2, total - 1];
    let mut faults = Injected::of("the disk is full");
    for most in places {
        faults.another();
        let output = convert(&to, Some(most));
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{most}: {text}");
        assert!(text.contains("model.nybl"), "{most}: {text}");
        assert_eq!(std::fs::read(&to).unwrap(), b"the old file", "{most}");
        faults.survived();
    }
    faults.told();
    // With room again it goes on, and comes to the same file.
    assert!(convert(&to, None).status.success());
    assert!(std::fs::read(&to).unwrap() == want);
}

/// Gives or takes so many bytes, then fails as a disk does.
struct Failing<'a> {
    bytes: &'a mut Vec<u8>,
    at: usize,
    left: usize,
    code: i32,
}

impl Write for Failing<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = bytes.len().min(self.left);
        if count == 0 && !bytes.is_empty() {
            return Err(std::io::Error::from_raw_os_error(self.code));
        }
        self.left -= count;
        self.bytes.extend_from_slice(&bytes[..count]);
        Ok(count)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Read for Failing<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = out.len().min(self.left).min(self.bytes.len() - self.at);
        if count == 0 && !out.is_empty() && self.left == 0 {
            return Err(std::io::Error::from_raw_os_error(self.code));
        }
        out[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
        (self.at, self.left) = (self.at + count, self.left - count);
        Ok(count)
    }
}

const IDENTITY: Identity = Identity { model: 1, rope_theta: 1e4, rope_dim: 4 };
const CONFIG: KvConfig = KvConfig {
    shape: KvShape { n_layers: 2, n_kv_heads: 1, head_dim: 4 },
    format: KvFormat::F32,
    block_tokens: 16,
    budget: 1 << 20,
    fingerprint: 0,
};

/// A cache with a sequence of the tokens 0, 1, 2 and so on.
fn cached(length: usize) -> (KvStore, BlockTable, Vec<u32>) {
    let mut store = KvStore::with(&CONFIG).unwrap();
    let mut table = BlockTable::default();
    store.reserve(&mut table, length).unwrap();
    for position in 0..length {
        for layer in 0..2 {
            let row = [position as f32 + layer as f32; 4];
            store.write(&table, layer, position, &row, &row);
        }
    }
    table.commit(length);
    (store, table, (0..length as u32).collect())
}

#[test]
fn a_snapshot_survives_a_failure_at_every_byte() {
    let (mut store, table, tokens) = cached(20);
    let mut save = |left: usize, code: i32| {
        let mut bytes = Vec::new();
        let mut out = Failing { bytes: &mut bytes, at: 0, left, code };
        let outcome = snapshot::save(&mut store, &table, &tokens, &IDENTITY, (&mut out, "a.kv"));
        (outcome, bytes)
    };
    let (outcome, mut whole) = save(usize::MAX, 0);
    outcome.unwrap();
    let mut faults = Injected::of("writing a snapshot fails");
    for left in 0..whole.len() {
        faults.another();
        let code = if left % 2 == 0 { libc::ENOSPC } else { libc::EIO };
        let error = save(left, code).0.unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if path == "a.kv"), "{error}");
        faults.survived();
    }
    faults.told();
    let length = whole.len();
    let mut other = KvStore::with(&CONFIG).unwrap();
    let mut faults = Injected::of("reading a snapshot fails");
    for left in 0..length {
        faults.another();
        let mut input = Failing { bytes: &mut whole, at: 0, left, code: libc::EIO };
        let mut table = BlockTable::default();
        let error = snapshot::restore(&mut other, &mut table, &IDENTITY, (&mut input, "a.kv"));
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Io { .. }) && table.is_empty(), "{error}");
        assert_eq!(other.stats().used, 0, "a failed restore keeps no block");
        faults.survived();
    }
    faults.told();
    let (input, mut table) = (&mut &whole[..], BlockTable::default());
    let back = snapshot::restore(&mut other, &mut table, &IDENTITY, (input, "a.kv"));
    assert_eq!(back.unwrap(), tokens);
}

#[test]
fn a_save_that_is_killed_leaves_the_old_file_or_the_new_one() {
    let work = folder("killed-save");
    let path = work.join("session.kv");
    let model = support::open(&nursery());
    let of = |tokens: &[u32]| {
        let mut session = Session::new(Arc::clone(&model), &SessionConfig::default()).unwrap();
        session.append(tokens).unwrap();
        session
    };
    of(&[1, 2, 3]).save(&path).unwrap();
    let (mut kills, mut state) = (Injected::of("a save is killed"), 99_u64);
    for _ in 0..40 {
        kills.another();
        let program = std::env::current_exe().unwrap();
        let mut child = Command::new(program)
            .args(["--exact", "saves_forever", "--ignored", "--nocapture"])
            .env("NYBL_SAVE_TO", &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It says when it begins.
        let mut out = child.stdout.take().unwrap();
        let mut said = Vec::new();
        let mut byte = [0];
        while !said.ends_with(b"saving") && out.read(&mut byte).unwrap() == 1 {
            said.push(byte[0]);
        }
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        std::thread::sleep(Duration::from_micros(state >> 50));
        child.kill().unwrap();
        // Nothing but the signal ended it.
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        let mut session = Session::new(Arc::clone(&model), &SessionConfig::default()).unwrap();
        session.restore(&path).unwrap();
        let tokens = session.tokens().to_vec();
        assert!(tokens.len() == 3 || tokens.len() > 100, "{} tokens", tokens.len());
        kills.survived();
    }
    kills.told();
}

fn nursery() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nursery.nybl")
}

#[test]
#[ignore = "never ends by itself: a_save_that_is_killed_leaves_the_old_file_or_the_new_one kills it"]
fn saves_forever() {
    let path = PathBuf::from(std::env::var_os("NYBL_SAVE_TO").expect("where to"));
    let model = support::open(&nursery());
    let mut session = Session::new(Arc::clone(&model), &SessionConfig::default()).unwrap();
    session.append(&(0..200).map(|i| i % 50).collect::<Vec<_>>()).unwrap();
    println!("saving");
    loop {
        session.save(&path).unwrap();
    }
}

#[test]
fn without_descriptors_memory_or_threads_there_is_a_status() {
    alone("no_descriptors");
    alone("no_address_space");
}

#[test]
fn a_cache_survives_a_disk_that_is_full_at_any_block() {
    alone("no_room_for_a_cache");
}

#[test]
#[ignore = "changes the limits of its process"]
fn no_room_for_a_cache() {
    let room = |most: u64| {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the struct is one for this call.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }, 0);
    };
    // SAFETY: no handler is there to be lost; without this the signal would end the process.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let work = folder("no-room");
    let (mut store, table, tokens) = cached(160);
    let bytes = |store: &mut KvStore| {
        let mut bytes = Vec::new();
        snapshot::save(store, &table, &tokens, &IDENTITY, (&mut bytes, "a.kv")).unwrap();
        bytes
    };
    let want = bytes(&mut store);

    let path = work.join("a.kv");
    std::fs::write(&path, "the old file").unwrap();
    let mut faults = Injected::of("no room for a snapshot");
    for most in (0..want.len()).step_by(97) {
        faults.another();
        room(most as u64);
        let outcome = snapshot::save_file(&mut store, &table, &tokens, &IDENTITY, &path);
        room(libc::RLIM_INFINITY);
        assert!(matches!(outcome, Err(Error::Io { .. })), "{most}: {outcome:?}");
        assert_eq!(std::fs::read(&path).unwrap(), b"the old file", "{most}");
        assert_eq!(std::fs::read_dir(&work).unwrap().count(), 1, "{most}: something is left");
        faults.survived();
    }
    faults.told();

    store.spill_to(&work, 1 << 20).unwrap();
    let slot = 16 * 1024;
    let mut faults = Injected::of("no room for blocks that give way");
    for block in 0..10 {
        for most in [0, 1, 511].map(|byte| block * slot + byte) {
            faults.another();
            room(most);
            let (_, outcome) = store.spill_all();
            assert!(matches!(outcome, Err(Error::Io { .. })), "{most}: {outcome:?}");
            assert_eq!(store.stats().spilled as u64, block, "what had room went out");
            room(libc::RLIM_INFINITY);
            assert!(bytes(&mut store) == want, "{most}: the cache has changed");
            faults.survived();
        }
    }
    faults.told();
    store.spill_all().1.unwrap();
    assert!(bytes(&mut store) == want);
}

#[test]
#[ignore = "changes the limits of its process"]
fn no_descriptors() {
    let work = folder("descriptors");
    let model = support::open(&nursery());
    let mut session = Session::new(Arc::clone(&model), &SessionConfig::default()).unwrap();
    session.append(&[1, 2, 3]).unwrap();
    limit(libc::RLIMIT_NOFILE, 3);
    let mut faults = Injected::of("no descriptors");
    let mut refused = |outcome: Result<(), Error>| {
        faults.another();
        match outcome {
            Err(Error::Io { reason, .. }) => {
                assert!(reason.contains("Too many open files"), "{reason}")
            }
            other => panic!("{other:?}"),
        }
        faults.survived();
    };
    refused(Source::open(&nursery()).map(|_| ()));
    refused(Model::open_path(runtime(1, None), &data("families/llama2")).map(|_| ()));
    refused(session.save(&work.join("a.kv")));
    refused(session.restore(&nursery()));
    // What is open goes on.
    session.reset();
    session.append(&[1, 2, 3]).unwrap();
    session.next().unwrap();
    faults.told();
}

#[test]
#[ignore = "changes the limits of its process"]
fn no_address_space() {
    let work = folder("address-space");
    let large = work.join("large.nybl");
    let file = std::fs::File::create(&large).unwrap();
    file.set_len(1 << 30).unwrap();
    let model = support::open(&nursery());
    let mut session = Session::new(Arc::clone(&model), &SessionConfig::default()).unwrap();
    session.append(&[1, 2, 3]).unwrap();
    // A megabyte more than there is now: enough for small things, not for a mapping or a thread's stack.
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    limit(libc::RLIMIT_AS, pages * 4096 + (1 << 20));
    let mut faults = Injected::of("no address space");
    faults.another();
    match Source::open(&large) {
        Err(Error::Io { path, .. }) => assert!(path.ends_with("large.nybl")),
        other => panic!("{:?}", other.map(|_| ())),
    }
    faults.survived();
    faults.another();
    // Threads that the system refuses are done without.
    let pool = Pool::new(8).unwrap();
    assert!(pool.threads() < 8, "{} threads", pool.threads());
    let sum = std::sync::atomic::AtomicUsize::new(0);
    pool.run(100, &|tile| {
        sum.fetch_add(tile, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(sum.into_inner(), 4950);
    faults.survived();
    faults.another();
    let error = nybl::memory::zeroed::<u8>("a test", 64 << 20).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    session.append(&[4]).unwrap();
    session.next().unwrap();
    faults.survived();
    faults.told();
}
