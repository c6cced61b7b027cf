#!/usr/bin/env bash
# Lays out an xcframework of static libraries, for Xcode and for a binary target of a Swift package:
#
#   scripts/xcframework.sh OUT/CNybl.xcframework
#
# Runs anywhere that has the Rust targets, since nothing is linked. FEATURES as for scripts/package.sh.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
rm -rf "$out"
mkdir -p "$out"
libraries=
features=()
[ -z "${FEATURES:-}" ] || features=(--no-default-features --features "$FEATURES")

slice() { # name, target, platform, variant
    if [ ! -d "$(rustc --print sysroot)/lib/rustlib/$2" ]; then
        echo "left out: $1, whose standard library is not installed (rustup target add $2)" >&2
        return
    fi
    cargo rustc --quiet --release --lib --crate-type staticlib --target "$2" \
        "${features[@]}"
    mkdir -p "$out/$1/Headers"
    cp "target/$2/release/libnybl.a" "$out/$1/"
    cp include/nybl.h include/nybl.hpp include/module.modulemap "$out/$1/Headers/"
    local variant=
    [ -z "$4" ] || variant="<key>SupportedPlatformVariant</key><string>$4</string>"
    libraries+="<dict><key>LibraryIdentifier</key><string>$1</string>
<key>LibraryPath</key><string>libnybl.a</string><key>BinaryPath</key><string>libnybl.a</string>
<key>HeadersPath</key><string>Headers</string>
<key>SupportedArchitectures</key><array><string>arm64</string></array>
<key>SupportedPlatform</key><string>$3</string>$variant</dict>
"
}
slice ios-arm64 aarch64-apple-ios ios ""
slice ios-arm64-simulator aarch64-apple-ios-sim ios simulator
slice macos-arm64 aarch64-apple-darwin macos ""

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
