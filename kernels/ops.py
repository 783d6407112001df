"""The kernels' only public door: each function picks the implementation for its tensors' device.

CUDA tensors go to the Triton kernels, CPU tensors to the compiled CPU path. `kernels.reference`
holds the same functions in plain PyTorch; read it for the shapes and the mathematics. An
implementation is imported on first use: a CPU engine never pays for Triton, a GPU engine never
for numba.

Conventions that hold everywhere
- key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_size] ("head-major"),
  contiguous, in the dtype of the model.
- slot_mapping[t] = block_id * block_size + offset (int64). block_tables, context_lens and
  query_start_loc are int32.
- context_lens count the tokens of this step, whose keys and values must already be in the cache
  when attention is called.
- Activations may be slices of a wider tensor (a fused QKV projection): only the dimensions after
  the first need be contiguous.
- Arithmetic is float32, rounded once, to the dtype of the input (behind norms of queries and keys,
  once more).
- On the CPU, calls come from one thread at a time (numba's work queue is not thread-safe).
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from kernels.shapes import AttentionShape


class DecodePlan(Protocol):
    """How a decode step's attention is split over the device; the same for all layers.

    Made once and kept: its memory is reused, and a CUDA graph that has captured an update and what
    follows serves all later steps of as many rows.
    """

    def update(self, context_lens: Tensor, max_context_len: int) -> None:
        """Before a step's first layer. `max_context_len` is a bound known on the host."""


class PrefillPlan(Protocol):
    """The same for rows with several query tokens."""

    def update(
        self, context_lens: Tensor, query_start_loc: Tensor, max_query_len: int, num_tokens: int
    ) -> None:
        """Before a step's first layer; the rows have `num_tokens` query tokens together."""


class Implementation(Protocol):
    """What a backend module provides. Shapes and meaning: `kernels.reference`."""

    def decode_plan(
        self,
        shape: AttentionShape,
        device: torch.device,
        window: int = 0,
        deterministic: bool = False,
    ) -> DecodePlan: ...

    def prefill_plan(
        self,
        shape: AttentionShape,
        device: torch.device,
        window: int = 0,
        deterministic: bool = False,
    ) -> PrefillPlan: ...

    def paged_decode_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float,
        out: Tensor | None = None,
        window: int = 0,
        plan: DecodePlan | None = None,
    ) -> Tensor: ...

    def paged_prefill_attention(
        self,
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
        plan: PrefillPlan | None = None,
    ) -> Tensor: ...

    def rotate_and_cache(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin_cache: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> None: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor: ...

    def penalize(
        self,
        logits: Tensor,
        rows: Tensor,
        slots: Tensor,
        output_counts: Tensor,
        prompt_mask: Tensor,
        presence: Tensor,
        frequency: Tensor,
        repetition: Tensor,
    ) -> None: ...

    def rank(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]: ...


@cache
def implementation(device_type: str) -> Implementation:
    """The module for a device type, imported on first use; ValueError for an unknown device."""
    if device_type == "cpu":
        from kernels import reference

        return reference
    if device_type == "cuda":
        from kernels import triton_kernels

        return triton_kernels
    raise ValueError(f"no kernels for device type {device_type!r}: use 'cpu' or 'cuda'")


def decode_plan(
    shape: AttentionShape, device: torch.device, window: int = 0, deterministic: bool = False
) -> DecodePlan:
    """A plan for `paged_decode_attention` with these shapes and this window.

    deterministic: rows are split by a fixed number of tokens, so that a row's result doesn't depend
    on the batch.
    """
    return implementation(device.type).decode_plan(shape, device, window, deterministic)


def prefill_plan(
    shape: AttentionShape, device: torch.device, window: int = 0, deterministic: bool = False
) -> PrefillPlan:
    """A plan for `paged_prefill_attention` with these shapes and this window.

    deterministic: a token's result depends neither on the batch nor on the chunk it comes in.
    """
    return implementation(device.type).prefill_plan(shape, device, window, deterministic)


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
    window: int = 0,
    plan: DecodePlan | None = None,
) -> Tensor:
    """Attention of one query token a row over the row's pages.

    query [R, Hq, D], block_tables [R, max_blocks], context_lens [R] -> [R, Hq, D], written into
    `out` if given. A row of length 0 gives zeros. scale > 0. With a window W > 0, a row's last W
    keys are seen, and pages before them may belong to others by now. `plan`: one that was updated
    for these rows; without it, one is made for this call.
    """
    return implementation(query.device.type).paged_decode_attention(
        query, key_cache, value_cache, block_tables, context_lens, scale, out, window, plan
    )


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
    plan: PrefillPlan | None = None,
) -> Tensor:
    """Causal attention of any number of query tokens a row: prompts, chunks, single tokens, mixed.

    query [T, Hq, D]. Row r owns tokens query_start_loc[r] : query_start_loc[r + 1], the last tokens
    of its context; query_start_loc is [R + 1], max_query_len the most tokens any row owns.
    -> [T, Hq, D], written into `out` if given; tokens that no row owns are left unwritten. With a
    window W > 0, a token sees the last W keys up to its own. `scale` and `plan` as above.
    """
    return implementation(query.device.type).paged_prefill_attention(
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        query_start_loc,
        max_query_len,
        scale,
        out,
        window,
        plan,
    )


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
    """What stands between the QKV projection and attention: norms of queries and keys if their
    weights [D] are given, rotary position embedding (Su et al., 2021; element i paired with
    i + D/2), and the write to the cache.

    qkv [T, Hq + 2 Hkv, D]: the queries change in place; keys and values go to their slots, those of
    a token with slot -1 nowhere, and what is left of them in qkv is undefined. positions [T] int64,
    cos_sin_cache [max_position, D] float32: D/2 cosines, then D/2 sines.
    """
    implementation(qkv.device.type).rotate_and_cache(
        qkv,
        positions,
        cos_sin_cache,
        key_cache,
        value_cache,
        slot_mapping,
        query_norm,
        key_norm,
        eps,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich, 2019) of x [..., N] with weight [N]; -> like x."""
    return implementation(x.device.type).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), all [..., N]; neither input is changed."""
    return implementation(x.device.type).add_rms_norm(x, residual, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [T, 2 * I] = gate | up; -> [T, I]."""
    return implementation(gate_up.device.type).silu_and_mul(gate_up)


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
    """Presence, frequency and repetition penalties, in place, of some rows [P] of logits [S, V].

    Row i is of slot slots[i] of output_counts [slots, V] int32 and prompt_mask [slots, V] bool; the
    penalties are [S] float32.
    """
    implementation(logits.device.type).penalize(
        logits, rows, slots, output_counts, prompt_mask, presence, frequency, repetition
    )


def rank(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For tokens [S] of logits [S, V]: the logarithms of the sums of exp(logits), and how many
    tokens are at least as likely as the given: two [S]."""
    return implementation(logits.device.type).rank(logits, tokens)
