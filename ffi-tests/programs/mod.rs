//! What the tests share that build foreign programs against the libraries of this build and run them.
#![allow(dead_code, reason = "each program uses a part of it")]

use std::path::PathBuf;
use std::process::Command;

pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command and returns its standard output.
pub(crate) fn run(command: &mut Command) -> String {
    // Cargo names the folder above, where an older library may lie, and that beats a program's rpath.
    command.env("LD_LIBRARY_PATH", libraries());
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}

/// The folder with libnybl.a and libnybl.so, which were built with this test.
pub(crate) fn libraries() -> PathBuf {
    // They lie beside this program, in <target>/<profile>/deps.
    let program = std::env::current_exe().unwrap();
    program.parent().unwrap().to_path_buf()
}

pub(crate) fn model() -> PathBuf {
    root().join("models/nursery.nybl")
}
