//! The committed headers are what the sources say, and compile alone as C99 and as C++17.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// What cbindgen makes of these files of `src`.
fn generated(config: &str, sources: &[&str]) -> String {
    let config = cbindgen::Config::from_file(root().join(config)).unwrap();
    let builder = cbindgen::Builder::new().with_config(config);
    let builder = sources
        .iter()
        .fold(builder, |builder, file| builder.with_src(root().join(format!("src/{file}.rs"))));
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    let text = String::from_utf8(text).unwrap();
    // Chapters on safety are for Rust callers; C has its own words in each comment.
    let mut lines: Vec<&str> = Vec::new();
    let mut skipping = false;
    for line in text.lines() {
        skipping = line.trim_start().starts_with("* # Safety")
            || (skipping && !line.trim_start().starts_with("*/"));
        if !skipping {
            if line.trim_start().starts_with("*/") && lines.last().is_some_and(|l| l.trim() == "*")
            {
                lines.pop();
            }
            lines.push(line);
        }
    }
    lines.join("\n") + "\n"
}

/// Compares a committed header with `want`, or writes it when `BLESS` is set.
fn is_fresh(header: &str, want: &str) {
    let path = root().join(header);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, want).unwrap();
    }
    let have = std::fs::read_to_string(&path).unwrap();
    assert_eq!(have, want, "run `BLESS=1 cargo test --test header` and commit {header}");
}

#[test]
fn the_header_is_fresh() {
    // The order of the header's chapters. Listed as files, because reading the whole crate would
    // put the functions we import into our own header.
    let chapters = [
        "ffi/status",
        "ffi/kernels",
        "ffi/kv",
        "ffi/spec",
        "ffi/runtime",
        "ffi/model",
        "ffi/session",
    ];
    is_fresh("include/nybl.h", &generated("include/cbindgen.toml", &chapters));
}

#[test]
fn the_header_of_the_c_kernels_is_fresh() {
    is_fresh("kernels/kernel_abi.h", &generated("kernels/cbindgen.toml", &["kernel/abi"]));
}

fn compiles(compiler: &str, flags: &[&str], extension: &str) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = folder.join(format!("alone.{extension}"));
    let headers = ["nybl.h", "kernel_abi.h"].map(|name| format!("#include \"{name}\"\n").repeat(2));
    std::fs::write(&source, headers.concat()).unwrap();
    let output = Command::new(compiler)
        .args(flags)
        .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"])
        .args(["-I".as_ref(), root().join("include").as_os_str()])
        .args(["-I".as_ref(), root().join("kernels").as_os_str()])
        .arg(&source)
        .output()
        .unwrap_or_else(|error| panic!("{compiler}: {error}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_header_compiles_alone_as_c99() {
    compiles("cc", &["-std=c99"], "c");
}

#[test]
fn the_header_compiles_alone_as_cpp17() {
    if Command::new("c++").arg("--version").output().is_err() && std::env::var_os("CI").is_none() {
        eprintln!("skipped: no C++ compiler is installed");
        return;
    }
    compiles("c++", &["-std=c++17"], "cpp");
}
