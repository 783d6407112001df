"""One file in the safetensors format: eight bytes with the length of a JSON header, the header, and
the tensors' elements at the offsets that it gives.

The format's own library maps files into memory: an engine that reads a file which its writer cuts
meanwhile dies of it, with all its requests. Plain reads fail instead.

Invariants
- Only regular files are opened: a pipe would wait for its writer.
- Everything in the header is checked against the file's size before it is believed.
- A tensor is read into memory of its own; whatever happens to the file later does not change it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine_core.model.errors import ModelError
from engine_core.model.files import MAX_JSON_BYTES, open_regular

_LENGTH_BYTES = 8
_MAX_NAME_LENGTH = 1000
_MAX_DIMENSIONS = 8
_OTHER_FORMATS = {b"\x80": "a pickle", b"PK": "a zip archive, as torch.save writes"}
"""By their first bytes, what is often taken for safetensors."""
_METADATA = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before its elements are."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsFile:
    """The tensors of one file, by name."""

    def __init__(self, path: Path) -> None:
        """Open it and read its header. Raises ModelError."""
        self._path = path
        try:
            self._file = open_regular(path)
            self._stamp = self._read_stamp()
            size = os.fstat(self._file.fileno()).st_size
            beginning = self._file.read(_LENGTH_BYTES)
            header_bytes = int.from_bytes(beginning, "little")
            start = _LENGTH_BYTES + header_bytes
            if start > size:
                raise ValueError(_no_header(beginning, size))
            if header_bytes > MAX_JSON_BYTES:
                raise ValueError(
                    f"its header has {header_bytes} bytes, more than {MAX_JSON_BYTES}; "
                    f"split the tensors over several files"
                )
            header = json.loads(self._file.read(header_bytes))
            self._places = dict(_read_places(header, start, size))
        except FileNotFoundError:
            raise ModelError(f"{path} is missing; the download may be incomplete") from None
        except ModelError:
            raise
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            reason = error if isinstance(error, ValueError) else repr(error)
            raise ModelError(f"{path} is not a readable safetensors file: {reason}") from None

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Of every tensor."""
        return {name: info for name, (info, _) in self._places.items()}

    def read(self, name: str) -> Tensor:
        """A tensor that is there. Raises ModelError if the file was cut since it was opened."""
        info, offset = self._places[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if not tensor.nbytes:
            return tensor
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
        while view:
            try:
                num_bytes = os.preadv(self._file.fileno(), [view], offset)
            except OSError as error:
                raise ModelError(f"{self._path} cannot be read: {error}") from None
            if num_bytes == 0:
                raise ModelError(
                    f"{self._path} ends within tensor {name!r}: it was changed while it was read; "
                    f"write new weights to another path"
                )
            view, offset = view[num_bytes:], offset + num_bytes
        return tensor

    def check_unchanged(self) -> None:
        """Raise ModelError if the file was written to since it was opened: what was read may be of
        two versions.
        """
        if self._read_stamp() != self._stamp:
            raise ModelError(
                f"{self._path} was changed while it was read; write new weights to another path"
            )

    def _read_stamp(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_mtime_ns, status.st_size


def _no_header(beginning: bytes, size: int) -> str:
    length = int.from_bytes(beginning, "little")
    for first, what in _OTHER_FORMATS.items():
        if beginning.startswith(first) and length > MAX_JSON_BYTES:
            return f"it begins with {first!r}, like {what}; convert it to safetensors"
    return f"its header is to have {length} bytes, but the file has {size}; it may be incomplete"


def _read_places(
    header: object, start: int, size: int
) -> Iterator[tuple[str, tuple[TensorInfo, int]]]:
    """Each tensor's name, what it is, and where in the file. Raises ValueError or TypeError."""
    if not isinstance(header, dict):
        raise TypeError("its header is no JSON object")
    for name, entry in header.items():
        if name == _METADATA:
            continue
        if len(name) > _MAX_NAME_LENGTH:
            raise ValueError(f"a tensor's name has {len(name)} characters: {name:.100}…")
        dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
        begin, end = entry["data_offsets"]
        if dtype is None:
            raise ValueError(
                f"tensor {name!r} holds {entry['dtype']!s:.100}, which is not supported"
            )
        if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has no list of at most {_MAX_DIMENSIONS} sizes")
        if not all(type(count) is int and 0 <= count < 2**63 for count in (*shape, begin, end)):
            raise ValueError(f"tensor {name!r} has the shape {shape} at {begin} to {end}")
        if not begin <= end <= size - start or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"tensor {name!r} of shape {shape} cannot be the bytes {begin} to {end} of the "
                f"{size - start} behind the header; the file may be incomplete"
            )
        yield name, (TensorInfo(dtype, tuple(shape)), start + begin)
