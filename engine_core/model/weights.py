"""Where a model's files are, and its tensors by name.

Invariants
- Only safetensors are read; a pickle could run code, and so could a checkpoint's own modules.
- Every tensor handed out is a private copy: files are memory mapped, and a checkpoint rewritten in
  place must not change the model that is being served.
- A tensor is checked against the shape that the configuration implies, and a tensor that nobody
  asked for is an error: it would mean a model computed without some of its parts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine_core.model.errors import ModelError

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def model_directory(model: str) -> Path:
    """The directory of a model: `model` itself, or the snapshot of a hub id.

    A hub id is downloaded (weights and JSON files only) unless HF_HUB_OFFLINE is set, in which case
    only an earlier download is found. Raises ModelError.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"model={model!r} is a file; name the directory that holds config.json")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"model={model!r}: there is no such directory")
    # Imported here: a directory needs no hub client, and the import is slow.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model={model!r} is not a directory, and the hub did not give it: {reason}"
        ) from error


class Checkpoint:
    """The tensors of a model directory, converted to one dtype and device as they are read."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Open every weight file of `directory`. Raises ModelError."""
        self.dtype = dtype
        self.device = device
        self._files = _open_files(directory)
        self._unread = set(self._files)

    def read(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, which must have this shape. Raises ModelError."""
        return self._view(name, shape).to(self.device, self.dtype, copy=True)

    def read_stacked(self, names: Sequence[str], rows: Sequence[int], *columns: int) -> Tensor:
        """Tensors of shape [rows[i], *columns] one below the other, as one. Raises ModelError."""
        parts = [
            self._view(name, (count, *columns)) for name, count in zip(names, rows, strict=True)
        ]
        return torch.cat([part.to(self.dtype) for part in parts]).to(self.device)

    def check_all_read(self, ignored: Sequence[str] = ()) -> None:
        """Raise ModelError if the files hold a tensor that was never read.

        Names in `ignored` may be there, and so may rotary tables, which old checkpoints contain.
        """
        unexpected = sorted(
            name
            for name in self._unread
            if name not in ignored and not name.endswith("rotary_emb.inv_freq")
        )
        if unexpected:
            raise ModelError(
                f"the weights hold {len(unexpected)} tensors that config.json does not account "
                f"for, such as {', '.join(unexpected[:3])}; is it another model's configuration?"
            )

    def _view(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._files:
            raise ModelError(
                f"the weights lack the tensor {name!r}, which config.json implies; "
                f"the directory may be incomplete or its configuration another model's"
            )
        self._unread.discard(name)
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"tensor {name!r} has shape {list(tensor.shape)}, "
                f"but config.json implies {list(shape)}"
            )
        if tensor.dtype not in _FLOATING:
            raise ModelError(
                f"tensor {name!r} holds {tensor.dtype}; quantised checkpoints are not supported"
            )
        return tensor


def _open_files(directory: Path) -> dict[str, Any]:
    """Which open file holds each tensor."""
    files: dict[str, Any] = {}
    for path in _weight_paths(directory):
        try:
            handle = safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError:
            raise ModelError(f"{path} is missing; the download may be incomplete") from None
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a readable safetensors file: {error}") from None
        names: list[str] = handle.keys()  # type: ignore[no-untyped-call]
        files.update(dict.fromkeys(names, handle))
    return files


def _weight_paths(directory: Path) -> list[Path]:
    index_path = directory / _INDEX_FILE
    if index_path.exists():
        try:
            weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            return [directory / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index_path} is not an index of safetensors: {error!r}") from None
    if (directory / _SINGLE_FILE).exists():
        return [directory / _SINGLE_FILE]
    raise ModelError(
        f"{directory} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}; weights in other formats "
        f"are not read, convert them to safetensors"
    )


def stored_dtype(directory: Path, name: str) -> str:
    """The dtype in which the tensor `name` is stored, such as 'bfloat16'. Raises ModelError."""
    files = _open_files(directory)
    if name not in files:
        raise ModelError(f"the weights in {directory} lack the tensor {name!r}")
    return str(files[name].get_tensor(name).dtype).removeprefix("torch.")
