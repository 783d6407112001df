"""Cache write, norms, rotary embedding and activation on the CPU: one pass over each row.

Row layout: a tensor [T, H, D] or [T, N] is T rows with any stride between them (a slice of a fused
projection) and contiguous inside, so a compiled kernel sees an address, T and the row's stride.

What bounds them: memory, read once and written once (rms_norm: 2 * T * N element bytes); a torch
expression of the same takes two to six passes and some 5 us of dispatch for each. Only the
activation, with its exponentials, is worth spreading over threads. Arithmetic is float32, rounded
once.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.cpu_runtime import (
    LOG2_E,
    element_of,
    exp2,
    jit,
    narrow,
    parallel_jit,
    pointer,
    run_each,
    summing_jit,
    widen,
)


def write_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `kernels.ops.write_kv_cache`."""
    if not key.dtype == value.dtype == key_cache.dtype == value_cache.dtype:
        raise TypeError(
            f"key and value are {key.dtype} and {value.dtype}, the cache {key_cache.dtype} and "
            f"{value_cache.dtype}: allocate the cache in the model's dtype"
        )
    if slot_mapping.dtype is not torch.int64:
        raise TypeError(f"slot_mapping is {slot_mapping.dtype}: make it torch.int64")
    num_blocks, num_heads, block_size, head_size = key_cache.shape
    for source, cache in ((key, key_cache), (value, value_cache)):
        _write(
            element_of(source),
            source.data_ptr(),
            source.stride(0),
            cache.data_ptr(),
            num_blocks,
            num_heads,
            block_size,
            head_size,
            slot_mapping.data_ptr(),
            len(slot_mapping),
        )


@jit
def _write(
    element: Any,
    source_address: int,
    source_stride: int,
    cache_address: int,
    num_blocks: int,
    num_heads: int,
    block_size: int,
    head_size: int,
    slots_address: int,
    num_tokens: int,
) -> None:
    source = numba.carray(pointer(source_address, element), (num_tokens, source_stride))
    shape = (num_blocks, num_heads, block_size, head_size)
    cache = numba.carray(pointer(cache_address, element), shape)
    slots = numba.carray(pointer(slots_address, np.int64(0)), (num_tokens,))
    for token in range(num_tokens):
        if slots[token] >= 0:
            block, offset = slots[token] // block_size, slots[token] % block_size
            for head in range(num_heads):
                start = head * head_size
                cache[block, head, offset] = source[token, start : start + head_size]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.ops.rms_norm`."""
    size = x.shape[-1]
    x, num_rows, stride = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    _rms_norm(
        element_of(x),
        x.data_ptr(),
        stride,
        weight.data_ptr(),
        out.data_ptr(),
        num_rows,
        x.numel() // max(1, num_rows * size),
        size,
        eps,
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.add_rms_norm`."""
    x, residual = x.contiguous(), residual.contiguous()
    normed, total = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    _add_rms_norm(
        element_of(x),
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        normed.data_ptr(),
        total.data_ptr(),
        x.numel() // size,
        size,
        eps,
    )
    return normed, total


@jit
def _rms_norm(
    element: Any,
    x_address: int,
    stride: int,
    weight_address: int,
    out_address: int,
    num_rows: int,
    num_heads: int,
    size: int,
    eps: float,
) -> None:
    x = numba.carray(pointer(x_address, element), (num_rows, stride))
    weight = numba.carray(pointer(weight_address, element), (size,))
    out = numba.carray(pointer(out_address, element), (num_rows, num_heads, size))
    for row in range(num_rows):
        for head in range(num_heads):
            _normalize(x[row, head * size : (head + 1) * size], weight, eps, out[row, head])


@jit
def _add_rms_norm(
    element: Any,
    x_address: int,
    residual_address: int,
    weight_address: int,
    normed_address: int,
    total_address: int,
    num_rows: int,
    size: int,
    eps: float,
) -> None:
    shape = (num_rows, size)
    x = numba.carray(pointer(x_address, element), shape)
    residual = numba.carray(pointer(residual_address, element), shape)
    weight = numba.carray(pointer(weight_address, element), (size,))
    normed = numba.carray(pointer(normed_address, element), shape)
    total = numba.carray(pointer(total_address, element), shape)
    for row in range(num_rows):
        for i in range(size):
            total[row, i] = narrow(widen(x[row, i]) + widen(residual[row, i]), element)
        _normalize(total[row], weight, eps, normed[row])


@jit
def _normalize(x: Any, weight: Any, eps: float, out: Any) -> None:
    mean = _sum_of_squares(x) / np.float32(x.size)
    inverse = np.float32(1) / np.sqrt(mean + np.float32(eps))
    for i in range(x.size):
        out[i] = narrow(widen(x[i]) * inverse * widen(weight[i]), out[0])


@summing_jit
def _sum_of_squares(x: Any) -> Any:
    squares = np.float32(0)
    for i in range(x.size):
        squares += widen(x[i]) * widen(x[i])
    return squares


def rotary_embedding(query: Tensor, key: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> None:
    """See `kernels.ops.rotary_embedding`."""
    if positions.dtype is not torch.int64:
        raise TypeError(f"positions are {positions.dtype}: make them torch.int64")
    if cos_sin_cache.dtype is not torch.float32:
        raise TypeError(f"cos_sin_cache is {cos_sin_cache.dtype}: make it torch.float32")
    for x in (query, key):
        num_tokens, num_heads, head_size = x.shape
        _rotate(
            element_of(x),
            x.data_ptr(),
            x.stride(0),
            num_tokens,
            num_heads,
            head_size,
            positions.data_ptr(),
            cos_sin_cache.data_ptr(),
            len(cos_sin_cache),
        )


@jit
def _rotate(
    element: Any,
    x_address: int,
    stride: int,
    num_tokens: int,
    num_heads: int,
    head_size: int,
    positions_address: int,
    table_address: int,
    num_positions: int,
) -> None:
    x = numba.carray(pointer(x_address, element), (num_tokens, stride))
    positions = numba.carray(pointer(positions_address, np.int64(0)), (num_tokens,))
    table = numba.carray(pointer(table_address, np.float32(0)), (num_positions, head_size))
    half = head_size // 2
    for token in range(num_tokens):
        angle = table[positions[token]]
        for head in range(num_heads):
            low = x[token, head * head_size : head * head_size + half]
            high = x[token, head * head_size + half : (head + 1) * head_size]
            for i in range(half):
                cos, sin = angle[i], angle[half + i]
                a, b = widen(low[i]), widen(high[i])
                low[i] = narrow(a * cos - b * sin, element)
                high[i] = narrow(b * cos + a * sin, element)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `kernels.ops.silu_and_mul`."""
    gate_up, num_rows, stride = _rows(gate_up)
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype)
    run_each(
        _silu_and_mul,
        _silu_and_mul_parallel,
        num_rows,
        16 * out.numel(),
        element_of(gate_up),
        gate_up.data_ptr(),
        stride,
        out.data_ptr(),
        num_rows,
        size,
    )
    return out


@jit
def _silu_and_mul(
    begin: int,
    end: int,
    element: Any,
    address: int,
    stride: int,
    out_address: int,
    num_rows: int,
    size: int,
) -> None:
    gate_up = numba.carray(pointer(address, element), (num_rows, stride))
    out = numba.carray(pointer(out_address, element), (num_rows, size))
    for row in range(begin, end):
        _activate(gate_up[row, :size], gate_up[row, size : 2 * size], out[row])


@parallel_jit
def _silu_and_mul_parallel(num_rows: int, *arguments: Any) -> None:
    for row in numba.prange(num_rows):
        _silu_and_mul(row, row + 1, *arguments)


@jit
def _activate(gate: Any, up: Any, out: Any) -> None:
    for i in range(out.size):
        g = widen(gate[i])
        sigmoid = np.float32(1) / (np.float32(1) + exp2(-g * np.float32(LOG2_E)))
        out[i] = narrow(g * sigmoid * widen(up[i]), out[0])


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """A tensor whose rows (its first dimension) are contiguous inside, their number, their stride.

    It is x itself, unless x's rows are not contiguous.
    """
    if not (x.is_contiguous() or (x.dim() > 1 and x[0].is_contiguous())):
        x = x.contiguous()
    return (x, x.shape[0], x.stride(0)) if x.dim() > 1 else (x, 1, x.numel())
