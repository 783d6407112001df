"""Paged causal attention on a GPU for rows with any number of query tokens.

Program (item, key/value head) holds one query tile: BLOCK_M // G consecutive tokens of a row, times
the G query heads of its head (`kernels.triton_work` says which; `kernels.triton_attention` has the
step, `kernels.triton_merge` the end). A row's queries are the last tokens of its context, so query
i of n, at position L - n + i, sees L - n + i + 1 keys, or with a window W > 0 the last W of those.

    query, out [T, Hq, D]; key_cache, value_cache [blocks, Hkv, block_size, D]
    block_tables [R, max_blocks]; context_lens [R]; query_start_loc [R + 1]

A tile goes over its keys in phases: those at the beginning of the window, with a mask; those that
all of its queries see, without one; those on the diagonal, with one. Tiles with the most keys start
first. A few query tokens over a long context are too few tiles to fill a GPU, so those are split
along the keys as in decode; a long prompt's are not.

What bounds it: for long chunks the tensor cores, 4 * (keys seen, summed over queries) * Hq * D
FLOP; for a few tokens over a long context reading the cache (`kernels.shapes.prefill_cost`). A tile
makes BLOCK_M FLOP of each byte of a 16-bit cache that it reads, an H200 could make some 180 of one
from its memory; but the tiles of a row read the same keys, most of them from L2.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels import ops
from kernels.triton_attention import LOG2_E, attend_range, load_blocks, load_queries, zeros
from kernels.triton_merge import finish
from kernels.triton_plan import PrefillPlan, shape_of
from kernels.triton_runtime import kernel
from kernels.triton_work import load_record


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
    window: int = 0,
    plan: ops.PrefillPlan | None = None,
) -> Tensor:
    """See `kernels.ops.paged_prefill_attention`."""
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if plan is None:
        plan = PrefillPlan(shape_of(query, key_cache), query.device, window=window)
        plan.update(context_lens, query_start_loc, max_query_len, len(query))
    assert isinstance(plan, PrefillPlan), f"{plan!r} was made for something else"
    assert plan.window == window, f"a plan for window {plan.window}, used for {window}"
    prefill_kernel[(plan.num_items * key_cache.shape[1],)](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        query_start_loc,
        plan.work,
        plan.count,
        plan.partial,
        plan.lse,
        plan.counters,
        scale * LOG2_E,
        window,
        query.stride(0),
        out.stride(0),
        block_tables.stride(0),
        key_cache.stride(0),
        **plan.settings.keywords(),
    )
    return out


@kernel("block_tables", "context_lens", "query_start_loc", "window", "table_stride")
def prefill_kernel(
    out: tl.tensor,
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    query_start_loc: tl.tensor,
    work: tl.tensor,
    count: tl.tensor,
    partial: tl.tensor,
    lse: tl.tensor,
    counters: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    query_stride: tl.tensor,
    out_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_LOW: tl.constexpr,
    HEAD_HIGH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """Grid (items * Hkv)."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    item = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    num_items = tl.load(count)
    row, query_tile, begin, end, split, num_splits, first_part = load_record(work, item)
    if item >= num_items:
        return
    first_token = tl.load(query_start_loc + row)
    num_queries = tl.load(query_start_loc + row + 1) - first_token
    before = tl.load(context_lens + row) - num_queries  # keys of earlier steps
    first_query = query_tile * TOKENS

    m = tl.arange(0, BLOCK_M)
    token = first_query + m // GROUP
    exists = (m < TOKENS * GROUP) & (token < num_queries)
    head = (kv_head * GROUP + m % GROUP) * HEAD_SIZE
    index = (first_token + token).to(tl.int64)
    q_low, q_high = load_queries(
        query, index * query_stride + head, exists, HEAD_SIZE, HEAD_LOW, HEAD_HIGH
    )
    acc_low, acc_high = zeros(BLOCK_M, HEAD_LOW, HEAD_HIGH)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    upper = before + token + 1
    lower = upper
    start = begin
    whole_begin = begin
    whole_end = tl.minimum((before + first_query + 1) // TILE * TILE, end)
    if HAS_WINDOW:
        lower = upper - window
        start = tl.maximum(begin, before + first_query + 1 - window)
        last_lower = before + tl.minimum(first_query + TOKENS, num_queries) - window
        whole_begin = tl.minimum(tl.maximum(begin, tl.cdiv(last_lower, TILE) * TILE), end)
    keys = key_cache + kv_head * BLOCK_SIZE * HEAD_SIZE
    values = value_cache + kv_head * BLOCK_SIZE * HEAD_SIZE
    table = block_tables + row * table_stride
    block = load_blocks(table, begin, start, end, BLOCK_SIZE, TILE)
    if HAS_WINDOW:
        acc_low, acc_high, highest, total, block = attend_range(
            q_low,
            q_high,
            acc_low,
            acc_high,
            highest,
            total,
            block,
            begin,
            whole_begin,
            start,
            end,
            lower,
            upper,
            keys,
            values,
            table,
            block_stride,
            scale,
            HEAD_SIZE,
            HEAD_LOW,
            HEAD_HIGH,
            BLOCK_SIZE,
            TILE,
            MASKED=True,
            HAS_WINDOW=HAS_WINDOW,
        )
    acc_low, acc_high, highest, total, block = attend_range(
        q_low,
        q_high,
        acc_low,
        acc_high,
        highest,
        total,
        block,
        whole_begin,
        whole_end,
        start,
        end,
        lower,
        upper,
        keys,
        values,
        table,
        block_stride,
        scale,
        HEAD_SIZE,
        HEAD_LOW,
        HEAD_HIGH,
        BLOCK_SIZE,
        TILE,
        MASKED=False,
        HAS_WINDOW=HAS_WINDOW,
    )
    acc_low, acc_high, highest, total, block = attend_range(
        q_low,
        q_high,
        acc_low,
        acc_high,
        highest,
        total,
        block,
        tl.maximum(whole_begin, whole_end),
        end,
        start,
        end,
        lower,
        upper,
        keys,
        values,
        table,
        block_stride,
        scale,
        HEAD_SIZE,
        HEAD_LOW,
        HEAD_HIGH,
        BLOCK_SIZE,
        TILE,
        MASKED=True,
        HAS_WINDOW=HAS_WINDOW,
    )

    place = index * out_stride + head
    finish(
        out,
        place,
        exists,
        place,
        exists,
        acc_low,
        acc_high,
        highest,
        total,
        partial,
        lse,
        counters,
        first_part,
        split,
        num_splits,
        kv_head,
        NUM_KV_HEADS,
        BLOCK_M,
        HEAD_SIZE,
        HEAD_LOW,
        HEAD_HIGH,
        AT_ONCE,
        COLUMNS,
    )
