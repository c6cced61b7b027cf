//! A conversion that is killed at any moment goes on where it stopped, and shards are one model.

#[path = "support/mod.rs"]
mod support;

use nybl::engine::convert::{Options, Recipe, convert};
use nybl::engine::load::Model;
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::file::nybl::Nybl;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::injected::Injected;
use support::{data, runtime};

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// A folder with a model of `layers` layers, about 13 MB of floats each.
fn write_source(folder: &Path, layers: usize) {
    const WIDTH: usize = 512;
    const FF: usize = 1408;
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![64, WIDTH]),
        ("model.norm.weight".into(), vec![WIDTH]),
    ];
    for layer in 0..layers {
        for (name, n, k) in [
            ("self_attn.q_proj", WIDTH, WIDTH),
            ("self_attn.k_proj", WIDTH, WIDTH),
            ("self_attn.v_proj", WIDTH, WIDTH),
            ("self_attn.o_proj", WIDTH, WIDTH),
            ("mlp.gate_proj", FF, WIDTH),
            ("mlp.up_proj", FF, WIDTH),
            ("mlp.down_proj", WIDTH, FF),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), vec![n, k]));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), vec![WIDTH]));
        }
    }
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut state = 1_u32;
    for (name, shape) in shapes {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            data.extend((((state >> 16) as f32 - 32768.0) / 500_000.0).to_le_bytes());
        }
        let offsets = [start, data.len()];
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
        header.insert(name, entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": FF,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn a_killed_conversion_is_continued() {
    let work = folder("resume");
    let source = work.join("source");
    std::fs::create_dir_all(&source).unwrap();
    write_source(&source, 4);
    let command = |to: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nybl"));
        command.arg("convert").arg(&source).arg(to).args(["--bits", "4", "--threads", "1"]);
        command.args(["--shard-size", "4M"]).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let straight = work.join("straight.nybl");
    let started = Instant::now();
    assert!(command(&straight).output().unwrap().status.success());
    let mut whole = started.elapsed();

    let killed = work.join("killed.nybl");
    let mut kills = Injected::of("a conversion is killed");
    let (mut state, mut found, mut later) = (12345_u64, 0, 0.0);
    for round in 0.. {
        assert!(round < 300, "no conversion finds a tensor again after {} kills", kills.count());
        let started = Instant::now();
        let mut child = command(&killed).spawn().unwrap();
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        // Later and later, so that the last one ends by itself.
        let share = 0.1 + (state >> 40) as f64 / f64::from(1 << 24) * 0.4 + later;
        later += 0.02;
        std::thread::sleep(Duration::from_secs_f64(whole.as_secs_f64() * share));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            child.wait().unwrap();
            kills.another();
            // Neither a torn tensor nor a damaged one may survive.
            let partial = work.join("killed-00001-of-00002.nybl.partial");
            if kills.count() == 2
                && let Ok(mut bytes) = std::fs::read(&partial)
            {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                std::fs::write(&partial, bytes).unwrap();
            }
            continue;
        }
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
        let line = text
            .lines()
            .find_map(|line| line.strip_suffix(" tensors were there from an earlier run"));
        found += line.map_or(0, |number| number.parse::<usize>().unwrap());
        if found > 0 {
            break;
        }
        // The machine is quicker than it was, and every kill came before the first tensor: once more, by the new time.
        (whole, later) = (started.elapsed(), 0.0);
        for shard in 1..=2 {
            std::fs::remove_file(work.join(format!("killed-0000{shard}-of-00002.nybl"))).unwrap();
        }
    }
    for shard in 1..=2 {
        // The number of the set is of the source's time, which is the same.
        let name = |stem: &str| work.join(format!("{stem}-0000{shard}-of-00002.nybl"));
        assert!(std::fs::read(name("killed")).unwrap() == std::fs::read(name("straight")).unwrap());
    }
    let left = std::fs::read_dir(&work).unwrap();
    let left = left.filter(|entry| {
        entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".partial")
    });
    assert_eq!(left.count(), 0);
    kills.all_survived();
    kills.told();
}

#[test]
fn shards_are_one_model() {
    let work = folder("shards");
    let ids = |path: &Path| {
        let model = Model::open_path(runtime(1, None), path).unwrap();
        let mut session = Session::new(Arc::clone(&model), &SessionConfig::default()).unwrap();
        let prompt = model.tokenizer().unwrap().encode("Once upon a time", true, false).unwrap();
        session.append(&prompt).unwrap();
        let mut ids = Vec::new();
        while ids.len() < 30
            && let Next::Token(id) = session.next().unwrap()
        {
            ids.push(id);
        }
        ids
    };
    let whole = work.join("whole.nybl");
    let from = data("nursery.F16.gguf");
    let recipe = Recipe::Bytes { group: 32 };
    convert(&runtime(1, None), &from, &whole, &recipe.into(), |_, _| {}).unwrap();
    let parts = work.join("parts.nybl");
    let options = Options { recipe, shard_bytes: Some(300_000) };
    let report = convert(&runtime(1, None), &from, &parts, &options, |_, _| {}).unwrap();
    let count = report.files.len();
    assert!(count > 2, "{count} shards");
    for file in &report.files {
        // Any of them opens all.
        assert_eq!(ids(file), ids(&whole));
        Nybl::open_path(file).unwrap().verify().unwrap();
    }
    let first = nybl::file::source::Source::open(&report.files[0]).unwrap();
    let error = Nybl::open(first).err().unwrap().to_string();
    assert!(error.contains("shard 1 of"), "{error}");

    // A shard of another conversion.
    let other = work.join("other.nybl");
    let options = Options { recipe: Recipe::Bytes { group: 64 }, shard_bytes: Some(300_000) };
    let others = convert(&runtime(1, None), &from, &other, &options, |_, _| {}).unwrap();
    if others.files.len() == count {
        std::fs::copy(&others.files[1], &report.files[1]).unwrap();
        let error = Nybl::open_path(&report.files[0]).err().unwrap().to_string();
        assert!(error.contains("two conversions"), "{error}");
    }
    std::fs::remove_file(&report.files[1]).unwrap();
    let error = Nybl::open_path(&report.files[0]).err().unwrap().to_string();
    assert!(error.contains("00002-of") && error.contains("missing"), "{error}");
}
