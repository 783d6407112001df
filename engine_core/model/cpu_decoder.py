"""The decoder on a CPU: one compiled call for a step, one for its logits.

Invariants
- A step allocates nothing whose size grows with the model: rooms are kept, and only ever grow.
- The addresses that compiled code works with are of tensors that this object, or the caller for the
  length of a call, holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine_core.model.config import ModelConfig
from engine_core.model.cpu_linear import PackedLinear
from engine_core.model.linear import Linear
from engine_core.model.parts import EMBEDDING, Parts
from engine_core.model.step_inputs import StepInputs
from kernels import cpu_attention, cpu_linear
from kernels.cpu_attention import cut_tiles, max_tiles, tile_tokens
from kernels.cpu_forward import forward_task, logits_task
from kernels.cpu_linear import MAX_TILE_ROWS, choose_block_rows
from kernels.cpu_memory import zeros
from kernels.cpu_records import LAYER, LOGITS, STEP
from kernels.cpu_team import Team


class CpuDecoder:
    """A loaded model; the same as `engine_core.model.decoder.Decoder` on a CPU."""

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts,
        cos_sin: Tensor,
        team: Team,
        rooms: _Rooms | None = None,
    ) -> None:
        """`parts`: those of `needed_specs`; `cos_sin`: [positions, D], of `cos_sin_table`;
        `rooms`: those of a decoder that this one replaces.
        """
        self.config = config
        self.parts = parts
        self._cos_sin = cos_sin
        self._team = team
        lm_head = _packed(parts.linears["lm_head"])
        dtype = lm_head.packed.dtype
        self._rooms = rooms or _Rooms(config, dtype, team.num_threads)
        types = dtype, lm_head.packed.numbers.dtype
        self._forward, self._logits = forward_task(*types), logits_task(*types)
        self._layers = np.array([_layer(parts, index) for index in range(config.num_layers)], LAYER)
        self._cached: Sequence[tuple[Tensor, Tensor]] | None = None
        self._step = self._describe_model()
        self._head = np.zeros(1, LOGITS)
        self._head["lm_head"] = lm_head.packed.matrix(lm_head.bias)
        self._head["hidden_size"] = config.hidden_size

    def with_parts(self, parts: Parts) -> Self:
        """The same model with some other parts; takes some microseconds a layer."""
        parts = self.parts.with_parts(parts)
        return type(self)(self.config, parts, self._cos_sin, self._team, self._rooms)

    def bind_thread(self) -> None:
        """Keep the calling thread to the core that is meant for it."""
        self._team.bind()

    def forward(self, step: StepInputs, kv_cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Write the step's keys and values to the cache (a pair of tensors a layer), and compute
        the final states that are asked for: [S, H].
        """
        if kv_cache is not self._cached:
            self._use_cache(kv_cache)
        num_tokens = len(step.token_ids)
        rooms = self._rooms
        rooms.grow(num_tokens)
        wanted = rooms.counting[:num_tokens] if step.wanted_tokens is None else step.wanted_tokens
        states = torch.empty((len(wanted), self.config.hidden_size), dtype=rooms.dtype)
        tiles = self._cut(step)
        record = self._step
        record["num_tokens"] = num_tokens
        record["block_rows"] = choose_block_rows(num_tokens)
        record["token_ids"] = step.token_ids.data_ptr()
        record["positions"] = step.positions.data_ptr()
        record["slot_mapping"] = step.slot_mapping.data_ptr()
        record["block_tables"] = step.block_tables.data_ptr()
        record["tables_stride"] = step.block_tables.stride(0)
        record["tiles"] = tiles.ctypes.data
        record["num_tiles"] = len(tiles)
        record["wanted_tokens"] = wanted.data_ptr()
        record["num_wanted"] = len(wanted)
        record["states"] = states.data_ptr()
        for name, room in rooms.of_forward.items():
            record[name] = room.data_ptr()
        self._team.run(self._forward.address, record.ctypes.data)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Logits of the tokens behind some final states: [S, H] -> [S, V] float32, good until the
        next call.
        """
        num_rows = len(states)
        rooms = self._rooms
        rooms.grow(num_rows)
        logits = rooms.logits(num_rows)
        record = self._head
        record["states"] = states.data_ptr()
        record["num_rows"] = num_rows
        record["block_rows"] = choose_block_rows(num_rows)
        record["hidden"] = rooms.of_forward["hidden"].data_ptr()
        record["logits"] = logits.data_ptr()
        record["scratch"] = rooms.of_forward["scratch"].data_ptr()
        record["scratch_bytes"] = rooms.scratch_bytes
        self._team.run(self._logits.address, record.ctypes.data)
        return logits

    def _describe_model(self) -> NDArray[np.void]:
        config, record = self.config, np.zeros(1, STEP)
        record["layers"] = self._layers.ctypes.data
        record["num_layers"] = config.num_layers
        if (embedding := self.parts.tensors.get(EMBEDDING)) is not None:
            record["embedding"] = embedding.data_ptr()
        else:
            lm_head = _packed(self.parts.linears["lm_head"]).packed
            record["embedding"] = lm_head.numbers.data_ptr()
            record["embedding_steps"] = lm_head.num_steps
        record["vocab_size"] = config.vocab_size
        record["final_norm"] = self.parts.tensors["model.norm.weight"].data_ptr()
        record["cos_sin"] = self._cos_sin.data_ptr()
        record["num_positions"] = len(self._cos_sin)
        record["hidden_size"] = config.hidden_size
        record["num_heads"] = config.num_heads
        record["num_kv_heads"] = config.num_kv_heads
        record["head_size"] = config.head_size
        record["eps"] = config.rms_norm_eps
        record["scale"] = config.head_size**-0.5
        record["scratch_bytes"] = self._rooms.scratch_bytes
        return record

    def _use_cache(self, kv_cache: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._cached = kv_cache
        self._step["block_size"] = kv_cache[0][0].shape[2]
        for index, (keys, values) in enumerate(kv_cache):
            self._layers[index]["key_cache"] = keys.data_ptr()
            self._layers[index]["value_cache"] = values.data_ptr()

    def _cut(self, step: StepInputs) -> NDArray[np.int64]:
        """The step's tiles of attention: [tiles, 4]."""
        num_rows, split = len(step.context_lens), step.num_decode_rows
        starts = np.arange(num_rows + 1, dtype=np.int32)
        if step.max_prefill_len > 0:
            starts[split:] = split + step.prefill_start_loc.numpy()
        group = self.config.num_heads // self.config.num_kv_heads
        tiles = np.empty((max_tiles(len(step.token_ids), num_rows, group), 4), np.int64)
        lens = step.context_lens.data_ptr()
        count = cut_tiles(starts.ctypes.data, lens, num_rows, tile_tokens(group), tiles)
        return tiles[:count]


class _Rooms:
    """Memory that steps work in; see `kernels.cpu_records.STEP` for what is what."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, num_threads: int) -> None:
        self.dtype = dtype
        group = config.num_heads // config.num_kv_heads
        of_heads, of_keys = (
            num * config.head_size for num in (config.num_heads, config.num_kv_heads)
        )
        most_inputs = max(config.hidden_size, config.intermediate_size, of_heads)
        of_attention = cpu_attention.scratch_bytes(group, config.head_size)
        of_linear = cpu_linear.scratch_bytes(most_inputs)
        self.scratch_bytes = -(-max(of_attention, of_linear) // 4096) * 4096
        self.of_forward: dict[str, Tensor] = {
            "scratch": zeros([num_threads * self.scratch_bytes], torch.uint8)
        }
        self.counting = torch.empty(0, dtype=torch.int64)
        """[capacity]: 0, 1, 2, ..."""
        self._vocab_size = config.vocab_size
        self._logits = torch.empty((0, config.vocab_size))
        self._widths = {
            "residual": (config.hidden_size, torch.float32),
            "qkv": (of_heads + 2 * of_keys, torch.float32),
            "hidden": (config.hidden_size, dtype),
            "attended": (of_heads, dtype),
            "activated": (config.intermediate_size, dtype),
        }

    def grow(self, num_tokens: int) -> None:
        """Make room for a step of so many tokens."""
        if num_tokens <= len(self.counting):
            return
        self.counting = torch.arange(num_tokens)
        num_rows = num_tokens + MAX_TILE_ROWS  # The last block of packed rows may be half empty.
        for name, (width, dtype) in self._widths.items():
            self.of_forward[name] = zeros((num_rows, width), dtype)

    def logits(self, num_rows: int) -> Tensor:
        """[num_rows, V]."""
        if num_rows > len(self._logits):
            self._logits = zeros((num_rows, self._vocab_size), torch.float32)
        return self._logits[:num_rows]


def _layer(parts: Parts, index: int) -> tuple[object, ...]:
    """A layer as a `LAYER`, but for its caches."""
    prefix = f"model.layers.{index}."
    qkv, output, gate_up, down = (
        _packed(parts.linears[prefix + name])
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    )

    def norm(name: str) -> int:
        tensor = parts.tensors.get(f"{prefix}{name}.weight")
        return 0 if tensor is None else tensor.data_ptr()

    return (
        norm("input_layernorm"),
        norm("post_attention_layernorm"),
        norm("self_attn.q_norm"),
        norm("self_attn.k_norm"),
        0,
        0,
        qkv.packed.matrix(qkv.bias),
        output.packed.matrix(output.bias),
        gate_up.packed.matrix(gate_up.bias, 0),
        gate_up.packed.matrix(gate_up.bias, 1),
        down.packed.matrix(down.bias),
    )


def _packed(linear: Linear) -> PackedLinear:
    assert isinstance(linear, PackedLinear), "parts of another device"
    return linear
