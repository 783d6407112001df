"""The step of online softmax that the Triton decode and prefill kernels share.

M queries (tokens times the G query heads that share a key/value head, padded to a power of two)
meet TILE keys at a time (Dao et al., "FlashAttention", 2022), in base 2:

    s = q K^T                          [M, TILE]
    m' = max(m, max(s) * c)            running maximum; c = scale * log2(e) > 0
    p = 2^(s * c - m')
    l = l * 2^(m - m') + sum(p)        running denominator
    acc = acc * 2^(m - m') + p V       [M, D], float32

Head sizes. A block has a power of two of columns, so a head is taken as two parts: HEAD_LOW, the
largest power of two in D, and HEAD_HIGH, what is left (padded to 16; 0 for a power of two). 48 is
32 + 16, 80 is 64 + 16, 96 is 64 + 32, 192 is 128 + 64. Padding to one power of two instead would
cost a third more shared memory and matrix products at 48, 96 and 192, and 60 % more at 80, which
prefill pays in full; reading the cache costs the same either way.

Pages. A head's part of a page is one contiguous run. A tile begins at a multiple of TILE, so where
the page size is one too, a tile lies within a page and one number is its block; otherwise each of
its keys looks its own up. Block numbers are loaded a tile ahead (`load_blocks`), or each tile would
begin by waiting for them. Page offsets are 64-bit: a cache has more than 2^31 elements.

No load has a mask. Where a tile reaches past the keys there are, its addresses are those of the
nearest key that is there, and the scores of those repeats are -inf.
"""

from __future__ import annotations

import triton.language as tl

from kernels.triton_runtime import jit

LOG2_E = 1.4426950408889634


@jit
def load_blocks(
    table: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Blocks of the keys first .. first + TILE - 1, of which start .. end - 1 are there: one number
    if the tile lies within a page, else [TILE]."""
    token = first if BLOCK_SIZE % TILE == 0 else first + tl.arange(0, TILE)
    token = tl.maximum(tl.minimum(token, end - 1), start)
    return tl.load(table + token // BLOCK_SIZE)


@jit
def load_part(
    pointer: tl.tensor,
    place: tl.tensor,
    BEGIN: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
) -> tl.tensor:
    """Elements BEGIN .. BEGIN + WIDTH - 1 of the heads at some places; zeros past the head."""
    d = BEGIN + tl.arange(0, WIDTH)
    places = pointer + (place[:, None] + d[None, :])
    if BEGIN + WIDTH <= HEAD_SIZE:
        part = tl.load(places)
    else:
        part = tl.load(places, mask=(d < HEAD_SIZE)[None, :], other=0.0)
    return part


@jit
def zeros(ROWS: tl.constexpr, HEAD_LOW: tl.constexpr, HEAD_HIGH: tl.constexpr) -> tl.tensor:
    """Both parts of accumulators; a number for a part that there is not."""
    low = tl.zeros([ROWS, HEAD_LOW], tl.float32)
    high = tl.zeros([ROWS, HEAD_HIGH], tl.float32) if HEAD_HIGH > 0 else 0.0
    return low, high


@jit
def load_queries(
    query: tl.tensor,
    place: tl.tensor,
    exists: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    HEAD_LOW: tl.constexpr,
    HEAD_HIGH: tl.constexpr,
) -> tl.tensor:
    """Both parts of the heads at some places, zeros where there is none."""
    d = tl.arange(0, HEAD_LOW)
    places = query + (place[:, None] + d[None, :])
    low = tl.load(places, mask=exists[:, None], other=0.0)
    high = low  # without a high part, never used
    if HEAD_HIGH > 0:
        d = HEAD_LOW + tl.arange(0, HEAD_HIGH)
        mask = exists[:, None] & (d < HEAD_SIZE)[None, :]
        high = tl.load(query + (place[:, None] + d[None, :]), mask=mask, other=0.0)
    return low, high


@jit
def attend_keys(
    q_low: tl.tensor,
    q_high: tl.tensor,
    acc_low: tl.tensor,
    acc_high: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    block: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_stride: tl.tensor,
    scale: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    HEAD_LOW: tl.constexpr,
    HEAD_HIGH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> tl.tensor:
    """Keys first .. first + TILE - 1, in the blocks that `load_blocks` found; -> what it updates.

    MASKED: only keys start .. end - 1 are there, and query i sees those in lower[i] .. upper[i] - 1
    (lower only with HAS_WINDOW), which may be none. Without it, all queries see all keys.
    """
    token = first + tl.arange(0, TILE)
    there = tl.maximum(tl.minimum(token, end - 1), start) if MASKED else token
    place = block.to(tl.int64) * block_stride + there % BLOCK_SIZE * HEAD_SIZE

    k = load_part(keys, place, 0, HEAD_LOW, HEAD_SIZE)
    scores = tl.dot(q_low, tl.trans(k), input_precision="ieee")
    if HEAD_HIGH > 0:
        k = load_part(keys, place, HEAD_LOW, HEAD_HIGH, HEAD_SIZE)
        scores = tl.dot(q_high, tl.trans(k), scores, input_precision="ieee")
    if MASKED:
        seen = token[None, :] < upper[:, None]
        if HAS_WINDOW:
            seen = seen & (token[None, :] >= lower[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
    base = new_highest
    if MASKED:  # a query that has seen no key yet: 2^(-inf - 0) is 0, 2^(-inf + inf) is not
        base = tl.where(new_highest > float("-inf"), new_highest, 0.0)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(weights, 1)

    v = load_part(values, place, 0, HEAD_LOW, HEAD_SIZE)
    weights = weights.to(v.dtype)
    acc_low = tl.dot(weights, v, acc_low * shrink[:, None], input_precision="ieee")
    if HEAD_HIGH > 0:
        v = load_part(values, place, HEAD_LOW, HEAD_HIGH, HEAD_SIZE)
        acc_high = tl.dot(weights, v, acc_high * shrink[:, None], input_precision="ieee")
    return acc_low, acc_high, new_highest, total


@jit
def attend_range(
    q_low: tl.tensor,
    q_high: tl.tensor,
    acc_low: tl.tensor,
    acc_high: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    block: tl.tensor,
    begin: tl.tensor,
    stop: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    block_stride: tl.tensor,
    scale: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    HEAD_LOW: tl.constexpr,
    HEAD_HIGH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> tl.tensor:
    """The tiles that begin in begin .. stop - 1; `block` is the first one's. -> what it updates,
    and the blocks of the tile behind them."""
    for first in range(begin, stop, TILE):
        next_block = load_blocks(table, first + TILE, start, end, BLOCK_SIZE, TILE)
        acc_low, acc_high, highest, total = attend_keys(
            q_low,
            q_high,
            acc_low,
            acc_high,
            highest,
            total,
            block,
            first,
            start,
            end,
            lower,
            upper,
            keys,
            values,
            block_stride,
            scale,
            HEAD_SIZE,
            HEAD_LOW,
            HEAD_HIGH,
            BLOCK_SIZE,
            TILE,
            MASKED,
            HAS_WINDOW,
        )
        block = next_block
    return acc_low, acc_high, highest, total, block
