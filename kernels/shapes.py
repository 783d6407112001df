"""The shapes that attention kernels are chosen and compiled for, and what attention costs.

A cost is what an ideal kernel would do: each needed number read once and each result written once.
The benchmark (scripts/bench_kernels.py) divides by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention depends on in a model and its cache."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    element_bytes: int

    @property
    def group(self) -> int:
        """G: query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def head_low(self) -> int:
        """The largest power of two in the head size."""
        return 1 << (self.head_size.bit_length() - 1)

    @property
    def head_high(self) -> int:
        """What is left of the head size, as a power of two from 16 on; 0 if nothing is."""
        rest = self.head_size - self.head_low
        return max(16, 1 << (rest - 1).bit_length()) if rest else 0


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes to read and write, and floating-point operations."""

    num_bytes: int
    flop: int


def decode_cost(shape: AttentionShape, context_lens: Sequence[int], window: int = 0) -> Cost:
    """bytes = (2 * keys * Hkv * D + 2 * R * Hq * D) * element bytes: the cache once, queries and
    results; flop = 4 * keys * Hq * D, for the two products."""
    return prefill_cost(shape, context_lens, [1] * len(context_lens), window)


def prefill_cost(
    shape: AttentionShape, context_lens: Sequence[int], query_lens: Sequence[int], window: int = 0
) -> Cost:
    """As `decode_cost`; a row's keys are read once however many queries see them, and
    flop = 4 * (sum over queries of the keys they see) * Hq * D."""
    num_keys = num_products = 0
    for length, num_queries in zip(context_lens, query_lens, strict=True):
        before = length - num_queries
        first_seen = max(0, before + 1 - window) if window else 0
        num_keys += max(0, length - first_seen) if num_queries else 0
        num_products += sum_of_seen(before, num_queries, window)
    size, heads = shape.head_size, shape.num_heads
    num_elements = 2 * num_keys * shape.num_kv_heads * size + 2 * sum(query_lens) * heads * size
    return Cost(num_elements * shape.element_bytes, 4 * num_products * heads * size)


def sum_of_seen(before: int, num_queries: int, window: int = 0) -> int:
    """Keys seen by `num_queries` queries behind `before` earlier keys, summed."""
    if not window:
        window = before + num_queries
    growing = max(0, min(num_queries, window - before))  # queries that see all there is
    return growing * before + growing * (growing + 1) // 2 + (num_queries - growing) * window
