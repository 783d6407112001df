"""The decoder that every supported family is: pre-norm attention and a gated feed-forward block.

The step's tokens lie flat in one tensor, sequences one after the other, rows that decode (one token
each) first. Keys and values of the step are written to the paged cache before attention reads it,
so a chunk of a prompt attends to all earlier chunks through the cache.

Shapes: T tokens of the step, R rows, S tokens whose final states are wanted, H hidden size, D head
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor
from torch.nn import functional as F

from engine_core.model.attention import PagedAttention
from engine_core.model.config import ModelConfig
from engine_core.model.linear import Linear, TorchLinear
from engine_core.model.parts import EMBEDDING, Parts
from engine_core.model.step_inputs import StepInputs
from kernels import ops


class Decoder:
    """A loaded model."""

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts,
        cos_sin: Tensor,
        attention: PagedAttention | None = None,
    ) -> None:
        """`parts`: all of `part_specs(config)`; `cos_sin`: [positions, D], of `cos_sin_table`;
        `attention`: that of a decoder that this one replaces.
        """
        self.config = config
        self.parts = parts
        self._embedding = parts.tensors[EMBEDDING]
        self._layers = [_Layer(config, parts, index) for index in range(config.num_layers)]
        self._norm = parts.tensors["model.norm.weight"]
        self._lm_head = _torch_linear(parts.linears["lm_head"])
        self._cos_sin = cos_sin
        self._attention = attention or PagedAttention(
            config.num_heads, config.num_kv_heads, config.head_size
        )

    def with_parts(self, parts: Parts) -> Self:
        """The same model with some other parts; takes some microseconds a layer."""
        parts = self.parts.with_parts(parts)
        return type(self)(self.config, parts, self._cos_sin, self._attention)

    def bind_thread(self) -> None:
        """Nothing to do: the GPU computes."""

    def forward(self, step: StepInputs, kv_cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Write the step's keys and values to the cache (a pair of tensors a layer), and compute
        the final states that are asked for: [S, H].
        """
        residual = F.embedding(step.token_ids, self._embedding)  # [T, H]
        eps = self.config.rms_norm_eps
        self._attention.begin(step, kv_cache[0][0])
        x = ops.rms_norm(residual, self._layers[0].input_norm, eps)
        for index, layer in enumerate(self._layers):
            if index > 0:
                x, residual = ops.add_rms_norm(x, residual, layer.input_norm, eps)
            x = layer.attend(x, step, kv_cache[index], self._cos_sin, self._attention)
            x, residual = ops.add_rms_norm(x, residual, layer.post_attention_norm, eps)
            x = layer.feed_forward(x)
        if step.wanted_tokens is not None:
            x, residual = x[step.wanted_tokens], residual[step.wanted_tokens]
        x, _ = ops.add_rms_norm(x, residual, self._norm, eps)
        return x

    def logits(self, states: Tensor) -> Tensor:
        """Logits of the tokens behind some final states: [S, H] -> [S, V] float32."""
        return self._lm_head(states).float()


class _Layer:
    """One layer, and its parts."""

    def __init__(self, config: ModelConfig, parts: Parts, index: int) -> None:
        prefix = f"model.layers.{index}."
        self._config = config
        self._qkv = _torch_linear(parts.linears[f"{prefix}self_attn.qkv_proj"])
        self._output = _torch_linear(parts.linears[f"{prefix}self_attn.o_proj"])
        self._gate_up = _torch_linear(parts.linears[f"{prefix}mlp.gate_up_proj"])
        self._down = _torch_linear(parts.linears[f"{prefix}mlp.down_proj"])
        self.input_norm = parts.tensors[f"{prefix}input_layernorm.weight"]
        self.post_attention_norm = parts.tensors[f"{prefix}post_attention_layernorm.weight"]
        self._query_norm = parts.tensors.get(f"{prefix}self_attn.q_norm.weight")
        self._key_norm = parts.tensors.get(f"{prefix}self_attn.k_norm.weight")

    def attend(
        self,
        x: Tensor,
        step: StepInputs,
        cache: tuple[Tensor, Tensor],
        cos_sin: Tensor,
        attention: PagedAttention,
    ) -> Tensor:
        """Causal attention of [T, H] over the cached contexts; -> [T, H]."""
        config = self._config
        heads = self._qkv(x).view(x.shape[0], -1, config.head_size)  # [T, Hq + 2 Hkv, D]
        ops.rotate_and_cache(
            heads,
            step.positions,
            cos_sin,
            *cache,
            step.slot_mapping,
            self._query_norm,
            self._key_norm,
            config.rms_norm_eps,
        )
        query = heads[:, : config.num_heads]
        return self._output(attention(query, cache, step).flatten(1))

    def feed_forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self._down(ops.silu_and_mul(self._gate_up(x)))


def _torch_linear(linear: Linear) -> TorchLinear:
    assert isinstance(linear, TorchLinear), "parts of another device"
    return linear
