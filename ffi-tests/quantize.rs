//! Quantising a trained model: what the program writes, and GPTQ against its paper's formula.

#[path = "support/mod.rs"]
mod support;

use nybl::isa::Isa;
use nybl::kernel::{Format, Kernels};
use nybl::quant::dense::Machine;
use nybl::quant::gptq::Problem;
use nybl::quant::grid::{Grid, Levels, Row};
use nybl::quant::stats::{Inputs, Stats};
use nybl::threads::Pool;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::data;
use support::injected::Injected;

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn nybl(args: &[&str]) -> Result<serde_json::Value, String> {
    let output = Command::new(env!("CARGO_BIN_EXE_nybl")).args(args).output().unwrap();
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap_or_default()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Stories that the model tells, by seeds of their own for each text: the same ones on every machine.
fn texts(folder: &Path) -> [String; 2] {
    [("calibration.txt", 1..33), ("test.txt", 33..49)].map(|(name, seeds)| {
        let stories = seeds.map(|seed: u32| {
            let seed = seed.to_string();
            let told = ["run", "-m", "models/nursery.nybl", "-p", "Once upon a time", "--json"];
            let how = ["-n", "230", "--temp", "1", "--seed", &seed];
            let story = nybl(&[&told[..], &how].concat()).unwrap();
            story["text"].as_str().unwrap().to_owned()
        });
        let path = folder.join(name);
        std::fs::write(&path, stories.collect::<Vec<_>>().join("\n")).unwrap();
        path.to_str().unwrap().to_owned()
    })
}

#[test]
fn hessian_and_codes_are_those_of_the_papers_formula() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("ffi-tests/fixtures/gptq.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let (floats, _) = file.tensor(name).unwrap().data().as_chunks::<4>();
        floats.iter().map(|x| f32::from_le_bytes(*x)).collect()
    };
    let k = file.tensor("x").unwrap().shape()[1];
    let (kernels, pool) = (Kernels::new(Isa::detect()).unwrap(), Pool::new(2).unwrap());
    let machine = Machine { kernels: &kernels, pool: &pool };
    let mut stats = Stats::new(k).unwrap();
    // Unequal chunks, as sequences may be.
    for x in floats("x").chunks(77 * k) {
        stats.add(machine, Inputs { x, original: None, residual: None }).unwrap();
    }
    stats.finish();
    let hessian = floats("hessian");
    let largest = hessian.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    for (ours, theirs) in stats.hessian.iter().zip(&hessian) {
        assert!((ours - theirs).abs() <= 1e-6 * largest, "{ours} {theirs}");
    }
    let problem = Problem::new(&pool, stats.hessian).unwrap();
    let (w, columns, group) = (floats("w"), vec![1.0; k], 32);
    for (format, bits) in [(Format::Q3, 3), (Format::Q4, 4)] {
        let scales = floats(&format!("scales{bits}"));
        let middle = format.middle() as f32;
        let row = |scales: &[f32]| Row {
            codes: vec![0; k],
            scales: scales.to_vec(),
            zeros: vec![middle; scales.len()],
        };
        let mut rows: Vec<Row> = scales.chunks(k.div_ceil(group)).map(row).collect();
        let grid = Grid { levels: Levels::of(format).unwrap(), group, columns: &columns };
        problem.round(&pool, &grid, &w, &mut rows, 0);
        let theirs = file.tensor(&format!("codes{bits}")).unwrap();
        for (index, (row, theirs)) in rows.iter().zip(theirs.data().chunks(k)).enumerate() {
            let ours: Vec<u8> = row.codes.iter().map(|code| code.cast_unsigned()).collect();
            assert_eq!(ours, theirs, "{bits} bits, row {index}");
        }
    }
}

#[test]
fn better_methods_lose_less() {
    let folder = folder("quantize-methods");
    let [calibration, test] = texts(&folder);
    let float = data("nursery.F16.gguf");
    let float = float.to_str().unwrap();
    let loss = |args: &[&str]| {
        let out = folder.join("out.nybl");
        let out = out.to_str().unwrap();
        let fixed = ["quantize", float, out, "--calib", &calibration, "--json", "--context", "128"];
        let made = nybl(&[&fixed[..], args].concat()).unwrap();
        let measured =
            ["perplexity", out, &test, "--reference", float, "--json", "--context", "128"];
        let measured = nybl(&measured).unwrap();
        let number = |key: &str| measured[key].as_f64().unwrap();
        assert!(number("top1_agreement") > 0.5);
        (number("kl_divergence"), made["layer_bits_per_weight"].as_f64().unwrap())
    };
    let (rtn, bits) = loss(&["--bits", "3", "--group", "128", "--method", "rtn"]);
    // Panels of three bits are 128 rows high, keys and values only 64.
    assert!((3.1..3.4).contains(&bits), "{bits}");
    let (gptq, _) = loss(&["--bits", "3", "--group", "128", "--method", "gptq"]);
    let (awq, _) = loss(&["--bits", "3", "--group", "128", "--method", "awq"]);
    let (best, _) = loss(&["--bits", "3", "--group", "128", "--method", "best"]);
    println!("KL divergence: rtn {rtn:.5} awq {awq:.5} gptq {gptq:.5} best {best:.5}");
    assert!(best < gptq && gptq < rtn && awq < rtn && best < awq);
    let (asym, bits) = loss(&["--bits", "3", "--group", "128", "--asym"]);
    assert!(asym < gptq && bits < 3.6, "{asym} {bits}");
    let (mixed, bits) = loss(&["--mixed", "3.5", "--group", "128"]);
    assert!(mixed < best && (3.3..=3.5).contains(&bits), "{mixed} {bits}");
    // Four bits for embedding and head lose more, the layers stay as they are.
    let (small, layers) = loss(&["--bits", "3", "--group", "128", "--table-bits", "4"]);
    assert!(best < small && small < gptq && (3.1..3.4).contains(&layers), "{small} {layers}");
    // With eight bits for every matrix a rotation has nothing to do: it must not change the model.
    let (bytes, bits) = loss(&["--mixed", "8.2", "--group", "128", "--method", "rtn"]);
    let (rotated, _) = loss(&["--mixed", "8.2", "--group", "128", "--method", "rtn", "--rotate"]);
    assert!(bits > 8.0 && bytes < 0.003 && rotated < 0.003, "{bits} {bytes} {rotated}");
}

#[test]
fn the_same_bytes_from_every_machine_and_after_a_kill() {
    let folder = folder("quantize-same");
    // The shorter one: nothing is judged here but sameness.
    let [_, calibration] = texts(&folder);
    let float = data("nursery.F16.gguf");
    let command = |out: &Path, threads: &str, isa: Option<&str>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nybl"));
        command.arg("quantize").arg(&float).arg(out).args(["--calib", &calibration]);
        command.args(["--bits", "3", "--group", "32", "--context", "128", "--threads", threads]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        isa.map(|isa| command.env("NYBL_ISA", isa));
        command
    };
    let straight = folder.join("straight.nybl");
    let started = Instant::now();
    let output = command(&straight, "2", None).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let whole = started.elapsed();
    let want = std::fs::read(&straight).unwrap();

    let other = folder.join("other.nybl");
    assert!(command(&other, "1", Some("portable")).output().unwrap().status.success());
    assert!(want == std::fs::read(&other).unwrap(), "other bytes from another instruction set");

    let killed = folder.join("killed.nybl");
    let partial = folder.join("killed.nybl.partial");
    let mut kills = Injected::of("a quantization is killed");
    for share in [3, 5, 7, 9, 11].map(|tenths| whole * tenths / 10) {
        let mut child = command(&killed, "2", None).spawn().unwrap();
        std::thread::sleep(share.max(Duration::from_millis(50)));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            if partial.exists() {
                kills.another();
            }
        }
        child.wait().unwrap();
    }
    let output = command(&killed, "2", None).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (got, count) = (std::fs::read(&killed).unwrap(), kills.count());
    assert!(want == got, "other bytes after {count} kills");
    kills.all_survived();
    kills.told();
}

#[test]
fn what_cannot_be_quantised_is_said() {
    let folder = folder("quantize-refused");
    let [calibration, _] = texts(&folder);
    let float = data("nursery.F16.gguf");
    let float = float.to_str().unwrap();
    let out = folder.join("out.nybl");
    let out_name = out.to_str().unwrap();
    let short = folder.join("short.txt");
    std::fs::write(&short, "Too short.").unwrap();
    for (args, word) in [
        (vec![float, out_name], "calibration text"),
        (vec![float, out_name, "--calib", short.to_str().unwrap()], "do not fill"),
        (vec![float, out_name, "--calib", "/no/such/text"], "/no/such/text"),
        (vec![float, out_name, "--calib", &calibration, "--group", "48"], "32, 64 or 128"),
        (vec![float, out_name, "--calib", &calibration, "--mixed", "2.5"], "three bits take"),
        (vec![float, out_name, "--calib", &calibration, "--context", "300"], "trained for"),
    ] {
        let error = nybl(&[&["quantize"], &args[..]].concat()).unwrap_err();
        assert!(error.contains(word), "{args:?}: {error}");
        assert!(!out.exists(), "{args:?}");
    }
}
