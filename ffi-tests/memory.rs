//! A packed model is used in place: running it makes almost no memory dirty beyond the KV cache and the
//! buffers that a session reports. Alone in its program, because it looks at the whole process.
#![cfg(target_os = "linux")]

#[path = "support/mod.rs"]
mod support;

use nybl::engine::load::Model;
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::file::metadata::{Metadata, Value};
use nybl::file::nybl::{Kind, Writer};
use nybl::kernel::{Format, Layout};
use std::alloc::{GlobalAlloc, System};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that the program has allocated and not freed.
static LIVE: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: the system's allocator, with a counter beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: std::alloc::Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: std::alloc::Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise. Pages that nobody touches stay clean, which the default would not leave
        // them.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, data: *mut u8, layout: std::alloc::Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(data, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const LAYERS: usize = 6;
const WIDTH: usize = 1024;
const FF: usize = 2816;
const VOCAB: usize = 8192;

/// A model of 46 MB whose weights are all alike: speed and quality do not matter here.
fn write_model(path: &Path) {
    let mut metadata = Metadata::new("memory");
    metadata.set("general.architecture", Value::Text("llama".into()));
    for (key, value) in [
        ("context_length", 512),
        ("embedding_length", WIDTH),
        ("block_count", LAYERS),
        ("feed_forward_length", FF),
        ("attention.head_count", 16),
        ("attention.head_count_kv", 4),
    ] {
        metadata.set(&format!("llama.{key}"), Value::Unsigned(value as u64));
    }
    metadata.set("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5));
    let matrix = |name: String, n: usize, k: usize| {
        (name, Kind::Matrix(Layout::new(Format::Q4, 32, n, k).unwrap()))
    };
    let mut plan = vec![matrix("token_embd.weight".into(), VOCAB, WIDTH)];
    for layer in 0..LAYERS {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        plan.push((name("attn_norm"), Kind::Vector(WIDTH)));
        plan.push(matrix(name("attn_q"), WIDTH, WIDTH));
        plan.push(matrix(name("attn_k"), WIDTH / 4, WIDTH));
        plan.push(matrix(name("attn_v"), WIDTH / 4, WIDTH));
        plan.push(matrix(name("attn_output"), WIDTH, WIDTH));
        plan.push((name("ffn_norm"), Kind::Vector(WIDTH)));
        plan.push(matrix(name("ffn_gate"), FF, WIDTH));
        plan.push(matrix(name("ffn_up"), FF, WIDTH));
        plan.push(matrix(name("ffn_down"), WIDTH, FF));
    }
    plan.push(("output_norm.weight".into(), Kind::Vector(WIDTH)));
    let mut writer = Writer::create(path, &metadata, &plan).unwrap();
    for (_, kind) in &plan {
        // As an f16 scale 0x1c1c is about 0.004.
        writer.append(&vec![0x1c; kind.bytes()]).unwrap();
    }
    writer.finish().unwrap();
}

/// Private dirty bytes of this process, all mappings together.
fn dirty() -> usize {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Private_Dirty:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Bytes of this process for which large pages are wanted: KV blocks from the start, buffers once a prompt comes.
fn asked_for_large_pages() -> usize {
    let mut bytes = 0;
    let mut size = 0;
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Size:") => size = words.next().unwrap().parse::<usize>().unwrap() * 1024,
            Some("VmFlags:") if words.any(|flag| flag == "hg") => bytes += size,
            _ => {}
        }
    }
    bytes
}

#[test]
fn a_run_makes_less_than_a_twentieth_of_the_file_dirty() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("memory.nybl");
    write_model(&path);
    let file = std::fs::metadata(&path).unwrap().len() as usize;
    // Pages of a program that was linked a moment ago count as dirty until they are on disk.
    File::open(std::env::current_exe().unwrap()).unwrap().sync_all().unwrap();
    let before = dirty();
    let model = Model::open_path(support::runtime(2, None), &path).unwrap();
    let mut session = Session::new(Arc::clone(&model), &SessionConfig::default()).unwrap();
    let prompt: Vec<u32> = (0..200).collect();
    session.append(&prompt[..8]).unwrap();
    let for_few = asked_for_large_pages();
    session.append(&prompt[8..]).unwrap();
    let for_many = asked_for_large_pages();
    if for_few > 0 {
        assert!(for_many >= for_few + (2 << 20), "{for_few} bytes, then {for_many}");
    } else {
        eprintln!(
            "not tested: large pages of buffers, since this system says of none that they are wanted"
        );
    }
    for _ in 0..20 {
        assert!(matches!(session.next().unwrap(), Next::Token(_)));
    }
    let (kv, scratch) = session.bytes();
    let all = dirty().saturating_sub(before);
    let extra = all.saturating_sub(kv + scratch);
    let (owned, mapped) = model.weight_bytes();
    eprintln!(
        "file {file} bytes, {mapped} of weights mapped; {all} dirty, of which {kv} for KV and {scratch} for buffers are accounted"
    );
    assert_eq!(owned, 0);
    assert!(extra * 20 < file, "{extra} bytes are dirty for a file of {file}");
    std::fs::remove_file(&path).unwrap();
    #[cfg(feature = "text")]
    tokenizers_take_about_what_a_plan_says();
}

/// Called by the one test, because it looks at the whole process, too.
#[cfg(feature = "text")]
fn tokenizers_take_about_what_a_plan_says() {
    use nybl::engine::plan::tokenizer_bytes;
    use nybl::file::checkpoint::Checkpoint;
    use nybl::text::vocabulary;
    let mut described = Vec::new();
    for name in ["gpt2", "qwen2.5", "smollm2"] {
        let path = support::shared(&format!("tokenizers/{name}/tokenizer.json"));
        if let Ok(json) = std::fs::read_to_string(&path) {
            let mut metadata = Metadata::new(name);
            metadata.set("tokenizer.huggingface.json", Value::Text(json));
            described.push((name, metadata));
        }
    }
    for name in ["gpt-2", "llama-spm", "phi-3"] {
        let path = support::shared(&format!("tokenizers/ggml-vocab-{name}.gguf"));
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            described.push((name, checkpoint.metadata));
        }
    }
    let mut far = Vec::new();
    for (name, metadata) in described {
        let planned = tokenizer_bytes(&metadata);
        let before = LIVE.load(Ordering::Relaxed);
        let tokenizer = vocabulary::tokenizer(&metadata, usize::MAX).unwrap().unwrap();
        let taken = LIVE.load(Ordering::Relaxed) - before;
        eprintln!("{name}: {} tokens, {taken} bytes, {planned} planned", tokenizer.vocab_size());
        if planned > 2 * taken || taken > 3 * planned / 2 {
            far.push((name, taken, planned));
        }
    }
    assert!(far.is_empty(), "{far:?}");
}
