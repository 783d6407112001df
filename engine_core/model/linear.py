"""Linear layers, in whatever form of the weight the device multiplies fastest."""

from __future__ import annotations

from typing import Protocol, Self

from torch import Tensor
from torch.nn import functional as F


class Linear(Protocol):
    """y = x W^T + b, with the weight fixed at construction."""

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs], laid out as it came; a copy if the layout had to be undone."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[outputs]."""
        ...

    def with_bias(self, bias: Tensor | None) -> Self:
        """A layer with the same weight, which is shared, and another bias."""
        ...


class TorchLinear:
    """A layer that PyTorch multiplies."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def with_bias(self, bias: Tensor | None) -> TorchLinear:
        return TorchLinear(self.weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs]."""
        return F.linear(x, self.weight, self.bias)
