"""Reading safetensors files that may be anything: whole, cut, lying or no files at all."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine_core.model.config import read_model_config
from engine_core.model.errors import ModelError
from engine_core.model.files import MAX_JSON_BYTES
from engine_core.model.safetensors_file import SafetensorsFile
from engine_core.model.weights import weight_paths

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def test_it_reads_what_the_formats_own_library_wrote(tmp_path: Path) -> None:
    tensors = {
        f"{dtype}{shape}": torch.randint(0, 2, shape).to(dtype)
        for dtype in DTYPES
        for shape in ((3, 4), (5,), (), (0, 2))
    }
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "w.safetensors")
    assert set(file.infos) == set(tensors)
    for name, tensor in tensors.items():
        assert (file.infos[name].dtype, file.infos[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(file.read(name), tensor)


def test_L12_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(100_000), "b": torch.zeros(100_000)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, 600_000)
    assert torch.equal(file.read("a"), torch.zeros(100_000))
    with pytest.raises(ModelError, match="changed while it was read"):
        file.read("b")


def test_L10_a_file_that_is_written_to_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    file = SafetensorsFile(path)
    file.read("a")
    file.check_unchanged()
    with path.open("r+b") as writer:
        writer.seek(3000)
        writer.write(b"\x01" * 8)
    os.utime(path)
    with pytest.raises(ModelError, match="changed while it was read"):
        file.check_unchanged()


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]}},
        {"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2**100, 0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 1]}},
        {"a": {"dtype": ["F32"] * 100_000, "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "Q" * 100_000, "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [10**9] * 100_000, "data_offsets": [0, 8]}},
        {"a" * 100_000: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    ],
)
def test_L12_a_header_that_lies_is_refused_in_few_words(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ModelError, match="not a readable safetensors file") as refusal:
        SafetensorsFile(path)
    assert len(str(refusal.value)) < 500


def test_L12_a_header_that_would_take_long_to_parse_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write((MAX_JSON_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_JSON_BYTES + 9)
    with pytest.raises(ModelError, match=r"header has 4194305 bytes, more than 4194304; split"):
        SafetensorsFile(path)


def test_L12_pickled_tensors_are_called_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match=r"begins with b'PK', like a zip .*torch\.save.*; convert"):
        SafetensorsFile(path)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"a": [1, 2]}, protocol))
        with pytest.raises(ModelError, match=r"begins with b'\\x80', like a pickle; convert"):
            SafetensorsFile(path)
    path.write_bytes((0x80).to_bytes(8, "little") + b"{")
    with pytest.raises(ModelError, match="to have 128 bytes, but the file has 9"):
        SafetensorsFile(path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, (10).to_bytes(8, "little") + b"{"])
def test_L12_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        SafetensorsFile(path)


def test_L12_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    names = ("model.safetensors", "model.safetensors.index.json", "config.json")
    for name in names:
        os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match="no regular file"):
        SafetensorsFile(tmp_path / names[0])
    with pytest.raises(ModelError, match="no regular file"):
        weight_paths(tmp_path)
    with pytest.raises(ModelError, match="no regular file"):
        read_model_config(tmp_path)
