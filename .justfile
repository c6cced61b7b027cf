# The lanes, by name. `.ci/run` calls the same ones.

# The README's test command.
test:
    cargo test

# Formatting, lints, documentation links.
lint:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps

# Every feature alone: core, engine, text, chat, capi, hexagon, cli.
features:
    for f in "" engine text chat capi hexagon cli; do cargo clippy --no-default-features --features "$f" -- -D warnings || exit 1; done

# Every kernel row of this CPU, and a failure when one of the named rows was skipped.
conformance expect="":
    NYBL_EXPECT={{expect}} cargo test --no-default-features --test conformance

# Kernels, threads, the cache, files and the C interface under Miri.
miri:
    .ci/miri

# The pool, the loader and cancelling under the thread sanitizer.
races:
    RUSTFLAGS="-Zsanitizer=thread" cargo +nightly test -Zbuild-std --target x86_64-unknown-linux-gnu --no-default-features --features engine --lib -- threads:: engine:: kv::store

# Four sessions at once, for so many turns in all.
soak turns="10000":
    NYBL_SOAK_TURNS={{turns}} cargo test --test soak -- --nocapture

# Random operations on the KV cache, nine settings of so many steps.
kv steps="110000":
    NYBL_KV_STEPS={{steps}} cargo test --lib kv::property

# The same, chosen by a fuzzer.
fuzz seconds="60":
    cargo +nightly fuzz run kv_ops -- -max_total_time={{seconds}} -max_len=4096

# Every fuzz target for eight seconds, from ten of its seeds.
smoke:
    .ci/fuzz

# The C programs under address and undefined-behaviour sanitizers' eyes are part of `test`; this writes
# the header anew.
bless:
    BLESS=1 cargo test --test header

# Kernel rows against memory and cycles.
bench:
    cargo bench --bench kernels --no-default-features

# Arm rows under qemu-user: just arm cortex-a76 dotprod
arm cpu expect="":
    QEMU_CPU={{cpu}} NYBL_EXPECT={{expect}} \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64 \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static" \
    cargo test --target aarch64-unknown-linux-gnu --no-default-features --test conformance

# What the Arm loops cost by llvm-mca's models, into src/docs/arm.md; needs llvm-22.
mca:
    kernels/mca.py --write

# How many instructions a token takes by each Arm row under qemu-user, into src/docs/instructions.md.
instructions:
    scripts/instructions.py --write

# Hexagon rows under qemu-hexagon.
hvx:
    NYBL_EXPECT=hvx cargo test --no-default-features --features hexagon --test hvx

# The model inside the program, from its checkpoint.
demo-model:
    cargo run --release -- convert ffi-tests/data/nursery.F16.gguf models/nursery.nybl --bits 4 --group 32

# The prebuilt layout through pkg-config, CMake and cargo-c, and the sizes of the libraries.
package:
    cargo build --release
    .ci/package

# Java, Kotlin and Panama over the header.
jvm:
    .ci/jvm

# The Swift package, after `just package`.
swift:
    .ci/swift
