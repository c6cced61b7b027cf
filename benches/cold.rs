//! What a person waits for who opens an app: the first token from a file that nobody has read since the machine
//! started, from one that is warm, with the layers read ahead in order and with a bare mapping whose pages come
//! when they are touched. And how long a cancellation takes in the middle of a long prompt.
//!
//! `cargo bench --bench cold` on a model of TinyLlama's shape with weights that are all alike (1.1 billion of four
//! bits), which is written beside the build; `-- --model FILE` for another one, `-- --test` on one of
//! a hundredth of that. Every start is a process of its own, and the file's pages are dropped before it by
//! `posix_fadvise`; how many stayed is printed.

#[cfg(target_os = "linux")]
mod linux {
    use nybl::engine::load::Model;
    use nybl::engine::runtime::{Runtime, RuntimeConfig};
    use nybl::engine::session::{Next, Session, SessionConfig};
    use nybl::file::checkpoint::Checkpoint;
    use nybl::file::metadata::{Metadata, Value};
    use nybl::file::nybl::{Kind, Writer};
    use nybl::kernel::{Format, Layout};
    use nybl::text::sample::SamplerConfig;
    use nybl::text::vocabulary;
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    const ROUNDS: usize = 5;
    const PROMPT: usize = 16;
    /// A prompt that takes long, and how often it is cancelled.
    const LONG: usize = 4000;
    const CANCELLATIONS: usize = 12;

    struct Shape {
        layers: usize,
        width: usize,
        kv_width: usize,
        ff: usize,
        heads: usize,
    }

    const TINY_LLAMA: Shape = Shape { layers: 22, width: 2048, kv_width: 256, ff: 5632, heads: 32 };
    const SMALL: Shape = Shape { layers: 4, width: 512, kv_width: 128, ff: 1408, heads: 8 };
    const VOCAB: usize = 32_000;

    /// A model of this shape; with a real tokenizer of 32,000 tokens where one lies beside the project.
    fn write_model(path: &Path, shape: &Shape) {
        let mut metadata = Metadata::new("cold");
        metadata.set("general.architecture", Value::Text("llama".into()));
        for (key, value) in [
            ("context_length", 4096),
            ("embedding_length", shape.width),
            ("block_count", shape.layers),
            ("feed_forward_length", shape.ff),
            ("attention.head_count", shape.heads),
            ("attention.head_count_kv", shape.heads * shape.kv_width / shape.width),
        ] {
            metadata.set(&format!("llama.{key}"), Value::Unsigned(value as u64));
        }
        metadata.set("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5));
        let vocabulary = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../shared/tokenizers/ggml-vocab-llama-spm.gguf");
        match Checkpoint::open(&vocabulary) {
            Ok(checkpoint) => {
                let tokenizer = vocabulary::tokenizer(&checkpoint.metadata, VOCAB).unwrap();
                vocabulary::store(&tokenizer.unwrap(), &mut metadata).unwrap();
            }
            Err(error) => println!("without a tokenizer: {error}"),
        }
        let matrix = |name: String, n: usize, k: usize| {
            (name, Kind::Matrix(Layout::new(Format::Q4, 32, n, k).unwrap()))
        };
        let Shape { layers, width, kv_width, ff, .. } = *shape;
        let mut plan = vec![matrix("token_embd.weight".into(), VOCAB, width)];
        for layer in 0..layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            plan.push((name("attn_norm"), Kind::Vector(width)));
            plan.push(matrix(name("attn_q"), width, width));
            plan.push(matrix(name("attn_k"), kv_width, width));
            plan.push(matrix(name("attn_v"), kv_width, width));
            plan.push(matrix(name("attn_output"), width, width));
            plan.push((name("ffn_norm"), Kind::Vector(width)));
            plan.push(matrix(name("ffn_gate"), ff, width));
            plan.push(matrix(name("ffn_up"), ff, width));
            plan.push(matrix(name("ffn_down"), width, ff));
        }
        plan.push(("output_norm.weight".into(), Kind::Vector(width)));
        plan.push(matrix("output.weight".into(), VOCAB, width));
        let mut writer = Writer::create(path, &metadata, &plan).unwrap();
        for (_, kind) in &plan {
            // As an f16 scale 0x1c1c is about 0.004.
            writer.append(&vec![0x1c; kind.bytes()]).unwrap();
        }
        writer.finish().unwrap();
    }

    /// Drops the pages of a file from the system's cache; the share that stayed.
    fn drop_pages(path: &Path) -> f64 {
        let file = File::open(path).unwrap();
        file.sync_all().unwrap();
        // SAFETY: the descriptor is open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        // SAFETY: nobody truncates the file meanwhile.
        let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        let mut pages = vec![0_u8; map.len().div_ceil(4096)];
        let start = map.as_ptr().cast_mut().cast();
        // SAFETY: the mapping is that long, and there is a byte for each of its pages.
        let asked = unsafe { libc::mincore(start, map.len(), pages.as_mut_ptr()) };
        assert_eq!(asked, 0);
        pages.iter().filter(|page| **page & 1 == 1).count() as f64 / pages.len() as f64
    }

    fn of_process(file: &str, key: &str) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/self/{file}")).unwrap();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    }

    fn open(path: &Path) -> Arc<Model> {
        let runtime = Arc::new(Runtime::new(&RuntimeConfig::default()).unwrap());
        Model::open_path(runtime, path).unwrap()
    }

    fn session(model: &Arc<Model>) -> Session {
        let sampler = SamplerConfig::greedy();
        let config = SessionConfig { sampler, ..SessionConfig::default() };
        Session::new(Arc::clone(model), &config).unwrap()
    }

    /// One start, in a process of its own: prints its figures.
    fn start(path: &Path, ahead: bool) {
        let begin = Instant::now();
        let model = open(path);
        let opened = begin.elapsed();
        if ahead {
            model.prefetch(None).unwrap();
        }
        let mut session = session(&model);
        let prompt: Vec<u32> = (0..PROMPT as u32).collect();
        session.append(&prompt).unwrap();
        assert!(matches!(session.next().unwrap(), Next::Token(_)));
        let first = begin.elapsed();
        if let Some(warming) = model.warming() {
            assert!(warming.wait(model.config().n_layers, None));
        }
        let all = begin.elapsed();
        println!(
            "{} {} {} {} {}",
            opened.as_secs_f64() * 1e3,
            first.as_secs_f64() * 1e3,
            all.as_secs_f64() * 1e3,
            of_process("status", "VmHWM:"),
            of_process("smaps_rollup", "Private_Dirty:"),
        );
    }

    fn started(path: &Path, how: &str) -> Vec<f64> {
        let program = std::env::current_exe().unwrap();
        let output = Command::new(program).arg("--start").arg(how).arg(path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        text.split_whitespace().map(|figure| figure.parse().unwrap()).collect()
    }

    fn median(mut values: Vec<f64>) -> f64 {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }

    fn starts(path: &Path, rounds: usize) {
        const WAYS: [(&str, bool, &str); 4] = [
            ("cold, layers read ahead", true, "ahead"),
            ("cold, bare mapping", true, "bare"),
            ("warm, layers read ahead", false, "ahead"),
            ("warm, bare mapping", false, "bare"),
        ];
        let mut figures = vec![Vec::new(); WAYS.len()];
        let mut stayed = 0.0_f64;
        for _ in 0..rounds {
            // One after the other in every round, so that they see the same disk and the same neighbours.
            for (found, (_, cold, how)) in figures.iter_mut().zip(WAYS) {
                if cold {
                    stayed = stayed.max(drop_pages(path));
                }
                found.push(started(path, how));
            }
        }
        println!(
            "medians of {rounds}; at most {:.1}% of the file's pages were there at a cold start",
            stayed * 100.0
        );
        println!(
            "{:<26}{:>12}{:>14}{:>13}{:>12}{:>10}",
            "", "tokenizer", "first token", "all layers", "peak RSS", "dirty"
        );
        for ((name, ..), found) in WAYS.iter().zip(&figures) {
            let of = |index: usize| median(found.iter().map(|figures| figures[index]).collect());
            println!(
                "{name:<26}{:>9.1} ms{:>11.1} ms{:>10.1} ms{:>9.1} MB{:>7.1} MB",
                of(0),
                of(1),
                of(2),
                of(3),
                of(4)
            );
        }
    }

    /// Cancels prompts at moments spread over `span`; from the call to the end of the append.
    fn cancellations(path: &Path, prompt: usize, span: Duration) {
        let model = open(path);
        model.prefetch(None).unwrap();
        assert!(model.warming().unwrap().wait(model.config().n_layers, None));
        let mut session = session(&model);
        let ids: Vec<u32> = (0..prompt as u32).collect();
        let mut times = Vec::new();
        for try_ in 0..CANCELLATIONS {
            model.trim();
            session.reset();
            let canceller = session.canceller();
            let delay = span * (2 * try_ as u32 + 1) / (2 * CANCELLATIONS as u32);
            let cancelled = std::thread::scope(|scope| {
                let host = scope.spawn(move || {
                    std::thread::sleep(delay);
                    let now = Instant::now();
                    canceller.cancel();
                    now
                });
                let outcome = session.append(&ids);
                let ended = Instant::now();
                let called = host.join().unwrap();
                outcome.is_err().then(|| ended.saturating_duration_since(called))
            });
            times.extend(cancelled.map(|time| time.as_secs_f64() * 1e3));
        }
        let worst = times.iter().copied().fold(0.0, f64::max);
        println!(
            "cancelled {} of {CANCELLATIONS} prompts of {prompt} tokens: median {:.1} ms, longest {worst:.1} ms",
            times.len(),
            median(times),
        );
    }

    pub(crate) fn main() {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let at = |name: &str| arguments.iter().position(|argument| argument == name);
        if let Some(index) = at("--start") {
            return start(Path::new(&arguments[index + 2]), arguments[index + 1] == "ahead");
        }
        let test = at("--test").is_some();
        let (path, written) = match at("--model") {
            Some(index) => (PathBuf::from(&arguments[index + 1]), false),
            None => {
                let name = if test { "cold_test.nybl" } else { "cold.nybl" };
                let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
                write_model(&path, if test { &SMALL } else { &TINY_LLAMA });
                (path, true)
            }
        };
        println!("{}: {} bytes", path.display(), std::fs::metadata(&path).unwrap().len());
        starts(&path, if test { 1 } else { ROUNDS });
        if test {
            cancellations(&path, 500, Duration::from_millis(100));
        } else {
            cancellations(&path, LONG, Duration::from_secs(4));
        }
        if written {
            std::fs::remove_file(&path).unwrap();
        }
    }
}

fn main() {
    #[cfg(target_os = "linux")]
    linux::main();
    #[cfg(not(target_os = "linux"))]
    println!("left out: pages are dropped and counted as Linux does it");
}
