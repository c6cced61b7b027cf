//! Builds the C programs against the shared and the static library and runs them.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command and returns its standard output.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}

/// The folder with libnybl.a and libnybl.so, which were built with this test.
fn libraries() -> PathBuf {
    // They lie beside this program, in <target>/<profile>/deps.
    let program = std::env::current_exe().unwrap();
    program.parent().unwrap().to_path_buf()
}

/// What a program needs beside libnybl.a: the README's link line.
const STATIC_LIBRARIES: [&str; 3] = ["-lm", "-lpthread", "-ldl"];

fn build(program: &str, shared: bool) -> PathBuf {
    let kind = if shared { "shared" } else { "static" };
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{program}-{kind}"));
    let mut command = Command::new("cc");
    command
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-I"])
        .arg(root().join("include"))
        .arg(root().join(format!("ffi-tests/c/{program}.c")))
        .arg("-o")
        .arg(&out);
    if shared {
        let folder = libraries();
        let folder = folder.display();
        command.arg(format!("-L{folder}")).arg("-lnybl").arg(format!("-Wl,-rpath,{folder}"));
        // What foreign_verify computes with.
        command.arg("-lm");
    } else {
        command.arg(libraries().join("libnybl.a")).args(STATIC_LIBRARIES);
    }
    run(&mut command);
    out
}

fn model() -> PathBuf {
    root().join("models/nursery.nybl")
}

#[test]
fn c_prints_the_same_story_as_the_command_line() {
    let prompt = "Once upon a time";
    let want = run(Command::new(env!("CARGO_BIN_EXE_nybl"))
        .args(["run", "-p", prompt, "--temp", "0", "-n", "60", "-m"])
        .arg(model()));
    assert!(want.len() > 100, "a story, not {want:?}");
    for shared in [true, false] {
        let got = run(Command::new(build("generate", shared)).arg(model()).args([prompt, "60"]));
        assert_eq!(got, want, "shared: {shared}");
    }
}

#[test]
fn misuse_is_answered_with_a_status() {
    for shared in [true, false] {
        let out = run(Command::new(build("misuse", shared)).arg(model()));
        assert_eq!(out, "all as documented\n");
    }
}

#[test]
fn a_foreign_runtime_verifies_its_own_drafts() {
    for shared in [true, false] {
        let out = run(&mut Command::new(build("foreign_verify", shared)));
        assert!(out.ends_with("the same distribution\n"), "{out}");
    }
}

/// The functions that `include/nybl.map` lists.
fn listed() -> Vec<String> {
    let map = std::fs::read_to_string(root().join("include/nybl.map")).unwrap();
    let names = map.lines().map(|line| line.trim().trim_end_matches(';'));
    names.filter(|name| name.starts_with("nybl_")).map(String::from).collect()
}

#[test]
fn the_shared_library_exports_the_listed_functions_and_nothing_else() {
    let library = libraries().join("libnybl.so");
    let symbols = run(Command::new("nm").args(["-D", "--defined-only"]).arg(library));
    let mut exported: Vec<_> =
        symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    exported.sort_unstable();
    assert_eq!(exported, listed(), "include/nybl.map");
}

#[test]
fn the_header_declares_the_listed_functions() {
    let header = std::fs::read_to_string(root().join("include/nybl.h")).unwrap();
    for name in listed() {
        assert!(header.contains(&format!("{name}(")), "{name} is not in the header");
    }
}
