#!/usr/bin/env bash
# Fails unless every loaded part of these ELF files begins at a multiple of 16 KB, as phones with such pages need.
set -euo pipefail
for file in "$@"; do
    parts=$(readelf -lW "$file" | awk '$1 == "LOAD" { print $NF }')
    [ -n "$parts" ] || { echo "$file: nothing is loaded" >&2; exit 1; }
    for align in $parts; do
        [ "$((align))" -ge 16384 ] || { echo "$file: aligned to $align" >&2; exit 1; }
    done
    echo "$file: 16 KB"
done
