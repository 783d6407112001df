"""How an attention program ends: with the result, or with a part of it and, if last, the merge.

A program that had all of a unit's keys writes the result. One of several writes its normalised part
and the log2 of its denominator, then counts itself; whoever counts last merges all of them, in the
order of the splits, so that the result doesn't depend on who came when (Dao et al.,
"Flash-Decoding", 2023, without its second launch):

    partial [parts, Hkv, M, D] float32, lse [parts, Hkv, M] float32
    out = sum_s 2^(lse_s - max) partial_s / sum_s 2^(lse_s - max)

Order between programs. The barrier puts the writes of all of a program's threads before its one
atomic addition; the addition releases them and acquires those that were counted before it (PTX
memory model, scope gpu). The merge reads past L1, which is not coherent.

`counters` [parts * Hkv] int32 are zero between launches: the last program of a unit puts its
counter back, so a captured graph can be replayed and all layers share the memory.

What bounds it: 8 * parts * Hkv * M * D bytes written and read, which stay in L2, and about three
dependent accesses to it.
"""

from __future__ import annotations

import triton.language as tl

from kernels.triton_runtime import jit


def merge_constants(rows: int, head_size: int, num_warps: int) -> dict[str, int | bool]:
    """For a merge of `rows` rows (a power of two) by so many warps.

    AT_ONCE splits of COLUMNS columns are loaded at a time, as many as 64 registers of each thread
    hold. For the few rows of decode, that is one round trip to memory for 16 splits. COLUMNS
    divides the head size.
    """
    columns = min(128 if rows <= 16 else 64, head_size & -head_size)
    splits = max(1, min(16, 64 * 32 * num_warps // (rows * columns)))
    return {"AT_ONCE": 1 << (splits.bit_length() - 1), "COLUMNS": columns}


@jit
def store_heads(
    pointer: tl.tensor,
    place: tl.tensor,
    exists: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    HEAD_LOW: tl.constexpr,
    HEAD_HIGH: tl.constexpr,
) -> None:
    """Rows of heads at their places, both parts, in the type of what is pointed to."""
    element = pointer.dtype.element_ty
    d = tl.arange(0, HEAD_LOW)
    tl.store(pointer + (place[:, None] + d[None, :]), low.to(element), mask=exists[:, None])
    if HEAD_HIGH > 0:
        d = HEAD_LOW + tl.arange(0, HEAD_HIGH)
        mask = exists[:, None] & (d < HEAD_SIZE)[None, :]
        tl.store(pointer + (place[:, None] + d[None, :]), high.to(element), mask=mask)


@jit
def finish(
    out: tl.tensor,
    place: tl.tensor,
    exists: tl.tensor,
    merged_place: tl.tensor,
    merged_exists: tl.tensor,
    acc_low: tl.tensor,
    acc_high: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    partial: tl.tensor,
    lse: tl.tensor,
    counters: tl.tensor,
    first_part: tl.tensor,
    split: tl.tensor,
    num_splits: tl.tensor,
    kv_head: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_LOW: tl.constexpr,
    HEAD_HIGH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write what was accumulated for the rows that exist, the first ROWS at most, to their places
    in `out`. The merge takes the same rows with their places again, as they may be padded less."""
    inverse = 1.0 / tl.where(total > 0, total, 1.0)[:, None]  # no key seen: zeros
    low = acc_low * inverse
    high = acc_high
    if HEAD_HIGH > 0:
        high = acc_high * inverse
    if num_splits == 1:
        store_heads(out, place, exists, low, high, HEAD_SIZE, HEAD_LOW, HEAD_HIGH)
    else:
        m = tl.arange(0, place.shape[0])
        row = ((first_part + split).to(tl.int64) * NUM_KV_HEADS + kv_head) * ROWS + m
        tl.store(lse + row, highest + tl.log2(total), mask=exists)  # no key seen: -inf
        store_heads(partial, row * HEAD_SIZE, exists, low, high, HEAD_SIZE, HEAD_LOW, HEAD_HIGH)
        counter = counters + first_part * NUM_KV_HEADS + kv_head
        tl.debug_barrier()
        counted_before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if counted_before == num_splits - 1:
            merge(
                out,
                merged_place,
                merged_exists,
                partial,
                lse,
                first_part,
                num_splits,
                kv_head,
                NUM_KV_HEADS,
                ROWS,
                HEAD_SIZE,
                AT_ONCE,
                COLUMNS,
            )
            tl.store(counter, 0)


@jit
def merge(
    out: tl.tensor,
    place: tl.tensor,
    exists: tl.tensor,
    partial: tl.tensor,
    lse: tl.tensor,
    first_part: tl.tensor,
    num_splits: tl.tensor,
    kv_head: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The merged rows of a unit into `out` at their places, some columns after the other."""
    PADDED_ROWS: tl.constexpr = place.shape[0]
    m = tl.arange(0, PADDED_ROWS)
    for column in range(0, HEAD_SIZE, COLUMNS):
        d = column + tl.arange(0, COLUMNS)
        highest = tl.full([PADDED_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([PADDED_ROWS], tl.float32)
        acc = tl.zeros([PADDED_ROWS, COLUMNS], tl.float32)
        for first in range(0, num_splits, AT_ONCE):
            split = first + tl.arange(0, AT_ONCE)
            part = (first_part + split).to(tl.int64) * NUM_KV_HEADS + kv_head
            row = part[:, None] * ROWS + m[None, :]  # [AT_ONCE, M]
            there = (split < num_splits)[:, None] & exists[None, :]
            weight = tl.load(lse + row, mask=there, other=float("-inf"), cache_modifier=".cg")
            places = partial + (row[:, :, None] * HEAD_SIZE + d[None, None, :])
            parts = tl.load(places, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
            new_highest = tl.maximum(highest, tl.max(weight, 0))
            base = tl.where(new_highest > float("-inf"), new_highest, 0.0)
            weight = tl.exp2(weight - base[None, :])
            shrink = tl.exp2(highest - base)
            total = total * shrink + tl.sum(weight, 0)
            acc = acc * shrink[:, None] + tl.sum(parts * weight[:, :, None], 0)
            highest = new_highest
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        target = out + (place[:, None] + d[None, :])
        tl.store(target, result.to(out.dtype.element_ty), mask=exists[:, None])
