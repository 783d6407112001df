"""Cache write, norms, rotary embedding and activation on a GPU: one program a token (or a part of
one), each element read once and written once, arithmetic in float32.

What bounds them: memory, e.g. 2 * T * N element bytes for rms_norm, 4 * T * N for add_rms_norm;
at decode sizes, the launch.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels.triton_runtime import Settings, cdiv, jit, padded

PART = 1024
"""Elements of a row that one program of the cache write or the activation handles."""


def norm_settings(size: int) -> Settings:
    """How a norm over `size` elements runs: the row in one block."""
    block = padded(size)
    return Settings({"SIZE": size, "BLOCK": block}, num_warps=min(16, max(1, block // 512)))


def rotary_settings(num_heads: int, num_kv_heads: int, head_size: int) -> Settings:
    """How the rotary embedding runs: a token's heads in one block."""
    constants = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "PADDED_HEADS": padded(num_heads, at_least=1),
        "PADDED_KV_HEADS": padded(num_kv_heads, at_least=1),
        "HALF": head_size // 2,
        "PADDED_HALF": padded(head_size // 2),
    }
    return Settings(constants)


def write_settings(num_kv_heads: int, block_size: int, head_size: int) -> Settings:
    """How the cache write runs."""
    constants = {
        "BLOCK_SIZE": block_size,
        "HEAD_SIZE": head_size,
        "ROW": num_kv_heads * head_size,
        "PART": PART,
    }
    return Settings(constants)


def silu_settings(size: int) -> Settings:
    """How the activation runs for an intermediate size."""
    return Settings({"SIZE": size, "PART": PART})


def write_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `kernels.ops.write_kv_cache`."""
    _, num_kv_heads, block_size, head_size = key_cache.shape
    settings = write_settings(num_kv_heads, block_size, head_size)
    write_kernel[(len(slot_mapping), cdiv(num_kv_heads * head_size, PART))](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        value.stride(0),
        key_cache.stride(0),
        **settings.keywords(),
    )


@jit
def write_kernel(
    key: tl.tensor,
    value: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slot_mapping: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    block_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROW: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """Grid (T, parts of a token's Hkv * D elements)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    element = tl.program_id(1) * PART + tl.arange(0, PART)
    present = element < ROW
    head = element // HEAD_SIZE
    place = slot // BLOCK_SIZE * block_stride
    place += (head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_SIZE + element % HEAD_SIZE
    k = tl.load(key + token * key_stride + element, mask=present)
    v = tl.load(value + token * value_stride + element, mask=present)
    tl.store(key_cache + place, k, mask=present)
    tl.store(value_cache + place, v, mask=present)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.ops.rms_norm`."""
    size = x.shape[-1]
    if x.dim() != 3 or x.stride(2) != 1 or x.stride(1) != size:  # else: heads of a wider row
        x = x.contiguous()
    heads = x.shape[1] if x.dim() == 3 else 1
    stride = x.stride(0) if x.dim() == 3 else size
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_kernel[(x.numel() // (size * heads), heads)](
        out, out, x, x, weight, stride, eps, HAS_RESIDUAL=False, **norm_settings(size).keywords()
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.add_rms_norm`."""
    x, residual = x.contiguous(), residual.contiguous()
    size = x.shape[-1]
    normed, total = torch.empty_like(x), torch.empty_like(x)
    norm_kernel[(x.numel() // size, 1)](
        normed,
        total,
        x,
        residual,
        weight,
        size,
        eps,
        HAS_RESIDUAL=True,
        **norm_settings(size).keywords(),
    )
    return normed, total


@jit
def norm_kernel(
    out: tl.tensor,
    total: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    stride: tl.tensor,
    eps: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (rows, vectors in a row). x's rows lie `stride` apart; everything else is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    vector = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    present = i < SIZE
    place = (row * tl.num_programs(1) + vector) * SIZE + i
    wide = tl.load(x + row * stride + vector * SIZE + i, mask=present, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual + place, mask=present, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=present)
        wide = rounded.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    scale = tl.load(weight + i, mask=present, other=0.0).to(tl.float32)
    tl.store(out + place, (wide * inverse * scale).to(out.dtype.element_ty), mask=present)


def rotary_embedding(query: Tensor, key: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> None:
    """See `kernels.ops.rotary_embedding`."""
    num_tokens, num_heads, head_size = query.shape
    settings = rotary_settings(num_heads, key.shape[1], head_size)
    rotary_kernel[(num_tokens,)](
        query,
        key,
        positions,
        cos_sin_cache,
        query.stride(0),
        key.stride(0),
        **settings.keywords(),
    )


@jit
def rotary_kernel(
    query: tl.tensor,
    key: tl.tensor,
    positions: tl.tensor,
    cos_sin_cache: tl.tensor,
    query_stride: tl.tensor,
    key_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
) -> None:
    """Grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED_HALF)
    angles = cos_sin_cache + tl.load(positions + token) * (2 * HALF) + i
    cos = tl.load(angles, mask=i < HALF, other=0.0)
    sin = tl.load(angles + HALF, mask=i < HALF, other=0.0)
    _rotate(query + token * query_stride, cos, sin, NUM_HEADS, PADDED_HEADS, HALF, PADDED_HALF)
    _rotate(key + token * key_stride, cos, sin, NUM_KV_HEADS, PADDED_KV_HEADS, HALF, PADDED_HALF)


@jit
def _rotate(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
) -> None:
    head = tl.arange(0, PADDED_HEADS)
    i = tl.arange(0, PADDED_HALF)
    present = (head < HEADS)[:, None] & (i < HALF)[None, :]
    low = x + head[:, None] * (2 * HALF) + i[None, :]
    a = tl.load(low, mask=present, other=0.0).to(tl.float32)
    b = tl.load(low + HALF, mask=present, other=0.0).to(tl.float32)
    element = x.dtype.element_ty
    tl.store(low, (a * cos[None, :] - b * sin[None, :]).to(element), mask=present)
    tl.store(low + HALF, (b * cos[None, :] + a * sin[None, :]).to(element), mask=present)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `kernels.ops.silu_and_mul`."""
    size = gate_up.shape[-1] // 2
    if gate_up.dim() != 2 or gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    rows = gate_up.numel() // (2 * size)
    stride = gate_up.stride(0) if gate_up.dim() == 2 else 2 * size
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    silu_kernel[(rows, cdiv(size, PART))](out, gate_up, stride, **silu_settings(size).keywords())
    return out


@jit
def silu_kernel(
    out: tl.tensor, gate_up: tl.tensor, stride: tl.tensor, SIZE: tl.constexpr, PART: tl.constexpr
) -> None:
    """Grid (rows, parts of a row)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * PART + tl.arange(0, PART)
    present = i < SIZE
    gate = tl.load(gate_up + row * stride + i, mask=present, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + i, mask=present, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + i, result.to(out.dtype.element_ty), mask=present)
