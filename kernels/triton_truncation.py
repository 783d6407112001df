"""Min-p, top-k and top-p of one row of logits on a GPU, as a single cutoff and without sorting.

A row's weights are its probabilities divided by its largest, so they go from 0 to 1:

    w = 2^((x - max x) * log2(e) / temperature)

All three truncations keep the weights from some cutoff up, so tokens of equal weight stay or go
together. Min-p gives its cutoff itself. Top-k's is the largest from which up there are k weights,
top-p's the largest from which up they sum to p times what the others left. Floats that are not
negative sort as their bits do, so that cutoff is searched among the integers up to the bits of 1,
in WAYS + 1 parts at a time: ten rounds at most, each a count or a sum over the row.

A round over a whole row costs a pass, so first the row's largest logits are gathered: the least of
the maxima of GROUPS groups of tokens is a bound that at least GROUPS tokens reach, and seldom more
than CAPACITY. (Were the logits in random order, the number that do is a coupon collector's: 700 on
average, above 2,048 once in 70,000 rows.) The search stays among them if they hold k tokens and
the nucleus, or nothing else is above the cutoff of min-p; otherwise it takes the row.

Sums run in an order that the vocabulary's size determines, and grow with the set that is summed, as
the search needs: rounding is monotonic.
"""

from __future__ import annotations

import triton.language as tl

from kernels.triton_runtime import jit

GROUPS = 128
CAPACITY = 2048
WAYS = 8
STAGES = tl.constexpr(5)
"""Loads of a pass over the row that are under way at a time."""

LEAST_WEIGHT = tl.constexpr(2.0**-126)
"""No weight but 0 is smaller: the hardware's power of two flushes them."""
BITS_OF_ONE = tl.constexpr(0x3F800000)
LOG2_E = tl.constexpr(1.4426950408889634)


@jit
def weights_at(
    place: tl.tensor, present: tl.tensor, largest: tl.tensor, scale: tl.tensor
) -> tl.tensor:
    """The weights of the logits at some places, 0 where none is present."""
    return tl.exp2((tl.load(place, mask=present, other=float("-inf")) - largest) * scale)


@jit
def truncate(
    row: tl.tensor,
    maxima: tl.tensor,
    candidates: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    min_p: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    WAYS: tl.constexpr,
) -> tl.tensor:
    """The cutoff that min-p, top-k and top-p set, in this order.

    maxima [BLOCK]: the largest logits of tokens i, i + BLOCK, ...; candidates [CAPACITY] is
    overwritten.
    """
    cutoff = tl.maximum(min_p, LEAST_WEIGHT)
    if (top_k < SIZE) | (top_p < 1):
        bound = tl.min(tl.max(tl.reshape(maxima, [BLOCK // GROUPS, GROUPS]), 0), 0)
        near = tl.maximum(tl.exp2((bound - largest) * scale), cutoff)
        count, total = gather_candidates(
            row, candidates, near, cutoff, largest, scale, SIZE, BLOCK, CAPACITY
        )
        tl.debug_barrier()  # other threads read what was stored
        is_enough = near <= cutoff
        if top_k < SIZE:
            is_enough |= count >= top_k
        elif count <= CAPACITY:
            near_sum = sum_from(candidates, count, near, largest, scale, CAPACITY)
            is_enough |= near_sum >= top_p * total
        if is_enough & (count <= CAPACITY):
            values = candidates
            cutoff = near
        else:
            values = row
            count = SIZE
        if top_k < SIZE:
            number = top_k.to(tl.float32)
            cutoff = find_cutoff(
                values, count, cutoff, number, largest, scale, False, CAPACITY, WAYS
            )
            total = sum_from(values, count, cutoff, largest, scale, CAPACITY)
        if top_p < 1:
            cutoff = find_cutoff(
                values, count, cutoff, top_p * total, largest, scale, True, CAPACITY, WAYS
            )
    return cutoff


@jit
def gather_candidates(
    row: tl.tensor,
    candidates: tl.tensor,
    near: tl.tensor,
    cutoff: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
) -> tl.tensor:
    """Copy the logits whose weights are not below `near`, as many as fit. Returns their number, and
    the sum of all weights from `cutoff` up."""
    i = tl.arange(0, BLOCK)
    count = 0
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, SIZE, BLOCK, num_stages=STAGES):
        present = start + i < SIZE
        x = tl.load(row + start + i, mask=present, other=float("-inf"))
        weights = tl.exp2((x - largest) * scale)
        is_near = weights >= near
        sums += tl.where(weights >= cutoff, weights, 0.0)
        is_one = is_near.to(tl.int32)
        place = count + tl.cumsum(is_one, 0) - 1
        tl.store(candidates + place, x, mask=is_near & (place < CAPACITY))
        count += tl.sum(is_one, 0)
    return count, tl.sum(sums, 0)


@jit
def find_cutoff(
    values: tl.tensor,
    count: tl.tensor,
    least: tl.tensor,
    target: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    BY_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
) -> tl.tensor:
    """The largest cutoff, not below `least`, from which up the weights sum to `target`, or else are
    as many; `least` if there is none."""
    i = tl.arange(0, BLOCK)
    way = 1 + tl.arange(0, WAYS)
    low = least.to(tl.int32, bitcast=True)
    high = low * 0 + BITS_OF_ONE + 1
    while high - low > 1:
        step = (high - low + WAYS) // (WAYS + 1)
        cutoffs = low + step * way
        sums = tl.zeros([BLOCK, WAYS], tl.float32)
        for start in range(0, count, BLOCK):
            weights = weights_at(values + start + i, start + i < count, largest, scale)
            is_kept = weights.to(tl.int32, bitcast=True)[:, None] >= cutoffs[None, :]
            sums += tl.where(is_kept, weights[:, None] if BY_WEIGHT else 1.0, 0.0)
        low += step * tl.sum((tl.sum(sums, 0) >= target).to(tl.int32), 0)
        high = tl.minimum(high, low + step)
    return low.to(tl.float32, bitcast=True)


@jit
def sum_from(
    values: tl.tensor,
    count: tl.tensor,
    cutoff: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Of the weights from `cutoff` up."""
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        weights = weights_at(values + start + i, start + i < count, largest, scale)
        sums += tl.where(weights >= cutoff, weights, 0.0)
    return tl.sum(sums, 0)
