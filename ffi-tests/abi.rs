//! What the interface promises to programs that are already built: layouts, the table of functions, and
//! copies that do not meet.

use std::fmt::Write as _;
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;

mod programs;
use programs::{libraries, model, root, run};

struct Layout {
    name: &'static str,
    size: usize,
    align: usize,
    /// Name, offset and size.
    fields: Vec<(&'static str, usize, usize)>,
}

fn size_through<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! layouts {
    ($($name:ident: $($field:ident)*,)*) => {
        fn layouts() -> Vec<Layout> {
            use nybl::ffi::*;
            vec![$(Layout {
                name: stringify!($name),
                size: size_of::<$name>(),
                align: align_of::<$name>(),
                fields: vec![$((
                    stringify!($field),
                    offset_of!($name, $field),
                    size_through(|x: &$name| &x.$field),
                )),*],
            }),*]
        }
    };
}
include!("structs.in");

/// A program that compiles only where C agrees with Rust about every struct.
fn assertions() -> String {
    let mut out = String::from("#include \"nybl.h\"\n\n");
    out += "#ifdef __cplusplus\n#define HOLDS(name, what) static_assert(what, #name)\n#else\n";
    out += "#define HOLDS(name, what) typedef char name[(what) ? 1 : -1]\n";
    out += "#endif\n";
    for Layout { name, size, align, fields } in layouts() {
        let _ = writeln!(out, "struct {name}_aligned {{ char c; {name} x; }};");
        let _ = writeln!(out, "HOLDS({name}_has_size, sizeof({name}) == {size});");
        let _ = writeln!(
            out,
            "HOLDS({name}_has_align, offsetof(struct {name}_aligned, x) == {align});"
        );
        for (field, offset, size) in fields {
            let _ =
                writeln!(out, "HOLDS({name}_{field}_lies, offsetof({name}, {field}) == {offset});");
            let _ = writeln!(
                out,
                "HOLDS({name}_{field}_has, sizeof((({name} *)0)->{field}) == {size});"
            );
        }
    }
    for (name, value) in
        [("MAJOR", nybl::ffi::NYBL_ABI_MAJOR), ("MINOR", nybl::ffi::NYBL_ABI_MINOR)]
    {
        let _ = writeln!(out, "HOLDS(abi_{name}, NYBL_ABI_{name} == {value});");
    }
    out
}

fn holds(compiler: &str, flags: &[&str], source: &Path) {
    let include = root().join("include");
    run(Command::new(compiler)
        .args(flags)
        .args(["-fsyntax-only", "-Wall", "-Werror", "-I"])
        .arg(include)
        .arg(source));
}

fn write(name: &str, text: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn is_installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    assert!(found || std::env::var_os("CI").is_none(), "{program} is missing");
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

#[test]
fn c_and_rust_agree_about_every_struct() {
    let source = assertions();
    assert!(layouts().len() >= 10 && source.contains("nybl_event_text_len_lies"));
    holds("cc", &["-std=c99", "-pedantic"], &write("layout.c", &source));
    // A wrong number must not compile.
    let wrong = source.replacen(
        "_lies, offsetof(nybl_event, kind) == 4",
        "_lies, offsetof(nybl_event, kind) == 5",
        1,
    );
    assert_ne!(wrong, source);
    let path = write("layout_wrong.c", &wrong);
    let compiled = Command::new("cc")
        .arg("-fsyntax-only")
        .arg("-I")
        .arg(root().join("include"))
        .arg(path)
        .output();
    assert!(!compiled.unwrap().status.success(), "the assertions assert nothing");
}

#[test]
fn cpp_and_rust_agree_about_every_struct() {
    if is_installed("c++") {
        holds("c++", &["-std=c++17", "-Wno-invalid-offsetof"], &write("layout.cpp", &assertions()));
    }
}

/// What Swift sees.
#[test]
fn the_module_map_and_rust_agree_about_every_struct() {
    if is_installed("clang-19") {
        let map =
            format!("-fmodule-map-file={}", root().join("include/module.modulemap").display());
        let cache = format!(
            "-fmodules-cache-path={}",
            Path::new(env!("CARGO_TARGET_TMPDIR")).join("modules").display()
        );
        let source = format!("#pragma clang module import CNybl\n{}", assertions());
        holds(
            "clang-19",
            &["-std=c99", "-fmodules", &map, &cache, "-Rmodule-import"],
            &write("layout_module.c", &source),
        );
    }
}

#[test]
fn arm_and_rust_agree_about_every_struct() {
    if is_installed("aarch64-linux-gnu-gcc") {
        holds("aarch64-linux-gnu-gcc", &["-std=c99"], &write("layout_arm.c", &assertions()));
    }
}

fn build(out: &str, arguments: &[&std::ffi::OsStr]) -> PathBuf {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(out);
    let mut command = Command::new("cc");
    command.args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-I"]);
    command.arg(root().join("include")).args(arguments).arg("-o").arg(&out);
    run(&mut command);
    out
}

/// A host that knows no symbol but one generates through the table.
#[test]
fn the_table_serves_a_host_that_opens_the_library_at_run_time() {
    let source = root().join("ffi-tests/c/table.c");
    let program = build(
        "table",
        &[source.as_os_str(), "-D_POSIX_C_SOURCE=200809L".as_ref(), "-ldl".as_ref()],
    );
    let symbols = run(Command::new("nm").arg(&program));
    assert!(!symbols.contains("nybl_"), "the program is linked to the library");
    let out = run(Command::new(program).arg(libraries().join("libnybl.so")).arg(model()));
    assert!(out.contains("Once upon a time") && out.len() > 60, "{out}");
}

/// Two static copies in one program, each with its own prefix, share nothing.
#[test]
fn two_copies_live_in_one_program() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let mut objects = Vec::new();
    for prefix in ["one_", "two_"] {
        let library = folder.join(format!("lib{prefix}nybl.a"));
        let script = root().join("scripts/prefix.sh");
        run(Command::new(script).arg(libraries().join("libnybl.a")).arg(prefix).arg(&library));
        let symbols = run(Command::new("nm").args(["-g", "--defined-only"]).arg(&library));
        let global: Vec<_> =
            symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
        assert!(global.len() >= 30, "{global:?}");
        assert!(
            global.iter().all(|name| name.starts_with(&format!("{prefix}nybl_"))),
            "{global:?}"
        );
        let object = folder.join(format!("{prefix}copy.o"));
        run(Command::new("cc")
            .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-c", "-I"])
            .arg(root().join("include"))
            .arg(format!("-DNYBL_SYMBOL_PREFIX={prefix}"))
            .arg(format!("-DRUN={prefix}run"))
            .arg(root().join("ffi-tests/c/copy.c"))
            .arg("-o")
            .arg(&object));
        objects.extend([object, library]);
    }
    let main = root().join("ffi-tests/c/two_copies.c");
    let mut arguments = vec![main.as_os_str()];
    arguments.extend(objects.iter().map(|path| path.as_os_str()));
    arguments.extend(["-lm", "-lpthread", "-ldl"].map(std::ffi::OsStr::new));
    let out = run(Command::new(build("two_copies", &arguments)).arg(model()));
    assert_eq!(out, "two copies, the same story\n");
}
