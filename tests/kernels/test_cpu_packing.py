"""The CPU's memory layouts: packed rows, and keys and values in their caches."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu_kv_cache import (
    arrange_keys,
    arrange_values,
    check_block_size,
    plain_keys,
    plain_values,
    store_key,
    store_value,
)
from kernels.cpu_packing import store_packed
from kernels.cpu_runtime import zero_of

DTYPES = [torch.float32, torch.bfloat16]
STEP_BYTES = 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_rows", [1, 2, 4, 12])
def test_a_packed_block_lists_its_rows_step_by_step(block_rows: int, dtype: torch.dtype) -> None:
    num_rows, num_columns = 13, 40
    rows = torch.randn(num_rows, num_columns)
    num_blocks, p = -(-num_rows // block_rows), STEP_BYTES // dtype.itemsize
    packed = torch.full((num_blocks, num_columns // p, block_rows, p), torch.nan, dtype=dtype)
    for row in range(num_rows):
        for first in range(0, num_columns, 8):
            part = rows[row, first : first + 8].numpy()
            place = packed.data_ptr()
            store_packed(zero_of(packed.dtype), place, block_rows, num_columns, row, first, part)
    unpacked = packed.transpose(1, 2).reshape(-1, num_columns)
    assert torch.equal(unpacked[:num_rows], rows.to(dtype))
    assert unpacked[num_rows:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [2, 8, 16, 24])
def test_tokens_stored_one_by_one_are_where_the_arrangement_puts_them(
    block_size: int, dtype: torch.dtype
) -> None:
    num_blocks, num_heads = 3, 2
    shape = (num_blocks, num_heads, block_size, 20)
    keys, values = torch.randn(shape), torch.randn(shape)
    caches = (torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
    for slot in torch.randperm(num_blocks * block_size).tolist():
        block, offset = divmod(slot, block_size)
        for head in range(num_heads):
            for store, cache, plain in zip(
                (store_key, store_value), caches, (keys, values), strict=True
            ):
                numbers = plain[block, head, offset].numpy()
                place = cache.data_ptr()
                store(zero_of(cache.dtype), place, num_heads, block_size, slot, head, numbers)
    assert torch.equal(caches[0], arrange_keys(keys.to(dtype)))
    assert torch.equal(caches[1], arrange_values(values.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arranging_is_undone_exactly(dtype: torch.dtype) -> None:
    plain = torch.randn(3, 2, 16, 20).to(dtype)
    assert torch.equal(plain_keys(arrange_keys(plain)), plain)
    assert torch.equal(plain_values(arrange_values(plain)), plain)


def test_keys_lie_side_by_side_for_each_pair_of_elements_and_values_for_each_pair_of_keys() -> None:
    plain = torch.arange(4 * 6, dtype=torch.bfloat16).reshape(1, 1, 4, 6)
    keys, values = arrange_keys(plain).flatten(), arrange_values(plain).flatten()
    assert keys[:8].tolist() == [0, 1, 6, 7, 12, 13, 18, 19]
    assert values[:6].tolist() == [0, 6, 1, 7, 2, 8]


def test_a_block_size_that_splits_a_pair_is_refused_for_bfloat16_only() -> None:
    check_block_size(5, torch.float32)
    check_block_size(6, torch.bfloat16)
    with pytest.raises(ValueError, match=r"block_size is 5: make it a multiple of 2"):
        check_block_size(5, torch.bfloat16)
