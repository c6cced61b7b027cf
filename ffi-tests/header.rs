//! The committed header is what the sources say, and compiles alone as C99 and as C++17.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn generated() -> String {
    let config = cbindgen::Config::from_file(root().join("include/cbindgen.toml")).unwrap();
    // The order of the header's chapters. Listed as files, because reading the whole crate would
    // put the functions we import into our own header.
    let builder = ["status", "kernels", "spec", "runtime", "model", "session"]
        .iter()
        .fold(cbindgen::Builder::new().with_config(config), |builder, file| {
            builder.with_src(root().join(format!("src/ffi/{file}.rs")))
        });
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

#[test]
fn the_header_is_fresh() {
    let path = root().join("include/nybl.h");
    let want = generated();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &want).unwrap();
    }
    let have = std::fs::read_to_string(&path).unwrap();
    assert_eq!(have, want, "run `BLESS=1 cargo test --test header` and commit include/nybl.h");
}

fn compiles(compiler: &str, flags: &[&str], extension: &str) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = folder.join(format!("alone.{extension}"));
    std::fs::write(&source, "#include \"nybl.h\"\n#include \"nybl.h\"\n").unwrap();
    let output = Command::new(compiler)
        .args(flags)
        .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I"])
        .arg(root().join("include"))
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
