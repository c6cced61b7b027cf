//! Compiles the kernels that are written in C, because stable Rust has no types for their vectors.
//!
//! There is no list here. Every `kernels/*.c` says in a line of its own where it belongs and how it is
//! compiled, and is left out elsewhere:
//!
//! ```c
//! //@ arch=aarch64 os=linux,android flags=-march=armv8.2-a+sve
//! ```
//!
//! `arch` and `os` are Rust's `target_arch` and `target_os`, several with commas between them; `os` may be
//! left out; `flags` takes the rest of the line. A file `kernels/x.c` that was compiled sets
//! `cfg(c_kernel = "x")`, which its rows in the kernel table stand behind. The files are freestanding: no
//! header of the target's C library is read, so a phone's can be built without its SDK.
//!
//! Where no C compiler for the target is found the rows are dropped with a warning, since every format has
//! rows in Rust as well. `NYBL_REQUIRE_C=1` makes that an error, for CI and for whoever ships the result.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=NYBL_REQUIRE_C");
    let sources = sources();
    let names: Vec<String> = sources.iter().map(|source| format!("{:?}", source.name)).collect();
    println!("cargo::rustc-check-cfg=cfg(c_kernel, values({}))", names.join(", "));

    for source in sources.iter().filter(|source| source.is_for_target()) {
        match source.compile() {
            Ok(()) => println!("cargo::rustc-cfg=c_kernel={:?}", source.name),
            Err(tried) => drop_or_fail(source, &tried),
        }
    }
}

/// One `kernels/*.c` and what it says about itself.
struct Source {
    path: PathBuf,
    name: String,
    arch: Vec<String>,
    os: Vec<String>,
    flags: Vec<String>,
}

/// Every source, in the order of the names: the order of the directory differs between machines.
fn sources() -> Vec<Source> {
    let entries = std::fs::read_dir("kernels").expect("kernels/ is part of the package");
    let paths = entries.map(|entry| entry.expect("a readable directory").path());
    let mut paths: Vec<PathBuf> =
        paths.filter(|path| path.extension() == Some("c".as_ref())).collect();
    paths.sort();
    paths.into_iter().map(Source::read).collect()
}

impl Source {
    fn read(path: PathBuf) -> Self {
        let shown = path.display();
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{shown}: {e}"));
        let line = text.lines().find_map(|line| line.strip_prefix("//@"));
        let line = line.unwrap_or_else(|| panic!("{shown}: no line `//@ arch=... flags=...`"));
        let (places, flags) = line.split_once("flags=").unwrap_or((line, ""));
        let (mut arch, mut os) = (Vec::new(), Vec::new());
        for word in places.split_whitespace() {
            let values = |list: &str| list.split(',').map(String::from).collect();
            match word.split_once('=') {
                Some(("arch", list)) => arch = values(list),
                Some(("os", list)) => os = values(list),
                _ => panic!("{shown}: {word:?} is none of arch=, os= and flags="),
            }
        }
        assert!(!arch.is_empty(), "{shown}: no arch= in the line `//@`");
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        let flags = flags.split_whitespace().map(String::from).collect();
        Self { path, name, arch, os, flags }
    }

    fn is_for_target(&self) -> bool {
        self.arch.contains(&cargo("CARGO_CFG_TARGET_ARCH"))
            && (self.os.is_empty() || self.os.contains(&cargo("CARGO_CFG_TARGET_OS")))
    }

    /// Compiles and links with the first compiler that can, or says what each of them objected to.
    fn compile(&self) -> Result<(), String> {
        let mut tried = Vec::new();
        for compiler in compilers() {
            match self.compile_with(compiler.as_deref()) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    let name = compiler.unwrap_or_else(|| "the C compiler of the target".into());
                    tried.push(format!("{name}: {}", error.to_string().replace('\n', " ")));
                }
            }
        }
        Err(tried.join("; "))
    }

    fn compile_with(&self, compiler: Option<&str>) -> Result<(), cc::Error> {
        let mut build = cc::Build::new();
        if let Some(compiler) = compiler {
            build.compiler(compiler);
        }
        build
            .file(&self.path)
            // Attempts that fail say so in the one warning of `drop_or_fail`.
            .cargo_warnings(false)
            // A kernel that is not optimised spills every vector, so these are even in a debug build,
            // which would also carry this machine's paths in its debug information.
            .opt_level(2)
            .debug(false)
            .force_frame_pointer(false)
            .flags(["-std=c11", "-ffreestanding", "-fvisibility=hidden", "-Wall", "-Wextra"])
            // Products and sums are fused where the numeric contract says so and nowhere else.
            .flag("-ffp-contract=off")
            // They are vectorised by hand, and GCC 12 crashes where it tries with dot products.
            .flag("-fno-tree-vectorize")
            // `CFLAGS` may ask for it, and Rust's linker does not read the result.
            .flag("-fno-lto");
        build.flags(&self.flags).try_compile(&format!("nybl_{}", self.name))
    }
}

/// The compilers to try: only the one that the user names for this target, or else Clang, which compiles for any
/// target, and what `cc` thinks of, which goes first where `CC` says something about it.
fn compilers() -> Vec<Option<String>> {
    let target = cargo("TARGET");
    let is_set = |name: &str| {
        println!("cargo::rerun-if-env-changed={name}");
        env::var_os(name).is_some()
    };
    let by_target = [format!("CC_{target}"), format!("CC_{}", target.replace('-', "_"))];
    if by_target.iter().any(|name| is_set(name)) || is_set("TARGET_CC") {
        return vec![None];
    }
    let versions = (15..=30).rev().map(|version| format!("clang-{version}"));
    let clang = std::iter::once("clang".to_owned()).chain(versions).filter(|name| is_on_path(name));
    let mut compilers: Vec<_> = clang.take(2).map(Some).collect();
    let place = if is_set("CC") { 0 } else { compilers.len() };
    compilers.insert(place, None);
    compilers
}

fn is_on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .any(|folder| folder.join(format!("{program}{}", env::consts::EXE_SUFFIX)).is_file())
}

/// What becomes of a source that nothing could compile.
fn drop_or_fail(source: &Source, tried: &str) {
    let (path, target) = (source.path.display(), cargo("TARGET"));
    let install = format!("install Clang or name a compiler in CC_{}", target.replace('-', "_"));
    if env::var("NYBL_REQUIRE_C").is_ok_and(|value| value != "0") {
        println!(
            "cargo::error={path} was not compiled for {target}, and NYBL_REQUIRE_C is set: {install} ({tried})"
        );
        std::process::exit(1);
    }
    println!(
        "cargo::warning={path} was not compiled for {target}, so its kernels are left out: {install} ({tried})"
    );
}

/// A variable that Cargo sets for every build script.
fn cargo(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}
