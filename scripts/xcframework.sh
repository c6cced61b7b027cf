#!/usr/bin/env bash
# Lays out an xcframework of static libraries, for Xcode or a binary target of a Swift package:
#
#   scripts/xcframework.sh OUT/CNybl.xcframework
#
# Nothing is linked, so it needs neither Xcode nor a Mac, only Rust's targets (rustup target add). SLICES are those to
# lay out, of ios-arm64, ios-arm64-simulator and macos-arm64 (all of them); FEATURES are Cargo's (the whole C interface),
# "capi" being the kernels, the KV cache and the verifier alone; PROFILE is Cargo's too (dist). BUILD_STD=1 builds Rust's
# library for a target that rustup cannot get (nightly, with rust-src).
set -euo pipefail
[ $# = 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
profile=${PROFILE:-dist}
folder=${profile/#dev/debug}
# As bindings/swift/Package.swift has them.
export IPHONEOS_DEPLOYMENT_TARGET=15.0 MACOSX_DEPLOYMENT_TARGET=12.0

rm -rf "$out"
mkdir -p "$out"
libraries=
for slice in ${SLICES:-ios-arm64 ios-arm64-simulator macos-arm64}; do
    variant=
    case $slice in
        ios-arm64) target=aarch64-apple-ios platform=ios ;;
        ios-arm64-simulator)
            target=aarch64-apple-ios-sim platform=ios
            variant="<key>SupportedPlatformVariant</key><string>simulator</string>"
            ;;
        macos-arm64) target=aarch64-apple-darwin platform=macos ;;
        *) echo "there is no slice $slice" >&2; exit 2 ;;
    esac
    cargo=(cargo)
    if [ ! -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; then
        [ -n "${BUILD_STD:-}" ] ||
            { echo "$slice: rustup target add $target, or BUILD_STD=1, or leave it out of SLICES" >&2; exit 1; }
        cargo=(cargo +nightly -Zbuild-std=std,panic_unwind)
    fi
    "${cargo[@]}" rustc --quiet --profile "$profile" --lib --crate-type staticlib --target "$target" \
        --no-default-features --features "${FEATURES:-capi,chat,huggingface}"
    mkdir -p "$out/$slice/Headers"
    cp "target/$target/$folder/libnybl.a" "$out/$slice/"
    cp include/nybl.h include/nybl.hpp include/module.modulemap "$out/$slice/Headers/"
    libraries+="<dict>
<key>LibraryIdentifier</key><string>$slice</string>
<key>LibraryPath</key><string>libnybl.a</string>
<key>BinaryPath</key><string>libnybl.a</string>
<key>HeadersPath</key><string>Headers</string>
<key>SupportedArchitectures</key><array><string>arm64</string></array>
<key>SupportedPlatform</key><string>$platform</string>$variant
</dict>
"
done
cp LICENSE-MIT LICENSE-APACHE "$out/"

cat >"$out/Info.plist" <<PLIST
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict>
<key>AvailableLibraries</key><array>
$libraries</array>
<key>CFBundlePackageType</key><string>XFWK</string>
<key>XCFrameworkFormatVersion</key><string>1.0</string>
</dict></plist>
PLIST
