"""Paged causal attention on a GPU for rows with any number of query tokens.

Program (query tile, key/value head, row) holds BLOCK_M queries: BLOCK_M // G consecutive tokens of
its row, times the G query heads of its head (see `kernels.triton_attention` for the step). It goes
over the keys in two phases: tiles that every one of its queries sees whole, without a mask, then
the few on the diagonal, with one. A row's queries are the last tokens of its context, so query i
of n, at position L - n + i, sees L - n + i + 1 keys.

The grid covers the longest row; programs past the end of a shorter row return at once.

What bounds it: for long chunks the 4 * (visible keys) * Hq * D FLOP a query token; for a few
tokens over a long context, reading the cache, once per tile and key/value head.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels.triton_attention import LOG2_E, attend_keys, attention_settings
from kernels.triton_runtime import cdiv, jit


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
    """See `kernels.ops.paged_prefill_attention`."""
    num_tokens, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    if out is None:
        shape = (num_tokens, num_heads, head_size)
        out = torch.empty(shape, dtype=query.dtype, device=query.device)
    group = num_heads // num_kv_heads
    settings = attention_settings(head_size, group, block_size, query.element_size(), max_query_len)
    tokens_per_tile = settings.constants["BLOCK_M"] // group
    num_tiles = cdiv(max_query_len, tokens_per_tile)
    prefill_kernel[(num_tiles, num_kv_heads, len(context_lens))](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        query_start_loc,
        scale * LOG2_E,
        query.stride(0),
        out.stride(0),
        block_tables.stride(0),
        key_cache.stride(0),
        **settings.keywords(),
    )
    return out


@jit
def prefill_kernel(
    out: tl.tensor,
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    query_start_loc: tl.tensor,
    scale: tl.tensor,
    query_stride: tl.tensor,
    out_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Grid (query tiles of the longest row, Hkv, R)."""
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    start = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - start
    first_query = tl.program_id(0) * TOKENS
    if first_query >= num_queries:
        return
    length = tl.load(context_lens + row)
    before = length - num_queries  # keys of earlier steps

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, PADDED_HEAD)
    token = first_query + m // GROUP
    head = kv_head * GROUP + m % GROUP
    present = ((m < TOKENS * GROUP) & (token < num_queries))[:, None] & (d < HEAD_SIZE)[None, :]
    index = (start + token).to(tl.int64)[:, None]
    places = head[:, None] * HEAD_SIZE + d[None, :]
    q = tl.load(query + index * query_stride + places, mask=present, other=0.0)
    acc = tl.zeros([BLOCK_M, PADDED_HEAD], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    limit = before + token + 1
    end = tl.minimum(before + first_query + TOKENS, length)
    full_end = (before + first_query + 1) // TILE * TILE
    keys = key_cache + kv_head * BLOCK_SIZE * HEAD_SIZE
    values = value_cache + kv_head * BLOCK_SIZE * HEAD_SIZE
    table = block_tables + row * table_stride
    for first in range(0, full_end, TILE):
        acc, highest, total = attend_keys(
            q,
            acc,
            highest,
            total,
            first,
            end,
            limit,
            keys,
            values,
            table,
            block_stride,
            scale,
            HEAD_SIZE,
            PADDED_HEAD,
            BLOCK_SIZE,
            TILE,
            MASKED=False,
        )
    for first in range(full_end, end, TILE):
        acc, highest, total = attend_keys(
            q,
            acc,
            highest,
            total,
            first,
            end,
            limit,
            keys,
            values,
            table,
            block_stride,
            scale,
            HEAD_SIZE,
            PADDED_HEAD,
            BLOCK_SIZE,
            TILE,
            MASKED=True,
        )

    result = acc / total[:, None]
    tl.store(out + index * out_stride + places, result.to(out.dtype.element_ty), mask=present)
