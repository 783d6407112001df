"""Choosing each row's next token on a GPU: one launch for a batch, and nothing waits for the host.

Logits [S, V] float32; temperature, min_p, top_p [S] float32; top_k, seeds, positions, and the
tokens that come out [S] int64. Per row:

    1. largest = max x; a row where it is no finite number (NaN and infinities are) gets -1
    2. temperature 0: the first token whose logit it is
    3. w = 2^((x - largest) * log2(e) / temperature), from 0 to 1
    4. cutoff: see `kernels.triton_truncation`; only if top-k or top-p leave anything out
    5. the first token at which the cumulated w, of those from the cutoff up, pass u * sum(w)

u is uniform in [0, 1) and depends on (seed, position) alone: SplitMix64's mixer (Steele et al.,
2014) of the seed, then of the seed's stream at the position, in 64-bit integers; so draws need no
state that batching could disturb.

Work split: a program takes a row, for every step needs all of the row before it. Step 5 sums the
row in SEGMENTS parts, then the part where u falls in as many, then looks at single tokens; so it
reads the row once, and sums in registers with three reductions.

What bounds it: reading the row, which does not fit a multiprocessor's registers. `choose_bytes`
counts the passes: the first comes from memory, later ones from the L2 cache as long as the rows in
flight fit there. Few rows leave most multiprocessors idle; then a pass takes 4 V bytes at what one
of them reads, 64 KB a latency. Its exponentials take as long: 16 a clock.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels.triton_logits import penalize, rank
from kernels.triton_runtime import Settings, cdiv, jit, padded
from kernels.triton_truncation import (
    CAPACITY,
    GROUPS,
    LOG2_E,
    STAGES,
    WAYS,
    truncate,
    weights_at,
)

BLOCK = 4096
"""Tokens of a row that a program looks at together: eight a thread. The next STAGES - 1 such
loads are under way meanwhile: 64 KB."""
SEGMENTS, WIDTH = 16, 256
"""Parts of a row, and tokens of each that are looked at together: as many in all."""

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIXER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIXER_2 = tl.constexpr(0x94D049BB133111EB)


def choose_bytes(num_rows: int, vocab_size: int, *, is_drawn: bool, is_truncated: bool) -> int:
    """Logits that are read, with all passes: for the largest, the candidates, and the draw."""
    return 4 * num_rows * vocab_size * (1 + is_truncated + is_drawn)


def choose_settings(vocab_size: int, is_greedy: bool) -> Settings:
    """How the kernel runs for a vocabulary; `is_greedy`: all rows are."""
    # Multiples of four tokens, so that a segment starts where 16 bytes do.
    segment = 4 * cdiv(vocab_size, 4 * SEGMENTS)
    part = 4 * cdiv(segment, 4 * SEGMENTS)
    constants = {
        "IS_GREEDY": is_greedy,
        "SIZE": vocab_size,
        "BLOCK": min(BLOCK, padded(vocab_size, at_least=GROUPS)),
        "GROUPS": GROUPS,
        "CAPACITY": CAPACITY,
        "WAYS": WAYS,
        "SEGMENTS": SEGMENTS,
        "SEGMENT": segment,
        "PART": part,
        "WIDTH": min(WIDTH, padded(segment)),
        "LAST": padded(part),
    }
    return Settings(constants, num_warps=16)


def choose_likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row of logits [S, V]; -1 where there is none: [S] int64."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _launch(tokens, logits, *[tokens] * 7, is_greedy=True)
    return tokens


def choose_tokens(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """A token for each row of logits [S, V], -1 where there is none: [S] int64. See the module.

    `temperature` is 0 for greedy rows, `top_k` V for rows without a limit, `seeds` are the bits of
    unsigned integers.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    candidates = torch.empty((len(logits), CAPACITY), dtype=torch.float32, device=logits.device)
    parameters = (temperature, min_p, top_k, top_p, seeds, positions)
    _launch(tokens, logits, candidates, *parameters, is_greedy=False)
    return tokens


def prepare(vocab_size: int, device: torch.device) -> None:
    """Compile the kernels of sampling, or load them: better now than in someone's first request."""
    logits = torch.zeros((1, vocab_size), device=device)
    numbers = torch.ones(1, device=device)
    integers = torch.zeros(1, dtype=torch.int64, device=device)
    choose_likeliest(logits)
    choose_tokens(logits, numbers, numbers, integers + 1, numbers, integers, integers)
    nothing = torch.zeros((1, vocab_size), dtype=torch.int32, device=device)
    penalize(logits, integers, integers, nothing, nothing.bool(), *[numbers] * 3)
    rank(logits, integers)


def _launch(tokens: Tensor, logits: Tensor, *others: Tensor, is_greedy: bool) -> None:
    settings = choose_settings(logits.shape[1], is_greedy)
    choose_kernel[(len(logits),)](tokens, logits, *others, logits.stride(0), **settings.keywords())


@jit
def choose_kernel(
    tokens: tl.tensor,
    logits: tl.tensor,
    candidates: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    logits_stride: tl.tensor,
    IS_GREEDY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    WAYS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
) -> None:
    """Grid (S)."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * logits_stride
    maxima, places = scan_maxima(row, SIZE, BLOCK)
    largest = tl.max(maxima, 0)
    token = tl.min(tl.where(maxima == largest, places, SIZE), 0)
    is_finite = tl.abs(largest) < float("inf")
    if not IS_GREEDY:
        heat = tl.load(temperature + index)
        if is_finite & (heat > 0):
            scale = LOG2_E / heat
            cutoff = truncate(
                row,
                maxima,
                candidates + index * CAPACITY,
                largest,
                scale,
                tl.load(min_p + index),
                tl.load(top_k + index),
                tl.load(top_p + index),
                SIZE,
                BLOCK,
                GROUPS,
                CAPACITY,
                WAYS,
            )
            uniform = uniform_draw(tl.load(seeds + index), tl.load(positions + index))
            token = pick(
                row, cutoff, uniform, largest, scale, SIZE, SEGMENTS, SEGMENT, PART, WIDTH, LAST
            )
    tl.store(tokens + index, tl.where(is_finite, token, -1).to(tl.int64))


@jit
def scan_maxima(row: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """The largest logits of tokens i, i + BLOCK, ... and where they are first: two [BLOCK]. A NaN
    counts as infinity."""
    i = tl.arange(0, BLOCK)
    maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    places = i
    for start in tl.range(0, SIZE, BLOCK, num_stages=STAGES):
        x = tl.load(row + start + i, mask=start + i < SIZE, other=float("-inf"))
        x = tl.where(x == x, x, float("inf"))
        places = tl.where(x > maxima, start + i, places)
        maxima = tl.maximum(x, maxima)
    return maxima, places


@jit
def uniform_draw(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """A float64 in [0, 1); see `engine_core.model.sampling_ops.uniform_draws`."""
    counter = position.to(tl.uint64) + 1
    mixed = mix(mix(seed.to(tl.uint64, bitcast=True)) + counter * GOLDEN)
    return (mixed >> 11).to(tl.float64) * 2.0**-53


@jit
def mix(x: tl.tensor) -> tl.tensor:
    """Of SplitMix64, uint64."""
    x = x + GOLDEN
    x = (x ^ (x >> 30)) * MIXER_1
    x = (x ^ (x >> 27)) * MIXER_2
    return x ^ (x >> 31)


@jit
def pick(
    row: tl.tensor,
    cutoff: tl.tensor,
    uniform: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
) -> tl.tensor:
    """The token at which the cumulated weights from `cutoff` up pass `uniform` of their sum."""
    sums = sum_segments(
        row, 0, cutoff, largest, scale, SIZE, SEGMENTS * SEGMENT, SEGMENT, SEGMENTS, WIDTH
    )
    threshold = (uniform * tl.sum(sums, 0).to(tl.float64)).to(tl.float32)
    segment, reached = first_above(sums, 0.0, threshold)
    begin = segment * SEGMENT
    sums = sum_segments(row, begin, cutoff, largest, scale, SIZE, SEGMENT, PART, SEGMENTS, WIDTH)
    part, reached = first_above(sums, reached, threshold)
    i = part * PART + tl.arange(0, LAST)
    present = (tl.arange(0, LAST) < PART) & (i < SEGMENT) & (begin + i < SIZE)
    weights = weights_at(row + begin + i, present, largest, scale)
    i, reached = first_above(tl.where(weights >= cutoff, weights, 0.0), reached, threshold)
    return begin + part * PART + i


@jit
def sum_segments(
    row: tl.tensor,
    begin: tl.tensor,
    cutoff: tl.tensor,
    largest: tl.tensor,
    scale: tl.tensor,
    SIZE: tl.constexpr,
    LENGTH: tl.constexpr,
    STEP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """The weights from `cutoff` up, of LENGTH tokens from `begin`, summed by segments of STEP:
    [SEGMENTS]."""
    first = tl.arange(0, SEGMENTS)[:, None] * STEP
    sums = tl.zeros([SEGMENTS, WIDTH], tl.float32)
    for start in tl.range(0, STEP, WIDTH, num_stages=STAGES):
        j = start + tl.arange(0, WIDTH)[None, :]
        present = (j < STEP) & (first + j < LENGTH) & (begin + first + j < SIZE)
        weights = weights_at(row + begin + first + j, present, largest, scale)
        sums += tl.where(weights >= cutoff, weights, 0.0)
    return tl.sum(sums, 1)


@jit
def first_above(weights: tl.tensor, reached: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """The first of some weights, not 0, at which `reached` and they together pass the threshold,
    and what is reached before it. The last but zeros if rounding lets none pass."""
    i = tl.arange(0, weights.shape[0])
    passes = (weights > 0) & (reached + tl.cumsum(weights, 0) > threshold)
    index = tl.min(tl.where(passes, i, weights.shape[0]), 0)
    index = tl.minimum(index, tl.max(tl.where(weights > 0, i, 0), 0))
    return index, reached + tl.sum(tl.where(i < index, weights, 0.0), 0)
