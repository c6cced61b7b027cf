//! Damaged and hostile model files: a clear error that names file and field, no panic, and memory bounded
//! by the size of the file.

#[path = "support/mod.rs"]
mod support;

use nybl::Error;
use nybl::engine::convert::{Recipe, convert};
use nybl::engine::load::Model;
use nybl::engine::runtime::Runtime;
use nybl::file::checkpoint::Checkpoint;
use nybl::file::huggingface;
use nybl::file::metadata::{Metadata, Value};
use nybl::file::source::Source;
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::injected::Injected;
use support::{data, runtime};
use xxhash_rust::xxh64::xxh64;

/// The system's allocator, counting what is live on this thread.
struct Counting;

thread_local! {
    static LIVE: AtomicUsize = const { AtomicUsize::new(0) };
    static PEAK: AtomicUsize = const { AtomicUsize::new(0) };
}

fn count(change: impl FnOnce(usize) -> usize) {
    let _ = LIVE.try_with(|live| {
        let now = change(live.load(Ordering::Relaxed));
        live.store(now, Ordering::Relaxed);
        let _ = PEAK.try_with(|peak| peak.fetch_max(now, Ordering::Relaxed));
    });
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(|live| live + layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(|live| live.saturating_sub(layout.size()));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Opens `bytes`; the outcome and the most memory that was live beyond what was before.
fn open(runtime: &Arc<Runtime>, bytes: Vec<u8>) -> (Result<Arc<Model>, Error>, usize) {
    let source = Source::from_vec("bad.file", bytes);
    let before = LIVE.with(|live| live.load(Ordering::Relaxed));
    PEAK.with(|peak| peak.store(before, Ordering::Relaxed));
    let outcome = Model::open(Arc::clone(runtime), source);
    let peak = PEAK.with(|peak| peak.load(Ordering::Relaxed));
    (outcome, peak.saturating_sub(before))
}

fn gguf() -> Vec<u8> {
    std::fs::read(data("nursery.F16.gguf")).unwrap()
}

fn nybl() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nursery.nybl")).unwrap()
}

/// The error of opening `bytes`, which must name the file.
fn refused(bytes: Vec<u8>) -> String {
    let length = bytes.len();
    let (outcome, peak) = open(&runtime(1, None), bytes);
    let text = outcome.err().expect("the file is refused").to_string();
    assert!(peak <= 16 * length + 100_000, "{peak} bytes for a file of {length}: {text}");
    text
}

#[test]
fn truncated_at_every_kibibyte() {
    let runtime = runtime(1, None);
    let mut cuts = Injected::of("a file is cut off");
    for whole in [gguf(), nybl()] {
        for end in (0..whole.len()).step_by(1024) {
            cuts.another();
            let (outcome, peak) = open(&runtime, whole[..end].to_vec());
            let text = outcome.err().expect("a truncated file is refused").to_string();
            assert!(text.starts_with("bad.file: "), "{text}");
            assert!(peak <= 16 * end + 100_000, "{peak} bytes for a file of {end}");
            cuts.survived();
        }
    }
    cuts.told();
}

#[test]
fn any_byte_of_the_head_may_be_wrong() {
    let runtime = runtime(1, None);
    let mut flips = Injected::of("a byte of a head is wrong");
    for (whole, head) in [(gguf(), 70_000), (nybl(), 4_096)] {
        // Every byte of the first two hundred, then a sample of the rest.
        for at in (0..200).chain((200..head).step_by(211)) {
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                flips.another();
                // Opening may well succeed, as with a changed name; it must not panic, nor take
                // memory that the file does not account for.
                let (_, peak) = open(&runtime, bytes);
                assert!(peak <= 16 * whole.len(), "{peak} bytes at byte {at}");
                flips.survived();
            }
        }
    }
    flips.told();
}

#[test]
fn a_damaged_packed_file_is_found_by_its_checksums() {
    let mut bytes = nybl();
    bytes[300] ^= 1;
    let error = refused(bytes);
    assert!(error.contains("head checksum"), "{error}");

    let mut bytes = nybl();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let packed = nybl::file::nybl::Nybl::open(Source::from_vec("bad.file", bytes)).unwrap();
    let error = packed.verify().unwrap_err().to_string();
    assert!(error.starts_with("bad.file: ") && error.contains("checksum"), "{error}");
}

#[test]
fn wrong_magic_and_versions() {
    assert!(refused(vec![0; 64]).contains("magic"));
    assert!(refused(b"GG".to_vec()).contains("magic"));
    let mut bytes = gguf();
    bytes[4] = 1;
    assert!(refused(bytes.clone()).contains("version 1"));
    bytes[4..8].copy_from_slice(&[0, 0, 0, 3]);
    assert!(refused(bytes).contains("big-endian"));
    let mut bytes = nybl();
    bytes[8] = 9;
    assert!(refused(bytes).contains("version 9"));
}

/// A GGUF file from parts, for what no converter would write.
struct Parts {
    metadata: Metadata,
    tensors: Vec<(&'static str, Vec<u64>, u32, u64)>,
    counts: Option<(u64, u64)>,
}

impl Parts {
    /// A model of one layer, width 32, 4 tokens; its tensors all lie at the start of 16 KiB of zeros.
    fn sound() -> Self {
        let mut metadata = Metadata::new("test");
        let mut set = |key: &str, value| metadata.set(key, value);
        set("general.architecture", Value::Text("llama".into()));
        for (key, value) in [
            ("llama.context_length", 16),
            ("llama.embedding_length", 32),
            ("llama.block_count", 1),
            ("llama.feed_forward_length", 32),
            ("llama.attention.head_count", 2),
        ] {
            set(key, Value::Unsigned(value));
        }
        set("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5));
        set("tokenizer.ggml.model", Value::Text("llama".into()));
        let tokens = ["<unk>", "<s>", "</s>", "a"].map(String::from);
        set("tokenizer.ggml.tokens", Value::Texts(tokens.to_vec()));
        set("tokenizer.ggml.scores", Value::Floats(vec![0.0; 4]));
        set("tokenizer.ggml.token_type", Value::Integers(vec![2, 3, 3, 1]));
        set("tokenizer.ggml.bos_token_id", Value::Unsigned(1));
        let square = |name| (name, vec![32, 32], 0, 0);
        let vector = |name| (name, vec![32], 0, 0);
        let tensors = vec![
            ("token_embd.weight", vec![32, 4], 0, 0),
            vector("output_norm.weight"),
            vector("blk.0.attn_norm.weight"),
            square("blk.0.attn_q.weight"),
            square("blk.0.attn_k.weight"),
            square("blk.0.attn_v.weight"),
            square("blk.0.attn_output.weight"),
            vector("blk.0.ffn_norm.weight"),
            square("blk.0.ffn_gate.weight"),
            square("blk.0.ffn_up.weight"),
            square("blk.0.ffn_down.weight"),
        ];
        Self { metadata, tensors, counts: None }
    }

    fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        let counts = (self.tensors.len() as u64, self.metadata.len() as u64);
        let (tensors, pairs) = self.counts.unwrap_or(counts);
        out.extend(tensors.to_le_bytes());
        out.extend(pairs.to_le_bytes());
        self.metadata.write(&mut out);
        for (name, shape, kind, offset) in &self.tensors {
            out.extend((name.len() as u64).to_le_bytes());
            out.extend(name.as_bytes());
            out.extend((shape.len() as u32).to_le_bytes());
            out.extend(shape.iter().flat_map(|size| size.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32) + 16 * 1024, 0);
        out
    }

    fn tensor(&mut self, name: &str) -> &mut (&'static str, Vec<u64>, u32, u64) {
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }
}

#[test]
fn the_parts_are_sound() {
    let mut version_2 = Parts::sound().build();
    version_2[4] = 2;
    for bytes in [Parts::sound().build(), version_2] {
        let (outcome, _) = open(&runtime(1, None), bytes);
        assert!(outcome.is_ok(), "{:?}", outcome.err());
    }
}

#[test]
fn tensors_that_cannot_be() {
    let change = |name: &str, change: fn(&mut (&'static str, Vec<u64>, u32, u64)), word: &str| {
        let mut parts = Parts::sound();
        change(parts.tensor(name));
        let error = refused(parts.build());
        assert!(error.contains(name) && error.contains(word), "{error}");
    };
    let q = "blk.0.attn_q.weight";
    change(q, |t| t.3 = 1 << 20, "ends at byte");
    change(q, |t| t.3 = u64::MAX - 31, "offset");
    change(q, |t| t.3 = 7, "offset");
    change(q, |t| t.1 = vec![u64::MAX, u64::MAX], "shape");
    change(q, |t| t.1 = vec![1 << 24, 1 << 24], "ends at byte");
    change(q, |t| t.1 = vec![0, 32], "shape");
    change(q, |t| t.1 = vec![32; 9], "dimensions");
    change(q, |t| t.1 = vec![32, 2, 2], "only matrices");
    change(q, |t| t.1 = vec![32, 16], "32 x 32");
    change(q, |t| t.2 = 12, "whole blocks of 256");
    change(q, |t| t.2 = 23, "IQ4_XS");
    change(q, |t| t.2 = 9999, "unknown type");
    change("blk.0.attn_norm.weight", |t| t.1 = vec![31], "1 x 32");
    change("blk.0.attn_norm.weight", |t| t.2 = 8, "not a vector of floats");
}

#[test]
fn tensors_missing_twice_or_unknown() {
    let mut parts = Parts::sound();
    parts.tensors.retain(|tensor| tensor.0 != "blk.0.ffn_up.weight");
    assert!(refused(parts.build()).contains("blk.0.ffn_up.weight: is missing"));
    let mut parts = Parts::sound();
    let twice = parts.tensors[0].clone();
    parts.tensors.push(twice);
    assert!(refused(parts.build()).contains("token_embd.weight: is the name of two tensors"));
    let mut parts = Parts::sound();
    parts.tensors.push(("blk.0.attn_q.bias", vec![32], 0, 0));
    assert!(refused(parts.build()).contains("blk.0.attn_q.bias"));
}

#[test]
fn metadata_that_cannot_be() {
    let key = |key: &str, value: Value, word: &str| {
        let mut parts = Parts::sound();
        parts.metadata.set(key, value);
        let error = refused(parts.build());
        assert!(error.contains(key) && error.contains(word), "{key}: {error}");
    };
    key("llama.block_count", Value::Unsigned(u64::MAX), "between");
    key("llama.block_count", Value::Unsigned(1_000_000), "absurd");
    key("llama.block_count", Value::Text("one".into()), "integer");
    key("llama.context_length", Value::Unsigned(0), "zero");
    key("llama.attention.head_count", Value::Unsigned(0), "zero");
    key("llama.attention.head_count_kv", Value::Unsigned(0), "0 KV heads");
    key("llama.rope.freq_base", Value::Float(f64::NAN), "finite");
    key("general.alignment", Value::Unsigned(24), "power of two");
    key("tokenizer.ggml.tokens", Value::Integers(vec![1]), "strings");
    key("tokenizer.ggml.scores", Value::Floats(vec![0.0]), "");
    key("tokenizer.ggml.bos_token_id", Value::Unsigned(1 << 40), "between");

    let mut parts = Parts::sound();
    parts.metadata.remove_prefix("general.architecture");
    assert!(refused(parts.build()).contains("general.architecture: is missing"));
}

#[test]
fn vocabularies_that_cannot_be() {
    let mut parts = Parts::sound();
    parts.metadata.set("tokenizer.ggml.tokens", Value::Texts(Vec::new()));
    let error = refused(parts.build());
    assert!(error.contains("tokenizer.ggml.tokens"), "{error}");
    let mut parts = Parts::sound();
    parts.tensor("token_embd.weight").1 = vec![32, 3];
    let error = refused(parts.build());
    assert!(error.contains("4 tokens") && error.contains("3 rows"), "{error}");
}

#[test]
fn counts_beyond_the_file() {
    for counts in [(u64::MAX, 1), (1, u64::MAX), (1 << 40, 12), (11, 1 << 40)] {
        let parts = Parts { counts: Some(counts), ..Parts::sound() };
        assert!(refused(parts.build()).contains("count"));
    }
}

#[test]
fn parts_of_a_file_that_are_not_one_model() {
    let part = |number: u64, attention: bool, all: u64| {
        let mut parts = Parts::sound();
        parts.tensors.retain(|tensor| tensor.0.contains("attn") == attention);
        parts.metadata.set("split.no", Value::Unsigned(number));
        parts.metadata.set("split.count", Value::Unsigned(2));
        parts.metadata.set("split.tensors.count", Value::Unsigned(all));
        Source::from_vec("part.gguf", parts.build())
    };
    let open = |sources| {
        let checkpoint = Checkpoint::from_sources(sources)?;
        Model::from_checkpoint(runtime(1, None), checkpoint)
    };
    assert!(open(vec![part(0, true, 11), part(1, false, 11)]).is_ok());
    for (sources, word) in [
        (vec![], "without files"),
        (vec![part(0, true, 11)], "is part 1 of 2"),
        (vec![part(1, false, 11), part(0, true, 11)], "is part 2 of 2"),
        (vec![part(0, true, 11), part(1, true, 11)], "is the name of two tensors"),
        (vec![part(0, true, 12), part(1, false, 12)], "is not 11"),
    ] {
        let error = open(sources).err().expect("it is refused").to_string();
        assert!(error.contains(word), "{error}");
    }
}

/// Changes `bytes` as damage and malice do: bits, extreme numbers, cuts and copies, mostly where the head is.
fn mutate(bytes: &mut Vec<u8>, head: usize, random: &mut impl FnMut(usize) -> usize) {
    for _ in 0..=random(8) {
        let end = if random(8) == 0 { bytes.len() } else { head.min(bytes.len()) };
        let at = random(end.max(1));
        match random(8) {
            0..3 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random(8)),
            3 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = random(256) as u8),
            4 | 5 => {
                let number: u64 = match random(8) {
                    0 => 0,
                    1 => u64::MAX,
                    2 => 1 << 63,
                    3 => 1 << random(64),
                    4 => u64::from(u32::MAX),
                    5 => (1 << 24) + 1,
                    6 => u64::from(f32::NAN.to_bits()),
                    _ => random(1 << 20) as u64,
                };
                let number = &number.to_le_bytes()[..[4, 8][random(2)]];
                bytes.iter_mut().skip(at).zip(number).for_each(|(byte, new)| *byte = *new);
            }
            6 if random(4) == 0 => bytes.truncate(at),
            6 => drop(bytes.drain(at..bytes.len().min(at + 1 + random(64)))),
            _ => {
                let copied =
                    bytes[at.min(bytes.len())..bytes.len().min(at + 1 + random(64))].to_vec();
                let to = random(end.max(1)).min(bytes.len());
                bytes.splice(to..to, copied);
            }
        }
    }
}

/// Puts right what every mutation of a packed file breaks, so that it is looked at all the same.
fn repair(bytes: &mut [u8]) {
    let length = bytes.len();
    if length < 64 {
        return;
    }
    bytes[16..24].copy_from_slice(&(length as u64).to_le_bytes());
    let head = u64::from_le_bytes(bytes[24..32].try_into().unwrap()).clamp(64, length as u64);
    bytes[24..32].copy_from_slice(&head.to_le_bytes());
    let covered = [&bytes[..32], &bytes[40..head as usize]].concat();
    bytes[32..40].copy_from_slice(&xxh64(&covered, 0).to_le_bytes());
}

/// `NYBL_MUTATIONS=10000` for as many files of each format, each in less than a second.
#[test]
fn mutated_files_open_or_are_refused_within_twice_their_size() {
    let asked = std::env::var("NYBL_MUTATIONS").ok().and_then(|count| count.parse().ok());
    let count: usize = asked.unwrap_or(300);
    let mut state = 1_u64;
    let mut random = move |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let family = |name: &str| std::fs::read(data("families").join(name)).unwrap();
    let runtime = runtime(1, None);
    let mut damages = Injected::of("a file is damaged");
    for format in ["gguf", "nybl", "folder"] {
        let (mut opened, mut slowest, mut largest) = (0, 0.0_f64, 0.0_f64);
        for index in 0..count {
            let mut files = match (format, index % 4) {
                ("gguf", 0) => vec![("a.gguf", gguf(), 12_000)],
                ("gguf", 1) => vec![("a.gguf", family("llama3/model.gguf"), 3_000)],
                ("gguf", 2) => vec![("a.gguf", family("gemma3/model.gguf"), 6_000)],
                ("gguf", _) => vec![("a.gguf", family("phi3-longrope/model.gguf"), 3_000)],
                ("nybl", _) => vec![("a.nybl", nybl(), 24_000)],
                (_, which) => {
                    let name = ["qwen2", "gemma2", "phi3-longrope", "smollm3"][which];
                    let config = family(&format!("{name}/config.json"));
                    let weights = family(&format!("{name}/model.safetensors"));
                    vec![("config.json", config, usize::MAX), ("model.safetensors", weights, 5_000)]
                }
            };
            let changed = random(files.len());
            let (_, bytes, head) = &mut files[changed];
            mutate(bytes, *head, &mut random);
            if format == "nybl" && index % 8 > 0 {
                repair(bytes);
            }
            damages.another();
            let size: usize = files.iter().map(|(_, bytes, _)| bytes.len()).sum();
            let mut sources: BTreeMap<_, _> = files
                .into_iter()
                .map(|(name, bytes, _)| (name.to_owned(), Source::from_vec(name, bytes)))
                .collect();
            let before = LIVE.with(|live| live.load(Ordering::Relaxed));
            PEAK.with(|peak| peak.store(before, Ordering::Relaxed));
            let started = std::time::Instant::now();
            let outcome = match sources.remove("a.gguf").or_else(|| sources.remove("a.nybl")) {
                Some(source) => Model::open(Arc::clone(&runtime), source),
                None => huggingface::from_files("folder", &sources).and_then(|checkpoint| {
                    Model::from_checkpoint(Arc::clone(&runtime), checkpoint)
                }),
            };
            slowest = slowest.max(started.elapsed().as_secs_f64());
            let peak = PEAK.with(|peak| peak.load(Ordering::Relaxed)).saturating_sub(before);
            largest = largest.max(peak as f64 / size.max(100_000) as f64);
            assert!(peak <= 2 * size + 100_000, "{format} {index}: {peak} bytes for {size}");
            match outcome {
                Ok(_) => opened += 1,
                Err(error) => assert!(error.to_string().contains(": "), "{error}"),
            }
            damages.survived();
        }
        assert!(opened > 0 && opened < count, "{format}: {opened} of {count} opened");
        // Only a run that was asked for says anything about time.
        assert!(asked.is_none() || slowest < 1.0, "{format}: {slowest} s");
        eprintln!(
            "{format}: {count} files, {opened} opened, at most {slowest:.3} s and {largest:.2} times the size in memory"
        );
    }
    damages.told();
}

#[test]
fn a_failed_conversion_leaves_the_old_file() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("convert");
    std::fs::create_dir_all(&folder).unwrap();
    let (from, to) = (folder.join("nan.gguf"), folder.join("model.nybl"));
    let mut bytes = Parts::sound().build();
    let length = bytes.len();
    // Every tensor begins with this weight, which no scale can hold.
    bytes[length - 16 * 1024..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&from, bytes).unwrap();
    std::fs::write(&to, "the old file").unwrap();
    let recipe = Recipe::Bits { bits: 4, group: 32, zero_points: false };
    let error = convert(&runtime(1, None), &from, &to, &recipe.into(), |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("token_embd.weight"), "{error}");
    assert_eq!(std::fs::read_to_string(&to).unwrap(), "the old file");
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 2, "no partial file is left");
    let missing = convert(&runtime(1, None), &folder.join("none"), &to, &recipe.into(), |_, _| {});
    assert!(matches!(missing, Err(Error::Io { .. })));
}
