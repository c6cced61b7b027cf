#!/usr/bin/env python3
"""Makes families/: tiny random models of every family, with the logits that Hugging Face gives for them.

    python3 -m venv v && v/bin/pip install torch==2.9.1 transformers==4.57.6 gguf==0.19.0
    v/bin/python ffi-tests/data/families.py

A case is a folder as `save_pretrained` writes it (bf16 weights), `logits.npy` (f32, computed in f32 from the
rounded weights, on the CPU, attention `eager`) for the first `len(logits)` of `families/ids.json`, and for
some `model.gguf` with the same weights, its tensors named by the `gguf` package. Shapes are odd on purpose:
heads that are not `hidden / heads` long, groups of query heads, windows and rotary limits inside the text.
"""
import json
import math
import pathlib
import shutil

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

HERE = pathlib.Path(__file__).parent / "families"
VOCAB, LENGTH = 40, 72
SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=96, rms_norm_eps=1e-5,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
GEMMA = SMALL | dict(intermediate_size=24, tie_word_embeddings=True, head_dim=14)
PHI = {k: v for k, v in SMALL.items() if k != "head_dim"} | dict(num_attention_heads=2, num_key_value_heads=1)

CASES = {
    "llama2": ("llama", SMALL),
    "llama3": ("llama", SMALL | dict(
        tie_word_embeddings=True, rope_theta=5e4,
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                          original_max_position_embeddings=24))),
    "llama-linear": ("llama", SMALL | dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "smollm2": ("llama", SMALL | dict(
        tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1, rope_theta=1e5)),
    "mistral": ("mistral", SMALL | dict(sliding_window=7)),
    "qwen2": ("qwen2", SMALL | dict(
        num_hidden_layers=3, tie_word_embeddings=True, rope_theta=1e6, use_sliding_window=True,
        sliding_window=9, max_window_layers=1)),
    "qwen2-yarn": ("qwen2", SMALL | dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24))),
    "qwen3": ("qwen3", SMALL | dict(rope_theta=1e6)),
    "gemma2": ("gemma2", GEMMA | dict(
        num_hidden_layers=3, sliding_window=5, attn_logit_softcapping=4.0, final_logit_softcapping=3.0,
        query_pre_attn_scalar=20)),
    "gemma3": ("gemma3_text", GEMMA | dict(
        num_hidden_layers=7, sliding_window=6, query_pre_attn_scalar=14, rope_theta=1e6,
        rope_local_base_freq=1e4, rope_scaling=dict(rope_type="linear", factor=8.0))),
    "phi3": ("phi3", PHI | dict(sliding_window=11)),
    "phi3-longrope": ("phi3", PHI | dict(
        original_max_position_embeddings=48, partial_rotary_factor=0.75,
        rope_scaling=dict(type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
                          long_factor=[1.0, 1.5, 3.0, 6.0, 9.0, 12.0]))),
    "smollm3": ("smollm3", SMALL | dict(num_hidden_layers=5, intermediate_size=24, rope_theta=2e6)),
}  # fmt: skip
# Lengths besides LENGTH: at the edge of the original context, where the short factors still hold.
EXTRA_LENGTHS = {"phi3-longrope": [48]}
# Cases that are written as GGUF as well, and its name for the architecture.
IN_GGUF = {
    "llama3": "llama", "qwen2-yarn": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3",
    "phi3-longrope": "phi3", "smollm3": "smollm3",
}  # fmt: skip


def randomise(model, gemma):
    """Weights large enough that every part shows in the logits, rounded to bf16."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(0, 1.3 / math.sqrt(p.shape[1]))
            elif name.endswith("bias"):
                p.normal_(0, 0.5)
            else:
                p.normal_(0 if gemma else 1, 0.2)
            p.copy_(p.bfloat16().float())


def save_npy(path, array):
    np.save(path, array.astype("<f4"))


def permuted(w, heads):
    """Rows of each head from halves to neighbouring pairs, as GGUF has them for Llama."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, arch, model, c):
    """The conventions of llama.cpp's converter for the architectures used here."""
    kind = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(kind, c.num_hidden_layers)
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_theta)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    scaling = c.rope_scaling or {}
    if arch != "phi3":
        w.add_key_length(head)
        w.add_value_length(head)
    if arch == "gemma3":
        w.add_sliding_window(c.sliding_window)
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(scaling["factor"])
    if arch == "gemma2":
        w.add_attention_scale(c.query_pre_attn_scalar**-0.5)
        w.add_sliding_window(c.sliding_window)
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
        w.add_final_logit_softcapping(c.final_logit_softcapping)
    if scaling.get("rope_type") == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(scaling["factor"])
        w.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if arch in ("llama", "smollm3"):
        w.add_rope_dimension_count(head)
    if arch == "llama":
        w.add_vocab_size(c.vocab_size)
        # Two divisors of each wave are the same; the package has no function for them.
        from transformers.modeling_rope_utils import _compute_default_rope_parameters, _compute_llama3_parameters
        plain, _ = _compute_default_rope_parameters(c, "cpu")
        stretched, _ = _compute_llama3_parameters(c, "cpu")
        w.add_tensor("rope_freqs.weight", (plain / stretched).numpy().astype(np.float32))
    if arch == "phi3":
        w.add_rope_dimension_count(int(head * c.partial_rotary_factor))
        w.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
        scale = c.max_position_embeddings / c.original_max_position_embeddings
        w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(c.original_max_position_embeddings)))
        for which in ("long", "short"):
            w.add_tensor(f"rope_factors_{which}.weight", np.array(scaling[f"{which}_factor"], dtype=np.float32))
    for name, p in model.named_parameters():
        a = p.detach().numpy()
        if arch in ("llama", "smollm3") and "q_proj" in name:
            a = permuted(a, c.num_attention_heads)
        if arch in ("llama", "smollm3") and "k_proj" in name:
            a = permuted(a, c.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            a = a + 1
        stem, _, suffix = name.rpartition(".")
        new = names.get_name(stem) + "." + suffix
        if a.ndim == 1:
            w.add_tensor(new, a.astype(np.float32))
        else:
            bf16 = gguf.GGMLQuantizationType.BF16
            w.add_tensor(new, gguf.quants.quantize(a.astype(np.float32), bf16), raw_dtype=bf16)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    ids = [(i * i * 7 + i * 3 + 5) % VOCAB for i in range(LENGTH)]
    (HERE / "ids.json").write_text(json.dumps(ids) + "\n")
    for index, (case, (kind, settings)) in enumerate(CASES.items()):
        torch.manual_seed(1000 + index)
        folder = HERE / case
        config = CONFIG_MAPPING[kind](**settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        randomise(model, kind.startswith("gemma"))
        for length in [LENGTH, *EXTRA_LENGTHS.get(case, [])]:
            with torch.no_grad():
                logits = model(torch.tensor([ids[:length]]), use_cache=False).logits[0]
            folder.mkdir(exist_ok=True)
            save_npy(folder / ("logits.npy" if length == LENGTH else f"logits-{length}.npy"), logits.numpy())
        if case in IN_GGUF:
            write_gguf(folder / "model.gguf", IN_GGUF[case], model, config)
        model.to(torch.bfloat16).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        print(case, f"std {logits.std():.2f}", f"top {logits.abs().max():.2f}",
              sum(f.stat().st_size for f in folder.iterdir()))


if __name__ == "__main__":
    main()
