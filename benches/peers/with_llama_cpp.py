#!/usr/bin/env python3
"""Times llama.cpp through PyPI's llama-cpp-python, one sample: FILE decode|prefill|load COUNT DEPTH f16|i8 THREADS.

The C functions of the package, not its `Llama` class, whose own work would be part of the time. Prints a JSON object.
"""
import json
import sys
import time

import llama_cpp as c

file, what, count, depth, kv, threads = sys.argv[1:]
count, depth, threads = int(count), int(depth), int(threads)
silent = c.llama_log_callback(lambda *_: None)
c.llama_log_set(silent, None)
c.llama_backend_init()
model = c.llama_model_load_from_file(file.encode(), c.llama_model_default_params())
if not model:
    sys.exit(f"{file}: llama.cpp does not load it")
params = c.llama_context_default_params()
params.n_ctx = depth + count + 64
params.n_batch, params.n_ubatch = 2048, 512
params.n_threads = params.n_threads_batch = threads
params.flash_attn_type = 1
params.type_k = params.type_v = {"f16": 1, "i8": 8}[kv]
context = c.llama_init_from_model(model, params)
if not context:
    sys.exit("llama.cpp makes no context with these settings")
vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))


def eval_tokens(total, piece):
    done = 0
    while done < total:
        size = min(piece, total - done)
        tokens = (c.llama_token * size)(*((done + i) * 7919 % vocab for i in range(size)))
        if c.llama_decode(context, c.llama_batch_get_one(tokens, size)):
            sys.exit("llama_decode failed")
        done += size
    c.llama_synchronize(context)


memory = c.llama_get_memory(context)
if what != "load":
    # Once to warm up, as llama-bench does.
    eval_tokens(1 if what == "decode" else count, 2048)
    c.llama_memory_clear(memory, False)
eval_tokens(depth, 2048)
start = time.perf_counter()
eval_tokens(count, 1 if what == "decode" else 2048)
seconds = time.perf_counter() - start
print(json.dumps({"tokens_per_second": count / seconds, "version": f"of llama-cpp-python {c.__version__}"}))
