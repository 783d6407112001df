"""What happens to the heads between the QKV projection and attention, in one kernel on a GPU: the
norms of queries and keys (Qwen3), the rotary embedding, and the write to the paged cache.

    n = x / sqrt(mean(x^2) + eps) * weight      per head, over D; only where the model has norms
    (a, b) -> (a cos - b sin, b cos + a sin)    a, b: the head's halves; angles of its position

    qkv                     [T, Hq + 2 Hkv, D], the projection's output: queries | keys | values
    queries                 change in place, so attention reads them as a slice of qkv
    keys, values            go to their slots in [num_blocks, Hkv, block_size, D]; a token with slot
                            -1 has none. In qkv they stay as they were: nobody reads them again
    cos_sin_cache           [max_position, D] float32: D/2 cosines, then D/2 sines

Arithmetic is float32; it is rounded to the model's dtype behind the norm, as a kernel of its own
would round there, and behind the rotation. Values are copied.

Work split: a program takes H whole heads of one token, as halves [H, D/2], because a rotation pairs
elements of the two. Where H divides the number of heads (it does, unless it were very small) and D
is a power of two, nothing is masked. A thread holds at least eight neighbouring elements of each
half, which are 16 bytes in 16 bits, or a model has too few key/value heads for a warp. Slots are
64-bit, for a cache has more than 2^31 elements.

What bounds it: memory, `rotate_and_cache_bytes`; at decode sizes, the launch. The work is 6 FLOP an
element of queries and keys, and 4 more with norms.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from kernels.triton_runtime import Settings, cdiv, jit, padded

LEAST_HALF, MOST_HALF = 256, 1024
"""Elements in the halves of a program's heads: eight a thread of one warp, of four warps."""


def rotate_and_cache_bytes(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_size: int, element_bytes: int
) -> int:
    """Read and written once each: every head; the angles and two indices a token are read."""
    heads = 2 * (num_heads + 2 * num_kv_heads) * head_size * element_bytes
    return num_tokens * (heads + 4 * head_size + 2 * 8)


def rotary_settings(
    num_heads: int, num_kv_heads: int, head_size: int, block_size: int, has_norms: bool
) -> Settings:
    """How the kernel runs for a model's shapes."""
    padded_half = padded(head_size // 2)
    heads = _heads_per_program(num_heads, padded_half)
    kv_heads = _heads_per_program(num_kv_heads, padded_half)
    constants = {
        "HAS_NORMS": has_norms,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HALF": head_size // 2,
        "PADDED_HALF": padded_half,
        "BLOCK_SIZE": block_size,
    }
    num_warps = max(1, min(heads, kv_heads) * padded_half // LEAST_HALF)
    return Settings(constants, num_warps)


def _heads_per_program(num_heads: int, padded_half: int) -> int:
    """A power of two; one that divides the number of heads, unless it were too small."""
    dividing = num_heads & -num_heads
    useful = min(max(dividing, LEAST_HALF // padded_half), padded(num_heads, at_least=1))
    return min(useful, max(1, MOST_HALF // padded_half))


def rotate_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """See `kernels.ops.rotate_and_cache`."""
    num_tokens, num_all_heads, head_size = qkv.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    num_heads = num_all_heads - 2 * num_kv_heads
    has_norms = query_norm is not None
    settings = rotary_settings(num_heads, num_kv_heads, head_size, block_size, has_norms)
    num_programs = cdiv(num_heads, int(settings.constants["HEADS"]))
    num_programs += cdiv(num_kv_heads, int(settings.constants["KV_HEADS"]))
    rotary_kernel[(num_tokens, num_programs)](
        qkv,
        query_norm if has_norms else qkv,
        key_norm if has_norms else qkv,
        positions,
        cos_sin_cache,
        key_cache,
        value_cache,
        slot_mapping,
        qkv.stride(0),
        key_cache.stride(0),
        eps,
        **settings.keywords(),
    )


@jit
def rotary_kernel(
    qkv: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    positions: tl.tensor,
    cos_sin_cache: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slot_mapping: tl.tensor,
    token_stride: tl.tensor,
    block_stride: tl.tensor,
    eps: tl.tensor,
    HAS_NORMS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Grid (T, programs of queries, then of keys and values)."""
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    query_programs: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    i = tl.arange(0, PADDED_HALF)[None, :]
    angles = cos_sin_cache + tl.load(positions + token) * (2 * HALF)
    queries = qkv + token * token_stride
    if program < query_programs:
        head = program * HEADS + tl.arange(0, HEADS)[:, None]
        is_full: tl.constexpr = NUM_HEADS % HEADS == 0 and HALF == PADDED_HALF
        here = None if is_full else (head < NUM_HEADS) & (i < HALF)
        places = queries + head * (2 * HALF) + i
        a, b = load_halves(places, here, HALF)
        if HAS_NORMS:
            a, b = norm_halves(a, b, query_norm, eps, qkv.dtype.element_ty, HALF, PADDED_HALF)
        a, b = rotate_halves(a, b, angles, HALF, PADDED_HALF)
        store_halves(places, a, b, here, HALF)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            kv_head = (program - query_programs) * KV_HEADS + tl.arange(0, KV_HEADS)[:, None]
            kv_is_full: tl.constexpr = NUM_KV_HEADS % KV_HEADS == 0 and HALF == PADDED_HALF
            kv_here = None if kv_is_full else (kv_head < NUM_KV_HEADS) & (i < HALF)
            keys = queries + (NUM_HEADS + kv_head) * (2 * HALF) + i
            k, m = load_halves(keys, kv_here, HALF)
            v, w = load_halves(keys + NUM_KV_HEADS * (2 * HALF), kv_here, HALF)
            if HAS_NORMS:
                k, m = norm_halves(k, m, key_norm, eps, qkv.dtype.element_ty, HALF, PADDED_HALF)
            k, m = rotate_halves(k, m, angles, HALF, PADDED_HALF)
            row = kv_head * BLOCK_SIZE + (slot % BLOCK_SIZE).to(tl.int32)
            slots = slot // BLOCK_SIZE * block_stride + row * (2 * HALF) + i
            store_halves(key_cache + slots, k, m, kv_here, HALF)
            store_halves(value_cache + slots, v, w, kv_here, HALF)


@jit
def load_halves(low: tl.tensor, present: tl.tensor | None, HALF: tl.constexpr) -> tl.tensor:
    """The halves of some heads, at `low` and behind it: two [H, PADDED_HALF] float32, zeros where
    nothing is present. None: everything is."""
    other = None if present is None else 0.0
    a = tl.load(low, mask=present, other=other)
    b = tl.load(low + HALF, mask=present, other=other)
    return a.to(tl.float32), b.to(tl.float32)


@jit
def norm_halves(
    a: tl.tensor,
    b: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    ELEMENT: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
) -> tl.tensor:
    """Each head divided by its root mean square, times the weight, rounded to ELEMENT."""
    i = tl.arange(0, PADDED_HALF)
    inverse = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
    low = tl.load(weight + i, mask=i < HALF, other=0.0).to(tl.float32)
    high = tl.load(weight + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    a = (a * inverse[:, None] * low[None, :]).to(ELEMENT).to(tl.float32)
    b = (b * inverse[:, None] * high[None, :]).to(ELEMENT).to(tl.float32)
    return a, b


@jit
def rotate_halves(
    a: tl.tensor,
    b: tl.tensor,
    angles: tl.tensor,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
) -> tl.tensor:
    """The pairs turned by their angles."""
    i = tl.arange(0, PADDED_HALF)
    cos = tl.load(angles + i, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF + i, mask=i < HALF, other=0.0)[None, :]
    return a * cos - b * sin, b * cos + a * sin


@jit
def store_halves(
    low: tl.tensor, a: tl.tensor, b: tl.tensor, present: tl.tensor | None, HALF: tl.constexpr
) -> None:
    """The counterpart of `load_halves`: round and write."""
    element = low.dtype.element_ty
    tl.store(low, a.to(element), mask=present)
    tl.store(low + HALF, b.to(element), mask=present)
