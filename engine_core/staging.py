"""What a runner has ready of a weight update that has not taken effect."""

from __future__ import annotations

from typing import Protocol


class StagedWeights(Protocol):
    """All parts of an update so far, beside the weights that serve."""

    @property
    def num_tensors(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def checksum(self) -> str:
        """Of the last part's tensors."""
        ...
