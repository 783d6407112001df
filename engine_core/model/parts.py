"""The parts that a decoder computes with, and the tensors of a checkpoint that make up each.

A part is a tensor as it is (the embedding, a norm's weight) or a `Linear`, for which tensors that
multiply the same input are stacked: queries, keys and values; gate and up. Weights are loaded and
updated part by part. A decoder with new weights shares every other part with the one before it.

Invariant: a part is never changed once it is made, so one thread may compute with it while another
makes its successor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine_core.model.config import ModelConfig
from engine_core.model.errors import ModelError
from engine_core.model.linear import Linear, TorchLinear

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts by name; the names are those of `part_specs`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    linears: dict[str, Linear] = field(default_factory=dict)

    def with_parts(self, other: Parts) -> Parts:
        """These, with those of `other` in their places."""
        return Parts(self.tensors | other.tensors, self.linears | other.linears)


@dataclass(frozen=True, slots=True)
class PartSpec:
    """How a part is made: of one tensor as it is, or a `Linear` of stacked ones."""

    name: str
    weights: Mapping[str, Shape]
    """The tensors' names and shapes, from the first row to the last."""
    biases: Mapping[str, Shape] = field(default_factory=dict)
    is_linear: bool = True
    num_groups: int = 1
    """Of outputs, each of which is computed with by itself."""

    @property
    def num_tensors(self) -> int:
        return len(self.weights) + len(self.biases)


def part_specs(config: ModelConfig) -> list[PartSpec]:
    """Every part of a model, in the order in which a step meets them."""
    vocabulary = (config.vocab_size, config.hidden_size)
    head = EMBEDDING if config.tie_word_embeddings else LM_HEAD
    return [
        PartSpec(EMBEDDING, {EMBEDDING: vocabulary}, is_linear=False),
        *(spec for index in range(config.num_layers) for spec in _layer_specs(config, index)),
        PartSpec("model.norm.weight", {"model.norm.weight": (config.hidden_size,)}, {}, False),
        PartSpec("lm_head", {head: vocabulary}),
    ]


def needed_specs(config: ModelConfig, form: PartsForm) -> list[PartSpec]:
    """Those parts that a decoder computes with. On a CPU an embedding that is the lm_head's weight
    as well is read from that, unless it is rounded to int8.
    """
    specs = part_specs(config)
    if config.tie_word_embeddings and form.device.type == "cpu" and not form.to_int8:
        return [spec for spec in specs if spec.name != EMBEDDING]
    return specs


def _layer_specs(config: ModelConfig, index: int) -> list[PartSpec]:
    prefix = f"model.layers.{index}."
    hidden, intermediate, head_size = config.hidden_size, config.intermediate_size, config.head_size
    of_queries, of_keys = config.num_heads * head_size, config.num_kv_heads * head_size

    def linear(
        name: str, outputs: Mapping[str, int], inputs: int, has_bias: bool, num_groups: int = 1
    ) -> PartSpec:
        weights = {f"{prefix}{each}.weight": (rows, inputs) for each, rows in outputs.items()}
        biases = {f"{prefix}{each}.bias": (rows,) for each, rows in outputs.items()}
        return PartSpec(prefix + name, weights, biases if has_bias else {}, num_groups=num_groups)

    def norm(name: str, size: int) -> PartSpec:
        tensor = f"{prefix}{name}.weight"
        return PartSpec(tensor, {tensor: (size,)}, is_linear=False)

    qkv = {
        "self_attn.q_proj": of_queries,
        "self_attn.k_proj": of_keys,
        "self_attn.v_proj": of_keys,
    }
    gate_up = {"mlp.gate_proj": intermediate, "mlp.up_proj": intermediate}
    qk_norms = [norm(f"self_attn.{name}_norm", head_size) for name in ("q", "k")]
    return [
        norm("input_layernorm", hidden),
        linear("self_attn.qkv_proj", qkv, hidden, config.qkv_bias),
        *(qk_norms if config.qk_norm else ()),
        linear("self_attn.o_proj", {"self_attn.o_proj": hidden}, of_queries, config.output_bias),
        norm("post_attention_layernorm", hidden),
        linear("mlp.gate_up_proj", gate_up, hidden, config.mlp_bias, num_groups=2),
        linear("mlp.down_proj", {"mlp.down_proj": hidden}, intermediate, config.mlp_bias),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsForm:
    """What parts are made as, whatever the tensors came as."""

    dtype: torch.dtype
    device: torch.device
    to_int8: bool = False
    """Weights of linear layers are rounded to int8 (`kernels.cpu_weights`); on a CPU only."""
    num_threads: int = 1
    """That make a part together, on a CPU: all cores while there is nothing else to do."""


class PartsBuilder:
    """Makes parts of tensors that come one by one, in any order.

    A part is made once all its tensors came, or a tensor of another part does; what is missing by
    then is taken from the part that is there. So no more than the tensors of one part are held
    beside the parts, and a sender does best to send tensors that are stacked one after the other.
    """

    def __init__(
        self, specs: Sequence[PartSpec], form: PartsForm, base: Parts | None = None
    ) -> None:
        """`base`: the parts that are completed; needed unless every tensor comes."""
        self._form = form
        self._base = base or Parts()
        self._made = Parts()
        self._specs: defaultdict[str, list[PartSpec]] = defaultdict(list)
        for spec in specs:
            for name in (*spec.weights, *spec.biases):
                self._specs[name].append(spec)
        self._open: PartSpec | None = None
        self._received: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in a tensor that fits its parts' specs and that nobody else will change. Raises
        ModelError if it holds NaN or infinities: nothing computed with them means anything.
        """
        tensor = tensor.to(self._form.device, self._form.dtype).contiguous()
        _check_finite(name, tensor)
        for spec in self._specs[name]:
            if self._open is not spec:
                self._close()
            self._open = spec
            self._received[name] = tensor
            if len(self._received) == spec.num_tensors:
                self._close()

    def finish(self) -> Parts:
        """The parts that the tensors touched."""
        self._close()
        return self._made

    def _close(self) -> None:
        spec = self._open
        if spec is None:
            return
        if spec.is_linear:
            self._made.linears[spec.name] = self._make_linear(spec)
        else:
            (self._made.tensors[spec.name],) = self._received.values()
        self._open = None
        self._received = {}

    def _make_linear(self, spec: PartSpec) -> Linear:
        present = self._made.linears.get(spec.name) or self._base.linears.get(spec.name)
        bias = present.bias if present else None
        if self._received.keys() & spec.biases.keys():
            bias = torch.cat(self._complete(spec.biases, bias))
        if present and not self._received.keys() & spec.weights.keys():
            return present.with_bias(bias)
        is_complete = self._received.keys() >= spec.weights.keys()
        old = present.weight if present and not is_complete else None
        weights = self._complete(spec.weights, old)
        if self._form.device.type != "cpu":
            return TorchLinear(torch.cat(weights), bias)
        # Imported only here: it brings numba, which GPUs do without.
        from engine_core.model.cpu_linear import PackedLinear

        return PackedLinear(
            weights,
            bias,
            num_groups=spec.num_groups,
            to_int8=self._form.to_int8,
            num_threads=self._form.num_threads,
        )

    def _complete(self, shapes: Mapping[str, Shape], present: Tensor | None) -> list[Tensor]:
        """The received tensors of a stack, and rows of `present` in the places of others."""
        rows: Sequence[Tensor | None] = [None] * len(shapes)
        if present is not None:
            rows = torch.split(present, [shape[0] for shape in shapes.values()])
        tensors = [self._received.get(name, old) for name, old in zip(shapes, rows, strict=True)]
        return [tensor for tensor in tensors if tensor is not None]


def _check_finite(name: str, tensor: Tensor) -> None:
    if _is_finite(tensor):
        return
    num_bad = tensor.numel() - int(tensor.isfinite().sum())
    raise ModelError(
        f"tensor {name!r} holds {num_bad} values of {tensor.numel()} that are not finite in "
        f"{str(tensor.dtype).removeprefix('torch.')}; check the training run that wrote it"
    )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu":
        # One pass without temporaries; a NaN makes both ends NaN.
        least, greatest = torch.aminmax(tensor)
        return math.isfinite(least) and math.isfinite(greatest)
    from kernels.cpu_checks import is_finite

    return is_finite(tensor)
