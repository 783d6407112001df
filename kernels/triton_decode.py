"""Paged decode attention on a GPU: one query token a row, split along the keys.

Program (item, key/value head) holds the G query heads of its head, padded to 16, and reads the keys
and values of its item once (`kernels.triton_work` says which; `kernels.triton_attention` has the
step, `kernels.triton_merge` the end). Heads are neighbours in the grid: those of a page lie
together in memory.

    query, out [R, Hq, D]; key_cache, value_cache [blocks, Hkv, block_size, D]
    block_tables [R, max_blocks]; context_lens [R]

With a window W > 0, a row's query sees its last W keys; pages before them are not touched, not even
their entries in the block table.

All tiles go through one loop, also the last, ragged one. In a loop of its own, its loads would not
be in flight before it begins: a microsecond for each program, while the comparison with the
length costs a full tile 4 to 8 % of its instructions, in a kernel that waits for memory.

What bounds it: reading the cache, 2 * keys * Hkv * D * element bytes a row; the work is
4 * keys * Hq * D FLOP, that is G FLOP a byte in 16 bits, far below a GPU's balance
(`kernels.shapes.decode_cost`). Small batches wait for a chain of dependent accesses: work item,
block number, keys, and for a split row its part, the counter, the other parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import ops
from kernels.triton_attention import LOG2_E, attend_range, load_blocks, load_queries, zeros
from kernels.triton_merge import finish
from kernels.triton_plan import DecodePlan, shape_of
from kernels.triton_runtime import kernel
from kernels.triton_work import load_record


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
    window: int = 0,
    plan: ops.DecodePlan | None = None,
) -> Tensor:
    """See `kernels.ops.paged_decode_attention`."""
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if plan is None:
        plan = DecodePlan(shape_of(query, key_cache), query.device, window=window)
        plan.update(context_lens, block_tables.shape[1] * key_cache.shape[2])
    assert isinstance(plan, DecodePlan), f"{plan!r} was made for something else"
    assert plan.window == window, f"a plan for window {plan.window}, used for {window}"
    decode_kernel[(plan.num_items * key_cache.shape[1],)](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
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


@kernel("block_tables", "context_lens", "window", "table_stride")
def decode_kernel(
    out: tl.tensor,
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
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
    PADDED_GROUP: tl.constexpr = triton.next_power_of_2(GROUP)
    item = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    num_items = tl.load(count)
    row, _, begin, end, split, num_splits, first_part = load_record(work, item)
    if item >= num_items:
        return

    m = tl.arange(0, BLOCK_M)
    exists = m < GROUP
    head = (kv_head * GROUP + m) * HEAD_SIZE
    q_low, q_high = load_queries(
        query, row * query_stride + head, exists, HEAD_SIZE, HEAD_LOW, HEAD_HIGH
    )
    acc_low, acc_high = zeros(BLOCK_M, HEAD_LOW, HEAD_HIGH)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    upper = tl.zeros([BLOCK_M], tl.int32) + end
    start = begin
    if HAS_WINDOW:
        start = tl.maximum(begin, tl.load(context_lens + row) - window)
    lower = tl.zeros([BLOCK_M], tl.int32) + start
    keys = key_cache + kv_head * BLOCK_SIZE * HEAD_SIZE
    values = value_cache + kv_head * BLOCK_SIZE * HEAD_SIZE
    table = block_tables + row * table_stride
    block = load_blocks(table, begin, start, end, BLOCK_SIZE, TILE)
    acc_low, acc_high, highest, total, block = attend_range(
        q_low,
        q_high,
        acc_low,
        acc_high,
        highest,
        total,
        block,
        begin,
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

    g = tl.arange(0, PADDED_GROUP)
    merged_place = row * out_stride + (kv_head * GROUP + g) * HEAD_SIZE
    finish(
        out,
        row * out_stride + head,
        exists,
        merged_place,
        g < GROUP,
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
        GROUP,
        HEAD_SIZE,
        HEAD_LOW,
        HEAD_HIGH,
        AT_ONCE,
        COLUMNS,
    )
