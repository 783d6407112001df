"""Log-probabilities on the wire: alternatives to each token of an output or of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ipc import expect
from ipc.arrays import Array, decode_array, encode_array
from ipc.codec import Frames
from ipc.errors import WireError


@dataclass(frozen=True, slots=True, eq=False)
class LogprobsLists:
    """Log-probabilities of some positions, each with the token there and its k likeliest
    alternatives.

    Shapes: `token_ids` and `logprobs` [positions, k + 1], `ranks` [positions]. Column 0 is the
    token itself, and `ranks` its place in the vocabulary's order (1 is the likeliest).
    """

    token_ids: Array
    logprobs: Array
    ranks: Array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogprobsLists) and all(
            np.array_equal(mine, theirs)
            for mine, theirs in zip(self.arrays, other.arrays, strict=True)
        )

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        return self.token_ids, self.logprobs, self.ranks


def logprobs_to_wire(logprobs: LogprobsLists, aux: list[bytes]) -> list[object]:
    """NumPy form, for sampled tokens; the fourth entry (offsets over several requests) is nil for a
    single one."""
    return [*[encode_array(array, aux) for array in logprobs.arrays], None]


def prompt_logprobs_to_wire(logprobs: LogprobsLists, aux: list[bytes]) -> list[object]:
    """Tensor form, for prompts; one position less than the prompt has tokens."""
    return [*[encode_array(array, aux, as_tensor=True) for array in logprobs.arrays], None, None]


def logprobs_from_wire(value: object, frames: Frames, path: str) -> LogprobsLists:
    """Parse either form. Raises WireError where the three arrays do not belong together."""
    entries = expect.array(value, path, 3)
    token_ids = decode_array(entries[0], frames, f"{path}.token_ids")
    logprobs = decode_array(entries[1], frames, f"{path}.logprobs")
    ranks = decode_array(entries[2], frames, f"{path}.ranks")
    if (
        token_ids.ndim != 2
        or logprobs.shape != token_ids.shape
        or ranks.shape != token_ids.shape[:1]
        or (len(ranks) > 0 and token_ids.size == 0)
    ):
        raise WireError(
            f"{path}: expected shapes [p, k > 0], [p, k] and [p], got {list(token_ids.shape)}, "
            f"{list(logprobs.shape)} and {list(ranks.shape)}"
        )
    if (
        token_ids.dtype.kind not in "iu"
        or logprobs.dtype.kind != "f"
        or ranks.dtype.kind not in "iu"
    ):
        raise WireError(
            f"{path}: expected integers, floats and integers, got {token_ids.dtype}, "
            f"{logprobs.dtype} and {ranks.dtype}"
        )
    return LogprobsLists(token_ids, logprobs, ranks)
