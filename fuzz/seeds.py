#!/usr/bin/env python3
"""Puts seeds for every target into corpus/: real files of the project, and of ../shared where it lies beside the
checkout. `fuzz/seeds.py [--ours] [NYBL]`; NYBL is the program, which packs the seeds of `packed`
(default: target/release/nybl). With --ours nothing of others gets in: seeds/ grows from that.
"""
import json
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAMILIES = ROOT / "ffi-tests/data/families"
SHARED = ROOT.parent / "shared"
ARGUMENTS = [argument for argument in sys.argv[1:] if argument != "--ours"]
NYBL = ARGUMENTS[0] if ARGUMENTS else ROOT / "target/release/nybl"


def put(target, name, data):
    folder = ROOT / "fuzz/corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seed-{name}").write_bytes(data)


def gguf(pairs, tensors):
    """A GGUF file of version 3: values are (type, bytes), tensors (name, shape, type, bytes)."""
    text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    for key, (kind, value) in pairs.items():
        head += text(key) + struct.pack("<I", kind) + value
    body = b""
    for name, shape, kind, data in tensors:
        head += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
        head += struct.pack("<IQ", kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def tiny(kind, block, k):
    """A Llama of one layer and four tokens with matrices of one type, of small random codes."""
    rng = random.Random(kind)
    text = lambda s: (8, struct.pack("<Q", len(s)) + s.encode())
    number = lambda n: (4, struct.pack("<I", n))
    tokens = ["<unk>", "<s>", "</s>", "a"]
    pairs = {
        "general.architecture": text("llama"),
        "llama.context_length": number(16),
        "llama.embedding_length": number(k),
        "llama.block_count": number(1),
        "llama.feed_forward_length": number(k),
        "llama.attention.head_count": number(k // 16),
        "llama.attention.layer_norm_rms_epsilon": (6, struct.pack("<f", 1e-5)),
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 4) + b"".join(text(t)[1] for t in tokens)),
        "tokenizer.ggml.scores": (9, struct.pack("<IQ4f", 6, 4, 0, 0, 0, -1)),
        "tokenizer.ggml.token_type": (9, struct.pack("<IQ4i", 5, 4, 2, 3, 3, 1)),
        "tokenizer.ggml.bos_token_id": number(1),
        "tokenizer.ggml.eos_token_id": number(2),
    }
    # Bytes below 0x3c keep every f16 among them below one.
    data = lambda n: bytes(rng.randrange(0x3C) for _ in range(n * k // block[0] * block[1]))
    vector = struct.pack(f"<{k}f", *[1] * k)
    tensors = [("token_embd.weight", (k, 4), kind, data(4)), ("output_norm.weight", (k,), 0, vector)]
    for part in ("attn_norm", "ffn_norm"):
        tensors.append((f"blk.0.{part}.weight", (k,), 0, vector))
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensors.append((f"blk.0.{part}.weight", (k, k), kind, data(k)))
    return gguf(pairs, tensors)


BLOCKS = {
    "F16": (1, (1, 2)), "Q4_0": (2, (32, 18)), "Q4_1": (3, (32, 20)), "Q5_0": (6, (32, 22)), "Q5_1": (7, (32, 24)),
    "Q8_0": (8, (32, 34)), "Q2_K": (10, (256, 84)), "Q3_K": (11, (256, 110)), "Q4_K": (12, (256, 144)),
    "Q5_K": (13, (256, 176)), "Q6_K": (14, (256, 210)), "BF16": (30, (1, 2)),
}  # fmt: skip


def files_of(folder):
    """A folder as the target `folder` reads it: the weights by their header alone."""
    data = (folder / "model.safetensors").read_bytes()
    header = data[8 : 8 + struct.unpack_from("<Q", data)[0]]
    return b"\n=== config.json\n" + (folder / "config.json").read_bytes() + b"\n=== header\n" + header


def head_of(path):
    """The head of a packed file, and an even byte: lengths and checksum are to be put right."""
    data = path.read_bytes()
    return data[: struct.unpack_from("<Q", data, 24)[0]] + b"\0"


def shortened(path, keep):
    """A tokenizer.json with its first tokens and those merges that they can make."""
    full = json.loads(path.read_text())
    vocab = {token: i for token, i in full["model"]["vocab"].items() if i < keep}
    pairs = [m if isinstance(m, list) else m.split(" ") for m in full["model"]["merges"]]
    known = lambda m: m[0] in vocab and m[1] in vocab and m[0] + m[1] in vocab
    full["model"] |= {"vocab": vocab, "merges": [m for m in pairs if known(m)]}
    full["added_tokens"] = [t for t in full["added_tokens"] if t["id"] < keep]
    return json.dumps(full, ensure_ascii=False).encode()


BYTES = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġa": 4, "<s>": 5},
              "merges": [["a", "b"], ["Ġ", "a"]]},
    "added_tokens": [{"id": 5, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": True}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
}  # fmt: skip
SPACES = {
    "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
              "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3, "▁": 4, "a": 5, "▁a": 6},
              "merges": ["▁ a"]},
    "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": True} for i, t in enumerate(["<unk>", "<s>", "</s>"])],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "pre_tokenizer": None,
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
}  # fmt: skip
TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] | trim +"
    " '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "tools": "{%- if tools is defined and tools %}{% for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}"
    "{% endif %}{%- for m in messages %}{% set loop_first = loop.first %}{%- if m.role not in ['user', 'system'] %}"
    "{{ raise_exception('no ' ~ m.role) }}{% endif %}{{ bos_token ~ m['content'].strip()[:10] | upper }}{% endfor %}",
    "macro": "{% macro f(x, n=3) %}{{ x * n }}{% endmacro %}{% set ns = namespace(a='', i=0) %}{% for m in messages "
    "recursive %}{% set ns.a = ns.a ~ m.role %}{{ f(m.role) }}{% if loop.index is divisibleby(2) %}{% continue %}"
    "{% endif %}{% endfor %}{{ ns.a.split('e') | join(', ') }}{{ strftime_now('%d %b %Y') }}{{ range(3) | list }}",
}


def main():
    for name, (kind, block) in BLOCKS.items():
        put("gguf", name, tiny(kind, block, max(32, block[0])))
    for path in sorted(FAMILIES.glob("*/model.gguf")):
        put("gguf", path.parent.name, path.read_bytes())
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        source, packed = work / "m.gguf", work / "m.nybl"
        for name, (kind, block) in BLOCKS.items():
            source.write_bytes(tiny(kind, block, max(32, block[0])))
            subprocess.run([NYBL, "convert", source, packed], check=True, capture_output=True)
            put("packed", name, head_of(packed))
        source.write_bytes(tiny(*BLOCKS["F16"], 32))
        for bits in ("2", "3", "4"):
            subprocess.run([NYBL, "convert", source, packed, "--bits", bits, "--zero-points"],
                           check=True, capture_output=True)  # fmt: skip
            put("packed", f"q{bits}z", head_of(packed))
    for folder in sorted(path.parent for path in FAMILIES.glob("*/config.json")):
        put("folder", folder.name, files_of(folder))
    text = "Once upon a <s>time</s> é 🦀\n\n  aab".encode()
    for name, file in (("bytes", BYTES), ("spaces", SPACES)):
        put("tokenizer", name, json.dumps(file, ensure_ascii=False).encode() + b"\0" + text)
    for name in () if "--ours" in sys.argv else ("smollm2", "gpt2"):
        path = SHARED / "tokenizers" / name / "tokenizer.json"
        if path.exists():
            put("tokenizer", name, shortened(path, 400) + b"\0" + text)
    for name, template in TEMPLATES.items():
        put("template", name, template.encode() + b"\0")
    rng = random.Random(1)
    for target in ("kernels", "verifier", "vocabulary", "session", "kv_ops"):
        for index in range(12):
            put(target, index, bytes(rng.randrange(256) for _ in range(64 << index % 6)))


main()
