"""GGUF files of real shapes with random weights: what a benchmark multiplies is of no account, its size is.

Blocks are random bytes whose scales keep activations finite. `pure` files have every matrix in one type, so that two
programs that read the same file read the same bits for each weight.
"""
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFWriter

# layers, width, heads, KV heads, width of a head, feed-forward width, vocabulary, tied head, context, RoPE base
SHAPES = {
    "tinyllama-1.1b": ("llama", 22, 2048, 32, 4, 64, 5632, 32000, False, 32768, 1e4),
    "llama-3.2-1b": ("llama", 16, 2048, 32, 8, 64, 8192, 128256, True, 32768, 5e5),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, 32768, 1e6),
    # For a look at whether everything works.
    "small": ("llama", 2, 256, 4, 2, 64, 512, 1024, False, 32768, 1e4),
}

# Weights and bytes of a block, and the places of its f16 scales.
BLOCKS = {
    "q4_0": (T.Q4_0, 32, 18, [0]),
    "q8_0": (T.Q8_0, 32, 34, [0]),
    "q3_k": (T.Q3_K, 256, 110, [108]),
    "q4_k": (T.Q4_K, 256, 144, [0, 2]),
}
# So that a row of random codes has about unit length: the spread of the codes, times that of the scales inside a block.
SPREAD = {"q4_0": 4.6, "q8_0": 74.0, "q3_k": 2.3 * 18, "q4_k": 4.6 * 36}


def matrix(kind, n, k, random):
    """Bytes of an `n` by `k` matrix, `[n, bytes of a row]`; of one with blocks that do not fit the row, none."""
    _, weights, size, scales = BLOCKS[kind]
    if k % weights:
        return None
    blocks = np.frombuffer(random.bytes(n * k // weights * size), np.uint8).reshape(-1, size).copy()
    scale = np.frombuffer(np.float16(1 / (SPREAD[kind] * k**0.5)).tobytes(), np.uint8)
    for at in scales:
        blocks[:, at : at + 2] = scale
    return blocks.reshape(n, -1)


def write(path, shape, kind):
    """Writes a file; `kind` is `f16` or one of `BLOCKS`, for all matrices. False where the shape has rows that are
    no whole blocks."""
    arch, layers, width, heads, kv_heads, head, ff, vocab, tied, context, base = SHAPES[shape]
    random = np.random.default_rng(42)
    writer = GGUFWriter(path, arch)
    writer.add_name(f"{shape} {kind} random")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(base)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")

    def add(name, n, k):
        if kind == "f16":
            # A stretch of numbers again and again: half a minute less, and no kernel minds.
            stretch = (random.standard_normal(1 << 22) / k**0.5).astype(np.float16)
            writer.add_tensor(name, np.resize(stretch, (n, k)))
            return True
        data = matrix(kind, n, k, random)
        if data is not None:
            writer.add_tensor(name, data, raw_dtype=BLOCKS[kind][0])
        return data is not None

    def vector(name, n, value):
        writer.add_tensor(name, np.full(n, value, np.float32))

    q, kv = heads * head, kv_heads * head
    whole = add("token_embd.weight", vocab, width)
    for layer in range(layers):
        for name, n, k in [
            ("attn_q", q, width),
            ("attn_k", kv, width),
            ("attn_v", kv, width),
            ("attn_output", width, q),
            ("ffn_gate", ff, width),
            ("ffn_up", ff, width),
            ("ffn_down", width, ff),
        ]:
            whole = whole and add(f"blk.{layer}.{name}.weight", n, k)
        if not whole:
            return False
        vector(f"blk.{layer}.attn_norm.weight", width, 1)
        vector(f"blk.{layer}.ffn_norm.weight", width, 1)
        if arch == "qwen2":
            for name, n in [("q", q), ("k", kv), ("v", kv)]:
                vector(f"blk.{layer}.attn_{name}.bias", n, 0)
    vector("output_norm.weight", width, 1)
    if not tied:
        add("output.weight", vocab, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return True
