"""Penalties, and what a token's log-probability needs, over rows of logits on a GPU.

    penalize    x > 0: x / r, else x * r, where the token was sampled or is in the prompt
                x - frequency * count - presence * (count > 0)
    rank        normalizer = log sum exp x;  rank = how many x are at least x[token]

Logits [S, V] float32; output_counts [slots, V] int32 and prompt_mask [slots, V] bool are by slot,
everything else by row. The reference has the parameters.

Work split: penalties change single elements, so programs take a PART of a row each. A row's rank
and normalizer come out of one program, in one pass: each thread keeps a running maximum and the sum
of exponentials below it of its own tokens, and they are brought together at the end.

What bounds them: memory, `penalize_bytes` and `rank_bytes`.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels.triton_runtime import Settings, cdiv, jit, padded
from kernels.triton_truncation import LOG2_E, STAGES

PART = 2048
LN_2 = tl.constexpr(0.6931471805599453)


def penalize_bytes(num_rows: int, vocab_size: int) -> int:
    """Logits are read and written, counts and the prompt's tokens are read."""
    return (4 + 4 + 4 + 1) * num_rows * vocab_size


def rank_bytes(num_rows: int, vocab_size: int) -> int:
    """Logits are read."""
    return 4 * num_rows * vocab_size


def penalize_settings(vocab_size: int) -> Settings:
    """How penalties run for a vocabulary."""
    return Settings({"SIZE": vocab_size, "PART": PART}, num_warps=8)


def rank_settings(vocab_size: int) -> Settings:
    """How ranks are counted for a vocabulary."""
    return Settings({"SIZE": vocab_size, "BLOCK": min(4096, padded(vocab_size))}, num_warps=16)


def penalize(
    logits: Tensor,
    rows: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """See `kernels.ops.penalize`."""
    size = logits.shape[1]
    penalize_kernel[(len(rows), cdiv(size, PART))](
        logits,
        rows,
        slots,
        output_counts,
        prompt_mask.view(torch.int8),
        presence,
        frequency,
        repetition,
        logits.stride(0),
        **penalize_settings(size).keywords(),
    )


@jit
def penalize_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    slots: tl.tensor,
    output_counts: tl.tensor,
    prompt_mask: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
    repetition: tl.tensor,
    logits_stride: tl.tensor,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """Grid (rows to penalize, parts of a row)."""
    row = tl.load(rows + tl.program_id(0))
    slot = tl.load(slots + row)
    i = tl.program_id(1) * PART + tl.arange(0, PART)
    present = i < SIZE
    place = logits + row * logits_stride + i
    x = tl.load(place, mask=present, other=0.0)
    count = tl.load(output_counts + slot * SIZE + i, mask=present, other=0)
    is_prompts = tl.load(prompt_mask + slot * SIZE + i, mask=present, other=0) != 0
    was_sampled = count > 0
    factor = tl.where(was_sampled | is_prompts, tl.load(repetition + row), 1.0)
    x = tl.where(x > 0, x / factor, x * factor)
    x -= tl.load(frequency + row) * count.to(tl.float32)
    x -= tl.where(was_sampled, tl.load(presence + row), 0.0)
    tl.store(place, x, mask=present)


def rank(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.rank`."""
    normalizers = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    ranks = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    rank_kernel[(len(logits),)](
        normalizers,
        ranks,
        logits,
        tokens,
        logits.stride(0),
        **rank_settings(logits.shape[1]).keywords(),
    )
    return normalizers, ranks


@jit
def rank_kernel(
    normalizers: tl.tensor,
    ranks: tl.tensor,
    logits: tl.tensor,
    tokens: tl.tensor,
    logits_stride: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (S)."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * logits_stride
    chosen = tl.load(row + tl.load(tokens + index))
    i = tl.arange(0, BLOCK)
    maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, SIZE, BLOCK, num_stages=STAGES):
        present = start + i < SIZE
        x = tl.load(row + start + i, mask=present, other=float("-inf"))
        counts += (present & (x >= chosen)).to(tl.int32)
        higher = tl.maximum(maxima, x)
        # Nothing but minus infinities so far: their sum stays 0, and is not NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp2((maxima - base) * LOG2_E) + tl.exp2((x - base) * LOG2_E)
        maxima = higher
    largest = tl.max(maxima, 0)
    total = tl.sum(sums * tl.exp2((maxima - largest) * LOG2_E), 0)
    tl.store(normalizers + index, largest + tl.log2(total) * LN_2)
    tl.store(ranks + index, tl.sum(counts, 0).to(tl.int64))
