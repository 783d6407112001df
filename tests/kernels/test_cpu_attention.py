"""The CPU's attention against the reference, and its promise to be the same in every batch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import reference
from tests.kernels.cpu_attention_driver import attend_all
from tests.kernels.paged_cases import (
    PAIRWISE_SHAPES,
    PagedBatch,
    Shape,
    assert_agrees,
    paged_batch,
)

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS_AT_BORDERS = [0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 150]
ODD_SHAPES = [
    Shape(1, 2, 8, 8),
    Shape(2, 2, 16, 24),
    Shape(3, 1, 80, 48),
    Shape(4, 2, 64, 4),
    Shape(8, 1, 128, 96),
    Shape(13, 1, 96, 16),
]
"""Blocks that are no whole panels, heads that are less than one, groups larger than a tile's."""


def agree(batch: PagedBatch, block_rows: int = 1) -> None:
    expected = reference.paged_prefill_attention(*batch.prefill_arguments())
    assert_agrees(attend_all(batch, block_rows), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PAIRWISE_SHAPES + ODD_SHAPES, ids=str)
def test_decode_agrees_with_the_reference_at_every_border(shape: Shape, dtype: torch.dtype) -> None:
    agree(paged_batch(shape, LENGTHS_AT_BORDERS, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PAIRWISE_SHAPES + ODD_SHAPES, ids=str)
def test_prefill_agrees_with_the_reference_for_mixed_rows(shape: Shape, dtype: torch.dtype) -> None:
    query_lens = [1, 3, 0, 33, 64, 5, 70, 1]
    context_lens = [1, 3, 40, 33, 65, 133, 200, 128]
    agree(paged_batch(shape, context_lens, query_lens, dtype=dtype), block_rows=12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 24])
def test_every_length_agrees_with_the_reference(block_size: int, dtype: torch.dtype) -> None:
    agree(paged_batch(Shape(2, 1, 32, block_size), [*range(1, 200), 1000], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [[77], [1, 76], [64, 13], [30, 30, 17], [1] * 77], ids=str)
@pytest.mark.parametrize("shape", [Shape(3, 2, 48, 16), Shape(4, 1, 32, 24)], ids=str)
def test_a_result_is_the_same_bits_however_the_prompt_is_cut(
    dtype: torch.dtype, chunks: list[int], shape: Shape
) -> None:
    whole = paged_batch(shape, [77], [77], dtype=dtype)
    expected = attend_all(whole)
    end = 0
    for chunk in chunks:
        end += chunk
        part = replace(
            whole,
            query=whole.query[end - chunk : end],
            context_lens=torch.tensor([end], dtype=torch.int32),
            query_start_loc=torch.tensor([0, chunk], dtype=torch.int32),
        )
        assert torch.equal(attend_all(part), expected[end - chunk : end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoded_token_is_the_same_bits_as_a_prefilled_one_alone_and_in_a_batch(
    dtype: torch.dtype,
) -> None:
    lens = [90, 17, 1, 64, 300]
    batch = paged_batch(Shape(4, 2, 32, 16), lens, lens, dtype=dtype)
    last = batch.query_start_loc[1:].long() - 1
    prefilled = attend_all(batch)[last]
    together = replace(
        batch,
        query=batch.query[last],
        query_start_loc=torch.arange(len(lens) + 1, dtype=torch.int32),
    )
    decoded = attend_all(together, block_rows=8)
    assert torch.equal(decoded, prefilled)
    for row in range(len(lens)):
        part = slice(row, row + 1)
        alone = replace(
            together,
            query=together.query[part],
            block_tables=together.block_tables[part],
            context_lens=together.context_lens[part],
            query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        )
        assert torch.equal(attend_all(alone), decoded[part])


def test_huge_scores_neither_overflow_nor_make_nan() -> None:
    batch = paged_batch(Shape(2, 1, 32, 16), [40, 130])
    batch.query.mul_(1e4)
    expected = reference.paged_decode_attention(*batch.decode_arguments())
    torch.testing.assert_close(attend_all(batch), expected, rtol=1e-3, atol=1e-3)


def test_an_empty_batch_gives_an_empty_result() -> None:
    batch = paged_batch(Shape(2, 1, 32, 16), [5])
    nothing = torch.zeros(1, dtype=torch.int32)
    empty = replace(batch, query=batch.query[:0], context_lens=nothing[:0], query_start_loc=nothing)
    assert attend_all(empty).shape == (0, 2, 32)


def check_small_batches() -> None:
    """Run by the test below in a process whose kernels are compiled for another CPU."""
    for dtype in DTYPES:
        agree(paged_batch(Shape(3, 2, 80, 16), [1, 40, 150], dtype=dtype))
        agree(paged_batch(Shape(2, 1, 64, 32), [70, 150], [70, 9], dtype=dtype), block_rows=6)


@pytest.mark.timeout(240)
def test_a_cpu_without_avx512_computes_the_same(tmp_path: Path) -> None:
    features = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2"
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    program = (
        "from kernels.cpu_elements import HAS_WIDE_VECTORS\n"
        "from tests.kernels.test_cpu_attention import check_small_batches\n"
        "assert not HAS_WIDE_VECTORS\n"
        "check_small_batches()\n"
    )
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-c", program]
    subprocess.run(command, env=environment, cwd=repository, check=True, timeout=200)
