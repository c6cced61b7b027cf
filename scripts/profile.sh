#!/usr/bin/env bash
# Where the time of a model goes, function by function: scripts/profile.sh MODEL.nybl [THREADS], for decoding and for a prompt of
# 512 tokens. Needs Linux's perf and a release build. What `nybl bench` does to find the machine's limits is taken out.
set -euo pipefail
model=$1 threads=${2:-1}
cd "$(dirname "$0")/.."
data=$(mktemp)
trap 'rm -f "$data"' EXIT
profile() {
    local what=$1
    shift
    perf record --quiet --freq 997 --output "$data" target/release/nybl bench -m "$model" --threads "$threads" --runs 5 "$@" >/dev/null
    printf '\n%s:\n\n' "$what"
    perf report --input "$data" --stdio --no-children --fields overhead,symbol 2>/dev/null |
        sed -nE 's/^ *([0-9.]+)% +\[(.)\] +(.*[^ ]) *$/\1 \2 \3/p' |
        awk '/kernel::limits/ { next }
             { share[NR] = $1; sum += $1; sub(/^[0-9.]+ /, ""); name[NR] = $0 }
             END { for (i = 1; i <= NR; i++) if (share[i] > sum / 150) printf "    %5.1f%%  %s\n", 100 * share[i] / sum, name[i] }'
}
profile "decoding 64 tokens" --decode 64
profile "a prompt of 512 tokens" --prefill 512
