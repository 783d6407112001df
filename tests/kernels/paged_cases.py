"""Made-up batches over a paged cache, booby-trapped: whatever must not be read is NaN.

Pages are in random order. NaN fills every page that no row owns, every slot past a row's length,
and the page that block-table entries past a row's length point to. With a window, the same holds
for what lies before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention shapes of a model."""

    group: int
    num_kv_heads: int
    head_size: int
    block_size: int

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.group * self.num_kv_heads


PAIRWISE_SHAPES = [
    Shape(1, 2, 32, 16),
    Shape(2, 4, 32, 64),
    Shape(3, 1, 48, 32),
    Shape(7, 2, 64, 16),
    Shape(16, 1, 80, 128),
    Shape(1, 3, 96, 64),
    Shape(2, 2, 128, 16),
    Shape(5, 1, 128, 128),
    Shape(3, 1, 192, 16),
    Shape(4, 1, 256, 32),
]
"""Groups 1 to 16, head sizes that are and are not powers of two, every page size: each with several
of the others."""


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Arguments of the attention functions, named like their parameters."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    scale: float

    def decode_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """For paged_decode_attention."""
        caches = (self.key_cache, self.value_cache)
        return (self.query, *caches, self.block_tables, self.context_lens, self.scale)

    def prefill_arguments(
        self,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float]:
        """For paged_prefill_attention."""
        caches = (self.key_cache, self.value_cache)
        starts = (self.query_start_loc, self.max_query_len)
        return (self.query, *caches, self.block_tables, self.context_lens, *starts, self.scale)


def paged_batch(
    shape: Shape,
    context_lens: Sequence[int],
    query_lens: Sequence[int] | None = None,
    *,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> PagedBatch:
    """A batch with rows of the given lengths, and one query token a row unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    query_lens = [1] * len(context_lens) if query_lens is None else query_lens
    blocks_of_row = [-(-length // shape.block_size) for length in context_lens]
    num_blocks = sum(blocks_of_row) + 2
    order = torch.randperm(num_blocks, generator=generator).tolist()
    trap = order.pop()
    cache_shape = (num_blocks, shape.num_kv_heads, shape.block_size, shape.head_size)
    key_cache = torch.full(cache_shape, torch.nan, dtype=dtype)
    value_cache = torch.full(cache_shape, torch.nan, dtype=dtype)
    block_tables = torch.full((len(context_lens), max(blocks_of_row) + 1), trap, dtype=torch.int32)
    for row, length in enumerate(context_lens):
        seen = first_seen(length, query_lens[row], window)
        for index in range(seen // shape.block_size, blocks_of_row[row]):
            block = order.pop()
            block_tables[row, index] = block
            filled = min(shape.block_size, length - index * shape.block_size)
            for cache in (key_cache, value_cache):
                part = cache[block, :, max(0, seen - index * shape.block_size) : filled]
                part.copy_(torch.randn(part.shape, generator=generator))
    num_tokens = sum(query_lens)
    width = shape.num_heads * shape.head_size
    fused = torch.randn(num_tokens, width + 24, generator=generator).to(dtype).to(device)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    return PagedBatch(
        query=fused[:, 8 : 8 + width].view(num_tokens, shape.num_heads, shape.head_size),
        key_cache=key_cache.to(device),
        value_cache=value_cache.to(device),
        block_tables=block_tables.to(device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        query_start_loc=starts.to(device),
        max_query_len=max(query_lens),
        scale=shape.head_size**-0.5,
    )


def first_seen(length: int, num_queries: int, window: int) -> int:
    """The first key that any of a row's queries sees; without queries, none but the last would."""
    return max(0, length - max(1, num_queries) + 1 - window) if window else 0


def attention_in_float64(batch: PagedBatch, window: int = 0) -> Tensor:
    """What attention over a batch should be: [T, Hq, D] float64, from the definition."""
    num_heads = batch.query.shape[1]
    num_kv_heads, block_size = batch.key_cache.shape[1:3]
    out = torch.zeros(batch.query.shape, dtype=torch.float64, device=batch.query.device)
    bounds = batch.query_start_loc.tolist()
    for row, length in enumerate(batch.context_lens.tolist()):
        start, end = bounds[row], bounds[row + 1]
        if length == 0 or start == end:
            continue
        seen = torch.arange(first_seen(length, end - start, window), length, device=out.device)
        blocks = batch.block_tables[row, seen // block_size].long()
        keys, values = (
            cache[blocks, :, seen % block_size]
            .double()
            .repeat_interleave(num_heads // num_kv_heads, dim=1)  # [L, Hq, D]
            for cache in (batch.key_cache, batch.value_cache)
        )
        scores = torch.einsum("nhd,lhd->hnl", batch.query[start:end].double(), keys) * batch.scale
        own = torch.arange(length - (end - start), length, device=out.device)[:, None]
        hidden = (seen > own) | (seen <= own - window if window else seen < 0)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        out[start:end] = torch.einsum("hnl,lhd->nhd", weights, values)
    return out


def poisoned_like(query: Tensor) -> Tensor:
    """An `out` for attention in which an element that is not written stays NaN."""
    return torch.full(query.shape, torch.nan, dtype=query.dtype, device=query.device)


def assert_agrees(actual: Tensor, expected: Tensor) -> None:
    """Equal up to what rounding, and another order of sums, may change in the dtype of `actual`."""
    rtol, atol = {
        torch.float32: (1e-5, 3e-6),
        torch.float16: (4e-3, 2e-3),
        torch.bfloat16: (2e-2, 1e-2),
    }[actual.dtype]
    expected = expected.to(actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
