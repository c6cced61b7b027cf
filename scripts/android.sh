#!/usr/bin/env bash
# Lays out an AAR with prefab, from which a Gradle module takes Java classes, libraries and the C header:
#
#   scripts/android.sh OUT.aar
#
# With ANDROID_NDK_HOME: libnybl.so with the Java functions, for both ABIs. Without it: the static libraries alone,
# for native code through prefab. CLASSES names a classes.jar of bindings/kotlin, if there is one;
# FEATURES are as for scripts/package.sh.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
work=$(mktemp -d)
features=()
[ -z "${FEATURES:-}" ] || features=(--no-default-features --features "$FEATURES")
trap 'rm -r "$work"' EXIT
level=24

module=$work/prefab/modules/nybl
mkdir -p "$module"
cat >"$work/AndroidManifest.xml" <<XML
<manifest xmlns:android="http://schemas.android.com/apk/res/android" package="io.nybl">
    <uses-sdk android:minSdkVersion="$level"/>
</manifest>
XML
echo "{\"schema_version\": 2, \"name\": \"nybl\", \"version\": \"$version\", \"dependencies\": []}" \
    >"$work/prefab/prefab.json"
echo '{"export_libraries": [], "library_name": "libnybl", "android": {}}' >"$module/module.json"
mkdir -p "$module/include"
cp include/nybl.h include/nybl.hpp "$module/include/"
cp "${CLASSES:-/dev/null}" "$work/classes.jar"

for pair in arm64-v8a:aarch64 x86_64:x86_64; do
    abi=${pair%:*} arch=${pair#*:} target=${pair#*:}-linux-android
    folder=$module/libs/android.$abi
    mkdir -p "$folder"
    static=true
    if [ -n "${ANDROID_NDK_HOME:-}" ]; then
        CC=$(echo "$ANDROID_NDK_HOME"/toolchains/llvm/prebuilt/*/bin/"$arch-linux-android$level-clang")
        upper=$(echo "$target" | tr a-z- A-Z_)
        env "CARGO_TARGET_${upper}_LINKER=$CC" cargo rustc --quiet --release --lib --crate-type cdylib \
            --target "$target" --features jni -- -C link-arg=-Wl,-z,max-page-size=16384
        mkdir -p "$work/jni/$abi"
        cp "target/$target/release/libnybl.so" "$work/jni/$abi/"
        cp "target/$target/release/libnybl.so" "$folder/"
        static=false
    else
        cargo rustc --quiet --release --lib --crate-type staticlib --target "$target" \
            "${features[@]}"
        cp "target/$target/release/libnybl.a" "$folder/"
    fi
    cat >"$folder/abi.json" <<JSON
{"abi": "$abi", "api": $level, "ndk": 27, "stl": "none", "static": $static}
JSON
done
rm -f "$out"
(cd "$work" && python3 -m zipfile -c "$out" ./*)
