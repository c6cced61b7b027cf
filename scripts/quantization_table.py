#!/usr/bin/env python3
"""Regenerates the table of src/docs/quantization.md: every method at every width on a trained model.

    cargo build --release
    scripts/quantization_table.py NAME MODEL CALIBRATION TEST [--results FILE] [--write]

MODEL is the path of a float checkpoint, a Hugging Face folder or a GGUF file; those of most models in the tables are not in the
repository. CALIBRATION and TEST are disjoint texts. A width that the shapes do not allow (narrow matrices are
padded, which a budget of bits may not have room for) is left empty. Rows that the results file (JSON) holds
are not run again, so a run that was stopped goes on. With --write the section NAME of the page is
replaced, else it is printed.
"""
import argparse
import json
import pathlib
import re
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "src/docs/quantization.md"
WIDTHS = {
    "w4 g128": ["--bits", "4", "--group", "128"],
    "w4 g32": ["--bits", "4", "--group", "32"],
    "w3 g128": ["--bits", "3", "--group", "128"],
    "w3 g64": ["--bits", "3", "--group", "64"],
    "w3 g32": ["--bits", "3", "--group", "32"],
    "mixed 3.5": ["--mixed", "3.5", "--group", "128"],
}
METHODS = ["rtn", "awq", "gptq", "best"]

arguments = argparse.ArgumentParser()
for name in ["name", "model", "calibration", "test"]:
    arguments.add_argument(name)
arguments.add_argument("--results", default="target/quantization.json")
arguments.add_argument("--tokens", default="16384", help="most tokens of calibration")
arguments.add_argument("--context", default="256", help="tokens in a window of both texts")
arguments.add_argument("--windows", default="64", help="most windows of the test")
arguments.add_argument("--nybl", default=str(ROOT / "target/release/nybl"))
arguments.add_argument("--write", action="store_true")
args = arguments.parse_args()


class Refused(Exception):
    pass


def nybl(*words):
    done = subprocess.run([args.nybl, *words, "--json"], capture_output=True, text=True)
    if "a budget of" in done.stderr:
        raise Refused
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def measured(file):
    windows = ["--context", args.context, "--windows", args.windows]
    return nybl("perplexity", file, args.test, "--reference", args.model, *windows)


def row(width, method, folder):
    file = f"{folder}/out.nybl"
    # Plain rounding has no calibration, except to spend a budget by.
    calibration = ["--calib", args.calibration, "--tokens", args.tokens, "--context", args.context]
    calibration = [] if method == "rtn" and "mixed" not in width else calibration
    made = nybl("quantize", args.model, file, "--method", method, *WIDTHS[width], *calibration)
    keys = ["perplexity", "reference_perplexity", "kl_divergence", "top1_agreement", "tokens"]
    all_measured = measured(file)
    return {key: all_measured[key] for key in keys} | {
        key: made[key] for key in ["layer_bits_per_weight", "bits_per_weight", "bytes"]
    }


path = pathlib.Path(args.results)
path.parent.mkdir(parents=True, exist_ok=True)
results = json.loads(path.read_text()) if path.exists() else {}
mine = results.setdefault(args.name, {})
with tempfile.TemporaryDirectory() as folder:
    for width in WIDTHS:
        for method in METHODS:
            if f"{width} {method}" not in mine:
                try:
                    mine[f"{width} {method}"] = row(width, method, folder)
                except Refused:
                    break
                path.write_text(json.dumps(results, indent=1))

any_row = next(iter(mine.values()))
lines = [
    f"f32: perplexity {any_row['reference_perplexity']:.3f} on {any_row['tokens']} tokens of the test text in windows "
    f"of {args.context}; calibration on at most {args.tokens} tokens.",
    "",
    "| | bits per weight: layers, all | rtn | awq | gptq | best |",
    "|---|---|---|---|---|---|",
]
for width in WIDTHS:
    if f"{width} {METHODS[-1]}" not in mine:
        lines.append(f"| {width} | - |" + " - |" * len(METHODS))
        continue
    cells = []
    for method in METHODS:
        it = mine[f"{width} {method}"]
        loss = 100 * (it["perplexity"] / it["reference_perplexity"] - 1)
        agreement = 100 * it["top1_agreement"]
        cell = f"{it['perplexity']:.3f} ({loss:+.2f}%) {it['kl_divergence']:.4f} {agreement:.1f}%"
        cells.append(f"**{cell}**" if method == "best" else cell)
    bits = f"{it['layer_bits_per_weight']:.3f}, {it['bits_per_weight']:.3f}"
    lines.append(f"| {width} | {bits} | " + " | ".join(cells) + " |")
section = "\n".join(lines)
if args.write:
    marks = f"<!-- table: {args.name} -->\n", "<!-- end -->"
    pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
    text, count = re.subn(pattern, lambda _: marks[0] + section + "\n" + marks[1], PAGE.read_text(), flags=re.S)
    if count != 1:
        raise SystemExit(f"{PAGE}: no section {args.name}")
    PAGE.write_text(text)
else:
    print(section)
