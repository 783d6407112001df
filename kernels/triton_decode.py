"""Paged decode attention on a GPU: one query token a row, split over the keys (split-KV).

Program (row, key/value head, split) holds the G query heads of its head, padded to 16, and reads
its share of the row's keys and values once (see `kernels.triton_attention` for the step). With one
split it writes the result. Otherwise it writes its normalised partial result, and the log2 of its
softmax denominator, and a second kernel merges them (Dao et al., "Flash-Decoding", 2023):

    partial [R, Hq, S, D] float32, lse [R, Hq, S] float32
    out = sum_s 2^(lse_s - max) partial_s / sum_s 2^(lse_s - max)

The grid is static: the number of splits follows from the batch size and the widest block table.
How many keys a split gets, a program works out from its row's length on the device; a split that
gets none writes lse = -inf, which the merge gives the weight zero without reading its partial.

What bounds it: reading the cache, 2 * length * Hkv * D * element bytes a row; the work is
4 * length * Hq * D FLOP, that is G FLOP a byte in 16 bits, far below a GPU's balance. A split of
S adds 8 * S * Hq * D bytes a row.
"""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from kernels.triton_attention import LOG2_E, attend_keys, attention_settings
from kernels.triton_runtime import Settings, cdiv, jit, padded

MAX_SPLITS = 32
MIN_KEYS_PER_SPLIT = 256
PROGRAMS_PER_MULTIPROCESSOR = 2


def decode_settings(
    head_size: int, group: int, block_size: int, element_bytes: int, num_splits: int
) -> Settings:
    """How the decode kernel runs for a model's shapes."""
    settings = attention_settings(head_size, group, block_size, element_bytes, num_query_tokens=1)
    constants = {**settings.constants, "NUM_SPLITS": num_splits}
    return Settings(constants, settings.num_warps, settings.num_stages)


def merge_settings(head_size: int, num_splits: int) -> Settings:
    """How the merge kernel runs for a model's shapes."""
    constants = {
        "HEAD_SIZE": head_size,
        "PADDED_HEAD": padded(head_size),
        "NUM_SPLITS": num_splits,
    }
    return Settings(constants, num_warps=4, num_stages=1)


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
    *,
    num_splits: int | None = None,
) -> Tensor:
    """See `kernels.ops.paged_decode_attention`. `num_splits`: a power of two."""
    num_rows, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    if out is None:
        out = torch.empty((num_rows, num_heads, head_size), dtype=query.dtype, device=query.device)
    if num_splits is None:
        max_length = block_tables.shape[1] * block_size
        programs = PROGRAMS_PER_MULTIPROCESSOR * _num_multiprocessors(query.device)
        num_splits = choose_num_splits(num_rows * num_kv_heads, max_length, programs)
    if num_splits == 1:
        partial = lse = out  # not touched
    else:
        shape = (num_rows, num_heads, num_splits)
        partial = torch.empty((*shape, head_size), dtype=torch.float32, device=query.device)
        lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    settings = decode_settings(
        head_size, num_heads // num_kv_heads, block_size, query.element_size(), num_splits
    )
    decode_kernel[(num_rows, num_kv_heads, num_splits)](
        out,
        partial,
        lse,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        scale * LOG2_E,
        query.stride(0),
        out.stride(0),
        block_tables.stride(0),
        key_cache.stride(0),
        **settings.keywords(),
    )
    if num_splits > 1:
        merge_kernel[(num_rows, num_heads)](
            out, partial, lse, out.stride(0), **merge_settings(head_size, num_splits).keywords()
        )
    return out


def choose_num_splits(num_pairs: int, max_length: int, num_programs: int) -> int:
    """Splits (a power of two) to turn `num_pairs` (row, head) pairs into about `num_programs`
    programs, without cutting rows of at most `max_length` keys too small."""
    wanted = cdiv(num_programs, max(1, num_pairs))
    useful = max(1, max_length // MIN_KEYS_PER_SPLIT)
    splits = min(wanted, useful, MAX_SPLITS)
    return 1 << (splits.bit_length() - 1)


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@jit
def decode_kernel(
    out: tl.tensor,
    partial: tl.tensor,
    lse: tl.tensor,
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    block_tables: tl.tensor,
    context_lens: tl.tensor,
    scale: tl.tensor,
    query_stride: tl.tensor,
    out_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
) -> None:
    """Grid (R, Hkv, NUM_SPLITS)."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(context_lens + row)
    split_size = tl.cdiv(tl.cdiv(length, TILE), NUM_SPLITS) * TILE
    begin = tl.minimum(split * split_size, length)
    end = tl.minimum(begin + split_size, length)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, PADDED_HEAD)
    head = kv_head * GROUP + m
    present = (m < GROUP)[:, None] & (d < HEAD_SIZE)[None, :]
    places = head[:, None] * HEAD_SIZE + d[None, :]
    q = tl.load(query + row * query_stride + places, mask=present, other=0.0)
    acc = tl.zeros([BLOCK_M, PADDED_HEAD], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    limit = tl.zeros([BLOCK_M], tl.int32) + end

    keys = key_cache + kv_head * BLOCK_SIZE * HEAD_SIZE
    values = value_cache + kv_head * BLOCK_SIZE * HEAD_SIZE
    table = block_tables + row * table_stride
    full_end = begin + (end - begin) // TILE * TILE
    for first in range(begin, full_end, TILE):
        acc, highest, total = attend_keys(
            q,
            acc,
            highest,
            total,
            first,
            end,
            limit,
            keys,
            values,
            table,
            block_stride,
            scale,
            HEAD_SIZE,
            PADDED_HEAD,
            BLOCK_SIZE,
            TILE,
            MASKED=False,
        )
    if full_end < end:
        acc, highest, total = attend_keys(
            q,
            acc,
            highest,
            total,
            full_end,
            end,
            limit,
            keys,
            values,
            table,
            block_stride,
            scale,
            HEAD_SIZE,
            PADDED_HEAD,
            BLOCK_SIZE,
            TILE,
            MASKED=True,
        )

    result = acc / tl.where(total > 0, total, 1.0)[:, None]  # no keys: zeros
    if NUM_SPLITS == 1:
        tl.store(out + row * out_stride + places, result.to(out.dtype.element_ty), mask=present)
    else:
        num_heads = tl.num_programs(1) * GROUP
        part = (row * num_heads + head) * NUM_SPLITS + split
        tl.store(lse + part, highest + tl.log2(total), mask=m < GROUP)
        tl.store(partial + part[:, None] * HEAD_SIZE + d[None, :], result, mask=present)


@jit
def merge_kernel(
    out: tl.tensor,
    partial: tl.tensor,
    lse: tl.tensor,
    out_stride: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
) -> None:
    """Grid (R, Hq): the splits of one query head into its result."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = (row * tl.num_programs(1) + head) * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    d = tl.arange(0, PADDED_HEAD)
    weight = tl.load(lse + part)
    top = tl.max(weight, 0)
    weight = tl.exp2(weight - tl.where(top > float("-inf"), top, 0.0))  # -inf: weight 0, not NaN
    present = (weight > 0)[:, None] & (d < HEAD_SIZE)[None, :]
    parts = tl.load(partial + part[:, None] * HEAD_SIZE + d[None, :], mask=present, other=0.0)
    total = tl.sum(weight, 0)
    result = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    place = out + row * out_stride + head * HEAD_SIZE + d
    tl.store(place, result.to(out.dtype.element_ty), mask=d < HEAD_SIZE)
