"""A caller's tensors as the content of a safetensors file.

They may be NumPy's or PyTorch's. Nothing here imports PyTorch: whoever has tensors of it has
imported it already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from safetensors.numpy import save

from frontend.errors import InvalidRequestError


def safetensors_bytes(named_tensors: Iterable[tuple[str, Any]]) -> bytes:
    """Tensors by name, on whatever device and in whatever layout; they are copied. Raises
    InvalidRequestError.
    """
    tensors: dict[str, Any] = {}
    for name, tensor in named_tensors:
        if name in tensors:
            raise InvalidRequestError(f"named_tensors has {name!r:.200} twice; give each name once")
        tensors[name] = tensor
    if not tensors:
        raise InvalidRequestError("named_tensors is empty; give at least one (name, tensor)")
    kinds = {_library(name, tensor) for name, tensor in tensors.items()}
    if len(kinds) > 1:
        raise InvalidRequestError(
            "named_tensors mixes NumPy's and PyTorch's tensors; give one kind"
        )
    if kinds == {"numpy"}:
        arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        return bytes(save(arrays))
    from safetensors.torch import save as save_of_torch  # imports PyTorch, which is there

    # Copies, for tensors that share memory cannot be saved; parameters often are views of one.
    copies = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    return bytes(save_of_torch(copies))


def _library(name: str, tensor: object) -> str:
    torch = sys.modules.get("torch")
    if isinstance(tensor, np.ndarray):
        return "numpy"
    if torch is not None and isinstance(tensor, torch.Tensor):
        return "torch"
    raise InvalidRequestError(
        f"named_tensors: {name!r:.200} is a {type(tensor).__name__}, not an array of NumPy or a "
        f"tensor of PyTorch"
    )
