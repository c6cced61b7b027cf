#!/usr/bin/env bash
# Gives a static library a prefix of its own and hides everything else in it, Rust's runtime included, so that
# two copies (of two versions, from two compilers) can live in one program:
#
#   scripts/prefix.sh libnybl.a app_ libappnybl.a
#   cc -DNYBL_SYMBOL_PREFIX=app_ -Iinclude main.c libappnybl.a -lm -lpthread -ldl
#
# For ELF. LD, OBJCOPY and AR name the tools of another target.
set -euo pipefail
[ $# = 3 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
library=$1 prefix=$2 out=$3
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

sed -n 's/^ *\(nybl_[a-z0-9_]*\);$/\1/p' "$(dirname "$0")/../include/nybl.map" >"$work/all"
# A library of fewer levels lacks some of them.
"${NM:-nm}" -g --defined-only "$library" 2>/dev/null | awk '{print $NF}' | sort -u >"$work/defined"
comm -12 <(sort "$work/all") "$work/defined" >"$work/names"
[ -s "$work/names" ] || { echo "$library defines none of the functions in include/nybl.map" >&2; exit 1; }
sed "s/.*/& $prefix&/" "$work/names" >"$work/renames"
sed "s/^/$prefix/" "$work/names" >"$work/kept"

# Rust's standard library carries bitcode beside its code, which does not survive being joined.
# Only what the functions need is pulled in. Groups are dissolved: the linker would drop the second copy's, of
# which it thinks that it has seen them.
# shellcheck disable=SC2046
"${LD:-ld}" -r --force-group-allocation $(sed 's/^/-u /' "$work/names") "$library" -o "$work/one.o"
"${OBJCOPY:-objcopy}" --redefine-syms="$work/renames" -R .llvmbc -R .llvmcmd "$work/one.o"
"${OBJCOPY:-objcopy}" --keep-global-symbols="$work/kept" "$work/one.o"
rm -f "$out"
"${AR:-ar}" rcs "$out" "$work/one.o"
