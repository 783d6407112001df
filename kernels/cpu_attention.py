"""Paged attention on the CPU: decode, prefill, and any mixture, with one kernel.

A *tile* is a few consecutive query tokens of one row, with the G query heads that share one
key/value head: M = tokens * G queries that all read the same pages. An *item* of work, which one
thread does alone, is a tile with one key/value head. It goes through the row's pages in order, as
online softmax (Milakov & Gimelshein, 2018) does, all in base 2:

    s = q K^T * scale * log2(e)        [M, keys of a step]
    m' = max(m, max(s))                running maximum
    p = 2^(s - m')
    l = l * 2^(m - m') + sum(p)        running denominator
    acc = acc * 2^(m - m') + p V       [M, D]

and ends with acc / l. Decode is the case of one token a tile. Both products are tiles of
`kernels.cpu_tiles` over caches arranged for them (`kernels.cpu_kv_cache`); q and p are rounded to
the model's type for them, sums are float32.

Queries go in *groups* of as many rows as `multiply_tile` takes, and all groups take a step before
any takes the next, so pages are read from memory once. They lie anywhere, where the hardware's
prefetcher cannot follow, so they are brought in by hand, while the step before them is computed;
those of an item's first step during the last one of the item that the thread did before.

What bounds it: for decode, reading 2 * length * Hkv * D * element bytes a row; for prefill, the
4 * queries * length * Hq * D floating-point operations (half of that for a whole causal prompt).

A result depends only on the query, its position and the contents of the slots up to there, bit for
bit: not on what else is in the batch, on how the prompt is cut into chunks, or on the number of
threads. Steps of keys are counted from the row's first key; a query that sees only a part of a
step, or none of it, gives the rest the weight zero, which adds nothing; and whatever lies in slots
past the tile's last key, NaN included, is kept out of every sum.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from kernels.cpu_attention_step import (
    GROUP_ROWS,
    KEYS_PER_STEP,
    MOST_RUNS,
    Item,
    accumulate,
    item_bytes,
    lay_out,
    score,
    set_up,
    weigh,
)
from kernels.cpu_elements import STEP_BYTES
from kernels.cpu_packing import numbers_per_step, store_packed
from kernels.cpu_runtime import jit, pointer

QUERIES_PER_TILE = 96
"""Queries (tokens * G) a tile aims at: enough to read each page once for many of them, few enough
for their sums to stay in the second-level cache."""


def tile_tokens(group: int) -> int:
    """Tokens of a tile, for G query heads a key/value head."""
    return max(1, QUERIES_PER_TILE // group)


def max_tiles(num_tokens: int, num_rows: int, group: int) -> int:
    """How many tiles `cut_tiles` may make."""
    return num_tokens // tile_tokens(group) + num_rows


def scratch_bytes(group: int, head_size: int) -> int:
    """Size of the memory that `attend` needs for itself."""
    return item_bytes(tile_tokens(group) * group, head_size)


@jit
def cut_tiles(starts: int, context_lens: int, num_rows: int, tokens: int, tiles: Any) -> int:
    """Cut rows into tiles of at most `tokens` tokens; returns how many.

    starts, the address of [num_rows + 1] int32: row r owns tokens starts[r] to starts[r + 1] - 1,
    the last of its context. context_lens, that of [num_rows] int32. tiles, an int64 array
    [max_tiles, 4], gets (row, first token, token after the last, keys that the first one sees).
    """
    bounds = numba.carray(pointer(starts, np.int32(0)), (num_rows + 1,))
    lens = numba.carray(pointer(context_lens, np.int32(0)), (num_rows,))
    count = 0
    for row in range(num_rows):
        end = bounds[row + 1]
        for first in range(bounds[row], end, tokens):
            tiles[count, 0] = row
            tiles[count, 1] = first
            tiles[count, 2] = min(first + tokens, end)
            tiles[count, 3] = lens[row] - end + first + 1
            count += 1
    return count


@jit
def attend(
    element: Any,
    tiles: Any,
    number: int,
    next_number: int,
    group: int,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    scale: float,
    query: int,
    query_stride: int,
    key_cache: int,
    value_cache: int,
    block_tables: int,
    tables_stride: int,
    out: int,
    block_rows: int,
    scratch: int,
) -> None:
    """One item by its number, one of `len(tiles) * num_kv_heads`. `next_number` is that of the one
    which the thread will likely do next. Addresses, and distances in elements:

    query        [T, query_stride] float32, head h at columns h * D, normed and rotated
    key_cache, value_cache
                 [num_blocks, Hkv, block_size, D], arranged as `kernels.cpu_kv_cache` says
    block_tables [R, tables_stride] int32
    out          [T, Hq * D], packed in blocks of `block_rows` rows (`kernels.cpu_packing`)
    scratch      `scratch_bytes(G, D)` bytes, on a multiple of 64, of the calling thread
    """
    tile, kv_head = _item(tiles, number, num_kv_heads)
    next_tile, next_kv_head = _item(tiles, next_number, num_kv_heads)
    token, visible, length = tile[1], tile[3], _num_keys(tile)
    item = lay_out(element, scratch, (tile[2] - token) * group, group, head_size, block_size)
    first_column = kv_head * group * head_size
    set_up(element, item, query + (token * query_stride + first_column) * 4, query_stride, scale)

    caches = key_cache, value_cache
    place = (block_tables + tile[0] * tables_stride * 4, num_kv_heads, kv_head)
    next_place = (block_tables + next_tile[0] * tables_stride * 4, num_kv_heads, next_kv_head)
    both = numba.carray(pointer(item.runs, np.int64(0)), (2, MOST_RUNS, 2))
    runs, soon = both[0], both[1]
    of_step = max(KEYS_PER_STEP // block_size, 1)
    num_runs = _run_of(length - 1, block_size) + 1
    num_next = min(_run_of(_num_keys(next_tile) - 1, block_size) + 1, of_step)
    brought = min(of_step, num_runs)
    for first_run in range(0, num_runs, of_step):
        end_run = min(first_run + of_step, num_runs)
        for run in range(first_run, end_run):
            _find_run(element, item, caches, place, run, runs[run - first_run])
        # As many runs are brought as are read, those of the next item following this one's.
        to_bring = end_run - first_run if end_run < num_runs else num_runs + num_next - brought
        for i in range(to_bring):
            run = brought + i
            if run < num_runs:
                _find_run(element, item, caches, place, run, soon[i])
            else:
                _find_run(element, item, caches, next_place, run - num_runs, soon[i])
        brought += to_bring
        begin = _first_key(first_run, block_size)
        end = min(_first_key(first_run + of_step, block_size), length)
        for first in range(0, item.queries, GROUP_ROWS):
            rows = min(item.queries - first, GROUP_ROWS)
            num_keys = min(visible + (first + rows - 1) // group, end) - begin
            if num_keys <= 0:
                continue
            score(element, item, first, rows, num_keys, runs, (soon, to_bring))
            for row in range(rows):
                m = first + row
                weigh(element, item, row, m, min(visible + m // group, end) - begin)
            accumulate(element, item, first, rows, num_keys, runs, (soon, to_bring))
            to_bring = 0  # for the other groups, the pages are there

    num_columns = num_kv_heads * group * head_size
    sums = numba.carray(pointer(item.sums, np.float32(0)), (item.queries, item.width))
    total = numba.carray(pointer(item.total, np.float32(0)), (item.queries,))
    for m in range(item.queries):
        inverse = np.float32(1) / total[m] if total[m] != 0 else np.float32(0)
        for d in range(head_size):
            sums[m, d] *= inverse
        column = first_column + m % group * head_size
        line = sums[m, :head_size]
        store_packed(element, out, block_rows, num_columns, token + m // group, column, line)


@jit
def _item(tiles: Any, number: int, num_kv_heads: int) -> Any:
    """An item's tile and key/value head. All heads of a tile come one after the other, as they lie
    in a page; and the last tile comes first: the later ones of a prompt see more keys, and take
    longest.
    """
    place, kv_head = divmod(number, num_kv_heads)
    return tiles[len(tiles) - 1 - place], kv_head


@jit
def _num_keys(tile: Any) -> int:
    """Keys that the last query of a tile sees."""
    return int(tile[3] + tile[2] - tile[1] - 1)


@jit
def _run_of(key: int, block_size: int) -> int:
    """The number, from a row's first on, of the run that holds a key."""
    page, offset = divmod(key, block_size)
    return int(page * _runs_per_page(block_size) + offset // KEYS_PER_STEP)


@jit
def _first_key(run: int, block_size: int) -> int:
    page, part = divmod(run, _runs_per_page(block_size))
    return int(page * block_size + part * KEYS_PER_STEP)


@jit
def _runs_per_page(block_size: int) -> int:
    return int((block_size + KEYS_PER_STEP - 1) // KEYS_PER_STEP)


@jit
def _find_run(
    element: Any,
    item: Item,
    caches: tuple[int, int],
    place: tuple[int, int, int],
    run: int,
    found: Any,
) -> None:
    """Where the keys and the values of a run lie.

    `place`: a row's block table, and of how many key/value heads in a page which one.
    """
    table_place, num_kv_heads, kv_head = place
    page, part = divmod(run, _runs_per_page(item.block_size))
    offset = part * KEYS_PER_STEP
    table = numba.carray(pointer(table_place, np.int32(0)), (page + 1,))
    head_bytes = item.block_size * item.num_steps * STEP_BYTES
    value_offset = offset // numbers_per_step(element) * item.head_size
    start = (table[page] * num_kv_heads + kv_head) * head_bytes
    found[0] = caches[0] + start + offset * STEP_BYTES
    found[1] = caches[1] + start + value_offset * STEP_BYTES
