#!/usr/bin/env python3
"""What the inner loops of the Arm rows cost on cores that are not at hand, by llvm-mca's models.

    kernels/mca.py            print the report
    kernels/mca.py --write    write it into src/docs/arm.md
    kernels/mca.py --check    fail where a figure is below its threshold
    kernels/mca.py --show 'dotprod::part::<Q4, 1,' 128
                              the instructions of one group

Compiles the crate for aarch64, cuts one whole quantisation group (dots, scales and all) out of each
function as the compiler emitted it, and counts multiply-adds a cycle. Of the ways through the end of a
group it takes that of symmetric weights. This is a MODEL AND NO MEASUREMENT: everything hits the
first-level cache, every branch is predicted, and a model may have fewer pipes than its core. It ranks
variants of a loop; it does not say how fast a phone is. Needs llvm-mca of LLVM 22: for LLVM 19 the large
cores have half their pipes.
"""

import argparse
import collections
import functools
import math
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REPORT = os.path.join(ROOT, "src", "docs", "arm.md")
MCA, FILT = "llvm-mca-22", "llvm-cxxfilt-22"
CORES = ["cortex-x4", "cortex-a725", "cortex-a520"]
TARGET = "aarch64-unknown-linux-gnu"
# Groups simulated one after the other: enough that the first does not count.
REPEAT = 30
# Values of `k` in a group.
GROUPS = [32, 128]
# Rows of activations that stand for many.
MANY = 128

# Rows of a panel, and by instruction set and number of rows what `part` is named after: for dotprod vectors and
# fields, for i8mm vectors, fields and halves of a vector.
PANEL = {"q4": 32, "q3": 128, "q2": 64, "q8": 32}
SHAPES = {
    ("dotprod", 1): {"q8": (4, 2), "q4": (4, 2), "q3": (1, 8), "q2": (2, 4)},
    ("dotprod", 4): {"q8": (1, 2), "q4": (1, 2), "q3": (1, 2), "q2": (1, 2)},
    ("i8mm", 4): {"q8": (1, 2, 2), "q4": (1, 2, 2), "q3": (1, 2, 2), "q2": (1, 2, 2)},
    ("i8mm", 8): {"q8": (1, 2, 1), "q4": (1, 2, 1), "q3": (1, 2, 1), "q2": (1, 2, 1)},
}
# Outputs that share what is laid out of the activations of few rows.
LAID = 256

# Others' kernels by the same model, from the assembly or the intrinsics that they ship, compiled by clang:
# (cores in the order above). KleidiAI at 495f652, ggml at d99724f, torchao at 36027d8, XNNPACK at 75db3c0, T-MAC at
# 7042f8f. "Loop only" leaves out what they do once a group, which flatters them.
OTHERS = {
    ("q4", 1, 32): "KleidiAI qai8dxp1x4_qsi4c32p8x4, 1x8 dotprod: 24.2 / 12.1 / 4.8; ggml q4_0 4x4: 20.1 / 10.6 / 2.7",
    ("q4", 1, 128): "the same of KleidiAI: 29.6 / 14.8 / 5.8; XNNPACK qb4w 1x16c4, loop only: 31.6 / 15.9 / 6.4",
    ("q4", MANY, 32): "KleidiAI qai8dxp_qsi4c32p8x8, 4x8 i8mm: 45.3 / 22.7 / 15.5; ggml q4_0 4x8 i8mm: 45.4 / 22.7 / 9.4",
    ("q4", MANY, 128): "the same of KleidiAI: 69.9 / 35.0 / 20.7",
    ("q3", 1, 128): "torchao 1x8x16, 3 bits, loop only: 14.9 / 7.5 / 3.6; ggml q3_K (groups of 16): 7.2 / 4.1 / 0.9",
    ("q2", 1, 128): "torchao 1x8x16, 2 bits, loop only: 16.4 / 8.2 / 3.3; T-MAC W2: 26.3 / 13.6 / 6.8",
}

Line = collections.namedtuple("Line", "code isa rows group")

# What must not be lost, in multiply-adds a cycle on each core; None where nothing is asked for.
LEAST = {
    Line("q4", "dotprod", 1, 32): (27, 14.5, 6.5),
    Line("q4", "dotprod", 1, 128): (37, 19, 8.3),
    Line("q3", "dotprod", 1, 128): (26, None, None),
    Line("q4", "dotprod", 4, 32): (37.8, 19.3, 9.4),
    Line("q4", "dotprod", 4, 128): (50.3, 25.3, 13.5),
    Line("q4", "i8mm", 4, 32): (50.5, 25.8, 12.2),
    Line("q4", "i8mm", 4, 128): (72, 36.2, 19.7),
    Line("q4", "i8mm", 8, 32): (55.4, 28.2, 11.3),
    Line("q4", "i8mm", 8, 128): (83.5, 42.1, 18.5),
    Line("q4", "i8mm", MANY, 32): (56, None, None),
    Line("q4", "i8mm", MANY, 128): (90, None, None),
}
# The most that more rows may cost of what one costs, on the first core: four rows for a weight line alone, which is
# the difference of two group sizes, and with the end of a group; then eight rows with that.
WHAT = ["four rows for a line", "four for a group of 32", "four for one of 128", "eight for one of 32", "eight for one of 128"]
RATIOS = {
    ("q4", "dotprod"): (3.0, 3.03, 3.01, 6.06, 6.02),
    ("q4", "i8mm"): (2.0, 2.25, 2.1, 4.1, 3.61),
    ("q3", "dotprod"): (2.33, 2.46, 2.38, 4.92, 4.75),
    ("q3", "i8mm"): (1.78, 1.98, 1.86, 3.33, 2.9),
    ("q2", "dotprod"): (2.86, 2.83, 2.85, 5.66, 5.7),
    ("q2", "i8mm"): (2.0, 2.2, 2.08, 3.82, 3.39),
    ("q8", "dotprod"): (2.96, 3.57, 3.14, 7.14, 6.28),
    ("q8", "i8mm"): (2.22, 2.95, 2.46, 5.36, 4.26),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--asm", help="assembly with v0 symbols, to read instead of compiling")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--show", nargs=2, metavar=("FUNCTION", "GROUP"))
    args = parser.parse_args()
    model = Model(functions(args.asm or compile_to_assembly()))
    if args.show:
        for name, flow in model.flows.items():
            if args.show[0] in name:
                print(name, *model.trace(flow, int(args.show[1]), name), sep="\n")
        return
    rates = {line: model.rates(line) for line in lines()}
    ratios = {(code, isa): model.ratios(rates, code, isa) for code in PANEL for isa in ["dotprod", "i8mm"]}
    text = report(rates, ratios)
    print(text)
    if args.write:
        with open(REPORT, "w", encoding="utf-8") as file:
            file.write(text)
    if args.check:
        with open(REPORT, encoding="utf-8") as file:
            if file.read() != text:
                print("src/docs/arm.md has other figures; `just mca` writes it anew.")
        if not passes(rates, ratios):
            sys.exit(1)


def lines():
    """What is reported, in order."""
    for code in PANEL:
        for rows in [1, 4, 8, MANY]:
            for isa in ["dotprod"] if rows == 1 else ["dotprod", "i8mm"]:
                for group in GROUPS:
                    yield Line(code, isa, rows, group)


def report(rates, ratios):
    """The page of the documentation."""
    version = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    out = [
        "# The Arm rows by llvm-mca",
        "",
        "Multiply-adds a cycle of one core, from the assembly that rustc emitted, scales and all, by the models of LLVM",
        "22. Written by `just mca`; CI computes it again and fails below the thresholds in `kernels/mca.py`.",
        "",
        "**A model and no measurement.** Everything hits the first-level cache, every branch is predicted, memory does",
        "not exist. It ranks loops, and shows what is left once memory is not the limit; it does not say how fast a phone",
        "is. A figure includes the end of each group with its scales and, for many rows, the decoding of a panel, shared",
        f"by {MANY} rows, and the laying out of activations, once for 32 outputs and for few rows once for {LAID}. Left out is",
        "what happens once in several groups: outputs that go to registers and back. The cores stand for the large (X4, four",
        "vector pipes), the middle (A725, two) and the small in-order one (A520) of a phone. Others' figures are by the same",
        "models, from the assembly or intrinsics that they ship.",
        "",
        f"rustc {version}.",
        "",
        "| weights | rows | group | instructions | X4 | A725 | A520 | others, X4 / A725 / A520 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line, rate in rates.items():
        other = OTHERS.get((line.code, line.rows, line.group), "")
        if line.rows == MANY and line.isa != "i8mm":
            other = ""
        figures = " | ".join(f"{x:.1f}" for x in rate)
        rows = "many" if line.rows == MANY else line.rows
        out.append(f"| {line.code} | {rows} | {line.group} | {line.isa} | {figures} | {other} |")
    out += ["", "## What more rows cost", "", "Cycles on X4 over those for one row, whose weights are read once either way:", ""]
    out += ["| weights | instructions | four rows: codes alone | group of 32 | group of 128 | eight rows: 32 | 128 |", "|---|---|---|---|---|---|---|"]
    for (code, isa), figures in ratios.items():
        out.append(f"| {code} | {isa} | " + " | ".join(f"{x:.2f}" for x in figures) + " |")
    out += [
        "",
        "The first is what 96 more values of `k` cost within a group. A line of four bits costs one row four ANDs and eight",
        "SDOTs, and four rows four and 32, or with SMMLA 48 instructions for two lines: 3.0 and 2.0 times are what these",
        "instructions allow. SMMLA cannot have fewer: a line as it lies is no factor of it, so two lines are two ZIPs and two ANDs",
        "for every eight SMMLAs.",
        "",
        "The end of a group costs more than that. For four outputs it takes one row 5.5 operations of the vector pipes: the halves",
        "become floats (which counts twice), are multiplied with the scale of the row, the sums become floats by a subtraction",
        "(1.5, for the two fields of a byte) and are added. Four rows of i8mm take 14, twice for the halves and for each of four",
        "registers a product, a subtraction and an addition, none of which can go without another rounding. With the 12 and 24",
        "of a group of 32 that is 38 over 17.5, 2.17 times, and 2.06 with a group of 128; the rest is the laying out of",
        f"activations, once for {LAID} outputs. Eight bits need no AND, and one row then waits for loads, of which a core does",
        "three a cycle, and not for the vector pipes, whose work grows with the rows: the same count gives 3.5 times for dotprod with",
        "a group of 32. Eight rows share the ZIPs and ANDs of i8mm once more. Out of cache, all of it hides behind the",
        "reading of the weights.",
        "",
    ]
    return "\n".join(out)


def passes(rates, ratios):
    """Whether nothing is below its threshold; tells what is."""
    failures = []
    for line, least in LEAST.items():
        for core, rate, wanted in zip(CORES, rates[line], least):
            if wanted and rate < wanted:
                failures.append(f"{' '.join(map(str, line))} on {core}: {rate:.2f}, not {wanted}")
    for (code, isa), most in RATIOS.items():
        for what, ratio, limit in zip(WHAT, ratios[code, isa], most):
            if ratio > limit + 0.005:
                failures.append(f"{code} {isa}, {what} over one row: {ratio:.3f}, more than {limit}")
    print("\n".join(failures) or "Every threshold is kept.")
    return not failures


def compile_to_assembly():
    """The path of the crate's assembly, built from the sources as they are."""
    target = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "mca")
    command = ["cargo", "rustc", "--release", "--lib", "--no-default-features", "--quiet", "--crate-type", "lib"]
    command += ["--target", TARGET, "--target-dir", target, "--", "--emit", "asm"]
    command += ["-C", "codegen-units=1", "-C", "symbol-mangling-version=v0"]
    subprocess.run(command, cwd=ROOT, check=True)
    folder = os.path.join(target, TARGET, "release", "deps")
    files = [os.path.join(folder, f) for f in os.listdir(folder) if re.match(r"nybl-\w+\.s$", f)]
    return max(files, key=os.path.getmtime)


def functions(path):
    """Bodies by name, without the path to it: labels as 'name:', and instructions without directives and
    comments."""
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
    done = subprocess.run([FILT], input="\n".join(bodies), capture_output=True, text=True, check=True)
    names = [re.sub(r"nybl::(kernel::)?|arm_codes::", "", name) for name in done.stdout.split("\n")]
    return {name: Flow(body) for name, body in zip(names, bodies.values())}


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
        """The places that may follow `i`; a conversion does not, which symmetric weights have none of."""
        if re.match(r"(ret|br|brk|udf)\b", self.body[i]):
            return []
        target = self.jump(i)
        if target is None:
            places = [i + 1] if i + 1 < len(self.body) else []
        else:
            places = [target] if re.match(r"b\s", self.body[i]) else [target, i + 1]
        return [i for i in places if not self.body[i].startswith("scvtf")]

    def way(self, start, goal):
        """The shortest way from `start` to `goal` (not included)."""
        before, queue = {start: None}, collections.deque([start])
        while queue:
            i = queue.popleft()
            for j in self.after(i):
                if j == goal:
                    way = [i]
                    while before[way[-1]] is not None:
                        way.append(before[way[-1]])
                    return way[::-1]
                if j not in before:
                    before[j] = i
                    queue.append(j)
        sys.exit("a loop without a way back")

    def loops(self):
        """The loops without a loop inside, as ranges of places."""
        loops = [(self.jump(i), i) for i in range(len(self.body)) if (self.jump(i) or i) < i]
        inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        return [range(a, b + 1) for a, b in inner]

    def count(self, dot, places):
        """How many of the instruction there are at `places`."""
        return sum(self.body[i].startswith(dot) for i in places)

    def group(self, dot, count):
        """One turn of the outer loop around the loop that has `dot`, with so many of these in all."""
        (loop,) = [loop for loop in self.loops() if self.count(dot, loop)]
        turns = count // self.count(dot, loop)
        assert turns * self.count(dot, loop) == count, "an odd loop"
        return self.text(list(loop) * turns + self.way(loop[-1] + 1, loop[0]))

    def text(self, places):
        """The instructions at `places`."""
        return [self.body[i] for i in places if not self.body[i].endswith(":")]


class Model:
    """Cycles of the parts, put together."""

    def __init__(self, flows):
        self.flows = {name: flow for name, flow in flows.items() if re.match(r"(dotprod|i8mm|arm_matmul)::", name)}

    def rates(self, line):
        """Multiply-adds a cycle, for each core."""
        macs = line.rows * PANEL[line.code] * line.group
        return [macs / self.panel(line, core) for core in CORES]

    def ratios(self, rates, code, isa):
        """Cycles of more rows over those of one, in the order of `WHAT`."""
        one, four, eight = Line(code, "dotprod", 1, None), Line(code, isa, 4, None), Line(code, isa, 8, None)

        def alone(line):
            return self.walk(line._replace(group=128), CORES[0]) - self.walk(line._replace(group=32), CORES[0])

        def whole(line, group):
            return line.rows / rates[line._replace(group=group)][0]

        return [alone(four) / alone(one)] + [whole(line, group) / whole(one, group) for line in [four, eight] for group in GROUPS]

    def panel(self, line, core):
        """Cycles for one group of one panel."""
        if line.rows == MANY:
            return self.many(line, core)
        if (line.isa, line.rows) not in SHAPES:
            return line.rows // 4 * self.panel(line._replace(rows=4), core)
        return self.walk(line, core) + (self.lay(line, core) if line.rows > 1 else 0)

    def walk(self, line, core):
        """The same without the laying out of activations, for one row, four or eight."""
        shape = SHAPES[line.isa, line.rows][line.code]
        rows = line.rows // 2 if line.isa == "i8mm" else line.rows
        prefix = f"{line.isa}::part::<{line.code.upper()}, {rows}, {', '.join(map(str, shape))}, "
        parts = [name for name in self.flows if name.startswith(prefix)]
        whole = [name for name in parts if self.flows[name].loops()]
        vectors, fields, halves = (*shape, 2)[:3]
        assert len(whole) * fields * 16 == PANEL[line.code], prefix
        return sum(self.cycles(name, line.group, core) for name in whole) * 8 / (vectors * halves)

    def many(self, line, core):
        """Tiles of four rows by eight outputs; decoding once, laying activations out once for 32 outputs."""
        paired = line.isa == "i8mm"
        tiles = self.cycles(f"{line.isa}::tile", line.group, core) * MANY / 4 * 4
        gathers = self.gather(paired, line.group, core) * MANY / 4
        parts = range(PANEL[line.code] // 32)
        names = [f"arm_matmul::decode::<{line.code.upper()}, {str(paired).lower()}, {i}>" for i in parts]
        return len(parts) * (tiles + gathers) + sum(self.cycles(name, line.group, core) for name in names)

    def trace(self, flow, group, name):
        """The instructions of one group of the function."""
        numbers = [int(number) for number in re.findall(r"\b\d\b", name)]
        if name.startswith("arm_matmul::decode"):
            return self.decoding(flow, group)
        if name.endswith("tile"):
            return flow.group(*(("sdot", 2 * group) if "dotprod" in name else ("smmla", group)))
        *sums, _ = numbers
        each, dot = (4, "sdot") if "dotprod" in name else (8, "smmla")
        return flow.group(dot, math.prod(sums) * group // each)

    def decoding(self, flow, group):
        """One group of the loop that decodes eight `k` a turn, which is the one that loads vectors, and its
        tables."""

        def loads(loop):
            return flow.count("ldr\tq", loop) + 2 * flow.count("ldp\tq", loop)

        (loop,) = [loop for loop in flow.loops() if loads(loop)]
        assert loads(loop) in [8, 16, 24], "an odd loop"
        return flow.text(list(loop) * (group // 8) + flow.way(loop[-1] + 1, loop[0]))

    @functools.lru_cache(None)
    def cycles(self, name, group, core):
        """Cycles of one group of the function."""
        return simulate(core, self.trace(self.flows[name], group, name))

    @functools.lru_cache(None)
    def gather(self, paired, group, core):
        """Cycles of laying out one group of the activations of four rows."""
        flow = self.flows["arm_matmul::gather"]
        codes, *words = flow.loops()
        # Scales and sums, in pairs and else.
        places = list(codes) * (group // 16) + [*words[0], *words[1]] if paired else [*words[2], *words[3]]
        assert len(words) == 4, "other loops than these"
        return simulate(core, flow.text(places))

    @functools.lru_cache(None)
    def lay(self, line, core):
        """Cycles of laying out one group of the activations of few rows, the share of one panel."""
        paired = line.isa == "i8mm"
        fields = SHAPES[line.isa, line.rows][line.code][1]
        parameters = f"<{line.code.upper()}, {line.rows // 2 if paired else line.rows}, {fields}>"
        flow, text = self.flows[f"{line.isa}::lay::{parameters}"], []
        if paired:
            (codes,) = flow.loops()
            assert flow.count("zip1", codes) == line.rows // 2, "another loop than this"
            text = flow.text(list(codes) * (line.group // 16))
            flow = self.flows[f"i8mm::lay_words::{parameters}"]
        # For sums that are converted or for others; the longer one.
        words = max((flow.text(loop) for loop in flow.loops()), key=len)
        stored = sum({"stp\tx": 16, "str\tx": 8, "str\tq": 16, "stp\tq": 32}.get(line[:5], 0) for line in words)
        assert stored >= line.rows // (2 if paired else 1) * PANEL[line.code], "a loop of some rows only"
        return simulate(core, text + words) * PANEL[line.code] / LAID


def simulate(core, trace):
    """The cycles that `core` takes for the `trace`, when it runs many times."""
    command = [MCA, f"-mtriple={TARGET}", f"-mcpu={core}", "-mattr=+dotprod,+i8mm", f"-iterations={REPEAT}"]
    done = subprocess.run(command, input="\n".join(trace), capture_output=True, text=True, check=False)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if not total:
        sys.exit(f"{MCA} failed:\n{done.stderr}")
    return int(total.group(1)) / REPEAT


if __name__ == "__main__":
    main()
