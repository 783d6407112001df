"""The corpus (source text that ships with CPython) and the tokenizer trained on it.

Invariants:
- Nothing but the running interpreter's own standard library is read; site-packages never is.
- A document is held out, or not, by the hash of its text alone, so two copies of one text are
  always on the same side and a second run on the same interpreter splits the same way.
- Pieces cut out of a text, joined, are that text; no cut falls inside a special token.
- The tokenizer's alphabet holds every byte, so any text decodes back to itself exactly.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
EOS, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
EOS_ID, IM_START_ID, IM_END_ID = 0, 1, 2

HELD_OUT_PER_THOUSAND = 30
MAX_LESSON_CHARS = 2000

MEAN_PIECE_CHARS = 400
SPECIAL = re.compile("|".join(map(re.escape, (EOS, IM_START, IM_END))))
BEFORE_WORD = re.compile(r" (?=\S)")

# Tables of numbers and deliberately broken sources: many bytes, no Python style to learn.
SKIPPED_PARTS = frozenset({"site-packages", "dist-packages", "encodings", "cjkencodings", "data"})
SKIPPED_PREFIXES = ("bad_", "badsyntax_")

# Letters may take one leading mark (" self", ".append", "_name"); digits stand alone; a line
# break closes the punctuation before it ("):\n"); and the indentation of a line is one run of
# spaces less the last, which belongs to the word it precedes.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Corpus:
    """Texts to train on, function lessons in the chat format, and texts held out."""

    train: list[str]
    lessons: list[str]
    held_out: list[str]


def licence_text() -> str:
    """The licence that the corpus is under, to be kept with what is derived from it."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    return path.read_text(encoding="utf-8")


def _texts() -> Iterator[str]:
    """Yield the standard library's documents in path order, the language reference as prose."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS.intersection(relative.parts) or path.name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if relative.parts == ("pydoc_data", "topics.py"):
            # The file is one dict literal of help pages: the pages read better than the quoting.
            topics = ast.literal_eval(text[text.index("{") :])
            yield from (page for _, page in sorted(topics.items()))
        elif text.strip():
            yield text


def _lessons(text: str) -> Iterator[str]:
    """Yield each documented function of `text` as a question and an answer in the chat format."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
            continue
        summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
        source = lines[node.lineno - 1 : node.end_lineno]
        code = "".join(line[node.col_offset :] or "\n" for line in source).rstrip()
        if len(summary) > 8 and len(code) <= MAX_LESSON_CHARS:
            question = f"Write a Python function `{node.name}`: {summary}"
            yield f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{code}{IM_END}\n"


def load_corpus() -> Corpus:
    """Read the standard library, drop repeated texts and split off about 3 % by hash."""
    corpus = Corpus([], [], [])
    seen: set[bytes] = set()
    for text in _texts():
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_THOUSAND:
            corpus.held_out.append(text)
        else:
            corpus.train.append(text)
            corpus.lessons.extend(_lessons(text))
    return corpus


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train the byte-level BPE tokenizer; ids 0 to 2 are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus gave only {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def cut(text: str, rng: random.Random) -> list[str]:
    """Cut `text` at random places; half of them are behind a space that a word follows.

    A word's token holds the space before it. Encoded whole, a text therefore never shows a word
    behind a token that is a space, which is what follows a prompt that ends in a space; nor the
    rest of a word behind its start. Encoded in pieces, it shows both.
    """
    chance = 1.0 / MEAN_PIECE_CHARS
    specials = [match.span() for match in SPECIAL.finditer(text)]
    places: set[int] = set()
    position = 0
    while (position := position + 1 + int(rng.expovariate(chance))) < len(text):
        place = position
        if rng.random() < 0.5 and (space := BEFORE_WORD.search(text, position - 1)) is not None:
            place = space.end()
        if not any(start < place < end for start, end in specials):
            places.add(place)
    edges = [0, *sorted(places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def encode_stream(
    tokenizer: Tokenizer, texts: list[str], seed: int, pieces: bool = False
) -> torch.Tensor:
    """Shuffle `texts`, encode them and join them, each followed by eos; shape [tokens], int64.

    With `pieces`, each text is cut at random places and its pieces are encoded one by one.
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    rng = random.Random(seed)
    ids: list[int] = []
    for i in order:
        parts = cut(texts[i], rng) if pieces else [texts[i]]
        for encoding in tokenizer.encode_batch_fast(parts):
            ids.extend(encoding.ids)
        ids.append(EOS_ID)
    return torch.tensor(ids, dtype=torch.int64)
