#!/usr/bin/env python3
"""What the hot loops of the Arm rows cost on cores that are not at hand, by llvm-mca's models.

    kernels/mca.py [--asm FILE] [--mca llvm-mca-22] [--show] [NAME ...]

Compiles the crate for aarch64, cuts one whole quantisation group (dots, scales and all) out of each
kernel as the compiler emitted it, and prints multiply-adds per cycle. This is a MODEL AND NO
MEASUREMENT: everything hits the first-level cache, every branch is predicted, and a model may have
fewer pipes than its core. It ranks variants of a loop; it does not say how fast a phone is. Needs
llvm-mca of LLVM 22: for LLVM 19 the large cores have half their pipes.
"""

import argparse
import collections
import os
import re
import subprocess
import sys

CORES = ["cortex-x4", "cortex-a725", "cortex-a720", "cortex-a520"]
TARGET = "aarch64-unknown-linux-gnu"
# Groups simulated one after the other: enough that the first does not count.
REPEAT = 30
# Values of `k` in a group.
GROUPS = (32, 128)

# A kernel: its name, module and function of the source, the instruction of the hot loop, the kind of
# offset, and the numbers of activation rows to report. All need two of the instruction for each `k`
# of 32 outputs and, of activations, one row (SDOT) or two (SMMLA).
Kernel = collections.namedtuple("Kernel", "name module function dot kind rows")
KERNELS = [
    Kernel("q4-matmul-dotprod", "dotprod", "q4_walk", "sdot", "0", [1, 2, 4, 8]),
    Kernel("q4z-matmul-dotprod", "dotprod", "q4_walk", "sdot", "1", [1, 2, 4, 8]),
    Kernel("q4m-matmul-dotprod", "dotprod", "q4_walk", "sdot", "2", [1, 2, 4, 8]),
    Kernel("q8-matmul-dotprod", "dotprod", "q8_walk", "sdot", None, [1, 2, 4, 8]),
    Kernel("q4-matmul-i8mm", "i8mm", "q4_walk", "smmla", "0", [2, 4, 8]),
    Kernel("q4z-matmul-i8mm", "i8mm", "q4_walk", "smmla", "1", [2, 4, 8]),
    Kernel("q4m-matmul-i8mm", "i8mm", "q4_walk", "smmla", "2", [2, 4, 8]),
    Kernel("q8-matmul-i8mm", "i8mm", "q8_walk", "smmla", None, [4, 8]),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--asm", help="assembly with v0 symbols, to read instead of compiling")
    parser.add_argument("--mca", default="llvm-mca-22")
    parser.add_argument("--show", action="store_true", help="print the instructions as well")
    parser.add_argument("names", nargs="*", help="part of the names of the kernels to report")
    args = parser.parse_args()
    bodies = functions(args.asm or compile_to_assembly())
    print("Multiply-adds per cycle by llvm-mca: a model, not a measurement.")
    print(f"{'kernel':20} {'rows':>4} {'group':>5}" + "".join(f"{core:>13}" for core in CORES))
    for kernel in KERNELS:
        if args.names and not any(name in kernel.name for name in args.names):
            continue
        for rows in kernel.rows:
            found = find(bodies, kernel, rows)
            for group in GROUPS:
                trace = whole_group(*found, kernel, rows, group)
                if args.show:
                    print("\n".join(trace))
                macs = 32 * rows * group
                rates = [macs * REPEAT / cycles(args.mca, core, trace) for core in CORES]
                columns = "".join(f"{rate:13.1f}" for rate in rates)
                print(f"{kernel.name:20} {rows:4} {group:5}" + columns, flush=True)


def compile_to_assembly():
    """The path of the crate's assembly, built from the sources as they are."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    target = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(root, "target")), "mca")
    command = ["cargo", "rustc", "--release", "--lib", "--no-default-features", "--quiet"]
    command += ["--target", TARGET, "--target-dir", target, "--", "--emit", "asm"]
    command += ["-C", "codegen-units=1", "-C", "symbol-mangling-version=v0"]
    subprocess.run(command, cwd=root, check=True)
    folder = os.path.join(target, TARGET, "release", "deps")
    files = [os.path.join(folder, f) for f in os.listdir(folder) if re.match(r"nybl-\w+\.s$", f)]
    return max(files, key=os.path.getmtime)


def functions(path):
    """Bodies by symbol: labels as 'name:', and instructions without directives and comments."""
    bodies, name = {}, None
    with open(path, encoding="utf-8") as file:
        for line in file:
            start = re.match(r"(_R\w+):", line)
            if start:
                name = start.group(1)
                bodies[name] = []
            elif line.startswith("\t.size"):
                name = None
            elif name:
                text = line.split("//")[0].strip()
                if text and (text.startswith(".LBB") or not text.startswith(".")):
                    bodies[name].append(text)
    return bodies


def find(bodies, kernel, rows):
    """The flow of the instance for so many rows, and how many walks it takes over a line."""
    kind = "" if kernel.kind is None else f"Kh{kernel.kind}_"
    # The second number is a reference back where it is the same as the first.
    size = rows if kernel.dot == "sdot" else (rows + 1) // 2
    numbers = rf"Kj{size:x}_(?:Kj(\d)_|KB\w*?_)"
    pattern = rf"{len(kernel.module)}{kernel.module}\w*{kernel.function}{numbers}{kind}E"
    for symbol, body in bodies.items():
        found = re.search(pattern, symbol)
        if found:
            vectors = 8 if kernel.function == "q8_walk" else 4
            return Flow(body), vectors // int(found.group(1) or size)
    sys.exit(f"no function for {kernel.name} with {rows} rows")


class Flow:
    """The control flow of one function; a place is an index into its lines."""

    def __init__(self, body):
        self.body = body
        self.labels = {line[:-1]: i for i, line in enumerate(body) if line.endswith(":")}

    def jump(self, i):
        """Where the jump at `i` goes, or None."""
        found = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\s.*?(\.LBB\w+)$", self.body[i])
        return self.labels.get(found.group(1)) if found else None

    def after(self, i):
        """The places that may follow `i`."""
        if re.match(r"(ret|br|brk|udf)\b", self.body[i]):
            return []
        target = self.jump(i)
        if target is None:
            return [i + 1] if i + 1 < len(self.body) else []
        return [target] if re.match(r"b\s", self.body[i]) else [target, i + 1]

    def way(self, start, goal, without=()):
        """The shortest way from `start` to `goal` (not included) that takes no step of `without`."""
        before, queue = {start: None}, collections.deque([start])
        while queue:
            i = queue.popleft()
            for j in self.after(i):
                if (i, j) in without:
                    continue
                if j == goal:
                    way = [i]
                    while before[way[-1]] is not None:
                        way.append(before[way[-1]])
                    return way[::-1]
                if j not in before:
                    before[j] = i
                    queue.append(j)
        return None

    def hot_loops(self, dot):
        """The loops with dots and without a loop inside, as ranges of places."""
        loops = [(self.jump(i), i) for i in range(len(self.body)) if (self.jump(i) or i) < i]
        inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        return [range(a, b + 1) for a, b in inner if self.count(dot, range(a, b))]

    def count(self, dot, places):
        """How many dots there are at `places`."""
        return sum(self.body[i].startswith(dot) for i in places)

    def with_side_loops(self, way, turns):
        """`way` with every loop on it run so many times instead of once."""
        places = []
        for i in way:
            places.append(i)
            head = self.jump(i)
            if head is not None and head < i and way[-1] != i and head in places:
                places += places[len(places) - 1 - places[::-1].index(head) :] * (turns - 1)
        return places


def whole_group(flow, walks, kernel, rows, group):
    """The instructions of one group in the order they run: each walk over the lines takes a hot loop
    as often as its dots need, then the way to the next walk's, and at last to the next group's. Every
    other loop on the way takes 32 values of `k` at a time."""
    hot = flow.hot_loops(kernel.dot)
    dots = 2 * group * (rows if kernel.dot == "sdot" else (rows + 1) // 2) // walks
    places, closing = [], []
    for walk in range(walks):
        loop, after = hot[walk % len(hot)], hot[(walk + 1) % len(hot)]
        turns = dots // flow.count(kernel.dot, loop)
        assert turns * flow.count(kernel.dot, loop) == dots, f"{kernel.name}: an odd loop"
        if walk + 1 == walks:
            after = hot[0]
        way = flow.way(loop[-1] + 1, after[0], closing if walk + 1 == walks else ())
        # Where one loop does several walks, the jump back to it is not the one to the next group.
        if len(hot) == 1:
            closing = [s for s in zip(way, way[1:] + [after[0]]) if s[1] < s[0]][:1]
        places += list(loop) * turns + flow.with_side_loops(way, group // 32)
    return [flow.body[i] for i in places if not flow.body[i].endswith(":")]


def cycles(mca, core, trace):
    """The cycles that `core` takes for `REPEAT` times the `trace`."""
    command = [mca, f"-mtriple={TARGET}", f"-mcpu={core}", "-mattr=+dotprod,+i8mm"]
    command += [f"-iterations={REPEAT}"]
    done = subprocess.run(command, input="\n".join(trace), capture_output=True, text=True, check=False)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if not total:
        sys.exit(f"{mca} failed:\n{done.stderr}")
    return int(total.group(1))


if __name__ == "__main__":
    main()
