#!/usr/bin/env python3
"""nybl beside llama.cpp, on the same cores, in turn: a table of ratios and of shares of the machine's limits.

    pip install gguf numpy
    cargo build --release
    benches/peers/compare.py --dir /somewhere/with/10/GB --llama-bench PATH [--llama-python PYTHON]

llama.cpp comes as a `llama-bench` binary, or as a Python in which `import llama_cpp` works (PyPI's llama-cpp-python,
built by pip for this machine); without either its columns are left out by name. One process a sample, the two programs in
turn, medians. See README.md beside this file.
"""
import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

import models

# What stands against what: (the peer's type, bits and group of nybl's, rounded from f16, or none for the same file
# converted bit by bit). In each pair nybl has at most as many bits a weight.
PAIRS = {
    "int4-g32": ("q4_0", None),
    "int4-g128": ("q4_0", (4, 128)),
    "int4-k": ("q4_k", (4, 32)),
    "int4-k-g128": ("q4_k", (4, 128)),
    "int3-g128": ("q3_k", (3, 128)),
    "int8": ("q8_0", None),
}


# Seconds from nothing to the first token after a prompt of eight, both files in the system's cache. The peer's are those of
# its whole process; nybl's those between a process's start and its token, and those of a process that only starts and ends.
LOAD = "load"


def test_flags(test):
    """`decode32x4@4096:i8` as flags of both programs: what is timed, in how many sequences at once, after how many
    tokens, with which cache."""
    what, _, kv = test.partition(":")
    what, _, depth = what.partition("@")
    what, _, sequences = what.partition("x")
    kv, depth, sequences = kv or "f16", int(depth or 0), int(sequences or 1)
    name, count = what.rstrip("0123456789"), what.lstrip("abcdefghijklmnopqrstuvwxyz")
    if name not in ("decode", "prefill"):
        sys.exit(f"{test}: neither decode nor prefill")
    return name, int(count or 64), depth, kv, sequences


class Nybl:
    def __init__(self, arguments):
        self.program = arguments.nybl
        self.isa = ["--isa", arguments.isa] if arguments.isa else []

    def command(self, file, test, threads):
        name, count, depth, kv, sequences = test_flags(test)
        return [self.program, "bench", "-m", file, f"--{name}", count, "--depth", depth, "--kv", kv, "--threads", threads,
                "--sequences", sequences, "--runs", 1, "--json", *self.isa]

    def load_seconds(self, prefix, file, threads):
        start = time.monotonic()
        run(prefix, [self.program, "--version"])
        alone = time.monotonic() - start
        output = run(prefix, [self.program, "bench", "-m", file, "--load", "--threads", threads, "--runs", 1, "--json", *self.isa])
        return alone + json.loads(output)["load"]["warm_first_token_s"]

    def rate(self, output, test):
        result = json.loads(output)
        found = result[test_flags(test)[0]]
        limit = found.get("read_gb_per_second") or found.get("dot_gop_per_second")
        share = found.get("fraction_of_read_bandwidth") or found.get("fraction_of_dot_peak")
        return found["tokens_per_second"], limit, share, result["weight_bytes_of_a_token"]


class LlamaBench:
    name = "llama-bench"

    def __init__(self, program):
        self.program = program

    def command(self, file, test, threads):
        name, count, depth, kv, sequences = test_flags(test)
        kv = {"f16": "f16", "i8": "q8_0"}[kv]
        if sequences > 1:
            # Its sequences begin with a prompt, of which one token is the least.
            prompt = max(depth, 1)
            batched = pathlib.Path(self.program).with_name("llama-batched-bench")
            return [batched, "-m", file, "-c", sequences * (prompt + count), "-npp", prompt, "-ntg", count, "-npl", sequences,
                    "-t", threads, "-fa", "on", "-ctk", kv, "-ctv", kv, "--output-format", "jsonl", *self.extra]
        lengths = ["-p", 0, "-n", count] if name == "decode" else ["-p", count, "-n", 0]
        return [self.program, "-m", file, *lengths, "-d", depth, "-t", threads, "-r", 1, "-fa", 1, "-ctk", kv, "-ctv", kv,
                "-o", "json", *self.extra]

    extra = []

    def load_seconds(self, prefix, file, threads):
        start = time.monotonic()
        output = run(prefix, [*self.command(file, "prefill8", threads), "--no-warmup"])
        return time.monotonic() - start, output

    def rate(self, output):
        lines = [line for line in output.splitlines() if "speed_tg" in line]
        return json.loads(lines[-1])["speed_tg"] if lines else json.loads(output)[0]["avg_ts"]

    def version(self, output):
        return None if "speed_tg" in output else json.loads(output)[0]["build_commit"]


class LlamaPython(LlamaBench):
    """The same through the C interface as PyPI's package has it: `with_llama_cpp.py`."""

    name = "llama-cpp-python"

    def load_seconds(self, prefix, file, threads):
        start = time.monotonic()
        output = run(prefix, self.command(file, "prefill8", threads, what=LOAD))
        return time.monotonic() - start, output

    def command(self, file, test, threads, what=None):
        name, count, depth, kv, sequences = test_flags(test)
        if sequences > 1:
            sys.exit(f"{test}: several sequences at once need --llama-bench")
        helper = pathlib.Path(__file__).with_name("with_llama_cpp.py")
        return [self.program, helper, file, what or name, count, depth, kv, threads]

    def rate(self, output):
        return json.loads(output)["tokens_per_second"]

    def version(self, output):
        return json.loads(output)["version"]


def run(prefix, command):
    command = [*prefix, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def drop_from_cache(path):
    """Lets the system read the file anew: pages that were cached while a file was written are small and scattered,
    those that were read are large, as after any restart, and reading weights through them is up to 1.7 times as fast."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prepared(arguments, shape, pair):
    """The files of both, made unless they are there; none where the shape has no such file."""
    kind, recipe = PAIRS[pair]
    folder = pathlib.Path(arguments.dir)
    folder.mkdir(parents=True, exist_ok=True)
    theirs = folder / f"{shape}-{kind}.gguf"
    ours = folder / f"{shape}-{pair}.nybl"

    def make(path, kind):
        if path.exists():
            return True
        part = path.with_suffix(".part")
        print(f"writing {path.name}", file=sys.stderr)
        if not models.write(part, shape, kind):
            part.unlink(missing_ok=True)
            return False
        os.rename(part, path)
        return True

    if not make(theirs, kind):
        return None
    if not ours.exists():
        source = theirs if recipe is None else folder / f"{shape}-f16.gguf"
        make(source, "f16")
        print(f"converting {source.name} to {ours.name}", file=sys.stderr)
        if recipe is None:
            command = [arguments.nybl, "convert", source, ours]
        else:
            bits, group = recipe
            command = [arguments.nybl, "quantize", source, ours, "--bits", bits, "--group", group, "--table-bits", 4, "--method", "rtn"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            print(f"{pair}: {done.stderr.strip()}", file=sys.stderr)
            return None
    return theirs, ours


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, help="folder for the models, kept for the next run")
    parser.add_argument("--nybl", default="target/release/nybl")
    parser.add_argument("--llama-bench", help="llama.cpp's llama-bench")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--models", default="tinyllama-1.1b,llama-3.2-1b,qwen2.5-0.5b", help="among: " + ", ".join(models.SHAPES))
    parser.add_argument("--pairs", default="int4-g32,int4-g128,int8", help="among: " + ", ".join(PAIRS))
    parser.add_argument("--tests", default="decode64,prefill128,prefill512", help="as decode64, prefill512@4096, decode32x4@4096:i8, load")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--best", action="store_true", help="the best of all rounds instead of the median, where others use the machine, too")
    parser.add_argument("--prefix", default="", help="put in front of every command, such as 'taskset -c 0,1'")
    parser.add_argument("--isa", help="nybl's rows, as avx2, beside a llama.cpp that was built for the same")
    parser.add_argument("--llama-flags", default="", help="more flags for llama-bench, such as '--repack 0'")
    arguments = parser.parse_args()

    ours = Nybl(arguments)
    peer = None
    if arguments.llama_bench:
        peer = LlamaBench(arguments.llama_bench)
        peer.extra = shlex.split(arguments.llama_flags)
    elif arguments.llama_python:
        peer = LlamaPython(arguments.llama_python)
    else:
        print("llama.cpp: skipped: neither --llama-bench nor --llama-python", file=sys.stderr)
    prefix = shlex.split(arguments.prefix)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    version = None
    rows, loads = [], []
    for shape in arguments.models.split(","):
        for pair in arguments.pairs.split(","):
            files = prepared(arguments, shape, pair)
            if files is None:
                print(f"{shape} {pair}: skipped", file=sys.stderr)
                continue
            for file in files:
                drop_from_cache(file)
            # Each reads its file once before anything counts.
            run(prefix, ours.command(files[1], "decode1", 1))
            if peer:
                run(prefix, peer.command(files[0], "decode1", 1))
            for test in arguments.tests.split(","):
                for threads in map(int, arguments.threads.split(",")):
                    samples, rates = [], []
                    if test == LOAD:
                        for _ in range(arguments.rounds):
                            samples.append(ours.load_seconds(prefix, files[1], threads))
                            if peer:
                                seconds, output = peer.load_seconds(prefix, files[0], threads)
                                rates.append(seconds)
                                version = version or peer.version(output)
                        loads.append((shape, pair, threads, PAIRS[pair][0], statistics.median(rates) if rates else None, statistics.median(samples)))
                        print(*loads[-1], file=sys.stderr)
                        continue
                    for _ in range(arguments.rounds):
                        samples.append(ours.rate(run(prefix, ours.command(files[1], test, threads)), test))
                        if peer:
                            output = run(prefix, peer.command(files[0], test, threads))
                            rates.append(peer.rate(output))
                            version = version or peer.version(output)
                    middle = max if arguments.best else statistics.median
                    rate, limit, _ = (middle([s[i] for s in samples]) if samples[0][i] else None for i in range(3))
                    share = rate * samples[0][2] * samples[0][1] / samples[0][0] / limit if limit else None
                    theirs = middle(rates) if rates else None
                    rows.append((shape, pair, test, threads, PAIRS[pair][0], theirs, rate, limit, share))
                    print(*rows[-1], file=sys.stderr)

    name = f"llama.cpp {version} ({peer.name})" if peer else "llama.cpp (skipped)"
    print(f"{cpu}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}; {'best' if arguments.best else 'medians'} of {arguments.rounds}; {name}, "
          f"flash attention on{', ' + arguments.llama_flags if arguments.llama_flags else ''}"
          f"{'; nybl with ' + arguments.isa if arguments.isa else ''}\n")
    if loads:
        print("| model | weights | threads | llama.cpp s | nybl s | times as fast |\n|---|---|---|---|---|---|")
    for shape, pair, threads, kind, theirs, mine in loads:
        both = f"{theirs:.2f} | {mine:.3f} | {theirs / mine:.1f}" if theirs else f"skipped | {mine:.3f} |"
        print(f"| {shape} | {kind} / {pair} | {threads} | {both} |")
    if loads and rows:
        print()
    if rows:
        print("| model | weights | test | threads | llama.cpp tok/s | nybl tok/s | ratio | nybl of the limit | limit |")
        print("|---|---|---|---|---|---|---|---|---|")
    for shape, pair, test, threads, kind, theirs, rate, limit, share in rows:
        unit = "GB/s" if test.startswith("decode") else "GOP/s"
        print(f"| {shape} | {kind} / {pair} | {test} | {threads} | {f'{theirs:.1f}' if theirs else 'skipped'} | {rate:.1f} | "
              f"{f'{rate / theirs:.2f}' if theirs else ''} | {f'{share:.0%}' if share else ''} | {f'{limit:.0f} {unit}' if limit else ''} |")


if __name__ == "__main__":
    main()
