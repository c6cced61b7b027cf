#!/usr/bin/env python3
"""How many instructions a token takes by each row for Arm, counted under qemu-user.

    scripts/instructions.py            print the report
    scripts/instructions.py --write    write it into src/docs/instructions.md
    scripts/instructions.py --check    fail where a row takes more instructions than the page says
    scripts/instructions.py --show dotprod
                                       the functions that a row spends them in

Builds the program for aarch64 and runs the model inside it, on one thread and without drafts, on CPUs that have
the instructions of one row each. scripts/instructions.c counts. What is reported is the difference of two runs
that are alike but for their lengths, so start and end cancel out. This is a COUNT AND NO TIME: an
instruction may take a cycle or a hundred. Needs aarch64-linux-gnu-gcc, and a qemu-aarch64 with plugins.
"""

import argparse
import collections
import concurrent.futures
import functools
import json
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REPORT = os.path.join(ROOT, "src", "docs", "instructions.md")
TARGET = "aarch64-unknown-linux-gnu"
QEMU = "qemu-aarch64"
# Versions of the plugin API that may come; a qemu takes those between its oldest and its newest.
APIS = range(1, 20)

# A CPU that has what the row needs and nothing that a faster row does; where there is none, a mask. `isa` is what
# the program then says it uses, `step` and `prompt` find the functions that most instructions must lie in.
Row = collections.namedtuple("Row", "name cpu mask isa step prompt")
SVE = r"^(nybl_sve_matmul|dots\d)"
ROWS = [
    Row("scalar", "cortex-a72", "scalar", "scalar", "kernel::scalar::matmul", "kernel::scalar::matmul"),
    Row("neon", "cortex-a72", "", "portable+neon", "kernel::neon::part", "kernel::neon::part"),
    Row("dotprod", "cortex-a76", "", "portable+neon+dotprod", "kernel::dotprod::part", "kernel::dotprod::tile"),
    # One row of activations alone is left to dotprod.
    Row("i8mm", "max,sve=off", "", "portable+neon+dotprod+i8mm", "kernel::dotprod::part", "kernel::i8mm::tile"),
    Row("sve, 128 bits", "max,sve-default-vector-length=16", "neon+sve", "neon+sve", SVE, SVE),
    Row("sve, 256 bits", "max,sve-default-vector-length=32", "neon+sve", "neon+sve", SVE, SVE),
    Row("sve, 512 bits", "a64fx", "", "portable+neon+sve", SVE, SVE),
]
# The row that others are compared with.
BASE = "neon"

# A prompt of next to nothing, and one of as many tokens as make the rows work on many at once.
SHORT = "It"
LONG = "It was a dark and stormy night, and the stars were hidden behind the clouds over the sea. " * 2
# Tokens to write: the first comes with the prompt, every other one takes a step.
FEW, SOME = 1, 9
# How far a count may be above the page's: compilers differ a little, a lost optimisation by more.
MORE = 1.05

Run = collections.namedtuple("Run", "functions prompt weights")
# Instructions by function for one token, the lengths of both prompts, and bytes of weights.
Cost = collections.namedtuple("Cost", "step prompt lengths weights")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--show", metavar="ROW")
    args = parser.parse_args()
    rows = [row for row in ROWS if args.show in (None, row.name)]
    if not rows:
        sys.exit(f"no row is named {args.show!r}; there are: {'; '.join(row.name for row in ROWS)}")
    program = build()
    with tempfile.TemporaryDirectory() as folder:
        count = functools.partial(cost, Counter(program, folder))
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            costs = dict(zip(rows, pool.map(count, rows)))
    if args.show:
        show(*costs.popitem())
        return
    text = report(costs)
    print(text)
    if args.check:
        with open(REPORT, encoding="utf-8") as file:
            kept = passes(table(file.read()), table(text))
        if not kept:
            sys.exit(1)
    if args.write:
        with open(REPORT, "w", encoding="utf-8") as file:
            file.write(text)


def build():
    """The path of the program, built from the sources as they are."""
    target = os.path.join(ROOT, os.environ.get("CARGO_TARGET_DIR", "target"))
    name = TARGET.upper().replace("-", "_")
    env = {
        **os.environ,
        f"CARGO_TARGET_{name}_LINKER": "aarch64-linux-gnu-gcc",
        # Static, because qemu-user then needs no libraries of that machine.
        f"CARGO_TARGET_{name}_RUSTFLAGS": "-C target-feature=+crt-static",
    }
    command = ["cargo", "build", "--quiet", "--release", "--target", TARGET, "--target-dir", target, "--bin", "nybl"]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    return os.path.join(target, TARGET, "release", "nybl")


class Counter:
    """Runs the program and counts."""

    def __init__(self, program, folder):
        self.program, self.folder = program, folder
        self.plugin = self.load()

    def load(self):
        """The path of the plugin, compiled for the oldest version of the API that this qemu takes."""
        path = os.path.join(self.folder, "instructions.so")
        compiler = [os.environ.get("CC", "cc"), "-std=c11", "-O2", "-Wall", "-Werror", "-shared", "-fPIC"]
        source = os.path.join(ROOT, "scripts", "instructions.c")
        for api in APIS:
            subprocess.run([*compiler, f"-DPLUGIN_API={api}", source, "-o", path], check=True)
            done = subprocess.run([QEMU, "-plugin", path, self.program, "--version"], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return path
        sys.exit(f"{QEMU} takes no plugin:\n{done.stderr}")

    def run(self, row, prompt, write):
        """One run that reads the prompt and writes so many tokens."""
        with tempfile.NamedTemporaryFile("r", dir=self.folder, encoding="utf-8", errors="replace") as log:
            command = [QEMU, "-cpu", row.cpu, "-plugin", self.plugin, "-d", "plugin", "-D", log.name]
            command += [self.program, "run", "--json", "--temp", "0", "--threads", "1", "--draft", "off"]
            command += ["-n", str(write), "-p", prompt]
            env = {"NYBL_ISA": row.mask}
            done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                sys.exit(f"{row.name}: {' '.join(command)} failed:\n{done.stderr}")
            functions = collections.Counter()
            for line in log:
                found = re.match(r"nybl: (\d+) (\d+) (.+)$", line)
                if found:
                    functions[found[3]] += int(found[1]) * int(found[2])
        said = json.loads(done.stdout)
        if said["isa"] != row.isa:
            sys.exit(f"{row.name}: the program ran {said['isa']}, not {row.isa}")
        if len(said["ids"]) != write:
            sys.exit(f"{row.name}: {len(said['ids'])} tokens instead of {write}: the model ended, take another text")
        weights = said["bytes"]["weights_private"] + said["bytes"]["weights_mapped"]
        return Run(demangled(functions), len(said["prompt_ids"]), weights)


def cost(counter, row):
    """What a token costs by this row."""
    short = counter.run(row, SHORT, FEW)
    written = counter.run(row, SHORT, SOME)
    long = counter.run(row, LONG, FEW)
    step = difference(written, short, SOME - FEW)
    prompt = difference(long, short, long.prompt - short.prompt)
    for what, functions, wanted in [("a step", step, row.step), ("a prompt", prompt, row.prompt)]:
        share = spent(functions, wanted) / spent(functions)
        if share < 0.5:
            sys.exit(f"{row.name}: {share:.1%} of {what} in {wanted}: that row was not taken")
    return Cost(step, prompt, (short.prompt, long.prompt), short.weights)


def demangled(functions):
    """The same by names as they stand in the sources."""
    done = subprocess.run(["c++filt"], input="\n".join(functions), capture_output=True, text=True, check=True)
    result = collections.Counter()
    for name, count in zip(done.stdout.split("\n"), functions.values()):
        result[re.sub(r"(::h[0-9a-f]{16}|\[[0-9a-f]+\])(?=\W|$)", "", name)] += count
    return result


def difference(more, less, tokens):
    """Instructions by function that a token made."""
    functions = {name: more.functions[name] - less.functions[name] for name in more.functions | less.functions}
    return collections.Counter({name: count / tokens for name, count in functions.items()})


def spent(functions, names=""):
    """Instructions in functions whose names match."""
    return sum(count for name, count in functions.items() if re.search(names, name))


def report(costs):
    """The page of the documentation."""
    version = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    some = next(iter(costs.values()))
    base = next(cost for row, cost in costs.items() if row.name == BASE)
    out = [
        "# Instructions of a token on Arm",
        "",
        f"How many instructions a token takes by each row for Arm: the model inside the program ({some.weights / 1e6:.1f} MB of weights, int4",
        "g128 with a table of int8), counted under qemu-user, on one thread and without drafts. Written by `just instructions`;",
        f"CI counts again and fails where a row takes over {MORE - 1:.0%} more than here.",
        "",
        "**A count and no time.** An instruction may take a cycle or a hundred, and memory does not exist. But a count does not",
        "depend on the machine or on what else it does, so it shows what a change lost or gained where no such core is at hand.",
        "",
        "- *step*: a token that is written, by the forward pass over one row of activations, the choice of the token and its text.",
        f"  The mean of {SOME - FEW} after a prompt of {some.lengths[0]}, so there is next to no attention.",
        f"- *prompt*: a token of a prompt of {some.lengths[1]}, with its share of decoding the weights, and the tokenizer's work.",
        "- *a weight byte*: instructions of a step by the bytes of weights, all of which a step reads.",
        "",
        "Starting and ending are left out: each is the difference of two runs.",
        "",
        f"rustc {version}.",
        "",
        f"| row | CPU | step, millions | over {BASE} | a weight byte | prompt, millions | over {BASE} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, cost in costs.items():
        step, prompt = spent(cost.step), spent(cost.prompt)
        cells = [row.name, f"`{row.cpu}`", f"{step / 1e6:.2f}", f"{step / spent(base.step):.2f}"]
        cells += [f"{step / cost.weights:.2f}", f"{prompt / 1e6:.2f}", f"{prompt / spent(base.prompt):.2f}"]
        out.append("| " + " | ".join(cells) + " |")
    out += [
        "",
        "More than half of each figure must lie in the row's own functions, or the script fails: a row that was not taken is not",
        "counted as if it were. A step of i8mm is one of dotprod, to which single rows are left; it differs in what the C",
        "library takes to clear memory on that CPU. At 128 bits SVE takes more instructions than dotprod for the same products, and",
        "its loops are made for 512 bits: where a core has both, dotprod and i8mm are taken (`docs/kernels.md`).",
        "`scripts/instructions.py --show dotprod` lists the functions in which the instructions are.",
        "",
    ]
    return "\n".join(out)


def table(page):
    """Instructions of a step and of a token of a prompt, in millions, by row, as a page has them."""
    rows = re.findall(r"^\| ([^|]+) \| `[^|]+` \| ([\d.]+) \| [^|]+ \| [^|]+ \| ([\d.]+) \|", page, re.MULTILINE)
    return {name: {"step": float(step), "prompt": float(prompt)} for name, step, prompt in rows}


def passes(written, counted):
    """Whether nothing takes too many instructions; tells what does, and what takes far fewer."""
    failures = []
    for name, figures in counted.items():
        for what, figure in figures.items():
            page = written.get(name, {}).get(what)
            if page is None:
                failures.append(f"{name}, {what}: the page has no such figure; `just instructions` writes it")
            elif figure > page * MORE:
                failures.append(f"{name}, {what}: {figure} million instructions, {figure / page - 1:.1%} more than the page's {page}")
            elif figure * MORE < page:
                print(f"{name}, {what}: only {figure} million instructions, the page has {page}: `just instructions`, and commit it.")
    print("\n".join(failures) or f"No row takes over {MORE - 1:.0%} more than src/docs/instructions.md says.")
    return not failures


def show(row, cost):
    """Prints the functions that cost most."""
    for what, functions in [("step", cost.step), ("token of a prompt", cost.prompt)]:
        total = spent(functions)
        print(f"{row.name}, one {what}: {total:,.0f} instructions")
        for name, count in functions.most_common(20):
            print(f"{count:15,.0f} {count / total:6.1%}  {name}")


if __name__ == "__main__":
    main()
