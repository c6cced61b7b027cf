#!/usr/bin/env bash
# Lays out an AAR for Gradle: the Java classes of bindings/kotlin, and static libraries with the C header by prefab.
#
#   scripts/android.sh OUT.aar
#
# Needs a JDK and Rust's targets (rustup target add aarch64-linux-android x86_64-linux-android). What the Java classes load,
# jni/*/libnybl.so, has to be linked against Android's libraries: with ANDROID_NDK_HOME it is, without it the AAR serves
# native code alone and says so. CLASSES names a folder of class files in place of the Java ones, as from a Kotlin
# compiler that adds the flows; FEATURES and PROFILE are as for scripts/xcframework.sh.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "$1")
classes=${CLASSES:+$(realpath "$CLASSES")}
cd "$(dirname "$0")/.."
profile=${PROFILE:-dist}
folder=${profile/#dev/debug}
features=${FEATURES:-capi,chat,huggingface}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
# The oldest Android that the libraries are for.
level=24
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
aar=$work/aar

module=$aar/prefab/modules/nybl
mkdir -p "$module/include" "$aar/META-INF/com/android/build/gradle"
cp include/nybl.h include/nybl.hpp "$module/include/"
cp LICENSE-MIT LICENSE-APACHE "$aar/META-INF/"
cat >"$aar/AndroidManifest.xml" <<XML
<manifest xmlns:android="http://schemas.android.com/apk/res/android" package="io.nybl">
    <uses-sdk android:minSdkVersion="$level"/>
</manifest>
XML
: >"$aar/R.txt"
printf 'aarFormatVersion=1.0\naarMetadataVersion=1.0\n' >"$aar/META-INF/com/android/build/gradle/aar-metadata.properties"
# Native code finds classes and methods by their names.
echo '-keep class io.nybl.** { *; }' >"$aar/proguard.txt"
cat >"$aar/prefab/prefab.json" <<JSON
{"schema_version": 2, "name": "nybl", "version": "$version", "dependencies": []}
JSON
cat >"$module/module.json" <<JSON
{"export_libraries": ["-ldl", "-llog", "-lm"], "library_name": "libnybl"}
JSON

if [ -z "$classes" ]; then
    classes=$work/classes
    javac --release 11 -Xlint:-options -d "$classes" bindings/kotlin/src/main/java/io/nybl/*.java
fi
jar --create --file "$aar/classes.jar" -C "$classes" .

for pair in arm64-v8a:aarch64 x86_64:x86_64; do
    abi=${pair%:*} arch=${pair#*:} target=${pair#*:}-linux-android
    [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ] || { echo "$abi: rustup target add $target" >&2; exit 1; }
    mkdir -p "$module/libs/android.$abi"
    cargo rustc --quiet --profile "$profile" --lib --crate-type staticlib --target "$target" \
        --no-default-features --features "$features"
    cp "target/$target/$folder/libnybl.a" "$module/libs/android.$abi/"
    cat >"$module/libs/android.$abi/abi.json" <<JSON
{"abi": "$abi", "api": $level, "ndk": 27, "stl": "none", "static": true}
JSON
    [ -n "${ANDROID_NDK_HOME:-}" ] || continue
    linker=$(echo "$ANDROID_NDK_HOME"/toolchains/llvm/prebuilt/*/bin/"$arch-linux-android$level-clang")
    variable=CARGO_TARGET_$(echo "$target" | tr a-z- A-Z_)_LINKER
    mkdir -p "$aar/jni/$abi"
    env "$variable=$linker" cargo rustc --quiet --profile "$profile" --lib --crate-type cdylib --target "$target" \
        --no-default-features --features "$features,jni,text" -- \
        -C strip=symbols -C link-arg=-Wl,-z,max-page-size=16384
    cp "target/$target/$folder/libnybl.so" "$aar/jni/$abi/"
    scripts/pages.sh "$aar/jni/$abi/libnybl.so"
done
[ -d "$aar/jni" ] || echo "no jni/: without ANDROID_NDK_HOME the Java classes have no library to load" >&2

rm -f "$out"
mkdir -p "$(dirname "$out")"
(cd "$aar" && python3 -m zipfile -c "$out" ./*)
