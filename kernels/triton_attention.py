"""The step of online softmax that the Triton decode and prefill kernels share.

M queries (tokens times the heads that share a key/value head, padded to a power of two) meet TILE
keys at a time (Dao et al., "FlashAttention", 2022), in base 2 with log2(e) folded into the scale:

    s = q K^T * scale                  [M, TILE]
    m' = max(m, max(s))                running maximum
    p = 2^(s - m')
    l = l * 2^(m - m') + sum(p)        running denominator
    acc = acc * 2^(m - m') + p V       [M, D], float32

Pages: the block of each of the TILE keys is looked up, so a tile may span several small pages or
be part of a large one. In a head-major page a head's keys are one contiguous run. Page offsets are
64-bit: a cache has more than 2^31 elements.

Head sizes that are no power of two are padded with zeros, which add nothing to a product.
"""

from __future__ import annotations

import triton.language as tl

from kernels.triton_runtime import Settings, jit, padded

LOG2_E = 1.4426950408889634


def attention_settings(
    head_size: int, group: int, block_size: int, element_bytes: int, num_query_tokens: int
) -> Settings:
    """Tiles of up to `num_query_tokens` tokens that fit every target's registers and memory.

    float32 has no tensor cores here (exact products are asked for), so its tiles live in registers
    and must be small.
    """
    wide = padded(head_size) > 128
    exact = element_bytes == 4
    return Settings(
        {
            "GROUP": group,
            "HEAD_SIZE": head_size,
            "PADDED_HEAD": padded(head_size),
            "BLOCK_SIZE": block_size,
            "BLOCK_M": min(32 if exact else 64, padded(num_query_tokens * group)),
            "TILE": 16 if exact else 32 if wide else 64,
        },
        num_warps=8 if exact or wide else 4,
        num_stages=2,
    )


@jit
def attend_keys(
    q: tl.tensor,
    acc: tl.tensor,
    highest: tl.tensor,
    total: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    limit: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    block_stride: tl.tensor,
    scale: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Keys first .. first + TILE - 1; -> (acc, highest, total).

    MASKED: keys from `end` on are not there, and query i sees only keys below limit[i]. Every query
    must then see a key here or have seen one before: a row of -inf alone would make NaN.
    """
    token = first + tl.arange(0, TILE)
    d = tl.arange(0, PADDED_HEAD)
    present = (d < HEAD_SIZE)[None, :]
    if MASKED:
        present = present & (token < end)[:, None]
        block = tl.load(table + token // BLOCK_SIZE, mask=token < end, other=0)
    else:
        block = tl.load(table + token // BLOCK_SIZE)
    place = block.to(tl.int64) * block_stride + (token % BLOCK_SIZE) * HEAD_SIZE
    places = place[:, None] + d[None, :]
    if MASKED or HEAD_SIZE != PADDED_HEAD:
        k = tl.load(keys + places, mask=present, other=0.0)
        v = tl.load(values + places, mask=present, other=0.0)
    else:
        k = tl.load(keys + places)
        v = tl.load(values + places)

    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(token[None, :] < limit[:, None], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_highest, total
