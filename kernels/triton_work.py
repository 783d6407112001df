"""Who works on which keys: the work list of a step, made on the device once for all layers.

A *unit* is a query tile of a row: in decode the row's one token, in prefill `tokens_per_tile`
tokens. Unit u sees the keys start_u .. end_u - 1, n_u of them. It is split along them into items,
and an item with a key/value head is one program of the attention kernel:

    chunk = max(min_keys, ceil(sum_u n_u / budget))         tokens per chunk
    splits_u = max(1, round(n_u / chunk))

so long rows are cut and short ones are not, whatever the batch. Tiles of keys are dealt evenly to a
unit's splits. Heavy units come first: those with more than half the keys of the longest, then those
with more than a quarter, an eighth, and the rest; of equals, in a causal prompt, the last tiles.

The grid is static: it follows from the number of rows and tokens, never from lengths, so a CUDA
graph of one step serves all later ones. Bounds, with U units:

    items <= U + budget                     as max(1, round(x)) <= 1 + x
    partial results <= 4/3 budget           as round(x) >= 2 only from x = 3/2 on

Programs past the last item return at once. budget = programs per multiprocessor * multiprocessors /
key/value heads, so items and heads together fill the GPU about once.

Fixed chunks (deterministic): with min_keys = C and a budget that no batch can exceed, chunk is C. A
row's splits then depend on its own length alone.

Layout: `work` [items, RECORD] int32, a record an item; `count` [1] int32.

What bounds it: its launch and some dependent loads, 1 + (classes that there are) rounds of them for
every BLOCK units, once a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from kernels.triton_runtime import Settings, cdiv, jit, kernel

RECORD = tl.constexpr(8)
"""row, query tile, first key, end of keys, split, splits, first partial result of the unit, -"""

CLASSES = tl.constexpr(4)
"""Of units by their keys; the heavier are dealt first."""

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Splitting:
    """How units are split."""

    min_keys: int
    budget: int

    @classmethod
    def to_fill(cls, num_programs: int, num_kv_heads: int, min_keys: int) -> Splitting:
        """Into items that, with the key/value heads, make about `num_programs`."""
        return cls(min_keys, cdiv(num_programs, num_kv_heads))

    @classmethod
    def fixed(cls, tokens_per_chunk: int, num_units: int, max_context_len: int) -> Splitting:
        """By a number of tokens that doesn't depend on the batch."""
        return cls(tokens_per_chunk, max(1, cdiv(num_units * max_context_len, tokens_per_chunk)))

    @property
    def max_parts(self) -> int:
        """Partial results that there are at most, for each key/value head."""
        return cdiv(4 * self.budget, 3)

    def splits(self, num_keys: list[int]) -> list[int]:
        """Of each unit; what the plan's kernel computes."""
        chunk = max(self.min_keys, cdiv(sum(num_keys), self.budget))
        return [max(1, (keys + chunk // 2) // chunk) for keys in num_keys]


def plan_settings(tokens_per_tile: int, tile: int) -> Settings:
    """How the plan's kernel runs."""
    constants = {"TOKENS": tokens_per_tile, "TILE": tile, "BLOCK": _BLOCK}
    return Settings(constants, num_warps=4, num_stages=1)


def write_work(
    work: Tensor,
    count: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor | None,
    max_tiles: int,
    window: int,
    splitting: Splitting,
    settings: Settings,
) -> None:
    """Fill `work` and `count` for rows of at most `max_tiles` query tiles.

    Without `query_start_loc`, every row has one query token, also one of length 0.
    """
    plan_kernel[(1,)](
        work,
        count,
        context_lens,
        context_lens if query_start_loc is None else query_start_loc,
        len(context_lens),
        max_tiles,
        window,
        splitting.min_keys,
        splitting.budget,
        HAS_STARTS=query_start_loc is not None,
        **settings.keywords(),
    )


@kernel("context_lens", "query_start_loc", "num_rows", "max_tiles", "window", "min_keys", "budget")
def plan_kernel(
    work: tl.tensor,
    count: tl.tensor,
    context_lens: tl.tensor,
    query_start_loc: tl.tensor,
    num_rows: tl.tensor,
    max_tiles: tl.tensor,
    window: tl.tensor,
    min_keys: tl.tensor,
    budget: tl.tensor,
    HAS_STARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (1). Units are numbered by query tile, last first, then by row."""
    num_units = num_rows * max_tiles
    all_keys = tl.zeros([], tl.int64)
    longest = tl.zeros([], tl.int32)
    num_left = tl.zeros([], tl.int32)
    for first in range(0, num_units, BLOCK):
        _, _, start, end, exists = _units(
            first,
            num_units,
            context_lens,
            query_start_loc,
            num_rows,
            max_tiles,
            window,
            HAS_STARTS,
            TOKENS,
            TILE,
            BLOCK,
        )
        all_keys += tl.sum((end - start).to(tl.int64), 0)
        longest = tl.maximum(longest, tl.max(end - start, 0))
        num_left += tl.sum(exists.to(tl.int32), 0)
    chunk = tl.maximum(min_keys, tl.cdiv(all_keys, budget)).to(tl.int32)

    num_items = tl.zeros([], tl.int32)
    num_parts = tl.zeros([], tl.int32)
    of_class = 0
    while num_left > 0:
        most = longest >> of_class
        fewer = tl.where(of_class + 1 < CLASSES, longest >> (of_class + 1), -1)
        for first in range(0, num_units, BLOCK):
            row, query_tile, start, end, exists = _units(
                first,
                num_units,
                context_lens,
                query_start_loc,
                num_rows,
                max_tiles,
                window,
                HAS_STARTS,
                TOKENS,
                TILE,
                BLOCK,
            )
            num_keys = end - start
            dealt = exists & (num_keys > fewer) & (num_keys <= most)
            num_left -= tl.sum(dealt.to(tl.int32), 0)
            splits = tl.maximum((num_keys + chunk // 2) // chunk, 1)
            splits = tl.where(dealt, splits, 0)
            parts = tl.where(splits > 1, splits, 0)
            item = num_items + tl.cumsum(splits, 0) - splits
            part = num_parts + tl.cumsum(parts, 0) - parts
            num_items += tl.sum(splits, 0)
            num_parts += tl.sum(parts, 0)
            tiles = tl.cdiv(num_keys, TILE)
            for split in range(0, tl.max(splits, 0)):
                record = work + (item + split) * RECORD
                there = split < splits
                some = tl.maximum(splits, 1)  # no division by zero where there is no unit
                begin = start + tiles * split // some * TILE
                stop = tl.minimum(start + tiles * (split + 1) // some * TILE, end)
                tl.store(record, row, mask=there)
                tl.store(record + 1, query_tile, mask=there)
                tl.store(record + 2, begin, mask=there)
                tl.store(record + 3, stop, mask=there)
                tl.store(record + 4, split + tl.zeros_like(row), mask=there)
                tl.store(record + 5, splits, mask=there)
                tl.store(record + 6, part, mask=there)
        of_class += 1
    tl.store(count, num_items)


@jit
def load_record(work: tl.tensor, item: tl.tensor) -> tl.tensor:
    """An item's record; of an item that isn't there, whatever was left in its place."""
    record = work + item.to(tl.int64) * RECORD
    row = tl.load(record).to(tl.int64)
    query_tile = tl.load(record + 1)
    begin = tl.load(record + 2)
    end = tl.load(record + 3)
    split = tl.load(record + 4)
    num_splits = tl.load(record + 5)
    first_part = tl.load(record + 6)
    return row, query_tile, begin, end, split, num_splits, first_part


@jit
def _units(
    first: tl.tensor,
    num_units: tl.tensor,
    context_lens: tl.tensor,
    query_start_loc: tl.tensor,
    num_rows: tl.tensor,
    max_tiles: tl.tensor,
    window: tl.tensor,
    HAS_STARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Units first .. first + BLOCK - 1: -> (row, query tile, start, end, exists). Keys before
    `start`, the beginning of a tile, are before the window of all of a unit's queries."""
    unit = first + tl.arange(0, BLOCK)
    row = unit % num_rows
    query_tile = max_tiles - 1 - unit // num_rows
    exists = unit < num_units
    length = tl.load(context_lens + row, mask=exists, other=0)
    if HAS_STARTS:
        starts = query_start_loc + row
        num_queries = tl.load(starts + 1, mask=exists, other=0) - tl.load(
            starts, mask=exists, other=0
        )
    else:
        num_queries = tl.zeros_like(row) + 1
    first_query = query_tile * TOKENS
    exists = exists & (first_query < num_queries)
    before = length - num_queries  # keys of earlier steps
    end = tl.where(exists, tl.minimum(before + first_query + TOKENS, length), 0)
    start = tl.maximum(before + first_query + 1 - window, 0) // TILE * TILE
    start = tl.where((window > 0) & exists, start, 0)
    return row, query_tile, start, end, exists
