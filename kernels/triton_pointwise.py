"""Norms and activation on a GPU, each element read once and written once, arithmetic in float32.

    rms_norm        out = x / sqrt(mean(x^2) + eps) * weight            x [T, N], weight [N]
    add_rms_norm    s = x + residual, rounded; out = rms_norm(s)        both are written
    silu_and_mul    out = gate / (1 + e^-gate) * up                     gate | up [T, 2 I]

Work split: a norm's program takes a row, which its threads keep in registers between the sum of
squares and the product; they hold 16 elements each of a row of 8,192 or less. An activation's takes
PART elements of a row, eight a thread. Either way a thread's neighbours make up 16-byte loads in 16
bits. Rows need not be packed together: a multiprocessor holds up to 32 programs, so even rows of
512 keep 32 KB in flight, enough to hide the latency of memory. Where a size is no power of two its
last threads are masked, elsewhere nothing is.

What bounds them: memory, `norm_bytes` and `silu_bytes`; at decode sizes, the launch. The work, some
FLOP an element, is nothing beside it.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels.triton_runtime import Settings, cdiv, jit, padded

MAX_PART = 2048
"""At most so many elements of a row in a program of the activation."""


def norm_bytes(num_tokens: int, size: int, element_bytes: int, has_residual: bool) -> int:
    """x and the result, and with a residual it and the sum; the weight once."""
    return (num_tokens * (4 if has_residual else 2) + 1) * size * element_bytes


def silu_bytes(num_tokens: int, size: int, element_bytes: int) -> int:
    """Gate, up and the result."""
    return 3 * num_tokens * size * element_bytes


def norm_settings(size: int) -> Settings:
    """How a norm over `size` elements runs: the row in one block."""
    block = padded(size)
    return Settings({"SIZE": size, "BLOCK": block}, num_warps=min(16, max(1, block // 512)))


def silu_settings(size: int) -> Settings:
    """How the activation runs for an intermediate size: in parts that divide it, if they are not
    too small."""
    part = min(size & -size, MAX_PART)
    part = part if part >= 256 else 1024
    return Settings({"SIZE": size, "PART": part}, num_warps=part // 256)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.ops.rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch_norm(out, out, x, x, weight, eps, has_residual=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.add_rms_norm`."""
    x, residual = x.contiguous(), residual.contiguous()
    normed, total = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(normed, total, x, residual, weight, eps, has_residual=True)
    return normed, total


def _launch_norm(
    out: Tensor,
    total: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    has_residual: bool,
) -> None:
    size = x.shape[-1]
    norm_kernel[(x.numel() // size,)](
        out,
        total,
        x,
        residual,
        weight,
        eps,
        HAS_RESIDUAL=has_residual,
        **norm_settings(size).keywords(),
    )


@jit
def norm_kernel(
    out: tl.tensor,
    total: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (rows). Everything is contiguous; `total` and `residual` are used with a residual."""
    i = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * SIZE + i
    is_full: tl.constexpr = SIZE == BLOCK
    wide = load_some(x + place, i, SIZE, is_full)
    scale = load_some(weight + i, i, SIZE, is_full)
    if HAS_RESIDUAL:
        wide += load_some(residual + place, i, SIZE, is_full)
        rounded = wide.to(total.dtype.element_ty)
        store_some(total + place, rounded, i, SIZE, is_full)
        wide = rounded.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    store_some(out + place, wide * inverse * scale, i, SIZE, is_full)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `kernels.ops.silu_and_mul`."""
    size = gate_up.shape[-1] // 2
    if gate_up.dim() != 2 or gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    rows = gate_up.numel() // (2 * size)
    stride = gate_up.stride(0) if gate_up.dim() == 2 else 2 * size
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    settings = silu_settings(size)
    grid = (rows, cdiv(size, int(settings.constants["PART"])))
    silu_kernel[grid](out, gate_up, stride, **settings.keywords())
    return out


@jit
def silu_kernel(
    out: tl.tensor, gate_up: tl.tensor, stride: tl.tensor, SIZE: tl.constexpr, PART: tl.constexpr
) -> None:
    """Grid (rows, parts of a row)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * PART + tl.arange(0, PART)
    is_full: tl.constexpr = SIZE % PART == 0
    gate = load_some(gate_up + row * stride + i, i, SIZE, is_full)
    up = load_some(gate_up + row * stride + SIZE + i, i, SIZE, is_full)
    store_some(out + row * SIZE + i, gate / (1.0 + tl.exp(-gate)) * up, i, SIZE, is_full)


@jit
def load_some(
    place: tl.tensor, i: tl.tensor, SIZE: tl.constexpr, IS_FULL: tl.constexpr
) -> tl.tensor:
    """Elements i of a row of SIZE as float32; unless all are there, zeros past the row's end."""
    present = None if IS_FULL else i < SIZE
    return tl.load(place, mask=present, other=None if IS_FULL else 0.0).to(tl.float32)


@jit
def store_some(
    place: tl.tensor, values: tl.tensor, i: tl.tensor, SIZE: tl.constexpr, IS_FULL: tl.constexpr
) -> None:
    """The counterpart: round and write."""
    present = None if IS_FULL else i < SIZE
    tl.store(place, values.to(place.dtype.element_ty), mask=present)
