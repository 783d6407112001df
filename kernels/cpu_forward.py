"""A decoder's whole forward pass on the CPU, as one task of a team.

Nothing returns to Python between a step's token ids and its final states: the team goes through the
layers together, and meets at a barrier where one part needs all of another:

    normalise | q, k, v | rotate and cache | attend | output | normalise | gate, up | down | ...

The residual stream is float32; what a linear layer multiplies is rounded to the model's dtype, and
every sum is float32. A row's states are the same bits whatever else is in the step: all sums have
one order, and no row looks at another one but through the cache.

Shapes: T tokens of the step, S wanted tokens, R rows (sequences), H hidden size, D head size, V
vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch

from kernels.cpu_attention import attend
from kernels.cpu_kv_cache import bring_slot, store_key, store_value
from kernels.cpu_linear import project, project_gated
from kernels.cpu_packing import store_packed
from kernels.cpu_records import LAYER, LOGITS, STEP
from kernels.cpu_runtime import (
    compile_task,
    jit,
    narrow,
    pointer,
    record_at,
    summing_jit,
    widen,
    zero_of,
)
from kernels.cpu_team import TASK_SIGNATURE, barrier, claim, num_members
from kernels.cpu_weights import unpack_output


@jit
def _forward(x_element: Any, w_element: Any, address: int, team: int, member: int) -> None:
    step = numba.carray(record_at(address, STEP), (1,))[0]
    layers = numba.carray(record_at(step.layers, LAYER), (step.num_layers,))
    scratch = step.scratch + member * step.scratch_bytes
    rows, num_rows = step.block_rows, step.num_tokens
    hidden_size, heads_size = step.hidden_size, step.num_heads * step.head_size
    qkv_size = heads_size + 2 * step.num_kv_heads * step.head_size
    _embed(x_element, team, step)
    barrier(team)
    for index in range(step.num_layers):
        layer = layers[index]
        _normalize_rows(x_element, team, step, layer.input_norm)
        barrier(team)
        project(
            x_element,
            w_element,
            team,
            layer.qkv,
            step.hidden,
            rows,
            num_rows,
            step.qkv,
            qkv_size,
            False,
            scratch,
        )
        barrier(team)
        _place_heads(x_element, team, step, layer)
        barrier(team)
        _attend_all(x_element, team, step, layer, scratch)
        barrier(team)
        project(
            x_element,
            w_element,
            team,
            layer.output,
            step.attended,
            rows,
            num_rows,
            step.residual,
            hidden_size,
            True,
            scratch,
        )
        barrier(team)
        _normalize_rows(x_element, team, step, layer.post_attention_norm)
        barrier(team)
        project_gated(
            x_element,
            w_element,
            team,
            layer.gate,
            layer.up,
            step.hidden,
            rows,
            num_rows,
            step.activated,
            scratch,
        )
        barrier(team)
        project(
            x_element,
            w_element,
            team,
            layer.down,
            step.activated,
            rows,
            num_rows,
            step.residual,
            hidden_size,
            True,
            scratch,
        )
        barrier(team)
    _finish(x_element, team, step)


@jit
def _embed(x_element: Any, team: int, step: Any) -> None:
    """The tokens' embeddings become the residual stream."""
    shape = (step.vocab_size, step.hidden_size)
    embedding = numba.carray(pointer(step.embedding, x_element), shape)
    token_ids = numba.carray(pointer(step.token_ids, np.int64(0)), (step.num_tokens,))
    residual = _residual(step)
    while True:
        first = claim(team) * step.block_rows
        if first >= step.num_tokens:
            break
        for row in range(first, min(first + step.block_rows, step.num_tokens)):
            token_id, total = token_ids[row], residual[row]
            if step.embedding_steps != 0:
                unpack_output(x_element, step.embedding, step.embedding_steps, token_id, total)
                continue
            numbers = embedding[token_id]
            for i in range(step.hidden_size):
                total[i] = widen(numbers[i])


@jit
def _normalize_rows(x_element: Any, team: int, step: Any, weight_address: int) -> None:
    """The residual stream's rows, normalised, as packed rows."""
    weight = numba.carray(pointer(weight_address, x_element), (step.hidden_size,))
    residual = _residual(step)
    normed = np.empty(step.hidden_size, np.float32)
    while True:
        first = claim(team) * step.block_rows
        if first >= step.num_tokens:
            break
        for row in range(first, min(first + step.block_rows, step.num_tokens)):
            normed[:] = residual[row]
            normalize(normed, weight, step.eps)
            store_packed(x_element, step.hidden, step.block_rows, step.hidden_size, row, 0, normed)


@jit
def _place_heads(x_element: Any, team: int, step: Any, layer: Any) -> None:
    """Normalise and rotate queries and keys; keys and values go to the cache."""
    size, num_heads, num_kv_heads = step.head_size, step.num_heads, step.num_kv_heads
    width = (num_heads + 2 * num_kv_heads) * size
    qkv = numba.carray(pointer(step.qkv, np.float32(0)), (step.num_tokens, width))
    positions = numba.carray(pointer(step.positions, np.int64(0)), (step.num_tokens,))
    slots = numba.carray(pointer(step.slot_mapping, np.int64(0)), (step.num_tokens,))
    shape = (step.num_positions, size)
    angles = numba.carray(pointer(step.cos_sin, np.float32(0)), shape)
    while True:
        token = claim(team)
        if token >= step.num_tokens:
            break
        slot, angle = slots[token], angles[positions[token]]
        next_slot = slots[min(token + num_members(team), step.num_tokens - 1)]
        for head in range(num_heads + 2 * num_kv_heads):
            numbers = qkv[token, head * size : (head + 1) * size]
            if head < num_heads + num_kv_heads:
                norm = layer.query_norm if head < num_heads else layer.key_norm
                if norm != 0:
                    weight = numba.carray(pointer(norm, x_element), (size,))
                    normalize(numbers, weight, step.eps)
                _rotate(numbers, angle)
            if head >= num_heads + num_kv_heads:
                kv_head = head - num_heads - num_kv_heads
                store_value(
                    x_element,
                    layer.value_cache,
                    num_kv_heads,
                    step.block_size,
                    slot,
                    kv_head,
                    numbers,
                )
            elif head >= num_heads:
                kv_head = head - num_heads
                bring_slot(
                    x_element,
                    layer.key_cache,
                    layer.value_cache,
                    num_kv_heads,
                    step.block_size,
                    next_slot,
                    kv_head,
                    size,
                )
                store_key(
                    x_element,
                    layer.key_cache,
                    num_kv_heads,
                    step.block_size,
                    slot,
                    kv_head,
                    numbers,
                )


@jit
def _attend_all(x_element: Any, team: int, step: Any, layer: Any, scratch: int) -> None:
    tiles = numba.carray(pointer(step.tiles, np.int64(0)), (step.num_tiles, 4))
    width = (step.num_heads + 2 * step.num_kv_heads) * step.head_size
    num_items = step.num_tiles * step.num_kv_heads
    while True:
        item = claim(team)
        if item >= num_items:
            break
        attend(
            x_element,
            tiles,
            item,
            min(item + num_members(team), num_items - 1),
            step.num_heads // step.num_kv_heads,
            step.num_kv_heads,
            step.head_size,
            step.block_size,
            step.scale,
            step.qkv,
            width,
            layer.key_cache,
            layer.value_cache,
            step.block_tables,
            step.tables_stride,
            step.attended,
            step.block_rows,
            scratch,
        )


@jit
def _finish(x_element: Any, team: int, step: Any) -> None:
    """The final norm of the wanted rows."""
    weight = numba.carray(pointer(step.final_norm, x_element), (step.hidden_size,))
    wanted = numba.carray(pointer(step.wanted_tokens, np.int64(0)), (step.num_wanted,))
    shape = (step.num_wanted, step.hidden_size)
    states = numba.carray(pointer(step.states, x_element), shape)
    residual = _residual(step)
    normed = np.empty(step.hidden_size, np.float32)
    while True:
        row = claim(team)
        if row >= step.num_wanted:
            break
        normed[:] = residual[wanted[row]]
        normalize(normed, weight, step.eps)
        for i in range(step.hidden_size):
            states[row, i] = narrow(normed[i], x_element)


@jit
def _residual(step: Any) -> Any:
    shape = (step.num_tokens, step.hidden_size)
    return numba.carray(pointer(step.residual, np.float32(0)), shape)


@jit
def normalize(x: Any, weight: Any, eps: Any) -> None:
    """Root mean square norm (Zhang & Sennrich, 2019) of one row, in place."""
    inverse = np.float32(1) / np.sqrt(_sum_of_squares(x) / np.float32(x.size) + eps)
    for i in range(x.size):
        x[i] *= inverse * widen(weight[i])


@summing_jit
def _sum_of_squares(x: Any) -> Any:
    squares = np.float32(0)
    for i in range(x.size):
        squares += x[i] * x[i]
    return squares


@jit
def _rotate(numbers: Any, angle: Any) -> None:
    """Rotate the pairs (i, i + D/2) by a position's angles: D/2 cosines, then D/2 sines."""
    half = numbers.size // 2
    for i in range(half):
        a, b, cos, sin = numbers[i], numbers[half + i], angle[i], angle[half + i]
        numbers[i] = a * cos - b * sin
        numbers[half + i] = b * cos + a * sin


@jit
def _logits(x_element: Any, w_element: Any, address: int, team: int, member: int) -> None:
    step = numba.carray(record_at(address, LOGITS), (1,))[0]
    scratch = step.scratch + member * step.scratch_bytes
    shape = (step.num_rows, step.hidden_size)
    states = numba.carray(pointer(step.states, x_element), shape)
    numbers = np.empty(step.hidden_size, np.float32)
    while True:
        row = claim(team)
        if row >= step.num_rows:
            break
        for i in range(step.hidden_size):
            numbers[i] = widen(states[row, i])
        store_packed(x_element, step.hidden, step.block_rows, step.hidden_size, row, 0, numbers)
    barrier(team)
    project(
        x_element,
        w_element,
        team,
        step.lm_head,
        step.hidden,
        step.block_rows,
        step.num_rows,
        step.logits,
        step.lm_head.num_outputs,
        False,
        scratch,
    )


@functools.cache
def forward_task(activations: torch.dtype, weights: torch.dtype) -> Any:
    """The task that takes a `STEP`, compiled or found in the cache."""
    x_element, w_element = zero_of(activations), zero_of(weights)

    def forward(address: int, team: int, member: int) -> None:
        _forward(x_element, w_element, address, team, member)

    return compile_task(forward, TASK_SIGNATURE)


@functools.cache
def logits_task(activations: torch.dtype, weights: torch.dtype) -> Any:
    """The task that takes a `LOGITS`, compiled or found in the cache."""
    x_element, w_element = zero_of(activations), zero_of(weights)

    def logits(address: int, team: int, member: int) -> None:
        _logits(x_element, w_element, address, team, member)

    return compile_task(logits, TASK_SIGNATURE)
