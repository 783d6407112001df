"""The CPU's attention against the reference, and its promise to be the same in every batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import cpu_kernels, cpu_runtime, reference
from tests.kernels.paged_cases import (
    PAIRWISE_SHAPES,
    PagedBatch,
    Shape,
    assert_agrees,
    paged_batch,
    poisoned_like,
)

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS_AT_BORDERS = [0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 150]


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Run with this many threads, and on all of them however small the work is."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(cpu_runtime, "SERIAL_BELOW_FLOP", 0)
    yield request.param
    torch.set_num_threads(before)


def decode(batch: PagedBatch) -> Tensor:
    return cpu_kernels.paged_decode_attention(*batch.decode_arguments(), poisoned_like(batch.query))


def prefill(batch: PagedBatch) -> Tensor:
    return cpu_kernels.paged_prefill_attention(
        *batch.prefill_arguments(), poisoned_like(batch.query)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PAIRWISE_SHAPES, ids=str)
def test_decode_agrees_with_the_reference_at_every_border(shape: Shape, dtype: torch.dtype) -> None:
    batch = paged_batch(shape, LENGTHS_AT_BORDERS, dtype=dtype)
    expected = reference.paged_decode_attention(*batch.decode_arguments())
    assert_agrees(decode(batch), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PAIRWISE_SHAPES, ids=str)
def test_prefill_agrees_with_the_reference_for_mixed_rows(shape: Shape, dtype: torch.dtype) -> None:
    query_lens = [1, 3, 0, 33, 64, 5, 70, 1]
    context_lens = [1, 3, 40, 33, 65, 133, 200, 128]
    batch = paged_batch(shape, context_lens, query_lens, dtype=dtype)
    expected = reference.paged_prefill_attention(*batch.prefill_arguments())
    assert_agrees(prefill(batch), expected)


def test_threads_change_nothing_bit_for_bit(threads: int) -> None:
    batch = paged_batch(Shape(2, 4, 64, 16), [1, 70, 200], [1, 40, 1])
    several = prefill(batch)
    torch.set_num_threads(1)
    assert torch.equal(several, prefill(batch))
    expected = reference.paged_prefill_attention(*batch.prefill_arguments())
    assert_agrees(several, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [[77], [1, 76], [64, 13], [30, 30, 17], [1] * 77], ids=str)
def test_a_result_is_the_same_bits_however_the_prompt_is_cut(
    dtype: torch.dtype, chunks: list[int]
) -> None:
    whole = paged_batch(Shape(3, 2, 48, 16), [77], [77], dtype=dtype)
    expected = prefill(whole)
    done = 0
    for chunk in chunks:
        end = done + chunk
        out = cpu_kernels.paged_prefill_attention(
            whole.query[done:end],
            whole.key_cache,
            whole.value_cache,
            whole.block_tables,
            torch.tensor([end], dtype=torch.int32),
            torch.tensor([0, chunk], dtype=torch.int32),
            chunk,
            whole.scale,
        )
        assert torch.equal(out, expected[done:end])
        done = end


def test_a_decoded_token_is_the_same_bits_as_a_prefilled_one_alone_and_in_a_batch() -> None:
    batch = paged_batch(Shape(4, 2, 32, 16), [90, 17, 1, 64], [90, 17, 1, 64])
    last = batch.query_start_loc[1:].long() - 1
    prefilled = prefill(batch)[last]
    rows = batch.query[last]
    caches = (batch.key_cache, batch.value_cache)
    decoded = cpu_kernels.paged_decode_attention(
        rows, *caches, batch.block_tables, batch.context_lens, batch.scale
    )
    assert torch.equal(decoded, prefilled)
    for row in range(4):
        part = slice(row, row + 1)
        alone = cpu_kernels.paged_decode_attention(
            rows[part], *caches, batch.block_tables[part], batch.context_lens[part], batch.scale
        )
        assert torch.equal(alone, decoded[part])


def test_huge_scores_neither_overflow_nor_make_nan() -> None:
    batch = paged_batch(Shape(2, 1, 32, 16), [40, 130])
    batch.query.mul_(1e4)
    expected = reference.paged_decode_attention(*batch.decode_arguments())
    torch.testing.assert_close(decode(batch), expected, rtol=1e-4, atol=1e-4)


def test_an_empty_batch_gives_an_empty_result() -> None:
    batch = paged_batch(Shape(2, 1, 32, 16), [5])
    nothing = torch.empty(0, dtype=torch.int32)
    out = cpu_kernels.paged_decode_attention(
        batch.query[:0],
        batch.key_cache,
        batch.value_cache,
        batch.block_tables[:0],
        nothing,
        batch.scale,
    )
    assert out.shape == (0, 2, 32)


def test_what_the_compiled_code_cannot_read_is_refused_by_name() -> None:
    batch = paged_batch(Shape(2, 1, 32, 16), [5])
    query, keys, values, tables, lens, scale = batch.decode_arguments()
    attend = cpu_kernels.paged_decode_attention
    with pytest.raises(TypeError, match=r"block_tables is torch\.int64: make it torch\.int32"):
        attend(query, keys, values, tables.long(), lens, scale)
    with pytest.raises(TypeError, match=r"allocate the cache in the model's dtype"):
        attend(query.bfloat16(), keys, values, tables, lens, scale)
    with pytest.raises(TypeError, match=r"torch\.float16: load the model as float32 or bfloat16"):
        attend(query.half(), keys.half(), values.half(), tables, lens, scale)
    odd = torch.zeros(4, 1, 10, 32)
    with pytest.raises(ValueError, match="block_size is 10: make it a multiple of 4"):
        attend(query, odd, odd, tables, lens, scale)
