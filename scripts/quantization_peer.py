#!/usr/bin/env python3
"""Quantises a Llama folder with llama.cpp, and writes the dequantised weights as folders that nybl runs.

    python3 -m venv v && v/bin/pip install gguf==0.19.0 safetensors
    v/bin/python scripts/quantization_peer.py MODEL LIBLLAMA OUT

LIBLLAMA is the path of libllama.so. OUT/Q4_0, OUT/Q4_K_M and OUT/Q3_K_M are Hugging Face folders in f32, to be
compared by `nybl perplexity OUT/Q4_0 TEXT --reference MODEL`: weights as llama.cpp rounds them, no importance
matrix, activations in f32. Prints the bits per weight of each.
"""
import ctypes
import json
import pathlib
import shutil
import sys

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

FTYPES = {"Q4_0": 2, "Q4_K_M": 15, "Q3_K_M": 12, "Q4_K_S": 14, "Q3_K_S": 11}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
model, library, out = map(pathlib.Path, sys.argv[1:])
config = json.loads((model / "config.json").read_text())


def gguf_name(name):
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{PARTS[rest.removesuffix('.weight')]}.weight"


# Rows are rounded one by one, so their order inside a head, which differs in GGUF, does not matter.
tensors = {name: x.astype(np.float32) for name, x in load_file(model / "model.safetensors").items()}
out.mkdir(parents=True, exist_ok=True)
source = out / "f32.gguf"
writer = gguf.GGUFWriter(source, "llama")
writer.add_block_count(config["num_hidden_layers"])
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
for name, x in tensors.items():
    writer.add_tensor(gguf_name(name), x)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

llama = ctypes.CDLL(str(library))


class Parameters(ctypes.Structure):
    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("rest", ctypes.c_byte * 512)]


llama.llama_model_quantize_default_params.restype = Parameters
for name, ftype in FTYPES.items():
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = ftype
    file = out / f"{name}.gguf"
    failed = llama.llama_model_quantize(bytes(source), bytes(file), ctypes.byref(parameters))
    if failed:
        raise SystemExit(f"llama.cpp refuses {name}")
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    weights, bits, layer_weights, layer_bits = {}, 0, 0, 0
    for hf_name, x in tensors.items():
        tensor = stored[gguf_name(hf_name)]
        weights[hf_name] = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(x.shape).astype(np.float32)
        if x.ndim == 2:
            bits += tensor.n_bytes * 8
            if tensor.name.startswith("blk."):
                layer_bits += tensor.n_bytes * 8
                layer_weights += x.size
    folder = out / name
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    shutil.copy(model / "tokenizer.json", folder)
    total = sum(x.size for x in tensors.values() if x.ndim == 2)
    print(f"{name}: {layer_bits / layer_weights:.3f} bits per weight in the layers, {bits / total:.3f} in all")
