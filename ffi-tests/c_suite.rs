//! Builds the C programs against the shared and the static library and runs them.

use std::path::{Path, PathBuf};
use std::process::Command;

#[allow(dead_code, reason = "here all are survived at once")]
#[path = "support/injected.rs"]
mod injected;
mod programs;
use injected::Injected;
use programs::{libraries, model, root, run};

/// What a program needs beside libnybl.a: the README's link line.
const STATIC_LIBRARIES: [&str; 3] = ["-lm", "-lpthread", "-ldl"];

/// How a C program is linked.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Link {
    Shared,
    Static,
    /// The static library, the program under address and undefined-behaviour sanitizers.
    Sanitized,
}

fn build(program: &str, link: Link) -> PathBuf {
    let name = format!("{program}-{link:?}");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut command = Command::new("cc");
    command
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-I"])
        .arg(root().join("include"))
        .arg(root().join(format!("ffi-tests/c/{program}.c")))
        .arg("-o")
        .arg(&out);
    if link == Link::Sanitized {
        command.args(["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
    }
    if link == Link::Shared {
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

#[test]
fn c_prints_the_same_story_as_the_command_line() {
    let prompt = "Once upon a time";
    let want = run(Command::new(env!("CARGO_BIN_EXE_nybl"))
        .args(["run", "-p", prompt, "--temp", "0", "-n", "60", "-m"])
        .arg(model()));
    assert!(want.len() > 100, "a story, not {want:?}");
    for link in [Link::Shared, Link::Static] {
        let got = run(Command::new(build("generate", link)).arg(model()).args([prompt, "60"]));
        assert_eq!(got, want, "{link:?}");
    }
}

#[test]
fn misuse_is_answered_with_a_status() {
    for link in [Link::Shared, Link::Static] {
        let out = run(Command::new(build("misuse", link)).arg(model()));
        assert_eq!(out, "all as documented\n");
    }
}

#[test]
fn sessions_speculate_and_their_tokens_stay() {
    for link in [Link::Shared, Link::Static] {
        let out = run(Command::new(build("speculate", link)).arg(model()));
        assert_eq!(out, "all as documented\n");
    }
}

#[test]
fn sessions_go_together_and_their_tokens_stay() {
    for link in [Link::Shared, Link::Static] {
        let out = run(Command::new(build("batch", link)).arg(model()));
        assert_eq!(out, "all as documented\n");
    }
}

/// Callbacks that stop, re-enter and destroy; two threads at one session and one model.
#[test]
fn callbacks_and_threads_get_what_the_header_says() {
    for link in [Link::Shared, Link::Static] {
        let out = run(Command::new(build("callbacks", link)).arg(model()));
        assert_eq!(out, "all as documented\n");
    }
}

/// Sources, reading ahead, heat, power and cancelling.
#[test]
fn the_engine_serves_a_host_on_a_phone() {
    for link in [Link::Shared, Link::Static] {
        let out = run(Command::new(build("engine", link)).arg(model()));
        assert_eq!(out, "all as documented\n");
    }
}

/// Plans, choices, ends of texts, forks, files, figures, messages and memory that is wanted back.
#[test]
fn a_host_asks_sets_and_is_told() {
    for link in [Link::Shared, Link::Static] {
        let out = run(Command::new(build("host", link)).arg(model()).arg(folder()));
        assert_eq!(out, "all as documented\n");
    }
}

/// Refuses the first, the second, the third ... buffer, until a run needs no more than are granted.
#[test]
fn every_refused_allocation_is_a_status_and_nothing_leaks() {
    let file = root().join("ffi-tests/data/nursery.F16.gguf");
    let mut faults = Injected::of("an allocation is refused");
    for link in [Link::Shared, Link::Static] {
        let out = run(Command::new(build("allocation", link)).arg(model()).arg(&file));
        assert!(out.ends_with("every refusal was a status\n"), "{out}");
        let counts = out.lines().filter_map(|line| line.split_once(" requests refused"));
        counts.for_each(|(count, _)| faults.more(count.parse().unwrap()));
        faults.all_survived();
    }
    faults.told();
}

/// A host runtime that uses the kernels and nothing else.
#[test]
fn the_kernels_alone() {
    for link in [Link::Shared, Link::Static] {
        let out = run(&mut Command::new(build("kernels", link)));
        assert_eq!(out, "all as documented\n");
    }
}

/// Nothing is read or written outside its bounds across the interface, and nothing leaks.
#[test]
fn c_programs_are_clean_under_sanitizers() {
    let programs = [
        ("misuse", &[][..]),
        ("callbacks", &[]),
        ("engine", &[]),
        ("host", &["target/tmp"]),
        ("allocation", &["ffi-tests/data/nursery.F16.gguf"]),
        ("kernels", &[]),
        ("foreign_verify", &[]),
        ("foreign_kv", &[]),
        ("speculate", &[]),
        ("batch", &[]),
        ("generate", &["Once upon a time", "20"]),
    ];
    for (program, arguments) in programs {
        let program = build(program, Link::Sanitized);
        let symbols = run(Command::new("nm").arg(&program));
        assert!(symbols.contains("__asan_init"), "the sanitizer is not in the program");
        // A folder for what some of them write, and for the others the model.
        let first = if program.ends_with("foreign_kv-Sanitized") { folder() } else { model() };
        run(Command::new(program).current_dir(root()).arg(first).args(arguments));
    }
}

#[test]
fn a_foreign_runtime_verifies_its_own_drafts() {
    for link in [Link::Shared, Link::Static] {
        let out = run(&mut Command::new(build("foreign_verify", link)));
        assert!(out.ends_with("the same distribution\n"), "{out}");
    }
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

#[test]
fn a_foreign_runtime_keeps_its_keys_and_values() {
    for link in [Link::Shared, Link::Static] {
        let out = run(Command::new(build("foreign_kv", link)).arg(folder()));
        assert_eq!(out, "all as documented\n");
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
