"""The Triton kernels against the reference, on a GPU or in Triton's interpreter.

Not collected by itself: Triton must be told to interpret before it is imported, so
test_triton_interpreted.py runs this file in processes of their own. On a machine with a GPU:
`pytest tests/kernels/triton_checks.py`.

The interpreter computes bfloat16 products wrongly, so types here are float32 and float16.
"""

from __future__ import annotations

import os

import pytest
import torch

from kernels import reference, triton_kernels
from kernels.triton_decode import MAX_SPLITS, choose_num_splits, paged_decode_attention
from tests.kernels.paged_cases import (
    PAIRWISE_SHAPES,
    Shape,
    assert_agrees,
    paged_batch,
    poisoned_like,
)

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.float16]
LENGTHS_AT_BORDERS = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129]


@pytest.mark.parametrize("index", range(len(PAIRWISE_SHAPES)))
@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_agrees_with_the_reference_at_every_border(index: int, num_splits: int) -> None:
    shape, dtype = PAIRWISE_SHAPES[index], DTYPES[(index + num_splits) % 2]
    batch = paged_batch(shape, LENGTHS_AT_BORDERS, dtype=dtype, device=DEVICE)
    expected = reference.paged_decode_attention(*batch.decode_arguments())
    out = poisoned_like(batch.query)
    paged_decode_attention(*batch.decode_arguments(), out, num_splits=num_splits)
    assert_agrees(out, expected)


def test_decode_with_more_splits_than_tiles_ignores_the_empty_ones() -> None:
    batch = paged_batch(Shape(2, 1, 32, 16), [0, 1, 70, 200], device=DEVICE)
    expected = reference.paged_decode_attention(*batch.decode_arguments())
    out = poisoned_like(batch.query)
    paged_decode_attention(*batch.decode_arguments(), out, num_splits=MAX_SPLITS)
    assert_agrees(out, expected)


@pytest.mark.parametrize("index", range(len(PAIRWISE_SHAPES)))
def test_prefill_agrees_with_the_reference_for_mixed_rows(index: int) -> None:
    shape, dtype = PAIRWISE_SHAPES[index], DTYPES[index % 2]
    query_lens, context_lens = [1, 3, 0, 33, 5], [1, 3, 40, 65, 133]
    batch = paged_batch(shape, context_lens, query_lens, dtype=dtype, device=DEVICE)
    expected = reference.paged_prefill_attention(*batch.prefill_arguments())
    out = poisoned_like(batch.query)
    triton_kernels.paged_prefill_attention(*batch.prefill_arguments(), out)
    assert_agrees(out, expected)


@pytest.mark.parametrize("query_len", [15, 16, 17, 32, 64, 65])
def test_prefill_agrees_with_the_reference_at_the_borders_of_its_tiles(query_len: int) -> None:
    context_lens = [query_len, query_len + 47, query_len + 64]
    batch = paged_batch(Shape(2, 1, 32, 16), context_lens, [query_len] * 3, device=DEVICE)
    expected = reference.paged_prefill_attention(*batch.prefill_arguments())
    out = poisoned_like(batch.query)
    triton_kernels.paged_prefill_attention(*batch.prefill_arguments(), out)
    assert_agrees(out, expected)


def test_decode_split_count_fills_the_gpu_without_cutting_rows_too_small() -> None:
    assert choose_num_splits(num_pairs=8, max_length=32768, num_programs=264) == 32
    assert choose_num_splits(num_pairs=64, max_length=32768, num_programs=264) == 4
    assert choose_num_splits(num_pairs=512, max_length=32768, num_programs=264) == 1
    assert choose_num_splits(num_pairs=8, max_length=700, num_programs=264) == 2
    assert choose_num_splits(num_pairs=8, max_length=100, num_programs=264) == 1
