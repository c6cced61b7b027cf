//! Hugging Face folders against GGUF files of the same models.

#[path = "support/mod.rs"]
mod support;

use nybl::engine::convert::{Options, convert};
use nybl::engine::load::Model;
use nybl::engine::session::{Session, SessionConfig};
use nybl::file::checkpoint::Checkpoint;
use nybl::file::huggingface;
use nybl::file::source::Source;
use nybl::memory::Aligned;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::{runtime, shared};

#[test]
fn a_folder_is_the_same_model_as_its_gguf_file() {
    for name in ["nursery", "nursery-draft"] {
        let (folder, file) =
            (shared(&format!("models/{name}")), shared(&format!("models/{name}/{name}.F32.gguf")));
        if !file.exists() {
            eprintln!("skipped: no {}", file.display());
            continue;
        }
        let (a, b) = (Checkpoint::open(&folder).unwrap(), Checkpoint::open(&file).unwrap());
        assert!(a.tensors.keys().eq(b.tensors.keys()));
        for (name, tensor) in &a.tensors {
            let other = &b.tensors[name];
            if tensor.is_vector() {
                assert_eq!(tensor.vector().unwrap(), other.vector().unwrap(), "{name}");
                continue;
            }
            assert_eq!((tensor.n(), tensor.k()), (other.n(), other.k()), "{name}");
            let (mut x, mut y) = (Vec::new(), Vec::new());
            tensor.rows(0, tensor.n(), &mut x).unwrap();
            other.rows(0, other.n(), &mut y).unwrap();
            assert!(x == y, "{name}");
        }
        let logits = |path| {
            let model = Model::open_path(runtime(1, None), path).unwrap();
            let mut session = Session::new(Arc::clone(&model), &SessionConfig::default()).unwrap();
            session.append(&[0, 5, 17, 300]).unwrap();
            let id = session.next().unwrap();
            (format!("{id:?}"), model.tokenizer().unwrap().encode("the sea", false, false).unwrap())
        };
        assert_eq!(logits(&folder), logits(&file));
    }
}

/// A folder of one layer whose matrices are GPTQ with columns in no order (`act_order`), or the floats that
/// those stand for.
fn write_folder(name: &str, gptq: bool, act_order: bool) -> PathBuf {
    const WIDTH: usize = 128;
    const FF: usize = 256;
    const GROUP: usize = 32;
    let mut state = 7_u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let mut parts: Vec<(String, &str, Vec<usize>, Vec<u8>)> = Vec::new();
    let floats = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let words = |x: &[u32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    for (module, n, k) in [
        ("self_attn.q_proj", WIDTH, WIDTH),
        ("self_attn.k_proj", WIDTH, WIDTH),
        ("self_attn.v_proj", WIDTH, WIDTH),
        ("self_attn.o_proj", WIDTH, WIDTH),
        ("mlp.gate_proj", FF, WIDTH),
        ("mlp.up_proj", FF, WIDTH),
        ("mlp.down_proj", WIDTH, FF),
    ] {
        let codes: Vec<usize> = (0..n * k).map(|_| random(16)).collect();
        let groups = k / GROUP;
        let zeros: Vec<usize> = (0..n * groups).map(|_| 6 + random(5)).collect();
        let scales: Vec<f32> = (0..n * groups).map(|_| (1 + random(7)) as f32 / 512.0).collect();
        let mut g_idx: Vec<u32> = (0..k).map(|column| (column / GROUP) as u32).collect();
        for i in (1..k).rev().filter(|_| act_order) {
            g_idx.swap(i, random(i + 1));
        }
        let module = format!("model.layers.0.{module}");
        if !gptq {
            let weight: Vec<f32> = (0..n * k)
                .map(|i| {
                    let g = i / k * groups + g_idx[i % k] as usize;
                    scales[g] * (codes[i] as f32 - zeros[g] as f32)
                })
                .collect();
            parts.push((format!("{module}.weight"), "F32", vec![n, k], floats(&weight)));
            continue;
        }
        let mut qweight = vec![0_u32; k / 8 * n];
        for (i, code) in codes.iter().enumerate() {
            let (row, column) = (i / k, i % k);
            qweight[column / 8 * n + row] |= (*code as u32) << (column % 8 * 4);
        }
        let mut qzeros = vec![0_u32; groups * n / 8];
        let mut turned = vec![0.0; n * groups];
        for (i, zero) in zeros.iter().enumerate() {
            let (row, group) = (i / groups, i % groups);
            qzeros[group * (n / 8) + row / 8] |= (*zero as u32 - 1) << (row % 8 * 4);
            turned[group * n + row] = scales[i];
        }
        parts.push((format!("{module}.qweight"), "I32", vec![k / 8, n], words(&qweight)));
        parts.push((format!("{module}.qzeros"), "I32", vec![groups, n / 8], words(&qzeros)));
        parts.push((format!("{module}.scales"), "F32", vec![groups, n], floats(&turned)));
        parts.push((format!("{module}.g_idx"), "I32", vec![k], words(&g_idx)));
    }
    for (tensor, shape) in [
        ("model.embed_tokens", vec![64, WIDTH]),
        ("model.norm", vec![WIDTH]),
        ("model.layers.0.input_layernorm", vec![WIDTH]),
        ("model.layers.0.post_attention_layernorm", vec![WIDTH]),
    ] {
        let count = shape.iter().product();
        let x: Vec<f32> = (0..count).map(|_| random(1000) as f32 / 1000.0 - 0.2).collect();
        parts.push((format!("{tensor}.weight"), "F32", shape, floats(&x)));
    }
    let (mut header, mut data) = (String::new(), Vec::new());
    for (name, kind, shape, bytes) in parts {
        let offsets = [data.len(), data.len() + bytes.len()];
        let comma = if data.is_empty() { '{' } else { ',' };
        write!(
            header,
            r#"{comma}"{name}":{{"dtype":"{kind}","shape":{shape:?},"data_offsets":{offsets:?}}}"#
        )
        .unwrap();
        data.extend(bytes);
    }
    header.push('}');
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
    let scheme = r#","quantization_config":{"quant_method":"gptq","bits":4,"group_size":32}"#;
    let config = format!(
        r#"{{"model_type":"llama","hidden_size":{WIDTH},"intermediate_size":{FF},"num_hidden_layers":1,
        "num_attention_heads":4,"num_key_value_heads":4,"max_position_embeddings":64,"rms_norm_eps":1e-5,
        "tie_word_embeddings":true{}}}"#,
        if gptq { scheme } else { "" }
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
    folder
}

fn logits(path: &Path) -> Vec<f32> {
    let model = Model::open_path(runtime(2, None), path).unwrap();
    let mut session = Session::new(Arc::clone(&model), &SessionConfig::default()).unwrap();
    let tokens = [3, 50, 17, 9, 33, 1];
    session.append(&tokens[..5]).unwrap();
    session.logits().unwrap().to_vec()
}

#[test]
fn an_act_order_model_is_the_model_of_its_floats() {
    let sorted = logits(&write_folder("gptq", true, false));
    for act_order in [false, true] {
        let quantised = write_folder(&format!("gptq-{act_order}"), true, act_order);
        let want = logits(&write_folder(&format!("floats-{act_order}"), false, act_order));
        let got = logits(&quantised);
        let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>();
        let error = squares(&mut got.iter().zip(&want).map(|(a, b)| a - b));
        let relative = (error / squares(&mut want.iter().copied())).sqrt();
        // Activations are rounded to bytes; columns in a wrong order would be off by about 1.
        assert!(relative < 0.03, "act-order {act_order}: {relative}");
        assert_eq!(act_order, got != sorted);

        let packed = quantised.with_extension("nybl");
        let report =
            convert(&runtime(2, None), &quantised, &packed, &Options::default(), |_, _| {})
                .unwrap();
        assert!(report.lines.values().all(|line| line.deviation.is_exact()), "{report:?}");
        assert_eq!(logits(&packed), got, "packed, act-order {act_order}");
        let file = nybl::file::nybl::Nybl::open(Source::open(&packed).unwrap()).unwrap();
        // The order of ffn_down became that of the rows of ffn_gate and ffn_up.
        let orders = file.tensors().iter().filter(|tensor| tensor.name.ends_with(".order"));
        assert_eq!(orders.count(), if act_order { 6 } else { 0 });
    }
}

/// Reads all that a converter would, from a folder in memory.
fn read_all(config: &[u8], weights: &[u8]) -> Result<(), nybl::Error> {
    let file = |name: &str, bytes: &[u8]| (name.to_owned(), Source::from_vec(name, bytes.to_vec()));
    let files = [file("config.json", config), file("model.safetensors", weights)];
    let checkpoint = huggingface::from_files("folder", &files.into())?;
    for tensor in checkpoint.tensors.values().filter(|tensor| !tensor.is_vector()) {
        let layout = tensor.layout()?;
        let mut panel = Aligned::<u8>::zeroed("test", layout.panel_bytes())?;
        tensor.pack(&layout, 0, &mut panel)?;
    }
    Ok(())
}

#[test]
fn any_byte_of_a_folder_may_be_wrong() {
    let folder = write_folder("flipped", true, true);
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let weights = std::fs::read(folder.join("model.safetensors")).unwrap();
    read_all(&config, &weights).unwrap();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let mut refused = 0;
    for flip in [0x01, 0x08, 0x80] {
        for at in 0..config.len() {
            let mut config = config.clone();
            config[at] ^= flip;
            refused += usize::from(read_all(&config, &weights).is_err());
        }
        // Every fifth byte of the header, then a sample of scales, zero points and orders.
        for at in (0..header).step_by(5).chain((header..weights.len()).step_by(997)) {
            let mut weights = weights.clone();
            weights[at] ^= flip;
            refused += usize::from(read_all(&config, &weights).is_err());
        }
    }
    for end in (0..weights.len()).step_by(1009) {
        assert!(read_all(&config, &weights[..end]).is_err(), "cut at {end}");
    }
    assert!(refused > 500, "{refused} of the damaged folders are refused");
}
