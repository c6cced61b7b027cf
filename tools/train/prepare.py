"""Turns an archive of books in Markdown into a tokenizer and streams of token ids.

    prepare.py books.tar.xz data

writes to `data`: tokenizer.json (byte-level BPE), train.bin and val.bin (uint16 ids), train.txt and val.txt (what
they were made of), books.tsv (which book is where). Whole books are held out, by title: no sentence of a validation
book is ever trained on. A chapter is a document: `<|begin|>`, its prose, `<|end|>`.
"""

import argparse
import re
import tarfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HELD_OUT = {
    "The Beasts of Tarzan",
    "Emily of New Moon",
    "An Ideal Husband",
    "Great Expectations",
    "The Captain of the Pole-Star",
}
BEGIN, END = "<|begin|>", "<|end|>"
# A shorter piece between two headings is a title page, a motto or a table of contents.
SHORTEST_CHAPTER = 400

PLAIN = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--",
    "\u2026": "...", "\u00a0": " ", "\ufeff": None, "\r": None,
})


def books(archive):
    """Author, title and text of every book, in the order of their names."""
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if m.name.endswith(".md")), key=lambda m: m.name)
        for member in members:
            author, title = Path(member.name).stem.strip().split("__", 1)
            yield author, title.strip(), tar.extractfile(member).read().decode("utf-8", errors="replace")


def chapters(text):
    """The prose between headings, without Markdown."""
    text = text.translate(PLAIN)
    # Title, author and year stand before the first rule.
    text = text.partition("-------")[2] or text
    for chapter in re.split(r"^#+.*$", text, flags=re.M):
        chapter = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", chapter)
        chapter = re.sub(r"^[ \t]*(?:[-*_]{3,}|[>|].*)$", "", chapter, flags=re.M)
        chapter = re.sub(r"[*_\\]+", "", chapter)
        chapter = re.sub(r"[ \t]+", " ", chapter)
        chapter = re.sub(r" *\n *", "\n", chapter)
        chapter = re.sub(r"\n{3,}", "\n\n", chapter).strip()
        if len(chapter) >= SHORTEST_CHAPTER:
            yield chapter


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocabulary", type=int, default=4096)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    library = [(author, title, list(chapters(text))) for author, title, text in books(args.archive)]
    held_out = {title for _, title, _ in library} & HELD_OUT
    if held_out != HELD_OUT:
        raise SystemExit(f"{args.archive} lacks held-out books: {sorted(HELD_OUT - held_out)}")
    training = [chapter for _, title, parts in library if title not in HELD_OUT for chapter in parts]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(training, trainer)
    tokenizer.save(str(args.out / "tokenizer.json"))
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)

    rows = []
    for split in "train", "val":
        ids, count = [], 0
        with open(args.out / f"{split}.txt", "w") as plain:
            for author, title, parts in library:
                if (title in HELD_OUT) != (split == "val"):
                    continue
                first = count
                for encoded in tokenizer.encode_batch(parts, add_special_tokens=False):
                    ids.append(np.array([begin, *encoded.ids, end], dtype=np.uint16))
                    count += len(ids[-1])
                plain.writelines(part + "\n\n" for part in parts)
                rows.append((split, first, count, author, title))
        np.concatenate(ids).tofile(args.out / f"{split}.bin")
        letters = (args.out / f"{split}.txt").stat().st_size
        print(f"{split}: {count} tokens, {letters / count:.2f} bytes a token")
    with open(args.out / "books.tsv", "w") as table:
        table.write("split\tfirst_token\tend_token\tauthor\ttitle\n")
        table.writelines("\t".join(map(str, row)) + "\n" for row in rows)


if __name__ == "__main__":
    main()
