"""Outputs that a kernel forgets to write are seen: memory that PyTorch gives out is poisoned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

POISONED_INTEGER = -77
"""No token, rank or count."""


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and `torch.empty_like` return NaN, or a senseless integer."""

    def empty(shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = shape if isinstance(shape, tuple) else (shape,)
        poison = torch.nan if dtype.is_floating_point else POISONED_INTEGER
        return torch.full(size, poison, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(tuple(x.shape), x.dtype, x.device))
