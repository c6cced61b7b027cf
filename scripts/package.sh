#!/usr/bin/env bash
# Lays out a prebuilt nybl for one platform: include/, lib/ with both libraries, pkg-config and CMake files.
#
#   scripts/package.sh OUT                            for this machine
#   scripts/package.sh OUT aarch64-linux-android      for another target of rustc
#
# The shared library is linked here, from the static one: with a soname and a version node for each major version
# of the ABI (include/nybl.map), and in pages of 16 KB as Android asks for. That needs a C compiler for the target,
# named by CC; without one, and for Apple's systems, there is the static library alone. FEATURES are Cargo's, in
# place of the default ones: "capi" is the kernels, the KV cache and the verifier alone. PROFILE is Cargo's too: dist,
# which optimises across crates and takes minutes, or another. BUILD_STD=1 builds Rust's library, too (nightly, with
# rust-src), one that cannot print a backtrace: a fifth less for the core. LDFLAGS go to the link: "-fuse-ld=lld
# -Wl,--icf=all" makes it 4% smaller.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
out=$1
host=$(rustc -vV | sed -n 's/^host: //p')
target=${2:-$host}
major=$(sed -n 's/^#define NYBL_ABI_MAJOR //p' include/nybl.h)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

options=(--profile "${PROFILE:-dist}")
folder=${PROFILE:-dist}
folder=target/${folder/#dev/debug}
cargo=(cargo)
if [ -n "${BUILD_STD:-}" ]; then
    cargo+=(+nightly -Zbuild-std=std,panic_unwind -Zbuild-std-features=panic-unwind,optimize_for_size)
fi
if [ "$target" != "$host" ] || [ -n "${BUILD_STD:-}" ]; then
    options+=(--target "$target") folder=${folder/target/target/$target}
fi
[ -z "${FEATURES:-}" ] || options+=(--no-default-features --features "$FEATURES")
"${cargo[@]}" rustc --quiet --lib --crate-type staticlib "${options[@]}"
built=$folder/libnybl.a

mkdir -p "$out/include" "$out/lib/pkgconfig" "$out/lib/cmake/nybl"
cp include/nybl.h include/nybl.hpp include/module.modulemap "$out/include/"
cp scripts/cmake/*.cmake "$out/lib/cmake/nybl/"
cp LICENSE-MIT LICENSE-APACHE "$out/"
cp "$built" "$out/lib/"

system="-lm -lpthread -ldl"
case $target in
    *-apple-*) system= ;;
    *-android*) system="-lm -ldl -llog" ;;
esac

if [ "$target" = "$host" ]; then CC=${CC:-cc}; fi
if [ -n "${CC:-}" ] && [[ $target != *-apple-* ]]; then
    # Only functions that this library has, each of which pulls in what it needs: some linkers refuse a version
    # script with others.
    nm -g --defined-only "$built" 2>/dev/null | sed -n 's/.* T \(nybl_.*\)$/\1/p' | sort -u >"$out/names"
    { echo "NYBL_$major { global:" && sed 's/$/;/' "$out/names" && echo "local: *; };"; } >"$out/map"
    # shellcheck disable=SC2046,SC2086
    "$CC" -shared -o "$out/lib/libnybl.so.$major" $(sed 's/^/-Wl,-u,/' "$out/names") "$built" \
        -Wl,-soname,"libnybl.so.$major" -Wl,--version-script="$out/map" -Wl,--gc-sections \
        -Wl,-z,max-page-size=16384 -Wl,-z,relro,-z,now -s $system ${LDFLAGS:-}
    ln -sf "libnybl.so.$major" "$out/lib/libnybl.so"
    rm "$out/names" "$out/map"
fi

cat >"$out/lib/pkgconfig/nybl.pc" <<PC
prefix=\${pcfiledir}/../..
Name: nybl
Description: Embeddable LLM inference kernel with a C ABI
Version: $version
Libs: -L\${prefix}/lib -lnybl
Libs.private: $system
Cflags: -I\${prefix}/include
PC
