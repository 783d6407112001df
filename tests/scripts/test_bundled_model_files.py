"""The model that ships with the front end, and the split of the corpus it was trained on.

Invariants tested: the shipped files stay small and describe each other truthfully; the tokenizer
gives any text back; held-out texts reach neither the training set nor its chat lessons; and cutting
a text for training loses none of it.
"""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from frontend.config import BUNDLED_MODEL_DIRECTORY
from scripts.bundled_model import corpus

MAX_PARAMETERS = 8_000_000
MAX_BYTES = 16 * 2**20
CONTEXT = 8192
FAKE_TEXTS = 400

ODD_TEXTS = [
    "",
    " ",
    "def ",
    "    return ",
    "\t\tx = 1\r\n\r\n",
    "no line break at the end   ",
    "\n\n\n   \n\t\n",
    " " * 100 + "deep",
    "naïve café — “quotes” 你好 العربية 🙂👩‍👩‍👧",
    "e\u0301 \u200b\u00a0\ufeff\x00\x7f",
    "1234567890.5e-10_000",
    "<|endoftext|",
    "".join(map(chr, range(256))),
]


def load_json(name: str) -> dict[str, Any]:
    """Read one of the shipped files."""
    content: dict[str, Any] = json.loads((BUNDLED_MODEL_DIRECTORY / name).read_text("utf-8"))
    return content


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The shipped tokenizer."""
    return Tokenizer.from_file(str(BUNDLED_MODEL_DIRECTORY / "tokenizer.json"))


def test_the_folder_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in BUNDLED_MODEL_DIRECTORY.iterdir()}
    assert set(sizes) == {
        "LICENSE.txt",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= MAX_BYTES


def test_the_weights_are_few_and_in_the_type_that_the_configuration_names() -> None:
    with (BUNDLED_MODEL_DIRECTORY / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert sum(math.prod(entry["shape"]) for entry in header.values()) <= MAX_PARAMETERS
    config = load_json("config.json")
    assert config["torch_dtype"] == "bfloat16"
    embedding = header["model.embed_tokens.weight"]["shape"]
    assert embedding == [config["vocab_size"], config["hidden_size"]]
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in header)


def test_the_context_is_8192_everywhere() -> None:
    assert load_json("config.json")["max_position_embeddings"] == CONTEXT
    assert load_json("tokenizer_config.json")["model_max_length"] == CONTEXT


def test_special_tokens_are_single_tokens_that_every_file_agrees_on(tokenizer: Tokenizer) -> None:
    specials = {corpus.EOS: 0, corpus.IM_START: 1, corpus.IM_END: 2}
    for text, token in specials.items():
        assert tokenizer.token_to_id(text) == token
        assert tokenizer.encode(f"a{text}b").ids.count(token) == 1
        assert tokenizer.decode([token], skip_special_tokens=True) == ""
    config, generation = load_json("config.json"), load_json("generation_config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert config["eos_token_id"] == corpus.EOS_ID
    assert generation["eos_token_id"] == [corpus.EOS_ID, corpus.IM_END_ID]
    assert load_json("tokenizer_config.json")["eos_token"] == corpus.EOS


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_the_tokenizer_gives_odd_texts_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def fake_text(number: int) -> str:
    """A source text with one documented function whose name is in no other."""
    return (
        f"def function_{number}_end():\n"
        f'    """Return the number of text {number}."""\n'
        f"    return {number}\n"
    )


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library in place of the interpreter's own."""
    for number in range(FAKE_TEXTS):
        folder = tmp_path / f"package_{number % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"module_{number}.py").write_text(fake_text(number))
        (folder / f"copy_{number}.py").write_text(fake_text(number))
    installed = tmp_path / "site-packages" / "other"
    installed.mkdir(parents=True)
    for number in range(100):
        (installed / f"module_{number}.py").write_text(f"# not ours {number}\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_held_out_texts_are_in_no_training_text(library: Path) -> None:
    split = corpus.load_corpus()
    assert sorted(split.train + split.held_out) == sorted(map(fake_text, range(FAKE_TEXTS)))
    assert 0 < len(split.held_out) < FAKE_TEXTS // 10
    assert len(split.lessons) == len(split.train)
    trained_on = "".join(split.train + split.lessons)
    for text in split.held_out:
        assert text.partition("(")[0] not in trained_on


def test_the_split_depends_on_the_texts_and_not_on_where_they_lie(library: Path) -> None:
    before = corpus.load_corpus()
    for path in list(library.glob("package_*/module_*.py")):
        path.rename(library / f"moved_{path.name}")
    for path in list(library.glob("package_*/copy_*.py")):
        path.unlink()
    after = corpus.load_corpus()
    assert sorted(after.held_out) == sorted(before.held_out)
    assert sorted(after.train) == sorted(before.train)


def test_pieces_join_to_the_text_and_some_end_in_a_space_before_a_word() -> None:
    text = "".join(map(fake_text, range(FAKE_TEXTS)))
    pieces = corpus.cut(text, random.Random(0))
    assert "".join(pieces) == text
    assert pieces == corpus.cut(text, random.Random(0))
    assert pieces != corpus.cut(text, random.Random(1))
    mean = len(text) / len(pieces)
    assert corpus.MEAN_PIECE_CHARS / 2 < mean < corpus.MEAN_PIECE_CHARS * 2
    behind_spaces = sum(piece.endswith(" ") for piece in pieces[:-1])
    assert len(pieces) / 3 < behind_spaces < len(pieces)


def test_no_cut_falls_inside_a_special_token() -> None:
    turn = f"{corpus.IM_START}user\nhi{corpus.IM_END}\n"
    text = turn * 2000
    pieces = corpus.cut(text, random.Random(0))
    assert len(pieces) > 10
    assert sum(piece.count(corpus.IM_START) for piece in pieces) == 2000
    assert sum(piece.count(corpus.IM_END) for piece in pieces) == 2000


def test_the_stream_keeps_the_texts_and_ends_each(tokenizer: Tokenizer) -> None:
    texts = [fake_text(number) * 20 for number in range(20)]
    whole = corpus.encode_stream(tokenizer, texts, seed=0)
    cut = corpus.encode_stream(tokenizer, texts, seed=0, pieces=True)
    again = corpus.encode_stream(tokenizer, texts, seed=0, pieces=True)
    assert cut.tolist() == again.tolist()
    assert len(cut) > len(whole)
    for stream in (whole, cut):
        assert (stream == corpus.EOS_ID).sum() == len(texts)
        decoded = tokenizer.decode(stream.tolist(), skip_special_tokens=False)
        assert sorted(decoded.split(corpus.EOS)[:-1]) == sorted(texts)
