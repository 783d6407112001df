"""What is measured of the kernels around attention: a layer's others, and sampling.

A row is a kernel at a number of tokens (or rows of logits) with the bytes that it must read and
write, by its own formula. Its launches go through copies of the data that together are larger than
an L2, so that each finds its own in memory, as in a model whose weights passed through meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.triton_logits import penalize, penalize_bytes, rank, rank_bytes
from kernels.triton_pointwise import add_rms_norm, norm_bytes, rms_norm, silu_and_mul, silu_bytes
from kernels.triton_rotary import rotate_and_cache, rotate_and_cache_bytes
from kernels.triton_runtime import H200, cdiv
from kernels.triton_sampling import choose_bytes, choose_likeliest, choose_tokens
from scripts.kernel_bench.clocks import Launch
from scripts.kernel_bench.predictions import ACCESS_US, LAUNCH_US, MEMORY_BYTES_PER_S

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
HIDDEN_SIZE, INTERMEDIATE_SIZE, VOCAB_SIZE = 4096, 14336, 128256
EPS = 1e-5
DTYPE = torch.bfloat16

NUM_TOKENS = (1, 16, 64, 256, 2048, 8192)
NUM_ROWS = (1, 8, 32, 132, 256)
COLD_BYTES = 2**28
"""Of all copies together, at least."""
ROW_BYTES_IN_FLIGHT = 2**16
"""Of a row of logits, in the loads that its program has under way."""


@dataclass(frozen=True, slots=True)
class LayerCase:
    """A row of the table."""

    kernel: str
    shape: str
    num_bytes: int
    """That one launch must read and write."""
    make: Callable[[torch.device], Launch]
    """A launch on data of its own."""
    num_passes: int = 0
    """Over a row of logits, by one program; 0 where a row is dealt out to many, or short."""

    def launches(self, device: torch.device, num_copies: int | None = None) -> list[Launch]:
        """On as many copies as are cold, unless told otherwise."""
        wanted = max(2, -(-COLD_BYTES // self.num_bytes))
        return [self.make(device) for _ in range(num_copies or min(wanted, 256))]

    @property
    def predicted_us(self) -> float:
        """Of one launch on an H200, from the formulas: the launch, an index and what lies there,
        and the bytes, or a row's as one program after the other on a multiprocessor reads them.
        The rounds of a search for the cutoff, in registers, are not counted."""
        spread_us = self.num_bytes / MEMORY_BYTES_PER_S * 1e6
        if self.num_passes == 0:
            return LAUNCH_US + 2 * ACCESS_US + spread_us
        rows = self.num_bytes // (4 * VOCAB_SIZE * self.num_passes)
        row_us = 4 * VOCAB_SIZE * self.num_passes / (ROW_BYTES_IN_FLIGHT / ACCESS_US)
        return LAUNCH_US + max(spread_us, cdiv(rows, H200.num_multiprocessors) * row_us)


def layer_cases(
    num_tokens: Sequence[int] = NUM_TOKENS, num_rows: Sequence[int] = NUM_ROWS
) -> Iterator[LayerCase]:
    """All rows of the table: a model of 8 billion parameters, bfloat16, logits float32."""
    for tokens in num_tokens:
        shape = f"{tokens} tokens"
        heads = (NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, DTYPE.itemsize)
        num_bytes = rotate_and_cache_bytes(tokens, *heads)
        for name, has_norms in (("rotate and cache", False), ("norm, rotate and cache", True)):
            yield LayerCase(name, shape, num_bytes, partial(_rotate, tokens, has_norms))
        sizes = (tokens, HIDDEN_SIZE, DTYPE.itemsize)
        yield LayerCase("RMS norm", shape, norm_bytes(*sizes, False), partial(_norm, tokens))
        yield LayerCase(
            "add, RMS norm", shape, norm_bytes(*sizes, True), partial(_add_norm, tokens)
        )
        num_bytes = silu_bytes(tokens, INTERMEDIATE_SIZE, DTYPE.itemsize)
        yield LayerCase("SiLU, multiply", shape, num_bytes, partial(_silu, tokens))
    for rows in num_rows:
        yield from _sampling_cases(rows)


def _sampling_cases(rows: int) -> Iterator[LayerCase]:
    shape = f"{rows} rows of {VOCAB_SIZE} logits"

    likeliest = choose_bytes(rows, VOCAB_SIZE, is_drawn=False, is_truncated=False)
    yield LayerCase("likeliest", shape, likeliest, partial(_likeliest, rows), num_passes=1)
    for name, top_k, top_p in (
        ("draw", VOCAB_SIZE, 1.0),
        ("draw, top-k 50", 50, 1.0),
        ("draw, top-p 0.95", VOCAB_SIZE, 0.95),
        ("draw, top-k 50, top-p 0.95", 50, 0.95),
    ):
        is_truncated = top_k < VOCAB_SIZE or top_p < 1
        num_bytes = choose_bytes(rows, VOCAB_SIZE, is_drawn=True, is_truncated=is_truncated)
        make = partial(_draw, rows, top_k, top_p)
        yield LayerCase(name, shape, num_bytes, make, num_passes=2 + is_truncated)
    yield LayerCase("penalties", shape, penalize_bytes(rows, VOCAB_SIZE), partial(_penalize, rows))
    ranked = rank_bytes(rows, VOCAB_SIZE)
    yield LayerCase("rank, log-sum", shape, ranked, partial(_rank, rows), num_passes=1)


def _numbers(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(DTYPE)


def _rotate(num_tokens: int, has_norms: bool, device: torch.device) -> Launch:
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    caches = [_numbers(device, num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE) for _ in range(2)]
    weights = [_numbers(device, HEAD_SIZE) if has_norms else None for _ in range(2)]
    return partial(
        rotate_and_cache,
        _numbers(device, num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_SIZE),
        torch.randint(0, 8192, (num_tokens,), device=device),
        torch.rand(8192, HEAD_SIZE, device=device),
        caches[0],
        caches[1],
        torch.randperm(num_blocks * BLOCK_SIZE, device=device)[:num_tokens],
        weights[0],
        weights[1],
        EPS,
    )


def _norm(num_tokens: int, device: torch.device) -> Launch:
    x, weight = _numbers(device, num_tokens, HIDDEN_SIZE), _numbers(device, HIDDEN_SIZE)
    return partial(rms_norm, x, weight, EPS)


def _add_norm(num_tokens: int, device: torch.device) -> Launch:
    x, residual = (_numbers(device, num_tokens, HIDDEN_SIZE) for _ in range(2))
    return partial(add_rms_norm, x, residual, _numbers(device, HIDDEN_SIZE), EPS)


def _silu(num_tokens: int, device: torch.device) -> Launch:
    return partial(silu_and_mul, _numbers(device, num_tokens, 2 * INTERMEDIATE_SIZE))


def _logits(num_rows: int, device: torch.device) -> Tensor:
    return 3 * torch.randn((num_rows, VOCAB_SIZE), device=device)


def _likeliest(num_rows: int, device: torch.device) -> Launch:
    return partial(choose_likeliest, _logits(num_rows, device))


def _draw(num_rows: int, top_k: int, top_p: float, device: torch.device) -> Launch:
    of_rows = torch.ones(num_rows, device=device)
    indices = torch.arange(num_rows, device=device)
    return partial(
        choose_tokens,
        _logits(num_rows, device),
        of_rows,
        0 * of_rows,
        torch.full_like(indices, top_k),
        top_p * of_rows,
        indices,
        indices,
    )


def _penalize(num_rows: int, device: torch.device) -> Launch:
    logits, rows = _logits(num_rows, device), torch.arange(num_rows, device=device)
    counts = torch.randint(0, 2, logits.shape, dtype=torch.int32, device=device)
    factors = torch.ones(num_rows, device=device)
    return partial(penalize, logits, rows, rows, counts, counts.bool(), *[factors] * 3)


def _rank(num_rows: int, device: torch.device) -> Launch:
    return partial(rank, _logits(num_rows, device), torch.arange(num_rows, device=device))
