"""Paged attention on the CPU: decode, prefill, and any mixture, with one kernel.

A *tile* is a few consecutive query tokens of one row, with the G query heads that share one
key/value head: M = tokens * G queries that all read the same pages. The tile goes through its
row's pages in order, as online softmax (Milakov & Gimelshein, 2018) does, all in base 2:

    s = q K^T * scale * log2(e)        [M, keys of a step]
    m' = max(m, max(s))                running maximum
    p = 2^(s - m')
    l = l * 2^(m - m') + sum(p)        running denominator
    acc = acc * 2^(m - m') + p V       [M, D]

and ends with acc / l. Decode is the case of one token a tile. Every page is read once per
key/value head, whatever G is, and nothing is gathered or copied.

Work split: (tile, key/value head) pairs over threads, heads outermost, so that each thread gets
some heads of every row and rows of different lengths do not unbalance it.

What bounds it: for decode, reading 2 * length * Hkv * D * element bytes a row; for prefill, the
4 * queries * length * Hq * D floating-point operations (half of that for a whole causal prompt).
Pages lie anywhere in memory, where the hardware's prefetcher cannot follow, so the next page is
prefetched by hand; a decode step that reads from DRAM is two to five times as fast for it.

A result depends only on the query, its position and the pages' contents, bit for bit: not on what
else is in the batch, on how the prompt is cut into chunks, or on the number of threads. Keys go
in fours from the start of each page; past a tile's last key the four are filled up with that key
again at weight zero, so no sum ever has another order.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.cpu_runtime import (
    CACHE_LINE_BYTES,
    LOG2_E,
    element_of,
    exp2,
    jit,
    narrow,
    parallel_jit,
    pointer,
    prefetch,
    run_each,
    summing_jit,
    widen,
)

KEYS_PER_STEP = 64
"""Keys between two updates of the running maximum: pages are taken together up to this many."""
QUERIES_PER_TILE = 32
"""Queries (tokens * G) a tile aims at: enough to reuse a page from L1, few enough to stay there."""


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """See `kernels.ops.paged_decode_attention`."""
    no_starts = 0
    return _launch(query, key_cache, value_cache, block_tables, context_lens, no_starts, scale, out)


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """See `kernels.ops.paged_prefill_attention`. `max_query_len` is not needed here."""
    _require_int32(query_start_loc=query_start_loc)
    starts = query_start_loc.data_ptr()
    return _launch(query, key_cache, value_cache, block_tables, context_lens, starts, scale, out)


def _launch(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    starts_address: int,
    scale: float,
    out: Tensor | None,
) -> Tensor:
    """Check what the compiled code relies on, and call it. starts_address 0: one query a row."""
    _require_int32(block_tables=block_tables, context_lens=context_lens)
    if not query.dtype == key_cache.dtype == value_cache.dtype:
        raise TypeError(
            f"query is {query.dtype}, the cache {key_cache.dtype} and {value_cache.dtype}: "
            "allocate the cache in the model's dtype"
        )
    num_tokens, num_heads, head_size = query.shape
    num_blocks, num_kv_heads, block_size, _ = key_cache.shape
    if block_size % 4:
        raise ValueError(f"block_size is {block_size}: make it a multiple of 4")
    if out is None:
        out = torch.empty((num_tokens, num_heads, head_size), dtype=query.dtype)
    group = num_heads // num_kv_heads
    num_rows = len(context_lens)
    tiles, num_keys = _cut(
        starts_address,
        context_lens.data_ptr(),
        num_rows,
        num_tokens,
        max(1, QUERIES_PER_TILE // group),
    )
    run_each(
        _attend,
        _attend_parallel,
        len(tiles) * num_kv_heads,
        4 * num_keys * num_heads * head_size,
        element_of(query),
        tiles,
        group,
        scale * LOG2_E,
        query.data_ptr(),
        query.stride(0),
        out.data_ptr(),
        out.stride(0),
        num_tokens,
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        num_blocks,
        num_kv_heads,
        block_size,
        head_size,
        block_tables.data_ptr(),
        block_tables.stride(0),
        num_rows,
    )
    return out


def _require_int32(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.int32:
            raise TypeError(f"{name} is {tensor.dtype}: make it torch.int32")


@jit
def _cut(
    starts_address: int, lens_address: int, num_rows: int, num_tokens: int, tile_size: int
) -> Any:
    """Cut the rows into tiles, and count the (query token, key) pairs.

    A tile is (row, first token, token after the last, number of keys that the first token sees).
    """
    lens = numba.carray(pointer(lens_address, np.int32(0)), (num_rows,))
    starts = numba.carray(pointer(starts_address, np.int32(0)), (num_rows + 1,))
    tiles = np.empty((num_tokens // tile_size + num_rows, 4), np.int64)
    n = num_keys = 0
    for row in range(num_rows):
        start, end = row, row + 1
        if starts_address != 0:
            start, end = starts[row], starts[row + 1]
        num_keys += (end - start) * lens[row]
        for first in range(start, end, tile_size):
            tiles[n, 0] = row
            tiles[n, 1] = first
            tiles[n, 2] = min(first + tile_size, end)
            tiles[n, 3] = lens[row] - end + first + 1
            n += 1
    return tiles[:n], num_keys


@jit
def _attend(
    begin: int,
    end: int,
    element: Any,
    tiles: Any,
    group: int,
    scale: float,
    query_address: int,
    query_stride: int,
    out_address: int,
    out_stride: int,
    num_tokens: int,
    key_address: int,
    value_address: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_size: int,
    tables_address: int,
    tables_stride: int,
    num_rows: int,
) -> None:
    """(Tile, key/value head) pairs begin .. end - 1; heads change slowest."""
    cache_shape = (num_blocks, num_kv_heads, block_size, head_size)
    keys = numba.carray(pointer(key_address, element), cache_shape)
    values = numba.carray(pointer(value_address, element), cache_shape)
    query = numba.carray(pointer(query_address, element), (num_tokens, query_stride))
    out = numba.carray(pointer(out_address, element), (num_tokens, out_stride))
    tables = numba.carray(pointer(tables_address, np.int32(0)), (num_rows, tables_stride))
    for pair in range(begin, end):
        tile = tiles[pair % len(tiles)]
        _attend_tile(
            query,
            tile,
            pair // len(tiles),
            group,
            keys,
            values,
            tables,
            np.float32(scale),
            out,
        )


@parallel_jit
def _attend_parallel(num_pairs: int, *arguments: Any) -> None:
    for pair in numba.prange(num_pairs):
        _attend(pair, pair + 1, *arguments)


@jit
def _attend_tile(
    query: Any,
    tile: Any,
    kv_head: int,
    group: int,
    keys: Any,
    values: Any,
    tables: Any,
    scale: Any,
    out: Any,
) -> None:
    """One tile (see `_cut`) with one key/value head.

    query, out [T, stride]; keys, values [num_blocks, Hkv, block_size, D]; tables [R, max_blocks].
    """
    row, first, after, visible = tile[0], tile[1], tile[2], tile[3]
    block_size, head_size = keys.shape[2:]
    tokens = after - first
    queries = tokens * group
    scaled = np.empty((queries, head_size), np.float32)
    for m in range(queries):
        column = (kv_head * group + m % group) * head_size
        for d in range(head_size):
            scaled[m, d] = widen(query[first + m // group, column + d]) * scale
    highest = np.full(queries, -np.inf, np.float32)
    total = np.zeros(queries, np.float32)
    acc = np.zeros((queries, head_size), np.float32)

    length = visible + tokens - 1
    num_pages = (length + block_size - 1) // block_size
    step = max(1, KEYS_PER_STEP // block_size)
    scores = np.empty((queries, step * block_size + 3), np.float32)
    for begin in range(0, num_pages, step):
        end = min(begin + step, num_pages)
        passed = begin * block_size
        for page in range(begin, end):
            block = tables[row, page]
            num_keys = min(block_size, length - page * block_size)
            column = page * block_size - passed
            _score(scaled, keys[block, kv_head], num_keys, values[block, kv_head], scores, column)
        for m in range(queries):
            seen = max(0, min(step * block_size, visible + m // group - passed))
            _weigh(scores, seen, m, highest, total, acc)
        for page in range(begin, end):
            block = tables[row, page]
            later = tables[row, min(page + step, num_pages - 1)]
            num_keys = min(block_size, length - page * block_size)
            column = page * block_size - passed
            _accumulate(scores, column, values[block, kv_head], num_keys, keys[later, kv_head], acc)

    for m in range(queries):
        inverse = np.float32(1) / total[m] if length > 0 else np.float32(0)
        column = (kv_head * group + m % group) * head_size
        for d in range(head_size):
            out[first + m // group, column + d] = narrow(acc[m, d] * inverse, out[0, 0])


@summing_jit
def _score(scaled: Any, keys: Any, num_keys: int, soon: Any, scores: Any, column: int) -> None:
    """scores[m, column + t] = scaled[m] . keys[t], four keys at a time; prefetches page `soon`."""
    queries, head_size = scaled.shape
    last = num_keys - 1
    for t in range(0, num_keys, 4):
        k0, k1 = keys[t], keys[min(t + 1, last)]
        k2, k3 = keys[min(t + 2, last)], keys[min(t + 3, last)]
        for place in range(t * head_size, (t + 4) * head_size, CACHE_LINE_BYTES // soon.itemsize):
            prefetch(soon, place)
        for m in range(queries):
            s0 = s1 = s2 = s3 = np.float32(0)
            for d in range(head_size):
                q = scaled[m, d]
                s0 += q * widen(k0[d])
                s1 += q * widen(k1[d])
                s2 += q * widen(k2[d])
                s3 += q * widen(k3[d])
            scores[m, column + t] = s0
            scores[m, column + t + 1] = s1
            scores[m, column + t + 2] = s2
            scores[m, column + t + 3] = s3


@summing_jit
def _weigh(scores: Any, seen: int, m: int, highest: Any, total: Any, acc: Any) -> None:
    """Turn query m's scores into weights, zero past the `seen` keys that it may look at."""
    top = highest[m]
    for t in range(seen):
        top = max(top, scores[m, t])
    if top > highest[m]:
        shrink = exp2(highest[m] - top)
        highest[m] = top
        total[m] *= shrink
        for d in range(acc.shape[1]):
            acc[m, d] *= shrink
    step_total = np.float32(0)
    for t in range(seen):
        weight = exp2(scores[m, t] - top)
        scores[m, t] = weight
        step_total += weight
    for t in range(seen, scores.shape[1]):
        scores[m, t] = 0
    total[m] += step_total


@jit
def _accumulate(weights: Any, column: int, values: Any, num_keys: int, soon: Any, acc: Any) -> None:
    """acc[m] += weights[m, column + t] * values[t], four values at a time; prefetches `soon`."""
    queries, head_size = acc.shape
    last = num_keys - 1
    for t in range(0, num_keys, 4):
        v0, v1 = values[t], values[min(t + 1, last)]
        v2, v3 = values[min(t + 2, last)], values[min(t + 3, last)]
        for place in range(t * head_size, (t + 4) * head_size, CACHE_LINE_BYTES // soon.itemsize):
            prefetch(soon, place)
        for m in range(queries):
            w0 = weights[m, column + t]
            w1 = weights[m, column + t + 1]
            w2 = weights[m, column + t + 2]
            w3 = weights[m, column + t + 3]
            for d in range(head_size):
                first_two = w0 * widen(v0[d]) + w1 * widen(v1[d])
                acc[m, d] += first_two + w2 * widen(v2[d]) + w3 * widen(v3[d])
