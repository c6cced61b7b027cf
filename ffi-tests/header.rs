//! What follows from the sources in `src/ffi` is what they say: the header, the version script, the table of
//! functions and the list of structs; and so is the header of the C kernels. `BLESS=1` writes all of them anew.
//!
//! A new function or struct in a file of `src/ffi` needs no other edit, and a new file needs its `mod` line.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

/// A file of `src/ffi`, which is a chapter of the header.
struct Chapter {
    name: String,
    source: String,
    /// The feature that its `mod` line asks for.
    feature: String,
}

/// In the order of the `mod` lines in `src/ffi/mod.rs`.
fn chapters() -> Vec<Chapter> {
    let (mut chapters, mut feature) = (Vec::new(), "capi");
    let modules = read("src/ffi/mod.rs");
    for line in modules.lines() {
        if let Some(rest) = line.strip_prefix("#[cfg(feature = \"") {
            feature = rest.split('"').next().unwrap();
        } else if let Some(name) = line.strip_prefix("mod ").and_then(|l| l.strip_suffix(';')) {
            let source = read(&format!("src/ffi/{name}.rs"));
            let has_c =
                source.contains("#[unsafe(no_mangle)]") || source.contains("pub const NYBL_");
            if has_c {
                chapters.push(Chapter { name: name.into(), source, feature: feature.into() });
            }
            feature = "capi";
        }
    }
    assert!(chapters.len() >= 6, "src/ffi/mod.rs is not read any more");
    chapters
}

/// A function of a chapter: its name and its number of parameters.
fn functions(chapter: &Chapter) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for part in chapter.source.split("#[unsafe(no_mangle)]").skip(1) {
        let after = part.split_once("extern \"C\" fn ").unwrap().1;
        let (name, rest) = after.split_once('(').unwrap();
        let parameters = rest.split_once([')']).unwrap().0;
        // A parameter that is itself a function would end the search early: name its type instead.
        assert!(!parameters.contains('('), "{name}: give the type of the callback a name");
        found.push((name.to_owned(), parameters.matches(':').count()));
    }
    found
}

fn all_functions() -> Vec<(String, usize, String)> {
    let of = |chapter: &Chapter| {
        let feature = &chapter.feature;
        functions(chapter).into_iter().map(|(name, n)| (name, n, feature.clone())).collect()
    };
    chapters().iter().flat_map(|chapter| -> Vec<_> { of(chapter) }).collect()
}

/// The comment at the head of a file, as a chapter's heading in C.
fn heading(chapter: &Chapter) -> String {
    let lines = chapter.source.lines().map_while(|line| line.strip_prefix("//!"));
    let text: Vec<_> = lines.map(str::trim).collect();
    let mut out = String::from("/* ");
    out.push_str(&"-".repeat(97));
    for line in text {
        let line = line.replace(['[', ']'], "").replace("# ", "");
        let _ = write!(out, "\n{}", format!(" * {line}").trim_end());
    }
    out + "\n */\n"
}

/// A chapter's constants, types and functions.
fn declarations(chapter: &Chapter) -> String {
    let mut config = cbindgen::Config::from_file(root().join("include/cbindgen.toml")).unwrap();
    config.header = None;
    let text = generated(config, &[&format!("src/ffi/{}.rs", chapter.name)]);
    // Statuses in hexadecimal: their second byte is their class.
    let hexadecimal = |line: &str| match line.rsplit_once(' ') {
        Some((define, code)) if line.starts_with("#define NYBL_ERR_") => {
            format!("{define} {:#06x}\n", code.parse::<i32>().unwrap())
        }
        _ => format!("{line}\n"),
    };
    let text: String = text.lines().map(hexadecimal).collect();
    text.trim().to_owned() + "\n"
}

/// What cbindgen makes of some files. Files, because reading the whole crate would put the functions we import
/// into our own header.
fn generated(config: cbindgen::Config, sources: &[&str]) -> String {
    let builder = cbindgen::Builder::new().with_config(config);
    let builder = sources.iter().fold(builder, |b, source| b.with_src(root().join(source)));
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

fn header() -> String {
    let config = cbindgen::Config::from_file(root().join("include/cbindgen.toml")).unwrap();
    let mut out = config.header.unwrap().trim_start().to_owned();
    out += "\n\n#ifndef NYBL_H\n#define NYBL_H\n\n#include <stddef.h>\n#include <stdint.h>\n\n";
    out += "/* Defined before this header as, say, app_: the library was given that prefix by\n";
    out += " * scripts/prefix.sh, so that two copies can live in one program. */\n";
    out += "#ifdef NYBL_SYMBOL_PREFIX\n#define NYBL_JOIN_(prefix, name) prefix##name\n";
    out += "#define NYBL_JOIN(prefix, name) NYBL_JOIN_(prefix, name)\n";
    for (name, ..) in all_functions() {
        let _ = writeln!(out, "#define {name} NYBL_JOIN(NYBL_SYMBOL_PREFIX, {name})");
    }
    out += "#endif\n\n#ifdef __cplusplus\nextern \"C\" {\n#endif\n";
    let mut prototypes = String::new();
    for chapter in chapters() {
        let text = declarations(&chapter);
        let _ = write!(out, "\n{}\n", heading(&chapter));
        // The table of functions takes the place of its opaque type.
        match text.split_once("typedef struct nybl_api nybl_api;\n") {
            Some((before, after)) => out = out + before + &api_struct(&prototypes) + after,
            None => out += &text,
        }
        prototypes += &text;
    }
    out + "\n#ifdef __cplusplus\n}\n#endif\n\n#endif /* NYBL_H */\n"
}

/// What a function returns and what it takes, from its prototype in `header`.
fn prototype(header: &str, name: &str) -> (String, String) {
    let call = format!("{name}(");
    let is_prototype = |line: &&str| {
        line.starts_with(|c: char| c.is_ascii_alphabetic()) && line.contains(call.as_str())
    };
    let line = header.lines().find(is_prototype);
    let line = line.unwrap_or_else(|| panic!("{name} has no prototype"));
    let from = line.as_ptr() as usize - header.as_ptr() as usize;
    let (result, rest) = header[from..].split_once(name).unwrap();
    let parameters = rest.split_once(';').unwrap().0;
    (result.to_owned(), parameters.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn api_struct(prototypes: &str) -> String {
    let mut out =
        String::from("typedef struct nybl_api {\n    /**\n     * Bytes of this library's table: ");
    out += "a member beyond them does not exist.\n     */\n    uint32_t struct_size;\n";
    out += "    /**\n     * The library's NYBL_ABI_MINOR.\n     */\n    uint32_t abi_minor;\n";
    for (name, _) in table() {
        let member = name.strip_prefix("nybl_").unwrap();
        if name == "nybl_get_api" {
            let _ = writeln!(
                out,
                "    const struct nybl_api *(*{member})(uint32_t major, uint32_t minor);"
            );
            continue;
        }
        let (result, parameters) = prototype(prototypes, &name);
        let text = format!("    {result}(*{member}){parameters};");
        // As wide as the rest of the header.
        let mut column = 0;
        for word in text.split_inclusive(", ") {
            if column + word.trim_end().len() > 100 {
                out.truncate(out.trim_end().len());
                out += "\n        ";
                column = 8;
            }
            out += word;
            column += word.len();
        }
        out += "\n";
    }
    out + "} nybl_api;\n"
}

/// The functions of the table in `src/ffi/api.rs`, in its order, with their numbers of parameters.
fn table() -> Vec<(String, usize)> {
    let source = read("src/ffi/api.rs");
    let list = source.split_once(BEGIN).unwrap().1.split_once(END).unwrap().0;
    list.lines()
        .filter(|line| line.contains(" in "))
        .map(|line| {
            let (name, rest) = line.trim().split_once('(').unwrap();
            (name.to_owned(), rest.split(')').next().unwrap().matches('_').count())
        })
        .collect()
}

const BEGIN: &str = "functions! {\n";
const END: &str = "}\n";

/// `src/ffi/api.rs` with the functions that it lacks at the end of its table.
fn api_source() -> String {
    let source = read("src/ffi/api.rs");
    let (before, rest) = source.split_once(BEGIN).unwrap();
    let after = rest.split_once(END).unwrap().1;
    let mut found = all_functions();
    let mut out = format!("{before}{BEGIN}");
    let mut line = |(name, parameters, feature): &(String, usize, String)| {
        let holes = vec!["_"; *parameters].join(", ");
        let _ = writeln!(out, "    {name}({holes}) in \"{feature}\",");
    };
    for (name, _) in table() {
        let index = found.iter().position(|(n, ..)| *n == name);
        let index = index.unwrap_or_else(|| {
            panic!(
                "{name} is in the table of functions and no longer in src/ffi: that breaks the ABI"
            )
        });
        line(&found.remove(index));
    }
    found.iter().for_each(&mut line);
    out + END + after
}

fn version_script() -> String {
    let mut names: Vec<_> = all_functions().into_iter().map(|(name, ..)| name).collect();
    names.sort_unstable();
    let mut out = format!("NYBL_{} {{\n    global:\n", nybl::ffi::NYBL_ABI_MAJOR);
    for name in names {
        let _ = writeln!(out, "        {name};");
    }
    out + "    local:\n        *;\n};\n"
}

/// Every struct of the interface with its fields, for `ffi-tests/abi.rs`.
fn struct_list() -> String {
    let mut out = String::from("// Written by `BLESS=1 cargo test --test header`.\nlayouts! {\n");
    for chapter in chapters() {
        for part in chapter.source.split("#[repr(C)]").skip(1) {
            let Some((_, rest)) = part.split_once("pub struct ") else { continue };
            let (name, rest) = rest.split_once(" {").unwrap();
            if !name.starts_with("nybl_") {
                continue;
            }
            let body = rest.split_once("\n}").unwrap().0;
            let fields = body.lines().filter_map(|l| l.trim().strip_prefix("pub "));
            let fields: Vec<_> = fields.map(|f| f.split(':').next().unwrap()).collect();
            let _ = writeln!(out, "    {name}: {},", fields.join(" "));
        }
    }
    out + "}\n"
}

fn is_fresh(path: &str, want: &str) {
    if std::env::var_os("BLESS").is_some_and(|value| value == "1") {
        std::fs::write(root().join(path), want).unwrap();
    }
    assert!(read(path) == want, "run `BLESS=1 cargo test --test header` and commit {path}");
}

#[test]
fn what_is_generated_is_fresh() {
    // The table first: the header prints it.
    is_fresh("src/ffi/api.rs", &api_source());
    is_fresh("include/nybl.h", &header());
    is_fresh("include/nybl.map", &version_script());
    is_fresh("ffi-tests/structs.in", &struct_list());
}

#[test]
fn the_header_of_the_c_kernels_is_fresh() {
    let config = cbindgen::Config::from_file(root().join("kernels/cbindgen.toml")).unwrap();
    let sources = ["src/kernel/abi.rs", "src/kernel/hexagon.rs"];
    is_fresh("kernels/kernel_abi.h", &generated(config, &sources));
}

fn compiles(compiler: &str, flags: &[&str], extension: &str) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = folder.join(format!("alone{}.{extension}", flags.len()));
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
    compiles("cc", &["-std=c99", "-DNYBL_SYMBOL_PREFIX=app_"], "c");
}

#[test]
fn the_header_compiles_alone_as_cpp17() {
    if Command::new("c++").arg("--version").output().is_err() && std::env::var_os("CI").is_none() {
        eprintln!("skipped: no C++ compiler is installed");
        return;
    }
    compiles("c++", &["-std=c++17"], "cpp");
}

/// Every status of the header has its name, and is documented by more than that.
#[test]
fn every_status_has_a_name_and_words() {
    let status = read("src/ffi/status.rs");
    let mut found = 0;
    for line in status.lines().filter(|line| line.contains(": nybl_status =")) {
        let name = line.strip_prefix("pub const ").unwrap().split(':').next().unwrap();
        assert!(status.contains(&format!("{name} => c\"{name}\",")), "nybl_status_name: {name}");
        found += 1;
    }
    assert!(found >= 12, "{found} statuses");
}
