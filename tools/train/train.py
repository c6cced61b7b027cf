"""Trains one model of the demo pair on what prepare.py wrote.

    train.py data target out/target --seconds 300
    train.py data draft out/draft --seconds 120 --teacher out/target

The draft learns from the target's distribution as much as from the books: what it must guess is the target's next
token. The learning rate falls along a cosine over the given time, whatever the machine; the folder is rewritten every
minute, so that a run that is cut leaves a model. Prints one JSON object a line.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import llama

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", type=Path)
parser.add_argument("size", choices=llama.SIZES)
parser.add_argument("out", type=Path)
parser.add_argument("--seconds", type=float, default=300, help="time for training, compilation not counted")
parser.add_argument("--batch", type=int, default=64, help="sequences a step")
parser.add_argument("--context", type=int, default=1024, help="tokens a sequence")
parser.add_argument("--rate", type=float, default=3e-3)
parser.add_argument("--decay", type=float, default=0.1)
parser.add_argument("--dropout", type=float, default=0.0)
parser.add_argument("--teacher", type=Path, help="a trained folder to learn from")
parser.add_argument("--seed", type=int, default=1)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(args.seed)
torch.set_float32_matmul_precision("high")


def stream(split):
    ids = np.fromfile(args.data / f"{split}.bin", dtype=np.uint16)
    return torch.from_numpy(ids.astype(np.int32)).to(device)


train, val = stream("train"), stream("val")
model = llama.Llama(llama.SIZES[args.size], args.dropout).to(device)
compiled = torch.compile(model) if device == "cuda" else model
teacher = None
if args.teacher:
    teacher = llama.load(args.teacher).to(device, torch.bfloat16).eval().requires_grad_(False)
    teacher = torch.compile(teacher) if device == "cuda" else teacher

matrices = [w for name, w in model.named_parameters() if w.dim() == 2 and "embed" not in name]
others = [w for name, w in model.named_parameters() if w.dim() != 2 or "embed" in name]
# Muon turns the update of a matrix orthogonal, and learns more from a small corpus than AdamW.
optimisers = [
    torch.optim.Muon(matrices, lr=args.rate, weight_decay=args.decay, adjust_lr_fn="match_rms_adamw"),
    torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda"),
]
generator = torch.Generator(device).manual_seed(args.seed)
span = torch.arange(args.context + 1, device=device)


def batch():
    start = torch.randint(0, len(train) - args.context, (args.batch, 1), generator=generator, device=device)
    return train[start + span].long()


def loss_of(ids):
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = compiled(ids[:, :-1]).flatten(0, 1)
    loss = F.cross_entropy(logits.float(), ids[:, 1:].flatten())
    if teacher is None:
        return loss, loss
    with torch.no_grad():
        wanted = F.log_softmax(teacher(ids[:, :-1]).flatten(0, 1).float(), -1)
    given = F.log_softmax(logits.float(), -1)
    return 0.2 * loss + 0.8 * F.kl_div(given, wanted, log_target=True, reduction="batchmean"), loss


loss_of = torch.compile(loss_of) if device == "cuda" else loss_of


def step(rate):
    loss, shown = loss_of(batch())
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
    return shown.detach()


@torch.no_grad()
def held_out(first=0, end=None):
    """Nats a token over consecutive windows; each window's first half is context alone."""
    model.eval()
    part, half, total, count = val[first:end], args.context // 2, 0.0, 0
    for begin in range(0, len(part) - args.context, half):
        ids = part[begin : begin + args.context + 1].long()[None]
        seen = 0 if begin == 0 else half
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(ids[:, :-1])
        total += F.cross_entropy(logits[0, seen:].float(), ids[0, 1 + seen :], reduction="sum").item()
        count += args.context - seen
    model.train()
    return total / count


def say(**what):
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in what.items()}), flush=True)


def write():
    llama.save(model, args.out)
    shutil.copy(args.data / "tokenizer.json", args.out)


say(parameters=sum(w.numel() for w in model.parameters()), device=device,
    name=torch.cuda.get_device_name() if device == "cuda" else "cpu", torch=torch.__version__)
for _ in range(3):  # compiles, and teaches nothing
    step(0.0)
started, saved, shown, steps, mean = time.time(), time.time(), 0.0, 0, None
while (elapsed := time.time() - started) < args.seconds:
    done = elapsed / args.seconds
    warm = min(1.0, done / 0.03)
    loss = step(args.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))))
    steps += 1
    mean = loss if mean is None else 0.98 * mean + 0.02 * loss
    if time.time() - shown > 10:
        torch.cuda.synchronize() if device == "cuda" else None
        shown = time.time()
        tokens = steps * args.batch * args.context
        say(seconds=shown - started, tokens=tokens, epochs=tokens / len(train), loss=mean.item())
    if time.time() - saved > 60:
        saved = time.time()
        write()
        say(seconds=saved - started, held_out=held_out(0, 100_000))
write()
say(tokens=steps * args.batch * args.context, seconds=time.time() - started, held_out=held_out())
for line in (args.data / "books.tsv").read_text().splitlines()[1:]:
    split, first, end, author, title = line.split("\t")
    if split == "val":
        say(title=title, author=author, tokens=int(end) - int(first), perplexity=math.exp(held_out(int(first), int(end))))
