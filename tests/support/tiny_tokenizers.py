"""Small model directories with a real tokenizer of each kind that Caesura serves."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

import frontend.text.tokenizer

TEXTS = [
    "Hello world, the quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x + 1\n\n    # stop here",
    "naïve café 你好世界 😀 €100",
]
EOS = "</s>"
_SPECIAL = ["<unk>", "<s>", EOS, "<|im_start|>"]


@functools.cache
def _byte_level() -> Tokenizer:
    """GPT-2's kind: every byte is a token, spaces belong to the next word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(
        tokenizer, BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=_SPECIAL)
    )
    tokenizer.add_tokens([AddedToken("<tool call>"), AddedToken("→ é")])
    return tokenizer


@functools.cache
def _byte_fallback() -> Tokenizer:
    """Llama 2's kind: a space before every text, unknown characters as `<0xNN>` tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    _train(tokenizer, BpeTrainer(vocab_size=330, special_tokens=special, limit_alphabet=40))
    # The trainer makes the byte tokens special; in real models they are plain.
    contents = json.loads(tokenizer.to_str())
    contents["added_tokens"] = contents["added_tokens"][: len(_SPECIAL)]
    return Tokenizer.from_str(json.dumps(contents))


@functools.cache
def _metaspace() -> Tokenizer:
    """T5's kind: spaces as `▁`, no byte tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    _train(tokenizer, BpeTrainer(vocab_size=150, special_tokens=_SPECIAL))
    return tokenizer


_KINDS = {"byte_level": _byte_level, "byte_fallback": _byte_fallback, "metaspace": _metaspace}
KINDS = tuple(_KINDS)


def new_library_tokenizer(kind: str) -> Tokenizer:
    """A copy of the library's tokenizer of one of `KINDS`, to be changed at will."""
    return Tokenizer.from_str(_KINDS[kind]().to_str())


def token_id(kind: str, token: str) -> int:
    """The id of a token that the tokenizer of this kind has."""
    found: int | None = _KINDS[kind]().token_to_id(token)
    assert found is not None, token
    return found


@functools.cache
def tiny_tokenizer(kind: str) -> frontend.text.tokenizer.Tokenizer:
    """Caesura's tokenizer of one of `KINDS`."""
    with tempfile.TemporaryDirectory() as directory:
        return frontend.text.tokenizer.Tokenizer(
            save_model(Path(directory), new_library_tokenizer(kind))
        )


def _train(tokenizer: Tokenizer, trainer: BpeTrainer) -> None:
    trainer.show_progress = False
    tokenizer.train_from_iterator(TEXTS, trainer)


def save_model(directory: Path, tokenizer: Tokenizer, **files: Mapping[str, object]) -> Path:
    """Write tokenizer.json and `files` (name without .json -> contents); returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {"tokenizer_config": {"eos_token": EOS, "bos_token": "<s>"}} | files
    for name, contents in files.items():
        (directory / f"{name}.json").write_text(json.dumps(contents), encoding="utf-8")
    return directory
