"""Runs the CPU's attention over a made-up batch, one item after another on one thread."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.cpu_attention import attend, cut_tiles, max_tiles, scratch_bytes, tile_tokens
from kernels.cpu_kv_cache import arrange_keys, arrange_values
from kernels.cpu_runtime import CACHE_LINE_BYTES, jit, zero_of
from tests.kernels.paged_cases import PagedBatch

STEP_BYTES = 4
GUARD = 77


@jit
def _attend_all(element: Any, tiles: Any, num_kv_heads: int, group: int, *arguments: Any) -> None:
    num_items = len(tiles) * num_kv_heads
    for item in range(num_items):
        attend(element, tiles, item, (item + 1) % num_items, group, num_kv_heads, *arguments)


def attend_all(batch: PagedBatch, block_rows: int = 1) -> Tensor:
    """Attention of every token of the batch; [T, Hq, D].

    What the kernel may not read is NaN, what it may not write is guarded.
    """
    num_tokens, num_heads, head_size = batch.query.shape
    _, num_kv_heads, block_size, _ = batch.key_cache.shape
    group, columns = num_heads // num_kv_heads, num_heads * head_size
    dtype = batch.key_cache.dtype
    keys = _with_slack(arrange_keys(batch.key_cache))
    values = _with_slack(arrange_values(batch.value_cache))
    query = batch.query.float().contiguous()

    tiles = np.zeros((max_tiles(num_tokens, len(batch.context_lens), group), 4), np.int64)
    starts, lens = batch.query_start_loc.data_ptr(), batch.context_lens.data_ptr()
    count = cut_tiles(starts, lens, len(batch.context_lens), tile_tokens(group), tiles)
    num_blocks, p = -(-num_tokens // block_rows), STEP_BYTES // dtype.itemsize
    out = torch.full((num_blocks, columns // p, block_rows, p), torch.nan, dtype=dtype)
    size = scratch_bytes(group, head_size)
    scratch = torch.full((size + 4096,), GUARD, dtype=torch.uint8)
    _attend_all(
        zero_of(keys.dtype),
        tiles[:count],
        num_kv_heads,
        group,
        head_size,
        block_size,
        batch.scale,
        query.data_ptr(),
        columns,
        keys.data_ptr(),
        values.data_ptr(),
        batch.block_tables.data_ptr(),
        batch.block_tables.stride(0),
        out.data_ptr(),
        block_rows,
        scratch.data_ptr(),
    )
    assert (scratch[size:] == GUARD).all()
    rows = out.transpose(1, 2).reshape(-1, columns)
    assert rows[num_tokens:].isnan().all()
    return rows[:num_tokens].view(num_tokens, num_heads, head_size)


def _with_slack(cache: Tensor) -> Tensor:
    slack = CACHE_LINE_BYTES // cache.dtype.itemsize
    memory = torch.full((cache.numel() + slack,), torch.nan, dtype=cache.dtype)
    memory[: cache.numel()] = cache.flatten()
    return memory[: cache.numel()].view(cache.shape)
