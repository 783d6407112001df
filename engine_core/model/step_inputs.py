"""What a step of a decoder takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """One step's tensors, all on the model's device."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    slot_mapping: Tensor
    """[T] int64: where in the cache each token's key and value go."""
    block_tables: Tensor
    """[R, blocks] int32."""
    context_lens: Tensor
    """[R] int32, the step's tokens included."""
    num_decode_rows: int
    """Rows of one token each, which come first."""
    prefill_start_loc: Tensor
    """[R - num_decode_rows + 1] int32: first token of each further row, counted from theirs."""
    max_prefill_len: int
    """Most tokens of a further row; 0 when there is none."""
    wanted_tokens: Tensor | None
    """[S] int64: tokens whose final states are wanted; None for all."""
