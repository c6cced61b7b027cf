#!/usr/bin/env bash
# Makes seeds/TARGET anew from corpus/TARGET and itself: what reaches code that nothing smaller reaches, the smallest
# files first, up to 500 of them and 150 kB a target. The corpus must come from `fuzz/seeds.py --ours`: what is here is published.
# fuzz/minimise.sh [TARGET...]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck disable=SC2046
[ $# -gt 0 ] || set -- $(cargo +nightly fuzz list)
for target; do
    merged=$(mktemp -d)
    mkdir -p "fuzz/corpus/$target" "fuzz/seeds/$target"
    cargo +nightly fuzz run "$target" "$merged" "fuzz/corpus/$target" "fuzz/seeds/$target" -- -merge=1 -max_len=16384
    rm -rf "fuzz/seeds/$target"
    mkdir "fuzz/seeds/$target"
    find "$merged" -type f -printf '%s %p\n' | sort -n | { head -n 500; cat >/dev/null; } | while read -r size file; do
        total=$((${total:-0} + size))
        if [ "$total" -le 150000 ]; then cp "$file" "fuzz/seeds/$target/"; fi
    done
    rm -rf "$merged"
done
