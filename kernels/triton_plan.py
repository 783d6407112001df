"""Plans: the work list of a step, the memory its splits meet in, and how its kernel runs.

A plan is made once and updated before each step; all layers of a step use it, one after the other.

Invariants
- `update` launches one kernel and never waits for the device. What it reads on the host are sizes
  and bounds, so that a CUDA graph that has captured it, and the attention behind it, serves every
  later step of as many rows (and query tokens).
- Memory only grows, and not for a step no larger than one before: capture after a warm-up of the
  largest. Its counters are zero whenever no attention kernel runs.
- One stream: two kernels that share a plan never run at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.shapes import AttentionShape
from kernels.triton_merge import merge_constants
from kernels.triton_runtime import Settings, cdiv, gpu_of, padded
from kernels.triton_tuning import Tuning, attention_settings, decode_tuning, prefill_tuning
from kernels.triton_work import RECORD, Splitting, plan_settings, write_work

_UNSPLIT = 1 << 30
"""More keys than any row has."""


class TritonPlan:
    """What both kinds have. Tensors are laid out as in `triton_work` and `triton_merge`."""

    settings: Settings
    """Of the attention kernel."""
    num_items: int
    """How many items the grid provides for."""

    def __init__(
        self, shape: AttentionShape, device: torch.device, window: int, deterministic: bool
    ) -> None:
        self.shape = shape
        self.device = device
        self.window = window
        self.deterministic = deterministic
        self.gpu = gpu_of(device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self.work = torch.empty(0, dtype=torch.int32, device=device)
        self.partial = torch.empty(0, dtype=torch.float32, device=device)
        self.lse = torch.empty(0, dtype=torch.float32, device=device)
        self.counters = torch.empty(0, dtype=torch.int32, device=device)

    def splitting(self, tuning: Tuning) -> Splitting:
        """Into about one round of programs."""
        num_programs = tuning.programs_per_multiprocessor * self.gpu.num_multiprocessors
        min_keys = max(tuning.min_keys, tuning.tile)
        return Splitting.to_fill(num_programs, self.shape.num_kv_heads, min_keys)

    def reserve(self, num_units: int, splitting: Splitting, rows_per_part: int) -> None:
        """Make room for what `splitting` can come to."""
        self.num_items = num_units + splitting.budget
        num_parts = splitting.max_parts * self.shape.num_kv_heads
        rows = num_parts * rows_per_part
        if self.work.numel() < self.num_items * RECORD.value:
            self.work = self.work.new_empty(self.num_items * RECORD.value)
        if self.counters.numel() < num_parts:
            self.counters = self.counters.new_zeros(num_parts)
        if self.lse.numel() < rows:
            self.lse = self.lse.new_empty(rows)
            self.partial = self.partial.new_empty(rows * self.shape.head_size)


class DecodePlan(TritonPlan):
    """For `paged_decode_attention`."""

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        window: int = 0,
        deterministic: bool = False,
        tuning: Tuning | None = None,
    ) -> None:
        """`tuning`: another than the table's, to measure it."""
        super().__init__(shape, device, window, deterministic)
        self._tuning = decode_tuning(shape) if tuning is None else tuning
        self.settings = decode_settings(shape, self._tuning, has_window=window > 0)
        self._work_settings = plan_settings(1, self._tuning.tile)

    def update(self, context_lens: Tensor, max_context_len: int) -> None:
        """For rows of these lengths, none of them over `max_context_len`."""
        num_rows, tuning = len(context_lens), self._tuning
        if self.deterministic:
            chunk = max(tuning.tokens_per_chunk, tuning.tile)
            splitting = Splitting.fixed(chunk, num_rows, max_context_len)
        else:
            splitting = self.splitting(tuning)
        self.reserve(num_rows, splitting, self.shape.group)
        write_work(
            self.work,
            self.count,
            context_lens,
            None,
            1,
            self.window,
            splitting,
            self._work_settings,
        )


class PrefillPlan(TritonPlan):
    """For `paged_prefill_attention`. Deterministic: one tuning for all, and no splits, so that a
    token's result depends neither on the batch nor on the chunk that it is computed in."""

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        window: int = 0,
        deterministic: bool = False,
        tuning: Tuning | None = None,
    ) -> None:
        """`tuning`: another than the table's, to measure it."""
        super().__init__(shape, device, window, deterministic)
        self._tuning = tuning

    def update(
        self,
        context_lens: Tensor,
        query_start_loc: Tensor,
        max_query_len: int,
        num_tokens: int,
    ) -> None:
        """For rows with so many query tokens together, and none with more than `max_query_len`."""
        tuning = self._tuning or prefill_tuning(
            self.shape, self.gpu, _UNSPLIT if self.deterministic else max_query_len
        )
        splitting = Splitting(_UNSPLIT, 1) if self.deterministic else self.splitting(tuning)
        tokens_per_tile = tuning.block_m // self.shape.group
        max_tiles = cdiv(max_query_len, tokens_per_tile)
        num_rows = len(context_lens)
        num_units = min(num_rows * max_tiles, num_tokens // tokens_per_tile + num_rows)
        self.settings = prefill_settings(self.shape, tuning, has_window=self.window > 0)
        self.reserve(num_units, splitting, tuning.block_m)
        write_work(
            self.work,
            self.count,
            context_lens,
            query_start_loc,
            max_tiles,
            self.window,
            splitting,
            plan_settings(tokens_per_tile, tuning.tile),
        )


def decode_plan(
    shape: AttentionShape, device: torch.device, window: int = 0, deterministic: bool = False
) -> DecodePlan:
    """See `kernels.ops.decode_plan`."""
    return DecodePlan(shape, device, window, deterministic)


def prefill_plan(
    shape: AttentionShape, device: torch.device, window: int = 0, deterministic: bool = False
) -> PrefillPlan:
    """See `kernels.ops.prefill_plan`."""
    return PrefillPlan(shape, device, window, deterministic)


def decode_settings(shape: AttentionShape, tuning: Tuning, *, has_window: bool) -> Settings:
    """How the decode kernel runs."""
    rows = padded(shape.group, at_least=1)
    merge = merge_constants(rows, shape.head_size, tuning.num_warps)
    return attention_settings(shape, tuning, merge, has_window)


def prefill_settings(shape: AttentionShape, tuning: Tuning, *, has_window: bool) -> Settings:
    """How the prefill kernel runs."""
    merge = merge_constants(tuning.block_m, shape.head_size, tuning.num_warps)
    return attention_settings(shape, tuning, merge, has_window)


def shape_of(query: Tensor, key_cache: Tensor) -> AttentionShape:
    """From [T, Hq, D] queries and [blocks, Hkv, block_size, D] keys."""
    _, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    return AttentionShape(num_heads, num_kv_heads, head_size, block_size, key_cache.element_size())
