#!/usr/bin/env bash
# Lines covered by the tests, by folder and file: scripts/coverage.sh [FOLDER...] (default: all of src).
# NYBL_MISSED=1 names the lines that were not. Needs `rustup component add llvm-tools`. Only this package is compiled anew: it is its own compiler wrapper.
set -euo pipefail
if [ -n "${NYBL_COVERAGE:-}" ]; then exec "$@" -Cinstrument-coverage; fi
cd "$(dirname "$0")/.."
tools=$(rustc --print target-libdir)/../bin
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export NYBL_COVERAGE=1 RUSTC_WORKSPACE_WRAPPER=$PWD/scripts/coverage.sh LLVM_PROFILE_FILE=$out/%m-%p.profraw
tests=(--lib)
for test in bad_input batch cache engine exact families faults folders foreign_reader host lossless resume speculate text_commands; do
    tests+=(--test "$test")
done
cargo test --no-run --message-format=json "${tests[@]}" >"$out/build.json"
# One test reads long texts with models beside the checkout: minutes for lines that others run too.
cargo test --quiet "${tests[@]}" -- --skip integers_cost_little_perplexity_on_real_models >&2
"$tools/llvm-profdata" merge -sparse -failure-mode=all "$out"/*.profraw -o "$out/all"
python3 - "$out/build.json" "$out/all" "$tools/llvm-cov" "$@" <<'PYTHON'
import collections, json, os, pathlib, subprocess, sys

build, profile, tool, *folders = sys.argv[1:]
programs = {json.loads(line).get("executable") for line in open(build)} - {None}
command = [tool, "export", "-format=lcov", f"-instr-profile={profile}"]
for program in sorted(programs):
    command += ["-object", program]
root = pathlib.Path.cwd()
sums = collections.defaultdict(lambda: [0, 0])
missed = collections.defaultdict(list)
code, path = False, None
for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
    if line.startswith("SF:"):
        path = pathlib.Path(line[3:])
        code = path.is_relative_to(root / "src")
        if code:
            # Tests at a file's end are not what is to be covered.
            lines = path.read_text().splitlines()
            end = lines.index("#[cfg(test)]") if "#[cfg(test)]" in lines else len(lines)
            path = path.relative_to(root)
    elif code and line.startswith("DA:"):
        number, count = map(int, line[3:].split(",")[:2])
        if number > end:
            continue
        for name in (path, path.parent):
            sums[name][0] += count > 0
            sums[name][1] += 1
        if not count:
            missed[path].append(number)
for name, (covered, count) in sorted(sums.items()):
    if not folders or any(name.is_relative_to(folder) for folder in folders):
        print(f"{100 * covered / count:5.1f} %  {covered:5} of {count:5}  {name}")
        if os.environ.get("NYBL_MISSED"):
            print("   ", *missed.get(name, []))
PYTHON
