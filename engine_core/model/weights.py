"""Where a model's files are, and its tensors by name.

Invariants
- Only safetensors are read; a pickle could run code, and so could a checkpoint's own modules.
- Every tensor handed out is a private copy: a checkpoint rewritten in place must not change the
  model that is being served.
- Tensors are checked against the shapes that the configuration implies before any is read, and one
  that the model does not have is an error: it would mean a model computed without some of its
  parts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine_core.model.config import ModelConfig
from engine_core.model.errors import ModelError
from engine_core.model.files import read_json
from engine_core.model.parts import EMBEDDING, LM_HEAD, Shape, part_specs
from engine_core.model.safetensors_file import SafetensorsFile, TensorInfo

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_ROTARY_TABLE = "rotary_emb.inv_freq"
_MAX_ROTARY_TABLE = 2**16
FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def model_directory(model: str) -> Path:
    """The directory of a model: `model` itself, or the snapshot of a hub id.

    A hub id is downloaded (weights and JSON files only) unless HF_HUB_OFFLINE is set, in which case
    only an earlier download is found. Raises ModelError.
    """
    if (path := _directory(model)) is not None:
        return path
    try:
        return _hub_snapshot(model, may_download=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model={model!r} is not a directory, and the hub did not give it: {reason}"
        ) from error


def local_model_directory(model: str) -> Path:
    """The same of what is there already: nothing is downloaded. Raises ModelError."""
    if (path := _directory(model)) is not None:
        return path
    try:
        return _hub_snapshot(model, may_download=False)
    except (OSError, ValueError):
        raise ModelError(
            f"{model} does not exist on the engine's machine, neither as a directory nor as a "
            f"model that was downloaded from the hub"
        ) from None


def _directory(model: str) -> Path | None:
    """What `model` says if it is a directory's path; None if it may be a hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"{model} is a file, not a model's directory, which holds config.json and safetensors"
        )
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{model} does not exist on the engine's machine")
    return None


def _hub_snapshot(model: str, *, may_download: bool) -> Path:
    """Raises OSError or ValueError."""
    # Imported here: a directory needs no hub client, and the import is slow.
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    return Path(
        snapshot_download(model, allow_patterns=patterns, local_files_only=not may_download)
    )


class Checkpoint:
    """The tensors of some safetensors files, by name."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files. Raises ModelError."""
        self._files: dict[str, SafetensorsFile] = {}
        self.infos: dict[str, TensorInfo] = {}
        """Of every tensor."""
        for path in paths:
            file = SafetensorsFile(path)
            self.infos.update(file.infos)
            self._files.update(dict.fromkeys(file.infos, file))

    def read(self, name: str) -> Tensor:
        """The tensor `name`, which is there. Raises ModelError."""
        return self._files[name].read(name)

    def check_unchanged(self) -> None:
        """Raise ModelError if a file was written to since it was opened."""
        for file in dict.fromkeys(self._files.values()):
            file.check_unchanged()


class TensorRules:
    """Which tensors the weights of a model consist of."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes: dict[str, Shape] = {
            name: shape
            for spec in part_specs(config)
            for shapes in (spec.weights, spec.biases)
            for name, shape in shapes.items()
        }
        self._ignored = {LM_HEAD: self.shapes[EMBEDDING]} if config.tie_word_embeddings else {}

    def check(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Raise ModelError unless these are tensors of the model, or may stand beside them."""
        unknown = sorted(name for name in tensors if not self._is_known(name))
        if unknown:
            examples = [f"{name:.100}" for name in unknown[:3]]
            nearest = difflib.get_close_matches(examples[0], self.shapes, n=1, cutoff=0.0)
            raise ModelError(
                f"the weights hold {len(unknown)} tensors that config.json does not account "
                f"for, such as {', '.join(examples)} (the nearest name to the first is "
                f"{nearest[0]}); is it another model's configuration?"
            )
        for name, info in tensors.items():
            is_long = len(info.shape) != 1 or info.shape[0] > _MAX_ROTARY_TABLE
            if name.endswith(_ROTARY_TABLE) and is_long:
                raise ModelError(
                    f"tensor {name!r} has shape {list(info.shape)}, but a rotary table has one "
                    f"dimension, of at most {_MAX_ROTARY_TABLE}"
                )
            shape = self.shapes.get(name) or self._ignored.get(name)
            if shape is not None:
                _check_tensor(name, info, shape)

    def check_all(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Raise ModelError unless these are exactly the model's tensors, but for what is ignored:
        the shared matrix, which checkpoints of tied models may store twice, and rotary tables,
        which old checkpoints contain.
        """
        missing = [name for name in self.shapes if name not in tensors]
        if missing:
            raise ModelError(
                f"the weights lack the tensor {missing[0]!r}, which config.json implies; "
                f"the directory may be incomplete or its configuration another model's"
            )
        self.check(tensors)

    def _is_known(self, name: str) -> bool:
        return name in self.shapes or name in self._ignored or name.endswith(_ROTARY_TABLE)


def _check_tensor(name: str, info: TensorInfo, shape: Shape) -> None:
    if info.shape != shape:
        raise ModelError(
            f"tensor {name!r} has shape {list(info.shape)}, but config.json implies {list(shape)}"
        )
    if info.dtype not in FLOATING:
        raise ModelError(
            f"tensor {name!r} holds {info.dtype}; quantised checkpoints are not supported"
        )


def weight_paths(directory: Path) -> list[Path]:
    """The files that hold a model's weights. Raises ModelError."""
    index_path = directory / _INDEX_FILE
    if index_path.exists():
        try:
            index: Any = read_json(index_path)
            return [directory / name for name in sorted(set(index["weight_map"].values()))]
        except ModelError:
            raise
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
    infos = Checkpoint(weight_paths(directory)).infos
    if name not in infos:
        raise ModelError(f"the weights in {directory} lack the tensor {name!r}")
    return str(infos[name].dtype).removeprefix("torch.")
