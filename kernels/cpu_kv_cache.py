"""The arrangement of a layer's keys and values in the CPU's caches.

The tensors are [num_blocks, Hkv, block_size, D], as everywhere, but one head's part of a block is
not [block_size][D] inside. With p numbers in a step of `cpu_tiles.multiply_tile` (two bfloat16, one
float32) it is

    keys    [D / p][block_size][p]     a step holds p elements of the head, for each key
    values  [block_size / p][D][p]     a step holds p keys, for each element of the head

so that both products of attention read a cache as it lies: scores = Q K^T with keys as columns, out
= P V with elements of the head as columns. Tiles read whole lines of 64 bytes, so up to 60 bytes
past the end of a cache are read too (and ignored).

Storing a token writes D / p places of four bytes for its key, each on another line: lines that
the token's attention reads anyway.
"""

from __future__ import annotations

from typing import Any

import numba
import torch
from torch import Tensor

from kernels.cpu_elements import STEP_BYTES
from kernels.cpu_packing import numbers_per_step, scatter_steps
from kernels.cpu_runtime import CACHE_LINE_BYTES, jit, narrow, pointer, prefetch


def check_block_size(block_size: int, dtype: torch.dtype) -> None:
    """Raises ValueError for a block size that has no arrangement in this dtype."""
    p = _numbers_per_step(dtype)
    if block_size % p:
        raise ValueError(f"block_size is {block_size}: make it a multiple of {p} for {dtype}")


def arrange_keys(keys: Tensor) -> Tensor:
    """Plain [num_blocks, Hkv, block_size, D] keys in the cache's arrangement."""
    p = _numbers_per_step(keys.dtype)
    num_blocks, num_heads, block_size, head_size = keys.shape
    steps = keys.reshape(num_blocks, num_heads, block_size, head_size // p, p)
    return steps.transpose(2, 3).reshape(keys.shape)


def plain_keys(cache: Tensor) -> Tensor:
    """The inverse of `arrange_keys`."""
    p = _numbers_per_step(cache.dtype)
    num_blocks, num_heads, block_size, head_size = cache.shape
    steps = cache.reshape(num_blocks, num_heads, head_size // p, block_size, p)
    return steps.transpose(2, 3).reshape(cache.shape)


def arrange_values(values: Tensor) -> Tensor:
    """Plain [num_blocks, Hkv, block_size, D] values in the cache's arrangement."""
    p = _numbers_per_step(values.dtype)
    num_blocks, num_heads, block_size, head_size = values.shape
    steps = values.reshape(num_blocks, num_heads, block_size // p, p, head_size)
    return steps.transpose(3, 4).reshape(values.shape)


def plain_values(cache: Tensor) -> Tensor:
    """The inverse of `arrange_values`."""
    p = _numbers_per_step(cache.dtype)
    num_blocks, num_heads, block_size, head_size = cache.shape
    steps = cache.reshape(num_blocks, num_heads, block_size // p, head_size, p)
    return steps.transpose(3, 4).reshape(cache.shape)


def _numbers_per_step(dtype: torch.dtype) -> int:
    return STEP_BYTES // dtype.itemsize


@jit
def store_key(
    element: Any,
    cache_address: int,
    num_kv_heads: int,
    block_size: int,
    slot: int,
    head: int,
    values: Any,
) -> None:
    """Round one head's key, D float32 `values`, into slot block_id * block_size + offset."""
    num_steps = values.size // numbers_per_step(element)
    block = slot // block_size * num_kv_heads + head
    start = block * block_size * num_steps + slot % block_size
    scatter_steps(element, cache_address, start, block_size, values)


@jit
def store_value(
    element: Any,
    cache_address: int,
    num_kv_heads: int,
    block_size: int,
    slot: int,
    head: int,
    values: Any,
) -> None:
    """Round one head's value, D float32 `values`, into slot block_id * block_size + offset.

    Writes each number by itself, because another thread may be storing the other key of a step.
    """
    p = numbers_per_step(element)
    size = values.size
    offset = slot % block_size
    part = (slot // block_size * num_kv_heads + head) * block_size * size
    start = part + offset // p * p * size + offset % p
    numbers = numba.carray(pointer(cache_address, element), (start + size * p,))
    for d in range(size):
        numbers[start + d * p] = narrow(values[d], element)


@jit
def bring_slot(
    element: Any,
    key_cache: int,
    value_cache: int,
    num_kv_heads: int,
    block_size: int,
    slot: int,
    head: int,
    head_size: int,
) -> None:
    """Bring into the cache what `store_key` and `store_value` will write."""
    p = numbers_per_step(element)
    num_steps = head_size // p
    page = (slot // block_size * num_kv_heads + head) * block_size * num_steps * STEP_BYTES
    offset = slot % block_size
    key = key_cache + page + offset * STEP_BYTES
    for step in range(num_steps):
        prefetch(key + step * block_size * STEP_BYTES)
    value = value_cache + page + offset // p * head_size * STEP_BYTES
    for line in range(0, head_size * STEP_BYTES, CACHE_LINE_BYTES):
        prefetch(value + line)
