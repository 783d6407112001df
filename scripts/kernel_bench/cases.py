"""What is measured: attention shapes, and paged caches for them.

A case has one pool of blocks, dealt out to rows in random order, for several *copies*: the same
batch with other blocks. Launches go through the copies, which together are several times the L2,
so each of them reads its keys and values from memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.shapes import AttentionShape, Cost, prefill_cost
from kernels.triton_decode import paged_decode_attention
from kernels.triton_plan import DecodePlan, PrefillPlan
from kernels.triton_prefill import paged_prefill_attention
from scripts.kernel_bench.clocks import Launch

LLAMA = AttentionShape(num_heads=32, num_kv_heads=8, head_size=128, block_size=16, element_bytes=2)
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DECODE_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
COLD_BYTES = 2**28
"""Of all copies together, at least."""


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of equal rows: `num_queries` tokens each, the last of `context_len`."""

    batch: int
    context_len: int
    num_queries: int = 1
    shape: AttentionShape = LLAMA

    @property
    def is_decode(self) -> bool:
        """One query token a row."""
        return self.num_queries == 1

    @property
    def kv_bytes(self) -> int:
        """Of keys and values, in one layer."""
        shape = self.shape
        token_bytes = 2 * shape.num_kv_heads * shape.head_size * shape.element_bytes
        return self.batch * self.context_len * token_bytes

    @property
    def cost(self) -> Cost:
        """Of one launch."""
        return prefill_cost(
            self.shape, [self.context_len] * self.batch, [self.num_queries] * self.batch
        )

    @property
    def num_copies(self) -> int:
        """As many as make the caches cold, and another for the graph to go on with."""
        return max(2, -(-COLD_BYTES // self.kv_bytes))

    def __str__(self) -> str:
        queries = "" if self.is_decode else f", {self.num_queries} queries each"
        return f"{self.batch} x {self.context_len}{queries}"


def decode_cases(memory_bytes: int) -> list[Case]:
    """The grid, as far as it fits into some memory."""
    grid = [Case(batch, context) for context in DECODE_CONTEXTS for batch in DECODE_BATCHES]
    return [case for case in grid if case.kv_bytes * case.num_copies <= memory_bytes]


def prefill_cases() -> list[Case]:
    """Whole prompts, and short chunks over long contexts."""
    prompts = [Case(16, 512, 512), Case(4, 2048, 2048), Case(1, 8192, 8192), Case(4, 8192, 8192)]
    chunks = [(512, 8192), (512, 32768), (512, 131072), (128, 32768), (16, 32768), (4, 32768)]
    return [*prompts, *(Case(1, context, queries) for queries, context in chunks)]


class Tensors:
    """A case's tensors on a device, random and with pages in random order."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.case = case
        shape, copies = case.shape, case.num_copies
        blocks_each = -(-case.context_len // shape.block_size)
        num_blocks = copies * case.batch * blocks_each
        cache_shape = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_size)
        self.key_cache = torch.empty(cache_shape, dtype=dtype, device=device).normal_()
        self.value_cache = torch.empty(cache_shape, dtype=dtype, device=device).normal_()
        order = torch.randperm(num_blocks, device=device).to(torch.int32)
        self.block_tables = order.view(copies, case.batch, blocks_each)
        num_tokens = case.batch * case.num_queries
        self.query = torch.randn(
            (num_tokens, shape.num_heads, shape.head_size), dtype=dtype, device=device
        )
        self.context_lens = torch.full(
            (case.batch,), case.context_len, dtype=torch.int32, device=device
        )
        self.query_start_loc = torch.arange(
            0, num_tokens + 1, case.num_queries, dtype=torch.int32, device=device
        )
        self.out = torch.empty_like(self.query)
        self.scale = shape.head_size**-0.5

    def update(self, plan: DecodePlan | PrefillPlan) -> None:
        """A step's plan."""
        if isinstance(plan, DecodePlan):
            plan.update(self.context_lens, self.case.context_len)
        else:
            sizes = (self.case.num_queries, len(self.query))
            plan.update(self.context_lens, self.query_start_loc, *sizes)

    def launches(self, plan: DecodePlan | PrefillPlan) -> list[Launch]:
        """Attention of each copy, by a plan that was updated for this case."""
        return [partial(self._attend, plan, copy) for copy in range(self.case.num_copies)]

    def _attend(self, plan: DecodePlan | PrefillPlan, copy: int) -> None:
        caches = (self.key_cache, self.value_cache, self.block_tables[copy])
        if isinstance(plan, DecodePlan):
            paged_decode_attention(
                self.query, *caches, self.context_lens, self.scale, self.out, plan=plan
            )
        else:
            starts = (self.query_start_loc, self.case.num_queries)
            paged_prefill_attention(
                self.query, *caches, self.context_lens, *starts, self.scale, self.out, plan=plan
            )

    def gathered(self, copy: int) -> tuple[Tensor, Tensor]:
        """A copy's keys and values without pages: two [batch, Hkv, context, D]."""
        blocks = self.block_tables[copy].long()

        def contiguous(cache: Tensor) -> Tensor:
            pages = cache[blocks].transpose(1, 2)  # [batch, Hkv, blocks, block_size, D]
            return pages.flatten(2, 3)[:, :, : self.case.context_len].contiguous()

        return contiguous(self.key_cache), contiguous(self.value_cache)
