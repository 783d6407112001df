"""A step's attention: rows of one token and longer ones, each kind by its own kernel.

How the work of a step is spread over the GPU is planned once, before its first layer; all layers
use the plans. Their memory is kept from step to step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_core.model.step_inputs import StepInputs
from kernels import ops
from kernels.shapes import AttentionShape


class PagedAttention:
    """For the layers of one model, and one step at a time."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int) -> None:
        self._heads = (num_heads, num_kv_heads, head_size)
        self._scale = head_size**-0.5
        self._plans: tuple[ops.DecodePlan, ops.PrefillPlan] | None = None

    def begin(self, step: StepInputs, key_cache: Tensor) -> None:
        """Plan a step. All layers' caches are like `key_cache`."""
        decode, prefill = self._plans = self._plans or self._make_plans(key_cache)
        block_tables, context_lens = step.block_tables, step.context_lens
        split = step.num_decode_rows
        if split > 0:
            decode.update(context_lens[:split], block_tables.shape[1] * key_cache.shape[2])
        if step.max_prefill_len > 0:
            starts, num_tokens = step.prefill_start_loc, len(step.token_ids) - split
            prefill.update(context_lens[split:], starts, step.max_prefill_len, num_tokens)

    def __call__(self, query: Tensor, cache: tuple[Tensor, Tensor], step: StepInputs) -> Tensor:
        """[T, Hq, D] -> [T, Hq, D], in one layer of the step that was begun."""
        assert self._plans is not None, "begin() comes first"
        decode, prefill = self._plans
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        split = step.num_decode_rows
        if split > 0:
            ops.paged_decode_attention(
                query[:split],
                *cache,
                step.block_tables[:split],
                step.context_lens[:split],
                self._scale,
                out=out[:split],
                plan=decode,
            )
        if step.max_prefill_len > 0:
            ops.paged_prefill_attention(
                query[split:],
                *cache,
                step.block_tables[split:],
                step.context_lens[split:],
                step.prefill_start_loc,
                step.max_prefill_len,
                self._scale,
                out=out[split:],
                plan=prefill,
            )
        return out

    def _make_plans(self, key_cache: Tensor) -> tuple[ops.DecodePlan, ops.PrefillPlan]:
        shape = AttentionShape(*self._heads, key_cache.shape[2], key_cache.element_size())
        return ops.decode_plan(shape, key_cache.device), ops.prefill_plan(shape, key_cache.device)
