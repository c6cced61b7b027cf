//! Whatever way a sequence came into the cache, its logits are the same bits.

#[path = "support/mod.rs"]
mod support;

use nybl::Error;
use nybl::engine::cache::KvLimit;
use nybl::engine::convert::{Recipe, convert};
use nybl::engine::load::Model;
use nybl::engine::score::score_in;
use nybl::engine::session::Next;
use nybl::engine::session::{Session, SessionConfig};
use nybl::file::metadata::{Metadata, Value};
use nybl::file::nybl::{Kind, Writer};
use nybl::kernel::{Format, KvFormat, Layout};
use nybl::kv::sight::Streaming;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use support::injected::Injected;
use support::{data, loss, open, runtime, shared};

/// A text that crosses two KV blocks.
fn tokens() -> Vec<u32> {
    let text = std::fs::read_to_string(data("ids256.json")).unwrap();
    let ids: Vec<u32> = serde_json::from_str(&text).unwrap();
    ids[..150].to_vec()
}

fn session(model: &Arc<Model>) -> Session {
    Session::new(Arc::clone(model), &SessionConfig::default()).unwrap()
}

fn bits(session: &mut Session) -> Vec<u32> {
    session.logits().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// The logits after `tokens` in a session whose model has seen nothing else.
fn plain(model: &Arc<Model>, tokens: &[u32]) -> Vec<u32> {
    let mut session = session(&open(Path::new(model.file())));
    session.append(tokens).unwrap();
    bits(&mut session)
}

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn a_truncated_sequence_goes_on_as_if_it_had_never_been_longer() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let want = plain(&model, &text[..140]);
    for len in [0, 1, 63, 64, 65, 100, 128, 139, 140] {
        let mut session = session(&model);
        session.append(&text[..100]).unwrap();
        session.append(&[7; 40]).unwrap();
        session.truncate(len.min(100));
        session.append(&text[len.min(100)..140]).unwrap();
        assert!(bits(&mut session) == want, "truncated to {len}");
    }
}

#[test]
fn a_cached_prefix_gives_the_bits_of_a_computed_one() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let mut session = session(&model);
    session.append(&text).unwrap();
    for len in [63, 64, 65, 128, 129, 150] {
        session.reset();
        session.append(&text[..len]).unwrap();
        assert!(bits(&mut session) == plain(&model, &text[..len]), "{len} tokens");
    }
    session.reset();
    let other = [&text[..70], &[5; 20]].concat();
    session.append(&other).unwrap();
    assert!(bits(&mut session) == plain(&model, &other));
}

#[test]
fn forks_go_their_own_ways() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let mut trunk = session(&model);
    trunk.append(&text[..70]).unwrap();
    let alone = trunk.bytes().0;
    let mut forks: Vec<_> = (0..3).map(|_| trunk.fork().unwrap()).collect();
    assert_eq!(trunk.bytes().0, alone);
    for (i, fork) in forks.iter_mut().enumerate() {
        let own = vec![10 + i as u32; 30];
        fork.append(&own).unwrap();
        assert!(bits(fork) == plain(&model, &[&text[..70], &own].concat()), "fork {i}");
    }
    trunk.append(&text[70..]).unwrap();
    assert!(bits(&mut trunk) == plain(&model, &text));
    // Every fork has room for a whole context of its own.
    drop(trunk);
    for fork in &mut forks {
        let left = fork.context() - fork.tokens().len();
        fork.append(&vec![3; left]).unwrap();
    }
}

#[test]
fn a_restored_session_goes_on_where_the_saved_one_was() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let path = temporary("cache-restored");
    let mut first = session(&model);
    first.append(&text[..100]).unwrap();
    first.save(&path).unwrap();
    // Another runtime with another file handle, as in another process.
    let mut second = session(&open(&data("nursery.F16.gguf")));
    second.append(&[1, 2, 3]).unwrap();
    second.restore(&path).unwrap();
    assert_eq!(second.tokens(), &text[..100]);
    assert!(bits(&mut second) == bits(&mut first));
    second.append(&text[100..]).unwrap();
    assert!(bits(&mut second) == plain(&model, &text));
}

#[test]
fn halves_take_half_the_memory_and_obey_the_same_rules() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let config = SessionConfig { kv_format: KvFormat::F16, ..SessionConfig::default() };
    let half = || Session::new(Arc::clone(&model), &config).unwrap();
    let (mut full, mut first) = (session(&model), half());
    full.append(&text).unwrap();
    first.append(&text).unwrap();
    assert_eq!(2 * first.bytes().0, full.bytes().0);
    let want = bits(&mut first);
    let far = first.logits().unwrap().iter().zip(full.logits().unwrap());
    let far = far.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far > 0.0 && far < 0.02, "{far}");

    let (mut fork, path) = (first.fork().unwrap(), temporary("cache-half"));
    first.save(&path).unwrap();
    fork.truncate(90);
    fork.append(&text[90..]).unwrap();
    let mut restored = half();
    restored.restore(&path).unwrap();
    assert!(bits(&mut fork) == want && bits(&mut restored) == want);
    assert!(full.restore(&path).is_err());
}

#[test]
fn a_snapshot_that_cannot_be_used_changes_nothing() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let path = temporary("cache-foreign");
    let mut first = session(&model);
    first.append(&text[..100]).unwrap();
    first.save(&path).unwrap();

    let packed = temporary("cache-q8.nybl");
    let recipe = Recipe::Bytes { group: 64 };
    convert(&runtime(1, None), &data("nursery.F16.gguf"), &packed, &recipe.into(), |_, _| {})
        .unwrap();
    let other = open(&packed);
    let mut second = session(&other);
    second.append(&text[..5]).unwrap();
    let error = second.restore(&path).unwrap_err();
    assert!(matches!(&error, Error::Unsupported(text) if text.contains("made by")), "{error}");

    let config = SessionConfig { context: 64, ..SessionConfig::default() };
    let mut small = Session::new(Arc::clone(&model), &config).unwrap();
    small.append(&text[..5]).unwrap();
    assert!(matches!(small.restore(&path), Err(Error::ContextFull { limit: 64 })));

    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(matches!(session(&model).restore(&path), Err(Error::Corrupt { .. })));
    assert!(bits(&mut second) == plain(&other, &text[..5]));
    assert!(bits(&mut small) == plain(&model, &text[..5]));
}

#[test]
fn a_session_finds_what_another_one_has_computed() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let mut first = session(&model);
    first.append(&text).unwrap();
    let alone = first.bytes().0;
    let mut second = session(&model);
    second.append(&[&text[..140], &[9; 5]].concat()).unwrap();
    // Two blocks are shared; the third is its own.
    assert_eq!(second.bytes().0, alone / 3 * 4);
    assert!(bits(&mut second) == plain(&model, &[&text[..140], &[9; 5]].concat()));
    // Also when the session that computed it is gone.
    drop((first, second));
    let mut third = session(&model);
    third.append(&text).unwrap();
    assert_eq!(third.bytes().0, alone);
    assert!(bits(&mut third) == plain(&model, &text));
    drop(third);
    assert!(model.trim() > 0);
    assert_eq!(session(&model).bytes().0, 0);
}

#[test]
fn every_format_obeys_the_same_rules() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    for kv_format in KvFormat::ALL {
        let config = SessionConfig { kv_format, ..SessionConfig::default() };
        let fresh = || Session::new(open(&data("nursery.F16.gguf")), &config).unwrap();
        let want = {
            let mut session = fresh();
            session.append(&text).unwrap();
            bits(&mut session)
        };
        // Token by token, over a fork, a rollback and a file.
        let mut steps = Session::new(Arc::clone(&model), &config).unwrap();
        text[..100].iter().for_each(|token| steps.append(&[*token]).unwrap());
        let mut fork = steps.fork().unwrap();
        steps.append(&[7; 30]).unwrap();
        steps.truncate(90);
        steps.append(&text[90..]).unwrap();
        assert!(bits(&mut steps) == want, "{kv_format:?}");
        let path = temporary(&format!("cache-{}", kv_format.name()));
        fork.save(&path).unwrap();
        let mut restored = fresh();
        restored.restore(&path).unwrap();
        restored.append(&text[100..]).unwrap();
        fork.append(&text[100..]).unwrap();
        assert!(bits(&mut restored) == want && bits(&mut fork) == want, "{kv_format:?}");
    }
}

#[test]
fn idle_sessions_wait_in_a_file_when_memory_is_short() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let block = 64 * model.config().kv_shape().token_bytes(KvFormat::F32);
    let limit = KvLimit {
        memory: 4 * block,
        spill_folder: Some(env!("CARGO_TARGET_TMPDIR").into()),
        spill: 20 << 20,
    };
    let config = SessionConfig { kv_limit: Some(limit), ..SessionConfig::default() };
    let texts: Vec<Vec<u32>> = (0..3).map(|i| [&[i + 20], &text[..]].concat()).collect();
    let mut sessions: Vec<_> =
        texts.iter().map(|_| Session::new(Arc::clone(&model), &config).unwrap()).collect();
    for (session, text) in sessions.iter_mut().zip(&texts) {
        session.append(&text[..130]).unwrap();
        assert!(session.bytes().0 <= 4 * block);
    }
    for (session, text) in sessions.iter_mut().zip(&texts) {
        session.append(&text[130..]).unwrap();
        assert!(session.bytes().0 <= 4 * block);
        assert!(bits(session) == plain(&model, text));
    }
    // More than memory for one alone: nothing has changed.
    let before = sessions[0].tokens().len();
    let error = sessions[0].append(&[3; 105]).and_then(|()| sessions[0].append(&[3; 10]));
    assert!(matches!(error, Ok(()) | Err(Error::ContextFull { .. } | Error::KvExhausted { .. })));
    sessions[0].truncate(before);
    assert!(bits(&mut sessions[0]) == plain(&model, &texts[0]));
}

/// A sequence that goes on for several contexts, against one computed from the definition: the tokens
/// that are still seen, at the places they have in the cache. Layers above the first see further back
/// than the window, so the definition is exact for a model of one layer.
#[test]
fn an_endless_sequence_looks_at_sinks_and_window_alone() {
    let path = temporary("streaming.nybl");
    write_model(
        &path,
        Shape { layers: 1, width: 128, heads: 4, kv_heads: 2, ff: 256, vocab: 512, context: 256 },
    );
    let model = open(&path);
    let streaming = Streaming { sinks: 4, window: 100 };
    let config =
        SessionConfig { context: 5000, streaming: Some(streaming), ..SessionConfig::default() };
    let mut endless = Session::new(Arc::clone(&model), &config).unwrap();
    let text: Vec<u32> = (0..2000_u32).map(|i| i * i % 509).collect();
    let mut most = 0;
    for (end, chunk) in [30, 104, 105, 300, 1000, 1999].into_iter().zip([30, 74, 1, 195, 700, 999])
    {
        endless.append(&text[end - chunk..end]).unwrap();
        most = most.max(endless.bytes().0);
        let seen = match end.checked_sub(104) {
            None | Some(0) => text[..end].to_vec(),
            Some(_) => [&text[..4], &text[end - 100..end]].concat(),
        };
        // Rotations by other angles with the same differences: equal up to rounding.
        let mut plain = session(&open(&path));
        plain.append(&seen).unwrap();
        let far = endless.logits().unwrap().iter().zip(plain.logits().unwrap());
        let far = far.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let top = plain.logits().unwrap().iter().fold(0.0_f32, |top, x| top.max(x.abs()));
        assert!(far < 1e-3 * top, "{far} of {top} at {end}");
    }
    // A block of sinks, and window and chunk, which begin and end anywhere in theirs.
    let token = model.config().kv_shape().token_bytes(KvFormat::F32);
    assert!(most <= 8 * 64 * token, "{most} bytes");
    // Whatever the chunks, also past the window, and over a file.
    let want = bits(&mut endless);
    let config = SessionConfig { prefill_chunk: 33, ..config };
    let mut again = Session::new(open(&path), &config).unwrap();
    again.append(&text[..1500]).unwrap();
    let file = temporary("streaming-saved");
    again.save(&file).unwrap();
    let mut restored = Session::new(open(&path), &config).unwrap();
    restored.restore(&file).unwrap();
    for session in [&mut again, &mut restored] {
        session.append(&text[1500..1999]).unwrap();
        assert!(bits(session) == want);
    }
    // Back behind the window: computed again from the sinks on.
    again.truncate(1200);
    again.append(&text[1200..1999]).unwrap();
    assert!(bits(&mut again) == want);
    assert!(session(&model).restore(&file).is_err(), "a plain session took windowed keys");
    assert!(matches!(endless.next().unwrap(), Next::Token(_) | Next::End(_)));
}

struct Shape {
    layers: usize,
    width: usize,
    heads: usize,
    kv_heads: usize,
    ff: usize,
    vocab: usize,
    context: usize,
}

/// A model of random codes, all with one scale.
fn write_model(path: &Path, shape: Shape) {
    let Shape { layers, width, heads, kv_heads, ff, vocab, context } = shape;
    let mut metadata = Metadata::new("random");
    metadata.set("general.architecture", Value::Text("llama".into()));
    for (key, value) in [
        ("context_length", context),
        ("embedding_length", width),
        ("block_count", layers),
        ("feed_forward_length", ff),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
    ] {
        metadata.set(&format!("llama.{key}"), Value::Unsigned(value as u64));
    }
    metadata.set("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5));
    let matrix = |name: String, n: usize, k: usize| {
        (name, Kind::Matrix(Layout::new(Format::Q4, 32, n, k).unwrap()))
    };
    let kv = width / heads * kv_heads;
    let mut plan = vec![matrix("token_embd.weight".into(), vocab, width)];
    for layer in 0..layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        plan.push((name("attn_norm"), Kind::Vector(width)));
        plan.push(matrix(name("attn_q"), width, width));
        plan.push(matrix(name("attn_k"), kv, width));
        plan.push(matrix(name("attn_v"), kv, width));
        plan.push(matrix(name("attn_output"), width, width));
        plan.push((name("ffn_norm"), Kind::Vector(width)));
        plan.push(matrix(name("ffn_gate"), ff, width));
        plan.push(matrix(name("ffn_up"), ff, width));
        plan.push(matrix(name("ffn_down"), width, ff));
    }
    plan.push(("output_norm.weight".into(), Kind::Vector(width)));
    let mut writer = Writer::create(path, &metadata, &plan).unwrap();
    let mut random = 1_u64;
    for (_, kind) in &plan {
        let mut bytes = vec![0; kind.bytes()];
        match kind {
            Kind::Vector(_) => {
                bytes.chunks_exact_mut(4).for_each(|x| x.copy_from_slice(&1_f32.to_le_bytes()))
            }
            // Groups of 32 columns: 512 bytes of codes and 32 scales of about 1/128.
            _ => bytes.chunks_exact_mut(576).for_each(|group| {
                for code in &mut group[..512] {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    *code = (random >> 33) as u8;
                }
                group[512..]
                    .chunks_exact_mut(2)
                    .for_each(|scale| scale.copy_from_slice(&[0, 0x20]));
            }),
        }
        writer.append(&bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// One layer of TinyLlama's shape over its 2048 tokens sixteen times. Minutes without optimisation, so only
/// on request: `cargo test --release --test cache -- --ignored --exact a_window_of_32k_tokens`.
#[test]
#[ignore = "long: run it in release mode"]
fn a_window_of_32k_tokens() {
    const LENGTH: usize = 32_768;
    let path = temporary("long.nybl");
    write_model(
        &path,
        Shape {
            layers: 1,
            width: 2048,
            heads: 32,
            kv_heads: 4,
            ff: 5632,
            vocab: 2048,
            context: LENGTH,
        },
    );
    let text: Vec<u32> = (0..LENGTH as u32).map(|i| i.wrapping_mul(2_654_435_761) >> 21).collect();
    for kv_format in KvFormat::ALL {
        let config = SessionConfig { kv_format, ..SessionConfig::default() };
        let mut session = Session::new(open(&path), &config).unwrap();
        let start = std::time::Instant::now();
        session.append(&text[..1000]).unwrap();
        let little = session.bytes().0;
        session.append(&text[1000..LENGTH - 200]).unwrap();
        let much = session.bytes().0;
        eprintln!(
            "{kv_format:?}: {little} bytes for 1000 tokens, {much} for {}, {:.0} s",
            LENGTH - 200,
            start.elapsed().as_secs_f64()
        );
        // Only what is used, by blocks of 64, the last one half empty on average.
        let token = session.model().config().kv_shape().token_bytes(kv_format);
        let sinks = if kv_format == KvFormat::I4 { 64 * token * 3 } else { 0 };
        assert!(little <= 1024 * token + sinks && much <= (LENGTH - 128) * token + sinks);
        let file = temporary("long-saved");
        session.save(&file).unwrap();
        let mut fork = session.fork().unwrap();
        session.append(&text[LENGTH - 200..]).unwrap();
        fork.append(&[5; 150]).unwrap();
        fork.truncate(LENGTH - 250);
        fork.append(&text[LENGTH - 250..]).unwrap();
        let want = bits(&mut session);
        assert!(bits(&mut fork) == want, "{kv_format:?}");
        let mut restored = Session::new(open(&path), &config).unwrap();
        restored.restore(&file).unwrap();
        restored.append(&text[LENGTH - 200..]).unwrap();
        assert!(bits(&mut restored) == want, "{kv_format:?}");
        std::fs::remove_file(&file).unwrap();
    }
    std::fs::remove_file(&path).unwrap();
}

/// Perplexity of a text in windows of the model's context.
fn perplexity(model: &Model, format: KvFormat, windows: &[Vec<u32>]) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for window in windows {
        score_in(model, format, window, 64, |index, logits| {
            if let Some(next) = window.get(index + 1) {
                sum += loss(logits, *next);
                count += 1;
            }
        })
        .unwrap();
    }
    (sum / f64::from(count)).exp()
}

#[test]
fn integers_cost_little_perplexity_on_real_models() {
    // Attention of stories260K is sharp, and what a token loses or gains by rounding is three times what it is elsewhere:
    // fewer tokens say little of the mean.
    let cases = [
        (data("nursery.F16.gguf"), "nursery_val.txt", 20_000),
        (shared("models/nursery-draft/nursery-draft.F16.gguf"), "nursery_val.txt", 20_000),
        (
            shared("models/stories260K/stories260K.F16.gguf"),
            "tinystories_slice_decoded.txt",
            120_000,
        ),
        (
            shared("models/babyllama105/babyllama105.F16.gguf"),
            "tinystories_slice_decoded.txt",
            20_000,
        ),
    ];
    let mut far = Vec::new();
    for (file, text, enough) in cases {
        let text = shared(&format!("text/{text}"));
        if !file.exists() || !text.exists() {
            eprintln!("skipped: {} on {} is not here", file.display(), text.display());
            continue;
        }
        let model = open(&file);
        let text = std::fs::read_to_string(text).unwrap();
        // Stories from their beginnings, as the models were trained.
        let (mut windows, mut tokens) = (Vec::new(), 0);
        for story in text
            .split("<|endoftext|>")
            .flat_map(|part| part.split("<|end|>"))
            .map(str::trim)
            .filter(|s| !s.is_empty())
        {
            let mut ids = model.tokenizer().unwrap().encode(story, true, false).unwrap();
            ids.truncate(model.config().context);
            tokens += ids.len();
            windows.push(ids);
            if tokens > enough {
                break;
            }
        }
        let [f32, f16, i8, i4] = KvFormat::ALL.map(|format| perplexity(&model, format, &windows));
        eprintln!(
            "{}: f32 {f32:.5} f16 {f16:.5} i8 {i8:.5} ({:+.3}%) i4 {i4:.5} ({:+.3}%), {tokens} tokens",
            file.file_name().unwrap().display(),
            100.0 * (i8 / f16 - 1.0),
            100.0 * (i4 / f16 - 1.0)
        );
        far.extend(((i8 / f16 - 1.0).abs() >= 0.001).then_some((file.clone(), "i8", i8 / f16)));
        far.extend(((i4 / f16 - 1.0).abs() >= 0.01).then_some((file, "i4", i4 / f16)));
    }
    assert!(far.is_empty(), "{far:?}");
}

/// The child of the test below, which kills it.
#[test]
#[ignore = "runs until it is killed"]
fn saves_until_it_is_killed() {
    let Some(path) = std::env::var_os("NYBL_SAVE_TO") else { return };
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let mut sessions = [session(&model), session(&model)];
    sessions[0].append(&text).unwrap();
    sessions[1].append(&text[1..100]).unwrap();
    println!("saving");
    loop {
        for session in &mut sessions {
            session.save(Path::new(&path)).unwrap();
        }
    }
}

#[cfg(unix)]
#[test]
fn a_kill_during_a_save_leaves_a_whole_file() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let folder = temporary("cache-killed");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    let (path, text) = (folder.join("cache"), tokens());
    let model = open(&data("nursery.F16.gguf"));
    session(&model).save(&path).unwrap_err();
    let mut first = session(&model);
    first.append(&text[..50]).unwrap();
    first.save(&path).unwrap();
    let mut kills = Injected::of("a save of two sessions is killed");
    for round in 0..12_u64 {
        kills.another();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "saves_until_it_is_killed", "--ignored", "--nocapture"])
            .env("NYBL_SAVE_TO", &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("saving")));
        std::thread::sleep(std::time::Duration::from_micros(700 * (round * round + 1)));
        // SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();
        let mut restored = session(&model);
        restored.restore(&path).unwrap();
        let found = restored.tokens();
        assert!(found == &text[..] || found == &text[1..100] || found == &text[..50], "{round}");
        kills.survived();
    }
    kills.told();
    std::fs::remove_dir_all(&folder).unwrap();
}
