//! Builds the C++ programs with every compiler there is, against the shared and the static library, and runs them.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

mod programs;
use programs::{libraries, model, root, run};

const COMPILERS: [&str; 2] = ["g++", "clang++-19"];

fn compilers() -> impl Iterator<Item = &'static str> {
    COMPILERS.into_iter().filter(|compiler| {
        let found = Command::new(compiler).arg("--version").output().is_ok();
        assert!(found || std::env::var_os("CI").is_none(), "{compiler} is missing");
        if !found {
            eprintln!("skipped: {compiler} is not installed");
        }
        found
    })
}

fn build(compiler: &str, program: &str, flags: &[&str]) -> PathBuf {
    let name = format!("{program}-{compiler}-{}", flags.join(""));
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut command = Command::new(compiler);
    command.args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-I"]);
    command.arg(root().join("include")).arg(root().join(format!("ffi-tests/cpp/{program}.cpp")));
    command.args(flags).arg("-o").arg(&out);
    if flags.contains(&"-lnybl") {
        let folder = libraries();
        command.arg(format!("-L{0}", folder.display()));
        command.arg(format!("-Wl,-rpath,{0}", folder.display()));
    } else {
        command.arg(libraries().join("libnybl.a")).args(["-lm", "-lpthread", "-ldl"]);
    }
    run(&mut command);
    out
}

#[test]
fn the_wrapper_keeps_its_promises() {
    for compiler in compilers() {
        for flags in [&["-lnybl"][..], &[]] {
            let out = run(Command::new(build(compiler, "suite", flags)).arg(model()));
            assert_eq!(out, "all as documented\n", "{compiler} {flags:?}");
        }
    }
}

#[test]
fn the_wrapper_is_clean_under_sanitizers() {
    for compiler in compilers() {
        let flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
        let program = build(compiler, "suite", &flags);
        let symbols = run(Command::new("nm").arg(&program));
        assert!(symbols.contains("__asan_init"), "the sanitizer is not in the program");
        run(Command::new(program).arg(model()));
    }
}

#[test]
fn the_wrapper_compiles_alone_and_without_exceptions() {
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("alone_hpp.cpp");
    std::fs::write(&source, "#include \"nybl.hpp\"\n#include \"nybl.hpp\"\n").unwrap();
    for compiler in compilers() {
        for flags in [["-std=c++17", "-fexceptions"], ["-std=c++20", "-fno-exceptions"]] {
            run(Command::new(compiler)
                .args(flags)
                .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I"])
                .arg(root().join("include"))
                .arg(&source));
        }
    }
}

#[test]
fn chat_answers_every_line() {
    for compiler in compilers() {
        let program = build(compiler, "chat", &[]);
        let mut chat = Command::new(program)
            .arg(model())
            .arg("12")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        chat.stdin.take().unwrap().write_all(b"Once upon a time\nThe sea was\n").unwrap();
        let output = chat.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        let answers: Vec<_> = text.split("> ").filter(|answer| answer.trim().len() > 10).collect();
        assert_eq!(answers.len(), 2, "{text}");
    }
}
