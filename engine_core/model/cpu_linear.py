"""Linear layers for the compiled CPU path."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor

from kernels.cpu_weights import PackedWeight


class PackedLinear:
    """A layer whose weight is packed for `kernels.cpu_forward`."""

    __slots__ = ("bias", "packed")

    def __init__(
        self,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        *,
        num_groups: int,
        to_int8: bool,
        num_threads: int = 1,
    ) -> None:
        """See `kernels.cpu_weights.PackedWeight.pack`."""
        self.packed = PackedWeight.pack(
            weights, num_groups=num_groups, to_int8=to_int8, num_threads=num_threads
        )
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        return self.packed.unpack()

    def with_bias(self, bias: Tensor | None) -> PackedLinear:
        other = copy.copy(self)
        other.bias = bias
        return other
