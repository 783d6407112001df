"""What one item of the CPU's attention keeps while it goes through its keys, and one step of that.

See `kernels.cpu_attention` for the whole. A step scores up to 64 keys for a group of queries, turns
the scores into weights, and adds the values so weighted to the group's sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from kernels.cpu_elements import COLUMNS, HAS_WIDE_VECTORS, STEP_BYTES
from kernels.cpu_packing import numbers_per_step, pack_step
from kernels.cpu_panels import PANEL_BYTES, panel_multiplier
from kernels.cpu_runtime import CACHE_LINE_BYTES, LOG2_E, exp2, jit, pointer, prefetch
from kernels.cpu_softmax import KEYS, weigh_scores
from kernels.cpu_tiles import TILE_ROWS

KEYS_PER_STEP = KEYS
"""Keys between two updates of the running maximum, at most: small pages are taken together up to
this many, large ones in parts of this many."""
GROUP_ROWS = 12 if HAS_WIDE_VECTORS else 6
"""Queries of a group, except the last one of a tile."""

_ROWS_FOR = tuple(
    min(rows for rows in TILE_ROWS if rows >= needed) for needed in range(GROUP_ROWS + 1)
)
_SCORE_COLUMNS = KEYS_PER_STEP + COLUMNS
"""Of a row of scores; the last panel may begin anywhere among the step's keys."""
_ROW_BYTES = _SCORE_COLUMNS * 4
"""From a row of scores to the next, and from a row of weights to the next."""
MOST_RUNS = KEYS_PER_STEP
"""Of a step, with one key a page; a run is what a step takes of one page."""

_multiply_queries = panel_multiplier(0, adds=0)
_multiply_weights = panel_multiplier(_ROW_BYTES, adds=1)


Soon = tuple[Any, int]
"""Runs whose keys and values will be needed next, and how many."""


class Item(NamedTuple):
    """One item's sizes, and addresses in the thread's scratch."""

    queries: int
    """M."""
    group: int
    head_size: int
    width: int
    """The head size filled up to whole panels."""
    num_steps: int
    """Steps of a head."""
    block_size: int
    packed: int
    """The packed queries, group after group."""
    sums: int
    """acc, [M, width] float32."""
    highest: int
    """m, [M] float32."""
    total: int
    """l, [M] float32."""
    scores: int
    """A group's scores, float32, _ROW_BYTES a row."""
    weights: int
    """A group's weights, _ROW_BYTES a row."""
    line: int
    """One step of values."""
    runs: int
    """[2, MOST_RUNS, 2] int64: where the keys and values of this step's runs lie, and of the next
    one's."""


def item_bytes(queries: int, head_size: int) -> int:
    """Size of the memory that an item of so many queries takes."""
    rows = queries + GROUP_ROWS
    width = head_size + COLUMNS
    of_rows = rows * (2 * width * 4 + 2 * 4)
    of_group = 2 * GROUP_ROWS * _ROW_BYTES
    of_step = 2 * MOST_RUNS * 16 + (width + COLUMNS) * STEP_BYTES
    return of_rows + of_group + of_step + 8 * CACHE_LINE_BYTES


@jit
def lay_out(
    element: Any, scratch: int, queries: int, group: int, head_size: int, block_size: int
) -> Item:
    """Cut up the scratch for an item of so many queries; `item_bytes` says how much it takes."""
    num_steps = head_size // numbers_per_step(element)
    rows, width = _round_up(queries, GROUP_ROWS), _round_up(head_size, COLUMNS)
    sums = scratch + _round_up(rows * num_steps * STEP_BYTES, CACHE_LINE_BYTES)
    highest = sums + rows * width * 4
    total = highest + _round_up(rows * 4, CACHE_LINE_BYTES)
    scores = total + _round_up(rows * 4, CACHE_LINE_BYTES)
    weights = scores + GROUP_ROWS * _ROW_BYTES
    line = weights + GROUP_ROWS * _ROW_BYTES
    runs = line + (width + COLUMNS) * STEP_BYTES
    sizes = (queries, group, head_size, width, num_steps, block_size)
    return Item(*sizes, scratch, sums, highest, total, scores, weights, line, runs)


@jit
def set_up(element: Any, item: Item, place: int, stride: int, scale: float) -> None:
    """Pack the scaled queries in groups, with zeros in rows that fill up a group; reset sums."""
    scaled = numba.carray(pointer(item.scores, np.float32(0)), (item.head_size,))
    factor = np.float32(scale * LOG2_E)
    for first in range(0, item.queries, GROUP_ROWS):
        rows = _ROWS_FOR[min(item.queries - first, GROUP_ROWS)]
        words_place = item.packed + first * item.num_steps * STEP_BYTES
        words = numba.carray(pointer(words_place, np.uint32(0)), (item.num_steps, rows))
        for row in range(rows):
            m = first + row
            if m >= item.queries:
                words[:, row] = 0
                continue
            query_place = place + (m // item.group * stride + m % item.group * item.head_size) * 4
            query = numba.carray(pointer(query_place, np.float32(0)), (item.head_size,))
            for d in range(item.head_size):
                scaled[d] = query[d] * factor
            for step in range(item.num_steps):
                words[step, row] = pack_step(element, scaled, step)
    numba.carray(pointer(item.sums, np.float32(0)), (item.queries * item.width,))[:] = 0
    numba.carray(pointer(item.highest, np.float32(0)), (item.queries,))[:] = -np.inf
    numba.carray(pointer(item.total, np.float32(0)), (item.queries,))[:] = 0


@jit
def score(
    element: Any, item: Item, first: int, rows: int, num_keys: int, runs: Any, soon: Soon
) -> None:
    """A group's scores for the first `num_keys` keys of a step; garbage in the columns after.
    Meanwhile the keys of `soon` are brought into the cache, page for page.
    """
    next_runs, num_next = soon
    key_step = item.block_size * STEP_BYTES
    tile_rows = _ROWS_FOR[rows]
    run = start = 0
    while start < num_keys:
        keys = runs[run, 0]
        panel_distance, together = PANEL_BYTES, 1
        if item.block_size == COLUMNS and num_keys - start > COLUMNS:
            panel_distance, together = runs[run + 1, 0] - keys, 2  # two pages as two panels
        run_keys = min(together * item.block_size, num_keys - start)
        ahead, ahead_step, ahead_panel = keys, 0, 0
        if run < num_next:
            last = min(run + together, num_next) - 1
            ahead, ahead_step = next_runs[run, 0], key_step
            ahead_panel = PANEL_BYTES if together == 1 else next_runs[last, 0] - ahead
        _multiply_queries(
            element,
            element,
            tile_rows,
            (run_keys + COLUMNS - 1) // COLUMNS,
            item.packed + first * item.num_steps * STEP_BYTES,
            keys,
            key_step,
            panel_distance,
            item.num_steps,
            ahead,
            ahead_step,
            ahead_panel,
            item.scores + start * 4,
            _ROW_BYTES,
        )
        run += together
        start += run_keys
    _bring_keys(item, soon, _round_up(start, min(COLUMNS, item.block_size)))


@jit
def weigh(element: Any, item: Item, row: int, m: int, seen: int) -> None:
    """Turn a group's row of scores into query m's weights, zero past the first `seen` keys."""
    weights = item.weights + row * _ROW_BYTES
    if seen <= 0:
        numba.carray(pointer(weights, np.uint32(0)), (KEYS_PER_STEP,))[:] = 0
        return
    highest = numba.carray(pointer(item.highest, np.float32(0)), (item.queries,))
    total = numba.carray(pointer(item.total, np.float32(0)), (item.queries,))
    before = highest[m]
    top, added = weigh_scores(element, item.scores + row * _ROW_BYTES, seen, before, weights)
    if top > before:
        shrink = exp2(before - top)
        highest[m] = top
        total[m] *= shrink
        sums_place = item.sums + m * item.width * 4
        sums = numba.carray(pointer(sums_place, np.float32(0)), (item.width,))
        for d in range(item.width):
            sums[d] *= shrink
    total[m] += added


@jit
def accumulate(
    element: Any,
    item: Item,
    first: int,
    rows: int,
    num_keys: int,
    runs: Any,
    soon: Soon,
) -> None:
    """Add a group's weighted values, those of the first `num_keys` keys of a step, to its sums.
    Meanwhile the values of `soon` are brought into the cache, page for page.
    """
    next_runs, num_next = soon
    p = numbers_per_step(element)
    step_bytes = item.head_size * STEP_BYTES
    start = 0
    while start < num_keys:
        run = start // item.block_size
        offset = start - run * item.block_size
        steps = min(item.block_size - offset, num_keys - start) // p
        values = runs[run, 1] + offset // p * step_bytes
        if steps == 0:  # the second of two keys may be anything: take zeros instead
            _copy_first(values, item.line, item.head_size)
            values, steps = item.line, 1
        ahead, ahead_step, ahead_panel = values, 0, 0
        if run < num_next:
            ahead = next_runs[run, 1] + offset // p * step_bytes
            ahead_step, ahead_panel = step_bytes, PANEL_BYTES
        _multiply_weights(
            element,
            element,
            _ROWS_FOR[rows],
            item.width // COLUMNS,
            item.weights + start // p * STEP_BYTES,
            values,
            step_bytes,
            PANEL_BYTES,
            steps,
            ahead,
            ahead_step,
            ahead_panel,
            item.sums + first * item.width * 4,
            item.width * 4,
        )
        start += steps * p
    _bring_values(element, item, soon, start)


@jit
def _bring_keys(item: Item, soon: Soon, first: int) -> None:
    """Bring the keys into the cache, but for `first` ones."""
    runs, num_runs = soon
    of_run = min(item.block_size, KEYS_PER_STEP)
    for key in range(first, num_runs * of_run, min(COLUMNS, of_run)):
        run = key // of_run
        keys = runs[run, 0] + (key - run * of_run) * STEP_BYTES
        for step in range(item.num_steps):
            prefetch(keys + step * item.block_size * STEP_BYTES)


@jit
def _bring_values(element: Any, item: Item, soon: Soon, first: int) -> None:
    """Bring the values into the cache, but for `first` ones."""
    runs, num_runs = soon
    of_run = min(item.block_size, KEYS_PER_STEP)
    p = numbers_per_step(element)
    step_bytes = item.head_size * STEP_BYTES
    for key in range(first, num_runs * of_run, p):
        run = key // of_run
        values = runs[run, 1] + (key - run * of_run) // p * step_bytes
        for line in range(0, step_bytes, CACHE_LINE_BYTES):
            prefetch(values + line)


@jit
def _copy_first(values: int, line: int, head_size: int) -> None:
    """Copy one step of two keys' values, the second key's as zeros."""
    words = numba.carray(pointer(values, np.uint32(0)), (head_size,))
    copies = numba.carray(pointer(line, np.uint32(0)), (head_size,))
    for d in range(head_size):
        copies[d] = words[d] & np.uint32(0xFFFF)


@jit
def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
