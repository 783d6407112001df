"""The kernels in plain PyTorch: the specification that the others are tested against.

Nothing here is fast. Each function does its arithmetic in float32 and rounds once, to the dtype of
its input, at the end (`rotate_and_cache` also behind its norms). The implementations do the same,
so that they differ from this file only by the order of their sums.

Shapes (T tokens of this step; R rows, one a sequence; D the head size; Hq query heads and Hkv
key/value heads, Hq = G * Hkv; query head h reads key/value head h // G, "grouped-query attention"):

    query           [T, Hq, D]   (decode: T = R, one token a row)
    qkv             [T, Hq + 2 Hkv, D]: the token's queries, keys and values
    key_cache, value_cache
                    [num_blocks, Hkv, block_size, D]: head-major pages, so that one head's part of
                    a page is one contiguous run of block_size * D numbers
    block_tables    [R, max_blocks] int32: row r's token j lives in block
                    block_tables[r, j // block_size] at offset j % block_size; entries past the
                    row's length are never read
    context_lens    [R] int32: tokens in the cache, those of this step included
    slot_mapping    [T] int64: block_id * block_size + offset, or -1 for a token to skip
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.shapes import AttentionShape


class ReferencePlan:
    """There is nothing to plan."""

    def update(self, context_lens: Tensor, *sizes: object) -> None:
        """Does nothing."""


def decode_plan(
    shape: AttentionShape, device: torch.device, window: int = 0, deterministic: bool = False
) -> ReferencePlan:
    """A plan that says nothing."""
    return ReferencePlan()


def prefill_plan(
    shape: AttentionShape, device: torch.device, window: int = 0, deterministic: bool = False
) -> ReferencePlan:
    """A plan that says nothing."""
    return ReferencePlan()


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
    window: int = 0,
    plan: object = None,
) -> Tensor:
    """softmax(scale q K^T) V of one query a row over the row's context; zeros for length 0.

    With a window > 0, over the context's last `window` tokens.
    """
    out = torch.empty_like(query) if out is None else out
    for row, length in enumerate(context_lens.tolist()):
        first = max(0, length - window) if window else 0
        keys, values = _gather(key_cache, value_cache, block_tables[row], first, length)
        out[row : row + 1] = _attend(query[row : row + 1], keys, values, scale, window)
    return out


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    scale: float,
    out: Tensor | None = None,
    window: int = 0,
    plan: object = None,
) -> Tensor:
    """Causal attention; row r owns tokens query_start_loc[r] : query_start_loc[r + 1].

    A row's queries are the last tokens of its context: with n queries and length L, query i sees
    the first L - n + i + 1 tokens, or with a window > 0 the last `window` of those. Tokens that no
    row owns are left unwritten.
    """
    out = torch.empty_like(query) if out is None else out
    bounds = query_start_loc.tolist()
    for row, length in enumerate(context_lens.tolist()):
        start, end = bounds[row], bounds[row + 1]
        first = max(0, length - (end - start) + 1 - window) if window else 0
        keys, values = _gather(key_cache, value_cache, block_tables[row], first, length)
        out[start:end] = _attend(query[start:end], keys, values, scale, window)
    return out


def _gather(
    key_cache: Tensor, value_cache: Tensor, block_table: Tensor, first: int, length: int
) -> tuple[Tensor, Tensor]:
    """One row's keys and values from `first` on, out of their pages: two [Hkv, L, D] in float32."""
    _, num_kv_heads, block_size, head_size = key_cache.shape
    first_block = first // block_size
    blocks = block_table[first_block : -(-length // block_size)].long()
    wanted = slice(first - first_block * block_size, length - first_block * block_size)

    def contiguous(cache: Tensor) -> Tensor:
        pages = cache[blocks].transpose(0, 1)
        return pages.reshape(num_kv_heads, -1, head_size)[:, wanted].float()

    return contiguous(key_cache), contiguous(value_cache)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """[n, Hq, D] queries, the last n of the context, over the last L keys and values of it, all
    that any of them sees: [Hkv, L, D]."""
    num_queries, num_heads, _ = query.shape
    num_kv_heads, length, _ = keys.shape
    if length == 0 or num_queries == 0:
        return torch.zeros_like(query)
    group = num_heads // num_kv_heads
    keys = keys.repeat_interleave(group, dim=0)
    values = values.repeat_interleave(group, dim=0)
    scores = query.float().transpose(0, 1) @ keys.transpose(1, 2) * scale  # [Hq, n, L]
    position = torch.arange(length, device=query.device)
    own = position[length - num_queries :, None]
    visible = position <= own
    if window > 0:
        visible &= position > own - window
    probabilities = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return (probabilities @ values).transpose(0, 1).to(query.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x [..., N], weight [N]."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual rounded to their dtype. Neither input is changed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


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
    """Prepare the heads [T, Hq + 2 Hkv, D] of a QKV projection for attention: norm queries and keys
    if the model does (weights [D]), rotate both by their positions ([T] int64), leave the queries
    in their place and store keys and values at their slots. Slot -1 is skipped; no slot occurs
    twice.

    cos_sin_cache [max_position, D] float32 holds D/2 cosines, then D/2 sines. Element i is paired
    with i + D/2 (the "NeoX" pairing of the Llama and Qwen families):
    (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    num_kv_heads, block_size = key_cache.shape[1:3]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    query, key, value = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)

    def prepared(x: Tensor, norm: Tensor | None) -> Tensor:
        x = x if norm is None else rms_norm(x, norm, eps)
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    query.copy_(prepared(query, query_norm))
    key = prepared(key, key_norm)
    tokens = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping[tokens]
    key_cache[slots // block_size, :, slots % block_size] = key[tokens]
    value_cache[slots // block_size, :, slots % block_size] = value[tokens]


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [..., 2 * I] = gate | up; -> [..., I]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def penalize(
    logits: Tensor,
    rows: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """Penalize some rows ([P] int64) of logits [S, V] float32 in place; row i is of slot slots[i].

    output_counts [slots, V] int32: how often each token was sampled; prompt_mask [slots, V] bool:
    whether it is in the prompt. presence, frequency and repetition are [S] float32. The first two
    are OpenAI's and look at outputs only; repetition is CTRL's (Keskar et al., 2019) and looks at
    the prompt too.
    """
    counts, x = output_counts[slots[rows]], logits[rows]
    was_sampled = counts > 0
    factor = torch.where(was_sampled | prompt_mask[slots[rows]], repetition[rows, None], 1.0)
    x = torch.where(x > 0, x / factor, x * factor)
    logits[rows] = x - frequency[rows, None] * counts - presence[rows, None] * was_sampled


def rank(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [S, V] float32 and tokens [S] int64: what to subtract from a row's logits to get
    log-probabilities, [S] float32; how many tokens are at least as likely as the given, [S] int64.
    """
    chosen = logits.gather(1, tokens[:, None])
    return logits.logsumexp(dim=-1), (logits >= chosen).sum(dim=-1)
